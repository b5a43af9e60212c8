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


#: Slurm 22.05: while slurmctld is away; just after it was started; when it does not answer in time; for good.
AWAY = """\
srun: cluster configuration lacks support for cpu binding
srun: error: Unable to confirm allocation for job 7: Unable to contact slurm controller (connect failure)
srun: Check SLURM_JOB_ID environment variable. Expired or invalid job 7
"""
STARTING = """\
srun: cluster configuration lacks support for cpu binding
srun: error: Unable to create step for job 7: Memory required by task is not available
"""
TIMED_OUT = """\
srun: Job 7 step creation temporarily disabled, retrying (Requested nodes are busy)
srun: error: Unable to create step for job 7: Socket timed out on send/recv operation
"""
NEVER = (
    "srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification\n"
)


@pytest.mark.parametrize(
    ("text", "reason", "passes"),
    [
        (AWAY, "Unable to contact slurm controller (connect failure)", True),
        (STARTING, "Memory required by task is not available", True),
        (TIMED_OUT, "Socket timed out on send/recv operation", True),
        (NEVER, "Invalid generic resource (gres) specification", False),
    ],
)
def test_recognizes_a_refused_step_and_whether_it_may_be_made_later(text, reason, passes):
    assert mpiwords.refusal(Flavor.SRUN, 1, text) == reason
    assert mpiwords.may_pass(reason) is passes
    assert mpiwords.refusal(Flavor.SRUN, 0, text) is None
    assert mpiwords.refusal(Flavor.PALS, 1, text) is None
    assert not mpiwords.failed_to_start(Flavor.SRUN, 1, text)


@pytest.mark.parametrize("text", [AWAY, TIMED_OUT, NEVER])
def test_what_a_program_was_refused_is_no_refusal_of_its_own_step(text):
    for before, after in [
        ("worked\n", ""),
        ("", "srun: error: n1: task 0: Exited with exit code 1\n"),
        ("  srun: ", ""),
        ("", "slurmstepd: error: *** STEP 7.1 ON n1 CANCELLED AT 2026-11-23T05:00:00 ***\n"),
    ]:
        assert mpiwords.refusal(Flavor.SRUN, 1, before + text + after) is None
    # A silent program's exit looks like that; Hydra whose own srun was refused waits until it is killed.
    assert mpiwords.refusal(Flavor.MPICH, 1, text) is None
    assert mpiwords.refusal(Flavor.MPICH, 137, text) is not None
    assert mpiwords.refusal(Flavor.MPICH, 137, "worked\n" + text) is None


def test_hydra_may_have_lost_a_node_or_its_ranks_when_a_connection_closes():
    text = "[mpiexec@vm] control_cb (/mpich-5.0.2/src/pm/hydra/mpiexec/pmiserv_cb.c:280): assert (!closed) failed\n"
    assert mpiwords.may_have_lost_a_node(Flavor.MPICH, 255, text)
    assert not mpiwords.lost_a_node(Flavor.MPICH, 255, text)
    assert not mpiwords.may_have_lost_a_node(Flavor.MPICH, 0, text)
    assert not mpiwords.may_have_lost_a_node(Flavor.MPICH, 15, CUT_OFF)
    assert not mpiwords.may_have_lost_a_node(Flavor.OPENMPI4, 255, text)
