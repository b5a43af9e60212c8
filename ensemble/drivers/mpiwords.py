"""What MPI launchers say when they fail: whose fault it was, and whether the same may work again.

By their own words, as their exit statuses may be a program's as well. Pure, over recorded text: where not said
otherwise, that of Open MPI 4.1.4 and 5.0.11, MPICH 5.0.2 and Slurm 22.05.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping

from ensemble.drivers.mpiline import Flavor


def failed_to_start(flavor: Flavor, exit_code: int, output_tail: str) -> bool:
    """Tell whether the launcher could not start the program, so that not one rank of it ran.

    By the launchers' own words: their exit codes here (Hydra 255, Open MPI 1 and 66 to 213) may be a
    program's as well.
    """
    return exit_code != 0 and _says(output_tail, *_NOT_STARTED.get(flavor, ()))


def refusal(flavor: Flavor, exit_code: int, output: str) -> str | None:
    """Return why Slurm would not make the step, so that no rank ran; None when there may have been one.

    A program that ran may have been refused a step of its own, and have said no more. Then srun tells how its task
    exited; Hydra ends like it, while Hydra whose own srun was refused waits until it is killed (`may_hang`).

    Args:
        flavor: The launcher.
        exit_code: As it is, not `program_status`.
        output: All that was written: before the end of a longer one there may be a program's words.
    """
    if exit_code == 0 or (flavor in _HYDRA and exit_code != _KILLED) or flavor not in _BY_SRUN:
        return None
    lines = [line for line in output.splitlines() if line.strip()]
    if not all(line.startswith("srun: ") and not _OF_A_STEP.search(line) for line in lines):
        return None
    reasons = [found[1] for line in lines if (found := _REFUSED.fullmatch(line))]
    return reasons[-1] if reasons else None


def may_pass(reason: str) -> bool:
    """Tell whether Slurm may make a step soon that it has refused for this reason.

    Seen while slurmctld (22.05) is away, or does not answer in time; for a second after it has been started again,
    when it knows no node's memory yet; and when the job is about to end.
    """
    return _PASSING.search(reason) is not None


def program_status(flavor: Flavor, exit_code: int, output_tail: str) -> int:
    """Return the exit status of the program as a shell shows it: 128 + N after signal N.

    All launchers pass that on but Hydra, which ends with N itself. It says so: of an exit with that status, also of
    an MPI_Abort, it says nothing (MPICH 5.0.2).
    """
    found = _HYDRA_SIGNAL.findall(output_tail) if flavor in _HYDRA else []
    return 128 + exit_code if str(exit_code) in found else exit_code


def may_be_cut_off(flavor: Flavor, exit_code: int, output_tail: str | None) -> bool:
    """Tell whether a failure may be the work of a scheduler that ends the batch job.

    A launcher whose own processes on other nodes were taken away fails with a status of its own.

    Args:
        flavor: The launcher.
        exit_code: As it is, not `program_status`.
        output_tail: The end of the launcher's output; None where it is not kept, which leaves Hydra's small
            statuses in doubt.
    """
    if output_tail is None:
        return flavor in _HYDRA and exit_code in range(1, _MAX_SIGNAL)
    return exit_code != 0 and _says(output_tail, *_CUT_OFF)


def lost_a_node(flavor: Flavor, exit_code: int, output_tail: str) -> bool:
    """Tell whether a launcher failed because a node, or its own process there, was lost."""
    return exit_code != 0 and _says(output_tail, *_LOST_NODE.get(flavor, ()))


def may_have_lost_a_node(flavor: Flavor, exit_code: int, output_tail: str) -> bool:
    """Tell whether a launcher failed as it does when a node is lost, and also now and then without that.

    Hydra (MPICH 5.0.2) says the same, at times, of two ranks that die by a signal at once.
    """
    return exit_code != 0 and flavor in _HYDRA and _HYDRA_CLOSED.search(output_tail) is not None


def may_hang(flavor: Flavor) -> bool:
    """Tell whether the launcher waits for ever when what starts its ranks on other nodes has failed.

    Hydra does (MPICH 5.0.2), within Slurm, when its srun was turned away: it has no child then.
    """
    return flavor in _HYDRA


def _says(output_tail: str, *patterns: str) -> bool:
    """Tell whether one of the patterns is in a text, however its lines were broken."""
    words = " ".join(output_tail.split())
    return any(re.search(pattern, words) for pattern in patterns)


_HYDRA = (Flavor.MPICH, Flavor.INTEL)
_BY_SRUN = (Flavor.SRUN, *_HYDRA)
_KILLED = 128 + signal.SIGKILL
_REFUSED = re.compile(
    r"srun: error: Unable to (?:create step|confirm allocation) for job [0-9]+: (.+)"
)
#: What srun says only of a step that was made. Before that it says much: of its options, of munge, of its retries.
_OF_A_STEP = re.compile(r": tasks? [0-9]|StepId=|[Jj]ob step (aborted|[0-9])|job termination")
#: From the texts of libslurm 22.05; of all others the same again may well be refused for ever.
_PASSING = re.compile(
    r"Unable to contact slurm controller|Socket timed out on send/recv|Zero Bytes were transmitted"
    r"|standby mode|Communication (connection|shutdown) failure|Message (send|receive) failure"
    r"|Protocol authentication error|Invalid authentication credential"
    r"|Job/step already completing|Memory required by task is not available"
)

_MAX_SIGNAL = 64
_HYDRA_SIGNAL = re.compile(r"EXIT STRING: .* \(signal ([0-9]+)\)")
#: Recorded from Slurm 22.05 and MPICH 5.0.2.
_CUT_OFF = (
    r"\*\*\* (STEP|JOB) \S+ ON \S+ CANCELLED AT ",
    r"srun: (Job step aborted|forcing job termination|Force Terminated|got SIGCONT)",
    r"\[mpiexec@\S+\] HYD",
)
_SLURM_LOST = (
    r"srun: error: Node failure on ",
    r"CANCELLED AT \S+ DUE TO NODE FAILURE",
    r"srun: error: Task launch for StepId=\S+ failed on node ",
)
_HYDRA_CLOSED = re.compile(r"\[mpiexec@\S+\] control_cb \(\S+\): assert \(!closed\) failed")
_OPENMPI_LOST = (r"(ORTE|PRTE) has lost communication with a remote daemon",)
#: Recorded as above and from Open MPI 4.1.4; Open MPI 5's from its users' reports. The words of the others are not
#: known: what they lose looks like failed programs.
_LOST_NODE: Mapping[Flavor, tuple[str, ...]] = {
    Flavor.SRUN: _SLURM_LOST,
    Flavor.MPICH: _SLURM_LOST,
    Flavor.INTEL: _SLURM_LOST,
    Flavor.OPENMPI4: _OPENMPI_LOST,
    Flavor.OPENMPI5: _OPENMPI_LOST,
}

_HYDRA_NOT_STARTED = (
    r"execvp error on file",
    r"Launch proxy failed",
    r"unable to set process topology",
)
_OPENMPI_NOT_STARTED = (
    r"was unable to find the specified executable file",
    r"could not access (or execute )?an executable",
    r'tried to fork a new process via the "execve" system call but failed',
    r"There are not enough slots available",
    r"would result in binding more processes than cpus",
    r"more processes than the ppr for this topology",
    r"has detected an attempt to run as root",
    r"ORTE was unable to reliably start one or more daemons",
    r"A daemon failed to report back after being spawned",
)
#: Recorded from Open MPI and MPICH as above; Slurm's and Flux's from their users' reports. The words of
#: PALS, aprun and jsrun are not known: their failed starts look like failed programs.
_NOT_STARTED: Mapping[Flavor, tuple[str, ...]] = {
    Flavor.OPENMPI4: _OPENMPI_NOT_STARTED,
    Flavor.OPENMPI5: _OPENMPI_NOT_STARTED,
    Flavor.MPICH: _HYDRA_NOT_STARTED,
    Flavor.INTEL: _HYDRA_NOT_STARTED,
    Flavor.SRUN: (
        r"error: execve\(\):",
        r"srun: error: Unable to allocate resources",
    ),
    Flavor.FLUX: (r"task [0-9]+( \(host \S+\))?: start failed:", r"job\.exception \S+ type=exec"),
}
