"""Tables for people. Nothing a user wrote reaches the terminal uncleaned, or as markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import click

from ensemble.core.model import App, Attempt, Counts, Launcher, Problem, Task, TaskEvent
from ensemble.core.states import RUNNABLE, State
from ensemble.render.document import elapsed_s
from ensemble.render.text import clean, group_nodes, short_time, span

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: Wide enough that nothing is cut where no terminal limits it.
_UNLIMITED = 4000
#: Columns of text: these are cut when a terminal is too narrow, before any other.
_SOFT = {
    "name", "workflow", "app", "command", "description", "cause", "reason", "nodes", "filter",
    "host", "problem",
}  # fmt: skip
_STYLES = {
    State.RUNNING: "cyan",
    State.JOB_FINISHED: "green",
    State.FAILED: "red",
    State.USER_KILLED: "magenta",
    State.RUN_ERROR: "red",
    State.RUN_TIMEOUT: "yellow",
}
_WAITING = (State.CREATED, State.AWAITING_PARENTS, State.READY, State.STAGED_IN)
_ENDING = (State.RUN_DONE, State.POSTPROCESSED, State.RUN_ERROR, State.RUN_TIMEOUT)
#: The columns of the table of workflows.
_GROUPS: Mapping[str, Iterable[State]] = {
    "waiting": _WAITING,
    "runnable": RUNNABLE,
    "running": (State.RUNNING,),
    "ending": _ENDING,
    "finished": (State.JOB_FINISHED,),
    "failed": (State.FAILED,),
    "killed": (State.USER_KILLED,),
}


def write(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header: one line each, `-` where there is nothing.

    Without rows it says so on standard error, so that a pipe gets nothing. On a terminal, columns without any value are left out and long cells are cut; elsewhere, neither.
    """
    if not rows:
        click.echo("none", err=True)
        return
    from rich.table import Table

    console = _console()
    cells = [[_cell(value) for value in row] for row in rows]
    keep = [
        place
        for place in range(len(header))
        if not console.is_terminal or any(row[place] != "-" for row in cells)
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place in keep:
        is_number = any(isinstance(row[place], int | float) for row in rows)
        table.add_column(
            _line(header[place]),
            justify="right" if is_number else "left",
            no_wrap=header[place] not in _SOFT,
            overflow="ellipsis",
        )
    for row in cells:
        table.add_row(*(_line(row[place], _style(row[place])) for place in keep))
    with console.capture() as printed:
        console.print(table)
    # Not by rich itself: it ends the program when the reader of a pipe leaves.
    click.echo(printed.get(), nl=False, color=True)


def tasks(found: Sequence[Task], now: datetime) -> None:
    """Print tasks, one a line."""
    header = (
        "id", "name", "workflow", "app", "state", "attempt", "nodes", "exit", "cause", "age",
        "elapsed",
    )  # fmt: skip
    rows = []
    for task in found:
        run_s = elapsed_s(task, now)
        rows.append(
            (
                task.id,
                task.name,
                task.workflow,
                task.app,
                shown_state(task),
                task.attempt,
                task.num_nodes,
                task.exit_code,
                task.cause,
                span((now - task.created_at).total_seconds()),
                None if run_s is None else span(run_s),
            )
        )
    write(header, rows)


def apps(found: Sequence[App]) -> None:
    """Print apps, one a line."""
    write(
        ("name", "command", "description"),
        [(app.name, app.command, app.description) for app in found],
    )


def launchers(found: Sequence[Launcher], now: datetime) -> None:
    """Print launchers, one a line."""
    header = ("id", "host", "pid", "mode", "filter", "nodes", "tasks", "lease", "last seen")
    rows = [
        (
            launcher.id,
            launcher.host,
            launcher.pid,
            launcher.job_mode,
            launcher.wf_filter,
            _nodes(launcher),
            launcher.tasks,
            launcher.lease_state.lower(),
            f"{span((now - launcher.last_seen_at).total_seconds())} ago",
        )
        for launcher in found
    ]
    write(header, rows)


def _nodes(launcher: Launcher) -> str:
    nodes = group_nodes(launcher.nodes)
    return f"{nodes}, set aside: {group_nodes(tuple(launcher.aside))}" if launcher.aside else nodes


def workflows(table: Mapping[str, Mapping[State, int]]) -> None:
    """Print workflows with their tasks by what becomes of them."""
    rows = []
    for name, states in table.items():
        groups = (sum(states.get(s, 0) for s in group) for group in _GROUPS.values())
        rows.append((name or "(none)", sum(states.values()), *groups))
    write(("workflow", "tasks", *_GROUPS), rows)


def states(counts: Counts) -> None:
    """Print how many tasks are in each state, in the order of a task's life."""
    rows = [
        (state, counts.by_state[state], counts.held.get(state, 0))
        for state in State
        if counts.by_state.get(state)
    ]
    write(("state", "tasks", "held"), rows)


def attempts(found: Sequence[Attempt], now: datetime) -> None:
    """Print the attempts of a task."""
    header = ("attempt", "lease", "nodes", "started", "took", "exit", "outcome", "cause")
    rows = []
    for attempt in found:
        end = attempt.ended_at or now
        took = span((end - attempt.started_at).total_seconds()) if attempt.started_at else None
        rows.append(
            (
                attempt.attempt,
                attempt.lease_id,
                group_nodes(attempt.nodes),
                short_time(attempt.started_at or attempt.claimed_at),
                took,
                attempt.exit_code,
                attempt.outcome,
                _because(attempt.cause, attempt.reason),
            )
        )
    write(header, rows)


def events(found: Sequence[TaskEvent]) -> None:
    """Print the history of a task."""
    rows = [
        (
            short_time(event.at),
            event.from_state,
            event.to_state,
            event.attempt,
            event.lease_id,
            event.actor.removeprefix("ensemble_"),
            event.reason,
        )
        for event in found
    ]
    write(("time", "from", "to", "attempt", "lease", "by", "reason"), rows)


def problems(found: Sequence[Problem]) -> None:
    """Print broken invariants."""
    rows = [(p.check.removeprefix("check_"), p.task_id, p.problem) for p in found]
    write(("check", "id", "problem"), rows)


def shown_state(task: Task) -> str:
    """Return the state, or `claimed` for a task that a launcher took and has not started."""
    return "claimed" if task.is_claimed else str(task.state)


def fields(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names with their values, those that have one."""
    shown = [(name, _cell(value)) for name, value in pairs]
    known = [(name, value) for name, value in shown if value != "-"]
    width = max((len(name) for name, _ in known), default=0)
    for name, value in known:
        click.echo(f"{name:<{width}}  {value}")


def _because(cause: str | None, reason: str | None) -> str:
    return f"{cause}: {reason}" if cause and reason else cause or reason or ""


def _cell(value: object) -> str:
    return "-" if value is None or value == "" else clean(str(value))


def _style(cell: str) -> str:
    return _STYLES.get(State(cell), "") if cell in State.__members__ else ""


def _line(text: str, style: str = "") -> Text:
    """Return text for one line of a cell: cut when it is too long, never wrapped."""
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _console() -> Console:
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNLIMITED
    return console
