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
    from ensemble.render.view import SiteView
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
@click.option(
    "--scheduler",
    type=click.Choice(["slurm", "pbs", "cobalt", "lsf", "sge", "flux", "local"]),
    help="The batch scheduler to submit to; `local` runs batch jobs on this machine. [default: the one "
    "that is here]",
)
@click.pass_obj
def init(
    session: Session,
    folder: Path | None,
    dsn: str | None,
    listen: tuple[str, ...],
    bin_dir: str | None,
    allow_network_fs: bool,
    scheduler: str | None,
) -> None:
    """Make a site: a directory for your work, with a database.

    DIR is the current directory when it is not named. A site that is there already is left as it
    is; one whose making was interrupted is finished.
    """
    from ensemble.render.text import clean
    from ensemble.site import Site, create

    path = Path(os.path.abspath(folder or Path(session.named or ".").expanduser()))
    if not session.run_alone(
        create(
            path,
            dsn=dsn,
            listen=listen,
            bin_dir=bin_dir,
            allow_network_fs=allow_network_fs,
            scheduler=scheduler,
        )
    ):
        shown = clean(str(path))
        click.echo(f"the site {shown} exists; nothing was changed (ensemble --site {shown} status)")
        return
    site = Site.find(str(path))
    click.echo(f"site      {clean(str(site.path))}")
    click.echo(f"database  {clean(_in_words(session.run_alone(describe_database(site))))}")
    batch = site.settings.scheduler
    click.echo(f"scheduler {batch.kind}, job template templates/{clean(batch.template)}")
    here = "" if path == Path.cwd() else f"cd {clean(str(path))}\n          "
    click.echo(f"next      {here}", nl=False)
    click.echo("ensemble add -- echo hello\n          ensemble launch --nodes 2")


@click.command(epilog=examples("ensemble status"))
@as_json
@click.pass_obj
def status(session: Session, as_json: bool) -> None:
    """Show tasks, workflows, launchers and database on one screen."""
    site = session.site()
    found = session.run(_look)
    database = session.run_alone(describe_database(site))
    from ensemble.render import document, site as screen

    if as_json:
        document.write(document.status(site.path, database, found))
        return
    screen.status(site.path, _in_words(database), found, now())
    if warning := absence(site, found):
        click.echo(f"warning: {warning}", err=True)


async def _look(client: Client) -> SiteView:
    from ensemble.render.view import SiteView

    return SiteView(
        counts=await client.counts(),
        workflows=await client.workflows(),
        launchers=await client.launchers(),
        batch_jobs=await client.batch.active(),
        service=await client.batch.service(),
    )


def absence(site: Site, found: SiteView) -> str | None:
    """Tell that work waits for a service that is not there; None when it does not."""
    from ensemble.core.states import RUNNABLE
    from ensemble.render.queue import in_words

    waiting = sum(found.counts.by_state.get(state, 0) for state in RUNNABLE)
    wants_service = any(policy.enabled for policy in site.settings.queue.values())
    if not waiting or not wants_service or found.service.is_running or found.launchers:
        return None
    return f"{waiting:,} runnable tasks wait, and the service {in_words(found.service)}"


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
