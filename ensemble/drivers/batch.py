"""Runs the commands of batch schedulers, each with a time-out and an environment of its own."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import aiofiles

from ensemble.drivers import process
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, Scheduler, Seen, fail
from ensemble.errors import LaunchError, SchedulerError, Trouble

#: Every scheduler there is a driver for; `local` runs batch jobs on this machine.
SCHEDULERS = ("slurm", "pbs", "cobalt", "lsf", "sge", "flux", "local")
#: Seconds that a scheduler's command may take: squeue needs nine to find that its controller is down.
ANSWER_TIMEOUT_S = 15.0
#: What a command may print: the jobs of all users of a large machine are a few megabytes.
MAX_BYTES = 64 << 20
#: So that texts and times can be read. Not for submissions, whose environment many schedulers give to the job.
_PLAIN = {"LC_ALL": "C", "TZ": "UTC"}
_TITLES = {"slurm": "Slurm", "pbs": "PBS", "sge": "Grid Engine", "lsf": "LSF"}


async def ask(argv: list[str], environ: Mapping[str, str]) -> str | None:
    """Return what a scheduler's command prints; None when it fails, is missing or is too slow."""
    # A user's SQUEUE_… would filter and format.
    env = {name: value for name, value in environ.items() if not name.startswith("SQUEUE_")}
    env |= _PLAIN | {"SLURM_TIME_FORMAT": "%s"}
    try:
        done = await process.run(argv, env=env, timeout_s=ANSWER_TIMEOUT_S)
    except LaunchError:
        return None
    return done.stdout if done.code == 0 else None


def get(name: str, *, directory: Path, max_running: int) -> Scheduler:
    """Return a scheduler's driver.

    Args:
        name: One of SCHEDULERS.
        directory: Where the `local` one keeps its books.
        max_running: How many batch jobs the `local` one runs at once.

    Raises:
        SchedulerError: There is none of that name.
    """
    if name not in SCHEDULERS:
        raise SchedulerError(
            f"no scheduler is called {name!r}: [scheduler] kind is one of {', '.join(SCHEDULERS)}",
            trouble=Trouble.PERMANENT,
        )
    # By name, as some of them build on this module.
    module = import_module(f"ensemble.drivers.{name}")
    made = module.make(directory, max_running) if name == "local" else getattr(module, name.upper())
    assert isinstance(made, Scheduler)
    return made


