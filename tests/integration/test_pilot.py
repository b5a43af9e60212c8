"""A pilot, and whatever speaks to it: no launcher and no guard are needed."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from ensemble.core import wire
from ensemble.core.model import Need, Output
from ensemble.core.wire import Bye, Decoder, Failed, FromPilot, Hello, Report, Run, Welcome, Work
from ensemble.drivers.pilot import Pilot

HELLO = Hello(
    protocol=wire.PROTOCOL, rank=0, size=1, launch=1, host="n1", pid=1, cores=[], gpus=[],
    memory_mb=None,
)  # fmt: skip


def welcome(site: Path) -> Welcome:
    return Welcome(
        node="n1", cores=[[0]], gpus=[], memory_mb=None, slots_per_node=1, site=os.fsencode(site),
        marker_prefix=f"9{os.getpid()}-1-1.", environ={}, grace_s=0.1, error_tail_lines=5,
        is_pinned=False,
    )  # fmt: skip


async def test_all_starts_that_fail_at_once_are_reported_however_long_the_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a pilot goes wherever its tasks run
    program = "./" + "\x01" * 30_000  # four times as long where it is shown
    works = [
        Work(
            id=number, attempt=1, name="x", workflow="w", argv=(program,), workdir="x",
            output=Output.NONE, environ={}, env_script=None, parent_ids=(), need=Need(),
        )
        for number in range(200)
    ]  # fmt: skip
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    decoder = Decoder[FromPilot](FromPilot)
    failed: list[Failed] = []
    async with asyncio.TaskGroup() as group:
        pilot = Pilot(HELLO, None, group)
        await asyncio.get_running_loop().create_connection(lambda: pilot, sock=theirs)
        writer.write(wire.encode(welcome(tmp_path)))
        writer.write(wire.encode(Run(works)))
        async with asyncio.timeout(30):
            while len(failed) < len(works):
                for message in decoder.feed(await reader.read(1 << 16)):
                    failed += message.failed if isinstance(message, Report) else []
        writer.write(wire.encode(Bye()))
        await pilot.is_over.wait()
        writer.close()
    assert sorted(each.id for each in failed) == list(range(200))
    assert all(each.reason.startswith(r"cannot run ./\x01") for each in failed)
