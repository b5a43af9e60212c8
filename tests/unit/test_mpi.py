from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ensemble.config import MpiSettings
from ensemble.core.model import Claim, Node, Placement
from ensemble.drivers import mpi
from ensemble.drivers.mpi import Flavor, MpiLauncher
from ensemble.errors import LaunchError

REAL = Placement(nodes=(Node(name="h1", cores=16, gpus=4), Node(name="h2", cores=16, gpus=4)))
VIRTUAL = Placement(
    nodes=(Node(name="pc:0", cores=1, is_virtual=True), Node(name="pc:1", cores=1, is_virtual=True))
)


def line(flavor, placement=REAL, *, env=None, flags=(), **fields):
    claim = Claim(
        id=41, attempt=1, name="t", workflow="w", app=None, argv=("prog", "a b"), workdir="w",
        num_nodes=len(placement.nodes), **{"ranks_per_node": 4} | fields,
    )  # fmt: skip
    launcher = MpiLauncher(flavor=flavor, command=("RUN",), flags=flags)
    argv = launcher.argv(claim, placement, env or {})
    assert argv[0] == "RUN"
    assert argv[-2:] == ["prog", "a b"]
    return " ".join(argv[1:-2])


# Command lines


@pytest.mark.parametrize(
    ("flavor", "expected"),
    [
        (
            "openmpi4",
            "--host h1:4,h2:4 --map-by ppr:4:node --oversubscribe --bind-to none -x V -np 8",
        ),
        (
            "openmpi5",
            "--host h1:4,h2:4 --map-by ppr:4:node:OVERSUBSCRIBE --bind-to none -x V -np 8",
        ),
        ("mpich", "-hosts h1,h2 -ppn 4 -n 8"),
        ("intel", "-hosts h1,h2 -ppn 4 -genv I_MPI_PIN off -n 8"),
        (
            "srun",
            "-n 8 --cpu-bind=none -N 2 --ntasks-per-node=4 -w h1,h2 --exact --overlap --mem=0 -c 4 "
            "--input=none --export=ALL -K1 -J ens-41",
        ),
        ("pals", "-n 8 --ppn 4 --hosts h1,h2 --cpu-bind none --env V=x;y z"),
        ("aprun", "-n 8 -N 4 -L h1,h2 -cc none -e V=x;y z"),
        ("jsrun", "-n 8 -a 1 -c 4 -r 4 -g 0 -b none"),
        ("flux", "-n 8 -N 2 --exclusive --requires=hosts:h1,h2 -o cpu-affinity=off"),
    ],
)
def test_real_nodes(flavor, expected):
    assert line(Flavor(flavor), env={"V": "x;y z"}) == expected


@pytest.mark.parametrize(
    ("flavor", "expected"),
    [
        (
            "openmpi4",
            "--host h1:4,h2:4 --map-by ppr:4:node:PE=2 --oversubscribe --bind-to core:overload-allowed -np 8",
        ),
        (
            "openmpi5",
            "--host h1:4,h2:4 --map-by ppr:4:node:PE=2:OVERSUBSCRIBE --bind-to core:overload-allowed -np 8",
        ),
        ("mpich", "-hosts h1,h2 -ppn 4 -bind-to core:2 -n 8"),
        ("intel", "-hosts h1,h2 -ppn 4 -genv I_MPI_PIN_DOMAIN 4 -n 8"),
        (
            "srun",
            "-n 8 --cpu-bind=cores -N 2 --ntasks-per-node=4 -w h1,h2 --exact --overlap --mem=0 -c 4 "
            "--threads-per-core=2 --gpus-per-node=4 --input=none --export=ALL -K1 -J ens-41",
        ),
        ("pals", "-n 8 --ppn 4 --hosts h1,h2 --depth 4 --cpu-bind depth"),
        ("aprun", "-n 8 -N 4 -L h1,h2 -d 4 -j 2 -cc depth"),
        ("jsrun", "-n 8 -a 1 -c 2 -r 4 -g 1 -b packed:2"),
        (
            "flux",
            "-n 8 -N 2 --exclusive --requires=hosts:h1,h2 -c 2 -g 1 -o gpu-affinity=per-task "
            "-o cpu-affinity=per-task",
        ),
    ],
)
def test_stated_threads_and_gpus(flavor, expected):
    assert line(Flavor(flavor), threads_per_rank=4, threads_per_core=2, gpus_per_rank=1) == expected


