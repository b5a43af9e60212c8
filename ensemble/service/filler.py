"""Keeps the batch queue filled: look, decide, act. The deciding is core/policy.py's.

Whatever goes wrong here, the limits hold: a batch job has its row before it is submitted, the store counts rows
when it makes one, and a row is given up only on evidence.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import msgspec

from ensemble.batch import Submitter
from ensemble.config import QueueSettings, Settings
from ensemble.core.batchjob import BatchJob, JobState, NewBatchJob
from ensemble.core.jobs import Jobs
from ensemble.core.model import JobMode
from ensemble.core.policy import permit
from ensemble.core.queues import Backlog, Decision, QueuePolicy, Rules, Submission
from ensemble.core.store import Store
from ensemble.errors import (
    ConfigError,
    EnsembleError,
    SchedulerError,
    StoreUnavailableError,
    Trouble,
    UsageError,
)
from ensemble.log import get_logger
from ensemble.service.look import Change, Lookout

#: The longest that a failing queue waits before it tries again.
_LONGEST_RETRY_S = 3600.0
_MINUTE_S = 60.0


def queue_policies(settings: Settings) -> list[QueuePolicy]:
    """Return the queue policies of ensemble.toml, in their order."""
    return [
        _queue_policy(name, policy, settings.scheduler.template)
        for name, policy in settings.queue.items()
    ]


def _queue_policy(name: str, settings: QueueSettings, template: str) -> QueuePolicy:
    fields = msgspec.structs.asdict(settings)
    return QueuePolicy(
        **{
            **fields,
            "name": name,
            "queue": name if settings.queue is None else settings.queue or None,
            "job_mode": JobMode(settings.job_mode),
            "template": settings.template or template,
            "flags": tuple(settings.flags),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What a round decides by, and what it decides."""

    jobs: tuple[BatchJob, ...]
    decisions: tuple[Decision, ...]


class Decider:
    """Decides by what the store says; changes nothing."""

    def __init__(self, store: Store, jobs: Jobs, settings: Settings) -> None:
        self._store = store
        self._jobs = jobs
        self._settings = settings
        self.policies = queue_policies(settings)

    async def decide(self) -> Picture:
        """Return what the service would do now, and why."""
        service = self._settings.service
        typical = await self._jobs.typical_minutes()
        # In this order a launcher that starts meanwhile is counted once, and what it claims not twice: as work
        # that waits, and as time that is taken.
        jobs = await self._jobs.active()
        capacity = await self._jobs.capacity(service.assumed_minutes, typical)
        backlog = await self._backlog()
        recently = await self._jobs.count_submitted(within_s=_MINUTE_S)
        rules = Rules(
            assumed_minutes=service.assumed_minutes,
            margin_minutes=self._settings.launcher.margin_s / _MINUTE_S,
            max_now=max(service.submissions_per_minute - recently, 0),
            typical_minutes=typical,
        )
        decisions = permit(
            self.policies,
            await self._jobs.queue_states(),
            jobs,
            capacity,
            backlog,
            rules,
        )
        return Picture(jobs=tuple(jobs), decisions=tuple(decisions))

    async def _backlog(self) -> list[Backlog]:
        """Return what is runnable: each filter and width is asked by itself, as each has its limit."""
        kinds: dict[Backlog, int] = {}
        widths = {policy.widest for policy in self.policies if policy.enabled}
        filters = {policy.wf_filter for policy in self.policies if policy.enabled}
        for wf_filter in {None} if None in filters else filters:
            workflows = await self._store.workflow_ids(wf_filter)
            for tasks in await self._jobs.backlog(workflows, widths):
                kind = replace(tasks, tasks=0)  # two filters may let the same ones through
                kinds[kind] = max(kinds.get(kind, 0), tasks.tasks)
        return [replace(kind, tasks=number) for kind, number in kinds.items()]


