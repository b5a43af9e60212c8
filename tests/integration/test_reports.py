"""Reports of starts and ends: fenced, classified, and nothing changed by those that are refused."""

from __future__ import annotations

import asyncio

import pytest

from ensemble.core.leases import Reaping
from ensemble.core.model import Cause, End, Outcome, Output, Start, Verdict


async def rows(desk, task):
    """Everything the store has about a task."""
    return [
        await desk.sql(f"SELECT to_jsonb(x) FROM {table} x WHERE {key} = $1 ORDER BY 1", task)
        for table, key in (("task", "id"), ("attempt", "task_id"))
    ]


def ordered(verdicts):
    return [verdicts[pair] for pair in sorted(verdicts)]


async def report(lease, task, attempt):
    started = await lease.start([Start(id=task, attempt=attempt, at=None)])
    ended = await lease.finish([End(id=task, attempt=attempt, outcome=Outcome.DONE)])
    return [*started.values(), *ended.values()]


async def test_the_lease_of_somebody_else_is_fenced(desk):
    one, other = await desk.register(), await desk.register()
    task = await desk.add_one()
    await desk.claim(one)
    before = await rows(desk, task)
    assert await report(other, task, 1) == [Verdict.FENCED, Verdict.FENCED]
    assert await other.time_out([(task, 1)]) == 0
    assert await other.drain("x") == 0
    assert await rows(desk, task) == before


async def test_an_attempt_that_was_or_will_be_is_fenced(desk):
    lease = await desk.register()
    task = await desk.add_one()
    [first] = await desk.claim(lease)
    await desk.end(lease, first, Outcome.GIVEN_BACK)
    await desk.begin(lease)
    before = await rows(desk, task)
    assert await report(lease, task, 3) == [Verdict.FENCED, Verdict.FENCED]
    assert await report(lease, task, 1) == [Verdict.DUPLICATE, Verdict.DUPLICATE]
    assert await lease.time_out([(task, 1)]) == 0
    assert await rows(desk, task) == before


async def test_a_repeated_report_is_a_duplicate_and_changes_nothing(desk):
    lease = await desk.register()
    task = await desk.add_one(max_losses=5)
    for outcome in (Outcome.LOST, Outcome.DONE):
        [claim] = await desk.begin(lease)
        assert await desk.end(lease, claim, outcome, cause=None) is Verdict.APPLIED
        before = await rows(desk, task)
        assert await desk.end(lease, claim, outcome) is Verdict.DUPLICATE
        assert await desk.end(lease, claim, Outcome.ERROR) is Verdict.DUPLICATE
        assert await rows(desk, task) == before


async def test_a_removed_task_is_missing(desk):
    lease = await desk.register()
    task = await desk.add_one()
    [claim] = await desk.begin(lease)
    await desk.end(lease, claim)
    assert await desk.store.remove([task]) == [task]
    assert await report(lease, task, 1) == [Verdict.MISSING, Verdict.MISSING]


async def test_a_locked_row_is_busy_and_its_report_applies_when_sent_again(desk, psql):
    lease = await desk.register()
    tasks = await desk.add(3)
    claims = await desk.claim(lease)
    starts = [Start(id=c.id, attempt=1, at=desk.soon) for c in claims]
    ends = [End(id=c.id, attempt=1, outcome=Outcome.DONE) for c in claims]
    async with psql.transaction(), asyncio.timeout(5):
        await psql.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", tasks[1])
        assert ordered(await lease.start(starts)) == ["applied", "busy", "applied"]
        assert await lease.start(starts[1:2]) == {(tasks[1], 1): Verdict.BUSY}
        assert ordered(await lease.finish(ends)) == ["applied", "busy", "applied"]
    assert ordered(await lease.start(starts)) == ["duplicate", "applied", "duplicate"]
    assert ordered(await lease.finish(ends)) == ["duplicate", "applied", "duplicate"]
    assert set((await desk.states()).values()) == {"JOB_FINISHED"}


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.ERROR])
async def test_a_locked_descendant_makes_a_report_busy_and_stalls_no_other(desk, psql, outcome):
    lease = await desk.register()
    parent, other = await desk.add(2)
    claims = await desk.begin(lease)
    child = await desk.add_one(parents=[parent])
    grandchild = await desk.add_one(parents=[child])
    locked = child if outcome is Outcome.DONE else grandchild
    ends = [End(id=c.id, attempt=1, outcome=outcome) for c in claims]
    async with psql.transaction(), asyncio.timeout(5):
        await psql.execute("UPDATE task SET priority = 1 WHERE id = $1", locked)
        assert await lease.finish(ends) == {(parent, 1): "busy", (other, 1): "applied"}
    assert await lease.finish(ends) == {(parent, 1): "applied", (other, 1): "duplicate"}
    below = ["PREPROCESSED", "AWAITING_PARENTS"] if outcome is Outcome.DONE else ["FAILED"] * 2
    states = await desk.states()
    assert [states[child], states[grandchild]] == below


