"""Looks at the scheduler, and judges what became of each batch job by it and by what we know ourselves.

Our own records come first: a live lease, a launcher's last word. The scheduler's listing is the third witness, and
what it does not show is unknown, not finished.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ensemble.config import ServiceSettings
from ensemble.core.batchjob import ACTIVE, OVER, STUCK, BatchJob, JobState, Observation
from ensemble.core.jobs import Jobs
from ensemble.drivers import output
from ensemble.drivers.batch import BatchSystem
from ensemble.drivers.scheduler import Seen
from ensemble.errors import NotFoundError, SchedulerError
from ensemble.log import get_logger

#: A submission that nobody has heard of may still be under way for so many times the submit command's time.
_SUBMITTING = 1.5
#: So many of the youngest batch jobs are watched for given-up ones that come back, for so long.
_WATCHED = 200
_WATCHED_S = 24 * 3600.0
_TAIL_LINES = 5
#: Ends of jobs that differ by less are the same.
_ROUNDED_S = 60.0


def find(job: BatchJob, listing: Iterable[Seen]) -> Seen | None:
    """Return a batch job in a listing: by its id, and by its name as long as that is not known."""
    wanted = None if job.scheduler_id is None else number(job.scheduler_id)
    for seen in listing:
        if wanted is None and seen.name == job.name:
            return seen
        if wanted is not None and number(seen.id) == wanted and not _is_another(job, seen):
            return seen
    return None


def _is_another(job: BatchJob, seen: Seen) -> bool:
    """Tell whether a job of the same id is a later one of ours: a scheduler may count from 1 again."""
    site = job.name.rpartition("-")[0]
    return seen.name != job.name and bool(site) and seen.name.startswith(f"{site}-")


def number(job_id: str) -> str:
    """Return what all spellings of a job's id share, as the store compares them."""
    return re.sub(r"[.;].*$", "", job_id, flags=re.DOTALL).replace("ƒ", "f")


def judge_seen(job: BatchJob, seen: Seen) -> Observation | None:
    """Return what a listing tells of a batch job that it shows; None when that is nothing new."""
    state, reason = seen.state, seen.reason or None
    if seen.is_stuck:
        reason = f"{STUCK}{reason}"
    if job.has_live_launcher and state not in (JobState.RUNNING, *OVER):
        return None  # its launcher was quicker than this listing, or outlives a node
    if state in OVER and job.spec.get("cancelled"):
        state, reason = JobState.CANCELLED, str(job.spec["cancelled"])
    ends_at = _moment(seen.ends_at)
    is_news = (
        state is not job.state
        or reason != job.reason
        or job.scheduler_id is None
        or _differ(ends_at, job.ends_at)
        or job.missing > 0
    )
    if not is_news:
        return None
    return Observation(
        id=job.id,
        was=job.state,
        state=state,
        reason=reason,
        scheduler_id=seen.id,
        exit_code=seen.exit_code,
        started_at=_moment(seen.started_at),
        ended_at=_moment(seen.ended_at),
        ends_at=ends_at,
    )


def _differ(told: datetime | None, known: datetime | None) -> bool:
    """Tell whether a time on record is wrong: a launcher puts there when it leaves, and some schedulers round."""
    if told is None or known is None:
        return told is not known and told is not None
    return abs((told - known).total_seconds()) > _ROUNDED_S


def is_deserted(job: BatchJob, seen: Seen) -> bool:
    """Tell whether a batch job runs on although its launcher was lost, without a last word.

    A script that execs its launcher ends with it. But where a job outlives its nodes (Slurm's --no-kill), it
    also outlives the first one, on which the script ran: nothing happens in it any more until its time is over.
    """
    is_running = job.state is JobState.RUNNING and seen.state is JobState.RUNNING
    is_silent = job.launcher_id is not None and job.record is None
    return is_running and is_silent and not job.has_live_launcher


def judge_missing(job: BatchJob, settings: ServiceSettings) -> Observation | None:
    """Return what it means that no listing shows a batch job; None while that is unknown."""
    if job.record is not None and not job.has_live_launcher:
        code = job.record.get("exit_code")
        return Observation(
            id=job.id,
            was=job.state,
            state=JobState.FINISHED if code == 0 else JobState.FAILED,
            reason=str(job.record.get("reason") or "") or None,
            exit_code=code if isinstance(code, int) else None,
        )
    if job.spec.get("cancelled"):
        return Observation(
            id=job.id, was=job.state, state=JobState.CANCELLED, reason=str(job.spec["cancelled"])
        )
    if not _is_long_missed(job, settings):
        return None
    if job.scheduler_id is None:
        reason = f"it was never seen in {job.scheduler}" + (f": {job.reason}" if job.reason else "")
    else:
        reason = f"{job.scheduler} does not know it any more, and its launcher is silent"
    return Observation(id=job.id, was=job.state, state=JobState.LOST, reason=reason)


def _is_long_missed(job: BatchJob, settings: ServiceSettings) -> bool:
    return job.missing + 1 >= settings.lost_looks and (job.missing_s or 0.0) >= settings.lost_s


