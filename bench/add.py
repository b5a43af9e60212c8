"""Bulk add: tasks a second into an empty store, in one transaction."""

from __future__ import annotations

import time

from bench.scratch import opened, scratch_site
from ensemble.core.model import NewApp, NewTask

TASKS = 100_000


async def run() -> dict[str, object]:
    async with scratch_site() as site, opened(site) as store:
        await store.add_app(NewApp(name="dock", command="vina --config {conf} --seed {seed}"))
        tasks = [
            NewTask(app="dock", params={"conf": f"c{i}.txt", "seed": str(i)}, workflow="screen")
            for i in range(TASKS)
        ]
        began = time.perf_counter()
        await store.add(tasks)
        seconds = time.perf_counter() - began
    return {
        "what": f"add of {TASKS} tasks in one transaction, with their history",
        "bar": ">= 20,000 tasks/s",
        "measured": f"{TASKS / seconds:,.0f} tasks/s",
        "detail": {"seconds": seconds},
    }
