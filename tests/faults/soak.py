"""The soak: a site at full load for many minutes, with users and every fault that is known, from one seed.

    python -m tests.faults.soak [--minutes 20] [--seed N] [--tasks N] [--rate TASKS_PER_S] [--gap SECONDS]

Faults stop when the time is over, the backlog drains, and then every promise is looked at. It prints what it
did and measured; when something is broken, what, and keeps the site's directory, and ends with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.core.database import wrapped
from ensemble.core.jobs import Jobs
from ensemble.core.store import Store
from ensemble.errors import EnsembleError
from ensemble.site import program
from tests.faults.proxy import proxied_store
from tests.faults.soaking.faults import Faults
from tests.faults.soaking.feeder import Feeder
from tests.faults.soaking.fleet import Fleet, berths
from tests.faults.soaking.ground import Ground, soak_ground
from tests.faults.soaking.samples import Sampler
from tests.faults.soaking.users import Users
from tests.faults.soaking.verdict import judge

#: How long the number of open tasks may stay as it is while the backlog drains.
PATIENCE_S = 90.0
LEAVE_S = 90.0
_OPEN = """
    SELECT count(*) FROM task
     WHERE state NOT IN ('JOB_FINISHED', 'FAILED', 'USER_KILLED') OR lease_id IS NOT NULL
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run."""

    seconds: float
    seed: int
    #: At most so many tasks are added, at most so many a second; None is as many as are run.
    tasks: int | None = None
    rate: float | None = None
    #: Between two faults, on average.
    gap_s: float = 5.0
    #: Which part of the tasks are many and cheap.
    mass: float = 0.97
    period_s: float = 10.0


class Soak:
    """One run, in a site of its own."""

    def __init__(self, plan: Plan, ground: Ground, store: Store) -> None:
        self.plan = plan
        self.ground = ground
        self.store = store
        self.feeder = Feeder(
            store, self._rng("feeder"), most=plan.tasks, rate=plan.rate, mass=plan.mass
        )
        self.users = Users(store, self.feeder.ids, self._rng("users"))
        self.sampler = Sampler(ground, lambda: len(self.feeder.ids))
        self.wrong: list[str] = []
        self.lines: list[str] = []

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self.plan.seed} {name}")

    async def run(self) -> None:
        """Soak, drain, judge."""
        async with proxied_store(self.ground.site, self.ground.path) as (proxy, variables):
            fleet = Fleet(self.ground, berths(variables), self._rng("fleet"))
            faults = Faults(self.ground, fleet, proxy, self._rng("faults"))
            try:
                took_s = await self._soak(fleet, faults)
            finally:
                fleet.end()
        (self.ground.path / "log" / "faults").write_text("\n".join(faults.log) + "\n")
        await self._look_at_batch_jobs()
        self.wrong += await judge(self.ground, self.store, self.feeder.ids, self.users.removals)
        await self._sum_up(faults, took_s)

    async def _soak(self, fleet: Fleet, faults: Faults) -> float:
        """Have trouble, drain, and have all leave; return the seconds that the tasks took."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(fleet.keep())
            await self._trouble(faults)
            await faults.heal()
            await self.feeder.finish()
            say(f"faults are over after {time.monotonic() - began:.0f} s; the backlog drains")
            await self._drain()
            took_s = time.monotonic() - began
            left = await fleet.rest(within_s=LEAVE_S)
            self.wrong += [
                f"did not end: {each.pid} {each.role} {each.words[:200]}" for each in left
            ]
            keeping.cancel()
        return took_s

    async def _trouble(self, faults: Faults) -> None:
        """Feed, act, sample and inject until the time is over."""
        work: list[Coroutine[Any, Any, None]] = [
            self.feeder.feed(),
            self.users.act(),
            self.sampler.watch(period_s=self.plan.period_s),
            faults.inject(gap_s=self.plan.gap_s),
            self._tell(faults),
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.plan.seconds), asyncio.TaskGroup() as group:
                for each in work:
                    group.create_task(each)

    async def _tell(self, faults: Faults) -> None:
        while True:
            await asyncio.sleep(30)
            say(f"{len(self.feeder.ids):,} tasks added, {faults.kinds.total()} faults")

    async def _drain(self) -> None:
        """Wait until no task is open, for as long as their number falls."""
        least, since = None, time.monotonic()
        while least != 0 and time.monotonic() - since < PATIENCE_S:
            await asyncio.sleep(0.5)
            with contextlib.suppress(EnsembleError):
                async with wrapped():
                    left = await self.store.pool.fetchval(_OPEN)
                if least is None or left < least:
                    least, since = left, time.monotonic()
        if least != 0:
            self.wrong.append(f"{least} tasks have been open for {PATIENCE_S:.0f} s")

    async def _look_at_batch_jobs(self) -> None:
        """Have the records of batch jobs brought up to date: the service may have died before them."""
        argv = program(str(self.ground.path), "serve", "--once")
        for _ in range(8):  # what is not listed is given up after some looks
            if not await Jobs(self.store.pool).active():
                return
            await asyncio.to_thread(subprocess.run, argv, capture_output=True, timeout=60)
            await asyncio.sleep(0.5)

    async def _sum_up(self, faults: Faults, took_s: float) -> None:
        rows = await self.store.pool.fetch(
            "SELECT state::text, count(*) FROM task GROUP BY 1 ORDER BY 2 DESC"
        )
        ended = await self.store.pool.fetch(
            "SELECT outcome, count(*) FROM attempt GROUP BY 1 ORDER BY 2 DESC"
        )
        added = len(self.feeder.ids)
        self.lines = [
            f"seed {self.plan.seed}",
            f"{added:,} tasks in {took_s:.0f} s, {added / took_s:,.0f} a second with the drain;"
            f" {self.feeder.repeats} additions were repeated",
            "states: " + ", ".join(f"{row[0]} {row[1]:,}" for row in rows),
            "attempts: " + ", ".join(f"{row[0]} {row[1]:,}" for row in ended),
            f"{faults.kinds.total()} faults: " + _listed(faults.kinds),
            f"{self.users.acts.total()} acts of users: " + _listed(self.users.acts),
            *self.sampler.report(),
        ]


