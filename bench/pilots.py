"""A large allocation on one launcher: 1000 simulated pilots of 64 slots, beside the bare SQL of the same work.

The launcher, the database and the protocol are real; the pilots are one process (`simulated.py`) whose tasks are
timers. What is compared is the rate while tasks are claimed and ended at once, and the rate of a loop that
claims, starts and finishes as many tasks with batches as large as the launcher's were, and does nothing else.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

from bench.claim import lease_of
from bench.memory import Memory, memory_of_tree
from bench.scratch import BenchError, launcher, opened, scratch_site
from bench.serial import log_tail
from ensemble.core.leases import Lease
from ensemble.core.model import Claim, End, NewTask, Outcome, SlotRoom, Start, Vacancy
from ensemble.core.store import Store
from ensemble.site import Site

PILOTS = 1000
SLOTS = 64
#: Seconds of a run: so long that all slots are busy at the rate to reach.
SHORTEST_S, LONGEST_S = 5, 15
TASKS = 200_000
#: The part of the ends in which claims go on: the slots are full, and the queue is not empty yet.
WINDOW = [0.2, 0.6]
BARE_TASKS = 50_000

STEADY = """
SELECT extract(epoch FROM at[2] - at[1])::float FROM (
  SELECT percentile_disc($1::float[]) WITHIN GROUP (ORDER BY at) AS at
    FROM event WHERE to_state = 'JOB_FINISHED') found
"""
#: The rows of one claim are written within microseconds of each other.
CLAIMS = """
SELECT count(*) FROM (
  SELECT claimed_at - lag(claimed_at) OVER (ORDER BY claimed_at) AS gap FROM attempt) found
 WHERE gap IS NULL OR gap > interval '0.5 ms'
"""
REPORTS = "SELECT count(DISTINCT xid) FROM event WHERE to_state = $1"
FINISHED = "SELECT count(*) FROM task WHERE state = 'JOB_FINISHED' AND lease_id IS NULL"
ATTEMPTS = "SELECT count(*) FROM attempt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """How many tasks the launcher's statements were about, on average."""

    claim: int
    start: int
    finish: int


async def run() -> dict[str, object]:
    async with scratch_site() as site, opened(site) as store:
        await store.add([task()] * TASKS)
        memory, simulated = await launch(site, store)
        steady_s = await store.pool.fetchval(STEADY, WINDOW)
        rate = TASKS * (WINDOW[1] - WINDOW[0]) / steady_s
        attempts = await store.pool.fetchval(ATTEMPTS)
        batches = Batches(
            claim=average(attempts, await store.pool.fetchval(CLAIMS)),
            start=average(TASKS, await store.pool.fetchval(REPORTS, "RUNNING")),
            finish=average(TASKS, await store.pool.fetchval(REPORTS, "JOB_FINISHED")),
        )
    bare = {}
    for name, with_starts in (("claim, start, finish", True), ("claim, finish", False)):
        async with scratch_site() as site, opened(site) as store:
            await store.add([task()] * TASKS)
            lease = await lease_of(store)
            took = await bare_loop(lease, batches, with_starts=with_starts)
            bare[name] = BARE_TASKS / took
    peak = max((each["launcher"].pss_mb for each in memory if "launcher" in each), default=0.0)
    ratios = ", ".join(f"{rate / its:.2f} x {name}" for name, its in bare.items())
    return {
        "what": f"{PILOTS} simulated pilots x {SLOTS} slots, {TASKS} tasks of "
        f"{SHORTEST_S}-{LONGEST_S} s, beside the bare SQL",
        "bar": ">= 0.5 x claim and finish, >= 5,000/s; launcher <= 150 MB with 64k tasks",
        "measured": f"{rate:,.0f}/s, {ratios}; launcher {peak:.0f} MB "
        f"with up to {simulated.get('most_at_once', 0):,} tasks running",
        "detail": {
            "per_s": rate,
            "bare_per_s": bare,
            "batches": {"claim": batches.claim, "start": batches.start, "finish": batches.finish},
            "attempts": attempts,
            "launcher_pss_mb": [each["launcher"].pss_mb for each in memory if "launcher" in each],
            "simulated": simulated,
        },
    }


