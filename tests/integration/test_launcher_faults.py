"""What a launcher, its guard and its store do to the tasks when they die, hang or are away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ensemble.core.database import connect
from ensemble.core.model import Cause, Outcome
from ensemble.core.states import State
from ensemble.drivers import process, proctree, sweep
from tests.integration.launching import BOTH_MPI, WHEEL, Ensemble, path_of, python, sh

pytestmark = WHEEL

#: The first attempt leaves everything that is hard to find; the second one ends well.
DETACHING = """
import os, signal, sys, time
if os.environ["ENSEMBLE_ATTEMPT"] != "1":
    pid = int(open("daemon").read())
    try:
        state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except OSError:
        state = "gone"
    sys.exit(0 if state in ("gone", "Z") else 9)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open("daemon", "w") as file:
            file.write(str(os.getpid()))
        os.execve("/bin/sleep", ["sleep", "600"], {})
    os._exit(0)
time.sleep(600)
"""


async def daemon_of(ens: Ensemble, task_id: int) -> int:
    path = ens.workdir(await ens.task(task_id)) / "daemon"
    await ens.eventually(lambda: path.exists() and path.read_text())
    return int(path.read_text())


def is_there(pid: int) -> bool:
    stat = proctree.read_stat(pid)
    return stat is not None and not stat.is_zombie


async def all_run_again(ens: Ensemble) -> None:
    """Have another launcher finish everything."""
    launched = ens.launch("--idle-timeout=0")
    assert await ens.leave(launched) == 0, launched.log
    assert set(await ens.states()) == {State.JOB_FINISHED}, launched.log


# ---------------------------------------------------------------------------- who dies


async def test_a_killed_launcher_leaves_nothing_and_its_tasks_are_free_at_once(
    ens: Ensemble,
) -> None:
    detaching, family = await ens.store.add(
        [python(DETACHING), sh("test $ENSEMBLE_ATTEMPT = 2 || { sleep 600 & sleep 600; }")]
    )
    launched = ens.launch("--persistent")
    await ens.reach(State.RUNNING)
    daemon = await daemon_of(ens, detaching)
    os.kill(launched.pid, signal.SIGKILL)
    await ens.reach(State.RESTART_READY, within_s=30)  # its lease would last for an hour
    assert not is_there(daemon)
    assert ens.processes() == []
    assert await ens.leave(launched) != 0
    for task_id in (detaching, family):
        detail = await ens.store.detail(task_id)
        assert [a.outcome for a in detail.attempts] == [Outcome.LOST]
        assert (detail.task.cause, detail.task.losses) == (Cause.LAUNCHER_LOST, 1)
    await all_run_again(ens)
    assert (await ens.task(detaching)).attempt == 2


async def test_a_launcher_whose_guard_is_killed_leaves_in_good_order(ens: Ensemble) -> None:
    (task_id,) = await ens.store.add([python(DETACHING)])
    launched = ens.launch("--persistent")
    await ens.reach(State.RUNNING)
    daemon, pid = await daemon_of(ens, task_id), launched.pid
    launched.guard.kill()
    await ens.reach(State.RESTART_READY, within_s=30)
    await ens.eventually(lambda: not is_there(pid))
    assert "received SIGTERM" in launched.log
    assert (await ens.task(task_id)).cause is Cause.ALLOCATION_ENDED
    launched.guard.wait()
    # Nobody is left who could know of a daemon that hides its origin; the next attempt sees it.
    with contextlib.suppress(ProcessLookupError):
        os.kill(daemon, signal.SIGKILL)
    await ens.eventually(lambda: not is_there(daemon))
    await all_run_again(ens)


async def test_when_both_are_killed_the_next_launcher_kills_the_survivors_first(
    ens: Ensemble,
) -> None:
    script = """
        if [ $ENSEMBLE_ATTEMPT = 1 ]; then echo $$ > pid; trap '' TERM; sleep 600; sleep 600
        else ! grep -q "^State:.*[^Z] (" /proc/$(cat pid)/status; fi"""
    await ens.store.add([sh(script), sh(script)])
    launched = ens.launch("--persistent")
    await ens.reach(State.RUNNING)
    await ens.eventually(lambda: len(ens.processes()) == 4)
    pid = launched.pid
    os.kill(launched.guard.pid, signal.SIGSTOP)  # or it would clean up between the two
    os.kill(pid, signal.SIGKILL)
    launched.guard.kill()
    launched.guard.wait()
    assert len(ens.processes()) == 4
    assert set(await ens.states()) == {State.RUNNING}
    await all_run_again(ens)
    assert [(await ens.task(n)).attempt for n in (1, 2)] == [2, 2]


async def test_a_reaper_spares_the_tasks_of_another_site_with_the_same_lease_number(
    ens: Ensemble,
) -> None:
    # Every site counts its leases from 1: the number alone tells nothing.
    await ens.store.add([sh("test $ENSEMBLE_ATTEMPT = 2 || sleep 600")])
    launched = ens.launch("--persistent")
    lease = await ens.leased(launched)
    await ens.reach(State.RUNNING)
    foreign = subprocess.Popen(
        ["sleep", "600"],
        env={"ENSEMBLE_TASK_TOKEN": sweep.marker_prefix(lease, process.identity()) + "1.1"},
    )
    try:
        pid = launched.pid
        os.kill(launched.guard.pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        launched.guard.kill()
        launched.guard.wait()
        await all_run_again(ens)
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


async def test_a_launcher_stopped_past_its_deadline_has_no_running_task(ens: Ensemble) -> None:
    detaching, _ = await ens.store.add(
        [python(DETACHING), sh("test $ENSEMBLE_ATTEMPT = 2 || sleep 600")]
    )
    launched = ens.launch("--persistent", LAUNCHER_LEASE_TTL_S=4)
    await ens.reach(State.RUNNING)
    daemon, pid = await daemon_of(ens, detaching), launched.pid
    os.kill(pid, signal.SIGSTOP)
    await ens.gone()
    await ens.eventually(lambda: not is_there(daemon))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    await ens.reach(State.RESTART_READY, within_s=30)
    assert await ens.leave(launched) != 0
    await all_run_again(ens)


@pytest.mark.parametrize("mpi", BOTH_MPI)
async def test_a_killed_mpirun_or_task_is_a_signal_and_leaves_no_rank(
    ens: Ensemble, mpi: str
) -> None:
    ranks, plain, after = await ens.store.add(
        [
            sh("trap '' TERM; sleep 600; sleep 600", ranks_per_node=2),
            sh("sleep 600 & sleep 600"),
            sh("true", num_nodes=2, priority=-1),
        ]
    )
    launched = ens.launch("--idle-timeout=0", MPI_COMMAND=mpi)
    await ens.reach(State.RUNNING, ranks, plain)
    await ens.eventually(lambda: len(ens.processes(ranks)) >= 5)
    await ens.eventually(lambda: len(ens.processes(plain)) >= 3)
    for task_id in (ranks, plain):
        roots = [
            pid
            for pid in ens.processes(task_id)
            if (stat := proctree.read_stat(pid)) and stat.ppid == launched.pid
        ]
        os.kill(roots[0], signal.SIGKILL)
        await ens.gone(task_id)
    assert await ens.leave(launched) == 0, launched.log
    for task_id in (ranks, plain):
        task = await ens.task(task_id)
        assert (task.state, task.cause, task.reason) == (State.FAILED, Cause.SIGNAL, "SIGKILL")
    assert (await ens.task(after)).state is State.JOB_FINISHED


# ---------------------------------------------------------------------------- the store is away


@pytest.mark.parametrize("how", ["fast", "immediate"])
async def test_a_restart_of_the_database_loses_nothing(ens: Ensemble, how: str) -> None:
    cluster = ens.site.cluster
    assert cluster is not None
    ids = await ens.store.add(
        [sh(f"sleep 0.{n % 9}; echo x >> runs") for n in range(20)]
        + [sh("sleep 2; echo x >> runs")]
    )
    launched = ens.launch("--idle-timeout=0", nodes=4)
    await ens.eventually(lambda: len(ens.processes()) >= 4)
    await cluster.stop(how)
    # What runs ends while nobody can be told.
    await ens.eventually(lambda: len(ens.processes()) <= 3)
    assert launched.guard.poll() is None, launched.log
    await cluster.start()
    assert await ens.leave(launched) == 0, launched.log
    assert set(await ens.states()) == {State.JOB_FINISHED}
    for task_id in ids:
        task = await ens.task(task_id)
        assert (ens.workdir(task) / "runs").read_text() == "x\n", "it ran twice"
        assert (await ens.outcomes(task_id)).count(Outcome.DONE) == 1


async def test_results_survive_an_outage_longer_than_the_lease_is_trusted(ens: Ensemble) -> None:
    cluster = ens.site.cluster
    assert cluster is not None
    short, long = await ens.store.add(
        [
            sh("until test -e go; do sleep 0.02; done"),
            sh("test $ENSEMBLE_ATTEMPT = 2 || sleep 600"),
        ]
    )
    launched = ens.launch("--persistent", LAUNCHER_LEASE_TTL_S=5)
    await ens.reach(State.RUNNING)
    go = ens.workdir(await ens.task(short)) / "go"
    await cluster.stop("fast")
    go.touch()
    await ens.gone()
    # Nothing runs, so its guard lets it wait; once the lease is over, too, its results are in a spool, and it leaves.
    await ens.eventually(lambda: "reports.not_written" in launched.log, within_s=60)
    await cluster.start()
    assert await ens.leave(launched) == 1, launched.log
    assert "spool.read" in launched.log
    assert await ens.states() == [State.JOB_FINISHED, State.RESTART_READY]
    assert await ens.outcomes(short) == [Outcome.DONE]
    # It was ended by its launcher, before the lease's time was over and others might take it.
    assert await ens.outcomes(long) == [Outcome.TIMEOUT]


async def test_a_second_signal_ends_the_wait_for_a_database_that_is_away(ens: Ensemble) -> None:
    cluster = ens.site.cluster
    assert cluster is not None
    await ens.store.add([sh("test $ENSEMBLE_ATTEMPT = 2 || sleep 600")])
    launched = ens.launch("--persistent")
    await ens.reach(State.RUNNING)
    await cluster.stop("fast")
    try:
        launched.signal(signal.SIGTERM)
        await ens.gone()
        await asyncio.sleep(0.7)
        launched.signal(signal.SIGTERM)
        await ens.eventually(lambda: "launcher.ended" in launched.log, within_s=60)
    finally:
        await cluster.start()
    assert await ens.leave(launched) != 0  # its guard has gone on trying for some seconds
    assert "reports.not_written" in launched.log
    await all_run_again(ens)


async def test_results_are_kept_while_the_database_cannot_write(ens: Ensemble) -> None:
    ids = await ens.store.add([sh(f"sleep 0.{n}") for n in range(4, 10)])
    launched = ens.launch("--idle-timeout=0", nodes=4)
    await ens.reach(State.RUNNING, *ids[:3])
    user = await connect(ens.site.address(), name="test set-up")
    try:
        await set_read_only(user, "on")
        await ens.eventually(lambda: "read-only" in launched.log)
        await ens.eventually(lambda: not ens.processes())
        assert launched.guard.poll() is None, launched.log
    finally:
        await set_read_only(user, "off")
        user.terminate()
    assert await ens.leave(launched) == 0, launched.log
    assert set(await ens.states()) == {State.JOB_FINISHED}
    assert [(await ens.outcomes(id)).count(Outcome.DONE) for id in ids] == [1] * len(ids)


async def set_read_only(user: asyncpg.Connection[Any], value: str) -> None:
    """Let new sessions of the launcher's role only read, or write again, and have it make new ones."""
    await user.execute(f"ALTER ROLE CURRENT_USER SET default_transaction_read_only = {value}")
    await user.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name LIKE 'ensemble launcher%'"
    )


