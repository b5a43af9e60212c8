"""A site on the screen: where it is, its database, what goes on in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import click

from ensemble.core.model import Counts, Launcher
from ensemble.core.states import State
from ensemble.render import tables
from ensemble.render.text import plural

_WORKFLOWS_SHOWN = 20


def status(
    site: Path,
    database: str,
    counts: Counts,
    workflows: Mapping[str, Mapping[State, int]],
    launchers: Sequence[Launcher],
    now: datetime,
) -> None:
    """Print the whole site on one screen."""
    tables.fields([("site", site), ("database", database)])
    if not counts.total:
        click.echo("\nno tasks yet (ensemble add --help)")
    else:
        click.echo(f"\n{plural(counts.total, 'task')}")
        tables.states(counts)
        click.echo()
        shown = dict(list(workflows.items())[:_WORKFLOWS_SHOWN])
        tables.workflows(shown)
        if len(workflows) > len(shown):
            click.echo(f"{len(workflows) - len(shown)} more (ensemble ls workflows)")
    if launchers:
        click.echo(f"\n{plural(len(launchers), 'live launcher')}")
        tables.launchers(launchers, now)
    else:
        click.echo("\nno launcher runs (ensemble launch)")
