"""Who stands still, is killed or is signalled, alone and all at once: no task is lost, none runs twice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Iterable

import pytest

from ensemble.core.model import Outcome
from ensemble.core.states import State
from ensemble.drivers import proctree
from ensemble.service import spool
from ensemble.site import program
from tests.faults import witness
from tests.faults.witness import witnessed
from tests.integration.launching import WHEEL, Ensemble, Launched

pytestmark = WHEEL
BOTH_MODES = pytest.mark.parametrize("mode", ["mpi", "serial"])

#: The first attempt ends when the test says so, and not before; the next ones end at once.
WAIT = 'test $ENSEMBLE_ATTEMPT != 1 || until [ -e "$ENSEMBLE_SITE/log/go" ]; do sleep 0.02; done'
#: A batch job whose nodes are virtual: in batch jobs, schedulers signal behind the launcher's back.
JOB = {"ENSEMBLE_LOCAL_JOB_ID": "7", "ENSEMBLE_LOCAL_JOB_NODES": "2"}
#: Longer than a busy machine keeps a process from running.
SHORT = {"LAUNCHER_LEASE_TTL_S": 5, "LAUNCHER_HEARTBEAT_S": 0.5, "LAUNCHER_PILOT_PATIENCE_S": 5}


@pytest.fixture(autouse=True)
def _go(ens: Ensemble):
    yield
    (ens.site.path / "log" / "go").unlink(missing_ok=True)


def go(ens: Ensemble) -> None:
    (ens.site.path / "log" / "go").touch()


def parts(ens: Ensemble, launched: Launched) -> dict[str, list[int]]:
    """Return the processes of a launcher by what they are."""
    found = {"launcher": [launched.pid], "guard": [launched.guard.pid], "task": ens.processes()}
    machinery = launched.machinery() if launched.is_serial else {}
    pilots = set(launched.pilots().values()) & set(machinery)
    found["pilot"] = sorted(pilots)
    found["pilot guard"] = [stat.ppid for pid in pilots if (stat := proctree.read_stat(pid))]
    found["mpirun"] = launched.mpiruns() if launched.is_serial else []
    return found


def send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    stat = proctree.read_stat(pid)
    return stat is not None and not stat.is_zombie


def stop_and_kill(pids: list[int]) -> None:
    """Kill processes in one moment: none sees another die.

    Children first: the kernel wakes what is stopped where nobody is left above it (setpgid(2), orphaned groups).
    """
    send(pids, signal.SIGSTOP)
    send(reversed(pids), signal.SIGKILL)


async def begin(ens: Ensemble, mode: str, script: str = WAIT, **options: object) -> Launched:
    """Start a launcher of two nodes with two tasks that run."""
    ids = await ens.store.add([witnessed(script) for _ in range(2)])
    launched = ens.launch("--persistent", mode=mode, **options)  # type: ignore[arg-type]
    await ens.reach(State.RUNNING, *ids, within_s=60)
    await ens.eventually(lambda: all(ens.processes(task_id) for task_id in ids))
    return launched


async def leave_well(ens: Ensemble, *launchers: Launched) -> None:
    for launched in launchers:
        launched.signal(signal.SIGTERM)
    for launched in launchers:
        assert await ens.leave(launched) == 0, launched.log


# ---------------------------------------------------------------------------- who stands still

STILL = {
    "launcher": ["launcher"],
    "launcher and guard": ["guard", "launcher"],
    "all but tasks": ["guard", "launcher", "mpirun", "pilot guard", "pilot"],
    "all": ["guard", "launcher", "mpirun", "pilot guard", "pilot", "task"],
}


@pytest.mark.parametrize(
    ("mode", "who"),
    [
        ("mpi", "launcher"),
        ("serial", "launcher"),
        ("serial", "launcher and guard"),  # the pilots end by their own patience
        ("mpi", "launcher and guard"),
        ("serial", "all but tasks"),
        ("mpi", "all"),
        ("serial", "all"),
    ],
)
async def test_what_stands_still_past_the_lease_never_runs_beside_its_successor(
    ens: Ensemble, mode: str, who: str
) -> None:
    still = await begin(ens, mode, **SHORT)
    other = ens.launch("--persistent", mode="mpi", **SHORT)
    await ens.leased(other)
    found = parts(ens, still)
    stopped = [pid for what in STILL[who] for pid in found[what]]
    send(stopped, signal.SIGSTOP)
    await ens.reach(State.JOB_FINISHED)
    send(stopped, signal.SIGCONT)
    assert await ens.leave(still) != 0
    # Its guard says it; or the launcher itself, where a reaper has killed a guard that stood still.
    words = ("its deadline passed, so it was killed", "was closed by a reaper", "received SIGTERM")
    await ens.eventually(lambda: any(each in still.log for each in words))
    assert "Traceback" not in still.log
    ended = [await ens.outcomes(task.id) for task in await ens.tasks()]
    assert ended == [[Outcome.LOST, Outcome.DONE]] * 2
    assert {task.losses for task in await ens.tasks()} == {1}
    await leave_well(ens, other)
    await witness.check(ens)


async def test_a_launcher_that_stood_still_within_its_lease_hears_what_was_said_and_goes_on(
    ens: Ensemble,
) -> None:
    brief = WAIT.replace("log/go", "log/brief")
    ids = await ens.store.add([witnessed(brief), witnessed(WAIT)])
    launched = ens.launch(
        "--persistent", mode="serial", LAUNCHER_LEASE_TTL_S=60, LAUNCHER_PILOT_PATIENCE_S=5
    )
    await ens.reach(State.RUNNING, *ids, within_s=60)
    await ens.eventually(lambda: all(ens.processes(task_id) for task_id in ids))
    found = parts(ens, launched)
    send(found["launcher"], signal.SIGSTOP)
    (ens.site.path / "log" / "brief").touch()
    await ens.eventually(lambda: not ens.processes())  # the pilots' guards have ended the other
    await ens.eventually(lambda: not any(map(is_running, found["pilot"] + found["pilot guard"])))
    send(found["launcher"], signal.SIGCONT)
    await ens.reach(State.JOB_FINISHED, *ids, within_s=60)
    assert [await ens.outcomes(task_id) for task_id in ids] == [
        [Outcome.DONE],
        [Outcome.LOST, Outcome.DONE],
    ]
    await leave_well(ens, launched)
    assert "launcher.stood_still" in launched.log
    await witness.check(ens)


@pytest.mark.parametrize(("mode", "who"), [("mpi", "guard"), ("serial", "pilot guard")])
async def test_a_guard_that_stood_still_past_its_deadline_spares_what_lives(
    ens: Ensemble, mode: str, who: str
) -> None:
    launched = await begin(ens, mode, **SHORT)
    stopped = parts(ens, launched)[who]
    assert stopped
    send(stopped, signal.SIGSTOP)
    before = await ens.store.pool.fetchval("SELECT expires_at FROM lease")
    renewed = "SELECT $1::timestamptz + ttl * 1.2 < expires_at FROM lease"
    await ens.eventually(lambda: ens.store.pool.fetchval(renewed, before))
    send(stopped, signal.SIGCONT)
    go(ens)
    await ens.reach(State.JOB_FINISHED)
    assert [await ens.outcomes(task.id) for task in await ens.tasks()] == [[Outcome.DONE]] * 2
    await leave_well(ens, launched)
    await witness.check(ens)


# ---------------------------------------------------------------------------- who is killed


@pytest.mark.parametrize("who", ["all but tasks", "all"])
async def test_pilots_that_are_killed_in_one_moment_with_their_launcher_are_taken_over(
    ens: Ensemble, who: str
) -> None:
    launched = await begin(ens, "serial")
    found = parts(ens, launched)
    stop_and_kill([pid for what in STILL[who] for pid in found[what]])
    launched.guard.wait()
    assert who == "all" or len(ens.processes()) >= 2
    other = ens.launch("--idle-timeout=0", mode="serial")
    assert await ens.leave(other) == 0, other.log
    assert "its process is gone" in other.log
    ended = [await ens.outcomes(task.id) for task in await ens.tasks()]
    assert ended == [[Outcome.LOST, Outcome.DONE]] * 2
    await ens.eventually(lambda: not launched.machinery())
    await witness.check(ens)


#: What a task may do when its scheduler ends it.
MANNERS = {
    "dies": WAIT,
    "ignores": f"trap '' TERM; {WAIT}",
    "sleeps": "test $ENSEMBLE_ATTEMPT != 1 || exec sleep 600",
    "fails": f"trap 'exit 3' TERM; {WAIT}",
}


def below(launched: Launched) -> list[int]:
    """Return a launcher's guard and everything below it."""
    top = proctree.read_stat(launched.guard.pid)
    found = proctree.walk([top] if top else [], proctree.list_children)
    return [stat.pid for stat in found if not stat.is_zombie]


