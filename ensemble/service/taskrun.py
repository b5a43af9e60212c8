"""Runs one task from its launch to the moment when nothing of it is left."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, assert_never

from ensemble.core.events import CouldNotStart, Ended, Skipped, Started
from ensemble.core.model import Claim, Output, Placement
from ensemble.drivers import mpi, mpiline, output as outputs, process, spawn, taskenv
from ensemble.drivers.output import Tail
from ensemble.errors import LaunchError
from ensemble.service.runtime import utc_now

T = TypeVar("T")
Post = Callable[[Started | CouldNotStart | Skipped | Ended], None]


@dataclass(slots=True)
class Handle:
    """What can be done to a task while it is launched and runs."""

    process: process.Process | None = None
    #: The waits before its process is made: cut short when it is to be ended.
    preparation: asyncio.Timeout | None = None
    #: It is to be ended; before its process is made this means that none is.
    is_doomed: bool = False
    #: We signalled it while it ran, so its exit status 0 proves nothing.
    was_signalled: bool = False
    #: Its end is not to wait for the grace.
    is_forced: bool = False

    def is_ending(self) -> bool:
        """Tell whether somebody asked for its end; may change during any await."""
        return self.is_doomed


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What all tasks of a launcher run on."""

    site: Path
    #: What begins the markers of this launcher's tasks.
    marker_prefix: str
    #: The launcher's own environment, without what an outer MPI launch put there.
    environ: Mapping[str, str]
    mpi: mpi.MpiLauncher | None
    #: Why there is no MPI launcher.
    mpi_error: str
    is_single_rank_wrapped: bool
    executor: Executor
    #: For reading outputs: starts that hang on a file system must not hold ends up.
    readers: Executor
    grace_s: float
    error_tail_lines: int
    scheduler_job_id: str | None
    #: Waits for a place among the launches under way.
    admit: Callable[[], Awaitable[None]]


async def run_task(
    claim: Claim, placement: Placement, handle: Handle, ground: Ground, post: Post
) -> None:
    """Launch a task, wait for it, sweep what it left, and post what happened."""
    loop = asyncio.get_running_loop()
    output: Path | Tail | None = None
    try:
        env = await _prepare(claim, placement, handle, ground)
        if env is None or handle.is_ending():
            post(Skipped(id=claim.id, attempt=claim.attempt, at=utc_now()))
            return
        argv = command_line(claim, placement, ground, env)
        output = _destination(claim, ground)
        start = partial(spawn.start, argv, env=env, cwd=ground.site / claim.workdir, output=output)
        handle.process = await loop.run_in_executor(ground.executor, start)
    except LaunchError as error:
        _close(output)
        post(CouldNotStart(id=claim.id, attempt=claim.attempt, at=utc_now(), reason=str(error)))
        return
    post(Started(id=claim.id, attempt=claim.attempt, at=utc_now()))
    if handle.is_ending():  # asked for while the process was being made
        await terminate(claim, handle, ground, is_forced=False)
    result = await handle.process.wait()
    at, was_signalled = utc_now(), handle.was_signalled
    # What is being killed has its grace from `terminate`, also after its root has gone.
    await process.sweep(handle.process, grace_s=0 if handle.is_forced else ground.grace_s)
    # A status that somebody else reaped is unknown: a failure, as it cannot be called a success.
    status = 255 if result.status is None else result.status
    kept = _close(output)
    error_text = start_error = None
    if status != 0:
        error_text = await _last_lines(output, kept, ground)
        start_error = _start_error(claim, argv, ground, status, error_text or "")
    post(
        Ended(
            id=claim.id,
            attempt=claim.attempt,
            at=at,
            status=status,
            was_signalled=was_signalled,
            start_error=start_error,
            error=error_text,
            output=kept,
        )
    )


async def _prepare(
    claim: Claim, placement: Placement, handle: Handle, ground: Ground
) -> dict[str, str] | None:
    """Wait for the task's turn and return its environment; None when it is to be ended meanwhile."""

    async def prepare() -> dict[str, str]:
        await ground.admit()
        return await task_environ(claim, placement, ground)

    return await unless_ending(handle, prepare)


async def unless_ending(handle: Handle, prepare: Callable[[], Awaitable[T]]) -> T | None:
    """Return what comes of a wait before the process is made; None when the task is to be ended."""
    if handle.is_ending():
        return None
    try:
        async with asyncio.timeout(None) as handle.preparation:
            return await prepare()
    except TimeoutError:
        return None
    finally:
        handle.preparation = None


