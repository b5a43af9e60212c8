"""Tasks that kill their launcher, before anything of them is on record, are found out."""

from __future__ import annotations

import pytest

from ensemble.core.model import Cause, NewTask, Selector
from ensemble.core.states import State
from tests.faults.witness import check, witnessed
from tests.integration.launching import WHEEL, Ensemble, sh

pytestmark = WHEEL

#: What kills the launcher from wherever the task runs: of two processes with its command line, not the guard.
_KILL_LAUNCHER = """
for each in /proc/[0-9]*; do
  line=$(tr '\\0' ' ' < $each/cmdline 2>/dev/null) || continue
  case "$line" in
    *guard*) ;;
    *"--site $ENSEMBLE_SITE launch "*) kill -9 ${each#/proc/} ;;
  esac
done
sleep 30
"""


async def run_out(ens: Ensemble, mode: str, *, most: int) -> int:
    """Run launchers until one leaves in good order; return how many were lost before."""
    for lost in range(most):
        launched = ens.launch("--idle-timeout=0", mode=mode)
        if await ens.leave(launched) == 0:
            return lost
    raise AssertionError(f"after {most} launchers there is no end:\n{await ens.tasks()}")


async def test_a_task_that_kills_its_parent_at_its_start_fails_for_it(ens: Ensemble) -> None:
    """In mpi mode the parent of a task of one rank is the launcher itself."""
    [poison] = await ens.store.add([sh("kill -9 $PPID; sleep 30", max_losses=1)])
    innocent = await ens.store.add([witnessed() for _ in range(6)])
    # One that may have killed it, one that did so on record, and the one that is too many.
    assert await run_out(ens, "mpi", most=6) <= 3
    task = await ens.task(poison)
    assert (task.state, task.cause) == (State.FAILED, Cause.LAUNCHER_LOST)
    assert task.losses == 2
    states = await ens.store.task_states(Selector(ids=tuple(innocent)))
    assert set(states.values()) == {State.JOB_FINISHED}
    await ens.gone()
    await check(ens)


@pytest.mark.parametrize("mode", ["mpi", "serial"])
async def test_a_task_that_kills_every_launcher_fails_and_the_others_finish(
    ens: Ensemble, mode: str
) -> None:
    """Those beside it may be lost with it, but never as often."""
    tasks = [witnessed(node_packing_count=4, max_losses=9) for _ in range(12)]
    poison = sh(_KILL_LAUNCHER, name="poison", node_packing_count=4, max_losses=1, priority=1)
    ids = await ens.store.add([*tasks[:6], poison, *tasks[6:]])
    await run_out(ens, mode, most=7)
    task = await ens.task(ids[6])
    assert (task.state, task.cause) == (State.FAILED, Cause.LAUNCHER_LOST)
    states = await ens.store.task_states(Selector(ids=(*ids[:6], *ids[7:])))
    assert set(states.values()) == {State.JOB_FINISHED}
    await ens.gone()
    await check(ens)


async def test_what_was_only_beside_it_runs_again_and_no_loss_is_counted(ens: Ensemble) -> None:
    """What a lost launcher had claimed and not started has its start put on record first, and runs."""
    tasks = [NewTask(command=["true"], node_packing_count=64) for _ in range(200)]
    ids = await ens.store.add(tasks)
    [poison] = await ens.store.add(
        [sh(_KILL_LAUNCHER, node_packing_count=64, priority=1, max_losses=0)]
    )
    await run_out(ens, "serial", most=6)
    assert (await ens.task(poison)).state is State.FAILED
    done = await ens.store.tasks(Selector(ids=tuple(ids)), limit=1000)
    assert {task.state for task in done} == {State.JOB_FINISHED}
    await check(ens)