@BOTH_MODES
async def test_a_scheduler_that_ends_a_job_makes_no_task_fail(ens: Ensemble, mode: str) -> None:
    ids = await ens.store.add([witnessed(script, name=name) for name, script in MANNERS.items()])
    stubborn = ids[[*MANNERS].index("ignores")]
    variables = JOB | {"ENSEMBLE_LOCAL_JOB_NODES": "4"}
    launched = ens.launch(
        "--persistent", mode=mode, nodes=4, variables=variables, LAUNCHER_GRACE_S=60
    )
    await ens.reach(State.RUNNING, *ids, within_s=60)
    await ens.eventually(lambda: all(ens.processes(task_id) for task_id in ids))
    send(random.sample(every := below(launched), len(every)), signal.SIGTERM)
    # The scheduler's own grace: in it, what is left of the job must be on record as cut off.
    await ens.eventually(lambda: "tasks.timed_out" in launched.log)
    await ens.eventually(
        lambda: not [pid for id in ids if id != stubborn for pid in ens.processes(id)]
    )
    stop_and_kill(below(launched))
    launched.guard.wait()
    other = ens.launch("--idle-timeout=0", mode=mode)
    assert await ens.leave(other) == 0, other.log
    for i in ids:
        d = await ens.store.detail(i)
        print(
            d.task.name,
            [(a.outcome, a.cause, a.reason) for a in d.attempts],
            d.task.failures,
            d.task.losses,
        )
    await witness.check(ens)


