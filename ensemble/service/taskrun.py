"""Runs one task from its launch to the moment when nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, assert_never

from msgspec.structs import replace

from ensemble.core.events import CouldNotStart, Ended, NodesGone, Skipped, Started
from ensemble.core.model import Claim, Output, Placement
from ensemble.drivers import (
    hostlist,
    mpi,
    mpienv,
    mpiline,
    mpiwords,
    output as outputs,
    process,
    proctree,
    spawn,
    taskenv,
)
from ensemble.drivers.output import Tail
from ensemble.errors import AllocationError, LaunchError
from ensemble.service.runtime import utc_now

#: How long to wait, each time, before a task is launched again whose step Slurm would not make.
_AGAIN_S = (2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0, 30.0, 30.0, 30.0)
#: How often to look whether an MPI launcher waits for nothing.
_LOOK_S = 5.0
#: How long a node may take to run something, when it is in doubt whether it is there.
_PROBE_S = 30.0

T = TypeVar("T")
Post = Callable[[Started | CouldNotStart | Skipped | Ended | NodesGone], None]


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
    scheduler: str
    scheduler_job_id: str | None
    #: Waits for a place among the launches under way.
    admit: Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """A task's attempt, once it is known how its program is started."""

    claim: Claim
    placement: Placement
    handle: Handle
    ground: Ground
    argv: list[str]
    env: Mapping[str, str]

    @property
    def launcher(self) -> mpi.MpiLauncher | None:
        """The MPI launcher that it goes through; None when the program is started by itself."""
        return None if self.argv == list(self.claim.argv) else self.ground.mpi

    @property
    def is_in_slurm(self) -> bool:
        """Whether an MPI launcher makes a Slurm step of it."""
        return self.launcher is not None and self.ground.scheduler == "slurm"


@dataclass(frozen=True, slots=True)
class _End:
    """How one launch of a task ended."""

    event: Ended
    #: Why Slurm would not make its step, so that nothing of it ran.
    refusal: str | None = None


async def run_task(
    claim: Claim, placement: Placement, handle: Handle, ground: Ground, post: Post
) -> None:
    """Launch a task, wait for it, sweep what it left, and post what happened.

    When Slurm cannot make its step for now, it is launched again, later each time.
    """
    who = {"id": claim.id, "attempt": claim.attempt}
    try:
        env = await _prepare(claim, placement, handle, ground)
        if env is None or handle.is_ending():
            post(Skipped(**who, at=utc_now()))
            return
        argv = command_line(claim, placement, ground, env)
        attempt = _Attempt(
            claim=claim, placement=placement, handle=handle, ground=ground, argv=argv, env=env
        )
        output = await _start(attempt)
    except LaunchError as error:
        post(CouldNotStart(**who, at=utc_now(), reason=str(error)))
        return
    post(Started(**who, at=utc_now(), is_certain=attempt.launcher is None))
    end = await _outlast(attempt, output)
    gone = await _find_gone(attempt, end)
    for delay_s in _AGAIN_S:
        if gone or end.refusal is None or not mpiwords.may_pass(end.refusal):
            break
        await unless_ending(handle, partial(asyncio.sleep, delay_s))
        if handle.is_ending():
            break
        try:
            await _forget(output, ground)
            output = await _start(attempt)
        except LaunchError:
            break  # what there is to tell, is told by the launch before
        end = await _outlast(attempt, output)
        gone = await _find_gone(attempt, end)
    if gone:  # first: what failed there was lost with them
        post(NodesGone(names=gone, reason="Slurm took it out of the job"))
    post(end.event)


async def _start(attempt: _Attempt) -> Path | Tail | None:
    """Make a task's process; return where its output goes.

    Raises:
        LaunchError: It could not be made.
    """
    claim, ground = attempt.claim, attempt.ground
    output = _destination(claim, ground)
    cwd = ground.site / claim.workdir
    start = partial(spawn.start, attempt.argv, env=attempt.env, cwd=cwd, output=output)
    try:
        loop = asyncio.get_running_loop()
        attempt.handle.process = await loop.run_in_executor(ground.executor, start)
    except LaunchError:
        _close(output)
        raise
    return output


async def _outlast(attempt: _Attempt, output: Path | Tail | None) -> _End:
    """Wait until nothing of a task's process is left; return how it ended."""
    claim, handle, ground = attempt.claim, attempt.handle, attempt.ground
    running = handle.process
    assert running is not None
    if handle.is_ending():  # asked for while the process was being made
        await terminate(claim, handle, ground, is_forced=False)
    result = await _wait(attempt, running)
    at, was_signalled = utc_now(), handle.was_signalled
    # What is being killed has its grace from `terminate`, also after its root has gone.
    await process.sweep(running, grace_s=0 if handle.is_forced else ground.grace_s)
    # A status that somebody else reaped is unknown: a failure, as it cannot be called a success.
    status = 255 if result.status is None else result.status
    kept = _close(output)
    ended = Ended(
        id=claim.id,
        attempt=claim.attempt,
        at=at,
        status=status,
        was_signalled=was_signalled,
        output=kept,
    )
    text, is_whole = (None, False) if status == 0 else await _read_end(output, kept, ground)
    if text is not None:
        ended = replace(ended, error=outputs.last_lines(text, ground.error_tail_lines))
    launcher = attempt.launcher
    if launcher is None or status == 0:
        return _End(ended)
    refusal = mpiwords.refusal(launcher.flavor, status, text) if text and is_whole else None
    return _End(await _explain(attempt, launcher, ended, refusal), refusal)


