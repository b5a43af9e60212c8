"""Starts a launcher: finds its allocation and MPI, registers it, and runs it to its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ensemble
from ensemble import log
from ensemble.config import LauncherSettings, Settings
from ensemble.core import leases
from ensemble.core.dispatch import Policy
from ensemble.core.jobs import Jobs
from ensemble.core.model import JobMode, NewLauncher
from ensemble.core.store import Store
from ensemble.drivers import mpi, mpienv, nodes, process, sweep
from ensemble.drivers.guardlink import GuardLink
from ensemble.drivers.nodes import Allocation
from ensemble.errors import EnsembleError, LaunchError, StoreUnavailableError
from ensemble.service import pilots, runtime, spool
from ensemble.service.launcher import Launcher
from ensemble.service.options import LaunchOptions
from ensemble.service.pilotbase import Base
from ensemble.service.pilots import Pilots
from ensemble.service.reaper import reap
from ensemble.service.runner import MpiRunner, Post, Runner, Spawn
from ensemble.service.taskrun import Ground
from ensemble.site import Site

#: Tasks inherit it, and some programs walk through all numbers up to it: no more than is useful.
_FILES = 65_536
#: Of a short allocation, margin_s and min_useful_s take no more than this part.
_SHORT = 0.1
#: How long the last word may take: the allocation may be ending.
_WORD_S = 5.0
_STARTERS = 16
_READERS = 2
#: For asyncio.to_thread().
_OTHERS = 6


def main(site: Site, options: LaunchOptions) -> int:
    """Run a launcher to its end; return its exit status: 0 unless it lost its lease."""
    log.configure(as_json=False, debug=options.debug)
    process.become_subreaper()
    _raise_file_limit()
    _collect_rarely()
    guard = GuardLink.from_environ(os.environ)
    if guard is None:
        # It was there a moment ago (cli/launch.py). Without one nobody would clean up after us.
        raise LaunchError("the launcher's guard was killed before the launcher had started")
    process.die_with_parent(runtime.DRAIN_SIGNALS[0], guard.guard_pid)
    return runtime.run(_launch(site, options, guard))


def _collect_rarely() -> None:
    """Look for garbage in cycles less often: there is little, and 64,000 running tasks are much to look through."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _raise_file_limit() -> None:
    """Allow as many open files as the system lets us: each running task takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _launch(site: Site, options: LaunchOptions, guard: GuardLink | None) -> int:
    settings = site.settings.launcher
    store = await Store.open(site.address(), name="ensemble launcher", max_size=5)
    try:
        allocation = await nodes.find_allocation(
            os.environ, virtual_nodes=options.nodes, now=runtime.epoch_s()
        )
        found, mpi_error = await _find_mpi(site.settings, allocation, options)
        if options.job_mode is JobMode.SERIAL and found is None:
            raise LaunchError(mpi_error)
        await _reap(store, site)
        jobs = Jobs(store.pool)
        if options.batch_job is not None and allocation.ends_at is None:
            allocation = replace(allocation, ends_at=await _end_on_record(jobs, options.batch_job))
        left_s = _time_left(options, allocation, settings)
        lease = await leases.register(
            store.pool,
            _introduce(options, allocation, guard, left_s, settings),
            ttl_s=settings.lease_ttl_s,
        )
        if guard is not None:
            guard.lease(lease.id)
        with contextlib.ExitStack() as threads:
            others = threads.enter_context(_threads("other", _OTHERS))
            asyncio.get_running_loop().set_default_executor(others)
            if found is not None and options.job_mode is JobMode.SERIAL:
                make_runner = _make_pilots(site, options, allocation, lease, found)
            else:
                make_runner = _make_mpi(site, allocation, lease, found or mpi_error, threads)
            launcher = Launcher(
                store=store,
                lease=lease,
                nodes=allocation.nodes,
                settings=settings,
                policy=_policy(options, allocation, settings, left_s),
                wf_filter=options.wf_filter,
                job_mode=options.job_mode,
                make_runner=make_runner,
                guard=guard,
                site=site.path,
            )
            return await _run(launcher, jobs, lease, options.batch_job)
    finally:
        await store.close()


async def _reap(store: Store, site: Site) -> None:
    """Reap before registering: a lost launcher of this very allocation may still hold its nodes."""
    try:
        await reap(store, spool.folder(site.path), is_patient=False)
    except OSError as error:  # the launcher tries again while it runs
        log.get_logger().warning("reap.failed", error=str(error))


async def _run(launcher: Launcher, jobs: Jobs, lease: leases.Lease, batch_job: int | None) -> int:
    """Run a launcher; in a batch job of ours, leave a last word about how it ended."""
    code, reason = 1, "it crashed"
    try:
        code = await launcher.run()
        reason = str(launcher.record.pop("reason", ""))
    except EnsembleError as error:
        code, reason = error.exit_code, str(error)
        raise
    finally:
        if batch_job is not None:
            await _leave_word(
                jobs, batch_job, lease, {"exit_code": code, "reason": reason, **launcher.record}
            )
    return code


async def _leave_word(
    jobs: Jobs, batch_job: int, lease: leases.Lease, record: dict[str, object]
) -> None:
    try:
        async with asyncio.timeout(_WORD_S):
            await runtime.detached(jobs.set_record(batch_job, lease.launcher_id, record))
    except (StoreUnavailableError, TimeoutError) as error:
        log.get_logger(launcher=lease.launcher_id).warning("record.not_written", error=str(error))


async def _end_on_record(jobs: Jobs, batch_job: int) -> float:
    """Return when a batch job ends whose scheduler cannot tell: as it was asked for, from now on."""
    return runtime.epoch_s() + 60.0 * (await jobs.get(batch_job)).wall_time_minutes


MakeRunner = Callable[[Post, Spawn], Runner]


def _make_mpi(
    site: Site,
    allocation: Allocation,
    lease: leases.Lease,
    found: mpi.MpiLauncher | str,
    threads: contextlib.ExitStack,
) -> MakeRunner:
    launcher, mpi_error = (None, found) if isinstance(found, str) else (found, "")
    executor = threads.enter_context(_threads("start", _STARTERS))
    readers = threads.enter_context(_threads("read", _READERS))
    settings = site.settings.launcher
    ground = Ground(
        site=site.path,
        marker_prefix=sweep.marker_prefix(lease.id, process.identity()),
        environ=_own_environ(launcher),
        mpi=launcher,
        mpi_error=mpi_error,
        is_single_rank_wrapped=site.settings.mpi.wrap_single_rank,
        executor=executor,
        readers=readers,
        grace_s=settings.grace_s,
        error_tail_lines=settings.error_tail_lines,
        scheduler=allocation.scheduler,
        scheduler_job_id=allocation.job_id,
        admit=_Turnstile(settings.launches_per_s).admit,
    )

    def make(post: Post, spawn: Spawn) -> Runner:
        return MpiRunner(
            allocation.nodes, ground, max_launches=settings.max_launches, post=post, spawn=spawn
        )

    return make


def _make_pilots(
    site: Site,
    options: LaunchOptions,
    allocation: Allocation,
    lease: leases.Lease,
    found: mpi.MpiLauncher,
) -> MakeRunner:
    settings = site.settings.launcher
    base = Base(
        site=site.path,
        run_directory=site.path / "log" / f"launcher-{lease.launcher_id}",
        marker_prefix=sweep.marker_prefix(lease.id, process.identity()),
        environ=_own_environ(found),
        mpi=found,
        launcher_id=lease.launcher_id,
        grace_s=settings.grace_s,
        error_tail_lines=settings.error_tail_lines,
        slots_per_node=options.slots_per_node,
        is_pinned=settings.pin_cpus,
        join_s=settings.pilot_join_s,
        patience_s=settings.pilot_patience_s,
    )

    def make(post: Post, spawn: Spawn) -> Runner:
        return Pilots(
            allocation.nodes,
            base,
            post=post,
            spawn=spawn,
            log=log.get_logger(launcher=lease.launcher_id),
        )

    return make


async def _find_mpi(
    settings: Settings, allocation: Allocation, options: LaunchOptions
) -> tuple[mpi.MpiLauncher | None, str]:
    """Return the MPI launcher, or why there is none: tasks of one rank can do without."""
    try:
        found = await mpi.detect(
            settings.mpi,
            scheduler=allocation.scheduler,
            environ=os.environ,
            is_for_pilots=options.job_mode is JobMode.SERIAL,
        )
        return found, ""
    except LaunchError as error:
        return None, str(error)


def _time_left(
    options: LaunchOptions, allocation: Allocation, settings: LauncherSettings
) -> float | None:
    """Return the seconds until everything must have been ended: the earlier of the two ends."""
    ends = []
    if options.time_limit_minutes is not None:
        ends.append(60 * options.time_limit_minutes)
    if allocation.ends_at is not None:
        left_s = allocation.ends_at - runtime.epoch_s()
        ends.append(left_s - min(settings.margin_s, max(left_s, 0.0) * _SHORT))
    return min(ends, default=None)


def _policy(
    options: LaunchOptions,
    allocation: Allocation,
    settings: LauncherSettings,
    left_s: float | None,
) -> Policy:
    return Policy(
        nodes=len(allocation.nodes),
        deadline=None if left_s is None else runtime.boottime_s() + left_s,
        min_useful_s=settings.min_useful_s
        if allocation.ends_at is None or left_s is None
        else min(settings.min_useful_s, max(left_s, 0.0) * _SHORT),
        idle_timeout_s=settings.idle_timeout_s
        if options.idle_timeout_s is None
        else options.idle_timeout_s,
        is_persistent=options.is_persistent,
        poll_s=settings.poll_s,
        # Outside a batch job nobody signals tasks behind our back.
        signal_hold_s=settings.signal_hold_s if allocation.job_id else 0.0,
    )


def _introduce(
    options: LaunchOptions,
    allocation: Allocation,
    guard: GuardLink | None,
    left_s: float | None,
    settings: LauncherSettings,
) -> NewLauncher:
    # Tasks of mpi mode end with their mpirun, which is on this host; pilots by their guards, elsewhere.
    has_pilots = options.job_mode is JobMode.SERIAL and allocation.scheduler != "local"
    linger_s = settings.pilot_patience_s + pilots.KILL_S if has_pilots else 0.0
    return NewLauncher(
        identity=process.identity(guard.guard_pid if guard else None),
        version=ensemble.__version__,
        job_mode=options.job_mode,
        wf_filter=options.wf_filter,
        nodes=tuple(node.name for node in allocation.nodes),
        scheduler=allocation.scheduler,
        scheduler_job_id=allocation.job_id,
        restart_count=allocation.restart_count,
        left_s=left_s,
        node_cores=max(node.cores for node in allocation.nodes),
        node_gpus=max(node.gpus for node in allocation.nodes),
        linger_s=linger_s,
        batch_job_id=options.batch_job,
    )


def _own_environ(found: mpi.MpiLauncher | None) -> dict[str, str]:
    """Return this process's environment as tasks start from it."""
    clean = mpienv.clean_environ(os.environ, found.flavor if found else None)
    return {name: value for name, value in clean.items() if not name.startswith("ENSEMBLE_GUARD_")}


@contextlib.contextmanager
def _threads(name: str, count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for what may hang on a file system; the end does not wait for them.

    All are started now: once the tasks have used up the user's processes (ulimit -u), a thread that
    cannot be started would end the launcher.

    Raises:
        LaunchError: That is so already.
    """
    executor = ThreadPoolExecutor(max_workers=count, thread_name_prefix=name)
    are_ready = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            executor.submit(are_ready.wait)
        are_ready.wait()
    except RuntimeError as error:
        are_ready.abort()
        executor.shutdown(wait=False)
        raise LaunchError(f"cannot start {count} threads (see ulimit -u): {error}") from error
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


class _Turnstile:
    """Lets launches through at a site's pace."""

    def __init__(self, per_s: float | None) -> None:
        self._gap_s = 1 / per_s if per_s else 0.0
        self._next = -math.inf

    async def admit(self) -> None:
        if self._gap_s:
            now = runtime.boottime_s()
            self._next = max(self._next + self._gap_s, now)
            await asyncio.sleep(self._next - now)