# ---------------------------------------------------------------------------- the rest of the world


async def test_the_output_directory_may_vanish_while_the_task_runs(ens: Ensemble) -> None:
    script = 'd=$PWD; test $ENSEMBLE_ATTEMPT = 2 && exit 0; cd /; rm -rf "$d"; exit 5'
    (task_id,) = await ens.run(sh(script, max_retries=1))
    detail = await ens.store.detail(task_id)
    assert detail.task.state is State.JOB_FINISHED
    assert detail.attempts[0].error == ""
    assert path_of(detail).count(State.RESTART_READY) == 1


async def test_it_goes_on_when_nobody_reads_its_log(ens: Ensemble) -> None:
    await ens.store.add([sh("exit 1"), *(sh("sleep 0.05") for _ in range(5))])
    reader, writer = os.pipe()
    os.close(reader)
    launched = subprocess.Popen(
        [sys.executable, "-P", "-m", "ensemble", "--site", str(ens.site.path), "launch",
         "--nodes=2", "--idle-timeout=0"],
        stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, start_new_session=True,
    )  # fmt: skip
    os.close(writer)
    try:
        await ens.eventually(lambda: launched.poll() is not None)
    finally:
        launched.kill()
        launched.wait()
    assert sorted(await ens.states()) == sorted([State.FAILED] + [State.JOB_FINISHED] * 5)
    assert launched.returncode == 0


async def test_a_launcher_without_a_database_says_so_and_exits_4(ens: Ensemble) -> None:
    cluster = ens.site.cluster
    assert cluster is not None
    await cluster.stop("fast")
    try:
        launched = ens.launch()
        assert await ens.leave(launched) == 4
    finally:
        await cluster.start()
    (line,) = launched.log.splitlines()
    assert "db start" in line
    assert Path(ens.site.path, "ensemble.toml").exists()
