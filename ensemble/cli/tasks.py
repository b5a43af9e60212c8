"""`ensemble ls`, `show` and `wait`: looking at tasks."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import click

from ensemble.cli.options import Amount, TaskId, as_json, examples
from ensemble.cli.selection import Selection, filters, resolve
from ensemble.cli.session import Session, now
from ensemble.core.model import Selector
from ensemble.core.states import RETRYABLE, RUNNABLE, State
from ensemble.errors import EnsembleError

if TYPE_CHECKING:
    from ensemble.api import Client
    from ensemble.core.model import Task, TaskDetail

_KINDS = ("tasks", "apps", "workflows", "launchers", "batch")
#: How often the progress line is written.
_PROGRESS_S = 1.0
_EVERYTHING = 2**62
#: Where `ls` keeps what it was asked to list.
_KIND = "ensemble.cli.tasks.kind"


def _split_kind(
    context: click.Context, _param: click.Parameter, words: tuple[str, ...]
) -> tuple[str, ...]:
    """Take the noun, if the first word is one, out of the words that select tasks."""
    if words and words[0] in _KINDS:
        context.meta[_KIND] = words[0]
        return words[1:]
    return words


@click.command(
    epilog=examples(
        "ensemble ls",
        "ensemble ls --workflow screen --state FAILED",
        "ensemble ls 3-9 --json",
        "ensemble ls workflows",
    )
)
@click.argument(
    "words",
    nargs=-1,
    callback=_split_kind,
    metavar="[tasks|apps|workflows|launchers|batch] [ID | FIRST-LAST]...",
)
@filters
@click.option(
    "--limit",
    type=click.IntRange(min=0, max=_EVERYTHING),
    default=50,
    show_default=True,
    metavar="N",
    help="List N tasks at most; 0 lists all.",
)
@as_json
@click.pass_context
def ls(context: click.Context, selection: Selection, limit: int, as_json: bool) -> None:
    """List tasks, apps, workflows, launchers or batch jobs."""
    session: Session = context.obj
    kind = context.meta.get(_KIND, "tasks")
    if kind != "tasks":
        if not selection.selector.is_everything:
            raise click.UsageError(f"filters select tasks, not {kind}")
        _list_others(session, kind, as_json=as_json)
        return
    from ensemble.render import document, tables

    found, more = session.run(lambda client: _find(client, selection.selector, limit))
    moment = now()
    if as_json:
        document.write([document.task(task, moment) for task in found])
    elif found:
        tables.tasks(found, moment)
    else:
        hint = "ensemble add --help" if selection.selector.is_everything else "ensemble ls"
        click.echo(f"no tasks ({hint})", err=True)
    if more:
        click.echo(f"{more:,} more (--limit)", err=True)


def _list_others(session: Session, kind: str, *, as_json: bool) -> None:
    from ensemble.render import document, tables

    if kind == "apps":
        apps = session.run(lambda client: client.apps.find())
        document.write(apps) if as_json else tables.apps(apps)
    elif kind == "workflows":
        workflows = session.run(lambda client: client.workflows())
        listed = document.workflows(workflows)
        document.write(listed) if as_json else tables.workflows(workflows)
    elif kind == "batch":
        from ensemble.render import queue

        jobs = session.run(lambda client: client.batch.find(limit=200))
        listed = [document.batch_job(job) for job in jobs]
        document.write(listed) if as_json else queue.batch_jobs(jobs, now())
    else:
        launchers = session.run(lambda client: client.launchers(only_live=False))
        document.write(launchers) if as_json else tables.launchers(launchers, now())


async def _find(client: Client, selector: Selector, limit: int) -> tuple[list[Task], int]:
    """Return the first tasks, and how many more there are."""
    found = await client.tasks.find(selector, limit=limit + 1 if limit else _EVERYTHING)
    if not limit or len(found) <= limit:
        return found, 0
    return found[:limit], await _count(client, selector) - limit


async def _count(client: Client, selector: Selector) -> int:
    if selector != Selector(workflow=selector.workflow, states=selector.states):
        return len(await client.tasks.states(selector))
    by_state = (await client.counts(selector.workflow)).by_state
    return sum(by_state.get(state, 0) for state in selector.states or by_state)


@click.command(epilog=examples("ensemble show 12"))
@click.argument("task_id", type=TaskId(), metavar="ID")
@as_json
@click.pass_obj
def show(session: Session, task_id: int, as_json: bool) -> None:
    """Show everything about a task, with its history."""
    from ensemble.render import document, task as screen

    async def look(client: Client) -> None:
        found = await client.tasks.detail(task_id)
        folder = client.tasks.workdir(found.task)
        waits = await _why_waiting(client, found)
        if as_json:
            output = client.tasks.output(found.task)
            document.write(document.detail(found, now(), folder=folder, output=output, waits=waits))
        else:
            screen.show(found, now(), folder=folder, waits=waits)

    session.run(look)


async def _why_waiting(client: Client, found: TaskDetail) -> str | None:
    """Say why no launcher has taken a runnable task, where that can be told."""
    from ensemble.render import waiting

    if found.task.is_held or found.task.state not in RUNNABLE:
        return None
    most_gpus = await client.store.most_gpus() if found.spec.get("gpus_per_rank") else None
    return waiting.explain(found, await client.launchers(), most_gpus)


@click.command(epilog=examples("ensemble wait 12", "ensemble wait --workflow screen --timeout 600"))
@click.argument("words", nargs=-1, metavar="[ID | FIRST-LAST]...")
@filters
@click.option(
    "--timeout",
    type=Amount(may_be_zero=True),
    metavar="SECONDS",
    help="Give up after so long, with exit status 1. [default: never]",
)
@as_json
@click.pass_obj
def wait(session: Session, selection: Selection, timeout: float | None, as_json: bool) -> None:
    """Wait until tasks have ended; exit 1 when one failed.

    Waits for all tasks of the site when none is selected. A task that will run again has not ended.
    """
    states = session.run(lambda client: _wait(client, selection, timeout))
    counts = Counter(states.values())
    if as_json:
        from ensemble.render import document

        document.write([{"id": task_id, "state": state} for task_id, state in states.items()])
    else:
        click.echo(", ".join(f"{counts[state]:,} {state}" for state in State if counts[state]))
    if any(counts[state] for state in RETRYABLE):
        click.get_current_context().exit(1)


async def _wait(client: Client, selection: Selection, timeout_s: float | None) -> dict[int, State]:
    ids = list(await resolve(client, selection))
    try:
        if not sys.stderr.isatty():
            return await client.tasks.wait(ids, timeout_s=timeout_s)
        async with asyncio.TaskGroup() as group:
            progress = group.create_task(_show_progress(client, ids))
            states = await client.tasks.wait(ids, timeout_s=timeout_s)
            progress.cancel()
        return states
    except* TimeoutError:
        left = await client.store.unfinished(ids)
        raise EnsembleError(f"{left:,} of {len(ids):,} tasks had not ended in time") from None


async def _show_progress(client: Client, ids: list[int]) -> None:
    """Keep one line on the terminal up to date until cancelled."""
    try:
        while True:
            began = time.monotonic()
            ended = len(ids) - await client.store.unfinished(ids)
            click.echo(f"\r\033[K{ended:,} of {len(ids):,} tasks have ended", nl=False, err=True)
            # Of very many tasks it takes a while: the database has other work to do.
            await asyncio.sleep(max(_PROGRESS_S, 10 * (time.monotonic() - began)))
    finally:
        click.echo("\r\033[K", nl=False, err=True)
