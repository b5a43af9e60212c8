"""Command lines of drivers.mpi, run by the MPI launchers that are installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ensemble.config import MpiSettings
from ensemble.core.model import Claim, Node, Placement
from ensemble.drivers import mpi, mpienv, mpiwords
from ensemble.drivers.mpi import Flavor, MpiLauncher
from ensemble.drivers.nodes import find_allocation

# One write: two ranks' pieces would mix.
WORLD = (
    "import os; from mpi4py import MPI; c = MPI.COMM_WORLD; "
    "os.write(1, f'rank {c.rank} of {c.size}, sum {c.allreduce(1)}\\n'.encode())"
)
SIZES = 'echo "rank ${PMI_RANK:-$OMPI_COMM_WORLD_RANK} of ${PMI_SIZE:-$OMPI_COMM_WORLD_SIZE} on ${FAKE_HOST:-here} [$GREETING]"'
#: Stands for ssh: runs the command here with the host's name and a directory of its own in its environment, and no
#: GREETING.
FAKE_SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
export FAKE_HOST="$1" TMPDIR="$TMPDIR/$1"; shift
mkdir -p "$TMPDIR"
unset GREETING
exec sh -c "$*"
"""
GREETING = 'a;b c="d",e\''


async def find_mpich() -> MpiLauncher:
    path = Path(sys.executable).parent / "mpiexec"
    if not path.exists():
        pytest.skip("NOT TESTED with MPICH: no mpiexec beside this python (pip install mpich)")
    return await detect(str(path), Flavor.MPICH)


async def find_openmpi() -> MpiLauncher:
    for name in ("mpirun.openmpi", "mpirun", "mpiexec"):
        if (path := shutil.which(name)) and (found := await detect(path)).flavor in {
            Flavor.OPENMPI4,
            Flavor.OPENMPI5,
        }:
            return found
    pytest.skip("NOT TESTED with Open MPI: no mpirun of it on PATH (apt-get install openmpi-bin)")


async def detect(path: str, flavor: Flavor | None = None) -> MpiLauncher:
    found = await mpi.detect(MpiSettings(command=path), scheduler="local", environ=os.environ)
    assert flavor in (None, found.flavor)
    return found


@pytest.fixture(
    params=[
        pytest.param(find_mpich, marks=pytest.mark.mpi),
        pytest.param(find_openmpi, marks=pytest.mark.openmpi),
    ],
    ids=["mpich", "openmpi"],
)
async def launcher(request) -> MpiLauncher:
    return await request.param()


def claim(*argv: str, nodes: int = 1, ranks: int = 1, **fields) -> Claim:
    return Claim(
        id=1, attempt=1, name="t", workflow="w", app=None, argv=argv, workdir=".",
        num_nodes=nodes, ranks_per_node=ranks, **fields,
    )  # fmt: skip


async def virtual(number: int) -> Placement:
    return Placement(nodes=(await find_allocation({}, virtual_nodes=number, now=0.0)).nodes)


def environ(launcher: MpiLauncher, tmp_path: Path, extra: dict[str, str] | None) -> dict[str, str]:
    return (
        mpienv.clean_environ(os.environ, launcher.flavor)
        | mpienv.environ_for(launcher.flavor, is_root=os.geteuid() == 0)
        | {"TMPDIR": str(tmp_path)}
        | (extra or {})
    )


