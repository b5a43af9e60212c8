"""Serial mode when things go wrong: kills, drains, and the death of everything that can die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble.core.model import Cause, NewApp, NewTask, Outcome, Selector
from ensemble.core.states import RUNNABLE, State
from ensemble.drivers import proctree
from ensemble.service import spool
from ensemble.service.reaper import reap
from tests.integration.launching import BOTH_MPI, MPICH, WHEEL, Ensemble, Launched, path_of, sh

pytestmark = WHEEL

FAMILY = "sleep 600 & setsid sleep 600 & (sleep 600 & sleep 600); wait"
STUBBORN = "trap '' TERM; sleep 600; sleep 600"
#: The lock goes with the last process that has it: who finds it taken runs beside an earlier attempt.
ALONE = """
exec 9>lock; flock -n 9 || echo "$ENSEMBLE_TASK_ID" >> "$ENSEMBLE_SITE/log/overlaps"
trap '' TERM
until [ "$ENSEMBLE_ATTEMPT" -gt 1 ] || [ -e go ]; do sleep 0.05; done
"""


@pytest.fixture(autouse=True)
def _no_overlap(ens: Ensemble):
    """No two attempts at one task ran at the same time."""
    overlaps = ens.site.path / "log" / "overlaps"
    overlaps.unlink(missing_ok=True)
    yield
    assert not overlaps.exists(), overlaps.read_text()


async def running(ens: Ensemble, *ids: int, processes: int = 1) -> None:
    await ens.reach(State.RUNNING, *ids, within_s=60)
    for task_id in ids:
        await ens.eventually(lambda id=task_id: len(ens.processes(id)) >= processes)


async def end(ens: Ensemble, launched: Launched) -> None:
    """Drain it; it must leave in good order."""
    launched.signal(signal.SIGTERM)
    await left(ens, launched)


async def left(ens: Ensemble, launched: Launched, status: int = 0) -> None:
    assert await ens.leave(launched, within_s=60) == status, launched.log
    assert not (launched.run_directory / "link.json").exists()
    assert ens.processes() == []
    live = await ens.store.launchers(only_live=True)
    assert live == []


async def all_run(ens: Ensemble, **options: object) -> None:
    """Have another launcher finish everything."""
    launched = ens.launch("--idle-timeout=0", mode="serial", **options)  # type: ignore[arg-type]
    await left(ens, launched)
    assert set(await ens.states()) == {State.JOB_FINISHED}, launched.log


async def check_attempts(ens: Ensemble) -> None:
    """No attempt's number is left out or used again, and each task is done at most once."""
    rows = await ens.store.pool.fetch(
        "SELECT array_agg(attempt ORDER BY attempt) AS numbers,"
        " count(*) FILTER (WHERE outcome = 'done') AS done, count(*) FILTER (WHERE outcome IS NULL) AS open"
        " FROM attempt GROUP BY task_id"
    )
    for row in rows:
        assert row["numbers"] == [*range(1, len(row["numbers"]) + 1)]
        assert row["done"] <= 1
        assert row["open"] == 0


def guard_of(pilot: int) -> int:
    stat = proctree.read_stat(pilot)
    assert stat is not None
    return stat.ppid


# ---------------------------------------------------------------------------- kill


async def test_a_kill_ends_the_whole_tree_and_its_part_is_used_again(ens: Ensemble) -> None:
    launched = ens.launch("--persistent", nodes=1, mode="serial", LAUNCHER_POLL_S=60)
    (bystander,) = await ens.store.add([sh("sleep 600", node_packing_count=2)])
    victims = [(FAMILY, 5), (STUBBORN, 2), (FAMILY + "; " + STUBBORN, 5)]
    for script, processes in victims:
        (victim,) = await ens.store.add([sh(script, node_packing_count=2)])
        await running(ens, bystander, victim, processes=1)
        await ens.eventually(lambda id=victim, n=processes: len(ens.processes(id)) >= n)
        (successor,) = await ens.store.add([sh("true", node_packing_count=2)])
        assert await ens.store.kill([victim], reason="diverged") == {victim: True}
        await ens.gone(victim)
        await ens.reach(State.JOB_FINISHED, successor)
        detail = await ens.store.detail(victim)
        assert (detail.task.state, detail.task.is_held) == (State.USER_KILLED, False)
        assert (detail.task.cause, detail.task.reason) == (Cause.KILLED_BY_USER, "diverged")
        assert [a.outcome for a in detail.attempts] == [Outcome.KILLED]
        assert path_of(detail) == [State.PREPROCESSED, State.RUNNING, State.USER_KILLED]
    # What a task leaves behind when it ends by itself is ended, too, before its part is free.
    (parent,) = await ens.store.add(
        [sh("setsid sleep 600 & (trap '' TERM; sleep 600) & echo left", node_packing_count=2)]
    )
    await ens.reach(State.JOB_FINISHED, parent)
    assert ens.processes(parent) == []
    assert (await ens.task(bystander)).state is State.RUNNING
    await end(ens, launched)


