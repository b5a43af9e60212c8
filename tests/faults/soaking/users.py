"""What users do while tasks run: kills, retries, removals, changes, plain SQL, transactions left open."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

from ensemble.core.database import connect, wrapped
from ensemble.core.model import Changes
from ensemble.core.store import Store
from ensemble.errors import EnsembleError

#: They look at so many of the youngest tasks.
_YOUNG = 15_000
_PLAIN_KILL = """
    UPDATE task SET state = 'USER_KILLED'
     WHERE id = ANY ($1) AND state IN ('PREPROCESSED', 'RESTART_READY', 'RUNNING', 'AWAITING_PARENTS')
"""
_RUNNING = "SELECT id FROM task WHERE id = ANY ($1) AND state = 'RUNNING'"
_ENDED = "SELECT id FROM task WHERE id = ANY ($1) AND state IN ('FAILED', 'USER_KILLED')"
_LOCK = "SELECT id FROM task WHERE id = ANY ($1) ORDER BY id FOR UPDATE"


class Users:
    """Acts at random moments upon random tasks."""

    def __init__(self, store: Store, ids: Sequence[int], rng: random.Random) -> None:
        self._store = store
        self._ids = ids
        self._rng = rng
        self.acts: Counter[str] = Counter()
        #: What they asked to have removed: whether it was, is seen at the end.
        self.removals: set[int] = set()

    async def act(self, *, gap_s: float = 0.4) -> None:
        """Act for ever."""
        acts = {
            self._kill: 5,
            self._kill_plainly: 3,
            self._kill_running: 5,
            self._retry: 4,
            self._remove: 2,
            self._modify: 3,
            self._hold_open: 1,
        }
        while True:
            await asyncio.sleep(self._rng.expovariate(1 / gap_s))
            (act,) = self._rng.choices(list(acts), list(acts.values()))
            name = act.__name__.strip("_")
            if not self._ids:
                continue
            try:
                async with asyncio.timeout(20), wrapped():
                    await act()
            except (EnsembleError, TimeoutError) as error:
                # Refused, rightly, or the database was away.
                self.acts[f"{name}: {type(error).__name__}"] += 1
            else:
                self.acts[name] += 1

    def _some(self, most: int) -> list[int]:
        """Choose some of the youngest tasks."""
        first = max(0, len(self._ids) - _YOUNG)
        count = self._rng.randint(1, most)
        return [self._ids[self._rng.randrange(first, len(self._ids))] for _ in range(count)]

    async def _kill(self) -> None:
        await self._store.kill(self._some(20), reason="a user's kill")

    async def _kill_plainly(self) -> None:
        async with self._store.pool.acquire() as connection:
            await connection.execute(_PLAIN_KILL, sorted(self._some(20)))

    async def _kill_running(self) -> None:
        found = await self._store.pool.fetch(_RUNNING, self._some(3000))
        if found:
            ids = [row["id"] for row in found]
            await self._store.kill(self._rng.sample(ids, min(5, len(ids))))

    async def _retry(self) -> None:
        found = await self._store.pool.fetch(_ENDED, self._some(3000))
        await self._store.retry([row["id"] for row in found][:20])

    async def _remove(self) -> None:
        ids = self._some(300)
        self.removals.update(ids)
        await self._store.remove(ids)

    async def _modify(self) -> None:
        (task_id,) = self._some(1)
        await self._store.modify(task_id, Changes(priority=self._rng.randint(-3, 3)))

    async def _hold_open(self) -> None:
        """Lock rows for a second, as a forgotten psql does, and take it all back, or not."""
        ids = sorted(self._some(100))
        connection = await connect(self._store.address, name="soak psql")
        try:
            await connection.execute("BEGIN")
            await connection.fetch(_LOCK, ids)
            await connection.execute("UPDATE task SET priority = 1 WHERE id = ANY ($1)", ids)
            await asyncio.sleep(1)
            await connection.execute(self._rng.choice(("COMMIT", "ROLLBACK")))
        finally:
            connection.terminate()
