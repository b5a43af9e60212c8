"""Drain: TERM to a launcher of a thousand running tasks, until all are marked, gone, and it has left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from bench.memory import tree
from bench.scratch import launcher, opened, scratch_site
from ensemble.core.model import NewTask
from ensemble.core.store import Store

TASKS = 1000
ROUNDS = 3
FLAGS = ("--job-mode=serial", "--nodes=1", f"--slots-per-node={TASKS}", "--persistent")
STATES = "SELECT count(*) FROM task WHERE state = 'RUNNING'"


async def run() -> dict[str, object]:
    rounds = [await measure() for _ in range(ROUNDS)]
    marked, gone, left = (max(times) for times in zip(*rounds, strict=True))
    return {
        "what": f"drain of {TASKS} running tasks (`sleep`), serial mode, one node; worst of {ROUNDS}",
        "bar": "marked <= 1 s, processes gone <= 3 s",
        "measured": f"marked {marked:.2f} s, gone {gone:.2f} s, launcher gone {left:.2f} s",
        "detail": {"marked_gone_left_s": rounds},
    }


async def measure() -> tuple[float, float, float]:
    """Return the seconds until all are marked, all are gone, and the launcher is gone."""
    async with scratch_site() as site, opened(site) as store:
        task = NewTask(command=["sleep", "1000"], node_packing_count=TASKS)
        await store.add([task] * TASKS)
        with launcher(site, *FLAGS) as process:
            async with asyncio.timeout(120):
                while await store.pool.fetchval(STATES) < TASKS:
                    await asyncio.sleep(0.1)
            with handles(process.pid) as fds:
                began = time.perf_counter()
                process.send_signal(signal.SIGTERM)
                ending = asyncio.create_task(asyncio.to_thread(all_gone, fds))
                marked = await all_marked(store) - began
                gone = await ending - began
            await asyncio.to_thread(process.wait, 60)
            left = time.perf_counter() - began
    return marked, gone, left


async def all_marked(store: Store) -> float:
    async with asyncio.timeout(60):
        while await store.pool.fetchval(STATES):
            await asyncio.sleep(0.005)
    return time.perf_counter()


@contextlib.contextmanager
def handles(root: int) -> Iterator[list[int]]:
    """Open a handle on each sleeper below a process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    fds = [os.pidfd_open(pid) for pid in tree(root) if is_sleeper(pid)]
    assert len(fds) == TASKS, f"{len(fds)} sleepers"
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def all_gone(fds: list[int]) -> float:
    poll, left = select.poll(), set(fds)
    for fd in fds:
        poll.register(fd, select.POLLIN)
    while left:
        for fd, _ in poll.poll():
            poll.unregister(fd)
            left.discard(fd)
    return time.perf_counter()


def is_sleeper(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep\0")
    return False
