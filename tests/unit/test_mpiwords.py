from __future__ import annotations

import pytest

from ensemble.drivers import mpiwords
from ensemble.drivers.mpiline import Flavor

OPENMPI4_MISSING = """\
--------------------------------------------------------------------------
mpirun.openmpi was unable to launch the specified application as it could not access
or execute an executable:

Executable: ./missing
"""
OPENMPI5_MISSING = """\
prterun was unable to launch the specified application as it could not
access an executable:
"""
HYDRA_MISSING = (
    "[proxy:0@vm] HYDU_create_process (/mpich-5.0.2/src/pm/hydra/lib/utils/launch.c:73): "
    "execvp error on file ./missing (No such file or directory)\n"
)


@pytest.mark.parametrize(
    ("flavor", "code", "text"),
    [
        ("openmpi4", 132, OPENMPI4_MISSING),
        ("openmpi5", 183, OPENMPI5_MISSING),
        ("mpich", 255, HYDRA_MISSING),
        (
            "flux",
            127,
            "0.05s: flux-shell[0]: FATAL: task 0 (host f1): start failed: x: No such file\n",
        ),
        ("srun", 2, "slurmstepd: error: execve(): missing: No such file or directory\n"),
    ],
)
def test_recognizes_a_program_that_did_not_start(flavor, code, text):
    assert mpiwords.failed_to_start(Flavor(flavor), code, text)
    assert not mpiwords.failed_to_start(Flavor(flavor), 0, text)
    assert not mpiwords.failed_to_start(Flavor(flavor), code, "Traceback: boom\n")


#: As Slurm ended a job: of the same two tasks one mpiexec had its ranks' word, the other's srun was ended first.
CUT_OFF = """\
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 27409 RUNNING AT n1
=   EXIT CODE: 15
=   CLEANING UP REMAINING PROCESSES
slurmstepd-n1: error: *** STEP 1.1 ON n1 CANCELLED AT 2026-11-23T04:51:11 ***
srun: got SIGCONT
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Terminated (signal 15)
"""
DISTURBED = """\
srun: forcing job termination
[mpiexec@vm] HYDU_sock_write (/mpich-5.0.2/src/pm/hydra/lib/utils/sock.c:250): write error (Bad file descriptor)
"""


def test_a_signal_that_hydra_tells_as_its_number():
    assert mpiwords.program_status(Flavor.MPICH, 15, CUT_OFF) == 143
    assert mpiwords.program_status(Flavor.MPICH, 15, "boom\n") == 15
    assert mpiwords.program_status(Flavor.MPICH, 9, CUT_OFF) == 9
    assert mpiwords.program_status(Flavor.MPICH, 143, CUT_OFF) == 143
    assert mpiwords.program_status(Flavor.SRUN, 15, CUT_OFF) == 15


@pytest.mark.parametrize(
    ("flavor", "code", "text", "expected"),
    [
        ("mpich", 15, CUT_OFF, True),
        ("mpich", 255, DISTURBED, True),
        ("mpich", 0, CUT_OFF, False),
        ("mpich", 1, "Traceback: boom\n", False),
        ("mpich", 15, None, True),
        ("mpich", 0, None, False),
        ("mpich", 255, None, False),
        ("openmpi4", 15, None, False),
        ("srun", 1, "srun: Force Terminated StepId=1.0\n", True),
        ("srun", 1, "srun: error: n1: task 0: Exited with exit code 1\n", False),
    ],
)
def test_what_may_be_the_work_of_a_scheduler(flavor, code, text, expected):
    assert mpiwords.may_be_cut_off(Flavor(flavor), code, text) is expected


@pytest.mark.parametrize(
    ("flavor", "text"),
    [
        ("mpich", "srun: error: Node failure on n1\n"),
        (
            "srun",
            "srun: error: Task launch for StepId=2.5 failed on node n1: Communication connection failure\n",
        ),
        ("srun", "*** STEP 5.0 ON n1 CANCELLED AT 2026-11-23T05:00:00 DUE TO NODE FAILURE ***\n"),
        ("openmpi4", "ORTE has lost communication with a remote\ndaemon.\n"),
        ("openmpi5", "PRTE has lost communication with a remote daemon.\n"),
    ],
)
def test_recognizes_the_loss_of_a_node(flavor, text):
    assert mpiwords.lost_a_node(Flavor(flavor), 1, text)
    assert not mpiwords.lost_a_node(Flavor(flavor), 0, text)
    assert not mpiwords.lost_a_node(Flavor(flavor), 1, "Traceback: boom\n")
    assert not mpiwords.lost_a_node(Flavor.PALS, 1, text)


def test_hydra_may_have_lost_a_node_or_its_ranks_when_a_connection_closes():
    text = "[mpiexec@vm] control_cb (/mpich-5.0.2/src/pm/hydra/mpiexec/pmiserv_cb.c:280): assert (!closed) failed\n"
    assert mpiwords.may_have_lost_a_node(Flavor.MPICH, 255, text)
    assert not mpiwords.lost_a_node(Flavor.MPICH, 255, text)
    assert not mpiwords.may_have_lost_a_node(Flavor.MPICH, 0, text)
    assert not mpiwords.may_have_lost_a_node(Flavor.MPICH, 15, CUT_OFF)
    assert not mpiwords.may_have_lost_a_node(Flavor.OPENMPI4, 255, text)