def start(
    launcher: MpiLauncher, argv: list[str], tmp_path: Path, extra=None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv, cwd=tmp_path, env=environ(launcher, tmp_path, extra), stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run(launcher: MpiLauncher, argv: list[str], tmp_path: Path, extra=None) -> tuple[int, str]:
    with start(launcher, argv, tmp_path, extra) as process:
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, output


async def test_two_virtual_nodes_of_two_ranks(launcher, tmp_path):
    argv = launcher.argv(
        claim("sh", "-c", SIZES, nodes=2, ranks=2), await virtual(2), {"GREETING": GREETING}
    )
    code, output = run(launcher, argv, tmp_path, {"GREETING": GREETING})
    assert code == 0, output
    assert sorted(output.splitlines()) == [f"rank {n} of 4 on here [{GREETING}]" for n in range(4)]


@pytest.mark.mpi
async def test_hydra_on_virtual_nodes_ignores_a_scheduler_in_the_environment(tmp_path):
    launcher = await find_mpich()
    slurm = {
        "SLURM_JOB_ID": "5",
        "SLURM_NODELIST": "nid[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_TASKS_PER_NODE": "1(x2)",
    }
    code, output = run(
        launcher, launcher.argv(claim("echo", "hi", ranks=2), await virtual(1)), tmp_path, slurm
    )
    assert (code, output) == (0, "hi\nhi\n")


async def test_mpi4py_sees_a_world_of_two(launcher, tmp_path):
    # The mpi4py wheel finds the MPICH wheel's library by itself; for another one it must be told.
    extra = None if launcher.flavor is Flavor.MPICH else openmpi_library()
    argv = launcher.argv(claim(sys.executable, "-c", WORLD, ranks=2), await virtual(1))
    code, output = run(launcher, argv, tmp_path, extra)
    assert code == 0, output
    assert {"rank 0 of 2, sum 2", "rank 1 of 2, sum 2"} <= set(output.splitlines()), output


def openmpi_library() -> dict[str, str]:
    for folder in (
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64/openmpi/lib",
        "/usr/lib/aarch64-linux-gnu",
    ):
        for path in Path(folder).glob("libmpi.so.40"):
            return {
                "MPI4PY_LIBMPI": str(path),
                "MPI4PY_MPIABI": "openmpi",
                "OMPI_MCA_btl": "self,vader,tcp",
            }
    pytest.skip("NOT TESTED with mpi4py on Open MPI: its libmpi.so.40 is not at a place known here")


def by_ssh(launcher: MpiLauncher, tmp_path: Path) -> tuple[str, ...]:
    """Return the flags that have a launcher reach hosts through something that stays here."""
    ssh = tmp_path / "fakessh"
    ssh.write_text(FAKE_SSH)
    ssh.chmod(0o755)
    return {
        Flavor.MPICH: ("-launcher", "ssh", "-launcher-exec", str(ssh)),
        # Two daemons of 4.1 on one host race for a shared topology, and one may crash.
        Flavor.OPENMPI4: (
            *("--mca", "plm", "rsh", "--mca", "plm_rsh_agent", str(ssh)),
            *("--mca", "rtc", "^hwloc"),
        ),
        Flavor.OPENMPI5: ("--prtemca", "plm_ssh_agent", str(ssh)),
    }[launcher.flavor]


TWO_HOSTS = Placement(nodes=(Node(name="nida", cores=2), Node(name="nidb", cores=2)))


async def test_two_hosts_get_their_ranks_and_the_exported_variables(launcher, tmp_path):
    flags = by_ssh(launcher, tmp_path)
    placement = TWO_HOSTS
    task = claim("sh", "-c", SIZES, nodes=2, ranks=2, mpi_flags=flags)
    extra = {"GREETING": GREETING}
    code, output = run(launcher, launcher.argv(task, placement, extra), tmp_path, extra)
    assert code == 0, output
    hosts = ["nida", "nida", "nidb", "nidb"]
    wanted = [f"rank {n} of 4 on {host} [{GREETING}]" for n, host in enumerate(hosts)]
    assert sorted(line for line in output.splitlines() if line.startswith("rank")) == wanted


async def test_a_lost_host_is_recognized(launcher, tmp_path):
    # What dies of a host first is the launcher's own process there: the parent of its ranks.
    body = 'test "$FAKE_HOST" = nidb && kill -KILL $PPID $$; exec sleep 60'
    flags = by_ssh(launcher, tmp_path)
    task = claim("sh", "-c", body, nodes=2, ranks=1, mpi_flags=flags)
    code, output = run(launcher, launcher.argv(task, TWO_HOSTS), tmp_path)
    assert code != 0
    tell = (
        mpiwords.may_have_lost_a_node if launcher.flavor is Flavor.MPICH else mpiwords.lost_a_node
    )
    assert tell(launcher.flavor, code, output), output
    assert not mpiwords.failed_to_start(launcher.flavor, code, output)


@pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV"])
async def test_a_signal_is_told_from_the_exit_status_of_its_number(launcher, tmp_path, name):
    number = signal.Signals[f"SIG{name}"].value
    for body, status in [(f"kill -{name} $$; sleep 9", 128 + number), (f"exit {number}", number)]:
        argv = launcher.argv(claim("sh", "-c", body, ranks=2), await virtual(1))
        code, output = run(launcher, argv, tmp_path)
        if mpiwords.may_have_lost_a_node(launcher.flavor, code, output):
            continue  # of two ranks that die at once, Hydra sometimes loses count
        assert mpiwords.program_status(launcher.flavor, code, output) == status, output
        assert not mpiwords.lost_a_node(launcher.flavor, code, output), output


async def test_stated_threads_bind_each_rank_to_its_own_core(launcher, tmp_path):
    cpus = Path("/sys/devices/system/cpu")
    siblings = cpus.glob("cpu[0-9]*/topology/thread_siblings_list")
    if len({path.read_text() for path in siblings}) < 2:
        pytest.skip("NOT TESTED: binding needs two physical cores")
    placement = Placement(nodes=(Node(name="localhost", cores=2),))
    show = "import os; print('cores', *sorted(os.sched_getaffinity(0)), flush=True)"
    task = claim(sys.executable, "-c", show, ranks=1, threads_per_rank=1)
    code, output = run(launcher, launcher.argv(task, placement), tmp_path)
    assert code == 0, output
    bound = next(line for line in output.splitlines() if line.startswith("cores")).split()[1:]
    assert 1 <= len(bound) < os.cpu_count()


async def test_a_failing_rank_is_no_failed_start(launcher, tmp_path):
    argv = launcher.argv(claim("sh", "-c", "echo boom; exit 3", ranks=2), await virtual(1))
    code, output = run(launcher, argv, tmp_path)
    assert code == 3
    assert "boom" in output
    assert not mpiwords.failed_to_start(launcher.flavor, code, output)


@pytest.mark.parametrize(
    "program", ["./missing", "no-such-program", "./no-exec", "./folder", "./bad-interpreter"]
)
async def test_a_program_that_cannot_start_is_recognized(launcher, tmp_path, program):
    (tmp_path / "no-exec").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad-interpreter").write_text("#!/no/such/interpreter\n")
    (tmp_path / "bad-interpreter").chmod(0o755)
    code, output = run(
        launcher, launcher.argv(claim(program, "x", ranks=2), await virtual(1)), tmp_path
    )
    assert code != 0
    assert mpiwords.failed_to_start(launcher.flavor, code, output), output


async def test_term_ends_a_launch_as_its_plan_says(launcher, tmp_path):
    # Ignores TERM but tells of it, in a file: output that late may be dropped.
    body = "trap 'echo told >told' TERM; echo up; for i in 1 2 3 4 5 6; do sleep 30 & wait $!; kill $!; done"
    argv = launcher.argv(claim("sh", "-c", body), await virtual(1))
    with start(launcher, argv, tmp_path) as process:
        try:
            assert process.stdout.readline() == "up\n"
            process.send_signal(signal.SIGTERM)
            if launcher.end_plan.escalates:
                assert process.wait(timeout=20) != 0
            else:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
        finally:
            process.kill()
    assert (tmp_path / "told").read_text() == "told\n"
