"""Everything a launcher does in the store under its lease, and what reapers do with a lost one.

Every write about a held task is fenced: it names the lease and the attempt, and each row of the
answer says what became of it (`Verdict`). The statements are in sql/functions.sql.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import asyncpg
import msgspec

from ensemble.core.database import again_on_deadlock, queries, wrapped
from ensemble.core.model import (
    Claim,
    End,
    LauncherIdentity,
    NewLauncher,
    Room,
    Start,
    Verdict,
)
from ensemble.core.states import State
from ensemble.errors import LeaseLostError

Verdicts = dict[tuple[int, int], Verdict]
#: No time limit, in minutes: PostgreSQL's largest `int`.
_FOR_EVER = 2**31 - 1


async def register(pool: asyncpg.Pool[Any], new: NewLauncher, *, ttl_s: float) -> Lease:
    """Register a launcher and give it a lease.

    Raises:
        AllocationError: A live launcher of the same batch job holds some of its nodes.
    """
    async with wrapped(), pool.acquire() as connection:
        row = await connection.fetchrow(
            "SELECT * FROM register_launcher($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            msgspec.to_builtins(new.identity),
            new.version,
            new.job_mode,
            new.wf_filter,
            list(new.nodes),
            new.scheduler,
            new.scheduler_job_id,
            new.restart_count,
            None if new.left_s is None else timedelta(seconds=new.left_s),
            timedelta(seconds=ttl_s),
        )
    assert row is not None
    return Lease(pool, row["lease_id"], row["launcher_id"])


class Lease:
    """A launcher's right to the tasks it took. Closed once; then every write is refused."""

    def __init__(self, pool: asyncpg.Pool[Any], lease_id: int, launcher_id: int) -> None:
        self._pool = pool
        self.id = lease_id
        self.launcher_id = launcher_id

    async def renew(self) -> None:
        """Say that the launcher lives.

        Raises:
            LeaseLostError: A reaper closed the lease.
        """
        async with wrapped():
            found = await self._pool.fetchrow(queries()["renew_lease"], self.id)
        if found is None:
            raise LeaseLostError(f"lease {self.id} was closed by a reaper")

    async def claim(self, room: Room, workflows: Sequence[int] | None) -> list[Claim]:
        """Take the best runnable tasks that fit *room*.

        Several launchers may call this at once; none waits for another and no task is handed out
        twice. After a lost answer, what was taken is found by `held`.

        Args:
            room: Free nodes and the time left. Never ask for more than can start now.
            workflows: Ids of the workflows to take from; all when None.

        Raises:
            LeaseLostError: The lease was closed; nothing was taken.
            StoreUnavailableError: The database cannot be reached.
        """
        minutes = _FOR_EVER if room.left_s is None else min(int(room.left_s // 60), _FOR_EVER)
        async with wrapped():
            rows = await self._pool.fetch(
                "SELECT * FROM claim_tasks($1, $2, $3, $4, $5, $6)",
                self.id,
                None if workflows is None else list(workflows),
                room.nodes,
                minutes,
                room.ahead,
                room.max_tasks,
            )
        return [_claim(row) for row in rows]

    async def start(self, starts: Sequence[Start]) -> Verdicts:
        """Report that processes of these attempts run."""
        return await self._report(
            "SELECT * FROM start_tasks($1, $2, $3, $4, $5)",
            [start.id for start in starts],
            [start.attempt for start in starts],
            [start.at for start in starts],
            [",".join(start.nodes) for start in starts],
        )

    async def finish(self, ends: Sequence[End]) -> Verdicts:
        """Report that nothing of these attempts runs any more; closes them and releases the holds."""
        return await self._report(
            "SELECT * FROM finish_tasks($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
            [end.id for end in ends],
            [end.attempt for end in ends],
            [end.outcome for end in ends],
            [end.at for end in ends],
            [end.started_at for end in ends],
            [",".join(end.nodes) for end in ends],
            [end.exit_code for end in ends],
            [end.cause for end in ends],
            [_storable(end.reason) for end in ends],
            [_storable(end.error) for end in ends],
        )

    async def held(self) -> dict[tuple[int, int], State]:
        """Return the (task, attempt) pairs that the store says are held under this lease."""
        async with wrapped():
            rows = await self._pool.fetch(queries()["select_held"], self.id)
        return {(row["id"], row["attempt"]): State(row["state"]) for row in rows}

    async def doomed(self) -> set[tuple[int, int]]:
        """Return the kill set: held (task, attempt) pairs that are not to run any more."""
        async with wrapped():
            rows = await self._pool.fetch(queries()["select_doomed"], self.id)
        return {(row["id"], row["attempt"]) for row in rows}

    async def drain(self, reason: str) -> int:
        """Mark everything that runs RUN_TIMEOUT, in one statement; return how many."""
        async with wrapped():
            marked: int = await self._pool.fetchval("SELECT drain_tasks($1, $2)", self.id, reason)
        return marked

    async def time_out(self, pairs: Sequence[tuple[int, int]]) -> int:
        """Mark (task, attempt) pairs that are past their own limit RUN_TIMEOUT; return how many."""
        async with wrapped():
            marked: int = await self._pool.fetchval(
                "SELECT time_out_tasks($1, $2, $3)",
                self.id,
                [pair[0] for pair in pairs],
                [pair[1] for pair in pairs],
            )
        return marked

    async def has_prospect(self, workflows: Sequence[int] | None, nodes: int) -> bool:
        """Tell whether tasks that fit *nodes* wait for something that runs under a live lease."""
        async with wrapped():
            found: bool = await self._pool.fetchval(
                queries()["has_prospect"], None if workflows is None else list(workflows), nodes
            )
        return found

    async def close(self, reason: str) -> None:
        """Give the lease back: nothing of it runs any more. What is still held is released as lost."""
        async with wrapped():
            await self._pool.fetchval("SELECT close_lease($1, 'RELEASED', $2)", self.id, reason)
            await release_held(self._pool, self.id)

    async def _report(self, statement: str, *columns: list[Any]) -> Verdicts:
        async with wrapped():
            rows = await again_on_deadlock(lambda: self._pool.fetch(statement, self.id, *columns))
        return {(row["task_id"], row["attempt"]): Verdict(row["verdict"]) for row in rows}


def _storable(text: str | None) -> str | None:
    """Replace what PostgreSQL's text cannot hold: a program's output may be anything."""
    if text is None:
        return None
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _claim(row: asyncpg.Record) -> Claim:
    return Claim(
        **{
            **dict(row),
            "argv": tuple(row["argv"]),
            "mpi_flags": tuple(row["mpi_flags"]),
            "parent_ids": tuple(row["parent_ids"]),
        }
    )


# ---------------------------------------------------------------------------- reaping


class Reaping:
    """What anybody may do about launchers that are gone: `service/reaper.py` has the evidence."""

    def __init__(self, pool: asyncpg.Pool[Any]) -> None:
        self._pool = pool

    async def local_leases(self, host: str) -> dict[int, LauncherIdentity]:
        """Return the live leases of launchers on *host*, with who they are."""
        async with wrapped():
            rows = await self._pool.fetch(queries()["select_local_leases"], host)
        return {
            row["lease_id"]: LauncherIdentity(
                **{key: value for key, value in row.items() if key != "lease_id"}
            )
            for row in rows
        }

    async def close(self, lease_id: int, *, state: str, evidence: str) -> bool:
        """Close a lease on *evidence*; False when it was closed already."""
        async with wrapped():
            closed: bool = await self._pool.fetchval(
                "SELECT close_lease($1, $2, $3)", lease_id, state, evidence
            )
        return closed

    async def expire(self) -> list[int]:
        """Close the leases that ran out in silence or whose batch job has ended."""
        async with wrapped():
            rows = await self._pool.fetch("SELECT lease_id FROM expire_leases()")
        return [row["lease_id"] for row in rows]

    async def release(self) -> int:
        """Give back what closed leases still hold; return how many tasks.

        One reaper at a time; the others leave it to that one and return 0. A transaction for each
        batch, so that what has been released stays released whatever becomes of the rest.
        """
        async with wrapped(), self._pool.acquire() as connection:
            leases = [row["id"] for row in await connection.fetch(queries()["unswept_leases"])]
            return sum([await _release_some(connection, lease_id) for lease_id in leases])


async def release_held(pool: asyncpg.Pool[Any], lease_id: int) -> int:
    """Give back what the closed lease still holds; return how many tasks."""
    async with pool.acquire() as connection:
        return await _release_some(connection, lease_id, is_reaper=False)


async def _release_some(
    connection: Any, lease_id: int, *, batch: int = 5000, is_reaper: bool = True
) -> int:
    released = 0
    while True:
        async with connection.transaction():
            if is_reaper and not await connection.fetchval(queries()["try_reaper_lock"]):
                return released
            some: int = await connection.fetchval("SELECT release_lost($1, $2)", lease_id, batch)
        released += some
        if some < batch:
            return released
