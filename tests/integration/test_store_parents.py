"""Tasks that wait for others: released by the last parent, failed with the first that fails."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from ensemble.core import insertion
from ensemble.core.database import connect
from ensemble.core.insertion import resolve_all
from ensemble.core.leases import Lease, Reaping
from ensemble.core.model import Cause, End, NewTask, Outcome, Verdict
from ensemble.errors import NotFoundError, UsageError


def task(name="", *parents, **more):
    return NewTask(command=["true"], name=name, parents=list(parents), **more)


async def locked_waiters(desk):
    return await desk.sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")


async def finish_all(desk, lease, outcome=Outcome.DONE):
    for claim in await desk.begin(lease):
        assert await desk.end(lease, claim, outcome) is Verdict.APPLIED


async def test_the_last_parent_releases_the_child(desk):
    lease = await desk.register()
    a, b, child = await desk.store.add([task("a"), task("b"), task("c", "a", "b")])
    first, second = await desk.begin(lease)
    assert (await desk.task(child)).pending_parents == 2
    await desk.end(lease, first)
    assert await desk.tell(child) == ("AWAITING_PARENTS", 0, False)
    await desk.end(lease, second)
    assert await desk.tell(child) == ("PREPROCESSED", 0, False)
    assert (await desk.detail(child)).parents == (a, b)


async def test_both_parents_in_one_report_release_the_child(desk):
    lease = await desk.register()
    *_, child = await desk.store.add([task("a"), task("b"), task("c", "a", "b")])
    await lease.finish([end(claim) for claim in await desk.begin(lease)])
    assert await desk.tell(child) == ("PREPROCESSED", 0, False)


def end(claim):
    return End(id=claim.id, attempt=claim.attempt, outcome=Outcome.DONE)


async def test_parents_that_finish_in_two_transactions_release_the_child(desk, psql, eventually):
    lease = await desk.register()
    *_, child = await desk.store.add([task("a"), task("b"), task("c", "a", "b")])
    first, second = await desk.begin(lease)
    async with psql.transaction():
        await psql.fetch(
            "SELECT * FROM finish_tasks($1, $2, $3, '{done}', '{NULL}', '{NULL}', '{\"\"}',"
            " '{0}', '{NULL}', '{NULL}', '{NULL}', '{NULL}')",
            lease.id,
            [first.id],
            [1],
        )
        # The child is locked by the open transaction: not now, and without waiting for it.
        assert await desk.end(lease, second) is Verdict.BUSY
    assert await desk.end(lease, second) is Verdict.APPLIED
    assert await desk.tell(child) == ("PREPROCESSED", 0, False)


async def test_a_child_added_while_its_parent_finishes_waits_for_the_outcome(
    desk, psql, eventually
):
    lease = await desk.register()
    parent = await desk.add_one()
    await desk.begin(lease)
    async with psql.transaction():
        await psql.execute(
            "UPDATE task SET state = 'JOB_FINISHED', lease_id = NULL WHERE id = $1", parent
        )
        await psql.execute("UPDATE attempt SET ended_at = now(), outcome = 'done'")
        adding = asyncio.create_task(desk.add_one(parents=[parent]))
        await eventually(lambda: locked_waiters(desk))
    assert await desk.tell(await adding) == ("PREPROCESSED", 0, False)


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.ERROR])
async def test_a_parent_cannot_end_unseen_while_a_child_is_being_added(desk, psql, outcome):
    lease = await desk.register()
    parent = await desk.add_one()
    [claim] = await desk.begin(lease)
    async with psql.transaction():
        child = await add_in(psql, task("", parent))
        assert await desk.end(lease, claim, outcome) is Verdict.BUSY
    assert await desk.end(lease, claim, outcome) is Verdict.APPLIED
    wanted = "PREPROCESSED" if outcome is Outcome.DONE else "FAILED"
    assert await desk.tell(child) == (wanted, 0, False)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_no_task_ends_under_a_snapshot_that_may_miss_its_children(desk, psql, level):
    task_id = await desk.add_one()
    await psql.execute(f"BEGIN ISOLATION LEVEL {level}")
    await psql.execute("UPDATE task SET priority = 1")
    with pytest.raises(asyncpg.PostgresError, match=f"task {task_id} cannot end in a {level} "):
        await psql.execute("UPDATE task SET state = 'USER_KILLED'")
    await psql.execute("ROLLBACK")
    assert (await desk.task(task_id)).state == "PREPROCESSED"


async def test_a_default_isolation_of_the_site_s_does_not_count(site, owner):
    name = await owner.fetchval("SELECT quote_ident(current_database())")
    await owner.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    try:
        connection = await connect(site.address(), name="test")
        assert await connection.fetchval("SHOW transaction_isolation") == "read committed"
        connection.terminate()
    finally:
        await owner.execute(f"ALTER DATABASE {name} RESET default_transaction_isolation")


async def test_a_child_that_plain_sql_has_set_free_does_not_spoil_its_parent_s_report(desk, psql):
    lease = await desk.register()
    parent, other = await desk.add(2)
    freed, kept = await desk.store.add([task("", parent), task("", parent, other)])
    await psql.execute(
        "UPDATE task SET state = 'PREPROCESSED', pending_parents = 0 WHERE id = $1", freed
    )
    claims = {claim.id: claim for claim in await desk.begin(lease)}
    await desk.end(lease, claims[freed], Outcome.ERROR)
    await desk.end(lease, claims[parent])
    found = [await desk.task(i) for i in (freed, kept)]
    assert [(str(t.state), t.pending_parents) for t in found] == [
        ("FAILED", 0),
        ("AWAITING_PARENTS", 1),
    ]


@pytest.mark.parametrize("has_child", [False, True])
async def test_the_ends_of_many_children_do_not_read_all_edges(desk, owner, psql, has_child):
    lease = await desk.register()
    parent = await desk.add_one()
    [claim] = await desk.begin(lease)
    await desk.store.add([task("", parent) for _ in range(2000)])
    await desk.end(lease, claim)
    await owner.execute("ANALYZE ensemble.task, ensemble.task_parent")
    ends = [end(claim) for claim in await desk.claim(lease, 100)]
    if has_child:
        await desk.add_one(parents=[ends[0].id])
    async with psql.transaction():
        # As after five batches.
        await psql.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        await Lease(psql, lease.id, lease.launcher_id).finish(ends)
        scans = await psql.fetch(
            "SELECT relname::text, seq_scan FROM pg_stat_xact_user_tables"
            " WHERE relname IN ('task', 'task_parent')"
        )
    assert dict(scans) == {"task": 0, "task_parent": 0}


async def add_in(connection, *tasks):
    resolved = resolve_all(tasks, {})
    names = [each.name for each in resolved]
    ids = await insertion.insert(connection, resolved, range(len(tasks)), names, None)
    return ids[0]


async def test_a_grandchild_added_while_its_grandparent_fails_fails_too(desk, psql, eventually):
    grandparent = await desk.add_one()
    parent = await desk.add_one(parents=[grandparent])
    async with psql.transaction():
        child = await add_in(psql, task("", parent))
        killing = asyncio.create_task(desk.store.kill([grandparent]))
        await eventually(lambda: locked_waiters(desk))
    await killing
    assert await desk.states() == {grandparent: "USER_KILLED", parent: "FAILED", child: "FAILED"}


async def test_failure_goes_down_through_a_diamond_once(desk):
    lease = await desk.register()
    top, left, right, bottom, aside = await desk.store.add(
        [task("t"), task("l", "t"), task("r", "t"), task("b", "l", "r"), task("x")]
    )
    claims = {claim.id: claim for claim in await desk.begin(lease)}
    await desk.end(lease, claims[top], Outcome.ERROR, exit_code=1)
    await desk.end(lease, claims[aside])
    states = await desk.states()
    assert [states[i] for i in (left, right, bottom)] == ["FAILED"] * 3
    found = await desk.detail(bottom)
    assert (found.task.cause, found.task.reason) == (Cause.PARENT, f"task {left}")
    assert [(str(e.to_state), e.reason) for e in found.events] == [
        ("AWAITING_PARENTS", None),
        ("FAILED", f"parent: task {left}"),
    ]


async def test_a_chain_of_three_hundred_fails_and_is_revived_from_its_top(desk):
    ids = await desk.store.add([task("0"), *(task(str(i), str(i - 1)) for i in range(1, 300))])
    await desk.store.kill(ids[:1])
    assert set((await desk.states()).values()) == {"USER_KILLED", "FAILED"}
    assert await desk.store.retry(ids[:1]) == ids
    states = await desk.states()
    assert states.pop(ids[0]) == "PREPROCESSED"
    assert set(states.values()) == {"AWAITING_PARENTS"}


async def test_a_child_of_a_failed_task_is_failed_at_birth_and_so_is_its_child(desk):
    parent = await desk.add_one()
    await desk.store.kill([parent])
    child, grandchild = await desk.store.add([task("c", parent), task("g", "c")])
    found = [await desk.task(i) for i in (parent, child, grandchild)]
    assert [str(each.state) for each in found] == ["USER_KILLED", "FAILED", "FAILED"]
    assert found[0].ended_at < found[1].ended_at <= found[2].ended_at
    assert await desk.store.retry([parent]) == [parent, child, grandchild]
    lease = await desk.register()
    for _ in range(3):
        await finish_all(desk, lease)
    assert set((await desk.states()).values()) == {"JOB_FINISHED"}


async def test_parents_on_record_only_neither_delay_nor_fail_a_task(desk):
    parent = await desk.add_one()
    child = (await desk.store.add([task("c", parent, wait_for_parents=False)]))[0]
    assert await desk.tell(child) == ("PREPROCESSED", 0, False)
    await desk.store.kill([parent])
    assert await desk.tell(child) == ("PREPROCESSED", 0, False)
    assert (await desk.detail(child)).parents == (parent,)
    assert (await desk.detail(parent)).children == (child,)


async def test_what_waits_for_two_dead_parents_is_not_revived_by_one(desk):
    a, b = await desk.add(2)
    child = await desk.add_one(parents=[a, b])
    grandchild = await desk.add_one(parents=[child])
    await desk.store.kill([a, b])
    assert await desk.store.retry([a]) == [a]
    assert await desk.store.retry([child]) == []
    assert (await desk.task(grandchild)).state == "FAILED"
    assert await desk.store.retry([b]) == [b, child, grandchild]


async def test_what_waits_for_a_parent_that_still_dies_is_not_revived(desk):
    lease = await desk.register()
    parent = await desk.add_one()
    child = await desk.add_one(parents=[parent])
    [claim] = await desk.begin(lease)
    await desk.store.kill([parent])
    assert await desk.store.retry([parent, child]) == []
    await desk.end(lease, claim, Outcome.ERROR)
    assert await desk.store.retry([child]) == []
    assert await desk.store.retry([parent, child]) == [parent, child]


async def test_a_retry_and_the_failure_of_another_parent_do_not_miss_each_other(desk, psql):
    lease = await desk.register()
    running, dead = await desk.add(2)
    child = await desk.add_one(parents=[running, dead])
    claims = {claim.id: claim for claim in await desk.begin(lease)}
    await desk.end(lease, claims[dead], Outcome.ERROR)
    async with psql.transaction():
        assert len(await psql.fetch("SELECT * FROM retry_tasks($1)", [dead])) == 2
        assert await desk.end(lease, claims[running], Outcome.ERROR) is Verdict.BUSY
    assert await desk.end(lease, claims[running], Outcome.ERROR) is Verdict.APPLIED
    assert (await desk.task(child)).state == "FAILED"


async def test_a_retry_revives_what_is_being_added_below_it(desk, psql, eventually):
    parent = await desk.add_one()
    await desk.store.kill([parent])
    async with psql.transaction():
        child = await add_in(psql, task("", parent))
        retrying = asyncio.create_task(desk.store.retry([parent]))
        await eventually(lambda: locked_waiters(desk))
    assert await retrying == [parent, child]
    assert await desk.tell(child) == ("AWAITING_PARENTS", 0, False)


async def test_what_fails_with_another_ends_when_it_does_and_not_when_its_transaction_began(
    desk, psql
):
    parent = await desk.add_one()
    child = await desk.add_one(parents=[parent])
    async with psql.transaction():
        began = await psql.fetchval("SELECT now()")
        await psql.fetch("SELECT * FROM kill_tasks($1, NULL)", [parent])
    assert began < (await desk.task(parent)).ended_at < (await desk.task(child)).ended_at


async def test_finished_parents_stay_finished_when_their_child_is_retried(desk):
    lease = await desk.register()
    parent = await desk.add_one()
    child = await desk.add_one(parents=[parent])
    await finish_all(desk, lease)
    await finish_all(desk, lease, Outcome.ERROR)
    assert await desk.store.retry([parent, child]) == [child]
    assert await desk.tell(child) == ("PREPROCESSED", 1, False)


async def test_a_lost_parent_that_runs_again_keeps_its_children_waiting(desk):
    lease = await desk.register()
    parent = await desk.add_one()
    child = await desk.add_one(parents=[parent])
    await desk.begin(lease)
    reaping = Reaping(desk.store.pool)
    await reaping.bury(lease.id, state="EXPIRED", evidence="gone")
    await reaping.release()
    assert await desk.tell(child) == ("AWAITING_PARENTS", 0, False)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([task("a", "b"), task("b", "a")], "circle"),
        ([task("a", "a")], "circle"),
        ([task("a", "nobody")], "no task of this submission"),
        ([task("a"), task("a"), task("b", "a")], "2 tasks of this submission"),
    ],
)
async def test_parents_that_make_no_sense_are_refused_and_nothing_is_added(desk, tasks, message):
    with pytest.raises(UsageError, match=message):
        await desk.store.add(tasks)
    assert await desk.states() == {}


async def test_an_unknown_parent_is_refused_and_nothing_is_added(desk):
    with pytest.raises(NotFoundError, match="no task 4711"):
        await desk.store.add([task("a"), task("b", 4711)])
    assert await desk.states() == {}


async def test_parents_named_after_their_children_come_first(desk):
    child, parent = await desk.store.add([task("c", "p"), task("p")])
    assert parent < child
    assert (await desk.detail(child)).parents == (parent,)


async def test_what_something_waits_for_is_not_removed_before_it(desk, psql):
    a = await desk.add_one()
    b = await desk.add_one(parents=[a])
    c = await desk.add_one(parents=[b])
    assert await desk.store.remove([a]) == []
    assert await desk.store.remove([a, b]) == []  # c waits for b, and b for a
    with pytest.raises(asyncpg.PostgresError, match=f"task {b} waits for task {a}"):
        await psql.execute("DELETE FROM task WHERE id = $1", a)
    assert await desk.store.remove([a, b, c]) == [a, b, c]
    assert await desk.sql("SELECT count(*) FROM task_parent") == 0


async def test_a_dead_parent_is_not_removed_from_under_its_failed_children(desk):
    a = await desk.add_one()
    b = await desk.add_one(parents=[a])
    await desk.store.kill([a])
    assert await desk.store.remove([a]) == []
    assert await desk.store.remove([b]) == [b]
    assert await desk.store.remove([a]) == [a]


async def test_a_finished_parent_can_be_removed_once_nothing_waits(desk):
    lease = await desk.register()
    a = await desk.add_one()
    b = await desk.add_one(parents=[a])
    await finish_all(desk, lease)
    assert await desk.store.remove([a]) == [a]
    await finish_all(desk, lease, Outcome.ERROR)
    assert await desk.store.retry([b]) == [b]


async def test_a_parent_is_not_removed_while_a_child_is_being_added(desk, psql, eventually):
    parent = await desk.add_one()
    async with psql.transaction():
        await add_in(psql, task("", parent))
        removing = asyncio.create_task(desk.store.remove([parent]))
        await eventually(lambda: locked_waiters(desk))
    assert await removing == []
