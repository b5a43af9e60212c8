"""`ensemble submit-launch`: submit one batch job that runs a launcher."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import click

from ensemble.cli.options import as_json, examples
from ensemble.cli.session import Session
from ensemble.core.submission import LARGEST_MACHINE, LARGEST_PACKING
from ensemble.errors import UsageError

if TYPE_CHECKING:
    from ensemble.api import Client
    from ensemble.core.batchjob import BatchJob

#: Our options that take a value, in all the spellings of users' schedulers; and those that take none.
_VALUED = frozenset(
    {
        "-n", "--nodes", "-t", "--time", "--time-minutes", "-q", "--queue", "-p", "--partition", "-A",
        "--account", "--project", "--job-mode", "--wf-filter", "--slots-per-node", "--template",
    }
)  # fmt: skip
_FLAGS = frozenset({"--dry-run", "--json", "-h", "--help"})
#: Options of schedulers that look like ours: Grid Engine's parallel environment, LSF's pack, Slurm's requeue.
_THEIRS = frozenset({"-pe", "-pack", "--requeue"})


class PassingCommand(click.Command):
    """A command that hands on whatever it does not know, in the order in which it came.

    Not click's `ignore_unknown_options`: that takes `-lselect=2` apart and finds a `-t` in it.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse our own options; keep the rest for the scheduler."""
        own, others = split(args)
        _check_flags(split(list(takewhile(lambda word: word != "--", args)))[1])
        ctx.meta[_OTHERS] = others
        return super().parse_args(ctx, own)


_OTHERS = "ensemble.cli.submit.others"


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell our own options from those of the scheduler's submit command; all after `--` is the latter's."""
    own: list[str] = []
    others: list[str] = []
    words = iter(args)
    for word in words:
        if word == "--":
            others.extend(words)
        elif word in _THEIRS:
            others.append(word)
        elif word in _FLAGS:
            own.append(word)
        elif word in _VALUED:
            own += [word, *([value] if (value := next(words, None)) is not None else [])]
        elif match := re.fullmatch(r"(-[ntqpA])=(.+)", word, re.DOTALL):
            own += [match[1], match[2]]  # click would keep the sign
        elif (
            (word.partition("=")[0] in _VALUED and word.startswith("--"))
            or re.match(r"-[nt]\d", word)
            or (word[:2] in ("-q", "-p", "-A") and len(word) > 2)
        ):
            own.append(word)
        else:
            others.append(word)
    return own, others


def read_minutes(_ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read a walltime: minutes, or hours as `1:30:00`; rounded up to a minute."""
    if value is None:
        return None
    match = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,5}):([0-5]?\d):([0-5]?\d)", value, re.ASCII)
    if match:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        total = (days * 24 + hours) * 60 + minutes + (seconds > 0)
    elif re.fullmatch(r"\d{1,7}", value, re.ASCII):
        total = int(value)
    else:
        raise click.BadParameter(f"{value!r}: expected minutes like 90, or 1:30:00", param=param)
    if not 1 <= total <= 1_000_000:
        raise click.BadParameter(f"{value!r}: expected a minute or more", param=param)
    return total