def task() -> NewTask:
    return NewTask(command=["true"], node_packing_count=SLOTS)


def average(count: int, statements: int) -> int:
    return max(round(count / max(statements, 1)), 1)


async def launch(site: Site, store: Store) -> tuple[list[dict[str, Memory]], dict[str, object]]:
    """Run a launcher with simulated pilots until all is done; return memory over time and what they saw."""
    command = site.path / "simulated-mpirun"
    program = Path(__file__).with_name("simulated.py")
    command.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-P", str(program)])} "$@"\n')
    command.chmod(0o755)
    memory = []
    flags = ("--job-mode", "serial", "--nodes", str(PILOTS), "--idle-timeout", "0")
    environ = {
        "ENSEMBLE_MPI_LAUNCHER": "mpich",
        "ENSEMBLE_MPI_COMMAND": str(command),
        "ENSEMBLE_BENCH_PILOTS": f"{SLOTS} {SHORTEST_S} {LONGEST_S}",
    }
    with launcher(site, *flags, **environ) as process:
        end = time.monotonic() + 900
        while process.poll() is None:
            if time.monotonic() > end:
                raise BenchError(f"not done within 900 s; {log_tail(site)}")
            memory.append(memory_of_tree(process.pid))
            await asyncio.sleep(2)
    finished = await store.pool.fetchval(FINISHED)
    if process.returncode != 0 or finished != TASKS:
        raise BenchError(
            f"the launcher ended with {process.returncode} after {finished} of {TASKS} tasks; "
            f"{log_tail(site)}"
        )
    return memory, simulated_result(site)


def simulated_result(site: Site) -> dict[str, object]:
    """Return what the simulated pilots printed, from the log of their launch."""
    for file in (site.path / "log").rglob("pilots-0.log"):
        for line in file.read_text("utf-8", "replace").splitlines():
            if line.startswith('{"most_at_once"'):
                found: dict[str, object] = json.loads(line)
                return found
    return {}


async def bare_loop(lease: Lease, batches: Batches, *, with_starts: bool) -> float:
    """Claim and finish BARE_TASKS tasks; return the seconds it took."""
    node = Vacancy(nodes=PILOTS, share=Fraction(1), cores=0, all_cores=0, gpus=0, memory_mb=None)
    room = SlotRoom(free=(node,), whole=(node,), left_s=None, max_tasks=batches.claim)
    claimed: list[Claim] = []
    unstarted: list[Claim] = []
    left = BARE_TASKS
    began = time.perf_counter()
    while left > 0:
        while len(claimed) < min(batches.finish, left):
            taken = await lease.claim(room, None)
            if not taken:
                raise BenchError("the bare loop found nothing to claim")
            claimed += taken
            unstarted += taken
        while with_starts and unstarted:
            batch, unstarted = unstarted[: batches.start], unstarted[batches.start :]
            at = datetime.now(UTC)
            await lease.start(
                [Start(id=c.id, attempt=c.attempt, at=at, nodes=("n0",)) for c in batch]
            )
        batch, claimed = claimed[: batches.finish], claimed[batches.finish :]
        verdicts = await lease.finish(ended(batch))
        if len(verdicts) != len(batch):
            raise BenchError(f"{len(batch)} ends, {len(verdicts)} answers")
        left -= len(batch)
    return time.perf_counter() - began


def ended(batch: list[Claim]) -> list[End]:
    at = datetime.now(UTC)
    return [
        End(
            id=claim.id,
            attempt=claim.attempt,
            outcome=Outcome.DONE,
            started_at=at - timedelta(seconds=SHORTEST_S),
            at=at,
            nodes=("n0",),
            exit_code=0,
        )
        for claim in sorted(batch, key=lambda claim: claim.id)
    ]
