"""Reaping: what a lost launcher held is taken back, once, and not before it is certainly lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from ensemble.core.leases import Reaping, _release_slowly, _release_some
from ensemble.core.model import Cause, Outcome
from ensemble.core.store import Store
from ensemble.errors import AllocationError, OutcomeUnknownError
from tests.integration.storing import slowed


@pytest.fixture
def reaping(desk):
    return Reaping(desk.store.pool)


async def lose(reaping, lease):
    assert await reaping.bury(lease.id, state="EXPIRED", evidence="its process is gone")
    return await reaping.release()


async def test_each_state_under_a_lost_lease_goes_its_own_way(desk, reaping):
    lease = await desk.register()
    running, timed_out, out_of_time, killed, claimed, claimed_killed = await desk.add(6)
    await desk.begin(lease, 4)
    await desk.claim(lease)
    await lease.time_out([(out_of_time, 1)])
    await desk.sql("UPDATE task SET state = 'RUN_TIMEOUT' WHERE id = $1", timed_out)
    await desk.store.kill([killed, claimed_killed])
    assert await lose(reaping, lease) == 6
    assert await desk.states() == {
        running: "RESTART_READY",
        timed_out: "RESTART_READY",
        out_of_time: "FAILED",  # max_retries is 0
        killed: "USER_KILLED",
        claimed: "PREPROCESSED",
        claimed_killed: "USER_KILLED",
    }
    found = {i: await desk.detail(i) for i in (running, timed_out, out_of_time, killed, claimed)}
    counted = {i: (d.task.failures, d.task.timeouts, d.task.losses) for i, d in found.items()}
    assert counted == {
        running: (0, 0, 1),
        timed_out: (0, 1, 0),
        out_of_time: (1, 0, 0),
        killed: (0, 0, 0),
        claimed: (0, 0, 0),
    }
    outcomes = [d.attempts[0].outcome for d in found.values()]
    assert outcomes == [Outcome.LOST] * 3 + [Outcome.KILLED, Outcome.LOST]
    assert found[running].task.cause is Cause.LAUNCHER_LOST
    assert found[running].task.reason == "its process is gone"
    assert all(found[i].task.ended_at for i in (running, timed_out, out_of_time, killed))
    assert await desk.sql("SELECT count(*) FROM task WHERE lease_id IS NOT NULL") == 0
    assert await desk.sql("SELECT swept FROM lease WHERE id = $1", lease.id)
    assert await reaping.release() == 0


async def test_a_task_lost_once_too_often_fails_and_says_why(desk, reaping):
    task = await desk.add_one(max_losses=1)
    child = await desk.add_one(parents=[task])
    for state in ("RESTART_READY", "FAILED"):
        lease = await desk.register()
        await desk.begin(lease)
        await lose(reaping, lease)
        assert (await desk.task(task)).state == state
    found = await desk.task(task)
    assert (found.cause, found.losses, found.attempt) == (Cause.LAUNCHER_LOST, 2, 2)
    assert (await desk.task(child)).cause is Cause.PARENT


async def test_a_lease_is_closed_once(desk, reaping):
    lease = await desk.register()
    assert await reaping.bury(lease.id, state="EXPIRED", evidence="first")
    assert not await reaping.bury(lease.id, state="EXPIRED", evidence="second")
    await lease.close("at last")
    assert await desk.sql("SELECT state || ' ' || evidence FROM lease") == "EXPIRED first"
    assert [r.lease_state for r in await desk.store.launchers(only_live=False)] == ["EXPIRED"]
    assert await desk.store.launchers() == []


async def test_a_launcher_that_leaves_gives_back_what_it_still_held(desk):
    lease = await desk.register()
    task = await desk.add_one()
    await desk.claim(lease)
    await lease.close("no work is left")
    assert await desk.tell(task) == ("PREPROCESSED", 1, False)
    assert await desk.sql("SELECT state FROM lease WHERE swept") == "RELEASED"


async def test_silence_ends_a_lease_when_it_lasted_for_the_whole_lease(desk, reaping, eventually):
    silent, talking = await desk.register(ttl_s=0.05), await desk.register()
    assert await eventually(reaping.expire) == [silent.id]
    await talking.renew()
    assert await reaping.expire() == []


async def test_silence_counts_only_while_the_server_was_up(desk, reaping):
    lease = await desk.register(ttl_s=10 * 365 * 86400)
    await desk.sql("UPDATE lease SET expires_at = now() - interval '1 day'")
    assert await reaping.expire() == []
    await lease.renew()  # late, but nobody has closed it


@pytest.mark.parametrize(
    ("state", "is_final"),
    [
        ("FINISHED", True),
        ("FAILED", True),
        ("TIMEOUT", True),
        ("CANCELLED", True),
        ("RUNNING", False),
        ("QUEUED", False),
        ("LOST", False),
        ("REJECTED", False),
    ],
)
async def test_only_a_final_state_of_its_batch_job_ends_a_lease_early(
    desk, reaping, state, is_final
):
    lease = await desk.register(job="77")
    job = await desk.sql(
        "INSERT INTO batch_job (scheduler, state, num_nodes, wall_time_minutes, job_mode) "
        "VALUES ('slurm', $1, 1, 1, 'mpi') RETURNING id",
        state,
    )
    await desk.sql("UPDATE launcher SET batch_job_id = $1", job)
    assert await reaping.expire() == ([lease.id] if is_final else [])


async def test_two_reapers_release_each_task_once(desk, reaping):
    for _ in range(3):
        lease = await desk.register()
        await desk.add(50)
        await desk.begin(lease)
        await reaping.bury(lease.id, state="EXPIRED", evidence="gone")
    async with asyncio.TaskGroup() as group:
        results = [group.create_task(reaping.release()) for _ in range(4)]
    released = sum(result.result() for result in results) + await reaping.release()
    assert released == 150
    assert await desk.sql("SELECT sum(losses) FROM task") == 150


async def test_another_reaper_at_work_is_left_alone(desk, reaping, psql):
    lease = await desk.register()
    await desk.add_one()
    await desk.begin(lease)
    await reaping.bury(lease.id, state="EXPIRED", evidence="gone")
    async with psql.transaction():
        await psql.execute("SELECT pg_advisory_xact_lock(hashtext('ensemble.reap'))")
        assert await reaping.release() == 0
    assert await reaping.release() == 1


async def test_a_release_goes_in_batches_to_its_end(desk, reaping, psql):
    lease = await desk.register()
    await desk.add(25)
    await desk.begin(lease)
    await reaping.bury(lease.id, state="EXPIRED", evidence="gone")
    assert await _release_some(psql, lease.id, batch=10) == 25


async def test_a_locked_task_or_child_is_released_by_the_next_reaping(desk, reaping, psql):
    lease = await desk.register()
    free, locked, parent = await desk.add(3, max_losses=0)
    await desk.begin(lease)
    child = await desk.add_one(parents=[parent])
    await reaping.bury(lease.id, state="EXPIRED", evidence="gone")
    async with psql.transaction(), asyncio.timeout(5):
        await psql.execute("SELECT FROM task WHERE id IN ($1, $2) FOR UPDATE", locked, child)
        assert await reaping.release() == 1
        assert not await desk.sql("SELECT swept FROM lease")
    assert await reaping.release() == 2
    assert await desk.sql("SELECT swept FROM lease")
    assert set((await desk.states()).values()) == {"FAILED"}
    assert (await desk.task(free)).state == "FAILED"


async def test_a_locked_child_keeps_only_those_whose_end_changes_it(desk, reaping, psql):
    lease = await desk.register()
    running, out_of_time, killed, claimed, last = await desk.add(5)
    await desk.begin(lease, 4)
    await desk.claim(lease)
    await desk.sql("UPDATE task SET max_losses = 0 WHERE id = $1", last)
    await desk.sql("UPDATE task SET state = 'RUN_TIMEOUT' WHERE id = $1", out_of_time)
    child = await desk.add_one(parents=[running, out_of_time, killed, claimed, last])
    await desk.store.kill([killed])
    await reaping.bury(lease.id, state="EXPIRED", evidence="gone")
    async with psql.transaction(), asyncio.timeout(5):
        await psql.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", child)
        assert await reaping.release() == 5


@pytest.mark.parametrize("is_patient", [False, True])
async def test_a_blocked_task_does_not_keep_those_that_come_after_it(
    desk, reaping, psql, is_patient
):
    lease = await desk.register()
    first, *others = await desk.add(6, max_losses=0)
    await desk.begin(lease)
    child = await desk.add_one(parents=[first])
    await reaping.bury(lease.id, state="EXPIRED", evidence="gone")
    async with psql.transaction(), asyncio.timeout(5):
        await psql.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", child)
        if is_patient:
            assert await _release_slowly(desk.store.pool, lease.id) == len(others)
        else:
            async with desk.store.pool.acquire() as connection:
                assert await _release_some(connection, lease.id, batch=2) == len(others)
    assert await reaping.release() == 1


async def test_one_that_takes_longer_than_a_statement_may_is_released_after_all_others(
    desk, address, owner
):
    slow, beside, other = await desk.add(3, max_losses=0)
    for count in (2, 1):
        lease = await desk.register()
        await desk.begin(lease, count)
        await Reaping(desk.store.pool).bury(lease.id, state="EXPIRED", evidence="gone")
    hasty = await Store.open(replace(address, command_timeout_s=1), name="test")
    reaping = Reaping(hasty.pool)
    when = f"NEW.id = {slow} AND OLD.lease_id IS NOT NULL AND NEW.lease_id IS NULL"
    async with slowed(owner, "UPDATE", when, by_s=4):
        with pytest.raises(OutcomeUnknownError):
            await reaping.release(is_patient=False)
        assert (await desk.task(other)).state == "FAILED"
        assert {(await desk.task(each)).state for each in (slow, beside)} == {"RUNNING"}
        assert await reaping.release() == 2
    await hasty.close()
    assert set((await desk.states()).values()) == {"FAILED"}
    assert await desk.sql("SELECT bool_and(swept) FROM lease")


async def test_a_live_lease_is_never_released(desk, psql):
    lease = await desk.register()
    task = await desk.add_one()
    await desk.begin(lease)
    for lease_id in (lease.id, 999):
        found = await psql.fetchrow("SELECT * FROM release_lost($1, 10, 0)", lease_id)
        assert tuple(found) == (0, None)
    assert await desk.tell(task) == ("RUNNING", 1, True)


async def test_nodes_of_one_batch_job_serve_one_launcher_at_a_time(desk, reaping):
    first = await desk.register(job="77", scheduler="slurm", nodes=("a", "b"))
    with pytest.raises(AllocationError, match=f"launcher {first.launcher_id} of batch job 77"):
        await desk.register(job="77", scheduler="slurm", nodes=("b", "c"))
    await desk.register(job="77", scheduler="slurm", nodes=("c",))
    await desk.register(job="78", scheduler="slurm", nodes=("a",))
    await lose(reaping, first)
    await desk.register(job="77", scheduler="slurm", nodes=("a",))


async def test_a_launcher_has_a_prospect_while_what_its_task_waits_for_runs_under_a_live_lease(
    desk, reaping
):
    lease = await desk.register()
    parent = await desk.add_one()
    child = await desk.add_one(parents=[parent])
    await desk.add_one(parents=[child], num_nodes=4, workflow="wide")
    assert not await lease.has_prospect(None, 1)  # nothing runs
    await desk.begin(lease)
    assert await lease.has_prospect(None, 1)
    assert not await lease.has_prospect([], 9)
    wide = await desk.store.workflow_ids("wide")
    assert await lease.has_prospect(wide, 4)
    assert not await lease.has_prospect(wide, 3)
    await reaping.bury(lease.id, state="EXPIRED", evidence="gone")
    assert not await lease.has_prospect(None, 1)
    await reaping.release()


async def test_the_launchers_of_a_host_are_found_with_who_they_are(desk, reaping):
    lease = await desk.register()
    other = await desk.register()
    await other.close("done")
    found = await reaping.local_leases("node1")
    assert list(found) == [lease.id]
    assert (found[lease.id].boot_id, found[lease.id].pid) == ("boot", 1)
    assert await reaping.local_leases("node2") == {}
