"""A network that swallows, delays or cuts what a launcher and its database say to each other."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ensemble.core.model import Cause, Outcome
from ensemble.core.states import State
from ensemble.service import spool
from ensemble.site import Site
from tests.faults import witness
from tests.faults.proxy import Proxy, proxied_store
from tests.faults.witness import witnessed
from tests.integration.launching import WHEEL, Ensemble, Launched

pytestmark = WHEEL
BOTH_MODES = pytest.mark.parametrize("mode", ["mpi", "serial"])

#: What is swallowed is given up soon.
QUICK = {"STORE_COMMAND_TIMEOUT_S": 1, "STORE_CONNECT_TIMEOUT_S": 1.5, "LAUNCHER_POLL_S": 1}
#: Until the test says so; an attempt after the first ends at once.
WAIT = 'test $ENSEMBLE_ATTEMPT != 1 || until [ -e "$ENSEMBLE_SITE/log/go" ]; do sleep 0.02; done'


class Line:
    """A launcher's way to the database, and what its settings are for it."""

    def __init__(self, ens: Ensemble, proxy: Proxy, variables: dict[str, str]) -> None:
        self.ens = ens
        self.proxy = proxy
        self.variables = variables

    def launch(self, *flags: str, **options: object) -> Launched:
        return self.ens.launch(*flags, variables=self.variables, **options)  # type: ignore[arg-type]

    def swallow(self, what: str) -> None:
        self.proxy.swallows_requests = what != "replies"
        self.proxy.swallows_replies = what != "requests"

    def go(self) -> None:
        (self.ens.site.path / "log" / "go").touch()


@pytest.fixture
async def line(ens: Ensemble, tmp_path: Path) -> AsyncIterator[Line]:
    async with proxied_store(ens.site, tmp_path) as (proxy, variables):
        yield Line(ens, proxy, variables)
        for launched in ens.launchers:
            launched.clear()
        (ens.site.path / "log" / "go").unlink(missing_ok=True)
        folder = spool.folder(ens.site.path)
        if folder.is_dir():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("what", "mode"),
    [("both", "serial"), ("requests", "mpi"), ("replies", "mpi")],
)
async def test_nothing_is_lost_in_a_hole_shorter_than_the_lease_is_trusted(
    ens: Ensemble, line: Line, what: str, mode: str
) -> None:
    long, *_ = await ens.store.add(
        [witnessed(WAIT, priority=1)] + [witnessed("sleep 0.2") for _ in range(8)]
    )
    launched = line.launch("--idle-timeout=0", mode=mode, **QUICK)
    await ens.reach(State.RUNNING, long, within_s=60)
    line.swallow(what)
    # What was claimed ends, and nobody can be told; the others have to wait.
    await ens.eventually(lambda: "store.lost" in launched.log)
    await ens.eventually(lambda: set(ens.processes()) == set(ens.processes(long)))
    assert launched.guard.poll() is None
    line.go()
    await ens.gone()
    line.proxy.heal()
    assert await ens.leave(launched) == 0, launched.log
    assert set(await ens.states()) == {State.JOB_FINISHED}
    assert len(await ens.starts()) == 9, "a task ran twice"
    await witness.check(ens)


@pytest.mark.parametrize(
    ("what", "mode", "has_spool"),
    [
        ("both", "serial", True),
        ("requests", "serial", False),
        ("replies", "mpi", False),
    ],
)
async def test_a_hole_longer_than_the_lease_ends_its_tasks_before_others_take_them(
    ens: Ensemble, line: Line, what: str, mode: str, has_spool: bool
) -> None:
    folder = spool.folder(ens.site.path)
    if not has_spool:
        shutil.rmtree(folder, ignore_errors=True)
        folder.touch()  # a file in its place: only silence can end the lease
    ids = await ens.store.add([witnessed(WAIT) for _ in range(2)])
    cut_off = line.launch("--persistent", mode=mode, LAUNCHER_LEASE_TTL_S=10, **QUICK)
    await ens.reach(State.RUNNING, *ids, within_s=60)
    line.swallow(what)
    other = ens.launch("--persistent", LAUNCHER_LEASE_TTL_S=8)
    await ens.gone()
    over = await ens.store.pool.fetchval(
        "SELECT expires_at < clock_timestamp() FROM lease WHERE id = 1"
    )
    assert not over, "its tasks outlived the lease"
    await ens.reach(State.JOB_FINISHED, within_s=30)
    assert cut_off.guard.poll() is None
    line.proxy.heal()
    assert await ens.leave(cut_off) == 0, cut_off.log
    other.signal(signal.SIGTERM)
    assert await ens.leave(other) == 0, other.log
    assert "Traceback" not in cut_off.log + other.log
    first = Outcome.TIMEOUT if has_spool else Outcome.LOST
    assert [await ens.outcomes(task_id) for task_id in ids] == [[first, Outcome.DONE]] * 2
    if not has_spool:
        folder.unlink()
    await witness.check(ens)


