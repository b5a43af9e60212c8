"""mpi mode in real Slurm jobs: a step for each task, made by srun or by the MPI's own launcher."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest

from ensemble.core.model import Cause, NewTask, Outcome, Output
from ensemble.core.states import State
from tests.faults.witness import check, witnessed
from tests.integration.launching import MPICH, WHEEL, sh
from tests.slurm.batch import FOUR_NODES, STUBBORN, Batch, SlurmEnsemble

#: The settings, and what a task of MPICH's must tell the launcher.
LAUNCHERS = [
    pytest.param({"MPI_LAUNCHER": "srun"}, ["--mpi=pmi2"], id="srun"),
    pytest.param(
        {},
        [],
        id="mpich",
        marks=pytest.mark.skipif(
            not MPICH.exists(), reason="NOT TESTED with MPICH: no mpiexec of it"
        ),
    ),
]
pytestmark = [
    WHEEL,
    pytest.mark.mpi,
    pytest.mark.parametrize(("settings", "flags"), LAUNCHERS),
]

#: In one write: other ranks write to the same file.
RANK = """
import mpi4py.MPI as M, os, sys
os.write(1, f"{M.COMM_WORLD.rank} {M.COMM_WORLD.size} {os.environ['SLURMD_NODENAME']}\\n".encode())
"""
#: Ends well when it is asked to, and says so.
POLITE = "trap 'echo asked; exit 0' TERM; echo ready; while :; do sleep 0.05; done"


def told(script: str, **fields: Any) -> NewTask:
    return sh(script, **{"output": Output.FILE, **fields})


def lines(text: str) -> list[str]:
    """Return what ranks wrote, without srun's own remarks."""
    return [line for line in text.splitlines() if not line.startswith("srun:")]


async def start(ens: SlurmEnsemble, settings: dict[str, str], *others: NewTask) -> Batch:
    """Start a job in which a task of four ranks on two nodes, task 1, and others run."""
    await ens.store.add([told(POLITE, num_nodes=2, ranks_per_node=2), *others])
    job = ens.batch("--idle-timeout=0", job_mode="mpi", settings=settings)
    await ens.settle(job, State.RUNNING)
    wide = await ens.task(1)
    await ens.eventually(lambda: ens.output(wide).count("ready") == 4)
    return job


def assert_asked(output: str, settings: dict[str, str]) -> None:
    """Check that a step's ranks were asked to end; Hydra's own srun may be first, and kill its ranks."""
    assert output.count("ready") == 4
    assert output.count("asked") == 4 or settings == {}


async def test_wide_and_narrow_tasks_run_side_by_side(
    ens: SlurmEnsemble, settings: dict[str, str], flags: list[str]
) -> None:
    rank = [sys.executable, "-c", RANK]
    wide = NewTask(
        command=rank,
        name="wide",
        num_nodes=2,
        ranks_per_node=2,
        mpi_flags=flags,
        output=Output.FILE,
    )
    narrow = [told(f"echo $SLURMD_NODENAME; exit {code}") for code in (0, 3, 0, 77)]
    missing = NewTask(command=["no-such-program"], name="missing", output=Output.FILE)
    await ens.store.add([wide, *narrow, missing])
    job = ens.batch("--idle-timeout=0", job_mode="mpi", settings=settings)
    assert await job.end() == "COMPLETED 0:0", job.log
    tasks, nodes = await ens.tasks(), await ens.nodes_of()
    first, second = nodes[tasks[0].id].split(",")
    assert sorted(lines(ens.output(tasks[0]))) == [
        f"{rank} 4 {node}" for rank, node in enumerate([first, first, second, second])
    ]
    for task in tasks[1:5]:
        assert nodes[task.id] in lines(ens.output(task))
    assert [task.exit_code for task in tasks[:5]] == [0, 0, 3, 0, 77]
    assert tasks[5].cause is Cause.COULD_NOT_START


async def test_a_killed_task_is_asked_first_on_every_node(
    ens: SlurmEnsemble, settings: dict[str, str], flags: list[str]
) -> None:
    job = await start(ens, settings, told("sleep 600"))
    await ens.store.kill([1, 2], reason="diverged")
    assert await job.end() == "COMPLETED 0:0", job.log
    assert await ens.states() == [State.USER_KILLED] * 2
    assert_asked(ens.output(await ens.task(1)), settings)


async def test_a_drain_ends_what_runs_on_all_nodes(
    ens: SlurmEnsemble, settings: dict[str, str], flags: list[str]
) -> None:
    job = await start(ens, settings, told("sleep 600"), told(STUBBORN))
    ens.slurm.run("scancel", "--batch", "--signal=TERM", job.id)
    assert await job.end() == "COMPLETED 0:0", job.log
    assert await ens.states() == [State.RESTART_READY] * 3
    assert_asked(ens.output(await ens.task(1)), settings)


async def test_scancel_leaves_nothing_behind(
    ens: SlurmEnsemble, settings: dict[str, str], flags: list[str]
) -> None:
    job = await start(ens, settings, told("sleep 600"), told(STUBBORN))
    ens.slurm.run("scancel", job.id)
    await ens.settle(job, State.RESTART_READY)
    assert await job.end() == "CANCELLED 0:0", job.log
    for task in await ens.tasks():
        assert await ens.runs(task.id) == [Outcome.TIMEOUT]


