"""The living processes of one task: found, held, ended, and reaped where nobody else will."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ensemble.drivers import proctree
from ensemble.drivers.proctree import Stat

if TYPE_CHECKING:
    from ensemble.drivers.process import Process

#: How soon to look again at a tree of which nothing was heard; it is the ends of processes that wake, not this.
_LOOK_AGAIN_S = 0.25
#: How long a program may take to replace itself (execve), while which its environment looks empty.
_EXEC_S = 0.005
#: For how long to look again at once, where each look finds something that has just ended.
_CHASE_S = 0.5
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

#: Children in sessions of their own that somebody waits for, as the roots of tasks, and that are not reaped yet.
roots: set[int] = set()
#: When each start under way began, in ticks: its child may not be in `roots` yet.
starting: dict[object, int] = {}


@dataclass(frozen=True, slots=True)
class Held:
    """A living process, with a handle that cannot pass to another."""

    stat: Stat
    pidfd: int


class Tree:
    """The living processes of one task, each held by a pidfd."""

    def __init__(self, process: Process) -> None:
        """Know the task; `look` finds its processes."""
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._held: dict[int, Held] = {}
        self._met: set[tuple[int, int]] = set()
        self._untouchable: set[tuple[int, int]] = set()
        #: Whether the last look met a process that may turn out to belong here: one on its way into a program, or
        #: out of life, shows no environment.
        self._has_unsure = False
        #: Whether something ended under the last look: what it had just started may have been missed.
        self._has_missed = False
        #: Whether the last look could not see everything, as file descriptors ran out.
        self._is_blind = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in list(self._held):
            self._release(pid)

    @property
    def count(self) -> int:
        """How many processes were met."""
        return len(self._met)

    def look(self) -> list[Held]:
        """Find processes that were not known, reap those that ended; return the new ones."""
        self._changed.clear()
        self._has_unsure = self._has_missed = self._is_blind = False
        found: list[Held] = []
        try:
            for stat in self._find():
                if stat.is_zombie:
                    self._has_missed = self._reap(stat) or self._has_missed
                elif stat.pid not in self._held and (held := self._hold(stat)):
                    self._process.sessions.add(stat.sid)
                    found.append(held)
        except OSError as error:
            if not proctree.is_shortage(error):
                raise
            self._is_blind = True
        return found

    async def end(self, grace_s: float) -> None:
        """End what there is, and what shows up while it ends."""
        if await self._is_left() and grace_s > 0:
            self._terminate(list(self._held.values()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    while self._held or self._is_blind:
                        self._terminate_orphans(await self._look_on_change())
        while await self._is_left():
            for held in list(self._held.values()):
                self._send(held, signal.SIGKILL)
            await self._look_on_change()

    async def _is_left(self) -> bool:
        """Look, again where one look cannot tell."""
        self.look()
        until = time.monotonic() + 10 * _CHASE_S
        while not self._held and self._has_missed and time.monotonic() < until:
            await asyncio.sleep(0)
            self.look()
        if not self._held and self._has_unsure:
            await asyncio.sleep(_EXEC_S)
            self.look()
        return bool(self._held) or self._is_blind

    async def _look_on_change(self) -> list[Held]:
        """Look again once a process has ended."""
        if self._held or self._is_blind:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self._changed.wait()
        return self.look()

    def _terminate(self, held: Sequence[Held]) -> None:
        """Send TERM, the root first; what is stopped must go on to take it."""
        for each in held:
            self._send(each, signal.SIGTERM)
            if each.stat.is_stopped:
                self._send(each, signal.SIGCONT)

    def _terminate_orphans(self, newcomers: Sequence[Held]) -> None:
        """Send TERM to what was overlooked. What a living parent starts now may be its clean-up: it is let be."""
        self._terminate([each for each in newcomers if each.stat.ppid == os.getpid()])

    def _find(self) -> list[Stat]:
        """Look at the root and what is recognised as the task's, with everything below."""
        tops = [] if self._process.exit else [proctree.read_stat(self._process.pid)]
        tops += [stat for stat in list_strays() if self._is_ours(stat)]
        children = proctree.children_reader()
        return list(proctree.walk([stat for stat in tops if stat is not None], children))

    def _is_ours(self, stat: Stat) -> bool:
        if (stat.pid, stat.start_ticks) in self._met:
            return True
        environ = proctree.read_environ(stat.pid)
        token = proctree.parse_token(environ)
        if token is not None:
            return token == self._process.marker
        if stat.sid in self._process.sessions:
            return True
        if not environ and not stat.is_zombie:
            now = proctree.read_stat(stat.pid)
            # What has just begun and shows nothing may be on its way out, and have begun another one.
            is_fleeting = stat.start_ticks > now_ticks() - _TICKS_PER_S
            has_ended = now is None or now.is_zombie or is_fleeting
            self._has_missed = self._has_missed or has_ended
            self._has_unsure = self._has_unsure or not has_ended
        return False

    def _hold(self, stat: Stat) -> Held | None:
        """Open a pidfd for what was looked at; None when it has gone, or is not ours to signal."""
        key = (stat.pid, stat.start_ticks)
        pidfd = None if key in self._untouchable else open_pidfd(stat)
        if pidfd is None:
            return None
        self._held[stat.pid] = held = Held(stat, pidfd)
        self._met.add(key)
        self._loop.add_reader(pidfd, self._on_end, stat.pid)
        return held

    def _on_end(self, pid: int) -> None:
        self._release(pid)
        self._changed.set()

    def _release(self, pid: int) -> None:
        held = self._held.pop(pid)
        self._loop.remove_reader(held.pidfd)
        os.close(held.pidfd)

    def _send(self, held: Held, number: int) -> None:
        if self._held.get(held.stat.pid) is not held:
            return
        try:
            signal.pidfd_send_signal(held.pidfd, number)
        except ProcessLookupError:
            pass
        except PermissionError:
            # A set-uid program that runs as another user; to wait for it would be to wait for ever.
            self._untouchable.add((held.stat.pid, held.stat.start_ticks))
            self._release(held.stat.pid)

    def _reap(self, stat: Stat) -> bool:
        """Reap what has ended, if that is for us to do; False while who traces it has not let go of it."""
        if stat.pid == self._process.pid:
            self._process.collect()
            return self._process.exit is not None
        return stat.ppid != os.getpid() or reap_adopted(stat.pid)


