"""Queue policies and batch jobs, on the screen and as a JSON document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click
import msgspec

from ensemble.core.batchjob import BatchJob, JobState, Service
from ensemble.core.queues import Decision
from ensemble.render import document, tables
from ensemble.render.text import clean, short_time, span
from ensemble.render.view import QueueView

_NOTES_SHOWN = 8


def show(found: QueueView, now: datetime) -> None:
    """Print who submits, to which queues, what there is and was, and what comes next."""
    tables.fields([("service", in_words(found.service))])
    click.echo()
    if found.policies:
        _policies(found)
        click.echo("\nnext")
        width = max(len(name) for name in found.policies)
        for name in found.policies:
            click.echo(f"  {name:<{width}}  {clean(next_step(found.plan, name))}")
    else:
        click.echo(
            "no queue policies: nothing is submitted by itself ([queue.NAME] in ensemble.toml)"
        )
    click.echo()
    if found.jobs:
        batch_jobs(found.jobs, now)
        _explain(found.jobs)
    else:
        click.echo("no batch jobs yet (ensemble submit-launch --help)")
    if found.notes:
        click.echo("\ndecisions")
        for note in found.notes[:_NOTES_SHOWN]:
            job = f"batch job {note.batch_job_id}: " if note.batch_job_id else ""
            click.echo(f"  {short_time(note.at)}  {clean(note.policy)}  {job}{clean(note.reason)}")


def in_words(service: Service) -> str:
    """Say whether the service runs, and where."""
    if service.host is None:
        return "never ran (ensemble serve)"
    if service.is_running:
        return f"runs on {service.host}, pid {service.pid}"
    if service.stopped_at is not None:
        return f"stopped {short_time(service.stopped_at)} on {service.host} (ensemble serve)"
    return f"last seen {span(service.silent_s or 0.0)} ago on {service.host} (ensemble serve)"


def next_step(plan: Sequence[Decision], policy: str) -> str:
    """Say what is done about a policy next, and why."""
    mine = [decision for decision in plan if decision.policy == policy]
    wanted = [made for made in mine if made.submission is not None]
    if wanted:
        more = f", and {len(wanted) - 1} more" if len(wanted) > 1 else ""
        return f"submit for {wanted[0].reason}{more}"
    return mine[-1].reason if mine else ""


def batch_jobs(jobs: Sequence[BatchJob], now: datetime) -> None:
    """Print batch jobs, one a line."""
    header = (
        "id", "scheduler id", "policy", "state", "nodes", "minutes", "mode", "filter", "tasks",
        "submitted", "waited", "ran", "reason",
    )  # fmt: skip
    tables.write(header, [_row(job, now) for job in jobs])


def _row(job: BatchJob, now: datetime) -> tuple[object, ...]:
    return (
        job.id,
        job.scheduler_id,
        job.policy or "(by hand)",
        job.state.lower(),
        job.num_nodes,
        job.wall_time_minutes,
        job.job_mode,
        job.wf_filter,
        job.tasks,
        short_time(job.submitted_at or job.created_at),
        _between(job.submitted_at or job.created_at, job.started_at or job.ended_at or now),
        _between(job.started_at, job.ended_at or now),
        _reason(job),
    )


def _reason(job: BatchJob) -> str | None:
    """Return why a batch job waits, or how it ended: a launcher that failed knows more than its exit status."""
    record = job.record or {}
    told = record.get("reason")
    has_failed = job.state is JobState.FAILED and record.get("exit_code")
    return (told or job.reason) if has_failed else (job.reason or told)


def _between(start: datetime | None, end: datetime) -> str | None:
    return None if start is None else span(max((end - start).total_seconds(), 0.0))


def _explain(jobs: Sequence[BatchJob]) -> None:
    """Print the end of what the youngest job printed that ended without a word from its launcher."""
    silent = [job for job in jobs if job.error and job.state is not JobState.CANCELLED]
    for job in silent[:1]:
        click.echo(f"\nbatch job {job.id} last printed ({clean(job.spec.get('output', ''))}):")
        for line in (job.error or "").splitlines():
            click.echo(f"  {clean(line)}")


def _policies(found: QueueView) -> None:
    active = _count(found)
    header = ("policy", "queue", "project", "mode", "filter", "jobs", "of", "nodes", "minutes")
    rows = [
        (
            name if policy.enabled else f"{name} (off)",
            name if policy.queue is None else policy.queue,
            policy.project,
            policy.job_mode,
            policy.wf_filter,
            active[name],
            policy.max_queued,
            f"{policy.min_nodes}-{policy.max_nodes}",
            f"{policy.min_minutes}-{policy.max_minutes}",
        )
        for name, policy in found.policies.items()
    ]
    tables.write(header, rows)


def _count(found: QueueView) -> Counter[str | None]:
    return Counter(job.policy for job in found.active)


def as_document(found: QueueView) -> dict[str, Any]:
    """Return all of it for a JSON document."""
    active = _count(found)
    return {
        "service": document.service(found.service),
        "queues": [
            {
                "name": name,
                **msgspec.to_builtins(policy),
                "active": active[name],
                "next": next_step(found.plan, name),
            }
            for name, policy in found.policies.items()
        ],
        "batch_jobs": [document.batch_job(job) for job in found.jobs],
        "decisions": msgspec.to_builtins(found.notes),
    }
