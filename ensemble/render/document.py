"""JSON for programs: a superset of the tables, times in ISO 8601 and UTC."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from ensemble.core.batchjob import BatchJob, Service
from ensemble.core.model import Output, Task, TaskDetail
from ensemble.core.states import State
from ensemble.render.view import SiteView


def write(value: Any) -> None:
    """Print one JSON document."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    click.echo(_HIDDEN.sub(_escape, text))


#: JSON escapes only the old control characters; the newer ones and marks of direction act on terminals, too.
_HIDDEN = re.compile(r"[^\n -~]")


def _escape(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]


def task(task: Task, now: datetime) -> dict[str, Any]:
    """Return all fields of a task, and what the table derives from them."""
    run_s = elapsed_s(task, now)
    return {
        **msgspec.to_builtins(task),
        "is_held": task.is_held,
        "is_claimed": task.is_claimed,
        "age_s": round((now - task.created_at).total_seconds(), 3),
        "elapsed_s": None if run_s is None else round(run_s, 3),
    }


def detail(
    found: TaskDetail, now: datetime, *, folder: str, output: str, waits: str | None
) -> dict[str, Any]:
    """Return everything on record about a task.

    Args:
        folder: The work directory, absolute.
        output: The file of the last attempt's output, if it goes to one.
        waits: What a runnable task waits for, where that is known.
    """
    return {
        **task(found.task, now),
        **msgspec.to_builtins(dict(found.spec)),
        "path": folder,
        "output_file": output if found.task.output is Output.FILE else None,
        "waits": waits,
        "parents": list(found.parents),
        "children": list(found.children),
        "attempts": msgspec.to_builtins(found.attempts),
        "events": msgspec.to_builtins(found.events),
    }


def workflows(table: Mapping[str, Mapping[State, int]]) -> list[dict[str, Any]]:
    """Return the workflows with their tasks by state."""
    return [
        {"workflow": name, "tasks": sum(states.values()), "by_state": dict(states)}
        for name, states in table.items()
    ]


def status(site: Path, database: Any, found: SiteView) -> dict[str, Any]:
    """Return what `ensemble status` shows."""
    return {
        "site": str(site),
        "database": database,
        "tasks": found.counts.total,
        "by_state": dict(found.counts.by_state),
        "held": dict(found.counts.held),
        "workflows": workflows(found.workflows),
        "launchers": msgspec.to_builtins(found.launchers),
        "batch_jobs": [batch_job(job) for job in found.batch_jobs],
        "service": service(found.service),
    }


def batch_job(job: BatchJob) -> dict[str, Any]:
    """Return all fields of a batch job, and what tables derive from them."""
    return {
        **msgspec.to_builtins(job),
        "is_active": job.is_active,
        "tasks": job.tasks,
        "output": job.spec.get("output"),
    }


def service(found: Service) -> dict[str, Any]:
    """Return what is known of the service."""
    return {**msgspec.to_builtins(found), "is_running": found.is_running}


def elapsed_s(task: Task, now: datetime) -> float | None:
    """Return how long the last run took, or takes; None when there was none."""
    if task.started_at is None:
        return None
    is_over = task.ended_at is not None and task.state is not State.RUNNING
    end = task.ended_at if is_over and task.ended_at is not None else now
    return max((end - task.started_at).total_seconds(), 0.0)
