"""What is held may still have a process: until its end is reported nobody else can have it."""

from __future__ import annotations

import asyncpg
import pytest

from ensemble.core.leases import Reaping
from ensemble.core.model import Cause, Changes, Outcome, Start, Verdict
from ensemble.errors import IllegalMoveError


async def mark(desk, lease, claim, how):
    if how == "USER_KILLED":
        await desk.store.kill([claim.id], reason="diverged")
    elif how == "time limit":
        assert await lease.time_out([(claim.id, claim.attempt)]) == 1
    else:
        assert await lease.drain("the allocation ends") == 1


@pytest.mark.parametrize("how", ["USER_KILLED", "time limit", "drained"])
async def test_nobody_gets_a_task_whose_process_still_dies(desk, how):
    one, other = await desk.register(), await desk.register()
    task = await desk.add_one(max_retries=5)
    [claim] = await desk.begin(one)
    await mark(desk, one, claim, how)
    state = "USER_KILLED" if how == "USER_KILLED" else "RUN_TIMEOUT"
    assert await desk.tell(task) == (state, 1, True)
    assert await desk.claim(other) == []
    assert await desk.store.retry([task]) == []
    assert await desk.store.remove([task]) == []
    with pytest.raises(IllegalMoveError, match="held by lease"):
        await desk.store.modify(task, Changes(priority=1))
    assert await Reaping(desk.store.pool).release() == 0
    assert await desk.store.unfinished([task]) == 1
    assert await one.doomed() == {(task, 1)}
    assert await desk.tell(task) == (state, 1, True)


async def test_a_killed_task_is_final_once_its_end_is_reported(desk):
    lease = await desk.register()
    task = await desk.add_one(max_retries=5)
    [claim] = await desk.begin(lease)
    await desk.store.kill([task], reason="diverged")
    assert await desk.end(lease, claim, Outcome.ERROR, exit_code=143) is Verdict.APPLIED
    found = await desk.detail(task)
    assert (found.task.state, found.task.cause, found.task.reason) == (
        "USER_KILLED",
        Cause.KILLED_BY_USER,
        "diverged",
    )
    assert found.task.failures == 0
    assert not found.task.is_held
    assert found.task.ended_at
    assert found.attempts[0].outcome is Outcome.KILLED
    assert await desk.store.unfinished([task]) == 0
    assert await desk.store.retry([task]) == [task]
    assert [c.attempt for c in await desk.claim(lease)] == [2]


async def test_a_task_killed_before_it_started_is_final_when_given_back(desk):
    lease = await desk.register()
    task = await desk.add_one()
    [claim] = await desk.claim(lease)
    assert await desk.store.kill([task]) == {task: True}
    assert await lease.doomed() == {(task, 1)}
    started = await lease.start([Start(id=task, attempt=1, at=desk.soon)])
    assert started == {(task, 1): Verdict.APPLIED}
    assert await desk.tell(task) == ("USER_KILLED", 1, True)
    assert await desk.end(lease, claim, Outcome.GIVEN_BACK) is Verdict.APPLIED
    assert await desk.tell(task) == ("USER_KILLED", 1, False)
    assert (await desk.task(task)).ended_at is not None


async def test_a_task_killed_while_it_drains_is_killed(desk):
    lease = await desk.register()
    task = await desk.add_one()
    [claim] = await desk.begin(lease)
    await lease.drain("the allocation ends")
    assert await desk.store.kill([task]) == {task: True}
    assert await desk.end(lease, claim, Outcome.TIMEOUT) is Verdict.APPLIED
    assert await desk.tell(task) == ("USER_KILLED", 1, False)


async def test_a_killed_task_that_ended_well_stays_killed(desk):
    lease = await desk.register()
    task = await desk.add_one()
    [claim] = await desk.begin(lease)
    await desk.store.kill([task])
    await desk.end(lease, claim, Outcome.DONE, exit_code=0)
    assert await desk.tell(task) == ("USER_KILLED", 1, False)


