"""What the service decides by: backlog, typical minutes and capacity, against numbers made by hand."""

from __future__ import annotations

import msgspec
import pytest

from ensemble.config import QueueSettings, Settings
from ensemble.core.batchjob import NewBatchJob
from ensemble.core.jobs import Jobs
from ensemble.core.model import JobMode, Outcome
from ensemble.core.queues import Backlog
from ensemble.service.filler import Decider


@pytest.fixture
def jobs(desk):
    return Jobs(desk.store.pool)


def kind(**more):
    """Tasks that say nothing of themselves, but for *more*."""
    plain = {
        "workflow": "",
        "num_nodes": 1,
        "ranks_per_node": 1,
        "packing": 1,
        "gpus": 0,
        "memory_mb": None,
        "wall_time_minutes": 0,
        "tasks": 1,
    }
    return Backlog(**{**plain, **more})


# ---------------------------------------------------------------------------- backlog


async def test_tasks_that_are_alike_are_counted_together(desk, jobs):
    await desk.add(3, workflow="a")
    await desk.add(2, workflow="a", threads_per_rank=2)  # of no consequence for a batch job
    await desk.add(4, workflow="b", num_nodes=2, ranks_per_node=3, gpus_per_rank=2, memory_mb=100)
    await desk.add(5, workflow="b", node_packing_count=8, wall_time_minutes=7)
    assert set(await jobs.backlog(None)) == {
        kind(workflow="a", tasks=5),
        kind(workflow="b", num_nodes=2, ranks_per_node=3, gpus=6, memory_mb=100, tasks=4),
        kind(workflow="b", packing=8, wall_time_minutes=7, tasks=5),
    }


async def test_only_what_could_run_now_is_counted(desk, jobs):
    lease = await desk.register()
    held, finished, killed, retried, plain = await desk.add(5, max_retries=1)
    await desk.add_one(parents=[plain], workflow="later")
    await desk.store.kill([killed])
    claims = {claim.id: claim for claim in await desk.begin(lease)}
    await desk.end(lease, claims[finished])
    await desk.end(lease, claims[retried], Outcome.ERROR, exit_code=1)
    await desk.end(lease, claims[plain], Outcome.GIVEN_BACK)
    assert (await desk.task(retried)).state == "RESTART_READY"
    assert (await desk.task(held)).is_held
    # `plain` is lost, as it had been started: it runs again.
    assert await jobs.backlog(None) == [kind(tasks=2)]


async def test_a_filter_leaves_other_workflows_out(desk, jobs):
    for count, workflow in enumerate(("dock", "dock-2", "md", "relax"), 1):
        await desk.add(count, workflow=workflow)
    dock = await desk.store.workflow_ids("dock")
    found = await jobs.backlog(dock)
    assert {(tasks.workflow, tasks.tasks) for tasks in found} == {("dock", 1), ("dock-2", 2)}
    assert await jobs.backlog([]) == []
    assert sum(tasks.tasks for tasks in await jobs.backlog(None)) == 10


async def test_children_of_what_runs_are_runnable_soon(desk, jobs):
    lease = await desk.register()
    [running, waiting] = await desk.add(2, workflow="p")
    await desk.add(3, workflow="c", parents=[running], num_nodes=2)
    await desk.add(1, workflow="d", parents=[running])
    await desk.add(1, workflow="c", parents=[running, waiting])  # for two of them
    await desk.add(1, workflow="c", parents=[waiting])
    await desk.add(1, workflow="c", parents=[running], wait_for_parents=False)
    assert not any(tasks.is_soon for tasks in await jobs.backlog(None))
    await desk.sql("UPDATE task SET priority = 1 WHERE id = $1", running)
    [claim] = await desk.claim(lease, 1)
    assert claim.id == running
    assert not any(tasks.is_soon for tasks in await jobs.backlog(None))  # it has not started
    await desk.sql("UPDATE task SET state = 'RUNNING' WHERE id = $1", running)
    soon = {tasks for tasks in await jobs.backlog(None) if tasks.is_soon}
    assert soon == {
        kind(workflow="c", num_nodes=2, tasks=3, is_soon=True),
        kind(workflow="d", tasks=1, is_soon=True),
    }
    only_d = await desk.store.workflow_ids("d")
    assert await jobs.backlog(only_d) == [kind(workflow="d", tasks=1, is_soon=True)]


async def test_the_widest_wishes_do_not_break_it(desk, jobs):
    await desk.add_one(ranks_per_node=100_000, gpus_per_rank=100_000)
    [found] = await jobs.backlog(None)
    assert found.gpus == 10**10