def find_scheduler_names(environ: Mapping[str, str]) -> list[str]:
    """Return the schedulers whose programs are on PATH, without `local`, which is everywhere."""
    path = environ.get("PATH", "")
    return [
        name
        for name in SCHEDULERS
        if name != "local"
        and shutil.which(get(name, directory=Path(), max_running=1).programs[0], path=path)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """What one status command gave, for those who asked before it began."""

    number: int
    ids: frozenset[str]
    found: list[Seen] | SchedulerError


class BatchSystem:
    """A batch scheduler that one can submit to, look at, and cancel in."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        environ: Mapping[str, str],
        cwd: Path | str,
        timeout_s: float = 60.0,
    ) -> None:
        """Run nothing yet.

        Args:
            environ: This process's environment; what would change the commands' meaning is left out.
            cwd: Where the commands run.
            timeout_s: Seconds that each of them may take.
        """
        self.scheduler = scheduler
        self.timeout_s = timeout_s
        self._cwd = str(cwd)
        self._environ = _scrub(scheduler, environ) | scheduler.environ
        self._turn = asyncio.Lock()
        self._begun = 0
        self._last: _Listing | None = None

    async def submit(self, request: Request) -> str:
        """Submit a batch job and return its id.

        Raises:
            SchedulerError: It was refused; or, where `trouble` is UNSURE, nobody knows. So it is
                after a cancellation of this call.
        """
        script = await self._read(request.script) if self.scheduler.is_script_piped else None
        answer = await self._run("submit", self.scheduler.submit_argv(request), script=script)
        found = self._find_id(answer)
        if answer.code != 0:
            error = self._fail("submit", answer)
            # A wrapper may have failed after the scheduler had taken the job.
            has_taken = bool(found) or answer.code < 0
            raise _with_trouble(error, Trouble.UNSURE) if has_taken else error
        if not found:
            text = f"{answer.stdout}\n{answer.stderr}"
            words = " / ".join(line.strip() for line in text.splitlines() if line.strip())
            raise SchedulerError(
                f"{self._title} may have taken the batch job {request.name}, but gave no id: "
                f"{words[:500] or 'it printed nothing'}",
                trouble=Trouble.UNSURE,
                output=text,
            )
        return found

    async def listing(self, ids: Sequence[str]) -> list[Seen]:
        """Return all of this user's batch jobs that the scheduler shows.

        At most one query is under way. Those who come meanwhile wait for it and share the next
        one: the one under way may be older than what they have just submitted.

        Args:
            ids: The jobs that must not be missed.

        Raises:
            SchedulerError: The scheduler did not tell. That never means that it has no jobs.
        """
        before, wanted = self._begun, frozenset(ids)
        async with self._turn:
            last = self._last
            if last is None or last.number <= before or not wanted <= last.ids:
                self._begun += 1
                last = self._last = _Listing(
                    number=self._begun, ids=wanted, found=await self._look(sorted(wanted))
                )
        if isinstance(last.found, SchedulerError):
            raise _with_trouble(
                last.found, last.found.trouble
            )  # each its own: they gather tracebacks
        return list(last.found)

    async def history(self, id: str) -> Seen | None:
        """Return how a batch job ended that is listed no more; None where nobody knows.

        Raises:
            SchedulerError: The scheduler did not tell.
        """
        argv, parse = self.scheduler.history_argv, self.scheduler.parse_history
        if argv is None or parse is None:
            return None
        answer = await self._run("tell the end of a batch job", argv(id))
        try:
            found = parse(answer)
        except SchedulerError as error:
            raise _harmless(error) from error
        return replace(found[-1], id=id) if found else None

    async def cancel(self, id: str) -> bool:
        """Cancel a batch job; return False when it had ended already, or is not known any more.

        Raises:
            SchedulerError: It was not cancelled, as far as one knows; trying again does no harm.
        """
        answer = await self._run("cancel", self.scheduler.cancel_argv(id))
        if _is_gone(self.scheduler, answer):
            return False
        if answer.code != 0:
            raise _harmless(self._fail(f"cancel {id}", answer))
        return True

    @property
    def _title(self) -> str:
        return _TITLES.get(self.scheduler.name, self.scheduler.name)

    def _find_id(self, answer: Completed) -> str:
        """Return the id in what a submit command printed; empty where there is none."""
        try:
            found = self.scheduler.parse_submit(replace(answer, stderr=""))
        except (SchedulerError, ValueError, LookupError):
            return ""
        return found if found.isprintable() and len(found.split()) == 1 else ""

    async def _look(self, ids: Sequence[str]) -> list[Seen] | SchedulerError:
        try:
            return self.scheduler.parse_status(
                await self._run("list batch jobs", self.scheduler.status_argv(ids))
            )
        except SchedulerError as error:
            return _harmless(error)

    async def _read(self, script: Path) -> bytes:
        try:
            async with aiofiles.open(script, "rb") as file:
                return await file.read()
        except OSError as error:
            raise SchedulerError(
                f"cannot submit: cannot read {script}: {error.strerror or error}",
                trouble=Trouble.PERMANENT,
            ) from error

    async def _run(self, verb: str, argv: list[str], *, script: bytes | None = None) -> Completed:
        is_submit = verb == "submit"
        env = self._environ if is_submit else self._environ | self.scheduler.query_environ | _PLAIN
        self._check(argv, env)
        try:
            return await process.run(
                argv,
                env=env,
                cwd=self._cwd,
                stdin=script,
                timeout_s=self.timeout_s,
                max_bytes=MAX_BYTES,
                own_session=True,
            )
        except LaunchError as error:
            # Only what has run may have done something.
            has_run = isinstance(error.__cause__, TimeoutError | None)
            raise SchedulerError(
                f"{self._title} cannot {verb}: {error}",
                trouble=Trouble.UNSURE if has_run and is_submit else Trouble.RETRY,
            ) from error

    def _check(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        if shutil.which(argv[0], path=env.get("PATH", "")) is None:
            raise SchedulerError(
                f"no {argv[0]} on PATH: is this a {self._title} machine? "
                "([scheduler] kind in ensemble.toml; `local` runs batch jobs on this machine)",
                trouble=Trouble.PERMANENT,
            )
        # uvloop would silently end the word there.
        if bad := next((word for word in argv if "\0" in word), None):
            raise SchedulerError(
                f"{self._title} cannot take {bad!r}: no word of a command may have a null byte",
                trouble=Trouble.PERMANENT,
            )

    def _fail(self, verb: str, answer: Completed) -> SchedulerError:
        return fail(self._title, self.scheduler.troubles, verb, answer)


#: Of the task or local batch job that this runs in: a job that inherits them would take itself for it.
_OURS = ("ENSEMBLE_TASK_", "ENSEMBLE_ATTEMPT", "ENSEMBLE_GUARD_", "ENSEMBLE_LOCAL_JOB_")


def _scrub(scheduler: Scheduler, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what would silently change the scheduler's commands, or the job."""
    return {
        name: value
        for name, value in environ.items()
        if name in scheduler.kept or not name.startswith((*scheduler.scrubbed, *_OURS))
    }


def _is_gone(scheduler: Scheduler, answer: Completed) -> bool:
    """Tell whether a cancel command found nothing to cancel; some say so with status 0."""
    text = f"{answer.stderr}\n{answer.stdout}"
    return re.search(scheduler.is_gone, text, re.IGNORECASE) is not None


def _harmless(error: SchedulerError) -> SchedulerError:
    """Return the error of a command that may as well be repeated, whether it took effect or not."""
    return _with_trouble(error, Trouble.RETRY) if error.trouble is Trouble.UNSURE else error


def _with_trouble(error: SchedulerError, trouble: Trouble) -> SchedulerError:
    return SchedulerError(str(error), trouble=trouble, output=error.output)
