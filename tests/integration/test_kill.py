"""Killing tasks, before and while they run: nothing of them is left, and nothing else is touched."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import asyncpg
import pytest

from ensemble.core.model import Cause, NewTask, Outcome
from ensemble.core.states import State
from tests.integration.launching import BOTH_MPI, WHEEL, Ensemble, path_of, sh

pytestmark = WHEEL

FAMILY = "sleep 600 & setsid sleep 600 & (sleep 600 & sleep 600); wait"
STUBBORN = "trap '' TERM; sleep 600; sleep 600"


async def running(ens: Ensemble, task_id: int, processes: int) -> None:
    await ens.reach(State.RUNNING, task_id)
    await ens.eventually(lambda: len(ens.processes(task_id)) >= processes)


async def by_api(ens: Ensemble, _psql: asyncpg.Connection[Any], task_id: int) -> None:
    assert await ens.store.kill([task_id], reason="diverged") == {task_id: True}


async def by_sql(_ens: Ensemble, psql: asyncpg.Connection[Any], task_id: int) -> None:
    await psql.execute(f"UPDATE task SET state = 'USER_KILLED' WHERE id = {task_id}")


@pytest.mark.parametrize("mpi", BOTH_MPI)
async def test_a_kill_ends_the_whole_tree_and_the_node_is_used_again(
    ens: Ensemble, psql: asyncpg.Connection[Any], mpi: str
) -> None:
    ranks = NewTask(command=["sleep", "600"], name="r", ranks_per_node=2)
    # Who heeds TERM does not wait for the grace, which is longer than the test waits.
    await kill_each(ens, psql, mpi, 60, [(sh(FAMILY), 5, by_api), (ranks, 3, by_sql)])
    stubborn = [(sh(STUBBORN), 2, by_sql), (sh(STUBBORN, ranks_per_node=2), 5, by_api)]
    await kill_each(ens, psql, mpi, 0.3, stubborn)


async def kill_each(
    ens: Ensemble, psql: asyncpg.Connection[Any], mpi: str, grace_s: float, victims: list[Any]
) -> None:
    launched = ens.launch(
        "--persistent", nodes=1, MPI_COMMAND=mpi, LAUNCHER_POLL_S=60, LAUNCHER_GRACE_S=grace_s
    )
    for victim, processes, kill in victims:
        (task_id,) = await ens.store.add([victim])
        await running(ens, task_id, processes)
        (successor,) = await ens.store.add([sh("true")])
        await kill(ens, psql, task_id)
        await ens.gone(task_id, within_s=30)
        await ens.reach(State.JOB_FINISHED, successor, within_s=30)  # polls are rarer
        detail = await ens.store.detail(task_id)
        assert detail.task.state is State.USER_KILLED
        assert detail.task.cause is Cause.KILLED_BY_USER
        assert detail.task.reason == ("diverged" if kill is by_api else None)
        assert not detail.task.is_held
        assert detail.attempts[0].outcome is Outcome.KILLED
        assert detail.attempts[0].cause is Cause.KILLED_BY_USER
        assert path_of(detail) == [State.PREPROCESSED, State.RUNNING, State.USER_KILLED]
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0


CLEANS_UP = """
import signal, time
def clean(*_):
    time.sleep(0.3)
    open("cleaned", "w").close()
    raise SystemExit
