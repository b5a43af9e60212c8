"""mpi mode: launches per second, beside a bare loop that keeps as many mpiexec in flight."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from bench.scratch import launcher, opened, scratch_site, until_finished
from ensemble.core.model import NewTask

TASKS = 1000
NODES = 2
ROUNDS = 5


def mpiexec() -> str:
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else str(shutil.which("mpiexec"))


def bare_loop(count: int) -> float:
    """Seconds to run *count* launches with NODES in flight: Popen, and wait for whichever ends."""
    argv = [mpiexec(), "-n", "1", "true"]
    files = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    left, running = count, set()
    began = time.perf_counter()
    while left or running:
        while left and len(running) < NODES:
            running.add(os.posix_spawn(argv[0], argv, os.environ, file_actions=files))
            left -= 1
        pid, _status = os.wait()
        running.discard(pid)
    return time.perf_counter() - began


async def run() -> dict[str, object]:
    ratios, ours, bare = [], [], []
    for _ in range(ROUNDS):
        async with scratch_site() as site, opened(site) as store:
            ids = await store.add([NewTask(command=["true"]) for _ in range(TASKS)])
            with launcher(
                site,
                "--nodes",
                str(NODES),
                "--idle-timeout",
                "0",
                ENSEMBLE_MPI_WRAP_SINGLE_RANK="true",
            ):
                await until_finished(store, TASKS)
                async with store.pool.acquire() as connection:
                    seconds = await connection.fetchval(
                        "SELECT extract(epoch FROM max(ended_at) - min(claimed_at))::float FROM attempt"
                    )
            assert len(ids) == TASKS
        ours.append(TASKS / seconds)
        bare.append(TASKS / bare_loop(TASKS))
        ratios.append(ours[-1] / bare[-1])
    middle = sorted(ratios)[len(ratios) // 2]
    return {
        "what": f"mpi mode, {TASKS} x `mpiexec -n 1 true`, {NODES} nodes",
        "bar": ">= 0.8 x the bare loop",
        "measured": f"{middle:.2f} x",
        "detail": {"ensemble_per_s": ours, "bare_per_s": bare, "ratios": ratios},
    }
