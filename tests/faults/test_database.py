"""A database that dies, refuses, is locked or changes its mind, while launchers run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from asyncpg.transaction import Transaction

from ensemble.core.leases import Reaping
from ensemble.core.model import Outcome
from ensemble.core.states import State
from ensemble.drivers import proctree
from ensemble.service import spool
from tests.faults import witness
from tests.faults.witness import witnessed
from tests.integration.launching import WHEEL, Ensemble
from tests.integration.storing import Desk, slowed

pytestmark = WHEEL

#: Until the test says so; an attempt after the first ends at once.
WAIT = 'test $ENSEMBLE_ATTEMPT != 1 || until [ -e "$ENSEMBLE_SITE/log/go" ]; do sleep 0.02; done'
OURS = "FROM pg_stat_activity WHERE application_name IN ('ensemble launcher', 'ensemble listener')"


@pytest.fixture(autouse=True)
def _end_all(ens: Ensemble):
    """Whatever happens: no launcher is left, and the next test's tasks wait for its own word."""
    yield
    for launched in ens.launchers:
        launched.clear()
    (ens.site.path / "log" / "go").unlink(missing_ok=True)
    shutil.rmtree(spool.folder(ens.site.path), ignore_errors=True)


def go(ens: Ensemble) -> None:
    (ens.site.path / "log" / "go").touch()


def postmaster(ens: Ensemble) -> int:
    """Return the process id of the database's first process."""
    return int((ens.site.path / "db" / "pgdata" / "postmaster.pid").read_text().splitlines()[0])


async def stop(ens: Ensemble, how: str) -> None:
    """Stop the database; or kill it, and leave everything as it is."""
    cluster = ens.site.cluster
    assert cluster is not None
    if how != "kill":
        await cluster.stop(how)
        return
    pid = postmaster(ens)
    os.kill(pid, signal.SIGKILL)


async def start(ens: Ensemble) -> None:
    assert ens.site.cluster is not None
    await ens.site.cluster.start()


# ---------------------------------------------------------------------------- it dies


@pytest.mark.parametrize(
    ("how", "mode"), [("kill", "mpi"), ("kill", "serial"), ("immediate", "serial")]
)
async def test_a_database_that_dies_under_load_loses_nothing(
    ens: Ensemble, how: str, mode: str
) -> None:
    long, *_ = await ens.store.add(
        [witnessed(WAIT, priority=1)]
        + [witnessed(f"sleep 0.{n % 4}; exit {n % 2}", max_retries=0) for n in range(30)]
    )
    launched = ens.launch("--idle-timeout=1", nodes=4, mode=mode, LAUNCHER_RECONCILE_S=1)
    await ens.eventually(lambda: has_ended(ens, 5), within_s=60)
    await stop(ens, how)
    try:
        # What was claimed ends while nobody can be told.
        await ens.eventually(lambda: set(ens.processes()) == set(ens.processes(long)))
        assert launched.guard.poll() is None, launched.log
        assert ens.processes(long)
        go(ens)
    finally:
        await start(ens)
    assert await ens.leave(launched) == 0, launched.log
    assert await ens.states() == [State.JOB_FINISHED, *[State.JOB_FINISHED, State.FAILED] * 15]
    assert len(await ens.starts()) == 31, "a task ran twice"
    await witness.check(ens)


async def has_ended(ens: Ensemble, count: int) -> bool:
    return (await ens.states()).count(State.JOB_FINISHED) >= count


@pytest.mark.parametrize(("how", "mode"), [("kill", "mpi"), ("immediate", "serial")])
async def test_a_database_that_stays_away_ends_what_runs_and_keeps_what_ended(
    ens: Ensemble, how: str, mode: str
) -> None:
    short, long = await ens.store.add([witnessed("sleep 0.5"), witnessed(WAIT)])
    launched = ens.launch("--persistent", mode=mode, LAUNCHER_LEASE_TTL_S=6)
    await ens.reach(State.RUNNING, long, within_s=60)
    await stop(ens, how)
    try:
        await ens.gone()
        assert "lease.not_trusted" in launched.log
        await ens.eventually(lambda: list((ens.site.path / "log" / "spool").glob("*")))
    finally:
        await start(ens)
    assert await ens.leave(launched) == 0, launched.log
    assert await ens.outcomes(short) == [Outcome.DONE]
    assert await ens.outcomes(long) == [Outcome.TIMEOUT]
    again = ens.launch("--idle-timeout=0", mode=mode)
    assert await ens.leave(again) == 0
    await witness.check(ens)


