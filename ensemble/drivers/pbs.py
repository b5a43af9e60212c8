"""OpenPBS and PBS Professional: qsub, qstat, qdel. Torque has the same commands, but is not supported.

Sources: qsub(1B), qstat(1B), qdel(1B) and pbs_job_attributes(7B) of OpenPBS 23.06, its job.h (exit and
substates) and pbs_messages.c, and what a real 23.06.06 printed (tests/data/pbs). A job's name may have 236
characters (15 before PBS 13) without white space. A path of its output is taken as one on the host that qsub
runs on, and up to a colon as the name of a host; its directory must exist. Directives end at the first command
of the script. Whoever deletes a job has TERM sent to its session, and KILL after kill_delay (10 s).
"""

from __future__ import annotations

import calendar
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ensemble.core.batchjob import JobState
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, Scheduler, Seen, fail, user_name
from ensemble.drivers.walltime import parse_duration
from ensemble.errors import SchedulerError, Trouble

#: qstat(1B), "Job Status in Default Format"; F and X are judged by their exit status.
STATES = {
    "Q": JobState.QUEUED,
    "W": JobState.QUEUED,
    "H": JobState.QUEUED,
    "T": JobState.QUEUED,
    "M": JobState.QUEUED,
    "R": JobState.RUNNING,
    "B": JobState.RUNNING,
    "S": JobState.RUNNING,
    "U": JobState.RUNNING,
    "E": JobState.RUNNING,
}
_WORDS = {
    "W": "waiting for its start time, or for files that could not be staged in",
    "H": "held",
    "M": "moved to another server",
    "S": "suspended",
    "U": "suspended: its node is in use",
    "E": "ending",
}
#: job.h: what MoM says instead of the script's exit status. All others of hers are failures.
_STATUSES = {
    -1: (JobState.FAILED, "it could not be started"),
    -2: (JobState.FAILED, "it could not be started"),
    -3: (JobState.FAILED, "it could not be started for now"),
    # Its node was booted or its MoM started anew, or could not be reached: its processes may live on.
    -4: (JobState.LOST, "its node's MoM was started anew"),
    -5: (JobState.LOST, "its node's MoM was started anew"),
    -6: (JobState.LOST, "its node's MoM was started anew"),
    -20: (JobState.LOST, "its first node could not be reached"),
    -10: (JobState.FAILED, "its user is not known on the node"),
    -16: (JobState.FAILED, "a hook refused it"),
    -17: (JobState.FAILED, "a hook refused it"),
    -18: (JobState.FAILED, "a hook ended it"),
    -19: (JobState.FAILED, "a hook ended it"),
    -24: (JobState.FAILED, "over its limit of CPUs"),
    -25: (JobState.FAILED, "over its limit of CPUs"),
    -26: (JobState.FAILED, "over its limit of virtual memory"),
    -27: (JobState.FAILED, "over its limit of memory"),
    -28: (JobState.FAILED, "over its limit of CPU time"),
    -29: (JobState.TIMEOUT, "over its limit of time"),
}
#: job.h: JOB_SUBSTATE_TERMINATED, of a job that somebody deleted; JOB_SUBSTATE_MOVED.
_TERMINATED, _MOVED = 91, 94
_CANCELLED = re.compile(r"\bterminated\b|job deleted", re.IGNORECASE)
_TIMED_OUT = re.compile(r"exceeded (resource |limit )?walltime|walltime .*exceeded", re.IGNORECASE)
#: What the scheduler says of a job that waits for nothing that will come.
_STUCK = re.compile(r"too many failed attempts|Can Never Run|never run", re.IGNORECASE)

#: pbs_messages.c
_TROUBLES = (
    (r"cannot connect to server|No free connections|connection table full", Trouble.RETRY),
    (r"Server (is )?shutting down|Unknown Host|(Invalid|Expired) credential", Trouble.RETRY),
    # The request was sent, and the answer was not understood.
    (r"End of File|protocol error|communication failure|timed out|time-?out", Trouble.UNSURE),
    (r"would exceed .*limit|Maximum number of jobs .*already in", Trouble.CAPACITY),
    (r"Queue is not enabled", Trouble.CAPACITY),
    (r"Bad UID for job execution|Resource temporarily unavailable|Resource busy", Trouble.RETRY),
)
#: qstat says so of a single job, with status 153 or 35, and lists the others.
_UNKNOWN = re.compile(r"Unknown Job Id|Job has finished|not configured to maintain job history")


