"""`ensemble queue`: queue policies, batch jobs, and what the service would do next."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ensemble.cli.options import as_json, examples
from ensemble.cli.session import Session, now
from ensemble.errors import (
    EnsembleError,
    NotFoundError,
    SchedulerError,
    StoreUnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from ensemble.api import Client
    from ensemble.render.view import QueueView

T = TypeVar("T")


@click.group(
    invoke_without_command=True,
    epilog=examples(
        "ensemble queue", "ensemble queue pause debug --reason 'maintenance on Friday'",
        "ensemble queue resume --all", "ensemble queue cancel 12",
    ),
)  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(0, 100_000), default=20, show_default=True, metavar="N",
    help="Show the youngest N batch jobs, and as many decisions.",
)  # fmt: skip
@as_json
@click.pass_context
def queue(context: click.Context, limit: int, as_json: bool) -> None:
    """Show queues, batch jobs and what the service does next; pause, cancel."""
    if context.invoked_subcommand is not None:
        return
    session: Session = context.obj
    found, warning = session.run(lambda client: _look(client, limit))
    from ensemble.render import document, queue as screen
    from ensemble.render.text import clean

    if as_json:
        document.write(screen.as_document(found))
    else:
        screen.show(found, now())
    if warning:
        click.echo(f"warning: {clean(warning)}", err=True)


async def _look(client: Client, limit: int) -> tuple[QueueView, str | None]:
    """Return what there is to show, and why the scheduler could not be asked.

    Where no service does it, the scheduler is asked first what became of the batch jobs.
    """
    from ensemble.core.jobs import Jobs
    from ensemble.render.view import QueueView
    from ensemble.service.filler import Decider

    jobs = Jobs(client.store.pool)
    service = await jobs.service()
    warning = None
    if not service.is_running:
        warning = await _ask_scheduler(client, jobs)
    settings = client.site.settings
    picture = await Decider(client.store, jobs, settings).decide()
    found = QueueView(
        policies=settings.queue,
        service=service,
        plan=picture.decisions,
        active=picture.jobs,
        jobs=await jobs.recent(limit),
        notes=await jobs.decisions(limit),
    )
    return found, warning


async def _ask_scheduler(client: Client, jobs: Any) -> str | None:
    from ensemble import batch
    from ensemble.service.look import Lookout

    if not await jobs.recent(1):
        return None
    try:
        await Lookout(jobs, batch.find_system(client.site), client.site.settings.service).look()
    except EnsembleError as error:
        return f"what follows may be out of date: {error}"
    return None


_ALL = click.option("--all", "is_all", is_flag=True, help="All of them.")
_NAMES = click.argument("names", nargs=-1, metavar="NAME...")


@queue.command(epilog=examples("ensemble queue pause debug --reason 'out of hours'"))
@_NAMES
@_ALL
@click.option("--reason", default="", metavar="TEXT", help="Why, for those who look.")
@click.pass_obj
def pause(session: Session, names: tuple[str, ...], is_all: bool, reason: str) -> None:
    """Submit no more for these queue policies; batch jobs that are there go on."""

    async def one(client: Client, name: str) -> str:
        await client.batch.pause(name, reason=reason)
        return f"{name}: paused (ensemble queue resume {name})"

    _for_each_policy(session, names, is_all, one)


@queue.command(epilog=examples("ensemble queue resume debug"))
@_NAMES
@_ALL
@click.pass_obj
def resume(session: Session, names: tuple[str, ...], is_all: bool) -> None:
    """Submit again for these queue policies; what had failed is forgotten."""

    async def one(client: Client, name: str) -> str:
        was_kept = await client.batch.resume(name)
        return f"{name}: " + ("resumed" if was_kept else "nothing had kept it from submitting")

    _for_each_policy(session, names, is_all, one)


def _for_each_policy(
    session: Session,
    names: tuple[str, ...],
    is_all: bool,
    act: Callable[[Client, str], Awaitable[str]],
) -> None:
    if is_all == bool(names):
        raise UsageError("name queue policies, or say --all (ensemble queue lists them)")

    async def work(client: Client) -> int:
        known = list(client.site.settings.queue)
        for name in names:
            if name not in known:
                listed = f"known: {', '.join(known)}" if known else "ensemble.toml has none"
                raise NotFoundError(
                    f"there is no queue policy {name!r}; {listed}; nothing was changed"
                )
        return await _for_each(client, known if is_all else names, act)

    click.get_current_context().exit(session.run(work))


@queue.command(epilog=examples("ensemble queue cancel 12", "ensemble queue cancel --all"))
@click.argument("ids", nargs=-1, type=click.IntRange(1, 2**63 - 1), metavar="ID...")
@_ALL
@click.option("--reason", default="", metavar="TEXT", help="Why, for those who look.")
@click.pass_obj
def cancel(session: Session, ids: tuple[int, ...], is_all: bool, reason: str) -> None:
    """Cancel batch jobs, by the ids of `ensemble queue`; what runs in them may run again elsewhere."""
    if is_all == bool(ids):
        raise UsageError("give the ids of batch jobs, or --all (ensemble queue lists them)")

    async def one(client: Client, job_id: int) -> str:
        return await _cancel(client, job_id, reason and f"cancelled by the user: {reason}")

    async def work(client: Client) -> int:
        chosen = sorted(job.id for job in await client.batch.active()) if is_all else ids
        return await _for_each(client, chosen, one)

    click.get_current_context().exit(session.run(work))


async def _for_each(
    client: Client, chosen: Iterable[T], act: Callable[[Client, T], Awaitable[str]]
) -> int:
    """Say what became of each as soon as it is done; return the exit status of the first that failed.

    Raises:
        StoreUnavailableError: Every other would fail for that, too.
    """
    from ensemble.render.text import clean

    status = 0
    for each in chosen:
        try:
            line = await act(client, each)
        except StoreUnavailableError:
            raise
        except EnsembleError as error:
            status = status or error.exit_code
            click.echo(clean(f"error: {error}"), err=True)
        else:
            click.echo(clean(line))
    return status


async def _cancel(client: Client, job_id: int, reason: str) -> str:
    try:
        was_there = await client.batch.cancel(job_id, reason=reason)
    except SchedulerError as error:
        what = f"batch job {job_id}: {error}"
        raise SchedulerError(what, trouble=error.trouble, output=error.output) from error
    job = await client.batch.get(job_id)
    if was_there:
        return f"batch job {job_id}: cancelled ({job.scheduler} job {job.scheduler_id or 'not known yet'})"
    return f"batch job {job_id}: has ended already ({job.state})"