async def test_a_storm_of_kills_while_tasks_end_starts_nothing_that_was_killed_before(
    ens: Ensemble,
) -> None:
    ids = await ens.store.add([sh("sleep 0.02; echo x") for _ in range(300)])
    launched = ens.launch("--idle-timeout=0", nodes=2, mode="serial")

    async def has_ended(count: int) -> bool:
        assert launched.guard.poll() is None, launched.log
        return (await ens.states()).count(State.JOB_FINISHED) >= count

    await ens.eventually(lambda: has_ended(30), within_s=60)
    # Now tasks wait at the pilots: some of each of these handfuls run, have ended, wait there, or here.
    for first in range(40, 300, 20):
        await ens.store.kill(ids[first : first + 10])
    await left(ens, launched)
    await check_attempts(ens)
    states = dict(zip(ids, await ens.states(), strict=True))
    assert set(states.values()) == {State.JOB_FINISHED, State.USER_KILLED}
    never = 0
    for task_id in (id for id, state in states.items() if state is State.USER_KILLED):
        if set(await ens.outcomes(task_id)) <= {Outcome.GIVEN_BACK}:
            never += 1
            assert not list(ens.workdir(await ens.task(task_id)).glob("*.out*")), "it ran"
    assert never > 0


async def test_a_task_that_waits_at_its_pilot_is_killed_without_ever_starting(
    ens: Ensemble,
) -> None:
    before = [NewTask(command=["sleep", "0.05"], workflow="before") for _ in range(60)]
    after = [sh("echo ran", workflow="after", priority=-1) for _ in range(4)]
    ids = await ens.store.add([*before, *after])
    launched = ens.launch("--idle-timeout=0", nodes=1, mode="serial")
    doomed: list[int] = []

    async def some_wait() -> bool:
        assert launched.guard.poll() is None, launched.log
        found = await ens.store.tasks(Selector(workflow="before"), limit=100)
        doomed[:] = [task.id for task in found if task.is_claimed][-3:]
        return len(doomed) == 3

    await ens.eventually(some_wait, within_s=60)
    killed = await ens.store.kill(doomed)
    await left(ens, launched)
    assert set(killed.values()) == {True}
    states = await ens.store.task_states(Selector(ids=tuple(doomed)))
    assert set(states.values()) == {State.USER_KILLED}
    outcomes = [(await ens.outcomes(id))[-1] for id in doomed]
    assert Outcome.GIVEN_BACK in outcomes
    assert len([s for s in await ens.states() if s is State.JOB_FINISHED]) == len(ids) - 3


# ---------------------------------------------------------------------------- drain


async def test_a_drain_gives_back_what_waits_at_the_pilots(ens: Ensemble) -> None:
    ids = await ens.store.add([sh("sleep 0.02; echo x >> runs") for _ in range(160)])
    launched = ens.launch("--persistent", nodes=2, mode="serial")

    async def some_wait() -> bool:
        assert launched.guard.poll() is None, launched.log
        held = (await ens.store.counts()).held
        return held.get(State.PREPROCESSED, 0) >= 20

    await ens.eventually(some_wait, within_s=60)
    await end(ens, launched)
    states = await ens.states()
    assert set(states) <= {State.JOB_FINISHED, State.PREPROCESSED, State.RESTART_READY}
    assert states.count(State.PREPROCESSED) > 0, "it was too slow to drain in the middle"
    assert (await ens.store.counts()).held == {}
    await check_attempts(ens)
    await all_run(ens)
    await check_attempts(ens)
    for task_id in ids:
        started = [a for a in (await ens.store.detail(task_id)).attempts if a.started_at]
        runs = ens.workdir(await ens.task(task_id)) / "runs"
        assert len(runs.read_text().split()) <= len(started)