def _listed(counter: Counter[str]) -> str:
    return "; ".join(f"{name} x {count}" for name, count in sorted(counter.items()))


def say(text: str) -> None:
    """Print a line at once."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


async def soak(plan: Plan) -> tuple[Soak, Path]:
    """Run one soak; return it, and where its site is, which stays when something is broken."""
    async with soak_ground() as ground:
        say(f"seed {plan.seed}, {plan.seconds:.0f} s of faults, in {ground.path}")
        store = await Store.open(ground.site.address(), name="soak", max_size=8)
        try:
            made = Soak(plan, ground, store)
            await made.run()
            ground.is_kept = bool(made.wrong)
        except Exception:
            ground.is_kept = True
            say(f"it ended early; the site is kept in {ground.path}")
            raise
        finally:
            await store.close()
    return made, ground.path


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--tasks", type=int, default=None)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--gap", type=float, default=5.0, help="seconds between faults")
    parser.add_argument("--mass", type=float, default=0.97, help="part of the cheap tasks")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    plan = Plan(
        seconds=60 * given.minutes,
        seed=seed,
        tasks=given.tasks,
        rate=given.rate,
        gap_s=given.gap,
        mass=given.mass,
    )
    try:
        made, path = asyncio.run(soak(plan))
    except KeyboardInterrupt:
        print(f"interrupted; seed {seed}")
        return 130
    print("\n".join(made.lines))
    for each in made.wrong:
        print(f"BROKEN: {each}")
    print(f"the site is kept in {path}" if made.wrong else "nothing is broken")
    return 1 if made.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
