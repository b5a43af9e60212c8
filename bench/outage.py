"""An outage: the database is away for ten seconds in the middle of short tasks at full rate."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import asdict, dataclass

from bench.scratch import BenchError, launcher, opened, scratch_site
from ensemble.core.database import DRIVER_ERRORS
from ensemble.core.model import NewTask, Output
from ensemble.core.store import Store
from ensemble.site import Site

AWAY_S = 10.0
ROUNDS = 3
TASKS = 10_000
FLAGS = ("--job-mode=serial", "--nodes=1", "--idle-timeout=1")
DONE = "SELECT count(*) FROM task WHERE state = 'JOB_FINISHED' AND lease_id IS NULL"
SPAN = """
SELECT extract(epoch FROM max(ended_at) - min(started_at))::float, extract(epoch FROM max(pause))::float
  FROM (SELECT started_at, ended_at, ended_at - lag(ended_at) OVER (ORDER BY ended_at) AS pause
          FROM attempt) a
"""
#: Done with one attempt, which was its only one.
GOOD = """
SELECT count(*) FROM task t WHERE t.state = 'JOB_FINISHED' AND t.attempt = 1
   AND (SELECT count(*) FROM attempt a WHERE a.task_id = t.id AND a.outcome = 'done') = 1
"""


async def run() -> dict[str, object]:
    plain, away = [], []
    for _ in range(ROUNDS):
        plain.append(await measure(away_s=0.0))
        away.append(await measure(away_s=AWAY_S))
    longer = statistics.median(each.took_s for each in away) - statistics.median(
        each.took_s for each in plain
    )
    bad = sum(TASKS - each.good for each in away)
    return {
        "what": f"outage: the database stopped for {AWAY_S:g} s while {TASKS:,} x /bin/true run,"
        f" 2 slots; {ROUNDS} with and {ROUNDS} without",
        "bar": f"0 tasks lost or run again; <= {AWAY_S + 2:g} s longer",
        "measured": f"{bad} lost or run again; {longer:.1f} s longer; longest time without an end"
        f" {max(each.pause_s for each in away):.1f} s",
        "detail": {
            "plain": [asdict(each) for each in plain],
            "away": [asdict(each) for each in away],
        },
    }


@dataclass(frozen=True)
class Run:
    """From the first start to the last end, the longest time in which nothing ended, and how many ran well."""

    took_s: float
    pause_s: float
    good: int


async def measure(*, away_s: float) -> Run:
    """Run all tasks, with the database away in the middle."""
    async with scratch_site() as site, opened(site) as store:
        task = NewTask(command=["/bin/true"], node_packing_count=2, output=Output.NONE)
        await store.add([task] * TASKS)
        with launcher(site, *FLAGS) as process:
            async with asyncio.timeout(300):
                await done(store, TASKS // 3)
                if away_s:
                    await go_away(site, away_s)
                await done(store, TASKS)
            await asyncio.to_thread(process.wait, 60)
        ((took_s, pause_s),) = await store.pool.fetch(SPAN)
        return Run(took_s, pause_s, await store.pool.fetchval(GOOD))


async def go_away(site: Site, away_s: float) -> None:
    """Stop the database; have it answer again so long after it stopped to."""
    if site.cluster is None:
        raise BenchError("the database is not this site's own")
    began = time.monotonic()
    await site.cluster.stop("fast")
    await asyncio.sleep(began + away_s - time.monotonic())
    await site.cluster.start()


async def done(store: Store, count: int) -> None:
    while True:
        try:
            if await store.pool.fetchval(DONE) >= count:
                return
        except DRIVER_ERRORS:
            pass  # it has just come back, and this connection is of before
        await asyncio.sleep(0.1)
