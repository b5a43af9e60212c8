"""Slurm: sbatch, squeue, scancel, sacct.

Sources: the manual pages of these commands (22.05; SQUEUE "JOB STATE CODES" and "JOB REASON CODES"), the
texts in libslurm, and what a real 22.05.8 printed (tests/data/slurm). Later versions add states; one that
is not in the table is taken for running, as nothing of such a job can be concluded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ensemble.core.batchjob import OVER, JobState
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, Scheduler, Seen, fail
from ensemble.errors import SchedulerError, Trouble

#: The name comes last, as it may hold the separator. Times in epoch seconds need SLURM_TIME_FORMAT.
_FORMAT = "%i|%T|%r|%S|%e|%D|%P|%j"
#: squeue's own heading of these columns: without it, printing nothing would look like an empty queue.
_HEADING = re.compile(r"JOBID\|STATE\|REASON\|.*\|NAME")
_ROW = re.compile(r"([0-9]+[^|]*)\|([A-Z_]+)\|([^|]*)\|([^|]*)\|([^|]*)\|[0-9]*\|([^|]*)\|(.*)")
#: The heading of each cluster's jobs where squeue was asked about some by name.
_CLUSTER = re.compile(r"CLUSTER: (\S+)")
_SACCT = "JobIDRaw,State,ExitCode,Start,End,Reason"

#: squeue(1), "JOB STATE CODES".
STATES = {
    "PENDING": JobState.QUEUED,
    "CONFIGURING": JobState.QUEUED,  # it has its nodes; they are being booted
    "REQUEUED": JobState.QUEUED,
    "REQUEUE_FED": JobState.QUEUED,
    "REQUEUE_HOLD": JobState.QUEUED,
    "RESV_DEL_HOLD": JobState.QUEUED,
    "SPECIAL_EXIT": JobState.QUEUED,
    "RUNNING": JobState.RUNNING,
    "SUSPENDED": JobState.RUNNING,
    "STOPPED": JobState.RUNNING,
    "SIGNALING": JobState.RUNNING,
    "RESIZING": JobState.RUNNING,
    "COMPLETING": JobState.RUNNING,  # some of its processes may live
    "STAGE_OUT": JobState.RUNNING,
    "COMPLETED": JobState.FINISHED,
    "FAILED": JobState.FAILED,
    "OUT_OF_MEMORY": JobState.FAILED,
    "LAUNCH_FAILED": JobState.FAILED,
    "TIMEOUT": JobState.TIMEOUT,
    "DEADLINE": JobState.TIMEOUT,
    "CANCELLED": JobState.CANCELLED,
    "PREEMPTED": JobState.CANCELLED,  # we ask for no requeue: it is over
    # What cannot be reached cannot be ended: its processes may live on.
    "NODE_FAIL": JobState.LOST,
    "BOOT_FAIL": JobState.LOST,
    "REVOKED": JobState.LOST,  # another cluster of the federation has started it
}
#: What these states are for people, who would take the canonical one for something else.
_WORDS = {
    "CONFIGURING": "starting",
    "COMPLETING": "ending",
    "STAGE_OUT": "ending: its files are staged out",
    "SUSPENDED": "suspended",
    "STOPPED": "stopped",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "DEADLINE": "its deadline was over",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "its nodes did not boot",
    "REVOKED": "another cluster has started it",
}
#: Held by the system in the queue, until somebody releases it.
_HELD = {"REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
#: Reasons that no waiting cures: the job asks for what it cannot get, or a human holds the key. All others
#: (Priority, Resources, Dependency, BeginTime, …JobsPerUserLimit, AssocGrp…, Reservation, ReqNodeNotAvail,
#: PartitionDown, JobHeldUser and so on) end by themselves, or the user knows.
_STUCK = re.compile(
    r"Partition(TimeLimit|NodeLimit|Config)|BadConstraints|Invalid(Account|QOS)|AccountNotAllowed|QOSNotAllowed"
    r"|DependencyNeverSatisfied|JobHeldAdmin|JobHoldMaxRequeue|launch_failed_requeued_held|ReservationDeleted"
    r"|AssociationTimeLimit|QOSTimeLimit"
    r"|(Assoc|QOS)Max(Wall\w*|(Cpu|Node|Mem|GRES|Billing|TRES)\w*PerJob)\w*"
    r"|QOSMax(Node|Cpu|Mem|GRES)\w*PerUserLimit|QOSMin\w*"
)

_WAITED = re.compile(r"Priority|Resources|Dependency|BeginTime|Reservation|ReqNodeNotAvail.*")

_TROUBLES = (
    # sbatch names the limit in a line of its own; the one after it is the same for all.
    (r"(QOS|Assoc)(Max|Grp)Submit\w*", Trouble.CAPACITY),
    (r"job queue full", Trouble.CAPACITY),
    (r"Required partition not available", Trouble.CAPACITY),
    (r"accounting/QOS policy", Trouble.PERMANENT),
    # The request was sent, and the answer was not seen.
    (r"timed out|receive failure|Zero Bytes|Connection reset|Broken pipe", Trouble.UNSURE),
    (r"Unable to contact slurm controller|standby mode|configuration source", Trouble.RETRY),
    (r"temporarily|try again|rate limit|RPC limit", Trouble.RETRY),
    (r"authentication (error|credential)|credential invalid", Trouble.RETRY),
    (r"Problem talking to database", Trouble.RETRY),
)


def submit_argv(request: Request) -> list[str]:
    """Submit a script; the job is never started twice, and its output is appended to."""
    output = str(request.output).replace("%", "%%")  # it is a pattern: %j would be the id
    return [
        "sbatch",
        "--parsable",
        f"--job-name={request.name}",
        f"--output={output}",
        "--open-mode=append",
        "--no-requeue",
        *request.flags,
        str(request.script),
    ]


def parse_submit(answer: Completed) -> str:
    """Return the id, `12` or `12;cluster`: from the last line that is one, as sites' plug-ins talk too."""
    for line in reversed(answer.stdout.splitlines()):
        match = re.fullmatch(
            r"([0-9]+(?:;[^\s;]+)?)|Submitted batch job ([0-9]+)(?: on cluster (\S+))?",
            line.strip(),
        )
        if match:
            return match[1] or ";".join(filter(None, (match[2], match[3])))
    raise fail("Slurm", (("", Trouble.UNSURE),), "tell the id of the batch job", answer)


