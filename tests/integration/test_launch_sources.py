"""The environment scripts of apps: run once, for however many tasks wait for them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from ensemble.drivers.taskenv import source
from ensemble.errors import LaunchError


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "env.sh"
    path.write_text(f"echo run >> {tmp_path}/runs\n{text}\n")
    return str(path)


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


async def test_tasks_that_start_together_do_not_each_run_the_script(
    tmp_path: Path,
) -> None:
    path = script(tmp_path, "sleep 0.2; export FOUND=it")
    found = await asyncio.gather(*(source(path, dict(os.environ)) for _ in range(20)))
    assert {env["FOUND"] for env in found} == {"it"}
    assert runs(tmp_path) == 1


async def test_a_failing_script_fails_all_that_wait_and_is_tried_again(tmp_path: Path) -> None:
    path = script(tmp_path, "sleep 0.1; exit 3")
    for _ in range(2):
        found = await asyncio.gather(
            *(source(path, dict(os.environ)) for _ in range(5)), return_exceptions=True
        )
        assert [type(each) for each in found] == [LaunchError] * 5
    assert runs(tmp_path) == 2


async def test_the_last_words_of_a_failing_script_are_no_longer_than_a_reason_may_be(
    tmp_path: Path,
) -> None:
    path = script(tmp_path, "printf 'no module %0100000d' 7 >&2; exit 3")
    with pytest.raises(LaunchError, match=r"failed with 3: no module 0+$") as caught:
        await source(path, dict(os.environ))
    assert len(str(caught.value)) < len(path) + 400


async def test_the_kill_of_the_task_that_runs_the_script_leaves_it_to_another(
    tmp_path: Path,
) -> None:
    path = script(tmp_path, "sleep 0.3; export FOUND=it")
    first = asyncio.create_task(source(path, dict(os.environ)))
    second = asyncio.create_task(source(path, dict(os.environ)))
    await asyncio.sleep(0.1)
    first.cancel()
    assert (await second)["FOUND"] == "it"
    with pytest.raises(asyncio.CancelledError):
        await first
    assert runs(tmp_path) == 2
