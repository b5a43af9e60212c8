"""Kill latency: from the UPDATE being sent to the process being gone, seen by pidfd."""

from __future__ import annotations

import asyncio
import os
import select
import statistics
import time

from bench.scratch import launcher, opened, scratch_site
from ensemble.core.model import NewTask, Selector
from ensemble.core.states import State

KILLS = 100
NODES = 10


async def run() -> dict[str, object]:
    script = "echo $$ > pid; exec sleep 1000"
    times = []
    async with scratch_site() as site, opened(site) as store:
        await store.add([NewTask(command=["sh", "-c", script]) for _ in range(KILLS)])
        with launcher(site, "--nodes", str(NODES), "--idle-timeout", "0"):
            async with store.pool.acquire() as connection:
                while len(times) < KILLS:
                    running = Selector(states=(State.RUNNING,))
                    for task in await store.tasks(running, limit=1):
                        pid_file = site.path / task.workdir / "pid"
                        pidfd = os.pidfd_open(int(pid_file.read_text()))
                        began = time.perf_counter()
                        await connection.execute(
                            "UPDATE task SET state = 'USER_KILLED' WHERE id = $1", task.id
                        )
                        await asyncio.to_thread(select.select, [pidfd], [], [], 10)
                        times.append(1000 * (time.perf_counter() - began))
                        os.close(pidfd)
                    await asyncio.sleep(0.02)
    return {
        "what": f"kill: UPDATE sent to process gone, {KILLS} kills, mpi mode, no MPI launcher",
        "bar": "median <= 20 ms, worst <= 200 ms",
        "measured": f"median {statistics.median(times):.1f} ms, worst {max(times):.1f} ms",
        "detail": {"ms": times},
    }
