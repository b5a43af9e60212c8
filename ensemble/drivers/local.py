"""The local scheduler: batch jobs are processes of this machine, so that everything works on a laptop.

`localbatch.py` is its submit, status and cancel command; its docstring says how it works.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ensemble.core.batchjob import JobState
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, Scheduler, Seen, fail
from ensemble.errors import SchedulerError, Trouble

_TROUBLES = (
    # Ended by a signal, or with a bug of its own: a job may have been left behind.
    (r"\A\Z|Traceback|is submitted, but", Trouble.UNSURE),
    (
        r"No space left|quota exceeded|Too many open files|temporarily unavailable|Cannot allocate memory"
        r"|Input/output error|Stale file handle|supervisor: it was killed",
        Trouble.RETRY,
    ),
)


def make(directory: Path, max_running: int) -> Scheduler:
    """Return the local scheduler with its records in a directory, at most so many jobs running at once."""
    script = str(Path(__file__).with_name("localbatch.py"))

    def argv(verb: str, *words: str) -> list[str]:
        return [
            sys.executable,
            "-I",
            "-S",
            script,
            verb,
            "--dir",
            str(directory.absolute()),
            *words,
        ]

    def submit_argv(request: Request) -> list[str]:
        options = {
            "--max-running": str(max_running),
            "--name": request.name,
            "--output": str(request.output),
        }
        words = [word for option in options.items() for word in option]
        return argv("submit", *words, *request.flags, "--", str(request.script))

    return Scheduler(
        name="local",
        programs=(),
        submit_argv=submit_argv,
        parse_submit=parse_submit,
        status_argv=lambda ids: argv("status"),
        parse_status=parse_status,
        cancel_argv=lambda id: argv("cancel", "--", id),
        troubles=_TROUBLES,
        is_gone=r"job [0-9]+ has ended|there is no job [0-9]+",
    )


def parse_submit(answer: Completed) -> str:
    """Return the job's id: a number, and nothing else."""
    text = answer.stdout.strip()
    if text.isascii() and text.isdigit():
        return text
    raise SchedulerError(
        f"local: expected a job's number, found {text[:80]!r}: whether it was submitted is not known",
        trouble=Trouble.UNSURE,
        output=answer.stdout,
    )


def parse_status(answer: Completed) -> list[Seen]:
    """Return all jobs of the directory: a line of JSON each, and a last one with their number."""
    if answer.code != 0:
        raise fail("local", _TROUBLES, "list batch jobs", answer)
    try:
        *lines, last = [json.loads(line) for line in answer.stdout.splitlines()]
        seen = [_to_seen(line) for line in lines]
        if last != {"listed": len(seen)}:
            raise ValueError("its last lines are missing")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SchedulerError(
            f"local: cannot understand the list of batch jobs: {str(error)[:200]!r}",
            trouble=Trouble.RETRY,
            output=answer.stdout,
        ) from error
    return seen


def _to_seen(line: dict[str, Any]) -> Seen:
    return Seen(
        id=_typed(line["id"], str),
        state=JobState(line["state"]),
        name=_typed(line.get("name", ""), str),
        reason=_typed(line["reason"], str),
        is_stuck=line["state"] == "LOST",
        exit_code=_number(line.get("exit_code"), int, 256),
        started_at=_number(line.get("started_at"), float, 2**37),
        ended_at=_number(line.get("ended_at"), float, 2**37),
        ends_at=_number(line.get("ends_at"), float, 2**37),
    )


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"unexpected {value!r}")
    return value


def _number(value: Any, kind: type, limit: int) -> Any:
    if value is not None and not 0 <= _typed(value, kind) < limit:
        raise ValueError(f"unexpected {value!r}")
    return value