def submit_argv(request: Request) -> list[str]:
    """Submit a script; the job is never started twice. Without -f, qsub leaves a process behind."""
    output = str(request.output)
    if ":" in output:
        output = f"{os.uname().nodename}:{output}"
    return [
        "qsub",
        "-f",
        *("-N", request.name),
        *("-o", output),
        *("-j", "oe"),
        *("-r", "n"),
        *request.flags,
        str(request.script),
    ]


def parse_submit(answer: Completed) -> str:
    """Return the id with its server, `12.server`: from the last line that is one, as hooks talk too."""
    for line in reversed(answer.stdout.splitlines()):
        if match := re.fullmatch(r"[0-9]+(\[[0-9]*\])?(\.[\w.-]+)?", line.strip(), re.ASCII):
            return match[0]
    raise fail("PBS", (("", Trouble.UNSURE),), "tell the id of the batch job", answer)


def status_argv(_: Sequence[str]) -> list[str]:
    """List the default server's jobs, of all users: -u does not go with -f, and ids find no job by name."""
    return ["qstat", "-f", "-F", "json"]


def parse_status(answer: Completed) -> list[Seen]:
    """Return this user's jobs."""
    return parse_jobs(answer, user_name())


def parse_jobs(answer: Completed, owner: str | None) -> list[Seen]:
    """Return a user's jobs as qstat lists them; those of all users where *owner* is None."""
    if not _is_answer(answer):
        raise fail("PBS", _TROUBLES, "list batch jobs", answer)
    return [
        _seen(id, job)
        for id, job in _read(answer).items()
        if isinstance(job, dict) and owner in (None, _text(job, "Job_Owner").partition("@")[0])
    ]


def cancel_argv(id: str) -> list[str]:
    """Delete a job."""
    return ["qdel", id]


def history_argv(id: str) -> list[str]:
    """Ask about one job that may have ended; the server keeps those only if it was told to."""
    return ["qstat", "-x", "-f", "-F", "json", id]


def parse_history(answer: Completed) -> list[Seen]:
    """Return what the server remembers; nothing where it does not know the job, or keeps no history."""
    if _UNKNOWN.search(answer.stderr) and _is_answer(answer) and '"Jobs"' not in answer.stdout:
        return []
    return parse_status(answer)


def _is_answer(answer: Completed) -> bool:
    """Tell whether qstat reached its server: it prints JSON without jobs also where it did not."""
    if answer.code == 0:
        return True
    words = [line for line in answer.stderr.splitlines() if line.startswith("qstat:")]
    return bool(words) and all(_UNKNOWN.search(line) for line in words)


def _read(answer: Completed) -> dict[str, Any]:
    """Return the jobs in what qstat printed, whatever stands before or after it."""
    for text in (answer.stdout, _repair(answer.stdout)):
        for start in re.finditer(r"^\{", text, re.MULTILINE):
            found = _decode(text, start.start())
            if found is not None and "pbs_server" in found:
                jobs = found.get("Jobs", {})
                if isinstance(jobs, dict):
                    return jobs
    words = " / ".join(filter(str.strip, answer.stdout.splitlines()[:3]))
    raise SchedulerError(
        f"PBS cannot list batch jobs: qstat printed no whole JSON: {words[:200] or 'nothing'!r}; "
        "try `qstat -f -F json` (Torque has none: it is not supported)",
        trouble=Trouble.RETRY,
        output=answer.stdout + answer.stderr,
    )


def _decode(text: str, start: int) -> dict[str, Any] | None:
    try:
        # Not strict: older versions print line breaks and tabs in strings as they are.
        found, _ = json.JSONDecoder(strict=False).raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _repair(text: str) -> str:
    """Return the JSON of older versions, one key a line, without the values that they print badly.

    Those are quotes in a job's arguments, numbers with leading zeros, and its environment, which may hold
    anything; of that we need nothing.
    """
    text = re.sub(
        r'^([ \t]*)"Variable_List"\s*:\s*\{\n.*?^\1\}', r'\1"Variable_List":{}', text,
        flags=re.MULTILINE | re.DOTALL,
    )  # fmt: skip
    return "\n".join(_repair_lines(text.split("\n")))


