"""Everything about one task on the screen."""

from __future__ import annotations

import shlex
from datetime import datetime
from typing import Any, assert_never

import click

from ensemble.core.model import Output, Task, TaskDetail
from ensemble.render import tables
from ensemble.render.document import elapsed_s
from ensemble.render.text import clean_lines, group_nodes, local_time, plural, span

#: Part of the specification that is shown only when it is another.
_USUAL = ("wait_for_parents", True)
#: Part of the specification that is shown among the needs.
_NEEDS = ("threads_per_rank", "threads_per_core", "gpus_per_rank", "memory_mb")


def show(found: TaskDetail, now: datetime, *, folder: str, waits: str | None) -> None:
    """Print a task's needs, its history and what went wrong.

    Args:
        folder: The work directory.
        waits: What a runnable task waits for, where that is known.
    """
    task = found.task
    tables.fields(
        [
            ("task", task.id),
            ("name", task.name),
            ("workflow", task.workflow),
            ("app", task.app),
            ("state", _state(task)),
            ("waits", waits),
            ("cause", ": ".join(filter(None, (task.cause, task.reason)))),
            ("exit code", task.exit_code),
            ("command", shlex.join(task.argv)),
            ("needs", _needs(found)),
            *_spec(found),
            ("tags", _pairs(task.tags)),
            ("parents", ", ".join(map(str, found.parents))),
            ("children", ", ".join(map(str, found.children[:50]))),
            ("directory", folder),
            ("output", _output(task)),
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


def _needs(found: TaskDetail) -> str:
    task = found.task
    needs = [f"{plural(task.num_nodes, 'node')} x {plural(task.ranks_per_node, 'rank')}"]
    needs += _share(found)
    if task.wall_time_minutes:
        needs.append(f"about {task.wall_time_minutes} min")
    if task.time_limit_minutes is not None:
        needs.append(f"at most {task.time_limit_minutes:g} min")
    if task.priority:
        needs.append(f"priority {task.priority}")
    return ", ".join(needs)


def _share(found: TaskDetail) -> list[str]:
    """Say what it takes of a node."""
    packing, spec = found.task.node_packing_count, found.spec
    needs = []
    if (threads := spec.get("threads_per_rank")) is not None:
        needs.append(f"{plural(threads, 'thread')} per rank")
    if (threads := spec.get("threads_per_core")) is not None:
        needs.append(f"{plural(threads, 'thread')} per core")
    if gpus := spec.get("gpus_per_rank"):
        needs.append(f"{plural(gpus, 'GPU')} per rank")
    if (memory_mb := spec.get("memory_mb")) is not None:
        needs.append(f"{memory_mb:,} MiB of memory")
    if packing != 1:
        needs.append(f"{packing:,} such tasks share a node")
    return needs


def _output(task: Task) -> str:
    match task.output:
        case Output.FILE:
            return f"{task.name}.out"
        case Output.TAIL:
            return f"the last 16 kB, when it has ended (ensemble log {task.id})"
        case Output.NONE:
            return "none is kept"
        case _:
            assert_never(task.output)


def _spec(found: TaskDetail) -> list[tuple[str, object]]:
    shown: list[tuple[str, object]] = []
    for name, value in found.spec.items():
        if value in (None, {}, []) or name in _NEEDS or (name, value) == _USUAL:
            continue
        shown.append((name, _pairs(value) if isinstance(value, dict) else value))
    return shown


def _pairs(pairs: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in pairs.items())
