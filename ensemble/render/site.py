"""A site on the screen: where it is, its database, what goes on in it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from ensemble.render import tables
from ensemble.render.queue import batch_jobs, in_words
from ensemble.render.text import plural
from ensemble.render.view import SiteView

_WORKFLOWS_SHOWN = 20


def status(site: Path, database: str, found: SiteView, now: datetime) -> None:
    """Print the whole site on one screen."""
    tables.fields([("site", site), ("database", database), ("service", in_words(found.service))])
    if not found.counts.total:
        click.echo("\nno tasks yet (ensemble add --help)")
    else:
        click.echo(f"\n{plural(found.counts.total, 'task')}")
        tables.states(found.counts)
        click.echo()
        shown = dict(list(found.workflows.items())[:_WORKFLOWS_SHOWN])
        tables.workflows(shown)
        if len(found.workflows) > len(shown):
            click.echo(f"{len(found.workflows) - len(shown)} more (ensemble ls workflows)")
    if found.launchers:
        click.echo(f"\n{plural(len(found.launchers), 'live launcher')}")
        tables.launchers(found.launchers, now)
    else:
        click.echo("\nno launcher runs (ensemble launch)")
    if found.batch_jobs:
        click.echo(f"\n{plural(len(found.batch_jobs), 'batch job')} queued or running")
        batch_jobs(found.batch_jobs, now)