@pytest.fixture
async def many(desk, owner):
    """100,001 runnable tasks of one workflow and node, and one wide one each of that workflow and another."""
    await desk.add_one(workflow="many", num_nodes=9)
    await desk.add_one(workflow="other", num_nodes=8)
    async with owner.transaction():
        await owner.execute("ALTER TABLE task DISABLE TRIGGER USER")
        await owner.execute(
            "INSERT INTO task (workflow_id, state)"
            " SELECT 1, 'PREPROCESSED' FROM generate_series(1, 100001)"
        )
        await owner.execute("ALTER TABLE task ENABLE TRIGGER USER")
    yield
    await owner.execute("TRUNCATE task CASCADE")


async def test_the_first_hundred_thousand_in_claim_order_are_looked_at(many, desk, jobs):
    assert {(found.num_nodes, found.tasks) for found in await jobs.backlog(None)} == {
        (9, 1),
        (8, 1),
        (1, 99_998),
    }
    both = await desk.store.workflow_ids("")
    assert {(found.num_nodes, found.tasks) for found in await jobs.backlog(both)} == {
        (9, 1),
        (8, 1),
        (1, 99_998),
    }
    one = await desk.store.workflow_ids("many")
    found = await jobs.backlog(one)
    assert {(tasks.num_nodes, tasks.tasks) for tasks in found} == {(9, 1), (1, 99_999)}


@pytest.fixture
async def wide(many, desk):
    """100,000 runnable tasks that come before four of two nodes and five of one."""
    await desk.sql("UPDATE task SET num_nodes = 3 WHERE num_nodes = 1")
    await desk.add(4, workflow="other", num_nodes=2)
    await desk.add(5, workflow="many")


async def test_tasks_that_are_too_wide_do_not_hide_those_that_fit(wide, desk, jobs):
    first = {(9, 1), (8, 1), (3, 99_998)}
    for workflows in (None, await desk.store.workflow_ids("")):
        for widths, shown in (([], first), ([2], first | {(2, 4), (1, 5)})):
            found = await jobs.backlog(workflows, widths)
            assert {(tasks.num_nodes, tasks.tasks) for tasks in found} == shown
    found = await jobs.backlog(None, [8, 1, 1, 3, 2**40])
    shown = {(9, 1), (8, 1), (3, 100_000), (1, 5)}  # three nodes have room for all of these
    assert {(tasks.num_nodes, tasks.tasks) for tasks in found} == shown


async def test_what_fits_is_submitted_for_behind_what_is_too_wide(wide, desk, jobs):
    settings = Settings(
        queue={
            "narrow": QueueSettings(wf_filter="many"),
            "serial": QueueSettings(job_mode="serial", max_nodes=9),
            "two": QueueSettings(max_nodes=2, wf_filter="other"),
        }
    )
    for name, first in (("narrow", "5 tasks, "), ("serial", "5 tasks, "), ("two", "4 tasks, ")):
        only = msgspec.structs.replace(settings, queue={name: settings.queue[name]})
        [decision, *_] = (await Decider(desk.store, jobs, only).decide()).decisions
        assert decision.reason.startswith(first), decision
    await desk.sql("UPDATE task SET num_nodes = 3 WHERE num_nodes < 3")
    picture = await Decider(desk.store, jobs, settings).decide()
    assert picture.decisions[0].reason == "99,999 tasks wider than max_nodes = 1"


# ---------------------------------------------------------------------------- typical minutes


async def test_typical_minutes_are_the_mean_of_what_ended_well(desk, jobs):
    lease = await desk.register()
    minutes = {"a": [10, 20, None], "b": [6], "c": [None], "d": []}
    for workflow, lasted in minutes.items():
        await desk.add(len(lasted), workflow=workflow)
    for claim in await desk.begin(lease):
        lasted = minutes[claim.workflow].pop(0)
        outcome = Outcome.ERROR if lasted is None else Outcome.DONE
        await desk.end(lease, claim, outcome, exit_code=0 if lasted else 1)
        if lasted:
            await desk.sql(
                "UPDATE attempt SET started_at = ended_at - $2 * interval '1 minute'"
                " WHERE task_id = $1",
                claim.id,
                float(lasted),
            )
    assert await jobs.typical_minutes() == pytest.approx({"a": 15.0, "b": 6.0})


# ---------------------------------------------------------------------------- capacity