def _repair_lines(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        match = re.fullmatch(r'(\s*"[^"]*"\s*:\s*)([^\s{].*?)(,?)', line.rstrip())
        if match is None or _is_json(match[2]):
            yield line
        else:
            yield match[1] + json.dumps(match[2].strip('"')) + match[3]


def _is_json(text: str) -> bool:
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return True


def _seen(id: str, job: dict[str, Any]) -> Seen:
    letter, comment = _text(job, "job_state"), _text(job, "comment")
    start = _time(_text(job, "stime"))
    status = _number(job, "Exit_status")
    state, words, code = STATES.get(letter, JobState.RUNNING), _WORDS.get(letter, ""), None
    has_ended = letter in ("F", "X")
    if has_ended:
        state, words, code = _judge(
            status, _number(job, "substate"), comment, has_run=start is not None
        )
    limit = parse_duration(_text(job.get("Resource_List"), "walltime"))
    limit = None if limit is None or limit > 2**32 else limit  # beyond all calendars
    is_running = state is JobState.RUNNING
    return Seen(
        id=id,
        name=_text(job, "Job_Name"),
        state=state,
        reason=" / ".join(filter(None, (words, comment))),
        is_stuck=state is JobState.QUEUED and _STUCK.search(comment) is not None,
        exit_code=code,
        started_at=start if is_running or has_ended else None,
        ended_at=_end(job) if has_ended else None,
        ends_at=start + limit if is_running and start is not None and limit else None,
    )


def _judge(
    status: int | None, substate: int | None, comment: str, *, has_run: bool
) -> tuple[JobState, str, int | None]:
    """Return how a job ended, in words where its comment may not tell, and its exit code.

    Up to 255 it is the status of the script; 256 + N is signal N; below 0 it is what MoM did.
    """
    if substate == _MOVED:
        return JobState.LOST, "moved to another server", None
    if status is None:
        gone = JobState.LOST, "deleted without a word from its node"
        return *(gone if has_run else (JobState.CANCELLED, "deleted before it ran")), None
    if status < 0:
        return *_STATUSES.get(status, (JobState.FAILED, f"exit status {status}")), None
    code = 128 + (status - 256) % 128 if status >= 256 else status
    if _TIMED_OUT.search(comment):
        return JobState.TIMEOUT, "", code
    if substate == _TERMINATED or _CANCELLED.search(comment):
        return JobState.CANCELLED, "", code
    return JobState.FAILED if code else JobState.FINISHED, "", code


def _end(job: dict[str, Any]) -> float | None:
    # A job that never ran has no obituary.
    end = _time(_text(job, "obittime"))
    stamp = _number(job, "history_timestamp")
    return end if end is not None or stamp is None else float(stamp)


def _text(job: object, key: str) -> str:
    """Return a value as text: versions differ in what they take for a number."""
    value = job.get(key, "") if isinstance(job, dict) else ""
    return str(value) if isinstance(value, str | int | float) else ""


def _number(job: dict[str, Any], key: str) -> int | None:
    text = _text(job, key)
    return int(text) if re.fullmatch(r"-?[0-9]{1,10}", text, re.ASCII) else None


def _time(text: str) -> float | None:
    """Return epoch seconds of `Sun Nov 22 13:02:21 2026`: the local time of qstat, which runs with TZ=UTC."""
    try:
        return float(calendar.timegm(time.strptime(text[4:], "%b %d %H:%M:%S %Y")))
    except ValueError:
        return None


PBS = Scheduler(
    name="pbs",
    # The others are Torque's, Grid Engine's and Cobalt's, too.
    programs=("pbs_rstat", "qsub", "qstat", "qdel"),
    submit_argv=submit_argv,
    parse_submit=parse_submit,
    status_argv=status_argv,
    parse_status=parse_status,
    cancel_argv=cancel_argv,
    troubles=_TROUBLES,
    is_gone=r"Unknown Job Id|Job has finished|Request invalid for state of job|Delete already in progress",
    # What a job around us has, and what would take other lines for directives.
    scrubbed=("PBS_DPREFIX", "PBS_O_", "PBS_JOB", "PBS_NODE", "PBS_ENVIRONMENT", "PBS_QUEUE"),
    history_argv=history_argv,
    parse_history=parse_history,
)
