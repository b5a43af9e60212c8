"""Serial mode in real Slurm jobs: srun starts a pilot on each of four nodes."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import Any

import pytest

from ensemble.core.leases import Reaping
from ensemble.core.model import Cause, NewTask, Outcome, Output, Selector
from ensemble.core.states import State
from ensemble.service.pilots import KILL_S
from tests.integration.launching import WHEEL, sh
from tests.integration.storing import Desk
from tests.slurm.batch import FOUR_NODES, STUBBORN, Batch, SlurmEnsemble
from tests.slurm.cluster import NODES, parent_of

pytestmark = WHEEL

#: Losses are noticed soon.
HASTY = {"LAUNCHER_PILOT_PATIENCE_S": 8, "LAUNCHER_PILOT_JOIN_S": 10}
#: Otherwise Slurm ends a whole job with its first lost node.
NO_KILL = (*FOUR_NODES, "--no-kill")
#: Runs until `let_go`.
WAITING = "until test -e ../go; do sleep 0.1; done"


def share(script: str, packing: int, **fields: Any) -> NewTask:
    """Make a task that takes a part of a node and says where it is."""
    where = "echo $SLURMD_NODENAME $ENSEMBLE_NODES; "
    return sh(where + script, node_packing_count=packing, **{"output": Output.FILE, **fields})


async def let_go(ens: SlurmEnsemble, task_id: int) -> None:
    (ens.workdir(await ens.task(task_id)).parent / "go").touch()


async def ran_again_of(ens: SlurmEnsemble, before: dict[int, str], *nodes: str) -> None:
    """Check that the tasks of lost nodes, and no others, were run twice, the last time to their end."""
    found = [await ens.store.detail(task.id) for task in await ens.tasks()]
    others = [each for each in found if each.task.state is not State.JOB_FINISHED]
    assert others == []
    for task, node in before.items():
        lost = [Outcome.LOST] * (node in nodes)
        assert await ens.outcomes(task) == [*lost, Outcome.DONE], f"task {task} of {node}"


async def test_tasks_of_mixed_packing_fill_all_nodes(ens: SlurmEnsemble) -> None:
    await ens.store.add(
        [share("sleep 0.2", packing) for packing in (2, 4, 8, 16) for _ in range(50)]
    )
    job = ens.batch("--idle-timeout=0")
    assert await job.end() == "COMPLETED 0:0", job.log
    assert await ens.states() == [State.JOB_FINISHED] * 200
    recorded = await ens.nodes_of()
    for task in await ens.tasks():
        assert ens.output(task).split() == [recorded[task.id]] * 2
    used = Counter(recorded.values())
    assert set(used) == set(NODES)
    assert min(used.values()) >= 20, used


@pytest.mark.mpi
async def test_a_task_sees_a_clean_environment_and_may_use_slurm_and_mpi(
    ens: SlurmEnsemble,
) -> None:
    scripts = {
        "env": "env",
        "srun": "srun --quiet -n1 -w $SLURMD_NODENAME sh -c 'echo in $SLURMD_NODENAME'",
        "mpi": "mpiexec -n 2 sh -c 'echo $PMI_RANK of $PMI_SIZE in $SLURMD_NODENAME'",
    }
    # One to a node, and for long enough that not all of them are on the first one to be there.
    tasks = [share(f"{script}; sleep 1", 1, name=name) for name, script in scripts.items()]
    await ens.store.add(tasks * 2)
    job = ens.batch("--idle-timeout=0")
    assert await job.end() == "COMPLETED 0:0", job.log
    assert len(set((await ens.nodes_of()).values())) > 1
    for task in await ens.tasks():
        (where, _), *said = [line.split(" ", 1) for line in ens.output(task).splitlines()]
        lines = [" ".join(words) for words in said]
        match task.name:
            case "srun":
                assert lines == [f"in {where}"]
            case "mpi":
                assert sorted(lines) == [f"{rank} of 2 in {where}" for rank in range(2)]
            case _:
                assert_clean(dict(line.split("=", 1) for line in lines if "=" in line), job, where)


def assert_clean(env: dict[str, str], job: Batch, node: str) -> None:
    assert {name: value for name, value in env.items() if name.startswith("SLURM")} == {
        "SLURMD_NODENAME": node,
        "SLURM_CLUSTER_NAME": "ensembletest",
        "SLURM_CONF": str(job.slurm.path / "slurm.conf"),
        "SLURM_JOB_CPUS_PER_NODE": "4",
        "SLURM_JOB_ID": job.id,
        "SLURM_JOB_NODELIST": node,
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": node,
        "SLURM_OVERLAP": "1",
        "SLURM_TASKS_PER_NODE": "4",
        "SLURM_WORKING_CLUSTER": env["SLURM_WORKING_CLUSTER"],
    }
    strange = ("PMI", "OMPI", "PRTE", "MPI_", "HYDI", "SRUN", "ENSEMBLE_GUARD")
    assert [name for name in env if name.startswith(strange)] == []
    assert env["HOSTNAME"] == os.uname().nodename, "not that of the job's first node"


async def test_a_kill_from_outside_frees_the_place_at_once(ens: SlurmEnsemble) -> None:
    victims = await ens.store.add([share(STUBBORN, 2) for _ in range(8)])
    job = ens.batch("--idle-timeout=0", settings={"LAUNCHER_POLL_S": 600})
    await ens.settle(job, State.RUNNING)
    (successor,) = await ens.store.add([share("true", 2)])
    await ens.store.kill([victims[3]], reason="diverged")
    await ens.gone(victims[3])
    await ens.reach(State.JOB_FINISHED, successor, within_s=60)  # no poll comes before
    nodes = await ens.nodes_of()
    assert nodes[successor] == nodes[victims[3]]
    await ens.store.kill(victims, reason="all of them")
    assert await job.end() == "COMPLETED 0:0", job.log
    assert await ens.states() == [State.USER_KILLED] * 8 + [State.JOB_FINISHED]


async def test_a_drained_job_is_finished_by_the_next_one(ens: SlurmEnsemble) -> None:
    long = await ens.store.add(
        [share("test $ENSEMBLE_ATTEMPT = 2 || sleep 600", 4) for _ in range(12)]
    )
    short = await ens.store.add([share("sleep 0.3", 4, priority=-1) for _ in range(24)])
    first = ens.batch("--idle-timeout=0")
    await ens.reach(State.RUNNING, *long)
    ens.slurm.run("scancel", "--batch", "--signal=TERM", first.id)
    assert await first.end() == "COMPLETED 0:0", first.log
    states = await ens.store.task_states(Selector())
    assert {states[task] for task in long} == {State.RESTART_READY}
    second = ens.batch("--idle-timeout=0")
    assert await second.end() == "COMPLETED 0:0", second.log
    assert set(await ens.states()) == {State.JOB_FINISHED}
    for task in [*long, *short]:
        outcomes = await ens.outcomes(task)
        assert outcomes.count(Outcome.DONE) == 1
        assert set(outcomes) <= {Outcome.DONE, Outcome.TIMEOUT, Outcome.GIVEN_BACK}
        assert task in short or outcomes == [Outcome.TIMEOUT, Outcome.DONE]


async def test_scancel_leaves_nothing_behind(ens: SlurmEnsemble) -> None:
    # TERM to everything, and to srun, which then ends its ranks; five seconds later KILL.
    await ens.store.add([share("sleep 600", 4) for _ in range(8)])
    await ens.store.add([share(STUBBORN, 4) for _ in range(4)])
    job = ens.batch("--idle-timeout=0")
    await ens.settle(job, State.RUNNING)
    ens.slurm.run("scancel", job.id)
    await ens.settle(job, State.RESTART_READY)
    assert await job.end() == "CANCELLED 0:0", job.log
    for task in await ens.tasks():
        assert await ens.runs(task.id) == [Outcome.TIMEOUT]


@pytest.mark.parametrize("victim", ["pilot", "guard"])
async def test_a_killed_pilot_loses_its_own_tasks_only(ens: SlurmEnsemble, victim: str) -> None:
    tasks = await ens.store.add([share(WAITING, 2) for _ in range(8)])
    job = ens.batch("--idle-timeout=0", settings=HASTY)
    await ens.settle(job, State.RUNNING)
    before = await ens.nodes_of()
    (pid,) = job.pilots("n2") if victim == "pilot" else job.guards("n2")
    os.kill(pid, signal.SIGKILL)
    await job.until("node.lost")
    await job.until("pilot.joined", count=5)  # the node gets another one
    await let_go(ens, tasks[0])
    assert await job.end() == "COMPLETED 0:0", job.log
    await ran_again_of(ens, before, "n2")


# Before the tests that take a node away: after one of these, and a launcher that was killed, slurmctld 22.05 starts no
# job on all four idle nodes any more (Reason=Resources).


def papers(ens: SlurmEnsemble) -> list[str]:
    """Return what launchers keep for and about their pilots."""
    found = [path.name for path in ens.site.path.glob("log/launcher-*/*")]
    return [name for name in found if name in ("link.json", "roll") or name.startswith("gone-")]


async def take_all(ens: SlurmEnsemble, tasks: list[int], *, within_s: float) -> tuple[float, float]:
    """Claim and finish tasks as another launcher; return when the first one and when the last one was claimed."""
    desk = Desk(ens.store)
    lease = await desk.register()
    taken: list[float] = []

    async def are_taken() -> bool:
        claims = await desk.claim(lease)
        if claims:
            taken.append(time.monotonic())
            assert not ens.processes(claims[0].id), "an earlier attempt still runs"
        for claim in claims:
            await desk.end(lease, claim)
        return set(await ens.states()) == {State.JOB_FINISHED}

    await ens.eventually(are_taken, within_s=within_s)
    await lease.close("done")
    for task in tasks:
        assert await ens.outcomes(task) == [Outcome.LOST, Outcome.DONE]
        assert (await ens.store.detail(task)).attempts[0].cause is Cause.LAUNCHER_LOST
    return taken[0], taken[-1]


async def test_a_killed_launcher_s_tasks_are_claimed_by_another_without_lingering(
    ens: SlurmEnsemble,
) -> None:
    tasks = await ens.store.add([share(STUBBORN, 2) for _ in range(8)])
    job = ens.batch("--persistent")
    await ens.settle(job, State.RUNNING)
    assert sorted(papers(ens)) == ["link.json", "roll"]
    killed = time.monotonic()
    os.kill(job.launcher(), signal.SIGKILL)
    _, last = await take_all(ens, tasks, within_s=30)
    # Within two seconds where the machine has nothing else to do; a lease that lingers takes more than a minute.
    assert last - killed < 30, job.log
    await job.end()
    assert "lease.lingers" not in job.log
    assert papers(ens) == []


async def test_a_killed_launcher_s_lease_lingers_where_a_pilot_s_guard_was_killed_too(
    ens: SlurmEnsemble,
) -> None:
    tasks = await ens.store.add([share(STUBBORN, 2) for _ in range(8)])
    job = ens.batch("--persistent", settings=HASTY)
    await ens.settle(job, State.RUNNING)
    launcher = job.launcher()
    os.kill(launcher, signal.SIGSTOP)  # nobody is to hear what the pilot says without its guard
    (guard,) = job.guards("n2")
    os.kill(guard, signal.SIGKILL)
    killed = time.monotonic()
    os.kill(launcher, signal.SIGKILL)
    await job.until("lease.lingers")
    assert "pilots=1" in job.log
    assert set(await ens.states()) == {State.RUNNING}
    reaping = Reaping(ens.store.pool)

    async def is_expired() -> bool:
        return bool(await reaping.expire())

    await ens.eventually(is_expired, within_s=30)
    assert time.monotonic() - killed >= HASTY["LAUNCHER_PILOT_PATIENCE_S"] + KILL_S
    await reaping.release()
    await take_all(ens, tasks, within_s=60)
    await job.end()
    assert "link.json" not in papers(ens)


async def test_a_lost_node_s_tasks_run_elsewhere(ens: SlurmEnsemble) -> None:
    tasks = await ens.store.add([share(WAITING, 2) for _ in range(8)])
    job = ens.batch("--idle-timeout=0", sbatch=NO_KILL, settings=HASTY)
    await ens.settle(job, State.RUNNING)
    before = await ens.nodes_of()
    with ens.slurm.without("n3"):
        await job.until("node.lost")
        ens.slurm.declare_down("n3")
        await let_go(ens, tasks[0])
        assert await job.end() == "COMPLETED 0:0", job.log
    await ran_again_of(ens, before, "n3")
    after = await ens.nodes_of()
    assert all(after[task] == node for task, node in before.items() if node != "n3")
    assert "n3" not in after.values()


async def test_pilots_are_started_again_when_their_srun_was_killed(ens: SlurmEnsemble) -> None:
    # srun has a companion that ends the step when srun is killed.
    tasks = await ens.store.add([share(WAITING, 2) for _ in range(8)])
    job = ens.batch("--idle-timeout=0", settings=HASTY)
    await ens.settle(job, State.RUNNING)
    before = await ens.nodes_of()
    both = job.processes("ens-pilots")
    (srun,) = [pid for pid in both if parent_of(pid) not in both]
    os.kill(srun, signal.SIGKILL)
    await job.until("pilot.joined", count=8)
    await let_go(ens, tasks[0])
    assert await job.end() == "COMPLETED 0:0", job.log
    await ran_again_of(ens, before, *NODES)


async def test_a_node_that_never_answers_is_done_without(ens: SlurmEnsemble) -> None:
    # After a while srun gives up, and ends the pilots that it did start; the next one goes without that node.
    tasks = await ens.store.add([share(WAITING, 2) for _ in range(8)])
    go = ens.site.path / "go"
    wait = f"until test -e {go}; do sleep 0.05; done; rm {go}"
    job = ens.batch("--idle-timeout=0", sbatch=NO_KILL, settings=HASTY, before=wait)
    await ens.eventually(lambda: ens.slurm.state(job.id) == "RUNNING")
    with ens.slurm.without("n3"):
        go.touch()
        await job.until("pilots.missing")
        await job.until("pilot.joined", count=6)
        await let_go(ens, tasks[0])
        await job.until("launcher.ended")
        ens.slurm.declare_down("n3")
        assert await job.end() == "COMPLETED 0:0", job.log
    assert await ens.states() == [State.JOB_FINISHED] * 8
    assert set((await ens.nodes_of()).values()) == {"n0", "n1", "n2"}