class Filler:
    """One round after the other of look, decide, act."""

    def __init__(
        self,
        *,
        decider: Decider,
        jobs: Jobs,
        lookout: Lookout,
        submitter: Submitter,
        settings: Settings,
    ) -> None:
        self._decider = decider
        self._jobs = jobs
        self._lookout = lookout
        self._submitter = submitter
        self._settings = settings
        self._log = get_logger()

    async def look(self) -> None:
        """Ask the scheduler what became of the batch jobs; when it does not answer, nothing is known to be wrong."""
        try:
            changes = await self._lookout.look()
        except SchedulerError as error:
            self._log.warning("scheduler.silent", error=str(error))
            return
        for change in changes:
            await self._take_in(change)

    async def fill(self, epoch: int, *, stop: asyncio.Event | None = None) -> Picture:
        """Decide, and submit what was decided.

        Args:
            epoch: Of the service's lock: when another has taken over, nothing is submitted.
            stop: Once it is set, nothing more is submitted.
        """
        picture = await self._decider.decide()
        failed: set[str] = set()
        for decision in picture.decisions:
            if stop is not None and stop.is_set():
                break
            if decision.policy in failed:
                continue
            if decision.submission is None:
                await self._jobs.note_decision(decision.policy, decision.reason)
            elif not await self._submit(decision.submission, epoch):
                failed.add(decision.policy)
        return picture

    async def _submit(self, submission: Submission, epoch: int) -> bool:
        policy = submission.policy
        try:
            job = await self._submitter.submit(
                _new_job(submission, self._submitter.scheduler),
                template_name=policy.template,
                limit=policy.max_queued,
                epoch=epoch,
            )
        except SchedulerError as error:
            await self._fail(policy.name, error)
            return False
        except (
            UsageError,
            ConfigError,
        ) as error:  # the template, or a value in it: a human has to look
            await self._pause(policy.name, str(error))
            return False
        except StoreUnavailableError:
            raise
        except EnsembleError as error:  # the template cannot be read, or the script not be written
            await self._retry(policy.name, "script", str(error), self._settings.service.retry_s)
            return False
        if job is None:
            self._log.info(
                "job.not_submitted", queue=policy.name, reason="its limit was reached meanwhile"
            )
            return False
        await self._jobs.note_success(policy.name, _SUBMITTING)
        await self._jobs.note_decision(policy.name, submission.why, job.id)
        self._log.info(
            "job.submitted",
            batch_job=job.id,
            scheduler_id=job.scheduler_id,
            queue=policy.name,
            nodes=job.num_nodes,
            minutes=job.wall_time_minutes,
            why=submission.why,
        )
        return True

    # ------------------------------------------------------------------ the circuit breaker

    async def _fail(self, policy: str, error: SchedulerError) -> None:
        service = self._settings.service
        match error.trouble:
            case Trouble.PERMANENT:
                await self._pause(policy, str(error))
            case Trouble.CAPACITY:
                await self._retry(
                    policy, "capacity", str(error), service.capacity_retry_s, doubles=False
                )
            case _:
                await self._retry(policy, "submit", str(error), service.retry_s)

    async def _pause(self, policy: str, reason: str) -> None:
        await self._jobs.pause(policy, by="service", reason=reason)
        await self._jobs.note_decision(policy, f"paused: {reason}")
        self._log.error(
            "queue.paused", queue=policy, reason=reason, resume=f"ensemble queue resume {policy}"
        )

    async def _retry(
        self, policy: str, kind: str, reason: str, retry_s: float, *, doubles: bool = True
    ) -> int:
        """Let a queue wait, longer with each failure of the same kind in a row; return how many these were."""
        before = (await self._jobs.queue_states()).get(policy)
        again = before.failures if before is not None and before.kind == kind and doubles else 0
        wait_s = min(retry_s * 2 ** min(again, 20), _LONGEST_RETRY_S)
        failures = await self._jobs.note_failure(policy, kind=kind, reason=reason, retry_s=wait_s)
        await self._jobs.note_decision(policy, f"waits after a failure: {reason}")
        self._log.warning(
            "queue.waiting", queue=policy, reason=reason, retry_s=wait_s, failures=failures
        )
        return failures

    async def _take_in(self, change: Change) -> None:
        """Draw conclusions from a batch job that has moved on."""
        job = change.after
        self._log.info(
            "job.moved",
            batch_job=job.id,
            scheduler_id=job.scheduler_id,
            before=str(change.before.state),
            after=str(job.state),
            reason=job.reason,
        )
        if job.is_active or job.policy is None or job.state is JobState.CANCELLED:
            return
        service = self._settings.service
        if job.scheduler_id is None:
            return  # it was never in the scheduler: its submission is counted already
        if job.launcher_id is None and job.state is not JobState.REJECTED:
            last = f"; it last printed: {job.error.splitlines()[-1]}" if job.error else ""
            reason = (
                f"batch job {job.id} ended ({job.state}) before its launcher had registered{last}"
            )
            await self._count_early_end(job.policy, reason)
        elif _has_failed(job):
            told = str((job.record or {}).get("reason") or job.reason or "it did not say why")
            reason = f"the launcher of batch job {job.id} failed: {told.splitlines()[0]}"
            await self._count_early_end(job.policy, reason)
        elif job.tasks == 0 and job.record is not None and job.record.get("left_alone"):
            alone = "; ".join(f"{n} tasks: {why}" for why, n in job.record["left_alone"].items())
            reason = f"the launcher of batch job {job.id} could run nothing: {alone}"
            await self._retry(job.policy, "idle", reason, service.retry_s)
        elif job.launcher_id is not None:
            await self._jobs.note_success(job.policy, _RUNNING)

    async def _count_early_end(self, policy: str, reason: str) -> None:
        service = self._settings.service
        failures = await self._retry(policy, "died early", reason, service.retry_s)
        if failures >= service.max_failures:
            await self._pause(policy, f"{service.max_failures} in a row: {reason}")


#: Kinds of failures that a submission ends, and a launcher that did its work.
_SUBMITTING = ("submit", "capacity", "script")
_RUNNING = ("died early", "idle")


def _has_failed(job: BatchJob) -> bool:
    """Tell whether a launcher ended badly and had done nothing; one whose time was over has not failed."""
    if job.record is None or job.state is JobState.TIMEOUT:
        return False
    return job.record.get("exit_code") != 0 and job.tasks == 0


def _new_job(submission: Submission, scheduler: str) -> NewBatchJob:
    policy = submission.policy
    return NewBatchJob(
        scheduler=scheduler,
        num_nodes=submission.nodes,
        wall_time_minutes=submission.minutes,
        job_mode=policy.job_mode,
        wf_filter=policy.wf_filter,
        project=policy.project,
        queue=policy.queue,
        policy=policy.name,
        why=submission.why,
        flags=policy.flags,
        slots_per_node=policy.slots_per_node,
    )