async def test_a_new_launcher_takes_nothing_that_the_old_one_still_ends(ens: Ensemble) -> None:
    mode = "serial"
    old = await begin(ens, mode, f"trap '' TERM; {WAIT}", variables=JOB, LAUNCHER_GRACE_S=60)
    old.signal(signal.SIGTERM)
    await ens.reach(State.RUN_TIMEOUT)
    # One of the same batch job has the same nodes; one of another job has others.
    same = ens.launch(mode=mode, variables=JOB)
    other = ens.launch("--persistent", mode=mode, variables=JOB | {"ENSEMBLE_LOCAL_JOB_ID": "8"})
    assert await ens.leave(same) == 1
    assert same.log.splitlines() == [
        "error: launcher 1 of batch job 7 still holds nodes of this allocation"
    ]
    await ens.leased(other)
    await asyncio.sleep(0.6)  # two signals within half a second are one
    old.signal(signal.SIGTERM)
    assert await ens.leave(old) == 0, old.log
    await ens.reach(State.JOB_FINISHED)
    await leave_well(ens, other)
    same = ens.launch("--idle-timeout=0", mode=mode, variables=JOB)
    assert await ens.leave(same) == 0, same.log
    ended = [await ens.outcomes(task.id) for task in await ens.tasks()]
    assert ended == [[Outcome.TIMEOUT, Outcome.DONE]] * 2
    await witness.check(ens)


@BOTH_MODES
async def test_many_who_find_one_lost_lease_read_its_spool_once(ens: Ensemble, mode: str) -> None:
    cluster = ens.site.cluster
    assert cluster is not None
    lost = await begin(ens, mode, WAIT + "; echo x >> runs", LAUNCHER_LEASE_TTL_S=12)
    await ens.store.add([witnessed(parents=[1])])
    await cluster.stop("fast")
    go(ens)
    await ens.gone()
    lost.signal(signal.SIGTERM)
    await ens.eventually(lambda: spool.find(spool.folder(ens.site.path)))
    stop_and_kill([lost.guard.pid, lost.pid])
    lost.guard.wait()
    await cluster.start()
    readers = [ens.launch("--idle-timeout=0", mode=mode, nodes=1) for _ in range(2)]
    words = [["release-lease", "1"], ["db", "check"], ["release-lease", "1"], ["serve", "--once"]]
    commands = [
        subprocess.Popen(program(str(ens.site.path), *each), stderr=subprocess.PIPE)
        for each in words
    ]
    said = [await asyncio.to_thread(each.communicate) for each in commands]
    assert [each.returncode for each in commands] == [0] * len(words), said
    for launched in readers:
        assert await ens.leave(launched) == 0, launched.log
    assert [await ens.outcomes(task.id) for task in await ens.tasks()] == [[Outcome.DONE]] * 3
    for task_id in (1, 2):
        assert (ens.workdir(await ens.task(task_id)) / "runs").read_text() == "x\n"
    await witness.check(ens)


