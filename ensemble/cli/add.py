"""`ensemble add`: one task from the command line, or many from a file."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from ensemble.cli.options import OUTPUT, as_json, examples, read_ids, read_object, read_pairs
from ensemble.cli.session import Session
from ensemble.errors import EnsembleError, UsageError

if TYPE_CHECKING:
    from ensemble.api import Client
    from ensemble.cli.records import Record
    from ensemble.core.model import NewTask

F = TypeVar("F", bound=Callable[..., Any])
_INT = click.INT
_LATER = "Not in this release."


def _pairs(flag: str, field: str, help: str) -> Callable[[F], F]:
    return click.option(
        flag, field, metavar="KEY=VALUE", multiple=True, callback=read_pairs, help=help
    )


#: Every field of NewTask that is not said by the words after `--`; destination is the field.
_FIELDS = (
    click.option("--app", metavar="NAME", help="Run this app; ARGS are appended to its command."),
    click.option("--name", metavar="TEXT", help="Its name. [default: the app's or program's]"),
    click.option("--workflow", metavar="TEXT", help="The workflow it belongs to."),
    _pairs("--param", "params", "A value for {KEY} in the command; may be repeated."),
    click.option(
        "--after",
        "parents",
        metavar="ID",
        multiple=True,
        callback=read_ids,
        help="Start when this task has finished, an id or a range; may be repeated.",
    ),
    click.option(
        "--wait-for-parents/--no-wait-for-parents",
        default=None,
        help="Whether --after is waited for, or only on record. [default: waited for]",
    ),
    click.option(
        "--num-nodes", "--nodes", type=_INT, metavar="N", help="Whole nodes. [default: 1]"
    ),
    click.option("--ranks-per-node", type=_INT, metavar="N", help="MPI ranks. [default: 1]"),
    click.option("--threads-per-rank", type=_INT, metavar="N", help="CPU threads of one rank."),
    click.option("--threads-per-core", type=_INT, metavar="N", help="Hardware threads per core."),
    click.option("--gpus-per-rank", type=_INT, metavar="N", help="GPUs of one rank. [default: 0]"),
    click.option("--memory-mb", type=_INT, metavar="MB", help="Memory, in MiB."),
    click.option(
        "--node-packing-count",
        type=_INT,
        metavar="N",
        help="How many such tasks may share a node in serial mode. [default: 1]",
    ),
    click.option(
        "--wall-time-minutes",
        type=_INT,
        metavar="MINUTES",
        help="An estimate: orders tasks and tells whether one still fits; never kills.",
    ),
    click.option(
        "--time-limit-minutes",
        type=click.FLOAT,
        metavar="MINUTES",
        help="End the run after so many minutes. [default: never]",
    ),
    click.option(
        "--priority", type=_INT, metavar="N", help="Higher goes first, before size. [default: 0]"
    ),
    _pairs("--env", "environ", "A variable of its environment; may be repeated."),
    click.option(
        "--mpi-flag",
        "mpi_flags",
        metavar="FLAG",
        multiple=True,
        help="A word for the MPI launcher, as --mpi-flag=--oversubscribe; may be repeated.",
    ),
    click.option("--cpu-affinity", metavar="TEXT", help="How ranks are bound: none, depth, …"),
    click.option(
        "--output",
        type=OUTPUT,
        help="What becomes of its output: NAME.out in the work directory, the last 16 kB in the "
        "database and no file, or nothing. [default: the app's way, else file]",
    ),
    click.option(
        "--max-retries",
        type=_INT,
        metavar="N",
        help="Runs again after failing by itself. [default: 0]",
    ),
    click.option(
        "--auto-timeout-retry/--no-auto-timeout-retry",
        default=None,
        help="Whether it runs again after its allocation ended. [default: it does]",
    ),
    click.option(
        "--max-timeouts", type=_INT, metavar="N", help="… and how often at most. [default: 10]"
    ),
    click.option(
        "--max-losses",
        type=_INT,
        metavar="N",
        help="Runs again after its launcher or node was lost. [default: 3]",
    ),
    _pairs("--tag", "tags", "A tag to select it by; may be repeated."),
    click.option("--data", metavar="JSON", callback=read_object, help="An object to keep with it."),
    click.option("--input-file", "input_files", metavar="GLOB", multiple=True, help=_LATER),
    click.option("--stage-in-url", metavar="URL", help=_LATER),
    click.option("--stage-out-url", metavar="URL", help=_LATER),
    click.option("--stage-out-file", "stage_out_files", metavar="GLOB", multiple=True, help=_LATER),
    click.option("--post-error-handler", is_flag=True, help=_LATER),
    click.option("--post-timeout-handler", is_flag=True, help=_LATER),
)


def _task_fields(function: F) -> F:
    for option in reversed(_FIELDS):
        function = option(function)
    return function


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog=examples(
        "ensemble add -- ./simulate --steps 1000 'two words'",
        "ensemble add --app dock --param conf=a.txt --num-nodes 2 --ranks-per-node 16",
        "ensemble add --after 12 --name collect -- python collect.py",
        "ensemble add --workflow sweep --from sweep.csv -- ./simulate --temperature {t}",
    ),
)
@_task_fields
@click.option(
    "--from",
    "source",
    type=click.File("rb"),
    metavar="FILE",
    help="Add one task for each line of a CSV (with a header) or JSON lines file; - is standard "
    "input. The other options are defaults for all of them.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["csv", "jsonl"]),
    help="The file's format. [default: by its name, else by its first character]",
)
@click.option("--key", metavar="TEXT", help="The same key again adds nothing, prints the same ids.")
@as_json
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGS...]")
@click.pass_obj
def add(
    session: Session,
    /,
    source: BinaryIO | None,
    form: str | None,
    key: str | None,
    as_json: bool,
    args: tuple[str, ...],
    **given: Any,
) -> None:
    """Add one task, or many from a file.

    With --app, ARGS are appended to the app's command. Without, ARGS are the command; its words
    reach the program unchanged (with --param or --from, {x} in them is filled).

    In a CSV file, columns with the name of a field (num_nodes, workflow, args, …) are fields and all
    others are parameters; an empty cell is the default; lists are JSON or words as in a shell, mappings
    are JSON. Everything is added, or nothing. Prints the ids, as ranges when they are many.
    """
    from ensemble.core.submission import warnings
    from ensemble.render import document, text

    fields = {name: value for name, value in given.items() if value not in (None, (), [], {})}
    fields = {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }
    if key == "":
        raise click.UsageError("--key is empty: leave it out to add in any case")
    if source is None and not args and "app" not in fields:
        raise click.UsageError("say what to run: a command after --, an --app, or --from FILE")
    fields |= _words(fields, args, is_template=bool(source or fields.get("params")))
    records = _records(source, form, fields)
    name = None if source is None else _describe(source)

    def show(ids: list[int]) -> None:
        if as_json:
            document.write(ids)
        else:
            click.echo("\n".join(text.list_ids(ids)))

    most_gpus = session.run(lambda client: _add(client, records, name, key, show))
    found = [w for record in records for w in warnings(record.task)]
    found += [w for record in records if (w := _warn_of_gpus(record.task, most_gpus))]
    for warning in dict.fromkeys(found):
        click.echo(f"warning: {warning}", err=True)


def _words(fields: dict[str, Any], args: Sequence[str], *, is_template: bool) -> dict[str, Any]:
    """Return the field that the words after `--` are for."""
    if not args:
        return {}
    if "app" in fields:
        return {"args": list(args)}
    # A command that is text is filled from the parameters; a list is taken as it is.
    return {"command": shlex.join(args) if is_template else list(args)}


def _records(source: BinaryIO | None, form: str | None, fields: dict[str, Any]) -> list[Record]:
    from ensemble.cli import records

    if source is None:
        if form is not None:
            raise click.UsageError("--format goes with --from FILE")
        return [records.Record(0, records.build(fields))]
    try:
        data = source.read()
    except OSError as error:
        raise UsageError(f"cannot read {source.name}: {error.strerror}") from error
    name = "" if source.name == "<stdin>" else str(source.name)
    chosen = records.choose_format(f"x.{form}" if form else name, data)
    try:
        found = records.read(data, chosen, fields)
    except UsageError as error:
        raise UsageError(f"{_describe(source)}, {error}; nothing was added") from error
    if not found:
        raise UsageError(f"{_describe(source)}: there is no task in it")
    return found


def _describe(source: BinaryIO) -> str:
    return "standard input" if source.name == "<stdin>" else str(source.name)


async def _add(
    client: Client,
    records: Sequence[Record],
    source: str | None,
    key: str | None,
    show: Callable[[list[int]], None],
) -> int | None:
    """Show the ids; return the most GPUs that a node had lately, if that is known and matters."""
    import asyncio

    try:
        ids = await client.tasks.add([record.task for record in records], key=key)
    except UsageError as error:
        if source is None:
            raise
        reason = await _find_reason(client, records, error)
        raise UsageError(f"{source}{reason}; nothing was added") from error
    except asyncio.CancelledError:
        click.echo(
            "warning: the tasks may have been added all the same (ensemble ls shows; "
            "what has a --key can be repeated, and is added once)",
            err=True,
        )
        raise
    show(ids)  # before anything that may be interrupted: who does not see them, adds them again
    if not any(record.task.gpus_per_rank for record in records):
        return None
    try:
        return await client.store.most_gpus()
    except EnsembleError:  # they are added: no hint is worth calling that a failure
        return None


def _warn_of_gpus(new: NewTask, most_gpus: int | None) -> str | None:
    """Return a warning when a task asks for more GPUs than a node has, as far as launchers have told."""
    gpus = new.gpus_per_rank * new.ranks_per_node
    if most_gpus is None or gpus <= most_gpus:
        return None
    return (
        f"GPUs per node: {gpus} asked for, and no launcher of the last 30 days told of a node "
        f"with more than {most_gpus}"
    )


async def _find_reason(client: Client, records: Sequence[Record], error: UsageError) -> str:
    """Return why the store refuses them, with the line when a single one is to blame."""
    from ensemble.core.submission import resolve

    apps = {app.name: app for app in await client.apps.find()}
    names: Counter[str] = Counter()
    for record in records:
        try:
            names[resolve(record.task, apps).name] += 1
        except UsageError as refusal:  # without "task 3 of 7": the line says that
            return f", line {record.line}: {refusal}"
    for record in records:
        if any(isinstance(parent, str) and names[parent] != 1 for parent in record.task.parents):
            return f", line {record.line}: {error}"
    return f": {error}"
