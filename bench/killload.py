"""Kill latency beside short tasks at full rate: from the UPDATE being sent to the process being gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import statistics
import time
from pathlib import Path

from bench.scratch import launcher, opened, scratch_site
from ensemble.core.model import NewTask, Output
from ensemble.core.store import Store
from ensemble.site import Site

KILLS = 100
GAP_S = 0.1
LOAD = 40_000
FLAGS = ("--job-mode=serial", "--nodes=2", "--persistent")
DONE = "SELECT count(*) FROM task WHERE state = 'JOB_FINISHED' AND id > $1"
SLEEPER = NewTask(
    command=["sh", "-c", "echo $$ > pid.new; mv pid.new pid; exec sleep 1000"],
    name="sleeper",
    node_packing_count=4 * KILLS,
    priority=1,
    output=Output.NONE,
)


async def run() -> dict[str, object]:
    async with scratch_site() as site, opened(site) as store:
        sleepers = await store.add([SLEEPER] * KILLS)
        with launcher(site, *FLAGS):
            pids = await pids_of(site, store, sleepers)
            load = NewTask(command=["/bin/true"], node_packing_count=4, output=Output.NONE)
            await store.add([load] * LOAD)
            async with asyncio.timeout(60):
                while await store.pool.fetchval(DONE, sleepers[-1]) < LOAD // 40:
                    await asyncio.sleep(0.05)
            times, rate = await kill_all(store, pids)
    return {
        "what": f"kill beside {rate:,.0f} short tasks a second, {KILLS} kills, serial mode",
        "bar": "median <= 30 ms, worst <= 300 ms",
        "measured": f"median {statistics.median(times):.1f} ms, worst {max(times):.1f} ms",
        "detail": {"ms": times, "tasks_per_s": rate},
    }


async def pids_of(site: Site, store: Store, ids: list[int]) -> dict[int, int]:
    """Wait until all sleepers run; return their processes."""
    rows = await store.pool.fetch(
        "SELECT task_id AS id, workdir FROM task_spec WHERE task_id = ANY ($1)", ids
    )
    files: dict[int, Path] = {row["id"]: site.path / row["workdir"] / "pid" for row in rows}
    async with asyncio.timeout(60):
        while not all(file.exists() for file in files.values()):
            await asyncio.sleep(0.1)
    return {task_id: int(file.read_text()) for task_id, file in files.items()}


async def kill_all(store: Store, pids: dict[int, int]) -> tuple[list[float], float]:
    """Kill one after another; return the milliseconds of each, and the rate of the tasks beside."""
    times = []
    first = max(pids)
    before, began = await store.pool.fetchval(DONE, first), time.perf_counter()
    async with store.pool.acquire() as connection:
        for task_id, pid in pids.items():
            with contextlib.closing(open(os.pidfd_open(pid), "rb", buffering=0)) as handle:
                sent = time.perf_counter()
                await connection.execute(
                    "UPDATE task SET state = 'USER_KILLED' WHERE id = $1", task_id
                )
                await asyncio.to_thread(select.select, [handle], [], [], 10)
                times.append(1000 * (time.perf_counter() - sent))
            await asyncio.sleep(GAP_S)
    took_s = time.perf_counter() - began
    return times, (await store.pool.fetchval(DONE, first) - before) / took_s