async def terminate(claim: Claim, handle: Handle, ground: Ground, *, is_forced: bool) -> None:
    """End a task's whole tree; its `run_task` posts the end."""
    handle.is_doomed = True
    handle.is_forced = handle.is_forced or is_forced
    if handle.preparation is not None and not handle.preparation.expired():
        handle.preparation.reschedule(asyncio.get_running_loop().time())
    running = handle.process
    if running is None:
        return  # run_task sees the doom, or `terminate` is called again when it has started
    handle.was_signalled = handle.was_signalled or running.exit is None
    grace_s = 0.0 if handle.is_forced else ground.grace_s
    if grace_s and ground.mpi is not None and ground.mpi.end_plan.term == "step":
        await _signal_step(claim, ground)
    await process.end_tree(running, grace_s=grace_s)


async def _signal_step(claim: Claim, ground: Ground) -> None:
    """Send TERM to the ranks through the scheduler, as TERM to srun would kill them at once.

    Runs on real Slurm only; where it fails, ending the tree follows all the same.
    """
    job_id = ground.scheduler_job_id
    if job_id is None:
        return
    try:
        found = await process.run(mpi.step_lookup_argv(job_id), timeout_s=10)
        step = mpi.parse_step(found.stdout, mpiline.step_name(claim.id))
        if step is not None:
            await process.run(mpi.scancel_argv(job_id, step), timeout_s=10)
            await asyncio.sleep(ground.grace_s)
    except LaunchError:
        return


# ---------------------------------------------------------------------------- its output


def _destination(claim: Claim, ground: Ground) -> Path | Tail | None:
    """Return where a task's output goes; called on the event loop."""
    match claim.output:
        case Output.FILE:
            return output_path(claim, ground)
        case Output.TAIL:
            try:
                return Tail()
            except OSError as error:
                raise LaunchError(f"cannot run {claim.argv[0]}: {error.strerror}") from error
        case Output.NONE:
            return None
        case _:
            assert_never(claim.output)


def _close(output: Path | Tail | None) -> str | None:
    """Return the end of an output that goes to no file, and forget about it."""
    return output.close() if isinstance(output, Tail) else None


async def _last_lines(output: Path | Tail | None, kept: str | None, ground: Ground) -> str | None:
    """Return the last lines of what a failed task wrote; None when nothing of it is kept."""
    lines = ground.error_tail_lines
    if kept is not None:
        return outputs.last_lines(kept, lines)
    if not isinstance(output, Path):
        return None
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(ground.readers, outputs.tail, output, lines)


# ---------------------------------------------------------------------------- what is run


def output_path(claim: Claim, ground: Ground) -> Path:
    """Return the file that takes a task's output, in its work directory."""
    return ground.site / claim.workdir / f"{claim.name}.out"


def is_wrapped(claim: Claim, placement: Placement, ground: Ground) -> bool:
    """Tell whether a task needs an MPI launcher: several ranks, or another node than this one."""
    is_single = claim.num_nodes * claim.ranks_per_node == 1
    return not is_single or ground.is_single_rank_wrapped or not placement.nodes[0].is_virtual


def command_line(
    claim: Claim, placement: Placement, ground: Ground, env: Mapping[str, str]
) -> list[str]:
    """Return the argv that runs a task.

    Raises:
        LaunchError: It needs an MPI launcher and there is none.
    """
    if not is_wrapped(claim, placement, ground):
        return list(claim.argv)
    if ground.mpi is None:
        raise LaunchError(ground.mpi_error)
    return ground.mpi.argv(claim, placement, _exported(claim, env))


async def task_environ(claim: Claim, placement: Placement, ground: Ground) -> dict[str, str]:
    """Return a task's whole environment: the launcher's, its app's, its own, and who it is."""
    env = dict(ground.environ)
    if claim.env_script is not None:
        env = await taskenv.source(claim.env_script, env)
    env |= claim.environ
    if claim.threads_per_rank is not None and "OMP_NUM_THREADS" not in claim.environ:
        env["OMP_NUM_THREADS"] = str(claim.threads_per_rank)
    if ground.mpi is not None and is_wrapped(claim, placement, ground):
        env |= mpi.environ_for(ground.mpi.flavor, is_root=os.geteuid() == 0)
    return env | taskenv.identity(
        claim, site=str(ground.site), nodes=placement.names, marker_prefix=ground.marker_prefix
    )


def _exported(claim: Claim, env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that ranks on other nodes must get, too: the task's own, and who it is."""
    return {
        name: value
        for name, value in env.items()
        if name in claim.environ or name == "OMP_NUM_THREADS" or name.startswith("ENSEMBLE_")
    }


def _start_error(
    claim: Claim, argv: list[str], ground: Ground, status: int, text: str
) -> str | None:
    """Tell whether it was the MPI launcher that could not start the program."""
    if ground.mpi is None or argv == list(claim.argv):
        return None
    if mpi.failed_to_start(ground.mpi.flavor, status, text):
        return f"{ground.mpi.command[0]} could not start {claim.argv[0]}"
    return None