async def test_a_drained_task_that_ended_well_after_all_is_finished(desk):
    lease = await desk.register()
    task = await desk.add_one()
    [claim] = await desk.begin(lease)
    await lease.drain("the allocation ends")
    await desk.end(lease, claim, Outcome.DONE, exit_code=0)
    found = await desk.task(task)
    assert (found.state, found.cause, found.reason, found.timeouts) == (
        "JOB_FINISHED",
        None,
        None,
        0,
    )


async def run_out(desk, outcome, times, cause=None, **more):
    lease = await desk.register()
    task = await desk.add_one(**more)
    seen = []
    for _ in range(times):
        [claim] = await desk.begin(lease)
        await desk.end(lease, claim, outcome, cause=cause, exit_code=1)
        found = await desk.task(task)
        seen.append((str(found.state), found.attempt, found.failures, found.timeouts, found.losses))
    assert await desk.claim(lease) == []
    assert found.cause == cause
    return seen


async def test_failures_are_retried_up_to_their_limit(desk):
    assert await run_out(desk, Outcome.ERROR, 3, Cause.EXIT_CODE, max_retries=2) == [
        ("RESTART_READY", 1, 1, 0, 0),
        ("RESTART_READY", 2, 2, 0, 0),
        ("FAILED", 3, 3, 0, 0),
    ]


async def test_ends_of_allocations_are_retried_up_to_their_limit(desk):
    assert await run_out(desk, Outcome.TIMEOUT, 2, Cause.ALLOCATION_ENDED, max_timeouts=1) == [
        ("RESTART_READY", 1, 0, 1, 0),
        ("FAILED", 2, 0, 2, 0),
    ]


async def test_losses_are_retried_up_to_their_limit(desk):
    assert await run_out(desk, Outcome.LOST, 2, Cause.NODE_LOST, max_losses=1) == [
        ("RESTART_READY", 1, 0, 0, 1),
        ("FAILED", 2, 0, 0, 2),
    ]


async def test_an_own_time_limit_counts_as_a_failure(desk):
    assert await run_out(desk, Outcome.TIMEOUT, 2, Cause.TIME_LIMIT, max_retries=1) == [
        ("RESTART_READY", 1, 1, 0, 0),
        ("FAILED", 2, 2, 0, 0),
    ]


async def test_no_second_run_after_a_timeout_that_is_not_to_be_retried(desk):
    assert await run_out(
        desk, Outcome.TIMEOUT, 1, Cause.ALLOCATION_ENDED, auto_timeout_retry=False
    ) == [("FAILED", 1, 0, 1, 0)]


async def test_a_timeout_that_somebody_wrote_without_a_cause_is_retried(desk, psql):
    lease = await desk.register()
    task = await desk.add_one()
    [claim] = await desk.begin(lease)
    await psql.execute("UPDATE task SET state = 'RUN_TIMEOUT' WHERE id = $1", task)
    await desk.end(lease, claim, Outcome.TIMEOUT, cause=Cause.ALLOCATION_ENDED)
    assert await desk.tell(task) == ("RESTART_READY", 1, False)
    assert (await desk.task(task)).timeouts == 1


async def test_given_back_changes_nothing_but_the_hold_and_the_attempt(desk):
    lease = await desk.register()
    task = await desk.add_one(max_retries=1)
    [claim] = await desk.begin(lease)
    await desk.end(lease, claim, Outcome.ERROR, cause=Cause.EXIT_CODE, exit_code=7)
    before = await desk.task(task)
    [claim] = await desk.claim(lease)
    await desk.end(lease, claim, Outcome.GIVEN_BACK)
    after = await desk.task(task)
    assert after.attempt == before.attempt + 1
    for field in ("state", "failures", "timeouts", "losses", "cause", "exit_code", "ended_at"):
        assert getattr(after, field) == getattr(before, field), field
    assert [c.attempt for c in await desk.claim(lease)] == [3]