@pytest.mark.parametrize(
    ("outcome", "cause"),
    [
        (Outcome.ERROR, Cause.EXIT_CODE),
        (Outcome.TIMEOUT, Cause.TIME_LIMIT),
        (Outcome.TIMEOUT, Cause.ALLOCATION_ENDED),
        (Outcome.LOST, Cause.NODE_LOST),
        (Outcome.KILLED, Cause.KILLED_BY_USER),
    ],
)
async def test_an_end_that_changes_nothing_below_does_not_wait_for_a_locked_child(
    desk, psql, outcome, cause
):
    lease = await desk.register()
    parent = await desk.add_one(max_retries=1)
    [claim] = await desk.begin(lease)
    child = await desk.add_one(parents=[parent])
    if outcome is Outcome.KILLED:
        await desk.store.kill([parent])
    async with psql.transaction(), asyncio.timeout(5):
        await psql.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", child)
        assert await desk.end(lease, claim, outcome, cause=cause) is Verdict.APPLIED
    state = "USER_KILLED" if outcome is Outcome.KILLED else "RESTART_READY"
    assert await desk.tell(parent) == (state, 1, False)


@pytest.mark.parametrize("is_told_first", [False, True])
async def test_a_clock_that_is_ahead_neither_moves_a_start_nor_ends_before_it(desk, is_told_first):
    lease = await desk.register()
    ids = await desk.add(50)
    claims = await desk.claim(lease)
    if is_told_first:
        await lease.start([Start(id=c.id, attempt=1, at=desk.soon) for c in claims])
    at = desk.soon
    await lease.finish(
        [End(id=c.id, attempt=1, outcome=Outcome.DONE, at=at, started_at=at) for c in claims]
    )
    for found in [await desk.detail(i) for i in ids]:
        [attempt] = found.attempts
        assert attempt.claimed_at <= attempt.started_at <= attempt.ended_at < at
        assert found.task.started_at == attempt.started_at
        assert found.task.ended_at == attempt.ended_at


async def test_a_report_under_a_closed_lease_is_fenced_before_and_after_its_tasks_are_released(
    desk,
):
    lease = await desk.register()
    running, killed, claimed = await desk.add(3)
    claims = await desk.begin(lease, 2)
    claims += await desk.claim(lease)
    await desk.store.kill([killed])
    reaping = Reaping(desk.store.pool)
    await reaping.bury(lease.id, state="EXPIRED", evidence="gone")
    before = [await rows(desk, task) for task in (running, killed, claimed)]
    for claim in claims:
        assert await desk.end(lease, claim) is Verdict.FENCED
    assert await lease.drain("x") == 0
    assert await lease.time_out([(running, 1)]) == 0
    assert [await rows(desk, task) for task in (running, killed, claimed)] == before
    assert await reaping.release() == 3
    before = [await rows(desk, task) for task in (running, killed, claimed)]
    for claim in claims:
        assert await desk.end(lease, claim) in (Verdict.FENCED, Verdict.DUPLICATE)
    assert [await rows(desk, task) for task in (running, killed, claimed)] == before
    assert await desk.end(lease, claims[0]) is Verdict.FENCED


