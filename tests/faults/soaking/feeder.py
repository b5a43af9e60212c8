"""Keeps a bounded backlog of tasks of many kinds, and knows how many it has added."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from ensemble.core.database import wrapped
from ensemble.core.model import NewTask, Output
from ensemble.core.store import Store
from ensemble.errors import EnsembleError
from tests.faults.witness import witnessed
from tests.integration.launching import sh

#: Runnable tasks that nobody has taken: more are added below this.
BACKLOG = 6000
BATCH = 1500
_WAITING = """
    SELECT count(*) FROM (
      SELECT 1 FROM task WHERE state IN ('PREPROCESSED', 'RESTART_READY') AND lease_id IS NULL LIMIT 10000
    ) runnable
"""

Kind = Callable[[random.Random], NewTask]
#: What comes between the mass of tasks; each with how often of all these.
KINDS: dict[str, tuple[float, Kind]] = {
    "packed": (20, lambda rng: _sh("true", rng.choice((3, 16, 64, 256)), output=Output.NONE)),
    "sleep": (20, lambda rng: _sh(f"sleep {rng.uniform(0, 1):.2f}", output=Output.NONE)),
    "witnessed": (20, lambda rng: _witnessed(f"sleep {rng.uniform(0, 0.5):.2f}")),
    "long": (2, lambda rng: _witnessed(f"sleep {rng.uniform(2, 8):.2f}")),
    "fails": (4, lambda rng: _witnessed("exit 3", max_retries=rng.choice((0, 1, 3)))),
    "recovers": (4, lambda rng: _witnessed('[ "$ENSEMBLE_ATTEMPT" -gt 1 ]', max_retries=5)),
    "limited": (1, lambda rng: _witnessed("sleep 60", time_limit_minutes=0.02, max_retries=1)),
    "stubborn": (0.5, lambda rng: _witnessed("trap '' TERM; sleep 3; sleep 3", time_limit_minutes=0.03)),
    "family": (2, lambda rng: _witnessed("setsid sleep 60 & (sleep 60 &) ; sleep 0.2")),
    "tail": (8, lambda rng: _sh("echo begun; sleep 0.01; echo ended", output=Output.TAIL)),
    "file": (8, lambda rng: _sh("echo some words")),
    "big": (1, lambda rng: _sh("yes words | head -c 3000000", output=rng.choice(("file", "tail")))),
    "missing": (0.5, lambda rng: NewTask(command=["/no/such/program"], name="missing")),
    "ranks": (2, lambda rng: NewTask(command=["true"], name="ranks", ranks_per_node=2)),
    "wide": (1, lambda rng: NewTask(command=["sleep", "0.2"], name="wide", num_nodes=2)),
}  # fmt: skip
MASS = NewTask(command=["/bin/true"], node_packing_count=8, output=Output.NONE)
#: How many of a hundred, of all but the mass, wait for others of their batch.
CHILDREN = 25


def _sh(script: str, packing: int = 32, **fields: object) -> NewTask:
    return sh(script, node_packing_count=packing, **fields)


def _witnessed(script: str, packing: int = 32, **fields: object) -> NewTask:
    return witnessed(script, node_packing_count=packing, **fields)


class Feeder:
    """Adds tasks, each batch once, however often the database fails meanwhile."""

    def __init__(
        self,
        store: Store,
        rng: random.Random,
        *,
        most: int | None,
        rate: float | None,
        mass: float,
    ) -> None:
        self._store = store
        self._rng = rng
        self._most = most
        self._rate = rate
        #: Which part of all tasks is the mass.
        self._mass = mass
        #: Every id that the store has given us.
        self.ids: list[int] = []
        #: Attempts that had to be repeated.
        self.repeats = 0
        self.batches = 0
        self._pending: tuple[str, list[NewTask]] | None = None

    async def feed(self) -> None:
        """Keep the backlog up, for ever or until all is added."""
        began = time.monotonic()
        while self._most is None or len(self.ids) < self._most:
            allowed = BATCH
            if self._rate is not None:
                due = self._rate * (time.monotonic() - began + 1)
                allowed = min(allowed, int(due) - len(self.ids))
            if self._most is not None:
                allowed = min(allowed, self._most - len(self.ids))
            if allowed > 0 and await self._waiting() < BACKLOG:
                await self._add(self._make(allowed))
            else:
                await asyncio.sleep(0.1)

    async def _waiting(self) -> int:
        try:
            async with wrapped():
                return int(await self._store.pool.fetchval(_WAITING))
        except EnsembleError:
            await asyncio.sleep(0.2)
            return BACKLOG

    async def _add(self, tasks: list[NewTask]) -> None:
        self.batches += 1
        self._pending = (f"batch-{self.batches}", tasks)
        await self.finish()

    async def finish(self) -> None:
        """Bring the batch that was begun to its end."""
        while self._pending is not None:
            key, tasks = self._pending
            try:
                self.ids += await self._store.add(tasks, key=key)
            except EnsembleError:  # whether it was applied is unknown: the key tells the store
                self.repeats += 1
                await asyncio.sleep(0.2)
            else:
                self._pending = None

    def _make(self, count: int) -> list[NewTask]:
        tasks: list[NewTask] = []
        named: list[str] = []
        for number in range(count):
            if self._rng.random() < self._mass:
                tasks.append(MASS)
                continue
            (name,) = self._rng.choices(list(KINDS), [share for share, _ in KINDS.values()])
            task = KINDS[name][1](self._rng)
            # Parents are told by the name of a task of the same submission.
            unique = f"{task.name or name}-{number}"
            tasks.append(_changed(task, name=unique, parents=self._parents(named)))
            named.append(unique)
        return tasks

    def _parents(self, named: list[str]) -> list[int | str]:
        if not named or self._rng.uniform(0, 100) >= CHILDREN:
            return []
        return list({self._rng.choice(named) for _ in range(self._rng.choice((1, 1, 2, 3)))})


def _changed(task: NewTask, **fields: object) -> NewTask:
    values = {name: getattr(task, name) for name in task.__struct_fields__}
    return NewTask(**{**values, **fields})
