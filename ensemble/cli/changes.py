"""`ensemble kill`, `retry`, `rm` and `modify`: changing tasks, and saying what was not changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from ensemble.cli.options import as_json, assume_yes, examples, read_object, read_pairs
from ensemble.cli.selection import Selection, agree, chosen, read
from ensemble.cli.session import Session
from ensemble.core.model import Changes, Selector
from ensemble.core.states import FINAL, RETRYABLE, State
from ensemble.errors import IllegalMoveError, NotFoundError, StoreUnavailableError

if TYPE_CHECKING:
    from ensemble.api import Client
    from ensemble.core.model import Task

_LINES = 20
_GONE = "is not there any more"


@dataclass(slots=True, kw_only=True)
class Report:
    """What became of the selected tasks."""

    #: Id -> a remark, which may be empty.
    done: dict[int, str] = field(default_factory=dict)
    #: Id -> why not.
    left: dict[int, str] = field(default_factory=dict)


@click.command(
    epilog=examples(
        "ensemble kill 12 --reason diverged",
        "ensemble kill --workflow screen --state RUNNING --yes",
    )
)
@chosen
@click.option("--reason", metavar="TEXT", help="Why; goes on record.")
@assume_yes
@as_json
@click.pass_obj
def kill(
    session: Session, selection: Selection, reason: str | None, yes: bool, as_json: bool
) -> None:
    """Kill tasks, running or not.

    What runs is sent TERM, and KILL after the grace period of its launcher. Tasks that wait for a
    killed one fail.
    """

    async def work(client: Client) -> Report:
        states, wanted = await agree(client, selection, "kill", among=set(State) - FINAL, yes=yes)
        killed = await client.tasks.kill(wanted, reason=reason) if wanted else {}
        return Report(
            done={i: "its process is being ended" if held else "" for i, held in killed.items()},
            left={i: f"is {state}" for i, state in states.items() if i not in killed},
        )

    _finish(session.run(work), "killed", as_json=as_json)


@click.command(
    epilog=examples("ensemble retry 12", "ensemble retry --state FAILED --workflow screen")
)
@chosen
@assume_yes
@as_json
@click.pass_obj
def retry(session: Session, selection: Selection, yes: bool, as_json: bool) -> None:
    """Let failed and killed tasks run again.

    With them, what had failed only because of them. Their counters of failures start afresh.
    """

    async def work(client: Client) -> Report:
        states, wanted = await agree(client, selection, "retry", among=RETRYABLE, yes=yes)
        again = await client.tasks.retry(wanted) if wanted else []
        done = {i: "" if i in states else "had failed because of a parent" for i in again}
        left = {i: _why_not_retried(state) for i, state in states.items() if i not in done}
        return Report(done=done, left=left)

    _finish(session.run(work), "retried", as_json=as_json)


@click.command("rm", epilog=examples("ensemble rm 12", "ensemble rm --workflow trial --yes"))
@chosen
@assume_yes
@as_json
@click.pass_obj
def remove(session: Session, selection: Selection, yes: bool, as_json: bool) -> None:
    """Remove tasks and their history from the database.

    Their files stay. What a launcher holds stays, and so does what other tasks wait for.
    """

    async def work(client: Client) -> Report:
        _, wanted = await agree(client, selection, "remove", yes=yes)
        gone = await client.tasks.remove(wanted) if wanted else []
        return Report(
            done=dict.fromkeys(gone, ""),
            left=await _why_not_removed(client, sorted(set(wanted) - set(gone))),
        )

    _finish(session.run(work), "removed", as_json=as_json)


@click.command(epilog=examples("ensemble modify 12-20 --num-nodes 4 --wall-time-minutes 90"))
@click.argument("words", nargs=-1, required=True, metavar="ID | FIRST-LAST...")
@click.option("--workflow", metavar="TEXT", help="The workflow it belongs to.")
@click.option("--priority", type=int, metavar="N", help="Higher goes first, before size.")
@click.option("--wall-time-minutes", type=int, metavar="MINUTES", help="The estimate.")
@click.option(
    "--time-limit-minutes", type=float, metavar="MINUTES", help="End a run after so many minutes."
)
@click.option("--num-nodes", "--nodes", type=int, metavar="N", help="Whole nodes.")
@click.option("--ranks-per-node", type=int, metavar="N", help="MPI ranks on each node.")
@click.option("--max-retries", type=int, metavar="N", help="Runs again after failing by itself.")
@click.option(
    "--tag",
    "tags",
    metavar="KEY=VALUE",
    multiple=True,
    callback=read_pairs,
    help="A tag to add or change; may be repeated.",
)
@click.option(
    "--data", metavar="JSON", callback=read_object, help="An object to merge into the task's data."
)
@assume_yes
@as_json
@click.pass_obj
def modify(
    session: Session, /, words: tuple[str, ...], yes: bool, as_json: bool, **given: Any
) -> None:
    """Change what tasks need.

    Only while no launcher holds them; what has run keeps its history.
    """
    changes = Changes(**{name: value for name, value in given.items() if value not in (None, {})})
    if changes == Changes():
        raise click.UsageError("say what to change, for example --priority 5")
    _check_storable(changes)
    report = Report()

    async def work(client: Client) -> None:
        _, wanted = await agree(client, read(words), "modify", yes=yes)
        for task_id in wanted:
            try:
                await client.tasks.modify(task_id, changes)
                report.done[task_id] = ""
            except IllegalMoveError:
                report.left[task_id] = "is held by a launcher"
            except NotFoundError:
                report.left[task_id] = _GONE

    try:
        session.run(work)
    except BaseException:
        # Each task is changed by itself: what was changed until then, stays so.
        if report.done:
            _show(report, "modified", as_json=as_json)
        raise
    _finish(report, "modified", as_json=as_json)


def _check_storable(changes: Changes) -> None:
    from ensemble.cli.records import check_storable
    from ensemble.core.model import NewTask

    check_storable(
        NewTask(workflow=changes.workflow or "", tags=dict(changes.tags), data=dict(changes.data))
    )


def _why_not_retried(state: State) -> str:
    if state not in RETRYABLE:
        return f"is {state}; only FAILED and USER_KILLED tasks can be retried"
    return "is still being ended (try again in a moment), or a parent of it has failed (retry that)"


async def _why_not_removed(client: Client, left: Sequence[int]) -> dict[int, str]:
    """Say of tasks why they stay: of those that are shown by themselves, each as it is now."""
    why = dict.fromkeys(left, "is held by a launcher, or waited for by other tasks")
    shown = tuple(left[:_LINES])
    if not shown:
        return why
    try:
        found = await client.tasks.find(Selector(ids=shown), limit=_LINES)
    except StoreUnavailableError:
        return why  # the others are removed, and that must be told
    return why | dict.fromkeys(shown, _GONE) | {task.id: _why_it_stays(task) for task in found}


def _why_it_stays(task: Task) -> str:
    if task.is_held:
        return f"is held by a launcher (ensemble kill {task.id})"
    return "is waited for by other tasks"


def _finish(report: Report, verb: str, *, as_json: bool) -> None:
    """Print what was done and what was not; exit 1 when nothing was."""
    _show(report, verb, as_json=as_json)
    if not report.done:
        click.get_current_context().exit(1)


def _show(report: Report, verb: str, *, as_json: bool) -> None:
    from ensemble.render import document
    from ensemble.render.text import list_ids, plural

    if as_json:
        document.write(
            [{"id": i, "is_done": True, "note": note or None} for i, note in report.done.items()]
            + [{"id": i, "is_done": False, "note": why} for i, why in report.left.items()]
        )
    else:
        if report.done:
            which = ", ".join(list_ids(sorted(report.done)))
            click.echo(f"{verb} {plural(len(report.done), 'task')}: {which}")
        _echo_notes({i: note for i, note in report.done.items() if note}, "task {}: {}", err=False)
        _echo_notes(report.left, f"not {verb}: task {{}} {{}}", err=True)


def _echo_notes(notes: Mapping[int, str], form: str, *, err: bool) -> None:
    from ensemble.render.text import clean

    for task_id, note in sorted(notes.items())[:_LINES]:
        click.echo(clean(form.format(task_id, note)), err=err)
    if len(notes) > _LINES:
        click.echo(f"… and {len(notes) - _LINES:,} more", err=err)
