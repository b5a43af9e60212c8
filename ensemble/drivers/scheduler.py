"""What Ensemble asks of a batch scheduler, and what it understands: argv out, text in.

A driver (slurm.py, pbs.py, ...) is one `Scheduler` value made of small pure functions and tables, each with
the source of its facts. `batch.py` does the input and output for all of them; docs/add-a-scheduler.md says
how to write another.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ensemble.core.batchjob import JobState
from ensemble.drivers.process import Completed
from ensemble.errors import SchedulerError, Trouble


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One batch job to be submitted. Size, time, queue and project are directives inside the script."""

    script: Path
    #: Unique among all jobs of this user: by it an uncertain submission is looked up.
    name: str
    #: The file that the job's standard output and error go to.
    output: Path
    #: More words for the submit command, as the user gave them: they override the script's directives.
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A batch job as the scheduler's listing shows it."""

    id: str
    state: JobState
    #: The job's name; empty where the listing does not tell.
    name: str = ""
    #: Why it waits, or how it ended, in the scheduler's own words.
    reason: str = ""
    #: Whether it waits for something that will not come: a human has to look.
    is_stuck: bool = False
    #: Exit status of the script, 128 + N after signal N; None where it has not ended or nobody tells.
    exit_code: int | None = None
    #: Epoch seconds.
    started_at: float | None = None
    ended_at: float | None = None
    #: When the scheduler will end it, epoch seconds.
    ends_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """One batch scheduler: commands out, what they print in."""

    #: `slurm`, `pbs`, `cobalt`, `lsf`, `sge`, `flux` or `local`.
    name: str
    #: Commands that are on PATH where it is; the first one is how it is recognised.
    programs: tuple[str, ...]
    submit_argv: Callable[[Request], list[str]]
    #: Returns the job's id from the output of a submit command that ended with status 0.
    parse_submit: Callable[[Completed], str]
    #: One command for all batch jobs of this user; ids are those that we ask for.
    status_argv: Callable[[Sequence[str]], list[str]]
    #: Returns what a listing shows, whatever its exit status. Raises SchedulerError, through `fail`,
    #: where it is no listing: a failed query must never look like an empty queue.
    parse_status: Callable[[Completed], list[Seen]]
    cancel_argv: Callable[[str], list[str]]
    #: What a failed command's output means: the first pattern found decides; none is PERMANENT.
    troubles: tuple[tuple[str, Trouble], ...] = ()
    #: What `cancel` says of a job that has ended already.
    is_gone: str = r"(?!)"
    #: Variables of the environment, by prefix, that would silently change what its commands do.
    scrubbed: tuple[str, ...] = ()
    #: Variables that are kept all the same: what its commands need to find it.
    kept: tuple[str, ...] = ()
    #: What its commands get besides.
    environ: dict[str, str] = field(default_factory=dict)
    #: What all of them get besides but the submit command, whose environment some schedulers give to the job.
    query_environ: dict[str, str] = field(default_factory=dict)
    #: Whether the submit command reads the script from its standard input.
    is_script_piped: bool = False
    #: Asks for the end of one job that is not listed any more; None where nobody keeps it.
    history_argv: Callable[[str], list[str]] | None = None
    parse_history: Callable[[Completed], list[Seen]] | None = None


def user_name() -> str:
    """Return who this process runs as, as listings name the owners of jobs."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container without an account
        return os.environ.get("USER") or str(os.geteuid())


def no_listing(
    scheduler: str, troubles: Sequence[tuple[str, Trouble]], answer: Completed
) -> SchedulerError:
    """Return the error for a status command that printed no listing: at worst it is asked again."""
    return fail(scheduler, (*troubles, ("", Trouble.RETRY)), "list jobs", answer)


def fail(
    scheduler: str, troubles: Sequence[tuple[str, Trouble]], verb: str, answer: Completed
) -> SchedulerError:
    """Return the error for a command that failed: its own words, and what is to be done about it."""
    text = "\n".join(part.strip() for part in (answer.stderr, answer.stdout) if part.strip())
    kind = next(
        (trouble for pattern, trouble in troubles if re.search(pattern, text, re.IGNORECASE)),
        Trouble.PERMANENT,
    )
    words = " / ".join(line.strip() for line in text.splitlines() if line.strip())
    return SchedulerError(
        f"{scheduler} cannot {verb}: {words[:500] or f'exit status {answer.code}, no message'}",
        trouble=kind,
        output=text,
    )