async def test_an_empty_report_is_answered(desk):
    lease = await desk.register()
    assert await lease.start([]) == {}
    assert await lease.finish([]) == {}


async def test_output_that_text_cannot_hold_does_not_spoil_a_batch(desk):
    lease = await desk.register()
    task = await desk.add_one()
    [claim] = await desk.begin(lease)
    ugly = "a\0b\udcffc"
    assert await desk.end(lease, claim, Outcome.ERROR, error=ugly, reason=ugly) == "applied"
    assert (await desk.task(task)).error == "a\N{REPLACEMENT CHARACTER}b?c"


async def test_the_end_of_the_output_is_kept_with_the_attempt(desk):
    lease = await desk.register()
    task = await desk.add_one(output=Output.TAIL, max_retries=1)
    [claim] = await desk.begin(lease)
    assert await desk.end(lease, claim, Outcome.ERROR, output="no\0\n") == "applied"
    [claim] = await desk.begin(lease)
    assert await desk.end(lease, claim, output="yes\n") == "applied"
    outputs = [attempt.output for attempt in (await desk.detail(task)).attempts]
    assert outputs == ["no\N{REPLACEMENT CHARACTER}\n", "yes\n"]


async def test_every_verdict_in_one_batch(desk, psql):
    lease, other = await desk.register(), await desk.register()
    done, busy, gone, fresh, foreign = await desk.add(5)
    claims = {c.id: c for c in await desk.begin(lease, 4)}
    await desk.begin(other)
    await desk.end(lease, claims[done])
    await desk.end(lease, claims[gone])
    await desk.store.remove([gone])
    async with psql.transaction():
        await psql.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", busy)
        ids = (done, busy, gone, fresh, foreign)
        ends = [
            End(id=i, attempt=1, outcome=Outcome.ERROR, cause=Cause.EXIT_CODE, exit_code=2)
            for i in ids
        ]
        verdicts = await lease.finish(ends)
    assert [verdicts[i, 1] for i in ids] == ["duplicate", "busy", "missing", "applied", "fenced"]
    states = await desk.states()
    assert [states[i] for i in ids if i in states] == [
        "JOB_FINISHED",
        "RUNNING",
        "FAILED",
        "RUNNING",
    ]


@pytest.mark.parametrize("is_drained", [False, True])
async def test_what_ran_and_is_given_back_is_busy_while_its_child_is_locked(desk, psql, is_drained):
    """It fails, and its child with it: that waited for the lock, and the whole batch with it."""
    lease = await desk.register()
    parent = await desk.add_one(max_losses=0, max_timeouts=0)
    [claim] = await desk.begin(lease)
    child = await desk.add_one(parents=[parent])
    if is_drained:
        await lease.drain("the allocation ends")
    async with psql.transaction(), asyncio.timeout(5):
        await psql.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", child)
        assert await desk.end(lease, claim, Outcome.GIVEN_BACK) is Verdict.BUSY
    assert await desk.end(lease, claim, Outcome.GIVEN_BACK) is Verdict.APPLIED
    assert set((await desk.states()).values()) == {"FAILED"}


@pytest.mark.parametrize("how", ["runs", "drained", "killed"])
async def test_what_ran_is_on_record_as_lost_or_killed_though_it_was_given_back(desk, how):
    lease = await desk.register()
    task = await desk.add_one(max_losses=0)
    [claim] = await desk.begin(lease)
    if how == "drained":
        await lease.drain("the allocation ends")
    elif how == "killed":
        await desk.store.kill([task])
    await desk.end(lease, claim, Outcome.GIVEN_BACK)
    found = await desk.detail(task)
    wanted = {
        "runs": ("FAILED", Cause.LAUNCHER_LOST, Outcome.LOST),
        "drained": ("RESTART_READY", Cause.ALLOCATION_ENDED, Outcome.LOST),
        "killed": ("USER_KILLED", Cause.KILLED_BY_USER, Outcome.KILLED),
    }
    assert (found.task.state, found.task.cause, found.attempts[0].outcome) == wanted[how]
