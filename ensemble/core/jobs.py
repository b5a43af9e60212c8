"""Batch jobs in the store, what the service decides by, and the lock that makes it the only one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import asyncpg

from ensemble.core.batchjob import (
    BatchJob,
    DecisionNote,
    JobState,
    NewBatchJob,
    Observation,
    Service,
)
from ensemble.core.database import Address, connect, queries, storable, wrapped
from ensemble.core.model import JobMode
from ensemble.core.queues import Backlog, Capacity, QueueState
from ensemble.errors import NotFoundError, TakenError

#: How many runnable tasks of a filter and a width are looked at: more than any queue's limits let in at once.
_LOOK_AT = 100_000
#: A number of nodes that no task is wider than: the largest `int` of the store.
_WIDEST = 2**31 - 1
#: Running tasks whose children are looked at.
_SOON = 10_000
#: Attempts by which it is told how long tasks take.
_YOUNGEST = 20_000
_DECISIONS_KEPT = 1000


class Jobs:
    """Everything that is asked and written about batch jobs."""

    def __init__(self, pool: asyncpg.Pool[Any]) -> None:
        self._pool = pool

    # ------------------------------------------------------------------ one batch job

    async def open(
        self, new: NewBatchJob, *, site: str, limit: int | None = None, epoch: int | None = None
    ) -> BatchJob | None:
        """Put a batch job on record that is about to be submitted.

        Args:
            new: What it is.
            site: The site's name, as part of a job's name.
            limit: How many batch jobs of its policy may be queued or running, this one included.
            epoch: Of the service that submits it; None for a user.

        Returns:
            None when there are as many as may be, or another service has taken over.
        """
        async with wrapped():
            job_id = await self._pool.fetchval(
                "SELECT open_batch_job($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
                site,
                new.scheduler,
                new.num_nodes,
                new.wall_time_minutes,
                new.job_mode,
                new.wf_filter,
                new.project,
                new.queue,
                new.policy,
                new.why,
                {"flags": list(new.flags), "slots_per_node": new.slots_per_node},
                limit,
                epoch,
            )
        return None if job_id is None else await self.get(job_id)

    async def set_script(self, job_id: int, script: str, output: str) -> None:
        """Put on record what is submitted, and where the job's output goes."""
        await self._execute("set_script", job_id, script, output)

    async def set_submitted(self, job_id: int, scheduler_id: str) -> None:
        """Put on record that the scheduler took it, under this id."""
        await self._execute("set_submitted", job_id, scheduler_id)

    async def set_rejected(self, job_id: int, reason: str) -> None:
        """Put on record that the scheduler does not have it, and why."""
        await self._execute("set_rejected", job_id, reason)

    async def set_doubtful(self, job_id: int, reason: str) -> None:
        """Put on record that nobody knows whether the scheduler has it."""
        await self._execute("set_doubtful", job_id, reason)

    async def set_cancelled(self, job_id: int, reason: str) -> None:
        """Put on record that it is being cancelled, and by whom; it ends when the scheduler says so."""
        await self._execute("set_cancelled", job_id, reason)

    async def set_missing(self, job_id: int) -> None:
        """Count a look at the scheduler's listing that did not show it."""
        await self._execute("set_missing", job_id)

    async def set_error(self, job_id: int, error: str) -> None:
        """Keep the last lines of the output of a job whose launcher left no word."""
        await self._execute("set_error", job_id, error)

    async def observe(self, seen: Observation) -> bool:
        """Write what a look showed; tell whether the row still was as it had been judged by."""
        async with wrapped():
            found = await self._pool.fetchval(
                queries()["set_seen"],
                seen.id,
                seen.was,
                seen.state,
                storable(seen.reason),
                seen.scheduler_id,
                seen.exit_code,
                seen.started_at,
                seen.ended_at,
                seen.ends_at,
            )
        return found is not None

    async def set_record(self, job_id: int, launcher_id: int, record: dict[str, Any]) -> None:
        """Write a launcher's last word: how it ended, and what it did."""
        await self._execute("set_record", job_id, launcher_id, record)

    async def get(self, job_id: int) -> BatchJob:
        """Return one batch job.

        Raises:
            NotFoundError: There is none of that id.
        """
        found = await self._select([job_id])
        if not found:
            raise NotFoundError(f"there is no batch job {job_id} (ensemble queue)")
        return found[0]

    async def active(self) -> list[BatchJob]:
        """Return the batch jobs that count against limits, the youngest first."""
        return await self._select(None, only_active=True)

    async def recent(self, limit: int) -> list[BatchJob]:
        """Return the youngest batch jobs, whatever became of them."""
        return await self._select(None, limit=limit)

    async def _select(
        self, ids: list[int] | None, *, only_active: bool = False, limit: int = 0
    ) -> list[BatchJob]:
        async with wrapped():
            rows = await self._pool.fetch(queries()["select_batch_jobs"], ids, only_active, limit)
        return [
            BatchJob(
                **{
                    **dict(row),
                    "state": JobState(row["state"]),
                    "job_mode": JobMode(row["job_mode"]),
                }
            )
            for row in rows
        ]

    # ------------------------------------------------------------------ what decisions go by

    async def backlog(
        self, workflows: Sequence[int] | None, widths: Iterable[int] = ()
    ) -> list[Backlog]:
        """Return what could run now, and what waits only for tasks that run.

        Of the first 100,000 runnable tasks in claim order, and of so many children of 10,000 running ones.

        Args:
            workflows: Ids of the workflows that count; all when None.
            widths: Numbers of nodes that allocations have. Tasks that are wider than one do not count
                among the 100,000 that it has room for, as they come first and could hide these.
        """
        wanted = None if workflows is None else list(workflows)
        limits = [0, *sorted({width for width in widths if width < _WIDEST}), _WIDEST]
        now: list[asyncpg.Record] = []
        async with wrapped():
            for above, up_to in pairwise(limits):
                now += await self._pool.fetch(
                    queries()["select_backlog"], wanted, _LOOK_AT, above, up_to
                )
            soon = await self._pool.fetch(queries()["select_soon"], wanted, _SOON, _LOOK_AT)
        return [
            *(Backlog(**dict(row)) for row in now),
            *(Backlog(**dict(row), is_soon=True) for row in soon),
        ]

    async def typical_minutes(self) -> dict[str, float]:
        """Return how long tasks take, by workflow, where some ended well of late."""
        async with wrapped():
            rows = await self._pool.fetch(queries()["typical_minutes"], _YOUNGEST)
        return {row["workflow"]: row["minutes"] for row in rows}

    async def capacity(
        self, assumed_minutes: float, typical_minutes: Mapping[str, float] | None = None
    ) -> list[Capacity]:
        """Return what the launchers that run can still take.

        Args:
            assumed_minutes: How long a task is taken to run that does not tell, ...
            typical_minutes: ... unless its workflow is here.
        """
        typical = typical_minutes or {}
        async with wrapped():
            rows = await self._pool.fetch(
                queries()["select_capacity"],
                assumed_minutes,
                list(typical),
                list(typical.values()),
            )
        return [Capacity(**{**dict(row), "job_mode": JobMode(row["job_mode"])}) for row in rows]

    async def count_submitted(self, *, within_s: float) -> int:
        """Count the batch jobs that the service has made of late, however they ended; 1000 at most."""
        async with wrapped():
            count: int = await self._pool.fetchval(queries()["count_submitted"], within_s)
        return count

    async def queue_states(self) -> dict[str, QueueState]:
        """Return what keeps queue policies from submitting, by name."""
        async with wrapped():
            rows = await self._pool.fetch(queries()["select_queue_states"])
        return {row["name"]: QueueState(**dict(row)) for row in rows}

    # ------------------------------------------------------------------ pausing and notes

    async def pause(self, policy: str, *, by: str, reason: str) -> None:
        """Keep a queue policy from submitting until somebody resumes it.

        Args:
            policy: Its name.
            by: `user` or `service`.
            reason: For people.
        """
        await self._execute("pause_queue", policy, by, reason)

    async def resume(self, policy: str) -> bool:
        """Let a queue policy submit again, its failures forgotten; tell whether anything had kept it."""
        async with wrapped():
            found = await self._pool.fetchval(queries()["resume_queue"], policy)
        return found is not None

    async def note_failure(self, policy: str, *, kind: str, reason: str, retry_s: float) -> int:
        """Count a failure; return how many of its kind there were in a row."""
        async with wrapped():
            failures: int = await self._pool.fetchval(
                queries()["note_failure"], policy, kind, storable(reason), retry_s
            )
        return failures

    async def note_success(self, policy: str, kinds: Sequence[str]) -> None:
        """End a row of failures of these kinds."""
        await self._execute("note_success", policy, list(kinds))

    async def note_decision(self, policy: str, reason: str, job_id: int | None = None) -> None:
        """Put a decision on record, unless it is the last one again."""
        async with wrapped(), self._pool.acquire() as connection:
            await connection.execute(queries()["note_decision"], policy, storable(reason), job_id)
            await connection.execute(queries()["forget_decisions"], _DECISIONS_KEPT)

    async def decisions(self, limit: int) -> list[DecisionNote]:
        """Return the youngest decisions."""
        async with wrapped():
            rows = await self._pool.fetch(queries()["select_decisions"], limit)
        return [DecisionNote(**dict(row)) for row in rows]

    async def token(self) -> str:
        """Return what tells this site's batch jobs from those of others: a part of their names."""
        async with wrapped():
            token: str = await self._pool.fetchval(queries()["select_token"])
        return token

    async def service(self) -> Service:
        """Return what is known of the site's service."""
        async with wrapped():
            row = await self._pool.fetchrow(queries()["select_service"])
        assert row is not None
        return Service(**dict(row))

    async def _execute(self, name: str, *values: Any) -> None:
        async with wrapped():
            await self._pool.execute(queries()[name], *map(storable, values))


