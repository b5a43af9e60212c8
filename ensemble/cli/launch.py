"""`ensemble launch`, and what its guard calls when the launcher is lost."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import click

from ensemble.cli.options import Amount, examples
from ensemble.cli.session import Session
from ensemble.core.submission import LARGEST_MACHINE, LARGEST_PACKING
from ensemble.errors import LaunchError, StoreUnavailableError, UsageError
from ensemble.site import program

if TYPE_CHECKING:
    from ensemble.api import Client
    from ensemble.service.options import LaunchOptions

#: For so long the guard of a lost launcher tries to say so; it waits for that longer (drivers/guard.py).
_RELEASE_S = 15.0


@click.command(
    epilog=examples(
        "ensemble launch --nodes 2", "ensemble launch --wf-filter screen --time-limit-minutes 60"
    )
)
@click.option(
    "--job-mode",
    type=click.Choice(["mpi", "serial"]),
    default="mpi",
    show_default=True,
    help="mpi: one MPI launch per task, on whole nodes; any program, MPI or not. "
    "serial: one MPI launch of pilots, one per node; single-node tasks share nodes.",
)
@click.option(
    "--wf-filter", metavar="TEXT", help="Take only workflows whose name contains TEXT. [all]"
)
@click.option(
    "--time-limit-minutes",
    type=Amount(),
    metavar="MINUTES",
    help="Leave after so many minutes. [default: when the allocation ends]",
)
@click.option(
    "--nodes",
    type=click.IntRange(min=1, max=LARGEST_MACHINE),
    metavar="N",
    help="Use N nodes of the allocation, or make N virtual ones on this machine. [default: all]",
)
@click.option(
    "--slots-per-node",
    type=click.IntRange(min=1, max=LARGEST_PACKING),
    metavar="N",
    default=1,
    help="Let at least N tasks share a node, whatever their node_packing_count (serial mode).",
)
@click.option(
    "--idle-timeout",
    type=Amount(may_be_zero=True),
    metavar="SECONDS",
    help="Leave after so long with nothing to do. [default: the site's setting, 60]",
)
@click.option("--persistent", is_flag=True, help="Stay when there is nothing to do.")
@click.option(
    "--batch-job",
    type=click.IntRange(min=1, max=2**63 - 1),
    metavar="ID",
    help="The batch job that this is, in scripts that Ensemble writes.",
)
@click.option("--debug", is_flag=True, help="Log each event and effect.")
@click.pass_obj
def launch(
    session: Session,
    job_mode: str,
    wf_filter: str | None,
    time_limit_minutes: float | None,
    nodes: int | None,
    slots_per_node: int,
    idle_timeout: float | None,
    persistent: bool,
    batch_job: int | None,
    debug: bool,
) -> None:
    """Run tasks on the nodes of this allocation or machine.

    Takes tasks, largest first, until none is left that it could run or the time is over. TERM, INT,
    HUP, USR1 and USR2 end it in good order: what runs is stopped and may run again.
    """
    from ensemble.core.model import JobMode
    from ensemble.service.options import LaunchOptions

    if slots_per_node > 1 and job_mode != JobMode.SERIAL:
        raise UsageError(
            "--slots-per-node: only tasks in serial mode share nodes (--job-mode serial)"
        )

    # The guard starts this command again with its own --debug, not with the one of `ensemble`.
    session.is_debug = session.is_debug or debug
    options = LaunchOptions(
        job_mode=JobMode(job_mode),
        wf_filter=wf_filter,
        time_limit_minutes=time_limit_minutes,
        nodes=nodes,
        slots_per_node=slots_per_node,
        idle_timeout_s=idle_timeout,
        is_persistent=persistent,
        batch_job=batch_job,
        debug=session.is_debug,
    )
    site = session.site()
    _enter_guard(str(site.path), options)
    from ensemble.service import launch as service

    click.get_current_context().exit(service.main(site, options))


@click.command("release-lease", hidden=True)
@click.argument("lease_id", type=click.IntRange(min=0, max=2**63 - 1))
@click.pass_obj
def release_lease(session: Session, lease_id: int) -> None:
    """Close the lease of a launcher that is gone; called by its guard, which left nothing running."""

    async def release(client: Client) -> None:
        from ensemble.service import reaper, spool

        await reaper.release(client.store, spool.folder(session.site().path), lease_id)

    give_up = time.monotonic() + _RELEASE_S
    while True:
        try:
            session.run(release)
            return
        except StoreUnavailableError:
            if time.monotonic() > give_up:
                raise
        except OSError as error:
            if time.monotonic() > give_up:
                raise LaunchError(f"lease {lease_id} cannot be closed now: {error}") from error
        time.sleep(1)


def launch_argv(site: str, options: LaunchOptions) -> list[str]:
    """Return the command line that asks for the same launch again."""
    words = ["--job-mode", str(options.job_mode)]
    for flag, value in (
        ("--wf-filter", options.wf_filter),
        ("--time-limit-minutes", options.time_limit_minutes),
        ("--nodes", options.nodes),
        ("--slots-per-node", options.slots_per_node if options.slots_per_node > 1 else None),
        ("--idle-timeout", options.idle_timeout_s),
        ("--batch-job", options.batch_job),
    ):
        if value is not None:
            words.append(f"{flag}={value}")
    if options.is_persistent:
        words.append("--persistent")
    if options.debug:
        words.append("--debug")
    return program(site, "launch", *words)


def _enter_guard(site: str, options: LaunchOptions) -> None:
    """Become the guard, which starts this command again as its child; return in that child."""
    from ensemble.drivers.guardlink import GuardLink, guard_argv

    # Not the variable alone: a task that launches has inherited the one of its own launcher.
    if GuardLink.from_environ(os.environ) is not None:
        return
    argv = guard_argv(launch_argv(site, options), on_loss=program(site, "release-lease", "{lease}"))
    try:
        os.execv(argv[0], argv)  # noqa: S606 - no shell
    except OSError as error:
        raise LaunchError(f"cannot start the launcher's guard: {error.strerror}") from error
