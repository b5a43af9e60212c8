"""The store itself: bulk submissions, plain SQL, rights, invariants, errors."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from ensemble.core import insertion
from ensemble.core.database import connect, queries
from ensemble.core.leases import Reaping
from ensemble.core.model import Changes, NewApp, NewTask, Outcome, Output, Selector
from ensemble.core.store import CHECKS, Store
from ensemble.errors import IllegalMoveError, NotFoundError, StoreUnavailableError, UsageError
from ensemble.site import TASK
from tests.integration.storing import Desk, slowed

REFUSED = asyncpg.InsufficientPrivilegeError


async def test_added_tasks_get_rising_ids(store: Store) -> None:
    ids = await store.add([NewTask(command=["true"]), NewTask(command=["true"])])
    assert ids == [1, 2]


# ---------------------------------------------------------------------------- submissions


async def test_twenty_thousand_tasks_are_added_in_one_go(desk):
    tasks = [
        NewTask(command=["true"], name=f"t{i}", parents=[f"t{i - 1}"] if i % 2 else [])
        for i in range(20_000)
    ]
    ids = await desk.store.add(tasks)
    assert len(set(ids)) == 20_000
    counts = await desk.store.counts()
    assert counts.by_state == {"PREPROCESSED": 10_000, "AWAITING_PARENTS": 10_000}


async def test_rows_may_take_longer_to_make_than_others_may_be_silent_in_a_transaction(desk, psql):
    class Slow(list[str]):
        def __iter__(self):
            time.sleep(1.5)  # as if there were millions
            return super().__iter__()

    await psql.execute("SET idle_in_transaction_session_timeout = '1s'")
    resolved = insertion.resolve_all([NewTask(command=["true"])], {})
    assert await insertion.insert(psql, resolved, [0], Slow([resolved[0].name]), None) == [1]
    assert await psql.fetchval("SHOW idle_in_transaction_session_timeout") == "1s"
    assert await desk.tell(1) == ("PREPROCESSED", 0, False)


async def test_a_malformed_task_is_named_and_nothing_is_added(desk):
    tasks = [NewTask(command=["true"], num_nodes=0 if i == 500 else 1) for i in range(1000)]
    with pytest.raises(UsageError, match="task 501 of 1000: num_nodes is 0"):
        await desk.store.add(tasks)
    assert await desk.states() == {}


async def test_nothing_is_added_when_nothing_is_given(desk):
    assert await desk.store.add([]) == []


async def test_the_same_key_adds_once_also_at_the_same_moment(desk):
    tasks = [NewTask(command=["true"])] * 50
    async with asyncio.TaskGroup() as group:
        adding = [group.create_task(desk.store.add(tasks, key="k")) for _ in range(5)]
    assert len({tuple(each.result()) for each in adding}) == 1
    assert await desk.store.add(tasks, key="k") == adding[0].result()
    assert sorted(await desk.states()) == adding[0].result()
    assert await desk.store.add(tasks[:1], key="other") != adding[0].result()[:1]


async def test_two_submissions_to_one_workflow_do_not_wait_for_each_other(desk, psql):
    await desk.add_one(workflow="w")
    async with psql.transaction(), asyncio.timeout(5):
        await psql.execute("INSERT INTO task (workflow_id, state) VALUES (1, 'PREPROCESSED')")
        await desk.add_one(workflow="w")
        await desk.add_one(workflow="new")
    await psql.execute("DELETE FROM task WHERE id NOT IN (SELECT task_id FROM task_spec)")


async def test_a_task_can_be_changed_while_nobody_holds_it(desk):
    task = await desk.add_one(tags={"a": "1"})
    await desk.store.modify(task, Changes(workflow="w", priority=5, tags={"b": "2"}))
    found = await desk.task(task)
    assert (found.workflow, found.priority, found.tags) == ("w", 5, {"a": "1", "b": "2"})
    with pytest.raises(NotFoundError):
        await desk.store.modify(99, Changes(priority=5))


async def test_changes_may_take_longer_than_other_statements(desk, address, owner):
    hasty = await Store.open(replace(address, command_timeout_s=1), name="test")
    ids = await desk.add(2)
    async with slowed(owner, "UPDATE", f"NEW.id = {ids[0]}", by_s=2):
        assert await hasty.kill(ids) == dict.fromkeys(ids, False)
        assert await hasty.retry(ids) == ids
    async with slowed(owner, "DELETE", f"OLD.id = {ids[0]}", by_s=2):
        assert await hasty.remove(ids) == ids
    await hasty.close()


async def test_a_selection_may_take_longer_than_other_statements(desk, address, monkeypatch):
    hasty = await Store.open(replace(address, command_timeout_s=1), name="test")
    [task] = await desk.add()
    slow = f"SELECT q.* FROM pg_sleep(2), ({queries()['select_task_ids']}) q"
    monkeypatch.setitem(queries(), "select_task_ids", slow)
    assert await hasty.task_states(Selector()) == {task: "PREPROCESSED"}
    await hasty.close()


async def test_what_was_committed_has_not_failed_when_only_the_ring_is_lost(desk, monkeypatch):
    monkeypatch.setitem(queries(), "ring", "SELECT pg_terminate_backend(pg_backend_pid())")
    (task,) = await desk.add()
    await desk.store.modify(task, Changes(priority=5))
    assert await desk.store.kill([task]) == {task: False}
    assert await desk.store.retry([task]) == [task]
    assert await desk.tell(task) == ("PREPROCESSED", 0, False)


async def test_what_tasks_need_of_a_node_is_on_record_once(desk):
    needs = [
        {},
        {"memory_mb": 7},
        {"node_packing_count": 3, "threads_per_rank": 2},
        {"gpus_per_rank": 1},
    ]
    before = await desk.sql("SELECT count(*) FROM shape")
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            tasks = [NewTask(command=["true"], **each) for each in needs]
            group.create_task(desk.store.add(tasks))
    after = await desk.sql("SELECT count(*) FROM shape")
    assert after - before <= 3
    await desk.add(threads_per_core=1)
    assert await desk.sql("SELECT count(DISTINCT shape_id) FROM task") == 5
    assert await desk.sql("SELECT shape_id FROM task WHERE id = 1") == 1
    spec = (await desk.detail(3)).spec
    assert (spec["threads_per_rank"], spec["memory_mb"], spec["gpus_per_rank"]) == (2, None, 0)
    assert (await desk.task(3)).node_packing_count == 3


@pytest.mark.parametrize(
    ("of_app", "of_task", "resolved"),
    [(None, None, "file"), (None, "none", "none"), ("tail", None, "tail"), ("tail", "file", "file")],
)  # fmt: skip
async def test_the_output_of_a_task_is_its_own_or_its_apps_or_a_file(
    desk, of_app, of_task, resolved
):
    app = None
    if of_app is not None:
        app = "a"
        await desk.store.add_app(NewApp(name=app, command="true"))
        found = await desk.store.add_app(
            NewApp(name=app, command="true", output=Output(of_app)), replace=True
        )
        assert (await desk.store.apps())[0] == found
    command = None if app else ["true"]
    output = None if of_task is None else Output(of_task)
    [task] = await desk.store.add([NewTask(app=app, command=command, output=output)])
    assert (await desk.task(task)).output is Output(resolved)
    [claim] = await desk.claim(await desk.register())
    assert claim.output is Output(resolved)


async def test_work_directories_may_be_flat(desk):
    [task] = await desk.store.add([NewTask(command=["true"])], layout="flat")
    assert (await desk.task(task)).workdir == f"data/true_{task}"


async def test_the_largest_node_of_late_is_known(desk, psql):
    assert await desk.store.most_gpus() is None
    await desk.register()
    assert await desk.store.most_gpus() is None
    await desk.register(node_cores=64, node_gpus=2)
    other = await desk.register(node_cores=64)
    assert await desk.store.most_gpus() == 2
    await other.set_resources(8, 4)
    assert await desk.store.most_gpus() == 4
    await other.close("done")
    assert await desk.store.most_gpus() == 4
    await psql.execute("UPDATE launcher SET ended_at = now() - interval '31 days' WHERE id = 3")
    assert await desk.store.most_gpus() == 2


# ---------------------------------------------------------------------------- plain SQL


@pytest.fixture
async def kills(address):
    """The rings of the kill channel."""
    listener = await connect(address, name="test listener")
    rings = []
    await listener.add_listener("ensemble_kill", lambda *_: rings.append(1))
    yield rings
    listener.terminate()


async def test_an_illegal_move_is_refused_with_its_story(desk, psql):
    task = await desk.add_one()
    with pytest.raises(asyncpg.PostgresError) as caught:
        await psql.execute("UPDATE task SET state = 'READY'")
    assert str(caught.value) == f"task {task} is PREPROCESSED and cannot become READY"
    assert caught.value.sqlstate == "EN002"


async def test_one_illegal_row_refuses_the_whole_statement(desk, psql):
    tasks = await desk.add(3)
    await desk.store.kill(tasks[1:2])
    with pytest.raises(asyncpg.PostgresError, match=f"task {tasks[1]} is USER_KILLED"):
        await psql.execute("UPDATE task SET state = 'RUN_ERROR'")
    assert list((await desk.states()).values()) == ["PREPROCESSED", "USER_KILLED", "PREPROCESSED"]


async def test_a_kill_in_psql_rings_writes_its_author_and_fails_the_children(
    desk, psql, kills, eventually
):
    lease = await desk.register()
    task = await desk.add_one()
    child = await desk.add_one(parents=[task])
    await desk.begin(lease)
    await psql.execute("UPDATE task SET state = 'USER_KILLED', reason = 'x' WHERE id = $1", task)
    await eventually(lambda: kills)
    event = (await desk.detail(task)).events[-1]
    assert (event.to_state, event.lease_id, event.attempt) == ("USER_KILLED", lease.id, 1)
    assert (event.actor, event.reason) == ("ensemble_user", "x")
    assert (await desk.task(child)).state == "FAILED"


async def test_only_the_kill_of_a_held_task_rings(desk, psql, kills, eventually):
    lease = await desk.register()
    held = await desk.add_one()
    await desk.begin(lease)
    free = await desk.add_one()
    await psql.execute("UPDATE task SET state = 'USER_KILLED' WHERE id = $1", free)
    await psql.execute("UPDATE task SET priority = 1 WHERE id = $1", held)
    await psql.execute("NOTIFY ensemble_kill, 'fence'")
    await eventually(lambda: kills)
    assert len(kills) == 1


async def test_new_rows_cannot_be_born_running(desk, psql):
    await desk.add_one()
    for state in ("RUNNING", "JOB_FINISHED", "RESTART_READY"):
        row = (1, state, 7 if state == "RUNNING" else None)
        with pytest.raises(asyncpg.PostgresError, match=f"a new task cannot be {state}"):
            await psql.execute(
                "INSERT INTO task (workflow_id, state, lease_id) VALUES ($1, $2, $3)", *row
            )
        with pytest.raises(asyncpg.PostgresError, match=f"a new task cannot be {state}"):
            await psql.copy_records_to_table(
                "task", records=[row], columns=("workflow_id", "state", "lease_id")
            )
    with pytest.raises(asyncpg.CheckViolationError):
        await psql.execute("UPDATE task SET state = 'SLEEPING'")


async def test_what_is_killed_twice_is_killed_once(desk):
    task = await desk.add_one()
    assert await desk.store.kill([task, 99]) == {task: False}
    assert await desk.store.kill([task]) == {}


# ---------------------------------------------------------------------------- rights


@pytest.mark.parametrize("role", ["ensemble_user", "ensemble_task"])
async def test_users_cannot_write_the_history_or_the_rules(site, desk, role):
    await desk.add_one()
    connection = await connect(
        site.address(TASK) if role == "ensemble_task" else site.address(), name="test rights"
    )
    try:
        for table in ("event", "move", "schema_version", "schema_script"):
            with pytest.raises(REFUSED):
                await connection.execute(f"DELETE FROM {table}")
        with pytest.raises(REFUSED):
            await connection.execute("UPDATE event SET actor = 'somebody'")
        with pytest.raises(REFUSED):
            await connection.execute("TRUNCATE task")
        with pytest.raises(REFUSED):
            await connection.execute("ALTER TABLE task DISABLE TRIGGER task_moved")
        with pytest.raises(REFUSED):
            await connection.execute("SET session_replication_role = replica")
        with pytest.raises(REFUSED):
            await connection.execute("CREATE TABLE ensemble.mine (x int)")
        await connection.execute("UPDATE task SET state = 'USER_KILLED'")
        assert await connection.fetchval("SELECT max(actor) FROM event WHERE id > 1") == role
    finally:
        connection.terminate()


async def test_nobody_connects_as_the_superuser(site, address, eventually):
    before = open_sockets()
    with pytest.raises(StoreUnavailableError):
        await connect(replace(site.address(), user="postgres"), name="test")
    # asyncpg leaves the refused connection to the loop, which needs a moment to close it.
    await eventually(lambda: open_sockets() <= before)


def open_sockets():
    links = Path("/proc/self/fd").iterdir()
    return {link.name for link in links if link.is_socket()}


async def test_tasks_cannot_use_up_the_launchers_connections(site, psql):
    limits = await psql.fetch(
        "SELECT rolname, rolconnlimit FROM pg_roles WHERE rolname ~ 'ensemble'"
    )
    limit = dict(map(tuple, limits))["ensemble_task"]
    assert 0 < limit < int(await psql.fetchval("SHOW max_connections")) / 2


# ---------------------------------------------------------------------------- invariants

PLANTS = {
    "check_orphans": "UPDATE task SET lease_id = 999 WHERE id = 1",
    "check_shapes": "UPDATE task SET shape_id = 999999 WHERE id = 4",
    "check_open_attempts": "UPDATE attempt SET ended_at = NULL, outcome = NULL WHERE task_id = 2",
    "check_successes": "UPDATE attempt SET outcome = 'done' WHERE task_id = 3",
    "check_overlaps": "INSERT INTO attempt (task_id, attempt, lease_id, claimed_at) "
    "SELECT task_id, 2, lease_id, ended_at - interval '1 s' FROM attempt WHERE task_id = 2",
    "check_counters": "DELETE FROM task_parent",
    "check_histories": "UPDATE task SET state = 'READY' WHERE id = 4",
    "check_stuck": "UPDATE task SET state = 'FAILED' WHERE id = 4",
}


PLANTS |= {
    "check_specs": "DELETE FROM task_spec WHERE task_id = 4",
    "check_attempts": "DELETE FROM attempt WHERE task_id = 3",
    "check_attempts: counts": "UPDATE task SET losses = 2 WHERE id = 3",
    "check_orphans: closed": "UPDATE lease SET state = 'EXPIRED', closed_at = now() - interval '1 h'",
    "check_stuck: at rest": "UPDATE task SET state = 'RUN_ERROR' WHERE id = 4",
    "check_histories: none": "DELETE FROM event WHERE task_id = 3",
}


@pytest.mark.parametrize("check", [*CHECKS, *(name for name in PLANTS if ": " in name)])
async def test_each_check_finds_its_fault(store, owner, check):
    desk = Desk(store)
    lease = await desk.register()
    _, done, failed = await desk.add(3)
    for claim in (await desk.begin(lease, 3))[1:]:
        await desk.end(lease, claim, Outcome.DONE if claim.id == done else Outcome.ERROR)
    parent = await desk.add_one()
    await desk.add_one(parents=[parent])
    assert (done, failed, parent) == (2, 3, 4)
    assert await store.check() == []
    async with owner.transaction():
        await owner.execute("ALTER TABLE task DISABLE TRIGGER USER")
        await owner.execute(PLANTS[check])
        await owner.execute("ALTER TABLE task ENABLE TRIGGER USER")
    assert check.partition(":")[0] in {problem.check for problem in await store.check()}


@pytest.mark.parametrize("seed", range(2))
async def test_a_random_life_breaks_no_invariant(desk, seed):
    rng = random.Random(seed)
    reaping = Reaping(desk.store.pool)
    leases = [await desk.register() for _ in range(2)]
    held = []
    for _ in range(60):
        ids = list(await desk.states())
        some = rng.sample(ids, min(len(ids), 3))
        match rng.randrange(9):
            case 0 | 1:
                parents = rng.sample(ids, min(len(ids), rng.randrange(3)))
                await desk.add(3, parents=parents, max_retries=1, max_losses=1)
            case 2 | 3:
                lease = rng.choice(leases)
                held += [(lease, claim) for claim in await desk.begin(lease, rng.randrange(1, 5))]
            case 4 | 5 if held:
                lease, claim = held.pop(rng.randrange(len(held)))
                outcome = rng.choice([o for o in Outcome if o is not Outcome.KILLED])
                await desk.end(lease, claim, outcome)
            case 6:
                await desk.store.kill(some)
            case 7:
                await desk.store.retry(some)
                await desk.store.remove(rng.sample(ids, min(len(ids), 2)))
            case 8:
                lease = leases.pop(0)
                await rng.choice([lease.drain, lease.close])("its time is over")
                await reaping.bury(lease.id, state="EXPIRED", evidence="gone")
                await reaping.release()
                leases.append(await desk.register())
        assert await desk.store.check() == []


# ---------------------------------------------------------------------------- errors


async def test_a_server_that_is_down_is_named_and_its_password_never(address):
    secret = "s3cr3t@word"
    plain = replace(address, port=1, password=secret)
    host, user = address.host, address.user
    dsns = [
        f"postgresql://{user}:{secret}@{host}:1/ensemble",
        f"postgresql://{user}@{host}:1/ensemble?password={secret}",
    ]
    for where in [
        plain,
        *(replace(plain, dsn=d, host=None, port=None, password=None) for d in dsns),
    ]:
        with pytest.raises(StoreUnavailableError, match="cannot reach the database at") as caught:
            await Store.open(where)
        assert "s3cr3t" not in str(caught.value)
        assert "word" not in str(caught.value).replace("password=", "")
        assert host in str(caught.value)


async def test_a_value_the_database_cannot_hold_is_the_users_error_not_a_lost_connection(desk):
    with pytest.raises(UsageError, match="cannot take a value"):
        await desk.store.tasks(Selector(ids=(2**70,)), limit=1)
    with pytest.raises(UsageError, match="cannot take a value"):
        await desk.store.tasks(Selector(name="\0"), limit=1)


async def test_a_refusal_of_the_trigger_is_ours(desk):
    lease = await desk.register()
    task = await desk.add_one()
    await desk.claim(lease)
    with pytest.raises(IllegalMoveError):
        await desk.store.modify(task, Changes(priority=1))
