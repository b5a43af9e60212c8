"""Takes the tasks of lost launchers back. Anybody may: launchers, the service, the command line.

Evidence, not silence, ends a lease early: on the launcher's own host, another boot, or neither its
process nor its guard's, or a guard that was stopped. What such a launcher left running here is killed first. Without evidence a
lease ends after its whole time of silence, or with its batch job; the store sees to both. What a launcher could not
report before it left is in its spool: that is read before its lease is closed. Pilots may outlive their launcher on
other hosts: its lease is closed at once where its roll says that all of them are gone (drivers/roll.py), else it lingers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from ensemble.core.leases import Reaping
from ensemble.core.model import LauncherIdentity
from ensemble.core.store import Store
from ensemble.drivers import process, proctree, roll, sweep
from ensemble.errors import StoreUnavailableError
from ensemble.log import get_logger
from ensemble.service import papers, runtime, spool

#: How long a launcher's guard waits for word of the pilots, and how often it looks.
_GONE_S = 3.0
_LOOK_S = 0.05


async def reap(
    store: Store,
    spools: Path | None = None,
    *,
    own_lease: int | None = None,
    is_patient: bool = True,
) -> int:
    """Close leases on evidence or after their time, and release their tasks; return how many tasks.

    Args:
        spools: Where the site keeps them; None is out of sight.
        own_lease: The caller's own, which it will not find dead.
        is_patient: Whether to wait, for minutes, for tasks that take long to release. If not, they are left to the next
            reaper, with a warning.

    Raises:
        StoreUnavailableError: The database cannot be reached, or refuses.
        OSError: The spools cannot be listed: no lease was closed.
    """
    log = get_logger()
    reaping = Reaping(store.pool)
    local = await reaping.local_leases(process.identity().host)
    dead, spare = await _find_dead(local, own_lease)
    # Now, as no spool of the dead can come any more.
    busy = await spool.replay(store, spools, spare=spare) if spools is not None else set()
    for lease_id in dead.keys() - busy:
        if await _bury(reaping, lease_id, spools, state="EXPIRED", evidence=dead[lease_id]):
            log.warning("lease.reaped", lease=lease_id, evidence=dead[lease_id])
    for lease_id in await reaping.silent_leases(process.identity().host):
        if lease_id != own_lease and lease_id in local:
            await _end_silent(lease_id, local[lease_id])
    for lease_id in await reaping.expire(spare=busy):
        log.warning("lease.reaped", lease=lease_id, evidence="silence or its batch job's end")
        if (found := await _find_papers(reaping, lease_id, spools)) is not None:
            await asyncio.to_thread(papers.remove, found)
    released = await (reaping.release() if is_patient else _release_at_once(reaping))
    if released:
        log.info("tasks.released", tasks=released)
        await store.ring()
    return released


async def _find_dead(
    local: Mapping[int, LauncherIdentity], own_lease: int | None
) -> tuple[dict[int, str], set[int]]:
    """Return the leases of this host's dead launchers with the evidence, and those that are to be left alone."""
    me = process.identity()
    dead: dict[int, str] = {}
    spare = set() if own_lease is None else {own_lease}
    for lease_id, other in local.items():
        evidence = None if lease_id == own_lease else find_evidence(other, me)
        if evidence is None:
            continue
        if other.boot_id == me.boot_id:
            _kill_stopped(other.guard_pid, other.guard_start_ticks)
            if not await _sweep(lease_id, other):
                spare.add(lease_id)
                continue
        dead[lease_id] = evidence
    return dead, spare


async def _sweep(lease_id: int, other: LauncherIdentity) -> bool:
    """Kill what is left here of a launcher's tasks; tell whether nothing is left."""
    marker = sweep.marker_prefix(lease_id, other)
    left = (await asyncio.to_thread(sweep.sweep_token, marker)).left
    if left:
        get_logger().warning("lease.survivors_left", lease=lease_id, pids=left)
    return not left


async def _end_silent(lease_id: int, other: LauncherIdentity) -> None:
    """End what still runs here under a lease that ran out, before its tasks may run elsewhere.

    Its guard has done that long ago, unless it was killed, or stands still as the launcher does.
    """
    me = process.identity()
    if (other.machine_id, other.boot_id, other.pid_namespace) == (
        me.machine_id,
        me.boot_id,
        me.pid_namespace,
    ):
        _kill_stopped(other.pid, other.start_ticks)
        await _sweep(lease_id, other)