@pytest.mark.parametrize(
    ("flavor", "expected"),
    [
        ("openmpi4", "--oversubscribe --bind-to none -np 8"),
        ("openmpi5", "--map-by slot:OVERSUBSCRIBE --bind-to none -np 8"),
        ("mpich", "-launcher fork -rmk user -n 8"),
        ("intel", "-launcher fork -genv I_MPI_PIN off -n 8"),
        ("srun", "-n 8 --cpu-bind=none --input=none --export=ALL -K1 -J ens-41"),
        ("pals", "-n 8 --cpu-bind none"),
        ("aprun", "-n 8 -cc none"),
        ("jsrun", "-n 8 -a 1 -c 1 -r 4 -g 0 -b none"),
        ("flux", "-n 8 -o cpu-affinity=off"),
    ],
)
def test_virtual_nodes_are_never_named(flavor, expected):
    text = line(Flavor(flavor), VIRTUAL)
    assert text == expected
    assert "pc" not in line(Flavor(flavor), VIRTUAL, cpu_affinity="core", flags=())


@pytest.mark.parametrize("flavor", Flavor)
def test_the_tasks_flags_follow_the_sites(flavor):
    assert line(flavor, flags=("--site", "x y"), mpi_flags=("--own",)).endswith("--site x y --own")


@pytest.mark.parametrize("flavor", Flavor)
def test_too_many_threads_are_not_bound(flavor):
    text = line(flavor, threads_per_rank=8)
    assert "core:" not in text
    assert "PE=" not in text
    assert "depth" not in text.replace("--depth", "")


def test_srun_with_more_ranks_than_cores():
    text = line(Flavor.SRUN, ranks_per_node=32)
    assert "--overcommit" in text
    assert " -c " not in text


def test_aprun_wants_node_numbers():
    placement = Placement(nodes=(Node(name="nid00012", cores=4), Node(name="nid00000", cores=4)))
    assert "-L 12,0 " in line(Flavor.APRUN, placement)


def test_a_tasks_own_binding():
    assert "--bind-to socket " in line(Flavor.OPENMPI4, cpu_affinity="socket", threads_per_rank=2)
    assert "PE=" not in line(Flavor.OPENMPI4, cpu_affinity="socket", threads_per_rank=2)
    assert "--cpu-bind list:0-3" in line(Flavor.PALS, cpu_affinity="list:0-3")
    assert "-bind-to" not in line(Flavor.MPICH, cpu_affinity="none", threads_per_rank=2)


def test_refuses_an_argument_that_starts_another_program():
    claim = Claim(
        id=7, attempt=1, name="t", workflow="w", app=None, argv=("a", ":", "b"), workdir="w"
    )
    with pytest.raises(LaunchError, match="task 7 has the argument ':'"):
        MpiLauncher(flavor=Flavor.MPICH, command=("m",)).argv(claim, VIRTUAL)


# Versions