async def run_since(desk, minutes):
    """Let what runs have run so long."""
    await desk.sql(
        "UPDATE task SET started_at = clock_timestamp() - $1 * interval '1 minute'"
        " WHERE state = 'RUNNING'",
        float(minutes),
    )


def about(minutes):
    return pytest.approx(minutes, abs=0.3)  # the clock goes on, by seconds on a loaded machine


async def test_a_launcher_in_mpi_mode_has_its_nodes_but_for_what_it_runs(desk, jobs):
    lease = await desk.register(nodes=("a", "b", "c", "d", "e", "f", "g"), left_s=3600, node_gpus=4)
    await desk.add_one(num_nodes=2, wall_time_minutes=30)
    await desk.add_one(wall_time_minutes=5)  # has outlived its estimate
    await desk.add_one()  # unknown: 10 minutes are assumed
    await desk.add_one(workflow="known")
    await desk.begin(lease)
    await run_since(desk, 8)
    claimed = await desk.add_one(num_nodes=2, wall_time_minutes=40)
    await desk.claim(lease)
    assert (await desk.task(claimed)).is_held
    [room] = await jobs.capacity(10.0, {"known": 12.0, "unheard-of": 99.0})
    assert (room.job_mode, room.nodes, room.node_gpus) == (JobMode.MPI, 7, 4)
    assert (room.batch_job_id, room.wf_filter, room.slots_per_node) == (None, None, 1)
    assert room.left_minutes == about(60)
    assert room.busy == about(2 * 22 + 1 + 2 + 4 + 2 * 40)
    [room] = await jobs.capacity(9.0)
    assert room.busy == about(2 * 22 + 1 + 1 + 1 + 2 * 40)


async def test_what_is_being_ended_is_gone_in_a_minute(desk, jobs):
    lease = await desk.register()
    killed, out_of_time, _running = await desk.add(3, wall_time_minutes=100)
    await desk.begin(lease)
    await desk.store.kill([killed])
    await lease.time_out([(out_of_time, 1)])
    await run_since(desk, 30)
    [room] = await jobs.capacity(10.0)
    assert room.busy == about(1 + 1 + 70)
    assert room.left_minutes is None


async def test_short_tasks_of_a_known_length_are_not_taken_for_long_ones(desk, jobs):
    lease = await desk.register()
    await desk.add(100, workflow="short")
    await desk.claim(lease)
    [room] = await jobs.capacity(10.0, {"short": 0.01})
    assert room.busy == pytest.approx(1.0)
    await desk.sql("UPDATE task SET state = 'RUNNING', started_at = now() - interval '1 day'")
    [room] = await jobs.capacity(10.0, {"short": 0.01})
    assert room.busy == pytest.approx(1.0)


async def test_a_launcher_in_serial_mode_shares_its_nodes(desk, jobs):
    new = NewBatchJob(
        scheduler="slurm",
        num_nodes=2,
        wall_time_minutes=60,
        job_mode=JobMode.SERIAL,
        wf_filter="x",
        slots_per_node=4,
    )
    job = await jobs.open(new, site="s")
    lease = await desk.register(
        job="12", scheduler="slurm", batch_job_id=job.id, nodes=("a", "b"), left_s=600
    )
    await desk.sql("UPDATE launcher SET job_mode = 'serial', wf_filter = 'x'")
    await desk.add(3, node_packing_count=8, wall_time_minutes=16)
    await desk.add(2, node_packing_count=2, wall_time_minutes=16)  # four share a node at least
    await desk.begin(lease)
    await run_since(desk, 8)
    [room] = await jobs.capacity(10.0)
    assert (room.batch_job_id, room.slots_per_node, room.wf_filter) == (job.id, 4, "x")
    assert room.job_mode is JobMode.SERIAL
    assert room.busy == about(3 * 8 / 8 + 2 * 8 / 4)


async def test_launchers_that_are_silent_or_have_ended_have_no_capacity(desk, jobs):
    leases = [await desk.register(nodes=(name,)) for name in ("lives", "late", "silent", "left")]
    for lease, seconds in zip(leases, (1, 100, 130, 1), strict=True):
        await desk.sql(
            "UPDATE lease SET renewed_at = clock_timestamp() - $2 * interval '1 second'"
            " WHERE id = $1",
            lease.id,
            float(seconds),
        )
    await leases[3].close("done")
    assert len(await jobs.capacity(10.0)) == 2
    await leases[2].renew()
    assert len(await jobs.capacity(10.0)) == 3
