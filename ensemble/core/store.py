"""The store as its users see it: apps, tasks, histories. Launchers use `leases.py` beside it.

A method has its query's name where it is one query; all statements are in sql/.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import asyncpg

from ensemble.core import insertion, submission
from ensemble.core.database import (
    PATIENCE_S,
    Address,
    again_on_deadlock,
    fetch_patiently,
    open_pool,
    queries,
    wrapped,
)
from ensemble.core.migrations import check_functions, check_version
from ensemble.core.model import (
    App,
    Attempt,
    Cause,
    Changes,
    Counts,
    Cursor,
    Launcher,
    NewApp,
    NewTask,
    Outcome,
    Output,
    Problem,
    Selector,
    Task,
    TaskDetail,
    TaskEvent,
)
from ensemble.core.states import State
from ensemble.core.submission import Layout
from ensemble.errors import IllegalMoveError, NotFoundError, StoreUnavailableError, UsageError

#: The name of a check is that of its query.
CHECKS = (
    "check_orphans",
    "check_specs",
    "check_shapes",
    "check_open_attempts",
    "check_successes",
    "check_overlaps",
    "check_attempts",
    "check_counters",
    "check_histories",
    "check_stuck",
)


class Store:
    """A pool of connections and everything that can be asked of the database."""

    def __init__(self, pool: asyncpg.Pool[Any], address: Address) -> None:
        self.pool = pool
        self.address = address

    @classmethod
    async def open(cls, address: Address, *, name: str = "ensemble", max_size: int = 4) -> Store:
        """Connect and check that the database suits this program.

        Raises:
            StoreUnavailableError: It cannot be reached.
            SchemaError: Its schema is newer, older or missing.
        """
        pool = await open_pool(address, name=name, max_size=max_size)
        try:
            top = digest = None
            async with wrapped():  # the first connection: fail now, in one line
                if await pool.fetchval("SELECT to_regclass('schema_script')::text"):
                    top, digest = (await pool.fetch(queries()["schema_found"]))[0]
            check_version(top)
            check_functions(digest)
        except BaseException:
            pool.terminate()
            raise
        return cls(pool, address)

    async def close(self) -> None:
        """Close the connections, without waiting for a peer that is gone."""
        self.pool.terminate()

    async def ring(self) -> None:
        """Tell watchers, and launchers that idle, that something was committed: a lost ring costs them one poll."""
        with contextlib.suppress(StoreUnavailableError):
            async with wrapped():
                await self.pool.execute(queries()["ring"])

    # ------------------------------------------------------------------ apps and workflows

    async def add_app(self, new: NewApp, *, replace: bool = False) -> App:
        """Register an app.

        Args:
            new: What to register.
            replace: Change an app of that name; tasks already added keep their command.

        Raises:
            UsageError: It is malformed, or the name is taken.
        """
        submission.check_app(new)
        values = (
            new.name,
            new.command,
            new.description,
            new.environ,
            new.env_script,
            new.output,
        )
        row = None
        async with wrapped():
            if replace:
                row = await self.pool.fetchrow(queries()["replace_app"], *values)
            row = row or await self.pool.fetchrow(queries()["insert_app"], *values)
        if row is None:
            raise UsageError(f"app {new.name} exists (--replace changes it)")
        return _app(row)

    async def apps(self, names: Sequence[str] | None = None) -> list[App]:
        """Return the apps of these names, or all, by name."""
        async with wrapped():
            rows = await self.pool.fetch(
                queries()["select_apps"], None if names is None else list(names)
            )
        return [_app(row) for row in rows]

    async def remove_app(self, name: str) -> None:
        """Forget an app.

        Raises:
            NotFoundError: There is none of that name.
            UsageError: Tasks of it have not ended.
        """
        async with wrapped():
            if await self.pool.fetchval(queries()["delete_app"], name) is not None:
                return
        if await self.apps([name]):
            raise UsageError(f"app {name} has tasks that have not ended (ensemble ls --app {name})")
        raise NotFoundError(f"there is no app {name!r} (ensemble app ls)")

    async def workflows(self) -> dict[str, dict[State, int]]:
        """Return the number of tasks by workflow and state."""
        async with wrapped():
            rows = await self.pool.fetch(queries()["select_workflows"])
        table: dict[str, dict[State, int]] = {}
        for row in rows:
            table.setdefault(row["name"], {})[State(row["state"])] = row["tasks"]
        return table

    async def workflow_ids(self, wf_filter: str | None) -> list[int] | None:
        """Return the ids of the workflows whose name contains *wf_filter*; None for all."""
        if wf_filter is None:
            return None
        async with wrapped():
            rows = await self.pool.fetch(queries()["workflow_ids"], wf_filter)
        return [row["id"] for row in rows]

    # ------------------------------------------------------------------ adding

    async def add(
        self,
        tasks: Sequence[NewTask],
        *,
        key: str | None = None,
        layout: Layout = "sharded",
    ) -> list[int]:
        """Add tasks in one transaction; return their ids in the order given.

        Args:
            tasks: What to run. Parents may be ids, or names of tasks of this submission.
            key: An idempotency key: the same key again adds nothing and returns the first ids.
            layout: How work directories are arranged, see `submission.workdir`.

        Raises:
            UsageError: A task is malformed (its place is named); nothing was added.
            NotFoundError: A parent does not exist; nothing was added.
        """
        wanted = sorted({task.app for task in tasks if task.app is not None})
        apps = {app.name: app for app in await self.apps(wanted)} if wanted else {}
        resolved = insertion.resolve_all(tasks, apps)
        names = [task.name for task in resolved]
        sequence = submission.order(tasks, names=names)
        async with wrapped(), self.pool.acquire() as connection:
            ids = await again_on_deadlock(
                lambda: insertion.insert(connection, resolved, sequence, names, key, layout)
            )
        await self.ring()
        return ids

    # ------------------------------------------------------------------ looking

    async def tasks(self, selector: Selector, *, limit: int, after: int = 0) -> list[Task]:
        """Return up to *limit* selected tasks by id, from the first id above *after*."""
        async with wrapped():
            rows = await self.pool.fetch(
                queries()["select_tasks"], *_criteria(selector), limit, after
            )
        return [_task(row) for row in rows]

    async def task_states(self, selector: Selector) -> dict[int, State]:
        """Return id and state of every selected task, however long it takes: they may be very many."""
        async with wrapped():
            rows = await fetch_patiently(
                self.pool, queries()["select_task_ids"], *_criteria(selector), timeout_s=PATIENCE_S
            )
        return {row["id"]: State(row["state"]) for row in rows}

    async def detail(self, task_id: int) -> TaskDetail:
        """Return everything on record about one task.

        Raises:
            NotFoundError: There is no such task.
        """
        found = await self.tasks(Selector(ids=(task_id,)), limit=1)
        if not found:
            raise NotFoundError(f"there is no task {task_id} (ensemble ls)")
        async with wrapped(), self.pool.acquire() as connection:
            spec = await connection.fetchrow(queries()["select_spec"], task_id)
            attempts = await connection.fetch(queries()["select_attempts"], task_id)
            events = await connection.fetch(queries()["select_events"], task_id)
            parents = await connection.fetch(queries()["select_parents"], task_id)
            children = await connection.fetch(queries()["select_children"], task_id)
        return TaskDetail(
            task=found[0],
            spec=dict(spec or {}),
            parents=tuple(row[0] for row in parents),
            children=tuple(row[0] for row in children),
            attempts=tuple(_attempt(row) for row in attempts),
            events=tuple(_event(row) for row in events),
        )

    async def counts(self, workflow: str | None = None) -> Counts:
        """Count the tasks by state; of the workflows that contain *workflow* when given."""
        async with wrapped():
            rows = await self.pool.fetch(queries()["count_states"], workflow)
        return Counts(
            by_state={State(row["state"]): row["tasks"] for row in rows},
            held={State(row["state"]): row["held"] for row in rows if row["held"]},
        )

    async def unfinished(self, ids: Sequence[int]) -> int:
        """Count which of these tasks have not ended for good, or whose process still dies."""
        async with wrapped():
            count: int = await self.pool.fetchval(queries()["count_unfinished"], list(ids))
        return count

    async def launchers(self, *, only_live: bool = True) -> list[Launcher]:
        """Return launchers, the youngest first."""
        async with wrapped():
            rows = await self.pool.fetch(queries()["select_launchers"], only_live)
        return [Launcher(**{**dict(row), "nodes": tuple(row["nodes"])}) for row in rows]

    async def most_gpus(self) -> int | None:
        """Return the GPUs of the largest node that a launcher of the last 30 days had; None if unknown."""
        async with wrapped():
            most: int | None = await self.pool.fetchval(queries()["most_gpus"])
        return most

    async def horizon(self) -> Cursor:
        """Return the place in the stream of events from which nothing committed later is missed."""
        async with wrapped():
            xid: str = await self.pool.fetchval(queries()["event_horizon"])
        return Cursor(xid=xid, id=0)

    async def new_events(
        self,
        cursor: Cursor,
        *,
        ids: Sequence[int] | None = None,
        workflow: str | None = None,
        limit: int = 1000,
    ) -> tuple[list[TaskEvent], Cursor]:
        """Return the events after *cursor*, in the order of their transactions, and the new place."""
        async with wrapped():
            horizon: str = await self.pool.fetchval(queries()["event_horizon"])
            rows = await self.pool.fetch(
                queries()["select_new_events"],
                cursor.xid,
                cursor.id,
                None if ids is None else list(ids),
                workflow,
                limit,
            )
        if rows:
            cursor = Cursor(xid=rows[-1]["xid"], id=rows[-1]["id"])
        if len(rows) < limit and int(horizon) > int(cursor.xid):
            cursor = Cursor(xid=horizon, id=0)  # what was filtered out is not read again
        return [_event(row) for row in rows], cursor

    async def check(self) -> list[Problem]:
        """Look for broken invariants; none are found in a healthy store."""
        problems = []
        async with wrapped(), self.pool.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL statement_timeout = 0")
            for check in CHECKS:
                rows = await connection.fetch(queries()[check], timeout=PATIENCE_S)
                problems += [
                    Problem(check=check, task_id=row["id"], problem=row["problem"]) for row in rows
                ]
        return problems

    # ------------------------------------------------------------------ changing

    async def kill(self, ids: Sequence[int], *, reason: str | None = None) -> dict[int, bool]:
        """Kill tasks; return those that were, and whether a launcher still has to end a process."""
        async with wrapped():
            rows = await self._change("SELECT * FROM kill_tasks($1, $2)", list(ids), reason)
        await self.ring()
        return {row["id"]: row["was_held"] for row in rows}

    async def retry(self, ids: Sequence[int]) -> list[int]:
        """Let FAILED and USER_KILLED tasks run again, with what failed because of them; return all."""
        async with wrapped():
            rows = await self._change("SELECT id FROM retry_tasks($1)", list(ids))
        await self.ring()
        return sorted(row["id"] for row in rows)

    async def remove(self, ids: Sequence[int]) -> list[int]:
        """Remove tasks and their history; what is held, or waited for, stays. Return the removed."""
        async with wrapped():
            rows = await self._change("SELECT id FROM remove_tasks($1)", list(ids))
        return sorted(row["id"] for row in rows)

    async def _change(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """Change tasks, however long it takes: they may be very many, and their children more."""
        return await again_on_deadlock(
            lambda: fetch_patiently(self.pool, statement, *values, timeout_s=PATIENCE_S)
        )

    async def modify(self, task_id: int, changes: Changes) -> None:
        """Change what a task needs, while no launcher holds it.

        Raises:
            NotFoundError: There is no such task.
            IllegalMoveError: A launcher holds it.
            UsageError: A value is out of range.
        """
        submission.check_changes(changes)
        async with wrapped(), self.pool.acquire() as connection, connection.transaction():
            workflow_id = None
            if changes.workflow is not None:
                workflow_id = (await insertion.workflow_ids(connection, {changes.workflow}))[
                    changes.workflow
                ]
            found = await connection.fetchval(
                queries()["modify_task"],
                task_id,
                workflow_id,
                changes.priority,
                changes.wall_time_minutes,
                changes.num_nodes,
                changes.ranks_per_node,
                changes.max_retries,
            )
            if found is not None:
                await connection.execute(
                    queries()["modify_spec"],
                    task_id,
                    changes.time_limit_minutes,
                    dict(changes.tags),
                    dict(changes.data),
                )
        if found is None:
            detail = await self.detail(task_id)
            raise IllegalMoveError(
                f"task {task_id} is held by lease {detail.task.lease_id}; it can be changed when "
                f"its launcher has given it up (ensemble show {task_id})"
            )
        await self.ring()


# ---------------------------------------------------------------------------- rows and values


def _criteria(selector: Selector) -> tuple[Any, ...]:
    return (
        None if selector.ids is None else list(selector.ids),
        selector.workflow,
        None if selector.states is None else list(selector.states),
        selector.name,
        selector.app,
        None if selector.tags is None else dict(selector.tags),
    )


def _app(row: asyncpg.Record) -> App:
    return App(**{**dict(row), "output": Output(row["output"])})


def _task(row: asyncpg.Record) -> Task:
    return Task(
        **{
            **dict(row),
            "state": State(row["state"]),
            "cause": Cause(row["cause"]) if row["cause"] else None,
            "argv": tuple(row["argv"]),
            "output": Output(row["output"]),
            "nodes": tuple(row["nodes"]),
        }
    )


def _attempt(row: asyncpg.Record) -> Attempt:
    return Attempt(
        **{
            **dict(row),
            "nodes": tuple(row["nodes"]),
            "outcome": Outcome(row["outcome"]) if row["outcome"] else None,
            "cause": Cause(row["cause"]) if row["cause"] else None,
        }
    )


def _event(row: asyncpg.Record) -> TaskEvent:
    return TaskEvent(
        id=row["id"],
        task_id=row["task_id"],
        at=row["at"],
        from_state=State(row["from_state"]),
        to_state=State(row["to_state"]),
        attempt=row["attempt"],
        lease_id=row["lease_id"],
        actor=row["actor"],
        reason=row["reason"],
    )