@pytest.mark.parametrize(
    ("text", "flavor"),
    [
        ("mpirun.openmpi (OpenRTE) 4.1.4\n\nReport bugs to http://www.open-mpi.org/", "openmpi4"),
        ("mpirun (Open MPI) 4.1.4\n", "openmpi4"),
        ("mpirun (Open MPI) 5.0.11\n", "openmpi5"),
        ("mpirun (Open MPI) 10.0.1\n", "openmpi5"),
        ("HYDRA build details:\n    Version:                                 5.0.2\n", "mpich"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005", "intel"),
        ("mpirun (IBM Spectrum MPI) 10.4.0.03rtm4", "openmpi4"),
        ("slurm 22.05.8", "srun"),
        ("slurm-wlm 22.05.8", "srun"),
        ("commands:    \t\t0.53.0\nlibflux-core:\t\t0.53.0\n", "flux"),
        ("mpiexec: command not found", None),
        ("", None),
    ],
)
def test_parse_version(text, flavor):
    assert mpi.parse_version(text) == flavor


# Ends


def test_every_flavor_has_a_plan():
    assert set(mpi.END_PLANS) == set(Flavor)
    plan = MpiLauncher(flavor=Flavor.SRUN, command=("srun",)).end_plan
    assert plan.term == "step"
    assert not mpi.END_PLANS[Flavor.MPICH].escalates


def test_a_step_is_found_by_name_and_signalled():
    assert mpi.step_lookup_argv("12") == ["squeue", "-h", "-s", "-j", "12", "-o", "%i|%j"]
    text = "12.extern|extern\n12.batch|batch\n12.3|ens-41\n12.10|ens-41\n12.4|ens-4|1\n12.5|ens-4\n"
    assert mpi.parse_step(text, "ens-41") == "10"
    assert mpi.parse_step(text, "ens-4") == "5"
    assert mpi.parse_step("12_7.2|ens-1", "ens-1") == "2"
    assert mpi.parse_step(text, "ens-9") is None
    assert mpi.parse_step("", "ens-9") is None
    assert mpi.scancel_argv("12", "10") == ["scancel", "--signal=TERM", "12.10"]
    assert mpi.scancel_argv("12", "10", None) == ["scancel", "12.10"]


# Finding one


@pytest.fixture
def bin_dir(tmp_path, monkeypatch):
    """A directory of pretended launchers, the only one searched."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def pretend(folder: Path, name: str, version: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return str(path)


async def find(bin_dir, scheduler="local", **settings):
    environ = {"PATH": str(bin_dir)}
    return await mpi.detect(MpiSettings(**settings), scheduler=scheduler, environ=environ)


OPENMPI = "mpirun (Open MPI) 4.1.4"
HYDRA = "HYDRA build details:"


async def test_nothing_found(bin_dir):
    with pytest.raises(
        LaunchError, match=r"pip install 'ensemble-hpc\[mpi\]'.*command = … in \[mpi\]"
    ):
        await find(bin_dir)


async def test_the_wheels_mpiexec_comes_first(bin_dir):
    pretend(bin_dir, "mpiexec", OPENMPI)
    assert (await find(bin_dir)).flavor is Flavor.OPENMPI4
    wheel = pretend(Path(sys.executable).parent, "mpiexec", HYDRA)
    assert await find(bin_dir, flags=["-v"]) == MpiLauncher(
        flavor=Flavor.MPICH, command=(wheel,), flags=("-v",)
    )


async def test_what_does_not_answer_is_passed_over(bin_dir):
    pretend(bin_dir, "mpiexec", "what?")
    (bin_dir / "mpirun").write_text("#!/bin/sh\nexit 1\n")
    (bin_dir / "mpirun").chmod(0o755)
    hydra = pretend(bin_dir, "mpiexec.hydra", HYDRA)
    assert (await find(bin_dir)).command == (hydra,)


async def test_srun_only_within_slurm_and_after_mpirun(bin_dir):
    srun = pretend(bin_dir, "srun", "slurm 22.05.8")
    with pytest.raises(LaunchError):
        await find(bin_dir)
    assert await find(bin_dir, "slurm") == MpiLauncher(flavor=Flavor.SRUN, command=(srun,))
    pretend(bin_dir, "mpirun", OPENMPI)
    assert (await find(bin_dir, "slurm")).flavor is Flavor.OPENMPI4
    assert (await find(bin_dir, "slurm", launcher="srun")).flavor is Flavor.SRUN


async def test_flux_within_flux(bin_dir):
    pretend(bin_dir, "mpirun", OPENMPI)
    flux = pretend(bin_dir, "flux", "commands: 0.88")
    assert await find(bin_dir, "flux") == MpiLauncher(flavor=Flavor.FLUX, command=(flux, "run"))
    assert (await find(bin_dir, launcher="flux", command="flux")).command == (flux, "run")


async def test_settings_choose_among_several(bin_dir):
    pretend(bin_dir, "mpiexec", HYDRA)
    mpirun = pretend(bin_dir, "mpirun", OPENMPI)
    assert (await find(bin_dir, launcher="openmpi4")).command == (mpirun,)
    with pytest.raises(LaunchError, match="no openmpi5 launcher"):
        await find(bin_dir, launcher="openmpi5")


async def test_settings_name_one_that_nobody_knows(bin_dir):
    odd = pretend(bin_dir, "mpiexec", "Site MPI wrapper")
    with pytest.raises(LaunchError):
        await find(bin_dir)
    assert await find(bin_dir, launcher="mpich") == MpiLauncher(flavor=Flavor.MPICH, command=(odd,))


async def test_a_command_with_words(bin_dir):
    path = pretend(bin_dir, "wrap", OPENMPI)
    assert (await find(bin_dir, command="wrap -q mpirun")).command == (path, "-q", "mpirun")
    assert (await find(bin_dir, command=path)).flavor is Flavor.OPENMPI4


@pytest.mark.parametrize("command", ["gone", "", "'", "/nonexistent/mpirun"])
async def test_a_command_that_does_not_exist(bin_dir, command):
    with pytest.raises(LaunchError, match=r"in \[mpi\]"):
        await find(bin_dir, command=command)


async def test_a_command_that_nobody_knows(bin_dir):
    pretend(bin_dir, "wrap", "hello")
    with pytest.raises(LaunchError, match=r"set launcher = …"):
        await find(bin_dir, command="wrap")


async def test_pals_is_known_by_its_place(bin_dir):
    path = pretend(bin_dir / "cray" / "pals" / "1.2", "mpiexec", "mpiexec 1.2")
    os.symlink(path, bin_dir / "mpiexec")
    assert (await find(bin_dir)).flavor is Flavor.PALS