# ---------------------------------------------------------------------------- it is rude


@pytest.mark.parametrize(("how", "mode"), [("terminate", "mpi"), ("cancel", "serial")])
async def test_backends_that_are_ended_under_load_lose_and_repeat_nothing(
    ens: Ensemble, psql: asyncpg.Connection[Any], how: str, mode: str
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    await ens.store.add([witnessed(f"exit {n % 2}", max_retries=0) for n in range(200)])
    launched = ens.launch(
        "--persistent", nodes=4, mode=mode, LAUNCHER_RECONCILE_S=1, LAUNCHER_POLL_S=1
    )
    await ens.leased(launched)
    hits = 0
    while not {State.JOB_FINISHED, State.FAILED}.issuperset(await ens.states()):
        assert launched.guard.poll() is None, launched.log
        await asyncio.sleep(dice.uniform(0, 0.1 if hits < 200 else 1))
        hits += await psql.fetchval(
            f"SELECT count(pg_{how}_backend(pid)) {OURS} AND (state = 'active' OR random() < 0.1)"
        )
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0, launched.log
    print(f"{hits} statements and idle connections were ended: {launched.summary}")
    assert "Traceback" not in launched.log
    assert await ens.states() == [State.JOB_FINISHED, State.FAILED] * 100
    assert len(await ens.starts()) == 200, "a task ran twice"
    await witness.check(ens)


@contextlib.asynccontextmanager
async def full(owner: asyncpg.Connection[Any]) -> AsyncIterator[None]:
    """No further connection is allowed, and launchers lose theirs."""
    name = await owner.fetchval("SELECT current_database()")
    await owner.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
    try:
        yield
    finally:
        await owner.execute(f"ALTER DATABASE {name} CONNECTION LIMIT -1")


async def test_too_many_connections_are_waited_out_and_a_start_says_so(
    ens: Ensemble, owner: asyncpg.Connection[Any], psql: asyncpg.Connection[Any]
) -> None:
    first, second, _ = await ens.store.add(
        [witnessed(WAIT), witnessed(WAIT), witnessed(priority=-1)]
    )
    launched = ens.launch("--idle-timeout=0", LAUNCHER_HEARTBEAT_S=0.5)
    await ens.reach(State.RUNNING, first, second)
    async with full(owner):
        await psql.fetch(f"SELECT pg_terminate_backend(pid, 5000) {OURS}")
        late = ens.launch()
        assert await ens.leave(late) == 4
        (line,) = late.log.splitlines()
        assert "too many connections" in line
        go(ens)
        await ens.gone()
        await ens.eventually(lambda: len(launched.events("lease.not_renewed")) > 1)
        assert launched.guard.poll() is None
    assert await ens.leave(launched) == 0, launched.log
    assert len(await ens.store.launchers(only_live=False)) == 1
    assert len(await ens.starts()) == 3
    await witness.check(ens)


RIGHTS = {
    "to use the schema": "USAGE ON SCHEMA ensemble",
    "to change tasks": "UPDATE ON ensemble.task",
    "to change leases": "UPDATE ON ensemble.lease",
}


@contextlib.asynccontextmanager
async def revoked(owner: asyncpg.Connection[Any], right: str) -> AsyncIterator[None]:
    await owner.execute(f"REVOKE {RIGHTS[right]} FROM ensemble_user")
    try:
        yield
    finally:
        await owner.execute(f"GRANT {RIGHTS[right]} TO ensemble_user")


@pytest.mark.parametrize("right", ["to use the schema", "to change leases"])
async def test_a_user_without_rights_is_told_in_one_line(
    ens: Ensemble, owner: asyncpg.Connection[Any], right: str
) -> None:
    await ens.store.add([witnessed()])
    async with revoked(owner, right):
        launched = ens.launch("--idle-timeout=0")
        assert await ens.leave(launched) in (1, 4)
        assert len(launched.log.splitlines()) == 1
        assert "ensemble db migrate" in launched.log or "permission denied" in launched.log
    assert await ens.store.launchers(only_live=False) == []
    again = ens.launch("--idle-timeout=0")
    assert await ens.leave(again) == 0
    await witness.check(ens)


@pytest.mark.parametrize(
    ("right", "mode"),
    [
        ("to use the schema", "serial"),
        ("to change tasks", "mpi"),
    ],
)
async def test_rights_that_are_lost_for_a_while_cost_no_task(
    ens: Ensemble, owner: asyncpg.Connection[Any], right: str, mode: str
) -> None:
    await ens.store.add(
        [witnessed(WAIT), witnessed(WAIT), witnessed("exit 3", priority=-1, max_retries=0)]
    )
    launched = ens.launch(
        "--idle-timeout=0",
        mode=mode,
        LAUNCHER_HEARTBEAT_S=0.3,
        LAUNCHER_POLL_S=1,
        LAUNCHER_RECONCILE_S=1,
    )
    await ens.reach(State.RUNNING, 1, 2, within_s=60)
    async with revoked(owner, right):
        go(ens)
        await ens.gone()
        await ens.eventually(
            lambda: (
                launched.log.count("store.lost") > 3 or launched.log.count("lease.not_renewed") > 3
            )
        )
        assert launched.guard.poll() is None
    assert await ens.leave(launched) == 0, launched.log
    assert [await ens.outcomes(id) for id in (1, 2, 3)] == [
        [Outcome.DONE],
        [Outcome.DONE],
        [Outcome.ERROR],
    ]
    await witness.check(ens)


# ---------------------------------------------------------------------------- it is locked


async def hold(psql: asyncpg.Connection[Any], lock: str) -> Transaction:
    """Take a lock; again where its several parts met ours in another order, and lost."""
    while True:
        transaction = psql.transaction()
        await transaction.start()
        try:
            await psql.execute(lock)
        except asyncpg.DeadlockDetectedError:
            await transaction.rollback()
        else:
            return transaction


@pytest.mark.parametrize(
    ("lock", "mode"),
    [
        ("SELECT FROM lease FOR UPDATE", "mpi"),
        ("SELECT FROM task t JOIN attempt a ON a.task_id = t.id FOR UPDATE", "serial"),
        ("LOCK TABLE task, attempt, lease, launcher IN ACCESS EXCLUSIVE MODE", "mpi"),
    ],
)
async def test_somebodys_locks_only_delay(
    ens: Ensemble, psql: asyncpg.Connection[Any], lock: str, mode: str
) -> None:
    long, *_ = await ens.store.add(
        [witnessed(WAIT, priority=1)]
        + [witnessed(f"exit {n % 2}", max_retries=0) for n in range(60)]
    )
    launched = ens.launch(
        "--idle-timeout=1", nodes=4, mode=mode, LAUNCHER_HEARTBEAT_S=0.3, LAUNCHER_POLL_S=0.5
    )
    await ens.reach(State.RUNNING, long, within_s=60)
    await ens.eventually(lambda: has_ended(ens, 5), within_s=60)
    held = await hold(psql, lock)
    # What was claimed ends, and nobody can be told.
    await ens.eventually(lambda: set(ens.processes()) == set(ens.processes(long)))
    await held.rollback()
    go(ens)
    assert await ens.leave(launched) == 0, launched.log
    assert await ens.states() == [State.JOB_FINISHED, *[State.JOB_FINISHED, State.FAILED] * 30]
    assert len(await ens.starts()) == 61, "a task ran twice"
    await witness.check(ens)


async def test_a_deadlock_with_somebody_else_is_tried_again(
    ens: Ensemble, psql: asyncpg.Connection[Any]
) -> None:
    ids = await ens.store.add([witnessed(WAIT), witnessed(WAIT)])
    launched = ens.launch("--idle-timeout=0")
    await ens.reach(State.RUNNING)
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = await ens.store.pool.fetchval(deadlocks)
    waits = (
        f"SELECT count(*) > 0 {OURS} AND wait_event_type = 'Lock' AND query LIKE '%finish_tasks%'"
    )
    # Who has waited longer is the one whom the server ends: that may be us, on a loaded machine.
    with contextlib.suppress(asyncpg.DeadlockDetectedError):
        async with psql.transaction():
            await psql.execute("LOCK TABLE attempt IN ACCESS EXCLUSIVE MODE")
            go(ens)
            await ens.eventually(lambda: ens.store.pool.fetchval(waits))
            await psql.execute("SELECT FROM task FOR UPDATE")
    assert await ens.leave(launched) == 0, launched.log

    async def was_counted() -> bool:
        return await ens.store.pool.fetchval(deadlocks) > before

    await ens.eventually(was_counted)
    assert [await ens.outcomes(task_id) for task_id in ids] == [[Outcome.DONE]] * 2
    await witness.check(ens)


# ---------------------------------------------------------------------------- slow, or standing still


@pytest.fixture
async def slow(ens: Ensemble, owner: asyncpg.Connection[Any]) -> AsyncIterator[int]:
    """A task whose end takes eight seconds in the database, as that of one with very many children does."""
    (task_id,) = await ens.store.add([witnessed()])
    when = f"NEW.id = {task_id} AND NEW.state = 'JOB_FINISHED' AND OLD.state <> NEW.state"
    async with slowed(owner, "UPDATE", when, by_s=8):
        yield task_id


@pytest.mark.parametrize("mode", ["mpi", "serial"])
async def test_an_end_that_takes_longer_than_any_statement_may_holds_up_no_other(
    ens: Ensemble, slow: int, mode: str
) -> None:
    others = await ens.store.add([witnessed(f"sleep 0.{number}") for number in range(8)])
    (child,) = await ens.store.add([witnessed(parents=[slow])])
    launched = ens.launch("--idle-timeout=1", mode=mode, STORE_COMMAND_TIMEOUT_S=1)
    await ens.reach(State.JOB_FINISHED, *others)
    assert (await ens.task(slow)).state is not State.JOB_FINISHED
    await ens.reach(State.JOB_FINISHED, slow, child)
    assert await ens.leave(launched) == 0, launched.log
    assert [await ens.outcomes(task.id) for task in await ens.tasks()] == [[Outcome.DONE]] * 10
    assert launched.events("report.slow")
    await witness.check(ens)


async def test_such_an_end_in_a_spool_holds_up_no_other_lease(ens: Ensemble, slow: int) -> None:
    lost = ens.launch("--persistent", STORE_COMMAND_TIMEOUT_S=1)
    await ens.eventually(lambda: lost.events("report.slow"))
    lost.signal(signal.SIGTERM)
    await ens.eventually(lambda: spool.find(spool.folder(ens.site.path)))
    lost.kill()
    other = ens.launch("--persistent", STORE_COMMAND_TIMEOUT_S=1, LAUNCHER_LEASE_TTL_S=8)
    await ens.reach(State.JOB_FINISHED, slow)
    other.signal(signal.SIGTERM)
    assert await ens.leave(other) == 0, other.log
    assert await ens.outcomes(slow) == [Outcome.DONE]
    await witness.check(ens)


async def test_a_lost_task_that_takes_long_to_give_back_keeps_no_launcher_from_its_work(
    ens: Ensemble, owner: asyncpg.Connection[Any]
) -> None:
    desk = Desk(ens.store)
    lease = await desk.register()
    lost = await desk.add_one(max_losses=0)
    await desk.begin(lease)
    await Reaping(ens.store.pool).bury(lease.id, state="EXPIRED", evidence="gone")
    when = f"NEW.id = {lost} AND OLD.lease_id IS NOT NULL AND NEW.lease_id IS NULL"
    short = {"STORE_COMMAND_TIMEOUT_S": 1, "LAUNCHER_LEASE_TTL_S": 8}
    async with slowed(owner, "UPDATE", when, by_s=600):
        launched = ens.launch("--persistent", **short)
        await ens.eventually(lambda: launched.events("release.slow"))
        assert launched.events("tasks.not_released"), "it was not tried before the launcher began"
        (other,) = await ens.store.add([witnessed()])
        await ens.reach(State.JOB_FINISHED, other)
        launched.signal(signal.SIGTERM)
        assert await ens.leave(launched) == 0, launched.log
        assert (await desk.task(lost)).state is State.RUNNING
    async with slowed(owner, "UPDATE", when, by_s=3):
        again = ens.launch("--persistent", **short)
        await ens.reach(State.FAILED, lost)
        again.signal(signal.SIGTERM)
        assert await ens.leave(again) == 0, again.log
    assert await ens.outcomes(lost) == [Outcome.LOST]


@pytest.mark.parametrize("mode", ["mpi", "serial"])
async def test_a_database_that_stands_still_costs_no_result(ens: Ensemble, mode: str) -> None:
    done = await ens.store.add([witnessed(WAIT) for _ in range(3)])
    launched = ens.launch("--persistent", mode=mode, nodes=3, LAUNCHER_LEASE_TTL_S=20)
    await ens.reach(State.RUNNING, *done)
    pid = postmaster(ens)
    server = [pid, *proctree.list_children(pid)]
    for each in server:
        os.kill(each, signal.SIGSTOP)
    try:
        go(ens)
        # A claim is on its way that nobody answers: that is no reason to stay until the guard's deadline.
        await ens.eventually(lambda: "reports.not_written" in launched.log)
        assert list(spool.find(spool.folder(ens.site.path))) == [1]
    finally:
        for each in server:
            os.kill(each, signal.SIGCONT)
    assert await ens.leave(launched) == 1, launched.log
    await ens.reach(State.JOB_FINISHED)
    for task_id in done:
        assert await ens.outcomes(task_id) == [Outcome.DONE]
    await witness.check(ens)


async def test_a_locked_task_in_one_spool_does_not_keep_other_leases_alive(ens: Ensemble) -> None:
    (first,) = await ens.store.add([witnessed(WAIT)])
    cluster = ens.site.cluster
    assert cluster is not None
    spooled = ens.launch("--persistent", LAUNCHER_LEASE_TTL_S=600)
    await ens.reach(State.RUNNING, first)
    await cluster.stop("fast")
    go(ens)
    await ens.eventually(lambda: "running=0" in spooled.log)
    spooled.signal(signal.SIGTERM)
    await ens.eventually(lambda: spool.find(spool.folder(ens.site.path)))
    spooled.kill()
    await cluster.start()
    (second,) = await ens.store.add([witnessed("test $ENSEMBLE_ATTEMPT != 1 || sleep 600")])
    async with ens.store.pool.acquire() as psql, psql.transaction():
        await psql.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", first)
        lost = ens.launch("--persistent", LAUNCHER_LEASE_TTL_S=4)
        await ens.reach(State.RUNNING, second)
        # As if it were on another host: only its silence tells.
        await ens.store.pool.execute("UPDATE launcher SET host = 'elsewhere' WHERE id = 2")
        lost.kill()
        other = ens.launch("--persistent", LAUNCHER_LEASE_TTL_S=4)
        await ens.reach(State.JOB_FINISHED, second)
        assert (await ens.task(first)).state is State.RUNNING
    await ens.reach(State.JOB_FINISHED, first)
    assert await ens.outcomes(first) == [Outcome.DONE]
    other.signal(signal.SIGTERM)
    assert await ens.leave(other) == 0, other.log
    await witness.check(ens)
