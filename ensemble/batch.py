"""A site's batch jobs: write their scripts, submit them, cancel them. The service and users do it alike.

A submission is not idempotent, so it is on record before it happens, under a name that nothing else has: when
nobody knows whether the scheduler took it, it is looked up by that name (service/look.py) before another is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ensemble.core.batchjob import BatchJob, NewBatchJob
from ensemble.core.jobs import Jobs
from ensemble.core.model import JobMode
from ensemble.core.queues import Backlog, QueuePolicy, Rules, unfit
from ensemble.drivers import batch, template, wholefile
from ensemble.drivers.batch import BatchSystem
from ensemble.drivers.scheduler import Request
from ensemble.errors import ConfigError, EnsembleError, SchedulerError, Trouble, UsageError
from ensemble.site import Site, program

#: Stands for the id of a script that is only shown.
_NO_ID = 0
#: How long a submission that is cut off may take to put that on record, in seconds.
_LAST_WORD_S = 2.0


def find_scheduler(site: Site, environ: Mapping[str, str]) -> str:
    """Return which scheduler the site uses: by its settings, else the one whose commands are here.

    Raises:
        ConfigError: There is none on this machine.
    """
    kind = site.settings.scheduler.kind
    if kind != "auto":
        return kind
    found = batch.find_scheduler_names(environ)
    if not found:
        raise ConfigError(
            "there is no batch scheduler on this machine: none of their commands (sbatch, qsub, bsub, flux) "
            'is on PATH; [scheduler] kind = "local" in ensemble.toml runs batch jobs on this machine itself'
        )
    return found[0]


def find_system(site: Site, environ: Mapping[str, str] | None = None) -> BatchSystem:
    """Return the site's batch scheduler, to be asked.

    Raises:
        ConfigError: There is none on this machine.
    """
    env = dict(os.environ) if environ is None else environ
    settings = site.settings.scheduler
    scheduler = batch.get(
        find_scheduler(site, env),
        directory=site.path / "qsubmit" / ".local",
        max_running=settings.max_running,
    )
    return BatchSystem(
        scheduler, environ=env, cwd=site.path / "qsubmit", timeout_s=settings.timeout_s
    )


def check_flags(scheduler: str, flags: Sequence[str]) -> None:
    """Refuse words for the submit command by which a batch job would be lost from sight. Pure.

    Raises:
        UsageError: One of them is such a word; says which.
    """
    for flag in flags:
        name = flag.partition("=")[0]
        for ours, why in _OURS.get(scheduler, {}).items():
            is_long = ours.startswith("--")
            is_short = scheduler in _GETOPT and not is_long and flag.startswith(ours)
            # sbatch and others take the beginning of an option for the whole.
            if name == ours or is_short or (is_long and len(name) > 4 and ours.startswith(name)):
                raise UsageError(f"{ours} cannot be passed to {scheduler}: {why}")


_NAME = "Ensemble knows its batch jobs by their names"
_OUTPUT = "the output of a batch job goes to qsubmit/, where Ensemble reads it"
_ARRAY = "a batch job is one job (ensemble submit-launch once for each)"
_NO_WAIT = "a batch job is not waited for (ensemble queue shows what becomes of it)"
_NO_JOB = "nothing would be submitted (--dry-run shows the script)"
#: Schedulers whose short options may have their value attached.
_GETOPT = frozenset({"slurm", "pbs"})
#: What would change a batch job's name, its output, or what the submit command prints: from the manual pages
#: of sbatch, qsub, bsub and flux-batch.
_OURS: Mapping[str, Mapping[str, str]] = {
    "slurm": {
        **dict.fromkeys(("-J", "--job-name"), _NAME),
        **dict.fromkeys(("-o", "--output"), _OUTPUT),
        **dict.fromkeys(("-a", "--array"), _ARRAY),
        **dict.fromkeys(("-W", "--wait"), _NO_WAIT),
        **dict.fromkeys(("--test-only", "--wrap", "--usage", "--version", "-V"), _NO_JOB),
    },
    "pbs": {"-N": _NAME, "-o": _OUTPUT, "-J": _ARRAY, "-I": _NO_WAIT},
    "sge": {"-N": _NAME, "-o": _OUTPUT, "-t": _ARRAY, "-sync": _NO_WAIT, "-verify": _NO_JOB},
    "lsf": {"-J": _NAME, "-o": _OUTPUT, "-oo": _OUTPUT, "-K": _NO_WAIT, "-I": _NO_WAIT},
    "cobalt": {"--jobname": _NAME, "-o": _OUTPUT, "--output": _OUTPUT, "-I": _NO_WAIT},
    "flux": {
        "--job-name": _NAME,
        "--output": _OUTPUT,
        "--wrap": _NO_JOB,
        "--dry-run": _NO_JOB,
    },
}


class Submitter:
    """Submits batch jobs of one site."""

    def __init__(self, site: Site, jobs: Jobs, system: BatchSystem) -> None:
        self._site = site
        self._jobs = jobs
        self._system = system

    @property
    def scheduler(self) -> str:
        """The scheduler's name."""
        return self._system.scheduler.name

    def render(self, new: NewBatchJob, *, template_name: str, job_id: int = _NO_ID) -> str:
        """Return the script of a batch job.

        Raises:
            TemplateError: The template is missing or malformed.
            UsageError: A value cannot be written into a script, or a flag not be passed on.
        """
        check_flags(self.scheduler, new.flags)
        folder = self._site.path / "qsubmit"
        words = [f"--batch-job={job_id}", "--job-mode", str(new.job_mode)]
        if new.wf_filter is not None:
            words.append(f"--wf-filter={new.wf_filter}")
        if new.slots_per_node > 1:
            words.append(f"--slots-per-node={new.slots_per_node}")
        path = template.find(template_name, self._site.path)
        return template.render(
            path,
            {
                "id": job_id,
                "name": f"ens-{slug(self._site.settings.name)}-{job_id}",
                "site": str(self._site.path),
                "project": new.project,
                "queue": new.queue,
                "nodes": new.num_nodes,
                "minutes": new.wall_time_minutes,
                "job_mode": str(new.job_mode),
                "wf_filter": new.wf_filter,
                "slots_per_node": new.slots_per_node,
                "output": str(folder / f"qlaunch{job_id}.out"),
                "launch": template.Raw(shlex.join(program(str(self._site.path), "launch", *words))),
                "path": str(Path(sys.executable).parent),
            },
        )

    async def submit(
        self,
        new: NewBatchJob,
        *,
        template_name: str,
        limit: int | None = None,
        epoch: int | None = None,
    ) -> BatchJob | None:
        """Submit a batch job and put it on record.

        Args:
            new: What to submit.
            template_name: A file of the site's `templates/`.
            limit: How many batch jobs of its policy there may be, this one included.
            epoch: Of the service that submits; None for a user.

        Returns:
            The batch job; None where the limit or the epoch forbids it.

        Raises:
            TemplateError, UsageError: The script cannot be made; nothing is on record.
            SchedulerError: It was refused, or (`Trouble.UNSURE`) nobody knows; that is on record.
            EnsembleError: The template cannot be read now; or the script not be written, which is on record.
            CancelledError: Its text, once there is a row, says that nobody knows; that is on record.
        """
        self.render(
            new, template_name=template_name
        )  # what is wrong with it, is found before there is a row
        job = await self._jobs.open(
            new, site=slug(self._site.settings.name), limit=limit, epoch=epoch
        )
        if job is None:
            return None
        try:
            request = self._write_script(job, new, template_name)
            await self._jobs.set_script(job.id, str(request.script), str(request.output))
        except (OSError, EnsembleError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            await self._jobs.set_rejected(job.id, f"its script could not be written: {reason}")
            if isinstance(error, OSError):
                script = self._site.path / "qsubmit" / f"qlaunch{job.id}.sh"
                raise EnsembleError(
                    f"cannot write the script of batch job {job.id}: {script}: {reason}"
                ) from error
            raise
        try:
            scheduler_id = await self._system.submit(request)
            await self._jobs.set_submitted(job.id, scheduler_id)
            return await self._jobs.get(job.id)
        except SchedulerError as error:
            if error.trouble is not Trouble.UNSURE:
                await self._jobs.set_rejected(job.id, str(error))
                raise
            await self._jobs.set_doubtful(job.id, str(error))
            raise SchedulerError(
                f"{error}; {_doubt(job.id)}", trouble=error.trouble, output=error.output
            ) from error
        except asyncio.CancelledError as error:
            # The command was killed; the scheduler may have heard it all the same.
            await self._note_interruption(job.id)
            raise asyncio.CancelledError(_doubt(job.id)) from error

    async def _note_interruption(self, job_id: int) -> None:
        """Put on record that nobody knows, unless that takes long: whoever cancelled this wants to leave."""

        async def note() -> None:
            with contextlib.suppress(EnsembleError):
                await self._jobs.set_doubtful(job_id, "its submission was interrupted")

        # No time-out around it: a cancelled call of the store may wait for a server that hangs.
        noting = asyncio.get_running_loop().create_task(note())
        await asyncio.wait({noting}, timeout=_LAST_WORD_S)

    def _write_script(self, job: BatchJob, new: NewBatchJob, template_name: str) -> Request:
        folder = self._site.path / "qsubmit"
        folder.mkdir(exist_ok=True)
        script = folder / f"qlaunch{job.id}.sh"
        text = self.render(new, template_name=template_name, job_id=job.id)
        with wholefile.create(script, mode=0o700) as file:
            file.write(text.encode())
        return Request(
            script=script,
            name=job.name,
            output=folder / f"qlaunch{job.id}.out",
            flags=new.flags,
        )


def _doubt(job_id: int) -> str:
    return f"batch job {job_id} may be there all the same: ensemble queue finds out, by its name"


def slug(name: str) -> str:
    """Return a site's name as part of a job's name: some schedulers take but letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:20] or "site"


def new_job(  # noqa: PLR0913 - the fields of a batch job that a user gives
    scheduler: str,
    *,
    nodes: int,
    minutes: int,
    job_mode: JobMode = JobMode.MPI,
    wf_filter: str | None = None,
    project: str | None = None,
    queue: str | None = None,
    flags: tuple[str, ...] = (),
    slots_per_node: int = 1,
) -> NewBatchJob:
    """Return a batch job that a user wants.

    Raises:
        UsageError: There are no nodes, or no time.
    """
    if nodes < 1 or minutes < 1:
        raise UsageError(
            f"a batch job of {nodes} nodes for {minutes} minutes: both must be 1 or more"
        )
    return NewBatchJob(
        scheduler=scheduler,
        num_nodes=nodes,
        wall_time_minutes=minutes,
        job_mode=job_mode,
        wf_filter=wf_filter,
        project=project,
        queue=queue,
        why="submitted by hand",
        flags=flags,
        slots_per_node=slots_per_node,
    )


async def cancel(jobs: Jobs, system: BatchSystem, job_id: int, reason: str) -> bool:
    """Cancel a batch job; tell whether there was anything to cancel.

    One whose submission is in doubt is looked up by its name first.

    Raises:
        NotFoundError: There is none of that id.
        SchedulerError: The scheduler does not answer, or refuses.
    """
    job = await jobs.get(job_id)
    if not job.is_active:
        return False
    if job.scheduler != system.scheduler.name:
        raise ConfigError(
            f"batch job {job_id} is one of {job.scheduler}, and this site now uses {system.scheduler.name}"
        )
    scheduler_id = job.scheduler_id
    if scheduler_id is None:
        found = [seen.id for seen in await system.listing([]) if seen.name == job.name]
        scheduler_id = found[0] if found else None
    await jobs.set_cancelled(job_id, reason)
    return await system.cancel(scheduler_id) if scheduler_id is not None else True


def size_of(new: NewBatchJob) -> QueuePolicy:
    """Return the limits that a batch job is for the tasks that it may take."""
    return QueuePolicy(
        name="",
        job_mode=new.job_mode,
        max_nodes=new.num_nodes,
        max_minutes=new.wall_time_minutes,
    )


def doubts(new: NewBatchJob, backlog: Sequence[Backlog], *, margin_s: float) -> list[str]:
    """Return what speaks against a batch job as things are: lines for people. Pure.

    Args:
        new: What would be submitted.
        backlog: The runnable tasks that its filter lets through.
        margin_s: How long before its end its launcher begins to leave.
    """
    which = "" if new.wf_filter is None else f" of workflows that contain {new.wf_filter!r}"
    if not backlog:
        return [f"no task{which} is runnable now (ensemble ls)"]
    size = size_of(new)
    rules = Rules(margin_minutes=margin_s / 60)
    reasons: Counter[str] = Counter()
    for tasks in backlog:
        why = unfit(size, tasks, rules)
        if why is None:
            return []
        reasons[why] += tasks.tasks
    words = "; ".join(f"{count:,} {why}" for why, count in reasons.most_common())
    return [f"none of the {sum(reasons.values()):,} runnable tasks{which} would be taken: {words}"]
