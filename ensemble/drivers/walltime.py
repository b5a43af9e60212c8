"""When an allocation ends: each scheduler's question (argv out) and its answer (text in).

Sources: the manual pages of squeue (22.05) and qstat(1B) of OpenPBS 23.06, IBM's reference of LSF,
flux-job(1).
"""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Callable, Mapping

from ensemble.drivers import batch

#: Where the environment tells the end, in epoch seconds.
_END = {
    "slurm": "SLURM_JOB_END_TIME",
    "cobalt": "COBALT_ENDTIME",
    "local": "ENSEMBLE_LOCAL_JOB_END",
}


async def find_end(
    scheduler: str, environ: Mapping[str, str], job_id: str, now: float
) -> float | None:
    """Return the end of this job in epoch seconds; None when it has none, or nobody can tell."""
    text = environ.get(_END.get(scheduler, ""), "")
    if re.fullmatch(r"[0-9]{9,10}(\.[0-9]*)?", text):
        return _finite(float(text))
    asked: tuple[list[str], Callable[[str], float | None]]
    match scheduler:
        case "slurm":
            asked = squeue_argv(job_id), lambda text: parse_squeue(text, now)
        case "pbs":
            asked = qstat_argv(job_id), parse_qstat
        case "lsf":
            asked = bjobs_argv(job_id), lambda text: parse_bjobs(text, now)
        case "flux":
            asked = timeleft_argv(), lambda text: parse_timeleft(text, now)
        case _:
            return None
    argv, parse = asked
    answer = await batch.ask(argv, environ)
    return None if answer is None else parse(answer)


def squeue_argv(job_id: str) -> list[str]:
    """Ask Slurm for a job's end and time left; with SLURM_TIME_FORMAT=%s the end is in epoch seconds."""
    return ["squeue", "-h", "-j", job_id, "-o", "%e|%L"]


def parse_squeue(text: str, now: float) -> float | None:
    """Return the end: the first column, else now and the second one."""
    end, _, left = text.strip().partition("\n")[0].partition("|")
    if re.fullmatch(r"[0-9]{9,10}", end):
        return _finite(float(end))
    seconds = parse_duration(left)
    return None if seconds is None else now + seconds


def qstat_argv(job_id: str) -> list[str]:
    """Ask PBS about one job; with TZ=UTC in its environment it prints times in UTC."""
    return ["qstat", "-f", "-F", "json", job_id]


def parse_qstat(text: str) -> float | None:
    """Return the job's start and walltime, added up.

    By patterns, because some versions print JSON that is not valid (values of Variable_List).
    """
    start = re.search(r'"stime"\s*:\s*"\w{3} (\w{3} +\d+ [0-9:]{8} \d{4})"', text)
    limit = re.search(r'"Resource_List"\s*:\s*\{[^}]*"walltime"\s*:\s*"([0-9:]+)"', text)
    seconds = parse_duration(limit[1]) if limit else None
    if start is None or seconds is None:
        return None
    try:
        return calendar.timegm(time.strptime(start[1], "%b %d %H:%M:%S %Y")) + float(seconds)
    except ValueError:
        return None


def bjobs_argv(job_id: str) -> list[str]:
    """Ask LSF for the time that a job has left."""
    return ["bjobs", "-noheader", "-o", "time_left", job_id]


def parse_bjobs(text: str, now: float) -> float | None:
    """Return the end: `0:59 L` is in hours and minutes, `120 second(s)` as it says, `-` no limit."""
    if match := re.match(r"\s*([0-9]+):([0-9]{2})\b", text):
        return now + int(match[1]) * 3600 + int(match[2]) * 60
    match = re.match(r"\s*([0-9]+) second", text)
    return now + int(match[1]) if match else None


def timeleft_argv() -> list[str]:
    """Ask Flux for the seconds that the enclosing job has left."""
    return ["flux", "job", "timeleft"]


def parse_timeleft(text: str, now: float) -> float | None:
    """Return the end; Flux prints the largest unsigned integer where there is no limit."""
    match = re.fullmatch(r"\s*([0-9]{1,10})(?:\.[0-9]*)?\s*", text)
    return now + int(match[1]) if match and int(match[1]) < 2**32 - 1 else None


def parse_duration(text: str) -> int | None:
    """Return the seconds of `[D-]H:M:S`, `M:S`, `D-H`, `D-H:M` or a number of seconds; else None."""
    match = re.fullmatch(r"(?:([0-9]{1,6})-)?([0-9]{1,9}(?::[0-9]{1,3}){0,2})", text.strip())
    if match is None:
        return None
    parts = [int(part) for part in match[2].split(":")]
    # After days the first number is hours; without them the last one is seconds.
    padded = [*parts, 0, 0][:3] if match[1] else [0, 0, *parts][-3:]
    hours, minutes, seconds = padded
    return int(match[1] or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds


def _finite(end: float) -> float | None:
    """Return None for what Slurm writes for ever: the largest 32-bit integers."""
    return end if 0 < end < 2**32 - 16 else None
