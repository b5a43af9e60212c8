"""From the end of a task on a node to the start of the next one there, for tasks above a second."""

from __future__ import annotations

import statistics

from bench.scratch import launcher, opened, scratch_site, until_finished
from ensemble.core.model import NewTask

NODES = 4
TASKS = 32

GAPS = """
SELECT extract(epoch FROM started_at - lag(ended_at) OVER (PARTITION BY nodes ORDER BY started_at))
       * 1000 AS ms
  FROM attempt
"""


async def run() -> dict[str, object]:
    async with scratch_site() as site, opened(site) as store:
        # Longer than what is claimed ahead, and never two at the same moment.
        await store.add(
            [NewTask(command=["sleep", f"{1.1 + 0.013 * i:.3f}"]) for i in range(TASKS)]
        )
        with launcher(site, "--nodes", str(NODES), "--idle-timeout", "0"):
            await until_finished(store, TASKS)
        rows = await store.pool.fetch(GAPS)
    gaps = [float(row["ms"]) for row in rows if row["ms"] is not None]
    return {
        "what": f"node free to next task started, {TASKS} tasks of 1.1-1.5 s, {NODES} nodes",
        "bar": "median <= 10 ms",
        "measured": f"median {statistics.median(gaps):.1f} ms, worst {max(gaps):.1f} ms",
        "detail": {"ms": gaps},
    }
