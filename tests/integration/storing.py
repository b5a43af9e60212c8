"""The hands of users and launchers, for the tests of the store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from ensemble.core import leases
from ensemble.core.leases import Lease
from ensemble.core.model import (
    Claim,
    End,
    JobMode,
    LauncherIdentity,
    NewLauncher,
    NewTask,
    Outcome,
    Room,
    Selector,
    Start,
    Task,
    TaskDetail,
    Verdict,
)
from ensemble.core.store import Store

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


@asynccontextmanager
async def slowed(owner: Any, on: str, when: str, *, by_s: float) -> AsyncIterator[None]:
    """Have the database take its time over some rows, as over a task with very many children.

    It lets pass only statements that may take an hour.

    Args:
        owner: A connection of the schema's owner.
        on: DELETE or UPDATE.
        when: Which rows of `task`, by OLD and NEW.
        by_s: How long each takes.
    """
    await owner.execute(
        "CREATE FUNCTION ensemble.test_slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"PERFORM pg_sleep({by_s}); "
        "IF current_setting('statement_timeout')::interval < '1 hour' THEN RAISE 'impatient'; END IF; "
        "RETURN coalesce(NEW, OLD); END $$;"
        f"CREATE TRIGGER test_slow BEFORE {on} ON ensemble.task FOR EACH ROW WHEN ({when}) "
        "EXECUTE FUNCTION ensemble.test_slow()"
    )
    try:
        yield
    finally:
        await owner.execute(
            "DROP TRIGGER test_slow ON ensemble.task; DROP FUNCTION ensemble.test_slow"
        )


@dataclass
class Desk:
    """A store, and the hands of users and launchers."""

    store: Store

    async def register(self, *, ttl_s: float = 3600, job: str | None = None, **more: Any) -> Lease:
        identity = LauncherIdentity(
            machine_id="m",
            host="node1",
            boot_id="boot",
            pid_namespace="pid:[1]",
            pid=1,
            start_ticks=1,
        )
        values = {"nodes": ("node1",), "scheduler": "local", **more}
        new = NewLauncher(
            identity=identity,
            version="0",
            job_mode=JobMode.MPI,
            wf_filter=None,
            scheduler_job_id=job,
            **values,
        )
        return await leases.register(self.store.pool, new, ttl_s=ttl_s)

    async def add(self, count: int = 1, **more: Any) -> list[int]:
        return await self.store.add([NewTask(command=["true"], **more) for _ in range(count)])

    async def add_one(self, **more: Any) -> int:
        return (await self.add(**more))[0]

    async def claim(self, lease: Lease, count: int = 1000) -> list[Claim]:
        return await lease.claim(Room(nodes=count, left_s=None, max_tasks=count), None)

    async def begin(self, lease: Lease, count: int = 1000) -> list[Claim]:
        """Claim and start."""
        claims = await self.claim(lease, count)
        verdicts = await lease.start(
            [Start(id=c.id, attempt=c.attempt, at=LONG_AGO) for c in claims]
        )
        assert set(verdicts.values()) <= {Verdict.APPLIED}
        return claims

    async def end(
        self, lease: Lease, claim: Claim, outcome: Outcome = Outcome.DONE, **more: Any
    ) -> Verdict:
        end = End(id=claim.id, attempt=claim.attempt, outcome=outcome, **more)
        return (await lease.finish([end]))[claim.id, claim.attempt]

    async def task(self, task_id: int) -> Task:
        return (await self.store.tasks(Selector(ids=(task_id,)), limit=1))[0]

    async def tell(self, task_id: int) -> tuple[str, int, bool]:
        """State, attempt and whether it is held."""
        task = await self.task(task_id)
        return str(task.state), task.attempt, task.is_held

    async def detail(self, task_id: int) -> TaskDetail:
        return await self.store.detail(task_id)

    async def states(self) -> dict[int, str]:
        return {i: str(state) for i, state in (await self.store.task_states(Selector())).items()}

    async def sql(self, statement: str, *values: Any) -> Any:
        return await self.store.pool.fetchval(statement, *values)

    @property
    def soon(self) -> datetime:
        """A clock that runs a day ahead of the server's."""
        return datetime.now(UTC) + timedelta(days=1)