@pytest.mark.timeout(240)
async def test_a_lost_node_s_tasks_run_elsewhere_and_it_gets_no_more(
    ens: SlurmEnsemble, settings: dict[str, str], flags: list[str]
) -> None:
    go = ens.site.path / "go"
    first = f"test $ENSEMBLE_ATTEMPT -gt 1 || until test -e {go}; do sleep 0.1; done"
    await ens.store.add([told(first, num_nodes=2), witnessed(first), witnessed(first)])
    sbatch = ("--no-kill", *FOUR_NODES)
    job = ens.batch("--idle-timeout=0", job_mode="mpi", settings=settings, sbatch=sbatch)
    await ens.settle(job, State.RUNNING)
    (wide,) = [task for task in await ens.tasks() if task.num_nodes == 2]
    bad = (await ens.store.detail(wide.id)).attempts[0].nodes[1]
    try:
        with ens.slurm.without(bad):
            ens.slurm.declare_down(bad)
            await ens.store.add([witnessed("sleep 0.2") for _ in range(12)])
            await job.until("node.set_aside", within_s=90)
            go.touch()
            assert await job.end(within_s=90) == "COMPLETED 0:0", job.log
    finally:
        go.unlink(missing_ok=True)
    assert set(await ens.states()) == {State.JOB_FINISHED}, job.log
    lost, done = (await ens.store.detail(wide.id)).attempts
    assert (lost.outcome, lost.cause, done.outcome) == (
        Outcome.LOST, Cause.NODE_LOST, Outcome.DONE,
    )  # fmt: skip
    assert bad not in {node for attempt in await ens.store.pool.fetch(
        "SELECT unnest(nodes) AS node FROM attempt WHERE outcome = 'done'"
    ) for node in attempt}  # fmt: skip
    assert f"node={bad} reason='{bad} was set aside: Slurm took it out of the job'" in job.log
    await check(ens)


@pytest.mark.timeout(240)
async def test_tasks_start_once_the_controller_is_back(
    ens: SlurmEnsemble, settings: dict[str, str], flags: list[str]
) -> None:
    await ens.store.add([told("sleep 1; echo ran") for _ in range(20)])
    job = ens.batch("--idle-timeout=0", job_mode="mpi", settings=settings)
    await job.until("launcher.progress")
    with ens.slurm.without_controller():
        await ens.eventually(lambda: "srun: error" in everything(ens), within_s=30)
    assert await job.end(within_s=150) == "COMPLETED 0:0", job.log
    assert await ens.states() == [State.JOB_FINISHED] * 20
    for task in await ens.tasks():
        assert await ens.outcomes(task.id) == [Outcome.DONE]
        assert "ran" in lines(ens.output(task))


@pytest.mark.timeout(240)
async def test_a_program_whose_own_steps_are_refused_runs_once(
    ens: SlurmEnsemble, settings: dict[str, str], flags: list[str]
) -> None:
    # Refused as while slurmctld is away, though it is not.
    away = "sed s/^SlurmctldPort=.*/SlurmctldPort=1/ $SLURM_CONF > away.conf"
    refused = f"{away}; SLURM_CONF=$PWD/away.conf srun true"
    silent = told(f"echo x >> ../silent; {refused}", name="silent")
    loud = told(f"echo worked; echo x >> ../loud; {refused}", name="loud")
    await ens.store.add([silent, loud])
    job = ens.batch("--idle-timeout=0", job_mode="mpi", settings=settings)
    assert await job.end(within_s=120) == "COMPLETED 0:0", job.log
    for task in await ens.tasks():
        assert "srun: error: Unable to" in ens.output(task)
        assert (task.cause, task.exit_code) == (Cause.EXIT_CODE, 1), ens.output(task)
        assert (ens.workdir(task).parent / task.name).read_text() == "x\n"


async def test_a_step_that_is_refused_for_good_is_an_error_at_once(
    ens: SlurmEnsemble, settings: dict[str, str], flags: list[str]
) -> None:
    if "MPI_LAUNCHER" not in settings:
        pytest.skip("flags of the task are Hydra's, not its srun's")
    await ens.store.add([told("true", mpi_flags=["-n9999", "--ntasks-per-node=9999"])])
    job = ens.batch("--idle-timeout=0", job_mode="mpi", settings=settings)
    assert await job.end() == "COMPLETED 0:0", job.log
    task = await ens.task(1)
    assert task.cause is Cause.COULD_NOT_START
    assert task.reason == "Slurm would not start sh: More processors requested than permitted"


async def test_what_ends_well_before_a_drain_can_signal_it_is_done(
    ens: SlurmEnsemble, settings: dict[str, str], flags: list[str]
) -> None:
    if "MPI_LAUNCHER" not in settings:
        pytest.skip("nobody needs to be asked where mpiexec itself takes the TERM")
    await ens.store.add([told("until test -e ../go; do sleep 0.1; done") for _ in range(2)])
    job = ens.batch("--persistent", job_mode="mpi", settings=settings)
    await ens.settle(job, State.RUNNING)
    slurmctld = ens.slurm.daemons["slurmctld"]
    slurmctld.send_signal(signal.SIGSTOP)  # it takes its time to tell the step of each task
    try:
        os.kill(job.launcher(), signal.SIGTERM)
        await job.until("launcher.draining")
        (ens.workdir(await ens.task(1)).parent / "go").touch()
        await ens.reach(State.JOB_FINISHED)
    finally:
        slurmctld.send_signal(signal.SIGCONT)
    await job.end()
    assert [await ens.outcomes(task_id) for task_id in (1, 2)] == [[Outcome.DONE]] * 2


def everything(ens: SlurmEnsemble) -> str:
    return "".join(path.read_text() for path in (ens.site.path / "data").rglob("*.out"))