def status_argv(ids: Sequence[str]) -> list[str]:
    """List all of the user's jobs, also those that ended in the last minutes (MinJobAge, 300 s)."""
    clusters = sorted({cluster for id in ids if (cluster := id.partition(";")[2])})
    where = ["-M", ",".join(clusters)] if clusters else []
    return ["squeue", *where, "--me", "-t", "all", "-o", _FORMAT]


def parse_status(answer: Completed) -> list[Seen]:
    """Return the rows below squeue's heading; the ids of named clusters are `12;cluster`."""
    if answer.code != 0:
        raise fail("Slurm", _TROUBLES, "list batch jobs", answer)
    found: list[Seen] = []
    cluster, is_listing, is_row = "", False, False
    for line in _lines(answer):
        if _HEADING.fullmatch(line):
            is_listing, is_row = True, False
        elif match := _CLUSTER.fullmatch(line):
            cluster, is_row = f";{match[1]}", False
        elif is_listing and (match := _ROW.fullmatch(line)):
            found.append(_seen(cluster, match))
            is_row = True
        elif is_listing and not is_row:
            raise _nonsense(line, answer)
        # Else: above the heading a site's greeting; below a row, the rest of a name with a line break.
    if not is_listing:
        raise _nonsense("", answer)
    return found


def cancel_argv(id: str) -> list[str]:
    """Cancel a job. Without -v, scancel would not say that it had ended or is unknown: its status is 0."""
    number, _, cluster = id.partition(";")
    return ["scancel", "-v", *(["-M", cluster] if cluster else []), number]


def history_argv(id: str) -> list[str]:
    """Ask the accounting about one job, without its steps."""
    number, _, cluster = id.partition(";")
    where = ["-M", cluster] if cluster else []
    return ["sacct", *where, "-X", "-n", "-P", "-j", number, "-o", _SACCT]


