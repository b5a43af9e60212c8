"""`ensemble db …`: the site's database."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import ensemble
from ensemble.cli.options import as_json, examples
from ensemble.cli.session import Session

if TYPE_CHECKING:
    from ensemble.core.backup import Head
    from ensemble.core.restoration import Restored
    from ensemble.drivers.postgres import Cluster
    from ensemble.site import Site

_ROLES = ("user", "task", "owner")


@click.group()
def db() -> None:
    """Start, stop and look into the site's database."""


@db.command(epilog=examples("ensemble db start"))
@click.option(
    "--takeover",
    is_flag=True,
    help="The host that had the database is gone for good: start it here all the same.",
)
@click.pass_obj
def start(session: Session, takeover: bool) -> None:
    """Start the database unless it runs.

    It goes on running when you log out, until `ensemble db stop`.
    """
    cluster = _own_cluster(session)
    if cluster is None:
        return
    found = session.run_alone(cluster.start(takeover=takeover))
    click.echo(f"the database runs on {found.host}, port {found.port} (pid {found.pid})")


@db.command(epilog=examples("ensemble db stop"))
@click.pass_obj
def stop(session: Session) -> None:
    """Stop the database; launchers that run wait for it to come back."""
    cluster = _own_cluster(session)
    if cluster is None:
        return
    session.run_alone(cluster.stop())
    click.echo("the database is stopped (ensemble db start)")


@db.command(epilog=examples("ensemble db status --json"))
@as_json
@click.pass_obj
def status(session: Session, as_json: bool) -> None:
    """Show where the database is and whether it runs; exit 1 when it does not."""
    from ensemble.cli.site import describe_database
    from ensemble.render import document, tables

    found = session.run_alone(describe_database(session.site()))
    is_running = found["is_external"] or found["is_running"]
    if as_json:
        document.write(found)
    else:
        state = "external" if found["is_external"] else "running" if is_running else "stopped"
        rest = [(name, value) for name, value in found.items() if not name.startswith("is_")]
        tables.fields([("database", state), *rest])
    if not is_running:
        click.get_current_context().exit(1)


@db.command(epilog=examples("ensemble db url --role owner"))
@click.option("--role", type=click.Choice(_ROLES), default="user", show_default=True)
@click.pass_obj
def url(session: Session, role: str) -> None:
    """Print the database's address, without a password, for other programs."""
    site = session.site()
    cluster = site.cluster
    if cluster is None:
        click.echo(site.settings.store.dsn)
        return
    from ensemble.drivers.postgres import Role

    click.echo(cluster.url(Role(f"ensemble_{role}")))


@db.command(
    context_settings={"ignore_unknown_options": True},
    epilog=examples("ensemble db psql -- -c 'SELECT state, count(*) FROM task GROUP BY state'"),
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGS...]")
@click.pass_obj
def psql(session: Session, args: tuple[str, ...]) -> None:
    """Open psql on the database, where the tables are those of Ensemble."""
    from ensemble.errors import LaunchError

    site = session.site()
    cluster = site.cluster
    if cluster is None:
        argv, environ = ["psql", site.settings.store.dsn or ""], dict(os.environ)
    else:
        argv, environ = cluster.psql()
    environ["PGOPTIONS"] = f"{environ.get('PGOPTIONS', '')} -c search_path=ensemble".strip()
    try:
        os.execvpe(argv[0], [*argv, *args], environ)  # noqa: S606 - no shell: the user's own words
    except OSError as error:
        raise LaunchError(f"cannot start {argv[0]}: {error.strerror}") from error


@db.command(epilog=examples("ensemble db check"))
@as_json
@click.pass_obj
def check(session: Session, as_json: bool) -> None:
    """Look for contradictions in the records; exit 1 when there are any.

    Reads every task and its history: a minute or more for millions of them.
    """
    from ensemble.render import document, tables

    found = session.run(lambda client: client.check())
    if as_json:
        document.write(found)
    elif found:
        tables.problems(found)
    else:
        click.echo("no problem found")
    if found:
        click.get_current_context().exit(1)