@click.command(
    "submit-launch",
    cls=PassingCommand,
    epilog=examples(
        "ensemble submit-launch -n 5 -t 15 -q debug -A MyProject --job-mode=mpi",
        "ensemble submit-launch -n 1 -t 1:30:00 --job-mode=serial --wf-filter=Experiment3",
        "ensemble submit-launch -n 8 -t 60 -A m1234 -C gpu --reservation=tests",
        "ensemble submit-launch -n 2 -t 30 --dry-run",
    ),
)
@click.option(
    "-n", "--nodes", type=click.IntRange(1, LARGEST_MACHINE), required=True, metavar="N",
    help="Nodes to ask for.",
)  # fmt: skip
@click.option(
    "-t", "--time", "--time-minutes", "minutes", required=True, callback=read_minutes,
    metavar="TIME", help="Walltime: minutes, or H:MM:SS.",
)  # fmt: skip
@click.option(
    "-q", "--queue", "-p", "--partition", "queue", metavar="NAME", help="Queue or partition."
)
@click.option(
    "-A", "--account", "--project", "project", metavar="NAME", help="Project or account to charge."
)
@click.option(
    "--job-mode", type=click.Choice(["mpi", "serial"]), default="mpi", show_default=True,
    help="How the launcher runs tasks, see `ensemble launch --help`.",
)  # fmt: skip
@click.option(
    "--wf-filter", metavar="TEXT", help="Take only workflows whose name contains TEXT. [all]"
)
@click.option(
    "--slots-per-node", type=click.IntRange(1, LARGEST_PACKING), default=1, metavar="N",
    help="Let at least N tasks share a node (serial mode).",
)  # fmt: skip
@click.option(
    "--template",
    metavar="FILE",
    help="A file of the site's templates/. [default: the site's setting, job.sh]",
)
@click.option("--dry-run", is_flag=True, help="Print the script; submit nothing.")
@as_json
@click.pass_context
def submit_launch(context: click.Context, /, **chosen: Any) -> None:
    """Submit one batch job whose script runs a launcher; every other option goes to the scheduler.

    The script is rendered from templates/job.sh into qsubmit/qlaunchID.sh. What is not listed here is passed on
    to sbatch, qsub, ... as it stands; so is all that comes after `--`.
    """
    session: Session = context.obj
    flags = tuple(context.meta[_OTHERS])
    chosen["nodes"] = int(chosen["nodes"])
    if chosen["slots_per_node"] > 1 and chosen["job_mode"] != "serial":
        raise UsageError(
            "--slots-per-node: only tasks in serial mode share nodes (--job-mode serial)"
        )
    job, script, scheduler, warnings = session.run(lambda client: _submit(client, chosen, flags))
    from ensemble.render.text import clean

    for warning in warnings:
        click.echo(clean(f"warning: {warning}"), err=True)
    if chosen["as_json"]:
        from ensemble.render import document

        document.write({"script": script} if job is None else document.batch_job(job))
        return
    if job is None:
        # Tabs are left as they are; marks of direction could show another script than the one that would run.
        lines = script.split("\n")
        click.echo("\n".join("\t".join(map(clean, line.split("\t"))) for line in lines), nl=False)
        return
    output = clean(job.spec.get("output", ""))
    click.echo(clean(f"batch job {job.id}: {scheduler} job {job.scheduler_id}"))
    click.echo(f"script  {output.removesuffix('.out')}.sh")
    click.echo(f"output  {output}")
    click.echo("next    ensemble queue")


def _check_flags(flags: Sequence[str]) -> None:
    """Refuse a typo of our own options: handed on, the scheduler would complain about something else."""
    import difflib

    for flag in flags:
        name = flag.partition("=")[0]
        ours = [known for known in (*_VALUED, *_FLAGS) if known.startswith("--")]
        if name in _THEIRS or not name.startswith("--"):
            continue
        if close := difflib.get_close_matches(name, ours, n=1, cutoff=0.87):
            raise UsageError(
                f"{name}: did you mean {close[0]}? (what is really meant for the scheduler goes after --)"
            )


async def _submit(
    client: Client, chosen: dict[str, Any], flags: tuple[str, ...]
) -> tuple[BatchJob | None, str, str, list[str]]:
    import asyncio

    from ensemble.core.model import JobMode

    batch = client.batch
    new = batch.new(
        nodes=chosen["nodes"],
        minutes=chosen["minutes"],
        job_mode=JobMode(chosen["job_mode"]),
        wf_filter=chosen["wf_filter"],
        project=chosen["project"],
        queue=chosen["queue"],
        flags=flags,
        slots_per_node=chosen["slots_per_node"],
    )
    warnings = await batch.doubts(new)
    if chosen["dry_run"]:
        return None, batch.render(new, template=chosen["template"]), new.scheduler, warnings
    try:
        job = await batch.submit(new, template=chosen["template"])
    except asyncio.CancelledError as cancelled:
        for doubt in cancelled.args:
            click.echo(f"warning: {doubt}", err=True)
        raise
    return job, "", new.scheduler, warnings