async def test_a_second_signal_skips_the_grace_and_the_end_of_the_time_is_a_drain(
    ens: Ensemble,
) -> None:
    await ens.store.add([sh(STUBBORN, workflow="a") for _ in range(3)])
    timed = [sh("sleep 600", workflow="b"), sh(STUBBORN, workflow="b", max_timeouts=0)]
    await ens.store.add(timed)
    signalled = ens.launch("--persistent", "--wf-filter=a", mode="serial", LAUNCHER_GRACE_S=60)
    limited = ens.launch("--time-limit-minutes=0.08", "--wf-filter=b", mode="serial")
    await ens.eventually(lambda: len(ens.processes()) >= 7, within_s=60)
    signalled.signal(signal.SIGTERM)

    async def is_marked() -> bool:
        states = await ens.store.task_states(Selector(workflow="a"))
        return list(states.values()).count(State.RUN_TIMEOUT) == 2

    await ens.eventually(is_marked)
    await asyncio.sleep(0.7)  # more than it takes for two signals to be two
    assert signalled.guard.poll() is None
    signalled.signal(signal.SIGTERM)
    await left_one(ens, signalled)
    await left_one(ens, limited)
    a = (await ens.store.task_states(Selector(workflow="a"))).values()
    assert sorted(a) == [State.PREPROCESSED, State.RESTART_READY, State.RESTART_READY]
    b = list((await ens.store.task_states(Selector(workflow="b"))).values())
    assert b == [State.RESTART_READY, State.FAILED]
    await check_attempts(ens)
    assert ens.processes() == []


async def left_one(ens: Ensemble, launched: Launched) -> None:
    assert await ens.leave(launched, within_s=60) == 0, launched.log
    assert "mpirun.did_not_end" not in launched.log


async def test_it_waits_neither_for_pilots_that_join_nor_for_an_environment_script(
    ens: Ensemble, tmp_path: Path
) -> None:
    script = tmp_path / "hang.sh"
    begun = tmp_path / "begun"
    script.write_text(f"sleep 600 & echo $! > {begun}; wait\n")
    await ens.store.add_app(NewApp(name="hung", command="true", env_script=str(script)))
    await ens.store.add([NewTask(app="hung")])
    early = ens.launch("--persistent", mode="serial")
    await ens.eventually(lambda: "launcher.started" in early.log and early.mpiruns())
    await end(ens, early)
    assert "mpirun.did_not_end" not in early.log
    launched = ens.launch("--persistent", mode="serial")
    await ens.eventually(lambda: begun.exists() and begun.read_text(), within_s=60)
    await end(ens, launched)
    assert proctree.read_stat(int(begun.read_text())) is None
    assert "mpirun.did_not_end" not in launched.log
    assert await ens.states() == [State.PREPROCESSED]
    await check_attempts(ens)


# ---------------------------------------------------------------------------- who dies


WITH_MPICH, WITH_OPENMPI = BOTH_MPI
DEATHS = [
    pytest.param(*mpi.values, death, id=f"{mpi.id}-{death}", marks=mpi.marks)
    for mpi, death in [
        (WITH_MPICH, "pilot"),
        (WITH_MPICH, "guard"),
        (WITH_MPICH, "mpirun"),
        (WITH_OPENMPI, "guard"),
        (WITH_OPENMPI, "guard and pilot"),
        (WITH_OPENMPI, "mpirun"),
    ]
]


def kill(launched: Launched, pilot: int, death: str) -> None:
    guard = guard_of(pilot)
    match death:
        case "pilot":
            os.kill(pilot, signal.SIGKILL)
        case "guard":
            os.kill(guard, signal.SIGKILL)
        case "guard and pilot":
            os.kill(guard, signal.SIGSTOP)  # or it would clean up between the two
            os.kill(pilot, signal.SIGKILL)
            os.kill(guard, signal.SIGKILL)
        case _:
            (mpirun,) = launched.mpiruns()
            os.kill(mpirun, signal.SIGKILL)


async def check_loss(ens: Ensemble, task_id: int, *, is_lost: bool) -> None:
    detail = await ens.store.detail(task_id)
    wanted = [Outcome.LOST, Outcome.DONE] if is_lost else [Outcome.DONE]
    assert [a.outcome for a in detail.attempts] == wanted
    assert detail.task.losses == int(is_lost)
    if is_lost:
        assert detail.attempts[0].cause is Cause.NODE_LOST
        assert detail.attempts[0].nodes[0] in (detail.attempts[0].reason or "")