# ---------------------------------------------------------------------------- lost answers


#: Whether a launcher's statement waits for a lock; whether it is still being executed.
WAITS = """
    SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'ensemble launcher'
       AND state = 'active' AND wait_event_type = 'Lock' AND strpos(query, $1) > 0"""
RUNS = WAITS.replace("AND wait_event_type = 'Lock'", "")
LEASE = "SELECT FROM lease FOR UPDATE"


class Cut:
    """Loses the answer to a statement of the first launcher."""

    def __init__(
        self, ens: Ensemble, line: Line, psql: asyncpg.Connection[Any], *, is_late: bool
    ) -> None:
        self.ens = ens
        self.line = line
        self.psql = psql
        self.is_late = is_late

    @contextlib.asynccontextmanager
    async def answer(self, statement: str, *, lock: str = LEASE) -> AsyncIterator[None]:
        """Hold a lock; what is done in the body makes the launcher send the statement, which waits for it.

        Then the statement is applied, and its answer lost. If late, the launcher knows that before.
        """
        transaction = self.psql.transaction()
        await transaction.start()
        try:
            await self.psql.execute(lock)
            yield
            await self.ens.eventually(lambda: self._ask(WAITS, statement))
            before = len(self.ens.launchers[0].log)
            if self.is_late:
                self.line.proxy.reset()
                launched = self.ens.launchers[0]
                await self.ens.eventually(lambda: "the database" in launched.log[before:])
            else:
                self.line.proxy.swallows_replies = True
        finally:
            await transaction.rollback()
        await self.ens.eventually(lambda: self._is_over(statement))
        self.line.proxy.heal()
        self.line.proxy.reset()

    async def _is_over(self, statement: str) -> bool:
        return self.is_late or not await self._ask(RUNS, statement)

    async def _ask(self, query: str, statement: str) -> bool:
        # Not in the transaction: there the view never changes.
        found: bool = await self.ens.store.pool.fetchval(query, statement)
        return found


LOST_AND_LATE = pytest.mark.parametrize("cut", ["lost", "late"], indirect=True)
LOST_MPI_AND_LATE_SERIAL = pytest.mark.parametrize(
    ("cut", "mode"), [("lost", "mpi"), ("late", "serial")], indirect=["cut"]
)


@pytest.fixture
def cut(
    request: pytest.FixtureRequest, ens: Ensemble, line: Line, psql: asyncpg.Connection[Any]
) -> Cut:
    return Cut(ens, line, psql, is_late=request.param == "late")


@LOST_MPI_AND_LATE_SERIAL
async def test_tasks_that_were_claimed_without_our_knowledge_are_found_and_run_once(
    ens: Ensemble, line: Line, cut: Cut, mode: str
) -> None:
    launched = line.launch("--persistent", mode=mode, LAUNCHER_RECONCILE_S=1)
    await ens.leased(launched)
    if mode == "serial":
        await ens.joined(launched)
    async with cut.answer("FROM claim_"):
        ids = await ens.store.add([witnessed() for _ in range(4)])
    await ens.reach(State.JOB_FINISHED)
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0, launched.log
    outcomes = [await ens.outcomes(task_id) for task_id in ids]
    assert [Outcome.GIVEN_BACK, Outcome.DONE] in outcomes, "no claim was lost"
    assert {each[-1] for each in outcomes} == {Outcome.DONE}
    assert len(await ens.starts()) == len(ids)
    await witness.check(ens)


@LOST_AND_LATE
async def test_a_launcher_does_not_leave_before_it_knows_what_it_holds(
    ens: Ensemble, line: Line, cut: Cut
) -> None:
    (first,) = await ens.store.add([witnessed(WAIT)])
    launched = line.launch("--idle-timeout=0", nodes=5)
    await ens.reach(State.RUNNING, first)
    line.go()
    async with cut.answer("FROM claim_"):
        await ens.store.add([witnessed() for _ in range(4)])
    assert await ens.leave(launched) == 0, launched.log
    await witness.check(ens)


