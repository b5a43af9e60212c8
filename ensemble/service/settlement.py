"""The end of a launcher's books: every report gets its answer, or is written to a spool; then the lease is closed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.core.backoff import Backoff
from ensemble.core.events import Leave
from ensemble.core.leases import Lease
from ensemble.errors import StoreUnavailableError
from ensemble.service import runtime, spool
from ensemble.service.recorder import Recorder
from ensemble.service.trust import Trust

if TYPE_CHECKING:
    from ensemble.log import Logger

#: How often to look whether there is anything left to wait for, in seconds.
_LOOK_S = 1.0
#: How long to wait after a spool could not be written, in seconds.
_AGAIN_S = 5.0
#: How long a launcher that has lost its lease waits for the last answers, in seconds.
_LOST_S = 5.0


class Settlement:
    """What is left to do once nothing of a launcher's runs any more."""

    def __init__(
        self, *, lease: Lease, recorder: Recorder, trust: Trust, spools: Path, log: Logger
    ) -> None:
        """Prepare.

        Args:
            lease: The launcher's.
            recorder: Has the reports; its `run` must be running.
            trust: Tells when the lease itself is over; its `run` must be running.
            spools: The directory for a spool.
            log: The launcher's.
        """
        self._lease = lease
        self._recorder = recorder
        self._trust = trust
        self._spools = spools
        self._log = log
        #: What bounds the wait for the last answers.
        self._patience: asyncio.Timeout | None = None
        self._is_over = asyncio.Event()
        #: Where the reports are that have no answer; or why they could not be written.
        self._spool: Path | None = None
        self._spool_error = ""
        self._is_warned = False

    async def run(self, leave: Leave, at_most_s: float | None) -> bool:
        """Wait until every report has its answer, then close the lease; return whether it is closed.

        That is tried for as long as the allocation and the lease last. What has no answer for long is written to a spool
        meanwhile, for whoever reaps the lease.

        Args:
            leave: Why the launcher leaves; whoever has lost the lease has nothing to close.
            at_most_s: Until the allocation ends; None is never.
        """
        async with asyncio.TaskGroup() as group:
            if not leave.is_lost:
                group.create_task(self._keep(leave.reason))
            try:
                async with asyncio.timeout(
                    _LOST_S if leave.is_lost else at_most_s
                ) as self._patience:
                    await self._recorder.flush()
                    if not leave.is_lost:
                        await self._close(leave.reason)
            except TimeoutError:
                is_answered = False
            else:
                is_answered = True
            finally:
                self._patience = None
                self._is_over.set()
        if not is_answered:
            await self._tell_unanswered(leave)
        elif self._spool is not None:
            with contextlib.suppress(OSError):
                self._spool.unlink()
        return is_answered and not leave.is_lost

    def hurry(self) -> None:
        """End the wait, if there is one: at the first asking only if nothing is lost by that."""
        if self._patience is None:
            return
        if self._spool_error and not self._is_warned:
            self._is_warned = True
            self._log.error(
                "launcher.staying",
                reports=self._recorder.waiting,
                error=self._spool_error,
                hint="only this process has these reports: signal it again to lose them",
            )
        else:
            runtime.hasten(self._patience, _LOOK_S)

    async def _keep(self, reason: str) -> None:
        """Write a spool when the answers take long: whoever kills a launcher that waits, loses nothing.

        Once it is written, there is no more to wait for than the lease's end.
        """
        wait_s = _LOOK_S
        while not await runtime.until(self._is_over, wait_s):
            if self._spool is None:
                wait_s = _LOOK_S if await self._write_spool(reason) else _AGAIN_S
            elif self._trust.is_lease_over:
                runtime.hasten(self._patience, _LOOK_S)

    async def _write_spool(self, reason: str) -> bool:
        starts, ends = self._recorder.unanswered
        head = spool.Head(
            mark=self._lease.mark,
            lease_id=self._lease.id,
            launcher_id=self._lease.launcher_id,
            reason=reason,
        )
        try:
            self._spool = await asyncio.to_thread(
                spool.write, self._spools, head, starts, ends, now=runtime.utc_now()
            )
        except runtime.SHORTAGE as error:
            self._spool_error = str(error)
            self._log.error("spool.not_written", reports=len(ends), error=str(error))
            return False
        self._spool_error = ""
        return True

    async def _tell_unanswered(self, leave: Leave) -> None:
        if self._spool is None and not leave.is_lost:
            await self._write_spool(leave.reason)
        self._log.error(
            "reports.not_written" if self._recorder.waiting else "lease.not_closed",
            reports=self._recorder.waiting,
            spool=None if self._spool is None else str(self._spool),
        )

    async def _close(self, reason: str) -> None:
        """Close the lease, however often it takes."""
        backoff = Backoff(base_s=0.1, cap_s=5.0)
        while True:
            try:
                return await runtime.detached(self._lease.close(reason))
            except StoreUnavailableError as error:
                delay_s = backoff.fail()
                self._log.warning("store.lost", error=str(error), retry_s=delay_s)
                await asyncio.sleep(delay_s)
