"""Takes the tasks of lost launchers back. Anybody may: launchers, the service, the command line.

Evidence, not silence, ends a lease early: on the launcher's own host, another boot, or neither its
process nor its guard's. What such a launcher left running here is killed first. Without evidence a
lease ends after its whole time of silence, or with its batch job; the store sees to both.
"""

from __future__ import annotations

import asyncio

from ensemble.core.leases import Reaping
from ensemble.core.model import LauncherIdentity
from ensemble.core.store import Store
from ensemble.drivers import process, sweep
from ensemble.log import get_logger


async def reap(store: Store, *, own_lease: int | None = None) -> int:
    """Close leases on evidence or after their time, and release their tasks; return how many tasks.

    Args:
        own_lease: The caller's own, which it will not find dead.
    """
    log = get_logger()
    reaping = Reaping(store.pool)
    me = process.identity()
    for lease_id, other in (await reaping.local_leases(me.host)).items():
        evidence = None if lease_id == own_lease else find_evidence(other, me)
        if evidence is None:
            continue
        if other.boot_id == me.boot_id:
            marker = sweep.marker_prefix(lease_id, other)
            left = (await asyncio.to_thread(sweep.sweep_token, marker)).left
            if left:
                log.warning("lease.survivors_left", lease=lease_id, pids=left)
                continue
        if await reaping.bury(lease_id, state="EXPIRED", evidence=evidence):
            log.warning("lease.reaped", lease=lease_id, evidence=evidence)
    for lease_id in await reaping.expire():
        log.warning("lease.reaped", lease=lease_id, evidence="silence or its batch job's end")
    released = await reaping.release()
    if released:
        log.info("tasks.released", tasks=released)
        await store.ring()
    return released


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
    ):
        return None  # the guard is still cleaning up, and will release the lease itself
    return "its process is gone"
