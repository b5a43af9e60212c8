"""Flux, as the scheduler of a whole machine.

By its manual only; not proven on a real machine. Sources: flux-batch(1), flux-jobs(1), flux-cancel(1) and
flux-config-policy(5) of flux-core 0.88, and RFC 19 and 21 of the Flux project for ids and states.

An id is one number with many spellings. Here it is F58 in ASCII, `fuZZybuNNy`: what `flux batch` prints where
FLUX_F58_FORCE_ASCII is set, and what the decimal numbers of `flux jobs --json` are turned into, so that both
compare equal; every flux command takes it. Directives are `# flux: -N 4` and `# flux: -t 60m`.
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

#: The first pattern found decides. The text on active jobs is that of flux-accounting.
TROUBLES = (
    (
        r"unable to connect to flux|flux_open|connection refused|no such file or directory.*local-\d",
        Trouble.RETRY,
    ),
    (
        r"lost connection|connection (reset|timed out)|broken pipe|host is unreachable",
        Trouble.UNSURE,
    ),
    (r"user has max (active |submitted )?jobs|max(imum)? active jobs", Trouble.CAPACITY),
)

#: RFC 21: all states but INACTIVE, which has a result.
STATES = {
    "NEW": JobState.QUEUED,
    "DEPEND": JobState.QUEUED,
    "PRIORITY": JobState.QUEUED,
    "SCHED": JobState.QUEUED,
    "RUN": JobState.RUNNING,
    # It still has its nodes.
    "CLEANUP": JobState.RUNNING,
}
RESULTS = {
    "COMPLETED": JobState.FINISHED,
    "FAILED": JobState.FAILED,
    "CANCELED": JobState.CANCELLED,
    "TIMEOUT": JobState.TIMEOUT,
}

#: More than anybody has; flux jobs stops at 1000 unless told.
MOST_JOBS = 100_000

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def submit_argv(request: Request) -> list[str]:
    """Submit a script that runs in an instance of Flux of its own; errors go where the output goes."""
    return [
        *("flux", "batch", f"--job-name={request.name}", f"--output={request.output}"),
        *request.flags,
        str(request.script),
    ]


def parse_submit(answer: Completed) -> str:
    """Return the id on the last line, in F58."""
    words = answer.stdout.split()
    job_id = _normalise(words[-1]) if words else None
    if job_id is None:
        raise fail("flux", (("", Trouble.UNSURE),), "tell the id of a submitted job", answer)
    return job_id


def status_argv(_: Sequence[str]) -> list[str]:
    """List all jobs of this user, those too that have ended, until the site purges them."""
    return ["flux", "jobs", "-a", "--json", f"--count={MOST_JOBS}"]


def parse_status(answer: Completed) -> list[Seen]:
    """Read the JSON of flux jobs; keys are absent as long as there is nothing to tell."""
    try:
        if answer.code != 0:
            raise ValueError(answer.code)
        # Whatever was printed around the document.
        text = answer.stdout
        document = json.JSONDecoder().raw_decode(text, text.index("{"))[0]
        if not isinstance(document["jobs"], list):
            raise TypeError("jobs is no list")
        return [_parse_job(job) for job in document["jobs"]]
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise no_listing("flux", TROUBLES, answer) from error


def cancel_argv(job_id: str) -> list[str]:
    """Send TERM; KILL follows after the site's kill-timeout, 5 s by default."""
    return ["flux", "cancel", job_id]


def to_f58(number: int) -> str:
    """Return an id in base 58 and ASCII (RFC 19)."""
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58[digit] + digits
    return "f" + (digits or "1")


def _normalise(word: str) -> str | None:
    if re.fullmatch("[0-9]{1,20}", word, re.ASCII):
        return to_f58(int(word))
    return "f" + word[1:] if re.fullmatch(f"[ƒf][{_BASE58}]{{1,12}}", word) else None


def _parse_job(job: dict[str, Any]) -> Seen:
    number, word, result = int(job["id"]), str(job["state"]), str(job.get("result") or "")
    if number < 0 or not word:
        raise ValueError(f"no job: {job}")
    is_over = word == "INACTIVE"
    code = job.get("returncode")
    return Seen(
        id=to_f58(number),
        # A result that is unknown here is that of a job that is over.
        state=RESULTS.get(result, JobState.FAILED)
        if is_over
        else STATES.get(word, JobState.RUNNING),
        name=str(job.get("name") or ""),
        reason=_find_reason(job),
        # Urgency 0 is how a job is held.
        is_stuck=word in ("PRIORITY", "SCHED") and job.get("urgency") == 0,
        exit_code=_exit_code(code) if is_over and isinstance(code, int) else None,
        started_at=_time(job, "t_run"),
        ended_at=_time(job, "t_inactive") if is_over else None,
        ends_at=None if is_over else _time(job, "expiration"),
    )


def _find_reason(job: dict[str, Any]) -> str:
    """Return what ended it, else what the scheduler says it waits for."""
    exception = job.get("exception") or {}
    if exception.get("occurred") and exception.get("type"):
        return ": ".join(str(exception[key]) for key in ("type", "note") if exception.get(key))
    scheduler = (job.get("annotations") or {}).get("sched") or {}
    return str(scheduler.get("reason_pending") or "")


def _exit_code(code: int) -> int | None:
    """Turn -N, signal N, into 128 + N; -128 means that it never ran."""
    status = (None if code == -128 else 128 - code) if code < 0 else code
    return status if status is not None and status < 2**31 else None


def _time(job: dict[str, Any], key: str) -> float | None:
    """Return epoch seconds; 0 is "without end"."""
    value = job.get(key)
    return float(value) if isinstance(value, int | float) and 0 < value < 2**37 else None


FLUX = Scheduler(
    name="flux",
    programs=("flux",),
    submit_argv=submit_argv,
    parse_submit=parse_submit,
    status_argv=status_argv,
    parse_status=parse_status,
    cancel_argv=cancel_argv,
    troubles=TROUBLES,
    is_gone=r"job is inactive|is already inactive|unknown job",
    # A user's own format and filter.
    scrubbed=("FLUX_JOBS_",),
    environ={"FLUX_F58_FORCE_ASCII": "1"},
)
