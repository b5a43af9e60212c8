"""Everything about one task on the screen."""

from __future__ import annotations

import shlex
from datetime import datetime
from typing import Any

import click

from ensemble.core.model import Task, TaskDetail
from ensemble.render import tables
from ensemble.render.document import elapsed_s
from ensemble.render.text import clean_lines, group_nodes, local_time, plural, span

#: Part of the specification that `show` names only when it is not this.
_DEFAULTS: dict[str, Any] = {"gpus_per_rank": 0, "wait_for_parents": True}


def show(found: TaskDetail, now: datetime, *, folder: str) -> None:
    """Print a task's needs, its history and what went wrong."""
    task = found.task
    tables.fields(
        [
            ("task", task.id),
            ("name", task.name),
            ("workflow", task.workflow),
            ("app", task.app),
            ("state", _state(task)),
            ("cause", ": ".join(filter(None, (task.cause, task.reason)))),
            ("exit code", task.exit_code),
            ("command", shlex.join(task.argv)),
            ("needs", _needs(task)),
            *_spec(found),
            ("tags", _pairs(task.tags)),
            ("parents", ", ".join(map(str, found.parents))),
            ("children", ", ".join(map(str, found.children[:50]))),
            ("directory", folder),
            ("nodes", group_nodes(task.nodes)),
            ("added", local_time(task.created_at)),
            ("started", local_time(task.started_at)),
            ("ended", local_time(task.ended_at)),
            ("elapsed", None if (s := elapsed_s(task, now)) is None else span(s)),
        ]
    )
    if found.attempts:
        click.echo("\nattempts")
        tables.attempts(found.attempts, now)
    click.echo("\nhistory")
    tables.events(found.events)
    if task.error:
        click.echo("\nlast lines of its output")
        for line in clean_lines(task.error):
            click.echo(f"  {line}")


def _state(task: Task) -> str:
    state = tables.shown_state(task)
    held = f", held by lease {task.lease_id}" if task.is_held else ""
    waits = f", waits for {task.pending_parents} of its parents" if task.pending_parents else ""
    return f"{state}, attempt {task.attempt}{held}{waits}"


def _needs(task: Task) -> str:
    needs = [f"{plural(task.num_nodes, 'node')} x {plural(task.ranks_per_node, 'rank')}"]
    if task.wall_time_minutes:
        needs.append(f"about {task.wall_time_minutes} min")
    if task.time_limit_minutes is not None:
        needs.append(f"at most {task.time_limit_minutes:g} min")
    if task.priority:
        needs.append(f"priority {task.priority}")
    if task.node_packing_count != 1:
        needs.append(f"{task.node_packing_count} such tasks share a node")
    return ", ".join(needs)


def _spec(found: TaskDetail) -> list[tuple[str, object]]:
    shown: list[tuple[str, object]] = []
    for name, value in found.spec.items():
        if value in (None, {}, []) or value == _DEFAULTS.get(name):
            continue
        shown.append((name, _pairs(value) if isinstance(value, dict) else value))
    return shown


def _pairs(pairs: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in pairs.items())
