"""A site in a scratch directory, and launchers in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from ensemble.core.store import Store
from ensemble.site import Site, create


class BenchError(Exception):
    """A figure cannot be had, and why; the other measurements go on."""


@contextlib.asynccontextmanager
async def scratch_site() -> AsyncIterator[Site]:
    path = Path(tempfile.mkdtemp(prefix="ensemble-bench-"))
    site = None
    with _in_memory(path / "data"):
        try:
            await create(path)
            site = Site.find(str(path))
            yield site
        finally:
            if site is not None and site.cluster is not None:
                await site.cluster.stop("immediate")
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _in_memory(folder: Path) -> Iterator[None]:
    """Keep work directories in memory; the database stays on disk.

    For some minutes after thousands of files were deleted (the round before did that), ext4 takes up to a
    millisecond to make one (`recently_deleted` in its inode allocator): no round could be compared with another.
    """
    if not os.access("/dev/shm", os.W_OK | os.X_OK):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ensemble-bench-", dir="/dev/shm") as memory:
        folder.symlink_to(memory)
        yield


@contextlib.asynccontextmanager
async def opened(site: Site, **options: int) -> AsyncIterator[Store]:
    store = await Store.open(site.address(), name="bench", **options)
    try:
        yield store
    finally:
        await store.close()


@contextlib.contextmanager
def launcher(site: Site, *flags: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher as a user starts it; drained at the end."""
    argv = [sys.executable, "-m", "ensemble", "--site", str(site.path), "launch", *flags]
    log = (site.path / "log" / "bench.log").open("ab")
    with log, subprocess.Popen(argv, env=os.environ | environ, stderr=log, stdout=log) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


async def until_finished(store: Store, count: int, *, timeout_s: float = 600) -> None:
    async with asyncio.timeout(timeout_s):
        while sum((await store.counts()).by_state.values()) < count or await _open(store):
            await asyncio.sleep(0.25)  # looking costs the store something, too


async def _open(store: Store) -> int:
    counts = await store.counts()
    final = ("JOB_FINISHED", "FAILED", "USER_KILLED")
    return sum(n for state, n in counts.by_state.items() if state not in final) + sum(
        counts.held.values()
    )
