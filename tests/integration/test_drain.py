"""Leaving in good order: signals, the end of the time, and both in the middle of things."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path

import pytest

from ensemble.core.model import Cause, NewApp, NewTask, Outcome, Selector
from ensemble.core.states import State
from tests.integration.launching import BOTH_MPI, WHEEL, Ensemble, Launched, path_of, sh

pytestmark = WHEEL

STUBBORN = "trap '' TERM INT HUP USR1 USR2; sleep 600; sleep 600"
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


async def states_of(ens: Ensemble, workflow: str) -> list[State]:
    return list((await ens.store.task_states(Selector(workflow=workflow))).values())


async def is_marked_before_the_end(ens: Ensemble, launched: Launched, number: int) -> None:
    """Send a signal; RUN_TIMEOUT must be in the store while the stubborn task still runs; then end that."""
    workflow = signal.Signals(number).name

    async def is_marked() -> bool:
        return (await states_of(ens, workflow))[0] is State.RUN_TIMEOUT

    launched.signal(number)
    await ens.eventually(is_marked, within_s=30)  # and its grace is longer
    stubborn = (await ens.store.tasks(Selector(workflow=workflow), limit=1))[0]
    assert stubborn.is_held
    left = ens.processes(stubborn.id)
    assert left, "marked only when it was dead"
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def test_every_drain_signal_marks_first_and_then_ends(ens: Ensemble) -> None:
    launchers = {}
    for number in SIGNALS:
        flow = {"workflow": number.name}
        tasks = [sh(STUBBORN, **flow), sh("sleep 600", auto_timeout_retry=False, **flow)]
        await ens.store.add([*tasks, sh("true", priority=-1, **flow)])
        launchers[number] = ens.launch(
            "--persistent", f"--wf-filter={number.name}", LAUNCHER_GRACE_S=60
        )

    async def all_run() -> bool:
        running = [State.RUNNING, State.RUNNING, State.PREPROCESSED]
        return await ens.states() == running * len(SIGNALS)

    await ens.eventually(all_run, within_s=60)
    await ens.eventually(lambda: len(ens.processes()) >= 3 * len(SIGNALS))
    for number, launched in launchers.items():
        await is_marked_before_the_end(ens, launched, number)
    for number, launched in launchers.items():
        assert await ens.leave(launched) == 0, launched.log
        ended = [State.RESTART_READY, State.FAILED, State.PREPROCESSED]
        assert await states_of(ens, number.name) == ended
        for task in (await ens.store.tasks(Selector(workflow=number.name), limit=9))[:2]:
            detail = await ens.store.detail(task.id)
            begun = [State.PREPROCESSED, State.RUNNING, State.RUN_TIMEOUT]
            assert path_of(detail)[:3] == begun
            assert [a.outcome for a in detail.attempts] == [Outcome.TIMEOUT]
            assert (task.cause, task.reason) == (Cause.ALLOCATION_ENDED, f"received {number.name}")
    assert ens.processes() == []
    assert {each.lease_state for each in await ens.store.launchers(only_live=False)} == {"RELEASED"}


@pytest.mark.parametrize("mpi", BOTH_MPI)
async def test_ranks_are_drained_too(ens: Ensemble, mpi: str) -> None:
    pair, wide = await ens.store.add(
        [
            sh("trap 'echo farewell of $$; exit 0' TERM; sleep 600 & wait", ranks_per_node=2),
            NewTask(command=["sleep", "600"], num_nodes=2),
        ]
    )
    launched = ens.launch("--persistent", nodes=3, MPI_COMMAND=mpi, LAUNCHER_GRACE_S=5)
    await ens.reach(State.RUNNING)
    await ens.eventually(lambda: len(ens.processes(pair)) >= 5 and len(ens.processes(wide)) >= 3)
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0
    assert await ens.states() == [State.RESTART_READY] * 2
    # By rank: a shell that has forked and not yet become `sleep` runs the trap of its parent, too.
    farewells = re.findall("farewell of [0-9]+", ens.output(await ens.task(pair)))
    assert len(set(farewells)) == 2


async def test_a_signal_twice_is_one_and_a_later_one_skips_the_grace(ens: Ensemble) -> None:
    await ens.store.add([sh(STUBBORN)])
    launched = ens.launch("--persistent", LAUNCHER_GRACE_S=60)
    await ens.reach(State.RUNNING)
    await ens.eventually(lambda: len(ens.processes()) == 2)
    launched.signal(signal.SIGTERM)
    launched.signal(signal.SIGINT)
    await ens.reach(State.RUN_TIMEOUT)
    await asyncio.sleep(0.7)  # more than it takes for two signals to be two
    assert len(ens.processes()) >= 1
    assert launched.guard.poll() is None
    launched.signal(signal.SIGTERM)
    await ens.gone(within_s=30)  # half of the grace
    assert await ens.leave(launched) == 0
    assert await ens.states() == [State.RESTART_READY]


async def test_the_end_of_the_time_is_a_drain(ens: Ensemble) -> None:
    ids = await ens.store.add([sh("sleep 600"), sh(STUBBORN, max_timeouts=0), sh("sleep 0.1")])
    launched = ens.launch("--persistent", "--time-limit-minutes=0.03", nodes=3)
    assert await ens.leave(launched) == 0
    wanted = [State.RESTART_READY, State.FAILED, State.JOB_FINISHED]
    assert await ens.states() == wanted
    assert (await ens.task(ids[0])).cause is Cause.ALLOCATION_ENDED


async def test_it_waits_neither_for_a_hanging_environment_script_nor_for_a_turn(
    ens: Ensemble, tmp_path: Path
) -> None:
    script = tmp_path / "hang.sh"
    script.write_text("sleep 600\n")
    await ens.store.add_app(NewApp(name="hung", command="true", env_script=str(script)))
    await ens.store.add([NewTask(app="hung"), sh("true")])
    launched = ens.launch("--persistent", LAUNCHER_LAUNCHES_PER_S=0.016)

    async def is_claimed() -> bool:
        return (await ens.store.counts()).held.get(State.PREPROCESSED) == 2

    await ens.eventually(is_claimed)
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0  # a turn comes once in 62 s
    assert await ens.states() == [State.PREPROCESSED] * 2


async def test_it_leaves_at_once_when_nothing_runs(ens: Ensemble) -> None:
    launched = ens.launch("--persistent", LAUNCHER_GRACE_S=600, LAUNCHER_POLL_S=600)
    await ens.leased(launched)
    launched.signal(signal.SIGHUP)
    assert await ens.leave(launched) == 0


async def test_a_drain_while_tasks_come_and_go_loses_none(ens: Ensemble) -> None:
    ids = await ens.store.add([sh('echo x >> "$ENSEMBLE_SITE/$0"', name="s") for _ in range(400)])
    launched = ens.launch("--persistent", nodes=4)

    async def some_done() -> bool:
        return (await ens.states()).count(State.JOB_FINISHED) > 20

    await ens.eventually(some_done)
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0
    left = [s for s in await ens.states() if s is not State.JOB_FINISHED]
    assert left, "it was too slow to drain in the middle"
    assert set(left) <= {State.PREPROCESSED, State.RESTART_READY}
    launched = ens.launch("--idle-timeout=0", nodes=4)
    assert await ens.leave(launched) == 0
    assert await ens.states() == [State.JOB_FINISHED] * len(ids)
    (ens.site.path / "sh").unlink()