# ---------------------------------------------------------------------------- under load

#: Kills of a task are its failures, of what it runs on its losses.
PATIENT = {"max_retries": 99, "max_losses": 99, "max_timeouts": 99}


class Crew:
    """Launchers that are replaced as they fall, until all tasks are over."""

    def __init__(self, ens: Ensemble, mode: str, size: int = 2, **options: object) -> None:
        self.ens = ens
        self.mode = mode
        self.size = size
        self.options = options
        self.all: list[Launched] = []

    @property
    def alive(self) -> list[Launched]:
        return [each for each in self.all if each.guard.poll() is None]

    def fill(self) -> None:
        while len(self.alive) < self.size:
            self.all.append(self.ens.launch("--persistent", mode=self.mode, **self.options))  # type: ignore[arg-type]

    async def is_done(self) -> bool:
        states = await self.ens.states()
        return set(states) <= {State.JOB_FINISHED, State.USER_KILLED, State.FAILED}

    async def finish(self) -> None:
        """Let the tasks end, and the launchers leave."""

        async def is_done() -> bool:
            self.fill()
            return await self.is_done()

        await self.ens.eventually(is_done, within_s=60)
        self.size = 0
        for launched in self.alive:
            launched.signal(signal.SIGTERM)
        for launched in self.all:
            await self.ens.leave(launched)
            assert "Traceback" not in launched.log, launched.log


def any_victims(ens: Ensemble, launched: Launched, dice: random.Random) -> list[int]:
    """Choose what dies: mostly tasks, sometimes what they run on, once in a while everything at once."""
    try:
        found = {name: pids for name, pids in parts(ens, launched).items() if pids}
    except AssertionError:  # its launcher is just dying
        return []
    kinds = {"task": 8, "pilot": 2, "pilot guard": 2, "mpirun": 1, "launcher": 2, "guard": 1}
    if dice.random() < 0.05:
        return [pid for pids in found.values() for pid in pids]
    names = [name for name in kinds if name in found]
    (name,) = dice.choices(names, [kinds[name] for name in names])
    return [dice.choice(found[name])]


@BOTH_MODES
async def test_whoever_dies_at_random_under_load_nothing_is_lost_or_runs_twice(
    ens: Ensemble, mode: str
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    # In serial mode each death costs a start of pilots.
    number, most = {"mpi": (60, 40), "serial": (30, 10)}[mode]
    await ens.store.add(
        [witnessed(f"sleep 0.{dice.randrange(30):02}", **PATIENT) for _ in range(number)]
    )
    crew = Crew(ens, mode)
    crew.fill()
    await ens.eventually(lambda: len(ens.processes()) >= 2, within_s=60)
    kills = 0
    while not await crew.is_done() and kills < most:
        crew.fill()
        launched = dice.choice(crew.alive)
        if "launcher.started" in launched.log:
            victims = any_victims(ens, launched, dice)
            stop_and_kill(victims)
            kills += len(victims)
        await asyncio.sleep(dice.uniform(0, 0.15))
    await crew.finish()
    print(f"{kills} kills, {len(crew.all)} launchers")
    assert set(await ens.states()) == {State.JOB_FINISHED}
    await witness.check(ens)


@BOTH_MODES
async def test_a_thousand_kills_while_tasks_come_and_go(ens: Ensemble, mode: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    ids = await ens.store.add(
        [
            witnessed("test $((ENSEMBLE_TASK_ID % 3)) != 0 || sleep 0.1", **PATIENT)
            for _ in range(300)
        ]
    )
    crew = Crew(ens, mode)
    crew.fill()
    await ens.eventually(lambda: len(ens.processes()) >= 2, within_s=60)
    first, second = crew.all
    for kills in range(1000):
        doomed = dice.sample(ids, dice.choice([1, 1, 1, 5]))
        await (ens.store.kill(doomed) if dice.random() < 0.5 else ens.store.retry(doomed))
        if kills == 200:
            first.signal(signal.SIGTERM)
        if kills == 500:
            stop_and_kill([second.pid])
        crew.fill()
    await crew.finish()
    assert set(await ens.states()) <= {State.JOB_FINISHED, State.USER_KILLED}
    for task in await ens.tasks():
        if task.state is State.USER_KILLED:
            assert Outcome.DONE not in await ens.outcomes(task.id), task
    await witness.check(ens)
