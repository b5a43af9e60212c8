"""`ensemble init` and `ensemble status`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.cli.options import as_json, examples
from ensemble.cli.session import Session, now

if TYPE_CHECKING:
    from ensemble.api import Client
    from ensemble.core.model import Counts, Launcher
    from ensemble.core.states import State
    from ensemble.site import Site


@click.command(
    epilog=examples(
        "ensemble init sweep",
        "ensemble init sweep --listen ib0",
        "ensemble init sweep --dsn postgresql://me@db.example.org/ensemble",
    )
)
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--dsn",
    metavar="URL",
    help="Use this PostgreSQL (14 or later) instead of one of the site's own: "
    "postgresql://USER@HOST:PORT/DATABASE, with the password in ~/.pgpass.",
)
@click.option(
    "--allow-network-fs",
    is_flag=True,
    help="Accept a data directory on NFS, Lustre and the like: slow, and unsafe without locks.",
)
@click.option(
    "--listen",
    metavar="ADDRESS",
    multiple=True,
    help="Let other hosts connect to the site's own database, over TLS: an address or the name of "
    "a network interface; may be repeated. [default: only this host]",
)
@click.option(
    "--bin-dir",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="Where PostgreSQL's programs are. [default: found by pg_config, in well-known places, or "
    "in an installed wheel]",
)
@click.pass_obj
def init(
    session: Session,
    folder: Path | None,
    dsn: str | None,
    listen: tuple[str, ...],
    bin_dir: str | None,
    allow_network_fs: bool,
) -> None:
    """Make a site: a directory for your work, with a database.

    DIR is the current directory when it is not named. A site that is there already is left as it
    is; one whose making was interrupted is finished.
    """
    from ensemble.site import Site, create

    path = Path(os.path.abspath(folder or Path(session.named or ".").expanduser()))
    if not session.run_alone(
        create(path, dsn=dsn, listen=listen, bin_dir=bin_dir, allow_network_fs=allow_network_fs)
    ):
        click.echo(f"the site {path} exists; nothing was changed (ensemble --site {path} status)")
        return
    site = Site.find(str(path))
    click.echo(f"site      {site.path}")
    click.echo(f"database  {_in_words(session.run_alone(describe_database(site)))}")
    click.echo("next      " + ("" if path == Path.cwd() else f"cd {path}\n          "), nl=False)
    click.echo("ensemble add -- echo hello\n          ensemble launch --nodes 2")


@click.command(epilog=examples("ensemble status"))
@as_json
@click.pass_obj
def status(session: Session, as_json: bool) -> None:
    """Show tasks, workflows, launchers and database on one screen."""
    site = session.site()
    counts, workflows, launchers = session.run(_look)
    database = session.run_alone(describe_database(site))
    from ensemble.render import document, site as screen

    if as_json:
        document.write(document.status(site.path, database, counts, workflows, launchers))
    else:
        screen.status(site.path, _in_words(database), counts, workflows, launchers, now())


async def _look(
    client: Client,
) -> tuple[Counts, dict[str, dict[State, int]], list[Launcher]]:
    return await client.counts(), await client.workflows(), await client.launchers()


async def describe_database(site: Site) -> dict[str, Any]:
    """Return what there is to know about a site's database, for a JSON document."""
    cluster = site.cluster
    if cluster is None:
        return {"is_external": True, "dsn": site.settings.store.dsn}
    found = await cluster.status()
    return {
        "is_external": False,
        "is_running": found.is_running,
        "host": found.host,
        "port": found.port,
        "pid": found.pid,
        "version": found.version,
        "data_dir": str(found.data_dir),
        "note": found.owner_note,
    }


def _in_words(database: dict[str, Any]) -> str:
    if database["is_external"]:
        return f"external: {database['dsn']}"
    state = "running" if database["is_running"] else "stopped (ensemble db start)"
    place = f"{database['host']}, port {database['port']}" if database["port"] else "this host"
    note = f"; {database['note']}" if database["note"] else ""
    return f"PostgreSQL {database['version']} on {place}, {state}{note}"
