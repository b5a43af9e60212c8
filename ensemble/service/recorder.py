"""Reports starts and ends to the store: in batches, until each has an answer.

A report leaves memory only when the store has said what became of it. While the store is away, or
its disk is full, reports wait here; a row that somebody's open transaction has locked is sent again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ensemble.core.backoff import Backoff
from ensemble.core.events import Pair
from ensemble.core.leases import Lease, Verdicts
from ensemble.core.model import End, Outcome, Start, Verdict
from ensemble.errors import OutcomeUnknownError, StoreFullError, StoreUnavailableError
from ensemble.service.runtime import detached

if TYPE_CHECKING:
    from ensemble.log import Logger

#: A batch is sent when so many reports wait, or so long after the last one.
BATCH = 250
DELAY_S = 0.05
#: How long a row that is locked by somebody else is left alone.
_BUSY_S = 0.5
#: How many ends are sent at once, at most.
_ENDS = 20 * BATCH
#: For how long to wait for an answer to an end that takes its time: a task may have millions of children to release.
_PATIENCE_S = 3600.0


class Recorder:
    """The way of all reports of one lease."""

    def __init__(self, lease: Lease, log: Logger, *, on_written: Callable[[], None]) -> None:
        self._lease = lease
        self._log = log
        self._on_written = on_written
        self._starts: dict[Pair, Start] = {}
        self._ends: dict[Pair, End] = {}
        #: Those who wait for a start to be on record.
        self._awaited: dict[Pair, asyncio.Future[bool]] = {}
        #: Starts that have waited for a batch: of a shorter run, start and end are one report.
        self._ripe: set[Pair] = set()
        #: How many ends to send at once: few after one of them may have taken too long.
        self._most = _ENDS
        #: Ends that had no answer when they were sent alone: they hold up no others.
        self._slow: set[Pair] = set()
        self._slow_news = asyncio.Event()
        self._last_pass = -math.inf
        self._news = asyncio.Event()
        self._is_full = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def pending(self) -> frozenset[Pair]:
        """Attempts whose end is not in the store yet."""
        return frozenset(self._ends)

    @property
    def waiting(self) -> int:
        """How many reports have no answer yet."""
        return len(self._starts) + len(self._ends)

    @property
    def unanswered(self) -> tuple[list[Start], list[End]]:
        """The reports that have no answer yet, for a spool."""
        return list(self._starts.values()), list(self._ends.values())

    def add_start(self, start: Start) -> None:
        """Report a start, soon."""
        self._starts[start.id, start.attempt] = start
        self._wake()

    async def write_start(self, start: Start) -> bool:
        """Report a start at once; return whether it is on record: if not, it is not ours to make."""
        pair = (start.id, start.attempt)
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._awaited[pair] = written
        self._ripe.add(pair)
        self.add_start(start)
        return await written

    def add_end(self, end: End) -> None:
        """Report an end, soon. It carries the start with it, if that is still here."""
        pair = (end.id, end.attempt)
        if end.outcome is Outcome.LOST and end.started_at is not None:
            # Only what is on record as started counts as lost: its start goes first.
            start = Start(id=end.id, attempt=end.attempt, at=end.started_at, nodes=end.nodes)
            self._starts.setdefault(pair, start)
            self._ripe.add(pair)
        else:
            self._starts.pop(pair, None)
        self._answer(pair, is_written=False)
        self._ends[pair] = end
        self._wake()

    async def run(self) -> None:
        """Send batches for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run())
            group.create_task(self._run_slow())

    async def _run(self) -> None:
        backoff = Backoff(base_s=0.1, cap_s=5.0)
        while True:
            await self._news.wait()
            await self._gather()
            try:
                is_busy = await self._send()
            except StoreUnavailableError as error:
                delay_s = backoff.fail()
                what = "store.full" if isinstance(error, StoreFullError) else "store.lost"
                self._log.warning(what, error=str(error), reports=self.waiting, retry_s=delay_s)
                await asyncio.sleep(delay_s)
            else:
                backoff.succeed()
                if is_busy:
                    await asyncio.sleep(_BUSY_S)

    async def _run_slow(self) -> None:
        """Send what takes its time, one by one."""
        while True:
            await self._slow_news.wait()
            ends = [end for pair, end in self._ends.items() if pair in self._slow][:1]
            if not ends:
                self._slow_news.clear()
                continue
            self._log.info("report.slow", task=ends[0].id, hint="it may have many children")
            try:
                verdicts = await self._finish(ends, timeout_s=_PATIENCE_S)
            except StoreUnavailableError as error:
                self._log.warning("store.lost", error=str(error), reports=self.waiting)
                self._slow.clear()  # it was not the report that was slow: all are sent as usual
                self._news.set()
                continue
            self._rest()
            self._on_written()
            if Verdict.BUSY in verdicts.values():
                await asyncio.sleep(_BUSY_S)

    async def flush(self) -> None:
        """Return when every report has its answer; `run` must be running."""
        await self._idle.wait()

    def _wake(self) -> None:
        self._idle.clear()
        self._news.set()
        if self.waiting >= BATCH:
            self._is_full.set()

    async def _gather(self) -> None:
        """Let a batch come together, when the last one was just before: what comes alone goes at once."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(self._last_pass + DELAY_S):
                await self._is_full.wait()
        except TimeoutError:
            pass
        self._is_full.clear()
        self._last_pass = loop.time()

    async def _send(self) -> bool:
        """Send what waits, starts first; return whether rows were busy."""
        ends = [end for pair, end in self._ends.items() if pair not in self._slow][: self._most]
        starts = [start for pair, start in self._starts.items() if pair in self._ripe]
        self._ripe = set(self._starts)
        verdicts: Verdicts = {}
        if starts:
            found = await detached(self._lease.start(starts))
            self._settle(self._starts, starts, found)
            verdicts |= found
        if ends:
            try:
                verdicts |= await self._finish(ends)
            except OutcomeUnknownError:
                self._part(ends)
                raise
            self._most = min(2 * self._most, _ENDS)
        self._rest()
        if verdicts:
            self._on_written()
        return Verdict.BUSY in verdicts.values()

    async def _finish(self, ends: list[End], *, timeout_s: float | None = None) -> Verdicts:
        in_order = sorted(ends, key=lambda end: end.id)
        verdicts = await detached(self._lease.finish(in_order, timeout_s=timeout_s))
        self._settle(self._ends, ends, verdicts)
        self._slow.intersection_update(self._ends)
        return verdicts

    def _part(self, ends: Sequence[End]) -> None:
        """Send fewer at once; what had no answer alone is not to hold up the rest."""
        self._most = max(len(ends) // 10, 1)
        if len(ends) == 1:
            self._slow.add((ends[0].id, ends[0].attempt))
            self._slow_news.set()

    def _rest(self) -> None:
        """Wait for news when nothing is left to send."""
        if not self._starts and self._ends.keys() <= self._slow:
            self._news.clear()
        if not self.waiting:
            self._idle.set()

    def _settle(
        self,
        waiting: dict[Pair, Start] | dict[Pair, End],
        sent: Sequence[Start | End],
        verdicts: Verdicts,
    ) -> None:
        for report in sent:
            pair = (report.id, report.attempt)
            verdict = verdicts.get(pair, Verdict.MISSING)
            if verdict is Verdict.BUSY:
                continue
            if waiting.get(pair) is report:  # a start may have become an end meanwhile
                del waiting[pair]
            self._answer(pair, is_written=verdict in (Verdict.APPLIED, Verdict.DUPLICATE))
            if verdict in (Verdict.FENCED, Verdict.MISSING):
                self._log.warning("report.refused", task=pair[0], attempt=pair[1], verdict=verdict)

    def _answer(self, pair: Pair, *, is_written: bool) -> None:
        written = self._awaited.pop(pair, None)
        if written is not None and not written.done():
            written.set_result(is_written)