@LOST_MPI_AND_LATE_SERIAL
async def test_an_end_whose_answer_was_lost_is_reported_twice_and_counts_once(
    ens: Ensemble, line: Line, cut: Cut, mode: str
) -> None:
    done, failed = await ens.store.add(
        [witnessed(WAIT), witnessed(WAIT + "; exit 3", max_retries=1)]
    )
    (child,) = await ens.store.add([witnessed(parents=[done])])
    launched = line.launch("--idle-timeout=0", mode=mode)
    await ens.reach(State.RUNNING, done, failed, within_s=60)
    async with cut.answer("FROM finish_tasks"):
        line.go()
    assert await ens.leave(launched) == 0, launched.log
    assert [await ens.outcomes(id) for id in (done, failed, child)] == [
        [Outcome.DONE], [Outcome.ERROR] * 2, [Outcome.DONE],
    ]  # fmt: skip
    assert (await ens.task(failed)).failures == 2
    await witness.check(ens)


@LOST_AND_LATE
async def test_a_start_or_a_heartbeat_whose_answer_was_lost_changes_nothing(
    ens: Ensemble, line: Line, cut: Cut
) -> None:
    ids = await ens.store.add([witnessed(WAIT) for _ in range(2)])
    launched = line.launch("--idle-timeout=0", LAUNCHER_LAUNCHES_PER_S=1, LAUNCHER_HEARTBEAT_S=0.2)
    await ens.eventually(lambda: "launcher.started" in launched.log)
    await ens.eventually(lambda: ens.processes())
    async with cut.answer("FROM start_tasks"):
        pass  # the second one's
    await ens.reach(State.RUNNING)
    async with cut.answer("UPDATE lease"):
        pass
    line.go()
    assert await ens.leave(launched) == 0, launched.log
    assert [await ens.outcomes(id) for id in ids] == [[Outcome.DONE]] * 2
    await witness.check(ens)


@LOST_MPI_AND_LATE_SERIAL
async def test_a_drain_whose_answers_are_lost_frees_each_task_once(
    ens: Ensemble, line: Line, cut: Cut, mode: str
) -> None:
    ids = await ens.store.add([witnessed(WAIT) for _ in range(4)])
    # One launch in a minute: the second task is claimed, and given back.
    launched = line.launch("--persistent", mode=mode, LAUNCHER_LAUNCHES_PER_S=0.016)
    await ens.reach(State.RUNNING, ids[0], within_s=60)
    async with cut.answer("drain_tasks"):
        launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0, launched.log
    outcomes = [await ens.outcomes(task_id) for task_id in ids]
    assert outcomes.count([Outcome.TIMEOUT]) == len(await ens.starts())
    assert (await ens.task(ids[0])).cause is Cause.ALLOCATION_ENDED
    line.go()
    again = ens.launch("--idle-timeout=0", mode=mode)
    assert await ens.leave(again) == 0
    await witness.check(ens)


@LOST_AND_LATE
async def test_a_lease_that_nobody_knows_of_is_reaped(ens: Ensemble, line: Line, cut: Cut) -> None:
    await ens.store.add([witnessed()])
    lock = "SELECT pg_advisory_xact_lock(hashtext('ensemble.register_launcher'))"
    async with cut.answer("FROM register_launcher", lock=lock):
        launched = line.launch()
    assert await ens.leave(launched) == 4
    assert len(launched.log.splitlines()) == 1
    assert [each.ended_at for each in await ens.store.launchers()] == [None]
    other = ens.launch("--idle-timeout=0")
    assert await ens.leave(other) == 0
    assert "its process is gone" in other.log
    await witness.check(ens)


# ---------------------------------------------------------------------------- resets and delays