async def _wait(attempt: _Attempt, running: process.Process) -> process.Exit:
    """Wait for a process's end; end an MPI launcher that waits for nothing any more."""
    launcher = attempt.launcher
    may_hang = attempt.is_in_slurm and launcher is not None and mpiwords.may_hang(launcher.flavor)
    is_childless = False
    while may_hang:
        try:
            async with asyncio.timeout(_LOOK_S):
                return await running.wait()
        except TimeoutError:
            was_childless, is_childless = is_childless, not _may_have_child(running)
            if was_childless and is_childless:
                await process.end_tree(running, grace_s=0)
                break
    return await running.wait()


def _may_have_child(running: process.Process) -> bool:
    """Tell whether a process has children; True when one cannot look."""
    try:
        return bool(proctree.children_reader()(running.pid))
    except OSError:  # file descriptors ran out
        return True


async def _explain(
    attempt: _Attempt, launcher: mpi.MpiLauncher, ended: Ended, refusal: str | None
) -> Ended:
    """Return what the exit status and the last words of an MPI launcher mean."""
    flavor, status, text = launcher.flavor, ended.status, ended.error or ""
    command, program = launcher.command[0], attempt.claim.argv[0]
    start_error = lost = None
    if refusal is not None:
        start_error = f"Slurm would not start {program}: {refusal}"
    elif mpiwords.failed_to_start(flavor, status, text):
        start_error = f"{command} could not start {program}"
    elif mpiwords.lost_a_node(flavor, status, text) or (
        mpiwords.may_have_lost_a_node(flavor, status, text) and not await _do_nodes_answer(attempt)
    ):
        lost = f"{command} lost a node"
    return replace(
        ended,
        status=mpiwords.program_status(flavor, status, text),
        is_cut_off=mpiwords.may_be_cut_off(flavor, status, ended.error),
        start_error=start_error,
        lost=lost,
    )


async def _do_nodes_answer(attempt: _Attempt) -> bool:
    """Tell whether all of a task's nodes can run something; True as well when that does not matter any more."""
    launcher, claim = attempt.launcher, attempt.claim
    if launcher is None or attempt.placement.nodes[0].is_virtual:
        return True
    probe = replace(claim, argv=("true",), ranks_per_node=1, threads_per_rank=None, gpus_per_rank=0)
    own = mpienv.environ_for(launcher.flavor, is_root=os.geteuid() == 0)
    ask = partial(
        process.run,
        launcher.argv(probe, attempt.placement),
        env={**attempt.ground.environ, **own},
        timeout_s=_PROBE_S,
        own_session=True,
    )
    try:
        answer = await unless_ending(attempt.handle, ask)
    except LaunchError:
        return False
    return answer is None or answer.code == 0


async def _find_gone(attempt: _Attempt, end: _End) -> tuple[str, ...]:
    """Return those of a task's nodes that its Slurm job has not any more, when its launch failed as if so."""
    job_id = attempt.ground.scheduler_job_id
    may_be = end.event.lost is not None or end.refusal is not None
    if not (may_be and attempt.is_in_slurm) or job_id is None or attempt.handle.is_ending():
        return ()
    try:
        found = await process.run(mpi.nodes_argv(job_id), timeout_s=10)
        left = hostlist.expand(found.stdout.strip())
    except (LaunchError, AllocationError):
        return ()
    return tuple(name for name in attempt.placement.names if name not in left) if left else ()


async def _forget(output: Path | Tail | None, ground: Ground) -> None:
    """Remove the output of a launch that was refused: it was read whole, and no line of it is the task's."""
    if isinstance(output, Path):
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # the next launch moves it aside
            await loop.run_in_executor(ground.readers, output.unlink)


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
    grace_s = 0.0 if handle.is_forced else ground.grace_s
    if grace_s and ground.mpi is not None and ground.mpi.end_plan.term == "step":
        await _signal_step(claim, handle, running, ground)
    _note_signal(handle, running)
    await process.end_tree(running, grace_s=grace_s)


def _note_signal(handle: Handle, running: process.Process) -> None:
    """Note that a signal is about to be sent: how a task ended before that is its own doing."""
    running.collect()  # it may have ended just now
    handle.was_signalled = handle.was_signalled or running.exit is None


async def _signal_step(
    claim: Claim, handle: Handle, running: process.Process, ground: Ground
) -> None:
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
            _note_signal(handle, running)
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


async def _read_end(
    output: Path | Tail | None, kept: str | None, ground: Ground
) -> tuple[str | None, bool]:
    """Return the end of what a failed task wrote, None when nothing of it is kept, and whether that is all."""
    if isinstance(output, Tail):
        return kept, not output.has_more
    if output is None:
        return None, False
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(ground.readers, outputs.read_end, output)


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
        env |= mpienv.environ_for(ground.mpi.flavor, is_root=os.geteuid() == 0)
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
