"""Pilots that srun starts on the four nodes of a real Slurm."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from ensemble.core.model import Node
from ensemble.drivers import linkfile, pilotline
from ensemble.drivers.guardlink import guard_argv
from ensemble.drivers.mpi import Flavor, MpiLauncher
from tests.pilots import PILOT, is_alive, stories
from tests.slurm.cluster import NODES, Slurm

PMI2 = pytest.param(("--mpi=pmi2",), id="pmi2", marks=pytest.mark.mpi)
NO_PMI = pytest.param(("--mpi=none",), id="no-pmi")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pilot.py").write_text(PILOT)
    linkfile.make(["127.0.0.1"], 7, len(NODES), launcher_id=3).write(tmp_path / "link.json")
    return tmp_path


def submit(slurm: Slurm, folder: Path, flags: tuple[str, ...], *sbatch: str) -> str:
    nodes = [Node(name=name, cores=4) for name in NODES]
    launcher = MpiLauncher(flavor=Flavor.SRUN, command=("srun",), flags=flags)
    program = [sys.executable, "-P", str(folder / "pilot.py"), str(folder), "4", "20"]
    argv = pilotline.pilot_launch_argv(launcher, nodes, guard_argv(program, is_exit_zero=True))
    return slurm.batch(f"{shlex.join(argv)}; echo ended with $?", "-N4", "--exclusive", *sbatch)


@pytest.mark.parametrize("flags", [PMI2, NO_PMI])
async def test_srun_starts_one_pilot_on_every_node(slurm, folder, flags, eventually):
    job = submit(slurm, folder, flags)
    told = await eventually(lambda: stories(folder, 4), within_s=40)
    assert [(each["rank"], each["size"], each["place"]) for each in told] == [
        (rank, 4, 0) for rank in range(4)
    ]
    assert [each["node"] for each in told] == list(NODES)
    if flags == ("--mpi=pmi2",):
        assert {(each["how"], each["note"]) for each in told} == {("mpi", None)}
        assert told[0]["hosts"] == list(NODES)
    else:
        assert {each["how"] for each in told} == {"environ"}
        assert all(each["note"] for each in told)
    (folder / "stop").touch()
    assert slurm.wait(job) == "COMPLETED"
    assert "ended with 0" in slurm.output(job)


@pytest.mark.parametrize("flags", [PMI2, NO_PMI])
@pytest.mark.parametrize("victim", ["pilot", "guard"])
async def test_the_others_outlive_a_killed_rank(slurm, folder, flags, victim, eventually):
    job = submit(slurm, folder, flags)
    told = await eventually(lambda: stories(folder, 4), within_s=40)
    os.kill(told[1][victim], signal.SIGKILL)
    await eventually(lambda: not is_alive(told[1]["guard"]))
    (folder / "stop0").touch()
    await eventually(lambda: not is_alive(told[0]["guard"]))
    assert slurm.state(job) == "RUNNING"
    assert [is_alive(each["pilot"]) for each in told] == [False, False, True, True]
    (folder / "stop").touch()
    slurm.wait(job)
    assert f"ended with {0 if victim == 'pilot' else 137}" in slurm.output(job)


async def test_the_others_outlive_a_lost_node(slurm, folder, eventually):
    # Without --no-kill at sbatch, Slurm ends the whole job with its first lost node.
    job = submit(slurm, folder, ("--mpi=none",), "--no-kill")
    told = await eventually(lambda: stories(folder, 4), within_s=40)
    with slurm.without("n3"):
        slurm.declare_down("n3")
        await eventually(lambda: slurm.field(job, "NumNodes") == "3")
        assert [is_alive(each["pilot"]) for each in told] == [True, True, True, False]
        assert "ended with" not in slurm.output(job)
        (folder / "stop").touch()
        assert slurm.wait(job) == "COMPLETED"


def test_srun_reads_a_long_list_of_hosts_from_a_file(slurm, tmp_path):
    nodes = [Node(name=name, cores=4) for name in ("n1", "n2")]
    launcher = MpiLauncher(flavor=Flavor.SRUN, command=("srun",))
    hostfile = tmp_path / "hosts"
    hostfile.write_text(pilotline.hostfile_text(launcher, nodes))
    argv = pilotline.pilot_launch_argv(
        launcher, nodes, ["sh", "-c", "echo on $SLURMD_NODENAME"], hostfile=hostfile
    )
    job = slurm.batch(shlex.join(argv), "-N4", "--exclusive")
    assert slurm.wait(job) == "COMPLETED"
    lines = [line for line in slurm.output(job).splitlines() if line.startswith("on")]
    assert sorted(lines) == ["on n1", "on n2"]