@BOTH_MODES
async def test_resets_at_random_moments_lose_and_repeat_nothing(
    ens: Ensemble, line: Line, mode: str
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    await ens.store.add([witnessed(f"exit {n % 2}", max_retries=0) for n in range(200)])
    flags = ["--persistent", "--slots-per-node=4"][: 1 + (mode == "serial")]
    launched = line.launch(*flags, mode=mode, nodes=4, LAUNCHER_RECONCILE_S=1, LAUNCHER_POLL_S=1)
    await ens.leased(launched)
    resets = 0
    while not {State.JOB_FINISHED, State.FAILED}.issuperset(await ens.states()):
        assert launched.guard.poll() is None, launched.log
        await asyncio.sleep(dice.uniform(0, 0.4 if resets < 40 else 2))
        resets += line.proxy.reset()
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0, launched.log
    print(f"{resets} connections were cut off: {launched.summary}")
    assert "Traceback" not in launched.log
    assert await ens.states() == [State.JOB_FINISHED, State.FAILED] * 100
    assert len(await ens.starts()) == 200, "a task ran twice"
    await witness.check(ens)


async def test_a_slow_network_only_slows(ens: Ensemble, line: Line) -> None:
    line.proxy.delay_s = 0.03
    ids = await ens.store.add([witnessed() for _ in range(8)])
    (child,) = await ens.store.add([witnessed(parents=ids)])
    launched = line.launch("--idle-timeout=0", nodes=4)
    await ens.reach(State.JOB_FINISHED, within_s=30)
    assert await ens.leave(launched) == 0, launched.log
    assert [await ens.outcomes(id) for id in [*ids, child]] == [[Outcome.DONE]] * 9
    assert "lost" not in launched.log
    await witness.check(ens)


# ---------------------------------------------------------------------------- kills that nobody hears of


async def test_a_kill_during_a_hole_ends_its_task_when_the_network_is_back(
    ens: Ensemble, line: Line
) -> None:
    victim, bystander = await ens.store.add([witnessed(WAIT), witnessed(WAIT)])
    launched = line.launch(**QUICK | {"LAUNCHER_POLL_S": 60, "LAUNCHER_HEARTBEAT_S": 0.3})
    await ens.reach(State.RUNNING, within_s=60)
    line.proxy.hole()
    await ens.store.kill([victim])
    await ens.eventually(lambda: "listener.lost" in launched.log)
    assert ens.processes(victim)
    line.proxy.heal()
    with contextlib.suppress(AssertionError):
        await ens.gone(victim, within_s=40)
    assert not ens.processes(victim), launched.log
    line.go()
    await ens.reach(State.JOB_FINISHED, bystander)
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0, launched.log
    assert [await ens.outcomes(id) for id in (victim, bystander)] == [
        [Outcome.KILLED],
        [Outcome.DONE],
    ]
    await witness.check(ens)


LISTENERS = """
    SELECT pid, client_port FROM pg_stat_activity
     WHERE application_name = 'ensemble listener' AND client_port = ANY ($1)"""


@pytest.mark.parametrize("how", ["terminated", "refused", "holed"])
async def test_a_kill_whose_ring_is_lost_arrives_all_the_same(
    ens: Ensemble, line: Line, psql: asyncpg.Connection[Any], how: str
) -> None:
    (task_id,) = await ens.store.add([witnessed(WAIT)])
    is_polled = how == "holed"
    launched = line.launch(
        LAUNCHER_POLL_S=1 if is_polled else 60, LAUNCHER_HEARTBEAT_S=60 if is_polled else 0.5
    )
    await ens.reach(State.RUNNING, task_id)
    (listener,) = await psql.fetch(LISTENERS, list(line.proxy.ports))
    if how in ("terminated", "refused"):
        line.proxy.refuses = how == "refused"
        async with psql.transaction():
            await psql.fetch("SELECT pg_terminate_backend($1, 5000)", listener["pid"])
            await psql.execute("UPDATE task SET state = 'USER_KILLED'")
    else:
        line.proxy.hole(listener["client_port"])
        await psql.execute("UPDATE task SET state = 'USER_KILLED'")
    if how == "refused":
        await ens.eventually(lambda: len(launched.events("listener.lost")) > 1)
        assert ens.processes(task_id)
        line.proxy.heal()
    await ens.gone(task_id)
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0, launched.log
    assert await ens.outcomes(task_id) == [Outcome.KILLED]
    await witness.check(ens)


# ---------------------------------------------------------------------------- the proxy itself


async def test_the_proxy_carries_swallows_delays_and_cuts(
    site: Site, tmp_path: Path, psql: asyncpg.Connection[Any]
) -> None:
    async with proxied_store(site, tmp_path) as (proxy, variables):

        async def dial() -> asyncpg.Connection[Any]:
            return await asyncpg.connect(
                variables["ENSEMBLE_STORE_DSN"], passfile=variables["PGPASSFILE"], timeout=10
            )

        first, second = await dial(), await dial()
        assert await first.fetchval("SELECT 1") == 1
        (port,) = await first.fetchrow("SELECT inet_client_port()")
        assert port in proxy.ports
        assert len(proxy.ports) == proxy.accepted == 2
        proxy.hole(port)
        with pytest.raises(TimeoutError):
            await first.fetchval("SELECT 1", timeout=0.2)
        proxy.delay_s = 0.1
        before = time.monotonic()
        assert await second.fetchval("SELECT 1") == 1
        assert time.monotonic() - before >= 0.2
        proxy.delay_s = 0
        named = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
        for direction, heard in (("swallows_requests", 0), ("swallows_replies", 1)):
            third = await dial()
            setattr(proxy, direction, True)
            with pytest.raises(TimeoutError):
                await third.execute(f"SET application_name = '{direction}'", timeout=0.2)
            assert await psql.fetchval(named, direction) == heard
            third.terminate()
            proxy.heal()
        assert proxy.reset() >= 2
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
            await second.fetchval("SELECT 1")
        proxy.refuses = True
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
            await dial()
        first.terminate()
        second.terminate()