@pytest.mark.parametrize(("mpi", "death"), DEATHS)
async def test_what_a_lost_pilot_ran_runs_again_and_the_others_go_on(
    ens: Ensemble, mpi: str, death: str
) -> None:
    launched = ens.launch("--persistent", mode="serial", MPI_COMMAND=mpi)
    ids = await ens.store.add([sh(ALONE), sh(ALONE)])
    await running(ens, *ids)
    pilots = await ens.joined(launched)
    victim, other = [await ens.task(id) for id in ids]
    pilot = pilots[victim.nodes[0]]
    kill(launched, pilot, death)
    # Hydra ends all ranks when one dies by a signal, or itself; with Open MPI the others live on.
    lost = [] if death == "mpirun" else [victim]
    if mpi == str(MPICH) and death != "pilot":
        lost = [victim, other]
    if lost:
        await ens.reach(State.JOB_FINISHED, *[task.id for task in lost], within_s=60)
    for task in (victim, other):
        if task not in lost:
            assert (await ens.task(task.id)).state is State.RUNNING, launched.log
            (ens.workdir(task) / "go").touch()
    await ens.reach(State.JOB_FINISHED)
    for task in (victim, other):
        await check_loss(ens, task.id, is_lost=task in lost)
    # Where a pilot was lost there is a new one, so that as many run at once as before.
    if lost:
        await ens.joined(launched, 2 + len(lost))
    again = await ens.store.add([sh("sleep 600"), sh("sleep 600")])
    await running(ens, *again)
    await end(ens, launched)
    await check_attempts(ens)


async def test_a_pilot_that_stands_still_is_ended_before_its_tasks_run_elsewhere(
    ens: Ensemble,
) -> None:
    launched = ens.launch("--persistent", nodes=3, mode="serial", LAUNCHER_PILOT_PATIENCE_S=5)
    ids = await ens.store.add([sh(ALONE) for _ in range(3)])
    await running(ens, *ids)
    pilots = await ens.joined(launched, 3)
    still, frozen, other = [await ens.task(id) for id in ids]
    # One pilot alone, and one with its guard: nobody there can act.
    stopped = [pilots[still.nodes[0]], pilots[frozen.nodes[0]]]
    guard = guard_of(stopped[1])
    for pid in (stopped[0], guard, stopped[1]):
        os.kill(pid, signal.SIGSTOP)
    await ens.reach(State.JOB_FINISHED, still.id, frozen.id, within_s=60)
    for pid in (stopped[0], stopped[1], guard):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    await ens.eventually(lambda: all(proctree.read_stat(pid) is None for pid in stopped))
    assert (await ens.task(other.id)).state is State.RUNNING, launched.log
    (ens.workdir(other) / "go").touch()
    await ens.reach(State.JOB_FINISHED)
    assert [await ens.outcomes(id) for id in ids] == [
        [Outcome.LOST, Outcome.DONE],
        [Outcome.LOST, Outcome.DONE],
        [Outcome.DONE],
    ]
    assert {each["node"] for each in launched.events("pilot.silent")} == {
        still.nodes[0],
        frozen.nodes[0],
    }
    await end(ens, launched)
    await check_attempts(ens)


async def test_a_pilot_that_comes_too_late_starts_nothing_of_what_waited_there(
    ens: Ensemble,
) -> None:
    script = 'echo "$ENSEMBLE_ATTEMPT $EPOCHREALTIME" >> runs; exec sleep 0.05'
    ids = await ens.store.add([NewTask(command=["bash", "-c", script]) for _ in range(30)])
    launched = ens.launch("--idle-timeout=0", nodes=1, mode="serial", LAUNCHER_PILOT_PATIENCE_S=5)

    async def some_wait() -> bool:
        assert launched.guard.poll() is None, launched.log
        return (await ens.store.counts()).held.get(State.PREPROCESSED, 0) >= 5

    await ens.eventually(some_wait, within_s=60)
    (pilot,) = launched.pilots().values()
    guard = guard_of(pilot)
    os.kill(guard, signal.SIGSTOP)
    os.kill(pilot, signal.SIGSTOP)
    await ens.eventually(lambda: launched.events("node.lost"))
    woken = time.time()
    os.kill(pilot, signal.SIGCONT)  # before its guard, which would end it
    await ens.eventually(lambda: (stat := proctree.read_stat(pilot)) is None or stat.is_zombie)
    os.kill(guard, signal.SIGCONT)
    await left(ens, launched)
    assert set(await ens.states()) == {State.JOB_FINISHED}
    for task_id in ids:
        lines = (ens.workdir(await ens.task(task_id)) / "runs").read_text().splitlines()
        runs = [(int(attempt), float(at)) for attempt, at in map(str.split, lines)]
        assert not [at for attempt, at in runs if attempt == 1 and at > woken] or len(runs) == 1
    await check_attempts(ens)