signal.signal(signal.SIGTERM, clean)
open("ready", "w").close()
signal.pause()
"""


async def test_a_child_may_clean_up_within_the_grace_though_its_parent_has_gone(
    ens: Ensemble,
) -> None:
    launched = ens.launch("--persistent", nodes=1, LAUNCHER_GRACE_S=10)
    (task_id,) = await ens.store.add([sh(f"{sys.executable} -c '{CLEANS_UP}' & wait")])
    await ens.reach(State.RUNNING, task_id)
    folder = ens.workdir(await ens.task(task_id))
    await ens.eventually((folder / "ready").exists)
    await ens.store.kill([task_id])
    await ens.gone(task_id)
    assert (folder / "cleaned").exists()
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0


async def test_killed_before_the_start_it_never_runs_and_its_children_fail(ens: Ensemble) -> None:
    first, waiting, child = await ens.store.add(
        [
            sh("sleep 0.5", priority=1),
            sh("touch $ENSEMBLE_SITE/log/ran", name="w"),
            sh("true", parents=["w"]),
        ]
    )
    launched = ens.launch("--idle-timeout=0", nodes=1)
    await ens.reach(State.RUNNING, first)
    await ens.store.kill([waiting])
    assert await ens.leave(launched) == 0
    assert await ens.states() == [State.JOB_FINISHED, State.USER_KILLED, State.FAILED]
    assert (await ens.task(child)).cause is Cause.PARENT
    assert not (ens.site.path / "log" / "ran").exists()
    assert await ens.outcomes(waiting) in ([], [Outcome.GIVEN_BACK])


async def test_killed_between_claim_and_start_it_never_runs(ens: Ensemble) -> None:
    ids = await ens.store.add([sh("true") for _ in range(4)])
    # One launch in a minute: the others are claimed, and wait.
    launched = ens.launch("--idle-timeout=0", nodes=4, LAUNCHER_LAUNCHES_PER_S=0.016)
    await ens.reach(State.JOB_FINISHED, ids[0])
    await ens.store.kill(ids[1:])
    assert await ens.leave(launched) == 0
    assert await ens.states() == [State.JOB_FINISHED] + [State.USER_KILLED] * 3
    for task_id in ids[1:]:
        assert await ens.outcomes(task_id) == [Outcome.GIVEN_BACK]
    assert await ens.starts() == [ids[0]]
    await ens.store.retry(ids[1:])
    launched = ens.launch("--idle-timeout=0", nodes=4)
    assert await ens.leave(launched) == 0
    assert set(await ens.states()) == {State.JOB_FINISHED}


async def test_a_kill_touches_nothing_of_another_launcher(ens: Ensemble) -> None:
    mine, theirs = await ens.store.add(
        [sh("sleep 600", workflow="a"), sh("sleep 600", workflow="b")]
    )
    launchers = [
        ens.launch("--persistent", f"--wf-filter={w}", nodes=1, LAUNCHER_POLL_S=0.2) for w in "ab"
    ]
    await running(ens, mine, 1)
    await running(ens, theirs, 1)
    survivors = ens.processes(theirs)
    await ens.store.kill([mine])
    await ens.gone(mine)
    await asyncio.sleep(0.5)  # several polls of the other one
    assert ens.processes(theirs) == survivors
    assert (await ens.task(theirs)).state is State.RUNNING
    for launched in launchers:
        launched.signal(signal.SIGTERM)
    assert [await ens.leave(each) for each in launchers] == [0, 0]
    assert await ens.states() == [State.USER_KILLED, State.RESTART_READY]


async def test_a_killed_task_that_still_dies_cannot_run_again_yet(ens: Ensemble) -> None:
    (task_id,) = await ens.store.add([sh("test -e x && exit; touch x; " + STUBBORN)])
    launched = ens.launch("--persistent", nodes=2)
    await running(ens, task_id, 2)
    await ens.store.kill([task_id])
    assert await ens.store.retry([task_id]) == []
    assert await ens.store.remove([task_id]) == []
    await ens.gone(task_id)

    async def retried() -> bool:
        return await ens.store.retry([task_id]) == [task_id]

    await ens.eventually(retried)
    await ens.reach(State.JOB_FINISHED, task_id)
    assert await ens.outcomes(task_id) == [Outcome.KILLED, Outcome.DONE]
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0


async def test_an_open_transaction_stalls_its_own_task_only(
    ens: Ensemble, psql: asyncpg.Connection[Any]
) -> None:
    locked, rolled_back, *others = await ens.store.add([sh("sleep 0.4")] * 2 + [sh("true")] * 6)
    launched = ens.launch("--idle-timeout=0", nodes=2)
    await ens.reach(State.RUNNING, locked, rolled_back)
    transaction = psql.transaction()
    await transaction.start()
    await psql.execute("UPDATE task SET state = 'USER_KILLED' WHERE id = $1", rolled_back)
    await psql.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", locked)
    await ens.reach(State.JOB_FINISHED, *others)
    assert (await ens.task(locked)).state is State.RUNNING
    await transaction.rollback()
    assert await ens.leave(launched) == 0
    assert set(await ens.states()) == {State.JOB_FINISHED}


async def test_a_task_killed_while_it_waits_for_a_launch_frees_its_node_at_once(
    ens: Ensemble,
) -> None:
    ids = await ens.store.add([sh("sleep 600"), sh("sleep 600")])
    launched = ens.launch(nodes=2, LAUNCHER_MAX_LAUNCHES=1)

    async def claimed() -> list[int]:
        counts = await ens.store.counts()
        return sorted(counts.held.values())

    async def one_runs_and_one_waits() -> bool:
        return sorted(await ens.states()) == [State.PREPROCESSED, State.RUNNING] and (
            await claimed() == [1, 1]
        )

    async def is_free() -> bool:
        return await claimed() == [1]

    await ens.eventually(one_runs_and_one_waits)
    (waiting,) = [i for i in ids if (await ens.task(i)).state is State.PREPROCESSED]
    await ens.store.kill([waiting])
    await ens.eventually(is_free)
    assert await ens.outcomes(waiting) == [Outcome.GIVEN_BACK]
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0