async def test_a_task_on_record_as_started_cannot_be_given_back_unrun(desk):
    lease = await desk.register()
    task, other = await desk.add(2)
    first, second = await desk.begin(lease)
    # One doubtful row must not spoil the batch it comes with.
    assert await desk.end(lease, first, Outcome.GIVEN_BACK) is Verdict.APPLIED
    assert await desk.end(lease, second) is Verdict.APPLIED
    assert await desk.tell(task) == ("RESTART_READY", 1, False)
    assert (await desk.task(task)).losses == 1
    assert await desk.tell(other) == ("JOB_FINISHED", 1, False)


async def test_a_start_and_end_in_one_report_finish_a_claimed_task(desk):
    lease = await desk.register()
    task = await desk.add_one()
    [claim] = await desk.claim(lease)
    await desk.end(lease, claim, Outcome.DONE, started_at=desk.soon, nodes=("a", "b"), exit_code=0)
    found = await desk.detail(task)
    assert (found.task.state, found.task.nodes) == ("JOB_FINISHED", ("a", "b"))
    assert [str(e.to_state) for e in found.events] == ["PREPROCESSED", "JOB_FINISHED"]


async def test_a_launchers_fast_clock_lets_no_attempts_overlap(desk):
    lease = await desk.register()
    task = await desk.add_one(max_retries=1)
    [claim] = await desk.claim(lease)
    await desk.end(lease, claim, Outcome.ERROR, at=desk.soon, started_at=desk.soon)
    await desk.claim(lease)
    found = await desk.detail(task)
    assert found.attempts[0].ended_at <= found.attempts[1].claimed_at


async def test_a_running_task_has_not_ended_yet_whatever_its_last_attempt_did(desk):
    lease = await desk.register()
    task = await desk.add_one(max_retries=1)
    [claim] = await desk.begin(lease)
    await desk.end(lease, claim, Outcome.ERROR, exit_code=3)
    await desk.begin(lease)
    found = await desk.task(task)
    assert (found.ended_at, found.exit_code) == (None, None)


async def test_plain_sql_cannot_make_a_dying_task_runnable(desk, psql):
    lease = await desk.register()
    task = await desk.add_one()
    await desk.begin(lease)
    await desk.store.kill([task])
    with pytest.raises(asyncpg.PostgresError, match=f"task {task} is held by a launcher"):
        await psql.execute("UPDATE task SET state = 'PREPROCESSED' WHERE id = $1", task)
    assert await desk.tell(task) == ("USER_KILLED", 1, True)


async def test_plain_sql_cannot_delete_what_is_held(desk, psql):
    lease = await desk.register()
    task = await desk.add_one()
    await desk.claim(lease)
    with pytest.raises(asyncpg.PostgresError, match=f"task {task} is held by a launcher"):
        await psql.execute("DELETE FROM task")
    assert await desk.tell(task) == ("PREPROCESSED", 1, True)


async def test_a_kill_during_a_claim_either_prevents_it_or_is_seen_by_the_launcher(desk, psql):
    lease = await desk.register()
    early, late = await desk.add(2)
    async with psql.transaction():
        await psql.execute("UPDATE task SET state = 'USER_KILLED' WHERE id = $1", early)
        assert [c.id for c in await desk.claim(lease)] == [late]
    assert await desk.claim(lease) == []
    assert await desk.tell(early) == ("USER_KILLED", 0, False)
    assert await desk.store.kill([late]) == {late: True}
    assert await lease.doomed() == {(late, 1)}


async def test_killing_ten_thousand_tasks_takes_a_second_not_minutes(desk, psql):
    """A session that changed one task first must not plan for one row ever after."""
    ids = await desk.add(10_000)
    await psql.execute("UPDATE task SET state = 'USER_KILLED' WHERE id = $1", ids[0])
    killed = await psql.fetch("SELECT * FROM kill_tasks($1, NULL)", ids, timeout=5)
    assert len(killed) == len(ids) - 1
