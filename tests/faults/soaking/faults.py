"""The faults: at random moments, of random kinds, all from one seed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg

from ensemble.core.database import connect
from ensemble.errors import ClusterError, EnsembleError
from tests.faults.proxy import Proxy
from tests.faults.soaking.fleet import Fleet
from tests.faults.soaking.ground import LEASE_S, Ground, Process

#: What may be killed or stopped, and how often of all.
ROLES = {
    "launcher": 4,
    "guard of launcher": 3,
    "pilot": 3,
    "guard of pilot": 3,
    "mpirun": 2,
    "task": 6,
    "service": 1,
    "batch job": 1,
}
#: What is ended in good order.
_DRAINED = ("launcher", "guard of launcher")


class Faults:
    """Injects one fault after another."""

    def __init__(self, ground: Ground, fleet: Fleet, proxy: Proxy, rng: random.Random) -> None:
        self._ground = ground
        self._fleet = fleet
        self._proxy = proxy
        self._rng = rng
        self._stopped: list[Process] = []
        self.kinds: Counter[str] = Counter()
        #: When and what, for whoever wants to know what led to something.
        self.log: list[str] = []

    async def inject(self, *, gap_s: float) -> None:
        """Inject for ever, *gap_s* apart on average."""
        faults: dict[Callable[[], Awaitable[str]], float] = {
            self._kill: 10,
            self._kill_both: 2,
            self._stop: 4,
            self._drain: 3,
            self._drain_twice: 2,
            self._stop_database: 0.8,
            self._kill_database: 0.5,
            self._kill_backend: 0.5,
            self._cut_sessions: 2,
            self._hole: 2,
            self._reset: 2,
        }
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(self._rng.expovariate(1 / gap_s))
                (fault,) = self._rng.choices(list(faults), list(faults.values()))
                group.create_task(self._do(fault))

    async def _do(self, fault: Callable[[], Awaitable[str]]) -> None:
        at = time.strftime("%H:%M:%S")
        try:
            what = await fault()
        except (EnsembleError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            what = f"{fault.__name__.strip('_')}: not possible now ({type(error).__name__})"
        if what:
            self.kinds[what.partition(",")[0]] += 1
            self.log.append(f"{at} {what}")

    async def heal(self) -> None:
        """Undo what is not undone yet; the database is up afterwards."""
        self._proxy.heal()
        for each in self._stopped:
            each.send(signal.SIGCONT)
        await self._ground.restore()

    def _pick(self, *roles: str) -> Process | None:
        """Choose a role, then a process of it."""
        by_role: dict[str, list[Process]] = {}
        for each in self._fleet.targets():
            if each.role in (roles or ROLES):
                by_role.setdefault(each.role, []).append(each)
        if not by_role:
            return None
        names = sorted(by_role)
        (role,) = self._rng.choices(names, [ROLES[name] for name in names])
        return self._rng.choice(sorted(by_role[role], key=lambda each: each.pid))

    # ------------------------------------------------------------------ processes

    async def _kill(self) -> str:
        found = self._pick()
        is_hit = found is not None and found.send(signal.SIGKILL)
        return f"SIGKILL of a {found.role}, {found.pid}" if found and is_hit else ""

    async def _kill_both(self) -> str:
        """Kill a launcher, or a pilot, and its guard at once: nobody is left to clean up."""
        child = self._pick("launcher", "pilot")
        if child is None:
            return ""
        guard = next((each for each in self._fleet.targets() if each.pid == child.ppid), None)
        for each in (guard, child):
            if each is not None:
                each.send(signal.SIGKILL)
        return f"SIGKILL of a {child.role} and its guard, {child.pid} {child.ppid}"

    async def _stop(self) -> str:
        found = self._pick()
        if found is None or not found.send(signal.SIGSTOP):
            return ""
        self._stopped.append(found)
        is_long = self._rng.random() < 0.3
        for_s = LEASE_S + self._rng.uniform(1, 3) if is_long else self._rng.uniform(0.1, 2)
        await asyncio.sleep(for_s)
        found.send(signal.SIGCONT)
        self._stopped.remove(found)
        kind = "longer than the lease" if is_long else "for a moment"
        return f"SIGSTOP of a {found.role} {kind}, {found.pid} {for_s:.1f} s"

    async def _drain(self) -> str:
        found = self._pick(*_DRAINED)
        is_hit = found is not None and found.send(signal.SIGTERM)
        return f"SIGTERM of a {found.role}, {found.pid}" if found and is_hit else ""

    async def _drain_twice(self) -> str:
        found = self._pick(*_DRAINED)
        if found is None or not found.send(signal.SIGTERM):
            return ""
        await asyncio.sleep(self._rng.uniform(0.5, 1))
        found.send(signal.SIGTERM)
        return f"two SIGTERM of a {found.role}, {found.pid}"

    # ------------------------------------------------------------------ the database

    async def _away(self) -> str:
        """Leave the database away for a while, then start it."""
        is_long = self._rng.random() < 0.2
        for_s = LEASE_S + self._rng.uniform(1, 4) if is_long else self._rng.uniform(0, 3)
        await asyncio.sleep(for_s)
        await self._ground.restore()
        return "longer than the lease" if is_long else "for a moment"

    async def _stop_database(self) -> str:
        mode = self._rng.choice(("fast", "immediate"))
        with contextlib.suppress(ClusterError):
            await self._ground.cluster.stop(mode)
        return f"database stopped ({mode}) {await self._away()}"

    async def _kill_database(self) -> str:
        pid = self._ground.postmaster
        if pid is None:
            return ""
        os.kill(pid, signal.SIGKILL)
        return f"database's SIGKILL {await self._away()}"

    async def _kill_backend(self) -> str:
        """Kill one server process: PostgreSQL ends all others, and repairs itself."""
        found = await self._sessions()
        if not found:
            return ""
        os.kill(self._rng.choice(found), signal.SIGKILL)
        return "SIGKILL of one of the database's processes"

    async def _cut_sessions(self) -> str:
        """Have the database end some sessions, or all but ours."""
        async with self._as_user() as user:
            cut = await user.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE usename = current_user AND pid <> pg_backend_pid() AND ($1 OR pid % 3 = 0)",
                self._rng.random() < 0.3,
            )
        return f"pg_terminate_backend, {cut}"

    async def _sessions(self) -> list[int]:
        async with self._as_user() as user:
            rows = await user.fetch(
                "SELECT pid FROM pg_stat_activity WHERE usename = current_user ORDER BY pid"
            )
        return [row["pid"] for row in rows]

    @contextlib.asynccontextmanager
    async def _as_user(self) -> AsyncIterator[asyncpg.Connection[Any]]:
        connection = await connect(self._ground.site.address(), name="soak fault")
        try:
            yield connection
        finally:
            connection.terminate()

    # ------------------------------------------------------------------ the network

    async def _hole(self) -> str:
        """Swallow requests, replies, or both."""
        which = self._rng.choice(("requests", "replies", "everything"))
        self._proxy.swallows_requests = which != "replies"
        self._proxy.swallows_replies = which != "requests"
        for_s = self._rng.uniform(0.2, LEASE_S + 3)
        await asyncio.sleep(for_s)
        self._proxy.heal()
        return f"black hole for {which}, {for_s:.1f} s"

    async def _reset(self) -> str:
        self._proxy.refuses = self._rng.random() < 0.3
        cut = self._proxy.reset()
        if self._proxy.refuses:
            await asyncio.sleep(self._rng.uniform(0.2, 3))
            self._proxy.heal()
        return f"reset of connections, {cut}"