def _kill_stopped(pid: int | None, start_ticks: int | None) -> None:
    """Kill a process that a signal has stopped: nobody is to go on with tasks that others may have."""
    stat = None if pid is None else proctree.read_stat(pid)
    if stat is not None and stat.start_ticks == start_ticks and stat.is_stopped:
        with contextlib.suppress(OSError):
            os.kill(stat.pid, signal.SIGKILL)


async def release(store: Store, spools: Path, lease_id: int) -> None:
    """Close the lease of a launcher that is gone and left nothing running, as its guard knows."""
    reaping = Reaping(store.pool)
    if lease_id not in await spool.replay(store, spools):
        evidence = "released by its guard"
        await _bury(reaping, lease_id, spools, state="RELEASED", evidence=evidence, wait_s=_GONE_S)
    await reaping.release(is_patient=False)
    await store.ring()


async def _release_at_once(reaping: Reaping) -> int:
    """Release what closed leases hold and can be released now; return how many tasks."""
    try:
        return await reaping.release(is_patient=False)
    except StoreUnavailableError as error:
        hint = "a launcher or the service tries again soon"
        get_logger().warning("tasks.not_released", error=str(error), hint=hint)
        return 0


async def _bury(
    reaping: Reaping,
    lease_id: int,
    spools: Path | None,
    *,
    state: str,
    evidence: str,
    wait_s: float = 0.0,
) -> bool:
    """Close the lease of a launcher of this host that is certainly gone, and remove its link; tell whether it is closed.

    Args:
        wait_s: How long to wait for word that its pilots on other hosts are gone, too.
    """
    run_directory = await _find_papers(reaping, lease_id, spools)
    if run_directory is not None:
        papers.remove_link(run_directory)
    is_closed = await reaping.bury(lease_id, state=state, evidence=evidence)
    if run_directory is None:
        return is_closed
    marker = None if is_closed else await _find_marker(reaping, lease_id)
    if marker is not None:
        left = await _wait_for_pilots(run_directory, marker, wait_s)
        if left == 0:
            is_closed = await reaping.bury(
                lease_id, state=state, evidence=evidence, has_no_pilots=True
            )
        elif wait_s:
            get_logger().warning("lease.lingers", lease=lease_id, pilots=left or "unknown")
    if is_closed:
        await asyncio.to_thread(papers.remove, run_directory)
    return is_closed


async def _find_papers(reaping: Reaping, lease_id: int, spools: Path | None) -> Path | None:
    """Return where the launcher of a lease kept its pilots' papers; None where that is out of sight."""
    _, launcher_id = await reaping.find_launcher(lease_id)
    return None if spools is None or launcher_id is None else papers.folder(spools, launcher_id)


async def _find_marker(reaping: Reaping, lease_id: int) -> str | None:
    """Return what tells the launcher of a live lease from others; None where its roll proves nothing here."""
    me = process.identity()
    other = (await reaping.local_leases(me.host)).get(lease_id)
    if other is None or (other.machine_id, other.boot_id) != (me.machine_id, me.boot_id):
        return None
    return sweep.marker_prefix(lease_id, other)


async def _wait_for_pilots(run_directory: Path, marker: str, wait_s: float) -> int | None:
    """Wait until all pilots of a launcher are gone; return how many are left, None where nobody knows."""
    end = runtime.boottime_s() + wait_s
    while True:
        left = await asyncio.to_thread(roll.count_left, run_directory, marker)
        if not left or runtime.boottime_s() >= end:
            return left
        await asyncio.sleep(_LOOK_S)


def find_evidence(other: LauncherIdentity, me: LauncherIdentity) -> str | None:
    """Tell why a launcher of this host is certainly gone; None when it may live.

    A container has its own pids: only a process of the same pid name space can be looked up.
    """
    if other.host != me.host or other.machine_id != me.machine_id:
        return None
    if other.boot_id != me.boot_id:
        return "its host has been booted again"
    if other.pid_namespace != me.pid_namespace:
        return None
    if process.is_alive(other.pid, other.start_ticks):
        return None
    if (
        other.guard_pid is not None
        and other.guard_start_ticks is not None
        and process.is_alive(other.guard_pid, other.guard_start_ticks)
        and not _is_stopped(other.guard_pid)
    ):
        return None  # the guard is still cleaning up, and will release the lease itself
    return "its process is gone"


def _is_stopped(pid: int) -> bool:
    stat = proctree.read_stat(pid)
    return stat is not None and stat.is_stopped
