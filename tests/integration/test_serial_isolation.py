"""A task of serial mode cannot tell that it was started by a rank: nothing of the pilots' launch reaches it."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest

from ensemble.core.model import NewTask
from ensemble.core.states import State
from ensemble.drivers import proctree
from tests.integration.launching import BOTH_MPI, MPICH, WHEEL, Ensemble, mpi_environ, python

pytestmark = WHEEL

#: Written at once: MPI launchers may join the lines of two.
WORLD = """
import os
from mpi4py import MPI
os.write(1, f"{MPI.COMM_WORLD.rank} {MPI.COMM_WORLD.size}\\n".encode())
"""
LOOK = """
import json, os, signal, sys
print(json.dumps({
    "environ": dict(os.environ),
    # The last one is that of the listing itself.
    "files": {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")[:3]},
    "count": len(os.listdir("/proc/self/fd")),
    "stdin": sys.stdin.read(),
    "session": os.getsid(0),
    "group": os.getpgrp(),
    "pid": os.getpid(),
    "parent": os.getppid(),
    "cwd": os.getcwd(),
    "umask": os.umask(0),
    "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "ignored": [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN],
}))
"""
#: What MPI launchers put into their ranks' environment; OMPI_MCA_ is also how users tune theirs.
MARKS = ("PMI_", "PMIX_", "PRTE_", "OPAL_", "HYDI_", "HYDRA_", "MPI_LOCAL", "MPIR_", "GFORTRAN_", "PMI_FD",
         "OMPI_COMM", "OMPI_UNIVERSE", "OMPI_APP", "OMPI_FILE", "OMPI_FIRST", "OMPI_NUM", "OMPI_ARGV",
         "OMPI_COMMAND", "OMPI_MCA_orte", "OMPI_MCA_ess", "OMPI_MCA_pmix", "OMPI_MCA_plm", "OMPI_MCA_mpi",
         "OMPI_MCA_shmem", "OMPI_ALLOW", "HFI_", "IPATH_", "PSM2_", "MPI4PY_", "ENSEMBLE_GUARD_")  # fmt: skip


@pytest.mark.parametrize("mpi", BOTH_MPI)
async def test_tasks_know_nothing_of_the_pilots(ens: Ensemble, mpi: str) -> None:
    told = mpi_environ(mpi)
    mpirun = [mpi, "-n", "2"]
    if mpi != str(MPICH):
        mpirun += ["--allow-run-as-root", "--oversubscribe"]
    alone, nested, look, *others = await ens.store.add(
        [
            python(WORLD, name="alone", environ=told, node_packing_count=2),
            NewTask(
                command=[*mpirun, sys.executable, "-c", WORLD],
                name="nested",
                environ=told,
                node_packing_count=2,
            ),
            python(LOOK, name="look", node_packing_count=2),
            *[python(WORLD, name="alone", environ=told, node_packing_count=2) for _ in range(2)],
        ]
    )
    launched = ens.launch("--persistent", mode="serial", MPI_COMMAND=mpi)
    pilots = await ens.joined(launched)
    await ens.reach(State.JOB_FINISHED, within_s=60)
    for task_id in (alone, *others):
        assert ens.output(await ens.task(task_id)) == "0 1\n"
    assert sorted(ens.output(await ens.task(nested)).split("\n")) == ["", "0 2", "1 2"]

    task = await ens.task(look)
    found = json.loads(ens.output(task))
    assert {name for name in found["environ"] if name.startswith(MARKS)} == set()
    mine = {name for name in os.environ if not name.startswith("ENSEMBLE_")}
    theirs = {name for name in found["environ"] if not name.startswith("ENSEMBLE_")}
    # The launcher's own environment, plain: Python sets LC_CTYPE for itself where there is no locale.
    assert theirs - mine <= {"LC_CTYPE"}
    assert mine - theirs <= {"PYTEST_CURRENT_TEST"}
    assert {name: found["environ"][name] for name in mine & theirs - {"PYTEST_CURRENT_TEST"}} == {
        name: os.environ[name] for name in mine & theirs - {"PYTEST_CURRENT_TEST"}
    }
    output = str(ens.workdir(task) / "look.out")
    assert found["files"] == {"0": "/dev/null", "1": output, "2": output}
    assert found["count"] == 4
    assert found["stdin"] == ""
    assert found["session"] == found["group"] == found["pid"]
    assert found["parent"] in pilots.values()
    assert found["cwd"] == str(ens.workdir(task))
    assert found["umask"] == os.umask(found["umask"])
    os.umask(found["umask"])
    assert found["blocked"] == []
    assert set(found["ignored"]) <= {signal.SIGPIPE, signal.SIGXFSZ}, "as Python itself does"
    # MPI has gone from the pilots, too: no library of it is mapped, and the threads are the runtime's.
    for pid in pilots.values():
        with open(f"/proc/{pid}/maps") as maps:
            assert "libmpi" not in maps.read()
        stat = proctree.read_stat(pid)
        assert stat is not None
        assert stat.threads < 10
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0, launched.log
