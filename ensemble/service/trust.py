"""How long a launcher may trust its lease, and the heartbeat that makes it longer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ensemble.config import LauncherSettings
from ensemble.core.leases import Lease
from ensemble.drivers.guardlink import GuardLink
from ensemble.errors import LeaseLostError, StoreUnavailableError
from ensemble.service import runtime

if TYPE_CHECKING:
    from ensemble.log import Logger


class Trust:
    """Renews a lease; tells the guard, too, how long it may be trusted.

    Trust ends before the lease can: nobody can have taken the tasks over by then, and there is time left to end them.
    Close to the lease's end even KILL must have worked; the guard acts if the launcher cannot.
    """

    def __init__(
        self,
        lease: Lease,
        settings: LauncherSettings,
        guard: GuardLink | None,
        log: Logger,
        *,
        on_lost: Callable[[str], None],
    ) -> None:
        """Prepare; `run` renews. *on_lost* is called when a reaper has closed the lease."""
        self._lease = lease
        self._guard = guard
        self._log = log
        self._on_lost = on_lost
        ttl_s = settings.lease_ttl_s
        self._trust_s = ttl_s - min(settings.grace_s + 60.0, ttl_s / 2)
        #: From the end of trust to the end of the lease.
        self._rest_s = ttl_s - self._trust_s
        self._guard_s = self._trust_s + self._rest_s / 2
        self._period_s = min(settings.heartbeat_s, self._trust_s / 3)
        self._until = math.inf

    @property
    def is_over(self) -> bool:
        """Whether what runs must be ended now."""
        return runtime.boottime_s() > self._until

    @property
    def is_lease_over(self) -> bool:
        """Whether the lease itself has run out, as far as we know."""
        return runtime.boottime_s() > self._until + self._rest_s

    def let_go(self) -> None:
        """Let the guard wait for ever: nothing runs any more that would have to be ended."""
        if self._guard is not None:
            self._guard.deadline(math.inf)
            self._guard = None

    async def run(self) -> None:
        """Renew the lease for ever, or until it is lost."""
        self._extend(runtime.boottime_s())  # tasks may run before the first renewal is answered
        while True:
            sent = runtime.boottime_s()
            if await self._renew(patience_s=min(max(self._trust_s / 3, 0.5), 30.0)):
                self._extend(sent)
                await asyncio.sleep(self._period_s)
            else:
                await asyncio.sleep(min(1.0, self._trust_s / 10))

    def _extend(self, sent: float) -> None:
        self._until = sent + self._trust_s
        if self._guard is not None:
            self._guard.deadline(sent + self._guard_s)

    async def _renew(self, *, patience_s: float) -> bool:
        try:
            async with asyncio.timeout(patience_s):
                await runtime.detached(self._lease.renew())
        except LeaseLostError as error:
            self._on_lost(str(error))
            await asyncio.Event().wait()  # nothing is left to renew
        except (StoreUnavailableError, TimeoutError) as error:
            self._log.warning("lease.not_renewed", error=str(error) or "no answer")
            return False
        return True
