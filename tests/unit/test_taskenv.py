from __future__ import annotations

import pytest

from ensemble.core.model import Need, Output
from ensemble.core.packing import Slot
from ensemble.core.wire import Welcome, Work
from ensemble.drivers.taskenv import Environs

#: What an MPI launch gives its ranks.
MPI = {
    "PMI_RANK": "3",
    "PMI_SIZE": "8",
    "PMI_FD": "5",
    "PMIX_RANK": "3",
    "PMIX_NAMESPACE": "n",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "PALS_RANKID": "3",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "0",
    "MPI_LOCALRANKID": "0",
    "HYDI_CONTROL_FD": "6",
    "LD_PRELOAD": "libmpi.so",
}


def welcome(**environ: str) -> Welcome:
    return Welcome(
        node="n0",
        cores=[[0], [1]],
        gpus=[],
        memory_mb=None,
        slots_per_node=1,
        site=b"/site",
        marker_prefix="ens.7.",
        environ={k.encode(): v.encode() for k, v in {"PATH": "/bin", **environ}.items()},
        grace_s=10.0,
        error_tail_lines=10,
        is_pinned=True,
    )


def work(*, threads: int | None = None, gpus: int = 0, **environ: str) -> Work:
    return Work(
        id=41,
        attempt=2,
        name="t",
        workflow="screen",
        argv=("true",),
        workdir="data/0/t_41",
        output=Output.FILE,
        environ=environ,
        env_script=None,
        parent_ids=(3, 5),
        need=Need(threads=threads, gpus=gpus),
    )


def env_of(task: Work, *, gpus=(), pilot=None, launcher=None) -> dict[str, str]:
    environs = Environs(welcome(**(launcher or {})), pilot or {})
    return environs.of(task, Slot(cpus=(0,), gpus=gpus))


def test_a_task_knows_who_it_is():
    env = env_of(work())
    assert {name: value for name, value in env.items() if name != "PATH"} == {
        "ENSEMBLE_SITE": "/site",
        "ENSEMBLE_TASK_ID": "41",
        "ENSEMBLE_ATTEMPT": "2",
        "ENSEMBLE_WORKFLOW": "screen",
        "ENSEMBLE_PARENT_IDS": "3,5",
        "ENSEMBLE_NODES": "n0",
        "ENSEMBLE_TASK_TOKEN": "ens.7.41.2",
    }


def test_a_task_cannot_pretend_to_be_another():
    env = env_of(work(ENSEMBLE_TASK_ID="1", ENSEMBLE_TASK_TOKEN="x"))
    assert env["ENSEMBLE_TASK_ID"] == "41"
    assert env["ENSEMBLE_TASK_TOKEN"] == "ens.7.41.2"


def test_nothing_of_the_pilots_mpi_launch_reaches_a_task():
    env = env_of(work(gpus=1), gpus=("0",), pilot={**MPI, "HOME": "/other"})
    assert not MPI.keys() & env.keys()
    assert "HOME" not in env
    assert env["PATH"] == "/bin"


@pytest.mark.parametrize("name", ["TMPDIR", "HOSTNAME", "SLURMD_NODENAME", "XDG_RUNTIME_DIR"])
def test_what_is_local_to_a_node_is_the_pilots(name):
    env = env_of(work(), pilot={name: "here"}, launcher={name: "there"})
    assert env[name] == "here"
    assert env_of(work(**{name: "mine"}), pilot={name: "here"})[name] == "mine"


def test_a_task_sees_its_gpus_by_the_names_that_the_pilot_sees():
    pilot = {"CUDA_VISIBLE_DEVICES": "4,5,6"}
    env = env_of(work(gpus=2), gpus=("5", "6"), pilot=pilot)
    assert env["CUDA_VISIBLE_DEVICES"] == "5,6"
    assert "ROCR_VISIBLE_DEVICES" not in env


def test_each_kind_of_gpu_reads_its_own_variable_where_nothing_tells_whose_they_are():
    env = env_of(work(gpus=1), gpus=("1",))
    assert env["CUDA_VISIBLE_DEVICES"] == env["ROCR_VISIBLE_DEVICES"] == "1"
    assert env["ZE_AFFINITY_MASK"] == "1"


def test_a_task_sees_no_more_gpus_than_it_was_given_whatever_it_says():
    env = env_of(work(gpus=1, CUDA_VISIBLE_DEVICES="0,1,2,3"), gpus=("2",))
    assert env["CUDA_VISIBLE_DEVICES"] == "2"


def test_a_launchers_gpus_are_not_those_of_another_node():
    launcher = {"CUDA_VISIBLE_DEVICES": "0,1"}
    env = env_of(work(), pilot={"CUDA_VISIBLE_DEVICES": "6,7"}, launcher=launcher)
    assert env["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_the_number_of_threads_is_told_only_where_it_was_stated():
    assert "OMP_NUM_THREADS" not in env_of(work())
    assert env_of(work(threads=3))["OMP_NUM_THREADS"] == "3"
    assert env_of(work(threads=3, OMP_NUM_THREADS="1"))["OMP_NUM_THREADS"] == "1"
    assert env_of(work(), launcher={"OMP_NUM_THREADS": "9"})["OMP_NUM_THREADS"] == "9"
    assert env_of(work(threads=3), launcher={"OMP_NUM_THREADS": "9"})["OMP_NUM_THREADS"] == "3"


def test_what_a_task_states_goes_before_what_the_launcher_had():
    assert env_of(work(PATH="/mine"))["PATH"] == "/mine"


def test_one_task_does_not_change_the_next_ones_environment():
    environs = Environs(welcome(), {})
    first = environs.of(work(threads=2, gpus=1, A="1"), Slot(cpus=(), gpus=("0",)))
    first["B"] = "2"
    second = environs.of(work(), Slot(cpus=(), gpus=()))
    assert not {"A", "B", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"} & second.keys()
    assert environs.is_ready(None)
    assert not environs.is_ready("setup.sh")
