"""`ensemble app …`: commands registered under a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ensemble.cli.options import OUTPUT, as_json, examples, read_pairs
from ensemble.cli.session import Session

if TYPE_CHECKING:
    from ensemble.api import OutputName


@click.group()
def app() -> None:
    """Register, list and remove apps: commands with a name."""


@app.command(
    epilog=examples("ensemble app add dock --command 'vina --config {conf} --seed {seed}'")
)
@click.argument("name")
@click.option(
    "--command",
    required=True,
    metavar="'CMD {x}'",
    help="The command line. It is split into words once, with shell quoting; {x} in a word is "
    "filled with the task's parameter x and never split again; {{ and }} are plain braces.",
)
@click.option("--description", default="", metavar="TEXT", help="What it does, for `app ls`.")
@click.option(
    "--env",
    "environ",
    metavar="NAME=VALUE",
    multiple=True,
    callback=read_pairs,
    help="A variable of its tasks' environment; may be repeated.",
)
@click.option(
    "--env-script",
    metavar="FILE",
    help="A bash script, sourced once per node, that leaves the tasks' environment (modules, …).",
)
@click.option(
    "--output",
    type=OUTPUT,
    default="file",
    show_default=True,
    help="What becomes of its tasks' output: NAME.out in the work directory, the last 16 kB in the "
    "database and no file, or nothing.",
)
@click.option("--preprocess", metavar="FILE", help="Not in this release.")
@click.option("--postprocess", metavar="FILE", help="Not in this release.")
@click.option(
    "--replace", is_flag=True, help="Change an app of that name; tasks that were added stay as is."
)
@click.pass_obj
def add(
    session: Session,
    name: str,
    command: str,
    description: str,
    environ: dict[str, str],
    env_script: str | None,
    output: OutputName,
    preprocess: str | None,
    postprocess: str | None,
    replace: bool,
) -> None:
    """Register how to run something."""
    made = session.run(
        lambda client: client.apps.add(
            name,
            command,
            description=description,
            environ=environ,
            env_script=env_script,
            output=output,
            preprocess=preprocess,
            postprocess=postprocess,
            replace=replace,
        )
    )
    from ensemble.render.text import clean

    click.echo(clean(f"app {made.name} (ensemble add --app {made.name} …)"))


@app.command("ls", epilog=examples("ensemble app ls"))
@as_json
@click.pass_obj
def list_apps(session: Session, as_json: bool) -> None:
    """List the apps."""
    from ensemble.render import document, tables

    found = session.run(lambda client: client.apps.find())
    if as_json:
        document.write(found)
    elif found:
        tables.apps(found)
    else:
        click.echo("no apps yet (ensemble app add --help)", err=True)


@app.command("rm", epilog=examples("ensemble app rm dock"))
@click.argument("name")
@click.pass_obj
def remove(session: Session, name: str) -> None:
    """Forget an app whose tasks have all ended; its tasks keep their command and history."""
    session.run(lambda client: client.apps.remove(name))
    click.echo(f"app {name} removed")