def parse_history(answer: Completed) -> list[Seen]:
    """Return what sacct knows; nothing where Slurm keeps no accounts."""
    if "accounting storage is disabled" in answer.stderr + answer.stdout:
        return []
    if answer.code != 0:
        raise fail("Slurm", _TROUBLES, "tell the end of a batch job", answer)
    return [_ended(line.split("|")) for line in _lines(answer) if line.count("|") == 5]


def _lines(answer: Completed) -> list[str]:
    """Return the lines of an output that was printed to its end."""
    if answer.stdout and not answer.stdout.endswith("\n"):
        raise _nonsense(answer.stdout.rpartition("\n")[2], answer)
    # Not splitlines: it would also divide names at form feeds and the like.
    return answer.stdout.split("\n")[:-1]


def _nonsense(line: str, answer: Completed) -> SchedulerError:
    words = (
        f"this is no whole line of its table: {line[:200]!r}" if line else "its table is missing"
    )
    return SchedulerError(
        f"Slurm cannot list batch jobs: {words}; try `squeue --me`",
        trouble=Trouble.RETRY,
        output=answer.stdout + answer.stderr,
    )


def _seen(cluster: str, row: re.Match[str]) -> Seen:
    id, state, reason, start, end, _, name = row.groups()
    canonical = STATES.get(state, JobState.RUNNING)
    has_begun = canonical is not JobState.QUEUED  # before that, both are guesses
    has_ended = canonical in OVER or canonical is JobState.LOST
    return Seen(
        id=id + cluster,
        name=name,
        state=canonical,
        reason=_explain(state, reason),
        is_stuck=canonical is JobState.QUEUED and _is_stuck(state, reason),
        started_at=_time(start) if has_begun else None,
        ended_at=_time(end) if has_ended else None,
        ends_at=_time(end) if canonical is JobState.RUNNING and state != "COMPLETING" else None,
    )


def _ended(columns: list[str]) -> Seen:
    id, words, status, start, end, reason = columns
    # `CANCELLED by 1000`
    state = words.partition(" ")[0]
    canonical = STATES.get(state, JobState.RUNNING)
    has_ended = canonical in OVER or canonical is JobState.LOST
    return Seen(
        id=id,
        state=canonical,
        reason=_explain(state, words if words != state else reason),
        exit_code=_exit_code(status) if has_ended else None,
        started_at=_time(start),
        ended_at=_time(end) if has_ended else None,
    )


def _explain(state: str, reason: str) -> str:
    is_over = STATES.get(state) in OVER
    # A job that was cancelled while it waited keeps the reason why it did.
    known = "" if reason in ("None", "") or (is_over and _WAITED.fullmatch(reason)) else reason
    words = _WORDS.get(state, "" if state in STATES else f"state {state}")
    return " / ".join(filter(None, (words, known)))


def _is_stuck(state: str, reason: str) -> bool:
    return state in _HELD or _STUCK.match(reason) is not None


def _exit_code(text: str) -> int | None:
    """Return the status of `3:0`, or 128 + N after signal N: `0:9`."""
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text)
    if match is None:
        return None
    return 128 + int(match[2]) if int(match[2]) else int(match[1])


def _time(text: str) -> float | None:
    """Return epoch seconds; None for N/A, NONE, Unknown and the largest integers, which mean for ever."""
    seconds = float(text) if re.fullmatch(r"[0-9]{9,10}", text) else 0.0
    return seconds if 0 < seconds < 2**32 - 16 else None


SLURM = Scheduler(
    name="slurm",
    programs=("sbatch", "squeue", "scancel"),
    submit_argv=submit_argv,
    parse_submit=parse_submit,
    status_argv=status_argv,
    parse_status=parse_status,
    cancel_argv=cancel_argv,
    troubles=_TROUBLES,
    is_gone=r"already completing or completed|Invalid job id specified",
    scrubbed=("SBATCH_", "SLURM_", "SQUEUE_", "SCANCEL_", "SACCT_"),
    kept=("SLURM_CONF", "SLURM_JWT"),
    query_environ={"SLURM_TIME_FORMAT": "%s"},
    history_argv=history_argv,
    parse_history=parse_history,
)
