"""Grid Engine: Sun's, Son of, Open, Univa's and Altair's.

By its manual only; not proven on a real machine. Sources: submit(1), qstat(1), qacct(1), sge_status(5) and
accounting(5) of 8.1.9, and its sources for messages.

What ends a job: KILL at once. Only with `-notify`, which is always given here, it gets USR2 first, and then the
`notify` time of its queue, 60 s by default. At the soft limit s_rt it gets USR1: templates set both limits.
Directives are `#$ -pe mpi 64` and `#$ -l h_rt=01:00:00`.
"""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Sequence
from xml.etree import ElementTree

from ensemble.core.batchjob import JobState
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, Scheduler, Seen, fail, no_listing, user_name
from ensemble.errors import Trouble

#: The first pattern found decides.
TROUBLES = (
    # The request was sent and the answer was not heard.
    (r"got read error|failed receiving gdi request|receive timeout", Trouble.UNSURE),
    (
        r"commlib error|unable to (contact|send message to) qmaster|cannot (contact|connect to) qmaster",
        Trouble.RETRY,
    ),
    (r"only \d+ jobs are allowed per|exceeds? (the )?(job )?limit of", Trouble.CAPACITY),
)

#: qacct's `failed` codes of jobs that the queue master ended for their limits (sge_status(5)).
LIMIT_CODES = {"37"}

_TIME_FORMATS = ("%Y-%m-%dT%H:%M:%S", "%a %b %d %H:%M:%S %Y", "%m/%d/%Y %H:%M:%S")


def submit_argv(request: Request) -> list[str]:
    """Submit a script for bash, csh being the default, whose output and errors go to one file."""
    output = str(request.output)
    return [
        *("qsub", "-terse", "-notify", "-S", "/bin/bash", "-r", "n", "-N", request.name),
        # [[host]:]path
        *("-j", "y", "-o", f":{output}" if ":" in output else output),
        *request.flags,
        str(request.script),
    ]


def parse_submit(answer: Completed) -> str:
    """Return the number that -terse leaves; verifiers of the site may print lines around it."""
    ids = re.findall(r"^\s*([0-9]{1,18})\s*$", answer.stdout, re.MULTILINE | re.ASCII)
    if not ids:
        raise fail("sge", (("", Trouble.UNSURE),), "tell the id of a submitted job", answer)
    return str(ids[-1])


def status_argv(_: Sequence[str]) -> list[str]:
    """List all jobs of this user in XML: the table for people cuts names at ten characters."""
    return ["qstat", "-u", user_name(), "-xml"]


def parse_status(answer: Completed) -> list[Seen]:
    """Read the document: jobs on nodes under queue_info, waiting ones under job_info."""
    # Only a document type can declare entities, and qstat writes none.
    if answer.code != 0 or "<!DOCTYPE" in answer.stdout:
        raise no_listing("sge", TROUBLES, answer)
    start = max(answer.stdout.find("<?xml"), 0)
    try:
        root = ElementTree.fromstring(answer.stdout[start:])  # noqa: S314  no entities: see above
        if root.tag != "job_info":
            raise ValueError(root.tag)
        return [_parse_job(job) for job in root.iter("job_list")]
    except (ElementTree.ParseError, ValueError) as error:
        raise no_listing("sge", TROUBLES, answer) from error


def judge(letters: str) -> tuple[JobState, str, bool]:
    """Return what a set of letters means: the state, why, and whether somebody has to look.

    In this order: E is an error that keeps it in the queue until somebody clears it, d is being
    deleted, q waits (h: held), t and r run, s, S and T are suspended; R is "started again".
    """
    if "E" in letters:
        return JobState.QUEUED, f"error ({letters}): qstat -j tells why", True
    if "d" in letters:
        return JobState.RUNNING, f"being deleted ({letters})", False
    if "q" in letters or "w" in letters:
        return JobState.QUEUED, f"held ({letters})" if "h" in letters else "", False
    suspended = bool(set(letters) & set("sST"))
    return JobState.RUNNING, f"suspended ({letters})" if suspended else "", False


def cancel_argv(job_id: str) -> list[str]:
    """Send USR2, and KILL after the queue's `notify` time."""
    return ["qdel", job_id]


def history_argv(job_id: str) -> list[str]:
    """Ask the accounting file, which knows a job some seconds to minutes after its end."""
    return ["qacct", "-j", job_id]


def parse_history(answer: Completed) -> list[Seen]:
    """Read the last record: a word and its value on each line."""
    if re.search(r"job id [0-9]+ not found", answer.stderr + answer.stdout):
        return []
    record: dict[str, str] = {}
    for line in answer.stdout.splitlines():
        word, _, value = line.strip().partition(" ")
        if word.startswith("====="):
            record = {}
        record[word] = value.strip()
    job_id = record.get("jobnumber", "")
    status = re.match("[0-9]{1,3}(?![0-9])", record.get("exit_status", ""), re.ASCII)
    failed = re.match("[0-9]{1,4}(?![0-9])", record.get("failed", ""), re.ASCII)
    if (
        answer.code != 0
        or not re.fullmatch("[0-9]{1,18}", job_id, re.ASCII)
        or not status
        or not failed
    ):
        raise no_listing("sge", TROUBLES, answer)
    return [_parse_end(record, job_id, int(status[0]), failed[0])]


def _parse_end(record: dict[str, str], job_id: str, status: int, failed: str) -> Seen:
    """Return how it ended; who sent the signal, qdel or h_rt or itself, is not on record."""
    is_well = failed == "0" and status == 0
    ended_badly = JobState.TIMEOUT if failed in LIMIT_CODES else JobState.FAILED
    return Seen(
        id=job_id,
        state=JobState.FINISHED if is_well else ended_badly,
        name=record.get("jobname", ""),
        reason="" if failed == "0" else record["failed"],
        # One that failed before it ran has a 0 there.
        exit_code=status if failed == "0" else status or None,
        started_at=_parse_time(record.get("start_time", "")),
        ended_at=_parse_time(record.get("end_time", "")),
    )


def _parse_job(job: ElementTree.Element) -> Seen:
    job_id = (job.findtext("JB_job_number") or "").strip()
    letters = (job.findtext("state") or "").strip()
    if not re.fullmatch("[0-9]{1,18}", job_id, re.ASCII) or not letters:
        raise ValueError("a job without a number or a state")
    state, reason, is_stuck = judge(letters)
    return Seen(
        id=job_id,
        state=state,
        name=job.findtext("JB_name") or "",
        reason=reason,
        is_stuck=is_stuck,
        started_at=_parse_time(job.findtext("JAT_start_time") or ""),
    )


def _parse_time(text: str) -> float | None:
    """Return epoch seconds of a local time, which is UTC in the environment of our commands."""
    plain = re.sub(r"\.[0-9]+$", "", text.strip())
    for form in _TIME_FORMATS:
        try:
            return float(calendar.timegm(time.strptime(plain, form)))
        except ValueError:
            continue
    return None


SGE = Scheduler(
    name="sge",
    # qsub, qstat and qdel are PBS's and Cobalt's too.
    programs=("qconf", "qsub", "qstat", "qdel"),
    submit_argv=submit_argv,
    parse_submit=parse_submit,
    status_argv=status_argv,
    parse_status=parse_status,
    cancel_argv=cancel_argv,
    troubles=TROUBLES,
    is_gone=r'job "?[0-9.]+"? does not exist|is already in deletion',
    # It prints traces on standard output.
    scrubbed=("SGE_DEBUG",),
    history_argv=history_argv,
    parse_history=parse_history,
)