async def test_nothing_survives_a_launcher_that_is_killed_or_stands_still(ens: Ensemble) -> None:
    ids = await ens.store.add([sh(ALONE), sh(ALONE)])
    launched = ens.launch("--persistent", mode="serial")
    await running(ens, *ids)
    os.kill(launched.pid, signal.SIGKILL)
    await ens.reach(State.RESTART_READY)
    assert ens.processes() == []
    assert await ens.leave(launched) != 0
    assert {(await ens.task(id)).cause for id in ids} == {Cause.LAUNCHER_LOST}
    await all_run(ens)

    ids = await ens.store.add([sh(ALONE), sh(ALONE)])
    launched = ens.launch("--idle-timeout=0", mode="serial", LAUNCHER_PILOT_PATIENCE_S=5)
    await running(ens, *ids)
    pid = launched.pid
    os.kill(pid, signal.SIGSTOP)
    await ens.gone()  # its pilots' guards saw to that
    os.kill(pid, signal.SIGCONT)
    await left(ens, launched)
    assert [await ens.outcomes(id) for id in ids] == [[Outcome.LOST, Outcome.DONE]] * 2
    await check_attempts(ens)


class OtherHosts:
    """Ranks that are below no process of the launcher's, as on other hosts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ranks: list[subprocess.Popen[bytes]] = []
        # Ranks go by the environment at once, where MPI does not work at all.
        (path / "mpi4py").mkdir()
        (path / "mpi4py" / "__init__.py").write_text("raise ImportError('not today')\n")
        orders = f"env -0 > {path}/$PMI_RANK.env; printf '%s\\0' \"$@\" > {path}/$PMI_RANK.new"
        stays = f"{orders}; mv {path}/$PMI_RANK.new {path}/$PMI_RANK.argv; exec sleep 600"
        words = f'"${{@:1:6}}" sh -c {shlex.quote(stays)} sh "${{@:7}}"'
        self.mpiexec = wrapper(path / "mpiexec", f"exec {MPICH} {words}")
        self.variables = {"PYTHONPATH": str(path)}

    def start(self, count: int = 2) -> bool:
        """Start the ranks, once all of them are to be."""
        orders = sorted(self._path.glob("*.argv"))
        if len(orders) < count:
            return False
        for order in orders:
            argv = order.read_bytes().split(b"\0")[:-1]
            items = order.with_suffix(".env").read_bytes().split(b"\0")[:-1]
            environ = dict(item.split(b"=", 1) for item in items)
            self._ranks.append(subprocess.Popen(argv, env=environ, start_new_session=True))
        return True

    def have_ended(self) -> bool:
        return all(rank.poll() is not None for rank in self._ranks)

    def close(self) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                for pid in proctree.list_children(rank.pid):
                    os.kill(pid, signal.SIGKILL)
                rank.kill()
            rank.wait()


@pytest.fixture
def others(tmp_path: Path) -> Iterator[OtherHosts]:
    made = OtherHosts(tmp_path)
    yield made
    made.close()


async def launch_elsewhere(ens: Ensemble, others: OtherHosts) -> Launched:
    """Start a launcher as in a batch job: its lease lingers, for the pilots that are on other hosts."""
    launched = ens.launch(
        "--persistent", mode="serial", variables=others.variables, MPI_COMMAND=others.mpiexec
    )
    lease = await ens.leased(launched)
    linger = "UPDATE lease SET linger = interval '1 hour' WHERE id = $1"
    await ens.store.pool.execute(linger, lease)
    await ens.eventually(others.start, within_s=60)
    await ens.joined(launched)
    return launched


def papers(launched: Launched) -> list[str]:
    """Return what the launcher keeps for and about its pilots."""
    names = [path.name for path in launched.run_directory.iterdir()]
    return sorted(name for name in names if name.startswith(("link", "roll", "gone")))


async def test_a_killed_launcher_s_tasks_are_given_back_as_soon_as_all_its_pilots_are_gone(
    ens: Ensemble, others: OtherHosts
) -> None:
    ids = await ens.store.add([sh(ALONE), sh(ALONE)])
    launched = await launch_elsewhere(ens, others)
    await running(ens, *ids)
    assert papers(launched) == ["link.json", "roll"]
    os.kill(launched.pid, signal.SIGKILL)
    await ens.reach(State.RESTART_READY, within_s=60)  # its lease would linger for an hour
    assert ens.processes() == []
    assert await ens.leave(launched) != 0
    assert "lease.lingers" not in launched.log
    await ens.eventually(others.have_ended)
    assert papers(launched) == []
    assert {(await ens.task(id)).cause for id in ids} == {Cause.LAUNCHER_LOST}
    await all_run(ens)
    await check_attempts(ens)


async def test_a_pilot_that_may_live_keeps_its_lost_launcher_s_tasks_until_its_guard_gives_word(
    ens: Ensemble, others: OtherHosts
) -> None:
    ids = await ens.store.add([sh(ALONE), sh(ALONE)])
    launched = await launch_elsewhere(ens, others)
    await running(ens, *ids)
    guard = guard_of(next(iter((await ens.joined(launched)).values())))
    os.kill(guard, signal.SIGSTOP)
    os.kill(launched.pid, signal.SIGKILL)
    await ens.eventually(lambda: launched.guard.poll() is not None)
    assert "lease.lingers" in launched.log
    assert "pilots=1" in launched.log
    spools = spool.folder(ens.site.path)
    assert await reap(ens.store, spools) == 0
    assert await ens.states() == [State.RUNNING] * 2
    assert [name[:4] for name in papers(launched)] == ["gone", "roll"]
    os.kill(guard, signal.SIGCONT)
    await ens.eventually(others.have_ended)
    assert await reap(ens.store, spools) == 2
    assert await ens.states() == [State.RESTART_READY] * 2
    assert papers(launched) == []
    await all_run(ens)
    await check_attempts(ens)


async def test_a_roll_that_was_lost_leaves_the_lease_to_linger(
    ens: Ensemble, others: OtherHosts
) -> None:
    await ens.store.add([sh(ALONE), sh(ALONE)])
    launched = await launch_elsewhere(ens, others)
    await ens.reach(State.RUNNING)
    (launched.run_directory / "roll").unlink()
    os.kill(launched.pid, signal.SIGKILL)
    await ens.eventually(others.have_ended)
    assert await ens.leave(launched) != 0
    assert "pilots=unknown" in launched.log
    assert await ens.states() == [State.RUNNING] * 2
    await ens.store.pool.execute("UPDATE lease SET linger = '0' WHERE state = 'ACTIVE'")
    assert await reap(ens.store, spool.folder(ens.site.path)) == 2
    assert papers(launched) == []


async def test_a_task_that_kills_every_pilot_it_gets_ends_the_launcher_with_one_error(
    ens: Ensemble,
) -> None:
    bad, after = await ens.store.add(
        [sh("kill -KILL $PPID; sleep 600", max_losses=9), sh("echo ran", priority=-1)]
    )
    launched = ens.launch("--idle-timeout=0", nodes=1, mode="serial")
    await left(ens, launched, status=1)
    assert set(await ens.outcomes(bad)) == {Outcome.LOST}
    assert set(await ens.states()) <= RUNNABLE
    last = launched.log.strip().splitlines()[-1]
    assert "no pilot is left" in last, launched.log
    assert "Traceback" not in launched.log
    assert len(launched.events("pilot.joined")) == 3
    assert len(launched.events("node.set_aside")) == 1
    assert await ens.outcomes(after) in ([], [Outcome.GIVEN_BACK])
    await check_attempts(ens)
    # It never told of a start, and each of its losses counts all the same.
    lost = await ens.task(bad)
    assert (lost.state, lost.losses) == (State.RESTART_READY, 3)


async def test_a_task_that_kills_its_pilots_fails_for_it(ens: Ensemble) -> None:
    bad, *good = await ens.store.add(
        [
            sh("kill -KILL $PPID; sleep 600", max_losses=1, priority=1),
            *[sh("true", node_packing_count=2) for _ in range(20)],
        ]
    )
    launched = ens.launch("--idle-timeout=0", nodes=1, mode="serial")
    await left(ens, launched, status=0)
    lost = await ens.task(bad)
    assert (lost.state, lost.cause, lost.losses) == (State.FAILED, Cause.NODE_LOST, 2)
    assert {(await ens.task(task)).state for task in good} == {State.JOB_FINISHED}
    await check_attempts(ens)


# ---------------------------------------------------------------------------- pilots that do not come


def wrapper(path: Path, script: str) -> str:
    """Make an mpiexec that tells its version and then does what the script says."""
    mpiexec = shlex.quote(str(MPICH))
    path.write_text(f'#!/bin/bash\n[ "$1" = --version ] && exec {mpiexec} "$@"\n{script}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo noise; echo 'no such partition' >&2; exit 3", ["status 3", "no such partition"]),
        ("echo waiting; exec sleep 600", ["did not join within 1 s", "waiting"]),
        ("echo starting; exit 0", ["status 0", "starting"]),
        (
            f'args=("$@"); for i in "${{!args[@]}}"; do [ "${{args[i]}}" = -n ] && args[i+1]=1; done; '
            f"{shlex.quote(str(MPICH))} \"${{args[@]}}\"",
            ["pilot", "companions"],
        ),
    ],
    ids=["fails", "never", "at once", "fewer"],
)  # fmt: skip
async def test_an_mpirun_that_starts_no_pilots_is_one_clear_error(
    ens: Ensemble, tmp_path: Path, script: str, says: list[str]
) -> None:
    await ens.store.add([sh("true"), sh("true")])
    command = wrapper(tmp_path / "mpiexec", script)
    join_s = 1 if "sleep" in script else 60
    launched = ens.launch(mode="serial", MPI_COMMAND=command, LAUNCHER_PILOT_JOIN_S=join_s)
    await left(ens, launched, status=1)
    error = launched.log[launched.log.rindex("launcher.ended") :]
    for words in ["no pilot joined", *says]:
        assert words in error, launched.log
    assert "Traceback" not in launched.log
    assert await ens.states() == [State.PREPROCESSED] * 2
    assert [task.attempt for task in await ens.tasks()] == [0, 0]


async def test_without_an_mpirun_nothing_is_registered(ens: Ensemble) -> None:
    await ens.store.add([sh("true")])
    launched = ens.launch(mode="serial", MPI_COMMAND="/no/such/mpiexec")
    assert await ens.leave(launched) == 1
    assert "/no/such/mpiexec" in launched.log
    assert len(launched.log.splitlines()) == 1, launched.log
    assert [task.attempt for task in await ens.tasks()] == [0]
    assert await ens.store.launchers(only_live=False) == []


async def test_the_others_do_the_work_of_a_pilot_that_never_joins(
    ens: Ensemble, tmp_path: Path
) -> None:
    # Ranks go by the environment at once, where MPI does not work at all.
    package = tmp_path / "mpi4py"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not today')\n")
    flag = tmp_path / "flag"
    waits = f'[ $PMI_RANK = 1 ] || exec "$@"; until [ -e {flag} ]; do sleep 0.1; done'
    command = wrapper(
        tmp_path / "mpiexec",
        f'exec {MPICH} "${{@:1:6}}" sh -c {shlex.quote(waits)} sh "${{@:7}}"',
    )
    ids = await ens.store.add([sh("true") for _ in range(20)])
    launched = ens.launch(
        "--persistent",
        nodes=3,
        mode="serial",
        variables={"PYTHONPATH": str(tmp_path)},
        MPI_COMMAND=command,
        LAUNCHER_PILOT_JOIN_S=5,
    )
    await ens.reach(State.JOB_FINISHED, *ids, within_s=60)
    await ens.eventually(lambda: launched.events("pilots.missing"), within_s=60)
    assert "did not join within 5 s" in launched.log
    (again,) = await ens.store.add([sh("true")])
    await ens.reach(State.JOB_FINISHED, again)
    assert len(launched.pilots()) == 2
    flag.touch()
    await end(ens, launched)
    assert re.search(r"pilot\.without_mpi.*not today", launched.log)
    assert set(await ens.states()) == {State.JOB_FINISHED}
