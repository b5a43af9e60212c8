"""How long the command line takes, as whole processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from bench.scratch import opened, scratch_site
from ensemble.core.model import NewTask

ROUNDS = 10


def milliseconds(*argv: str) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "ensemble", *argv],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


async def run() -> dict[str, object]:
    async with scratch_site() as site, opened(site) as store:
        await store.add([NewTask(command=["true"])] * 100)
        help_ms, ls_ms = milliseconds("--help"), milliseconds("--site", str(site.path), "ls")
    return {
        "what": "`ensemble --help` and `ensemble ls` of 100 tasks",
        "bar": "<= 150 ms, <= 300 ms",
        "measured": f"{help_ms:.0f} ms, {ls_ms:.0f} ms",
        "detail": {},
    }