@db.command(epilog=examples("ensemble db migrate"))
@click.pass_obj
def migrate(session: Session) -> None:
    """Bring the database to this program's schema; do it with no launcher running."""
    from ensemble.core import migrations
    from ensemble.site import OWNER

    done = session.run_alone(migrations.migrate(session.site().address(OWNER)))
    for name in done:
        click.echo(f"applied {name}")
    if not done:
        click.echo("the schema is up to date")


@db.command(epilog=examples("ensemble db backup ~/sweep-$(date +%F).gz"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.pass_obj
def backup(session: Session, file: Path, force: bool) -> None:
    """Write everything that the database holds into FILE, while work goes on.

    Work directories, templates and settings are not in it: they are files already.
    """
    from ensemble.core.backup import back_up
    from ensemble.drivers.pg import backup as files
    from ensemble.site import OWNER

    address = session.site().address(OWNER)
    _leave_when_told()
    with files.create(file, force=force) as write:
        made = session.run_alone(back_up(address, write, release=ensemble.__version__))
    from ensemble.render.text import clean

    size = file.stat().st_size
    click.echo(clean(f"backed up {made.rows.get('task', 0):,} tasks to {file} ({size:,} bytes)"))


@db.command(
    epilog=examples(
        "ensemble init new && ensemble --site new db restore ~/sweep-2026-05-01.gz",
        "ensemble db restore --force ~/sweep-2026-05-01.gz",
    )
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace whatever the database holds.")
@click.pass_obj
def restore(session: Session, file: Path, force: bool) -> None:
    """Fill the site's database from FILE, a backup; all of it or, after an error, nothing.

    No launcher may run on this database. What was running when the backup was made is free to run again.
    Makes the site's own database where that is missing.
    """
    from ensemble.core import restoration
    from ensemble.core.backup import read_head, verify
    from ensemble.drivers.pg import backup as files
    from ensemble.site import OWNER

    site = session.site()

    async def work() -> tuple[Head, Restored]:
        with files.read(file) as source:
            await verify(source)  # before anything is touched
        await _make_missing(site)
        with files.read(file) as source:
            head = read_head(source)
            return head, await restoration.restore(site.address(OWNER), source, head, replace=force)

    head, done = session.run_alone(work())
    _tell_restored(f"of {head.at:%Y-%m-%d %H:%M:%S} UTC", done)


def _leave_when_told() -> None:
    """Let signals that would end this process at once end it in good order, that is, without a half file."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one
            signal.signal(number, lambda told, _frame: sys.exit(128 + told))


async def _make_missing(site: Site) -> None:
    cluster = site.cluster
    if cluster is not None and not cluster.exists:
        from ensemble.render.text import clean

        click.echo(clean(f"{cluster.folder} is missing: a database is made"), err=True)
        await cluster.create()
        await cluster.start()


def _tell_restored(when: str, done: Restored) -> None:
    click.echo(f"restored {done.rows.get('task', 0):,} tasks as they were at the backup {when}")
    if done.launchers:
        click.echo(
            f"{done.launchers:,} launchers ran then: their {done.released:,} tasks are free to run again; "
            "a launcher that still runs on the old database should be ended first"
        )
    if done.batch_jobs:
        click.echo(
            f"{done.batch_jobs:,} batch jobs were queued or running then, and are given up (LOST): "
            "cancel those that your scheduler still has"
        )
    for table in done.skipped:
        click.echo(f"warning: table {table} is not Ensemble's and was left out", err=True)
    click.echo("next      ensemble db check")


def _own_cluster(session: Session) -> Cluster | None:
    """Return the site's own cluster; say so when the database is not Ensemble's to start or stop."""
    site = session.site()
    if site.cluster is None:
        click.echo(f"the database is external ({site.settings.store.dsn}); nothing was done")
    return site.cluster
