"""The command line. A command's module is imported when that command runs, and not before."""

from __future__ import annotations

import difflib
import os
from importlib import import_module

import click

import ensemble
from ensemble.cli.options import examples
from ensemble.cli.session import Session

#: Section -> command -> (where it is, its summary). Summaries are here so that `ensemble --help`
#: imports nothing; a test compares them with the commands' own.
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Site": {
        "init": ("site:init", "Make a site: a directory for your work, with a database."),
        "status": ("site:status", "Show tasks, workflows, launchers and database on one screen."),
        "db": ("db:db", "Start, stop and look into the site's database."),
    },
    "Tasks": {
        "app": ("app:app", "Register, list and remove apps: commands with a name."),
        "add": ("add:add", "Add one task, or many from a file."),
        "ls": ("tasks:ls", "List tasks, apps, workflows, launchers or batch jobs."),
        "show": ("tasks:show", "Show everything about a task, with its history."),
        "log": ("output:log", "Print a task's output."),
        "dir": ("output:directory", "Print a task's work directory."),
        "wait": ("tasks:wait", "Wait until tasks have ended; exit 1 when one failed."),
        "kill": ("changes:kill", "Kill tasks, running or not."),
        "retry": ("changes:retry", "Let failed and killed tasks run again."),
        "modify": ("changes:modify", "Change what tasks need."),
        "rm": ("changes:remove", "Remove tasks and their history from the database."),
    },
    "Running": {
        "launch": ("launch:launch", "Run tasks on the nodes of this allocation or machine."),
        "submit-launch": (
            "submit:submit_launch",
            "Submit one batch job whose script runs a launcher; every other option goes to the scheduler.",
        ),
        "serve": (
            "serve:serve",
            "Keep the batch queue filled, up to the limits in ensemble.toml, for as long as there is work.",
        ),
        "queue": (
            "queue:queue",
            "Show queues, batch jobs and what the service does next; pause, cancel.",
        ),
    },
}
#: For programs, not for people.
HIDDEN = {"release-lease": "launch:release_lease"}


class LazyGroup(click.Group):
    """The commands by section, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names to show, in the order of the sections."""
        return [name for commands in SECTIONS.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None when there is none of that name."""
        places = {name: place for part in SECTIONS.values() for name, (place, _) in part.items()}
        place = places.get(cmd_name) or HIDDEN.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        command: click.Command = getattr(import_module(f"ensemble.cli.{module}"), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; for a typo say which one was probably meant."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise click.UsageError(f"there is no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the summaries, section by section, without importing a command."""
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name, summary) for name, (_, summary) in commands.items()])


@click.command(
    cls=LazyGroup,
    epilog=examples(
        "ensemble init sweep && cd sweep",
        "ensemble app add hello --command 'echo hello {who}'",
        "ensemble add --app hello --param who=world",
        "ensemble launch --nodes 2",
        "ensemble ls",
    ),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--site",
    metavar="DIR",
    help="The site; else $ENSEMBLE_SITE, else the nearest directory above with an ensemble.toml.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs.")
@click.version_option(ensemble.__version__, message="ensemble %(version)s")
@click.pass_obj
def group(session: Session, /, site: str | None, debug: bool) -> None:
    """Run ensembles: thousands to millions of program runs from one durable queue.

    Exit status: 0 done, 1 failed, 2 usage, 3 not found, 4 database unreachable.
    """
    # Under 0, anybody could change what a launcher will run; under 0777, not even we could use what we make.
    os.umask(os.umask(0o077) & 0o077 | 0o002)
    if site == "":
        raise click.BadParameter("it is empty: name a directory", param_hint="'--site'")
    session.named = site
    session.is_debug = debug
