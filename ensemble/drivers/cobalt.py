"""Cobalt, the scheduler of Theta and of the Blue Genes; retired, and still at work on some clusters.

By its manual only; not proven on a real machine. Sources: qsub(1), qstat(1), qdel(1) and cobalt.conf(5) of
Cobalt, and for the layout of tables and for messages its clients' source (github.com/ido/cobalt).

What it does not have: a history. A job that has ended is no longer listed, and nobody tells how it ended.

What it wants: a script that is executable. Directives are `#COBALT -n 4 -t 60`, in minutes.
"""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Sequence

from ensemble.core.batchjob import JobState
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, Scheduler, Seen, fail, no_listing, user_name
from ensemble.drivers.walltime import parse_duration
from ensemble.errors import Trouble

#: The first pattern found decides.
TROUBLES = (
    (r"failed to connect to queue manager|connection refused|ComponentLookupError", Trouble.RETRY),
    (r"timed out|connection (reset|lost)|broken pipe", Trouble.UNSURE),
    (r"limit of \d+ jobs per user|maxuserjobs limit|has been reached", Trouble.CAPACITY),
)

#: qstat(1) and the queue manager's source. What is not here is on the machine, one way or another.
STATES = {
    "queued": JobState.QUEUED,
    "user_hold": JobState.QUEUED,
    "admin_hold": JobState.QUEUED,
    "dep_hold": JobState.QUEUED,
    "dep_fail": JobState.QUEUED,
    "maxrun_hold": JobState.QUEUED,
    "hold": JobState.QUEUED,
    "preempted": JobState.QUEUED,
    "starting": JobState.RUNNING,
    "running": JobState.RUNNING,
    "killing": JobState.RUNNING,
    "exiting": JobState.RUNNING,
}
#: They stay so until somebody acts; dep_fail is a dependency that has failed.
STUCK = {"user_hold", "admin_hold", "dep_fail"}

#: The name is last, as it may hold spaces.
COLUMNS = ("JobID", "State", "WallTime", "StartTime", "JobName")


def submit_argv(request: Request) -> list[str]:
    """Submit a script, which must be executable; output and errors go to one file."""
    output = str(request.output)
    return [
        "qsub",
        "--jobname",
        request.name,
        *("-o", output, "-e", output, "--debuglog", f"{output}.cobaltlog"),
        *request.flags,
        str(request.script),
    ]


def parse_submit(answer: Completed) -> str:
    """Return the last line that is a number: filters of the site may print others before it."""
    ids = re.findall(r"^\s*([0-9]{1,18})\s*$", answer.stdout, re.MULTILINE | re.ASCII)
    if not ids:
        raise fail("cobalt", (("", Trouble.UNSURE),), "tell the id of a submitted job", answer)
    return str(ids[-1])


def status_argv(_: Sequence[str]) -> list[str]:
    """List all jobs of this user; an unknown id among those asked for would hide the others."""
    return ["qstat", "--header", ":".join(COLUMNS), "-u", user_name()]


def parse_status(answer: Completed) -> list[Seen]:
    """Read a table: header, a line of `=`, and a line for each job, cut at the places of the header."""
    lines = answer.stdout.split("\n")
    top = next((n for n, line in enumerate(lines) if tuple(line.split()) == COLUMNS), None)
    is_table = top is not None and lines[-1] == "" and re.fullmatch("={5,} *", lines[top + 1])
    if answer.code != 0 or top is None or not is_table:
        raise no_listing("cobalt", TROUBLES, answer)
    places = [lines[top].index(column) for column in COLUMNS]
    return [_parse_row(line, places, answer) for line in lines[top + 2 :] if line.strip()]


def cancel_argv(job_id: str) -> list[str]:
    """Send TERM to the script; KILL follows after the site's `force_kill_delay`, 300 s by default."""
    return ["qdel", job_id]


def _parse_row(line: str, places: list[int], answer: Completed) -> Seen:
    ends = [*places[1:], None]
    job_id, state, walltime, start, name = (
        line[place:end].strip() for place, end in zip(places, ends, strict=True)
    )
    if not re.fullmatch(r"[0-9]{1,18}", job_id, re.ASCII) or not state or not name:
        raise no_listing("cobalt", TROUBLES, answer)
    started_at = _parse_time(start)
    limit_s = parse_duration(walltime)
    word = state.lower()
    return Seen(
        id=job_id,
        state=STATES.get(word, JobState.RUNNING),
        name=name,
        reason="" if word in ("queued", "running") else state,
        is_stuck=word in STUCK,
        started_at=started_at,
        # A day of hours at most has been seen; what is beyond all calendars is no time.
        ends_at=None
        if started_at is None or limit_s is None or limit_s > 2**32
        else started_at + limit_s,
    )


def _parse_time(text: str) -> float | None:
    """Return epoch seconds of `Thu Jan  1 00:01:00 1970 +0000 (UTC)`; None for `N/A`."""
    match = re.fullmatch(r"\w{3} (\w{3} +\d+ [0-9:]{8} \d{4}) \+0000\b.*", text, re.ASCII)
    try:
        return (
            float(calendar.timegm(time.strptime(match[1], "%b %d %H:%M:%S %Y"))) if match else None
        )
    except ValueError:
        return None


COBALT = Scheduler(
    name="cobalt",
    # qsub, qstat and qdel are PBS's and Grid Engine's too.
    programs=("cqwait", "qsub", "qstat", "qdel"),
    submit_argv=submit_argv,
    parse_submit=parse_submit,
    status_argv=status_argv,
    parse_status=parse_status,
    cancel_argv=cancel_argv,
    troubles=TROUBLES,
    # Printed on stdout, with status 0.
    is_gone=r"Job \d+ not found",
    scrubbed=("QSTAT_",),
)