class ServiceLock:
    """The right to be the service of a site: a lock of a session of its own, which a crash frees."""

    def __init__(self, connection: asyncpg.Connection[Any], epoch: int) -> None:
        self._connection = connection
        #: The fence: whoever takes over raises it, and what the one before still does is refused.
        self.epoch = epoch

    @classmethod
    async def acquire(
        cls, address: Address, *, host: str, pid: int, period_s: float
    ) -> ServiceLock:
        """Become the service.

        Raises:
            TakenError: Another one is; says who and where.
            StoreUnavailableError: The database cannot be reached.
        """
        connection = await connect(address, name="ensemble service lock")
        try:
            async with wrapped():
                # Idle for as long as the service lives.
                await connection.execute("SET idle_session_timeout = 0")
                if not await connection.fetchval(queries()["try_service_lock"]):
                    row = await connection.fetchrow(queries()["select_service"])
                    raise _taken(row)
                epoch: int = await connection.fetchval(
                    queries()["enter_service"], host, pid, period_s
                )
        except BaseException:
            connection.terminate()
            raise
        return cls(connection, epoch)

    async def beat(self) -> bool:
        """Say that the service lives; tell whether it still is the one.

        Raises:
            StoreUnavailableError: The lock's session is lost, and the lock with it.
        """
        async with wrapped():
            return (
                await self._connection.fetchval(queries()["beat_service"], self.epoch) is not None
            )

    async def release(self) -> None:
        """Leave: say so, and free the lock."""
        try:
            async with wrapped():
                await self._connection.execute(queries()["leave_service"], self.epoch)
                # In so many words: the server takes a moment to notice that a session has gone.
                await self._connection.execute(queries()["unlock_service"])
        finally:
            self.drop()

    def drop(self) -> None:
        """Free the lock without a word."""
        self._connection.terminate()


def _taken(row: asyncpg.Record | None) -> TakenError:
    if row is None or row["host"] is None or row["stopped_at"] is not None:
        return TakenError(
            "another service of this site is starting: try again in a moment", host=None, pid=None
        )
    since = row["started_at"].strftime("%Y-%m-%d %H:%M UTC")
    return TakenError(
        f"the service of this site runs already: on {row['host']}, pid {row['pid']}, since {since} "
        "(one is enough: ensemble queue shows what it does)",
        host=row["host"],
        pid=row["pid"],
    )
