"""serial mode: tasks that share one node, beside a loop in C that only starts and waits.

A round runs from the first start on record to the moment the last end is seen committed: history, holds
and output files are written by then. The loop in C runs right after it, on the same machine in the same state.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime

from bench import floor
from bench.memory import Memory, memory_of_tree
from bench.scratch import BenchError, launcher, opened, scratch_site
from ensemble.core.model import NewTask
from ensemble.core.store import Store
from ensemble.site import Site

SLOTS = 2
TRUE = ("/bin/true",)
TASKS = 5000
ROUNDS = 5
#: For tasks that last: the program, how many, seconds of each, rounds.
SLEEPS = {"short": ("0.05", 200, 3), "long": ("1", 20, 3)}
FLAGS = ("--job-mode", "serial", "--nodes", "1", "--idle-timeout", "0")

TALLY = """
SELECT count(*) FILTER (WHERE state = 'JOB_FINISHED' AND lease_id IS NULL) AS finished,
       count(*) FILTER (WHERE state IN ('FAILED', 'USER_KILLED')) AS failed
  FROM task
"""
SPAN = "SELECT min(started_at) AS first, max(ended_at) AS last, count(*) AS attempts FROM attempt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round took, in seconds, and the memory of Ensemble's processes half-way."""

    #: From the first start to the last end, as recorded.
    recorded_s: float
    #: From the first start until the last end was seen committed.
    committed_s: float
    memory: dict[str, Memory] = field(default_factory=dict)


async def run_round(argv: Sequence[str], count: int, *, timeout_s: float = 600) -> Round:
    """Run *count* times *argv*, SLOTS of them at a time, in a new site."""
    async with scratch_site() as site, opened(site) as store:
        task = NewTask(command=list(argv), node_packing_count=SLOTS)
        await store.add([task] * count)
        with launcher(site, *FLAGS) as process:
            async with asyncio.timeout(timeout_s):
                memory = await until_committed(site, store, process, count)
                seen = time.time()
        ((first, last, attempts),) = await store.pool.fetch(SPAN)
        if attempts != count:
            raise BenchError(f"{count} tasks took {attempts} attempts")
        await check_outputs(site, store, count)
    return Round(
        recorded_s=(last - first).total_seconds(),
        committed_s=seen - first.timestamp(),
        memory=memory,
    )


async def until_committed(
    site: Site, store: Store, process: subprocess.Popen[bytes], count: int
) -> dict[str, Memory]:
    """Wait for the last commit, looking more often as it comes nearer: each look costs the run a little."""
    memory: dict[str, Memory] = {}
    began = time.perf_counter()
    while True:
        ((finished, failed),) = await store.pool.fetch(TALLY)
        if failed:
            raise BenchError(f"{failed} tasks failed; {log_tail(site)}")
        if finished >= count:
            return memory
        if (status := process.poll()) is not None:
            raise BenchError(f"the launcher ended with {status}; {log_tail(site)}")
        if not memory and finished >= count / 2:
            memory = memory_of_tree(process.pid)
        spent = time.perf_counter() - began
        left = spent * (count - finished) / finished if finished else spent
        await asyncio.sleep(min(max(left / 4, 0.003), 0.25))


async def check_outputs(site: Site, store: Store, count: int) -> None:
    """Make sure that every task left its output file: it is part of what was measured."""
    rows = await store.pool.fetch("SELECT name, workdir FROM task_spec")
    files = sum((site.path / row["workdir"] / f"{row['name']}.out").exists() for row in rows)
    if files != count:
        raise BenchError(f"{count} tasks left {files} output files")


def log_tail(site: Site) -> str:
    lines = (site.path / "log" / "bench.log").read_text("utf-8", "replace").splitlines()
    return "its log ends: " + (" | ".join(lines[-3:]) or "(empty)")


async def run() -> dict[str, object]:
    ours, bare, rounds = [], [], []
    with floor.compiled() as loop:
        for _ in range(ROUNDS):
            rounds.append(await run_round(TRUE, TASKS))
            ours.append(TASKS / rounds[-1].committed_s)
            bare.append(TASKS / loop.seconds(TRUE, TASKS, SLOTS))
    ratios = [mine / its for mine, its in zip(ours, bare, strict=True)]
    peaks = {
        role: max(round.memory[role].pss_mb for round in rounds if role in round.memory)
        for role in sorted({role for round in rounds for role in round.memory})
    }
    held = ", ".join(f"{role} {peak:.0f} MB" for role, peak in peaks.items())
    return {
        "what": f"serial mode, {TASKS} x {TRUE[0]}, {SLOTS} slots; memory (PSS) half-way",
        "bar": ">= 0.5 x the loop in C, then 0.7; launcher <= 150 MB, pilot <= 50 MB",
        "measured": f"{statistics.median(ratios):.2f} x ({statistics.median(ours):,.0f}/s "
        f"of {statistics.median(bare):,.0f}/s); {held}",
        "detail": {
            "ensemble_per_s": ours,
            "recorded_per_s": [TASKS / round.recorded_s for round in rounds],
            "floor_per_s": bare,
            "ratios": ratios,
            "memory": [
                {role: asdict(memory) for role, memory in round.memory.items()} for round in rounds
            ],
        },
    }


async def run_short() -> dict[str, object]:
    detail: dict[str, dict[str, list[float]]] = {}
    texts = []
    with floor.compiled() as loop:
        for seconds, count, rounds in SLEEPS.values():
            argv, ideal = ("sleep", seconds), count * float(seconds) / SLOTS
            ours, recorded, bare = [], [], []
            for _ in range(rounds):
                done = await run_round(argv, count)
                ours.append(ideal / done.committed_s)
                recorded.append(ideal / done.recorded_s)
                bare.append(ideal / loop.seconds(argv, count, SLOTS))
            detail[f"sleep {seconds}"] = {"ensemble": ours, "recorded": recorded, "floor": bare}
            texts.append(
                f"sleep {seconds}: {statistics.median(ours):.3f} "
                f"(the loop in C {statistics.median(bare):.3f})"
            )
    kinds = " and ".join(f"{count} x `sleep {seconds}`" for seconds, count, _ in SLEEPS.values())
    return {
        "what": f"serial mode, {kinds}, {SLOTS} slots: ideal time / measured",
        "bar": ">= 0.95",
        "measured": "; ".join(texts),
        "detail": detail,
    }


async def run_start() -> dict[str, object]:
    """From the exec of `ensemble launch` to a task's process, and to the launcher's exit."""
    starts, totals = [], []
    async with scratch_site() as site, opened(site) as store:
        for turn in range(ROUNDS + 1):  # the first warms the database and the file cache
            (id,) = await store.add([NewTask(command=list(TRUE), node_packing_count=SLOTS)])
            began = time.time()
            with launcher(site, *FLAGS) as process:
                status = await asyncio.to_thread(process.wait, 60)
                left = time.time()
            started = await started_at(store, id)
            if status or started is None:
                raise BenchError(f"the launcher ended with {status}; {log_tail(site)}")
            if turn:
                starts.append(started.timestamp() - began)
                totals.append(left - began)
    return {
        "what": "serial mode: from `ensemble launch` to its first task's process, warm database",
        "bar": "none yet",
        "measured": f"{statistics.median(starts):.2f} s; with one task and exit "
        f"{statistics.median(totals):.2f} s",
        "detail": {"first_start_s": starts, "exit_s": totals, "cores": os.cpu_count()},
    }


async def started_at(store: Store, id: int) -> datetime | None:
    value: datetime | None = await store.pool.fetchval(
        "SELECT started_at FROM attempt WHERE task_id = $1", id
    )
    return value
