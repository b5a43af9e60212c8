"""Everything a launcher does in the store under its lease, and what reapers do with a lost one.

Every write about a held task is fenced: it names the lease and the attempt, and each row of the
answer says what became of it (`Verdict`). The statements are in sql/functions.sql.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from fractions import Fraction
from typing import Any

import asyncpg
import msgspec

from ensemble.core.database import (
    PATIENCE_S,
    again_on_deadlock,
    fetch_patiently,
    queries,
    storable,
    wrapped,
)
from ensemble.core.model import (
    Claim,
    End,
    LauncherIdentity,
    NewLauncher,
    Output,
    Room,
    SlotRoom,
    Start,
    Unfit,
    Verdict,
)
from ensemble.core.states import State
from ensemble.errors import EnsembleError, LeaseLostError, OutcomeUnknownError
from ensemble.log import get_logger

Verdicts = dict[tuple[int, int], Verdict]
#: No time limit, in minutes: PostgreSQL's largest `int`.
_FOR_EVER = 2**31 - 1
_VERDICTS = {verdict.value: verdict for verdict in Verdict}
_OUTPUTS = {output.value: output for output in Output}
#: How far a fraction is rounded down whose terms PostgreSQL's `bigint` cannot hold.
_FINEST = 2**62
#: How many runnable tasks are looked at to tell which are left alone.
_LEFT_ALONE = 100_000
#: How many tasks of a lost lease are given back at once.
_BATCH = 5000
_RELEASE = "SELECT * FROM release_lost($1, $2, $3)"


async def register(pool: asyncpg.Pool[Any], new: NewLauncher, *, ttl_s: float) -> Lease:
    """Register a launcher and give it a lease.

    Raises:
        AllocationError: A live launcher of the same batch job holds some of its nodes; or the batch
            job that started it was given up, or is another submission's.
    """
    async with wrapped(), pool.acquire() as connection:
        row = await connection.fetchrow(
            "SELECT *, (SELECT token FROM service) AS site_token FROM register_launcher("
            "$1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
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
            new.node_cores,
            new.node_gpus,
            timedelta(seconds=new.linger_s),
            new.batch_job_id,
        )
    assert row is not None
    who = new.identity
    mark = f"{row['site_token']} {who.boot_id} {who.pid} {who.start_ticks}"
    return Lease(pool, row["lease_id"], row["launcher_id"], mark)


class Lease:
    """A launcher's right to the tasks it took. Closed once; then every write is refused."""

    def __init__(
        self, pool: asyncpg.Pool[Any], lease_id: int, launcher_id: int, mark: str = ""
    ) -> None:
        self._pool = pool
        self.id = lease_id
        self.launcher_id = launcher_id
        #: Tells it from a lease with the same number in another database, or in a restored one.
        self.mark = mark

    async def renew(self) -> None:
        """Say that the launcher lives.

        Raises:
            LeaseLostError: A reaper closed the lease.
        """
        async with wrapped():
            found = await self._pool.fetchrow(queries()["renew_lease"], self.id)
        if found is None:
            raise LeaseLostError(f"lease {self.id} was closed by a reaper")

    async def set_resources(self, cores: int | None, gpus: int | None) -> None:
        """Put on record what the launcher's largest node has; None is unknown."""
        async with wrapped():
            await self._pool.execute(queries()["set_resources"], self.launcher_id, cores, gpus)

    async def set_aside(self, nodes: Mapping[str, str]) -> None:
        """Put on record all nodes that get no more tasks, and why."""
        async with wrapped():
            await self._pool.execute(queries()["set_aside"], self.launcher_id, dict(nodes))

    async def claim(self, room: Room | SlotRoom, workflows: Sequence[int] | None) -> list[Claim]:
        """Take the best runnable tasks that fit *room*.

        Several launchers may call this at once; none waits for another and no task is handed out
        twice. After a lost answer, what was taken is found by `held`.

        Args:
            room: Free nodes, or free parts of nodes (serial mode: tasks of one rank only), and the
                time left. Never ask for more than can start now or in a moment.
            workflows: Ids of the workflows to take from; all when None.

        Raises:
            LeaseLostError: The lease was closed; nothing was taken.
            StoreUnavailableError: The database cannot be reached.
        """
        wanted = None if workflows is None else list(workflows)
        async with wrapped():
            if isinstance(room, SlotRoom):
                rows = await self._pool.fetch(
                    "SELECT * FROM claim_serial("
                    "$1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
                    self.id,
                    wanted,
                    _minutes(room.left_s),
                    room.ahead,
                    room.max_tasks,
                    room.slots_per_node,
                    *_columns(room),
                )
            else:
                rows = await self._pool.fetch(
                    "SELECT * FROM claim_tasks($1, $2, $3, $4, $5, $6)",
                    self.id,
                    wanted,
                    room.nodes,
                    _minutes(room.left_s),
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

    async def finish(self, ends: Sequence[End], *, timeout_s: float | None = None) -> Verdicts:
        """Report that nothing of these attempts runs any more; closes them and releases the holds.

        Args:
            ends: The reports.
            timeout_s: For how long to wait for the answer; as for every other statement when None. A task with a
                million children takes minutes: all are released with its end.
        """
        return await self._report(
            "SELECT * FROM finish_tasks($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
            [end.id for end in ends],
            [end.attempt for end in ends],
            [end.outcome for end in ends],
            [end.at for end in ends],
            [end.started_at for end in ends],
            [",".join(end.nodes) for end in ends],
            [end.exit_code for end in ends],
            [end.cause for end in ends],
            [storable(end.reason) for end in ends],
            [storable(end.error) for end in ends],
            [storable(end.output) for end in ends],
            timeout_s=timeout_s,
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

    async def has_prospect(
        self, workflows: Sequence[int] | None, nodes: int, *, is_serial: bool = False
    ) -> bool:
        """Tell whether tasks that fit *nodes* wait for something that runs under a live lease.

        Args:
            workflows: Ids of the workflows that count; all when None.
            nodes: How many the launcher has.
            is_serial: Count only tasks of one node and one rank.
        """
        async with wrapped():
            found: bool = await self._pool.fetchval(
                queries()["has_prospect"],
                None if workflows is None else list(workflows),
                nodes,
                is_serial,
            )
        return found

    async def left_alone(
        self, whole: Room | SlotRoom, workflows: Sequence[int] | None
    ) -> dict[Unfit, int]:
        """Count the runnable tasks that nobody has taken and this launcher cannot run, by reason.

        Args:
            whole: The launcher with nothing running on it. Of a `Room`, `nodes` and `left_s` count; of
                a `SlotRoom`, `whole` and `left_s`.
            workflows: Ids of the workflows it takes tasks of; all when None.

        Returns:
            The first reason of each task. At most 100,000 runnable tasks are looked at.
        """
        is_serial = isinstance(whole, SlotRoom)
        places = whole.whole if isinstance(whole, SlotRoom) else ()
        async with wrapped():
            rows = await self._pool.fetch(
                "SELECT * FROM left_alone($1, $2, $3, $4, $5, $6, $7)",
                None if workflows is None else list(workflows),
                is_serial,
                1 if isinstance(whole, SlotRoom) else whole.nodes,
                [place.gpus for place in places],
                [place.memory_mb for place in places],
                _minutes(whole.left_s),
                _LEFT_ALONE,
            )
        return {Unfit(row["reason"]): row["tasks"] for row in rows}

    async def close(self, reason: str) -> None:
        """Give the lease back: nothing of it runs any more. What is still held is released as lost."""
        async with wrapped():
            await self._pool.fetchval("SELECT close_lease($1, 'RELEASED', $2)", self.id, reason)
            await release_held(self._pool, self.id)

    async def _report(
        self, statement: str, *columns: list[Any], timeout_s: float | None = None
    ) -> Verdicts:
        async def send() -> list[asyncpg.Record]:
            if timeout_s is None:
                return await self._pool.fetch(statement, self.id, *columns)
            return await fetch_patiently(
                self._pool, statement, self.id, *columns, timeout_s=timeout_s
            )

        async with wrapped():
            rows = await again_on_deadlock(send)
        return {(task_id, attempt): _VERDICTS[verdict] for task_id, attempt, verdict in rows}


def _minutes(left_s: float | None) -> int:
    return _FOR_EVER if left_s is None else min(int(left_s // 60), _FOR_EVER)


def _columns(room: SlotRoom) -> tuple[list[int | None], ...]:
    """Turn what is free, and the nodes as a whole, into columns for `claim_serial`."""
    shares = [_terms(free.share) for free in room.free]
    return (
        [free.nodes for free in room.free],
        [numerator for numerator, _ in shares],
        [denominator for _, denominator in shares],
        [free.cores for free in room.free],
        [free.all_cores for free in room.free],
        [free.gpus for free in room.free],
        [free.memory_mb for free in room.free],
        [node.gpus for node in room.whole],
        [node.memory_mb for node in room.whole],
    )


def _terms(share: Fraction) -> tuple[int, int]:
    """Return numerator and denominator, of the next smaller fraction where these are too large."""
    if share.denominator <= _FINEST:
        return share.numerator, share.denominator
    return int(share * _FINEST), _FINEST


def _claim(row: asyncpg.Record) -> Claim:
    fields = dict(row)  # thousands a second: filled in place
    fields["argv"] = tuple(fields["argv"])
    fields["mpi_flags"] = tuple(fields["mpi_flags"])
    fields["parent_ids"] = tuple(fields["parent_ids"])
    fields["output"] = _OUTPUTS[fields["output"]]
    return Claim(**fields)


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

    async def silent_leases(self, host: str) -> set[int]:
        """Return the live leases of launchers on *host* that have run out."""
        async with wrapped():
            rows = await self._pool.fetch(queries()["select_silent_leases"], host)
        return {row["id"] for row in rows}

    async def find_launcher(self, lease_id: int) -> tuple[str, int | None]:
        """Return a lease's mark, and whose it is; None when there is none."""
        async with wrapped():
            row = await self._pool.fetchrow(queries()["select_lease_owner"], lease_id)
        assert row is not None
        return row["mark"], row["launcher_id"]

    async def bury(
        self, lease_id: int, *, state: str, evidence: str, has_no_pilots: bool = False
    ) -> bool:
        """Close the lease of a launcher that is certainly gone; tell whether that was done.

        It is not where somebody has done it, nor where pilots of that launcher may live on other hosts:
        then the lease ends by itself as soon as they must have ended.

        Args:
            has_no_pilots: Whether these are known to have ended, too.
        """
        function = "close_lease" if has_no_pilots else "bury_launcher"
        async with wrapped():
            closed: bool = await self._pool.fetchval(
                f"SELECT {function}($1, $2, $3)", lease_id, state, evidence
            )
        return closed

    async def expire(self, *, spare: Collection[int] = ()) -> list[int]:
        """Close the leases that ran out in silence or whose batch job has ended, but for those to *spare*."""
        async with wrapped():
            rows = await self._pool.fetch("SELECT lease_id FROM expire_leases($1)", list(spare))
        return [row["lease_id"] for row in rows]

    async def release(self, *, is_patient: bool = True) -> int:
        """Give back what closed leases still hold; return how many tasks.

        One reaper at a time; the others leave it to that one and return 0. A transaction for each
        batch, so that what has been released stays released whatever becomes of the rest.

        Args:
            is_patient: Whether to spend the time that a task with very many children takes, up to an hour, once
                all others are given back.

        Raises:
            StoreUnavailableError: What some lease holds could not be given back; all were tried.
        """
        released = 0
        failed: dict[int, EnsembleError] = {}
        async with wrapped():
            for row in await self._pool.fetch(queries()["unswept_leases"]):
                # Out here: where the database cannot be reached, no other lease fares better.
                async with self._pool.acquire() as connection:
                    try:
                        released += await _release_some(connection, row["id"])
                    except EnsembleError as error:
                        failed[row["id"]] = error
        slow = [key for key, error in failed.items() if isinstance(error, OutcomeUnknownError)]
        for lease_id in slow if is_patient else []:
            try:
                released += await _release_slowly(self._pool, lease_id)
                del failed[lease_id]
            except EnsembleError as error:
                failed[lease_id] = error
        if failed:
            raise next(iter(failed.values()))
        return released


async def release_held(pool: asyncpg.Pool[Any], lease_id: int) -> int:
    """Give back what the closed lease still holds; return how many tasks."""
    try:
        async with pool.acquire() as connection:
            return await _release_some(connection, lease_id, is_reaper=False)
    except OutcomeUnknownError:
        return await _release_slowly(pool, lease_id)


async def _release_slowly(pool: asyncpg.Pool[Any], lease_id: int) -> int:
    """Give back what takes longer than a statement may: one task, then more at once.

    Without the reapers' lock: the others pass over what is being given back here, and need not wait for it.
    """
    get_logger().info("release.slow", lease=lease_id, hint="a task may have many children")
    released, last_id, batch = 0, 0, 1
    while True:
        async with wrapped():
            [row] = await fetch_patiently(
                pool, _RELEASE, lease_id, batch, last_id, timeout_s=PATIENCE_S
            )
        some: int = row["released"]
        released, last_id = released + some, row["last_id"]
        if last_id is None:
            return released
        batch = min(4 * batch, _BATCH)


async def _release_some(
    connection: Any, lease_id: int, *, batch: int = _BATCH, is_reaper: bool = True
) -> int:
    released = last_id = 0
    while True:
        async with wrapped(), connection.transaction():
            if is_reaper and not await connection.fetchval(queries()["try_reaper_lock"]):
                return released
            row = await connection.fetchrow(_RELEASE, lease_id, batch, last_id)
        some: int = row["released"]
        released, last_id = released + some, row["last_id"]
        if last_id is None:
            return released