@contextlib.contextmanager
def start() -> Iterator[None]:
    """Begin a start: what is a child of ours since then is nobody's stray, even if it ends before it is in `roots`."""
    this = object()
    starting[this] = now_ticks()
    try:
        yield
    finally:
        del starting[this]


def list_strays() -> list[Stat]:
    """List adopted children, with the sessions that tell them from our own; reap those that have ended.

    A child that is neither in `roots` nor older than every `start` under way may be one that is just being
    started, so its end is left to `start`. What has ended may have started another one that is a child of ours only
    since: so the list is one in which none had, unless they do so without end.
    """
    until = time.monotonic() + _CHASE_S
    while True:
        strays, has_reaped = _list_strays()
        if not has_reaped or time.monotonic() > until:
            return strays


def _list_strays() -> tuple[list[Stat], bool]:
    me, session = os.getpid(), os.getsid(0)
    strays = []
    has_reaped = False
    adopted = proctree.list_adopted()
    before = min(starting.values(), default=math.inf)  # after the list: it has no later child
    for pid in adopted:
        stat = None if pid in roots else proctree.read_stat(pid)
        if stat is None or stat.ppid != me or stat.sid == session:
            continue
        if stat.is_zombie and stat.start_ticks < before:
            has_reaped = reap_adopted(pid) or has_reaped
        else:
            strays.append(stat)
    return strays, has_reaped


def reap_adopted(pid: int) -> bool:
    """Reap one ended child that no other code waits for; False while who traces it has not let go of it."""
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None
    return True


def open_pidfd(stat: Stat) -> int | None:
    """Open a handle on the very process that was looked at; None when it has gone."""
    try:
        pidfd = os.pidfd_open(stat.pid)
    except ProcessLookupError:
        return None
    try:
        now = proctree.read_stat(stat.pid)
    except OSError:
        os.close(pidfd)
        raise
    if now is None or now.start_ticks != stat.start_ticks:
        os.close(pidfd)
        return None
    return pidfd


def now_ticks() -> int:
    """Return now, in the unit of `Stat.start_ticks`."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS_PER_S)
