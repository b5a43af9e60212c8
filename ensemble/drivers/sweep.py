"""Finds and kills the tasks of a launcher or pilot that was lost, by their markers, for whoever is not their parent."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

from ensemble.core.model import LauncherIdentity
from ensemble.drivers import proctree, tasktree
from ensemble.drivers.proctree import Stat


class Swept(NamedTuple):
    """What `sweep_token` did."""

    ended: int
    #: Processes that were killed and have not gone, as they hang in a file system.
    left: tuple[int, ...]


def sweep_token(prefix: str, *, timeout_s: float = 10.0) -> Swept:
    """Kill whatever this user runs on this host for tasks whose marker starts with *prefix*, and what is below it.

    For those who are not its parent: the tasks of a launcher that was lost. It looks at every process and waits, so
    call it in a worker thread.

    Args:
        prefix: What `marker_prefix` returns; its end matters, as 4 is a prefix of 41.
    """
    if not prefix:
        raise ValueError("an empty prefix would match every task")
    end = time.monotonic() + timeout_s
    killed: set[tuple[int, int]] = set()
    while targets := _find_marked(prefix):
        killed |= {(stat.pid, stat.start_ticks) for stat in targets}
        _kill_and_wait(targets, min(0.25, timeout_s))
        if time.monotonic() > end:
            left = tuple(sorted(stat.pid for stat in _find_marked(prefix)))
            return Swept(len(killed) - len(left), left)
    return Swept(len(killed), ())


def marker_prefix(lease_id: int, launcher: LauncherIdentity) -> str:
    """Return how the markers of a launcher's tasks begin: every site counts its leases from 1."""
    return f"{lease_id}-{launcher.pid}-{launcher.start_ticks}."


def _find_marked(prefix: str) -> list[Stat]:
    """Find this user's living processes with such a marker, and what is below them."""
    marked = [stat for stat in proctree.scan().values() if _is_marked(stat.pid, prefix)]
    found = proctree.walk(marked, proctree.children_reader())
    return [stat for stat in found if not stat.is_zombie and stat.pid != os.getpid()]


def _is_marked(pid: int, prefix: str) -> bool:
    token = proctree.parse_token(proctree.read_environ(pid))
    if token is None or not token.startswith(prefix):
        return False
    return proctree.read_owner(pid) == os.geteuid()


def _kill_and_wait(targets: Sequence[Stat], timeout_s: float) -> None:
    """Kill processes; return when all are gone, or after a while."""
    end = time.monotonic() + timeout_s
    poll = select.poll()
    pidfds: set[int] = set()
    try:
        for stat in targets:
            pidfd = tasktree.open_pidfd(stat)
            if pidfd is None:
                continue
            pidfds.add(pidfd)
            poll.register(pidfd, select.POLLIN)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        waiting = set(pidfds)
        while waiting and (left := end - time.monotonic()) > 0:
            for pidfd, _ in poll.poll(1000 * left):
                poll.unregister(pidfd)
                waiting.discard(pidfd)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
