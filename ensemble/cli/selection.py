"""The one grammar that chooses tasks: ids, ranges and filters. What is given must all hold."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ensemble.cli.options import read_pairs
from ensemble.core.model import Selector
from ensemble.core.states import State
from ensemble.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from ensemble.api import Client

T = TypeVar("T")
#: More than so many tasks are not touched without a question.
ASK_ABOVE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which tasks a command line names."""

    selector: Selector
    #: Ids that were named one by one, not by a range: each of them must exist.
    named: tuple[int, ...] = ()


def read(
    words: Sequence[str],
    *,
    workflow: str | None = None,
    states: Sequence[str] = (),
    name: str | None = None,
    app: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Selection:
    """Turn the words and options of a command line into a selection.

    Raises:
        UsageError: A word is neither an id nor a range.
    """
    from ensemble.api import parse_ids

    ids: dict[int, None] = {}
    named = []
    for word in words:
        found = parse_ids(word)
        ids.update(dict.fromkeys(found))
        if len(found) == 1:
            named.append(found[0])
    selector = Selector(
        ids=tuple(ids) if words else None,
        workflow=workflow,
        states=tuple(State(state) for state in states) or None,
        name=name,
        app=app,
        tags=dict(tags) if tags else None,
    )
    return Selection(selector=selector, named=tuple(named))


def filters(function: Callable[..., T]) -> Callable[..., T]:
    """Add the filter options; the command gets them as `selection`, with its words before."""

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> T:
        selection = read(
            given.pop("words"),
            workflow=given.pop("workflow"),
            states=given.pop("state"),
            name=given.pop("name"),
            app=given.pop("app"),
            tags=given.pop("tag"),
        )
        return function(*args, selection=selection, **given)

    for add in reversed(_FILTERS):
        command = add(command)
    return command


def chosen(function: Callable[..., T]) -> Callable[..., T]:
    """Add ids, filters and `--all`, one of which must be given."""

    @functools.wraps(function)
    def command(*args: Any, is_all: bool, selection: Selection, **given: Any) -> T:
        if selection.selector.is_everything and not is_all:
            raise click.UsageError("say which tasks: ids, a filter like --workflow, or --all")
        if is_all and not selection.selector.is_everything:
            raise click.UsageError("--all means every task: leave it out to select some")
        return function(*args, selection=selection, **given)

    return _words(filters(_ALL(command)))


_words = click.argument("words", nargs=-1, metavar="[ID | FIRST-LAST]...")
_ALL = click.option("--all", "is_all", is_flag=True, help="Every task of the site.")
_FILTERS = (
    click.option("--workflow", metavar="TEXT", help="Workflows whose name contains TEXT."),
    click.option(
        "--state",
        type=click.Choice([str(state) for state in State], case_sensitive=False),
        metavar="STATE",
        multiple=True,
        help="Tasks in this state, for example FAILED; may be repeated.",
    ),
    click.option("--name", metavar="TEXT", help="Tasks whose name contains TEXT."),
    click.option("--app", metavar="NAME", help="Tasks of this app."),
    click.option(
        "--tag",
        metavar="KEY=VALUE",
        multiple=True,
        callback=read_pairs,
        help="Tasks with this tag; may be repeated.",
    ),
)


async def resolve(client: Client, selection: Selection) -> dict[int, State]:
    """Return the selected tasks with their states.

    Raises:
        NotFoundError: A task that was named does not exist, or nothing is selected.
    """
    states = await client.tasks.states(selection.selector)
    if selection.selector == Selector(ids=selection.selector.ids):
        missing = [task_id for task_id in selection.named if task_id not in states]
        if missing:
            what = "task" if len(missing) == 1 else "tasks"
            some = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
            raise NotFoundError(f"there is no {what} {some}; nothing was changed (ensemble ls)")
    if not states:
        raise NotFoundError("no task is selected (ensemble ls shows what there is)")
    return states


async def agree(
    client: Client,
    selection: Selection,
    verb: str,
    *,
    among: Collection[State] = tuple(State),
    yes: bool,
) -> tuple[dict[int, State], list[int]]:
    """Return the selected tasks with their states, and which of them to touch, the user agreeing.

    An answer may take hours: what is not selected any more by then is left alone, and so is what the
    question was not about.

    Args:
        client: Of the site.
        selection: Which tasks the command line names.
        verb: What would be done to them.
        among: The states in which that can be done.
        yes: Do not ask.

    Raises:
        NotFoundError: A task that was named does not exist, or nothing is selected.
        UsageError: Nobody is there to answer.
        Declined: The answer was no.
    """
    from ensemble.render.text import plural

    states = await resolve(client, selection)
    wanted = [task_id for task_id, state in states.items() if state in among]
    if not confirm(verb, len(wanted), yes=yes):
        return states, wanted
    found = await client.tasks.states(selection.selector)
    if gone := states.keys() - found.keys():
        click.echo(f"no longer selected, and left alone: {plural(len(gone), 'task')}", err=True)
    # Of what was not asked about, the state that it was judged by is told.
    states = {i: found[i] if was in among else was for i, was in states.items() if i in found}
    return states, [task_id for task_id, state in states.items() if state in among]


def confirm(verb: str, count: int, *, yes: bool) -> bool:
    """Ask before *count* tasks are touched, when they are many; tell whether that was asked.

    Raises:
        UsageError: Nobody is there to answer.
        Declined: The answer was no.
    """
    if yes or count <= ASK_ABOVE:
        return False
    if not sys.stdin.isatty():
        raise UsageError(f"this would {verb} {count} tasks: repeat it with --yes")
    # In a running event loop, ^C would only ask the loop to end, and wait for the answer first.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if not click.confirm(f"{verb} {count} tasks?", err=True):
            raise Declined("nothing was changed")
    finally:
        signal.signal(signal.SIGINT, before)
    return True


class Declined(click.ClickException):
    """The user answered no."""

    exit_code = 1
