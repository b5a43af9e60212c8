"""Claim time: beside a long history, and filtered beside many tasks of other workflows."""

from __future__ import annotations

import statistics
import time
from typing import Any

from bench.scratch import opened, scratch_site
from ensemble.core import leases
from ensemble.core.database import connect
from ensemble.core.model import JobMode, NewLauncher, NewTask, Room
from ensemble.core.store import Store
from ensemble.drivers import process
from ensemble.site import OWNER, Site

FEW, MANY = 10_000, 1_000_000
CLAIM = 128
ROUNDS = 40

#: What the trigger and the launchers would have written, without them: minutes instead of hours.
HISTORY = """
ALTER TABLE task DISABLE TRIGGER USER;
WITH made AS (
  INSERT INTO task (workflow_id, state, attempt, started_at, ended_at, exit_code, wall_time_minutes)
  SELECT {workflow}, '{state}', {attempt}, now(), now(), {exit}, i % 100
    FROM generate_series(1, {count}) i
  RETURNING id
), spec AS (
  INSERT INTO task_spec (task_id, name, workdir, argv)
  SELECT id, 'old', 'data/old', '{{true}}' FROM made
), attempt AS (
  INSERT INTO attempt (task_id, attempt, lease_id, started_at, ended_at, exit_code, outcome)
  SELECT id, 1, 0, now(), now(), 0, 'done' FROM made WHERE {attempt} = 1
)
INSERT INTO event (task_id, at, from_state, to_state, attempt, actor)
SELECT id, now(), 'CREATED', '{state}', 1, 'bench' FROM made;
ALTER TABLE task ENABLE TRIGGER USER;
"""


async def seed(site: Site, count: int, *, workflow: int, is_finished: bool) -> None:
    connection = await connect(site.address(OWNER), name="bench seed")
    try:
        await connection.execute("SET statement_timeout = 0")
        text = HISTORY.format(
            workflow=workflow,
            state="JOB_FINISHED" if is_finished else "PREPROCESSED",
            attempt=1 if is_finished else 0,
            exit=0 if is_finished else "NULL",
            count=count,
        )
        await connection.execute(text, timeout=3600)
        await connection.execute("VACUUM (ANALYZE) task", timeout=3600)
    finally:
        connection.terminate()


async def lease_of(store: Store) -> leases.Lease:
    new = NewLauncher(
        identity=process.identity(),
        version="bench",
        job_mode=JobMode.MPI,
        wf_filter=None,
        nodes=("n0",),
        scheduler="local",
        scheduler_job_id=None,
    )
    return await leases.register(store.pool, new, ttl_s=3600)


async def time_claims(store: Store, lease: leases.Lease, wf_filter: str | None) -> list[float]:
    """Milliseconds of a claim of CLAIM tasks, the answer's tasks included; they stay claimed."""
    room = Room(nodes=CLAIM, left_s=None, max_tasks=CLAIM)
    times = []
    for turn in range(ROUNDS + 6):
        began = time.perf_counter()
        workflows = await store.workflow_ids(wf_filter)
        claims = await lease.claim(room, workflows)
        if turn >= 6:  # plans are cached by then
            times.append(1000 * (time.perf_counter() - began))
        assert len(claims) == CLAIM
    return times


async def run() -> dict[str, object]:
    ms: dict[str, list[float]] = {}
    async with scratch_site() as site, opened(site) as store:
        lease = await lease_of(store)
        await seed(site, FEW, workflow=await workflow(store, "old"), is_finished=True)
        await store.add([NewTask(command=["true"], workflow="new")] * 20_000)
        ms["few"] = await time_claims(store, lease, None)
        await seed(site, MANY, workflow=await workflow(store, "old"), is_finished=True)
        ms["many"] = await time_claims(store, lease, None)
    few, many = (statistics.median(ms[key]) for key in ("few", "many"))
    return {
        "what": f"claim of {CLAIM} beside {MANY:,} finished tasks, and beside {FEW:,}",
        "bar": "<= 5 ms, <= 1.3 x",
        "measured": f"{many:.1f} ms, {many / few:.2f} x",
        "detail": {"ms": ms},
    }


async def run_filtered() -> dict[str, object]:
    async with scratch_site() as site, opened(site) as store:
        lease = await lease_of(store)
        await store.add([NewTask(command=["true"], workflow="wanted")] * 10_000)
        await seed(site, MANY, workflow=await workflow(store, "other"), is_finished=False)
        times = await time_claims(store, lease, "want")
    return {
        "what": f"filtered claim of {CLAIM} beside {MANY:,} runnable tasks of other workflows",
        "bar": "<= 5 ms",
        "measured": f"{statistics.median(times):.1f} ms",
        "detail": {"ms": times},
    }


async def workflow(store: Store, name: str) -> int:
    row: Any = await store.pool.fetchrow(
        "INSERT INTO workflow (name) VALUES ($1) ON CONFLICT (name) "
        "DO UPDATE SET name = excluded.name RETURNING id",
        name,
    )
    return int(row["id"])