def _moment(epoch_s: float | None) -> datetime | None:
    return None if epoch_s is None else datetime.fromtimestamp(epoch_s, UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A batch job that a look has moved on: as it was, and as it is."""

    before: BatchJob
    after: BatchJob


class Lookout:
    """Keeps the record of a site's batch jobs true to the scheduler."""

    def __init__(self, jobs: Jobs, system: BatchSystem, settings: ServiceSettings) -> None:
        self._jobs = jobs
        self._system = system
        self._settings = settings
        self._log = get_logger()

    async def look(self) -> list[Change]:
        """Ask the scheduler once, and write what that shows; return what moved on.

        Raises:
            SchedulerError: It does not answer, or not with a listing: then nothing is known, and nothing written.
        """
        active = [job for job in await self._jobs.active() if self._is_ours(job)]
        token = await self._jobs.token()
        given_up = [
            job for job in await self._jobs.recent(_WATCHED) if self._may_come_back(job, token)
        ]
        if not active and not given_up:
            return []
        listing = await self._system.listing(
            [job.scheduler_id for job in active if job.scheduler_id is not None]
        )
        changes = []
        for job in active:
            seen = find(job, listing)
            if seen is not None and is_deserted(job, seen):
                await self._end_deserted(job, seen)
                continue
            observed = judge_seen(job, seen) if seen else await self._judge_missing(job)
            if observed is not None and await self._jobs.observe(observed):
                after = await self._explained(await self._jobs.get(job.id))
                changes.append(Change(before=job, after=after))
            if seen is not None and _outlives_its_end(job, seen):
                await self._cancel(job, seen, "job.cancelled_again")
        await self._cancel_given_up([*active, *given_up], listing)
        return changes

    def _is_ours(self, job: BatchJob) -> bool:
        return job.scheduler == self._system.scheduler.name

    def _may_come_back(self, job: BatchJob, token: str) -> bool:
        """Tell whether the scheduler may still have a batch job of ours that counts nowhere any more."""
        is_open = job.state is JobState.LOST or (
            job.state is JobState.CANCELLED and job.scheduler_id is None
        )
        # Of a backup that was restored here: the site that it was made of may have it still.
        is_restored = not job.name.endswith(f"-{token}-{job.id}")
        return is_open and not is_restored and job.age_s < _WATCHED_S and self._is_ours(job)

    async def _judge_missing(self, job: BatchJob) -> Observation | None:
        if job.has_live_launcher:
            return None
        if job.scheduler_id is None and job.age_s < _SUBMITTING * self._system.timeout_s:
            return None
        ended = await self._ask_history(job)
        if ended is not None:
            return judge_seen(job, ended)
        await self._jobs.set_missing(job.id)
        return judge_missing(job, self._settings)

    async def _ask_history(self, job: BatchJob) -> Seen | None:
        """Return how a job ended that is not listed any more, where the scheduler keeps that."""
        if job.scheduler_id is None:
            return None
        try:
            found = await self._system.history(job.scheduler_id)
        except SchedulerError as error:
            self._log.debug("history.unknown", batch_job=job.id, error=str(error))
            return None
        return found if found is not None and found.state not in ACTIVE else None

    async def _explained(self, job: BatchJob) -> BatchJob:
        """Keep the end of the output of a job that ended without a word from its launcher; return it as it is then."""
        path = job.spec.get("output")
        if job.is_active or job.record is not None or not path:
            return job
        lines = await asyncio.to_thread(output.tail, Path(path), _TAIL_LINES)
        if not lines:
            return job
        await self._jobs.set_error(job.id, lines)
        return await self._jobs.get(job.id)

    async def _cancel_given_up(self, known: Sequence[BatchJob], listing: Sequence[Seen]) -> None:
        """Cancel what is queued or running although its row was given up: it counts nowhere any more."""
        names = {job.name for job in known if job.is_active}
        prefixes = {job.name.rpartition("-")[0] for job in known}
        for seen in listing:
            start, _, job_id = seen.name.rpartition("-")
            if start not in prefixes or not re.fullmatch("[0-9]{1,18}", job_id):
                continue
            if seen.name in names or seen.state not in (JobState.QUEUED, JobState.RUNNING):
                continue
            try:
                job = await self._jobs.get(int(job_id))
            except NotFoundError:
                continue
            if not job.is_active and not job.has_live_launcher:
                await self._cancel(job, seen, "job.given_up_is_back")

    async def _end_deserted(self, job: BatchJob, seen: Seen) -> None:
        """Cancel a batch job in which nothing happens any more; not at once, as a launcher may be on its way."""
        await self._jobs.set_missing(job.id)
        if not _is_long_missed(job, self._settings):
            return
        if not job.spec.get("cancelled"):
            await self._jobs.set_cancelled(job.id, "its launcher was lost: its node, most likely")
        await self._cancel(job, seen, "job.deserted")

    async def _cancel(self, job: BatchJob, seen: Seen, event: str) -> None:
        """Cancel a batch job; one that cannot be is tried again at the next look."""
        self._log.warning(event, batch_job=job.id, scheduler_id=seen.id)
        try:
            await self._system.cancel(seen.id)
        except SchedulerError as error:
            self._log.warning("job.not_cancelled", batch_job=job.id, error=str(error))


def _outlives_its_end(job: BatchJob, seen: Seen) -> bool:
    """Tell whether a batch job waits or starts that a user has cancelled: the scheduler was not told, or not heard."""
    is_told = job.scheduler_id is not None and seen.state is not JobState.QUEUED
    is_there = seen.state in (JobState.QUEUED, JobState.RUNNING)
    return (
        bool(job.spec.get("cancelled")) and is_there and not is_told and not job.has_live_launcher
    )
