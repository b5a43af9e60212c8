"""IBM Spectrum LSF.

By its manual only; not proven on a real machine. Sources: IBM's reference of bsub, bjobs, bkill and bacct
(10.1), "Send a signal to a job" there, and the messages of its libraries.

What ends a job: bkill sends INT, TERM and KILL, ten seconds apart; at the run limit it is USR2, and ten minutes.
Times are not read: bjobs prints them without a year. Directives are `#BSUB -nnodes 4` and `#BSUB -W 01:00`,
and are heeded only in a script that bsub reads from its standard input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ensemble.core.batchjob import JobState
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, Scheduler, Seen, fail, no_listing
from ensemble.errors import Trouble

#: The first pattern found decides. bsub itself waits and repeats at the pending threshold: whoever runs it
#: needs a time-out, and then looks whether there is a job.
TROUBLES = (
    (
        r"communication time ?out|connection reset|in an LSF library call: .*timed out",
        Trouble.UNSURE,
    ),
    (
        r"LSF is down|LIM configuration is not ready|LIM is down|daemon not responding|cannot connect to LSF",
        Trouble.RETRY,
    ),
    (r"connection refused|host does not have a software license", Trouble.RETRY),
    (
        r"pending job threshold|has reached its job limit|job limit (has been )?reached",
        Trouble.CAPACITY,
    ),
)

#: "Job states" in IBM's reference of bjobs.
STATES = {
    "PEND": JobState.QUEUED,
    "PROV": JobState.QUEUED,
    "WAIT": JobState.QUEUED,
    "PSUSP": JobState.QUEUED,
    "RUN": JobState.RUNNING,
    "USUSP": JobState.RUNNING,
    "SSUSP": JobState.RUNNING,
    # The daemon of its host is silent: it may run on.
    "UNKWN": JobState.RUNNING,
    "DONE": JobState.FINISHED,
    "EXIT": JobState.FAILED,
    # Its host is down and it was killed or requeued: its processes may live.
    "ZOMBI": JobState.LOST,
}

#: Why LSF ended a job, from "Termination reasons" of bacct; all others are failures.
REASONS = {
    "TERM_RUNLIMIT": JobState.TIMEOUT,
    "TERM_CPULIMIT": JobState.TIMEOUT,
    "TERM_DEADLINE": JobState.TIMEOUT,
    "TERM_WINDOW": JobState.TIMEOUT,
    "TERM_OWNER": JobState.CANCELLED,
    "TERM_ADMIN": JobState.CANCELLED,
    # `bkill -r` takes the job off the list without waiting for its end: its processes may live.
    "TERM_FORCE_OWNER": JobState.LOST,
    "TERM_FORCE_ADMIN": JobState.LOST,
    "TERM_PREEMPT": JobState.CANCELLED,
}

FIELDS = "jobid stat job_name exit_code exit_reason kill_reason"


def submit_argv(request: Request) -> list[str]:
    """Submit the script on standard input; errors go where the output goes, and both are appended."""
    return ["bsub", "-J", request.name, "-o", str(request.output), "-rn", *request.flags]


def parse_submit(answer: Completed) -> str:
    """Return the number of `Job <930> is submitted to default queue <normal>.`."""
    match = re.search(r"Job <([0-9]{1,18})> is submitted", answer.stdout, re.ASCII)
    if match is None:
        raise fail("lsf", (("", Trouble.UNSURE),), "tell the id of a submitted job", answer)
    return match[1]


def status_argv(_: Sequence[str]) -> list[str]:
    """List all jobs of this user, those too that ended within CLEAN_PERIOD, an hour by default."""
    return ["bjobs", "-a", "-json", "-o", FIELDS]


def parse_status(answer: Completed) -> list[Seen]:
    """Read the JSON of bjobs, whose values are all strings."""
    try:
        # Words instead of a document where there is no job; its status is no sign, versions differ.
        if not answer.stdout.strip() and _EMPTY.search(answer.stderr):
            return []
        # Whatever was printed around the document.
        text = answer.stdout
        document = json.JSONDecoder().raw_decode(text, text.index("{"))[0]
        if not isinstance(document["RECORDS"], list):
            raise TypeError("RECORDS is no list")
        # Ids that it does not know are records with an error.
        return [_parse_record(each) for each in document["RECORDS"] if "ERROR" not in each]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise no_listing("lsf", TROUBLES, answer) from error


def cancel_argv(job_id: str) -> list[str]:
    """Send INT, then TERM, then KILL, each after JOB_TERMINATE_INTERVAL, 10 s by default."""
    return ["bkill", job_id]


def history_argv(job_id: str) -> list[str]:
    """Ask the accounting file."""
    return ["bacct", "-l", job_id]


def parse_history(answer: Completed) -> list[Seen]:
    """Read the end of a job from its events: `Completed <exit>; TERM_OWNER: job killed by owner.`."""
    # Lines are folded in columns.
    text = re.sub(r"\n\s{8,}", "", answer.stdout)
    job = re.search(r"^Job <([0-9]{1,18})>", text, re.MULTILINE | re.ASCII)
    ends = re.findall(r"Completed <(done|exit)>(?:;\s*([A-Z_]+:[^.\n]*))?", text)
    if job is None or not ends:
        if answer.code != 0 and not _EMPTY.search(answer.stderr + answer.stdout):
            raise no_listing("lsf", TROUBLES, answer)
        return []
    name = re.search(r"Job Name <([^>\n]*)>", text)
    word, reason = ends[-1]
    return [
        Seen(
            id=job[1],
            state=JobState.FINISHED if word == "done" else _judge(reason),
            name=name[1] if name else "",
            reason=reason,
        )
    ]


_EMPTY = re.compile(r"no (unfinished |matching )?jobs? found|is not found", re.IGNORECASE)


def _parse_record(record: dict[str, Any]) -> Seen:
    job_id, word = str(record["JOBID"]), str(record["STAT"])
    if not re.fullmatch(r"[0-9]{1,18}(\[[0-9]+\])?", job_id, re.ASCII) or not word:
        raise ValueError(f"no job: {record}")
    reasons = [str(record.get(name) or "") for name in ("EXIT_REASON", "KILL_REASON")]
    reason = next((text for text in reasons if text.strip(" -")), "")
    # A state that is unknown here is that of a job that is there.
    state = STATES.get(word, JobState.RUNNING)
    code = str(record.get("EXIT_CODE") or "")
    return Seen(
        id=job_id,
        state=_judge(reason) if state is JobState.FAILED else state,
        name=str(record.get("JOB_NAME") or ""),
        reason=reason or ("" if word in ("PEND", "RUN", "DONE", "EXIT") else word),
        is_stuck=word == "PSUSP",
        exit_code=0
        if word == "DONE"
        else int(code)
        if re.fullmatch("[0-9]{1,3}", code, re.ASCII)
        else None,
    )


def _judge(reason: str) -> JobState:
    """Return how a job ended that did not end well."""
    found = re.match(r"TERM_[A-Z_]+", reason.strip())
    return REASONS.get(found[0], JobState.FAILED) if found else JobState.FAILED


LSF = Scheduler(
    name="lsf",
    programs=("bsub", "bjobs", "bkill"),
    submit_argv=submit_argv,
    parse_submit=parse_submit,
    status_argv=status_argv,
    parse_status=parse_status,
    cancel_argv=cancel_argv,
    troubles=TROUBLES,
    is_gone=r"Job has already finished|No matching job found",
    # Default queue and project, formats, and BSUB_QUIET, with which bsub does not tell the id.
    scrubbed=("LSB_", "BSUB_"),
    is_script_piped=True,
    history_argv=history_argv,
    parse_history=parse_history,
)
