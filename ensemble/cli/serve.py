"""`ensemble serve`: the daemon that keeps the batch queue filled."""

from __future__ import annotations

import click

from ensemble.cli.options import examples
from ensemble.cli.session import Session
from ensemble.errors import UsageError


@click.command(
    epilog=examples(
        "ensemble serve",
        "ensemble serve --daemon",
        "ensemble serve --stop",
        "ensemble serve --dry-run",
    )
)
@click.option(
    "--dry-run", is_flag=True, help="Say what would be submitted now, and why; do nothing."
)
@click.option("--once", is_flag=True, help="Look, decide and act once, then leave.")
@click.option(
    "--daemon", is_flag=True, help="Run in the background; logs JSON lines to log/serve.log."
)
@click.option("--stop", is_flag=True, help="Stop the service that runs, on the host where it runs.")
@click.option(
    "--log-file", hidden=True, type=click.Path(), help="For --daemon: JSON lines go here."
)
@click.option("--debug", is_flag=True, help="Log more.")
@click.pass_obj
def serve(
    session: Session,
    dry_run: bool,
    once: bool,
    daemon: bool,
    stop: bool,
    log_file: str | None,
    debug: bool,
) -> None:
    """Keep the batch queue filled, up to the limits in ensemble.toml, for as long as there is work.

    What may be submitted where is said by [queue.NAME] in ensemble.toml. One service per site; TERM or Ctrl-C
    stops it. Batch jobs and launchers go on without it.
    """
    if sum((dry_run, once, daemon, stop)) > 1:
        raise UsageError("--dry-run, --once, --daemon and --stop exclude each other")
    session.is_debug = session.is_debug or debug
    site = session.site()
    if dry_run:
        _show_plan(session)
        return
    if stop:
        click.echo(_stop(session))
        return
    if daemon:
        from ensemble.render.text import clean

        click.echo(clean(_start(session)))
        return
    from pathlib import Path

    from ensemble.service import serve as service

    options = service.ServeOptions(
        is_once=once,
        debug=session.is_debug,
        log_file=None if log_file is None else Path(log_file),
    )
    click.get_current_context().exit(service.main(site, options))


def _show_plan(session: Session) -> None:
    from ensemble.render.queue import next_step
    from ensemble.render.text import clean
    from ensemble.service import serve as service

    site = session.site()
    picture = session.run_alone(service.preview(site))
    if not site.settings.queue:
        click.echo("no queue policies: add [queue.NAME] to ensemble.toml (docs/submitting-jobs.md)")
    for name in site.settings.queue:
        click.echo(f"{name}: {clean(next_step(picture.decisions, name))}")


def _start(session: Session) -> str:
    """Start the service in the background, and wait until it says that it serves."""
    from ensemble.service import background

    return session.run_alone(background.start(session.site(), is_debug=session.is_debug))


def _stop(session: Session) -> str:
    from ensemble.service import background

    return session.run_alone(background.stop(session.site()))
