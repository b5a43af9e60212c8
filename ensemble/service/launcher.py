"""The launcher's shell: performs what core/dispatch.py decides, and tells it what came of it.

One loop takes events from a queue, asks the dispatcher, and performs its effects; what takes time
runs in the TaskGroup and posts the next event. At the end every report gets its answer, and the
lease is closed.

Loops that may lose the database handle that inside themselves: a crash of one cancels its siblings,
and then the guard ends what ran. The database may be away for as long as the lease is trusted.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, assert_never

from ensemble import log
from ensemble.config import LauncherSettings
from ensemble.core import listener
from ensemble.core.dispatch import Dispatcher, Policy
from ensemble.core.events import (
    Announce,
    Announced,
    Ask,
    AskHeld,
    AskProspect,
    Claimed,
    ClaimFailed,
    CouldNotStart,
    DrainAsked,
    Effect,
    Event,
    KillAsked,
    Launch,
    LeaseLost,
    Leave,
    MarkDrained,
    MarkTimedOut,
    PilotJoined,
    ProspectTold,
    Recall,
    Reconciled,
    RecordEnd,
    RecordStart,
    SetAside,
    Skipped,
    Terminate,
    Ticked,
    WorkRang,
)
from ensemble.core.leases import Lease
from ensemble.core.listener import Listener
from ensemble.core.model import (
    Claim,
    End,
    JobMode,
    Node,
    Outcome,
    Room,
    SlotRoom,
    Start,
    Unfit,
)
from ensemble.core.store import Store
from ensemble.drivers.guardlink import GuardLink
from ensemble.errors import LaunchError, LeaseLostError, OutcomeUnknownError, StoreUnavailableError
from ensemble.service import runtime, spool
from ensemble.service.reaper import reap
from ensemble.service.recorder import Recorder
from ensemble.service.runner import Post, Runner, Spawn
from ensemble.service.settlement import Settlement
from ensemble.service.tally import Tally
from ensemble.service.trust import Trust

T = TypeVar("T")

#: The slow tick that time limits and deadlines go by; nothing polls faster.
TICK_S = 1.0
#: Rings for work that come closer together than this are one.
_RING_S = 0.02
#: Our own rings, after what we wrote, come no closer together than this.
_TELL_S = 0.1
#: A second signal within this is the same one, delivered twice.
_SAME_SIGNAL_S = 0.5
#: After a doubt we look again: a statement that was cut off may be committed later than that.
_LATE_S = 10.0
#: Failures that are logged one by one; then only counted.
_FAILURES_SHOWN = 20


_UNFIT = {
    Unfit.RANKS: "they have several ranks or nodes: ensemble launch --job-mode mpi runs them",
    Unfit.NODES: "they want more nodes than there are here",
    Unfit.GPUS: "they want more GPUs than any node here has",
    Unfit.MEMORY: "they want more memory than any node here has",
    Unfit.TIME: "their wall_time_minutes is longer than the time that was left",
}


class Launcher:
    """One launcher under its lease."""

    def __init__(  # noqa: PLR0913 - made in one place
        self,
        *,
        store: Store,
        lease: Lease,
        nodes: Sequence[Node],
        settings: LauncherSettings,
        policy: Policy,
        wf_filter: str | None,
        job_mode: JobMode,
        make_runner: Callable[[Post, Spawn], Runner],
        guard: GuardLink | None,
        site: Path,
    ) -> None:
        self._store = store
        self._lease = lease
        self._nodes = nodes
        self._job_mode = job_mode
        self._settings = settings
        self._policy = policy
        self._wf_filter = wf_filter
        self._guard = guard
        self._site = site
        self._spools = spool.folder(site)
        self._log = log.get_logger(launcher=lease.launcher_id)
        self._group = asyncio.TaskGroup()
        self._workers: set[asyncio.Task[None]] = set()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._runner = make_runner(self._post, self._spawn)
        self._workflows: list[int] | None = None
        self._is_filter_stale = True
        self._kill_rang = asyncio.Event()
        self._work_rang = asyncio.Event()
        self._doubt = asyncio.Event()
        self._written = asyncio.Event()
        self._recorder = Recorder(lease, self._log, on_written=self._written.set)
        #: Hardware threads and GPUs of the largest node, as pilots tell.
        self._largest = (0, 0)
        #: Why nothing can be run any more.
        self._failure: LaunchError | None = None
        #: The nodes that get no more tasks, and why.
        self._aside: Mapping[str, str] = {}
        #: How it ended and what it did: the last word of a batch job's launcher.
        self.record: dict[str, object] = {}
        self._trust = Trust(
            lease, settings, guard, self._log, on_lost=lambda why: self._post(LeaseLost(reason=why))
        )
        #: What bounds the wait for an answer to a claim, once we are to leave.
        self._asking: asyncio.Timeout | None = None
        self._last_signal = -math.inf
        self._settlement = Settlement(
            lease=lease,
            recorder=self._recorder,
            trust=self._trust,
            spools=self._spools,
            log=self._log,
        )
        now = runtime.boottime_s()
        self._dispatcher = Dispatcher(self._runner.plan(), policy, now=now)
        self._tally = Tally(nodes=len(nodes), now=now)

    async def run(self) -> int:
        """Run tasks until time or work ends; return the exit status: 0 when the books are closed."""
        runtime.on_signals(self._on_signal)
        self._log.info("launcher.started", lease=self._lease.id, nodes=len(self._nodes))
        async with self._group:
            loops = [self._group.create_task(loop) for loop in self._loops()]
            self._post(WorkRang())
            leave = await self._work()
            self._log.info("launcher.leaving", reason=leave.reason)
            self._trust.let_go()  # nothing of ours runs: what is left is to report
            closing = self._group.create_task(self._runner.close())
            if not leave.is_lost:
                await self._tell_left_alone()
            is_closed = await self._settlement.run(leave, self._patience_s())
            if is_closed:
                await self._say_bye()
            await closing
            for worker in [*loops, *self._workers]:
                worker.cancel()
        summary = self._tally.summary()
        self.record |= {"reason": leave.reason, **summary}
        self._log.info("launcher.ended", **summary)
        if self._failure is not None:
            raise self._failure
        return 0 if is_closed else 1

    def _loops(self) -> list[Coroutine[Any, Any, None]]:
        bell = Listener(
            self._store.address,
            [listener.KILL, listener.WORK],
            self._on_ring,
            ping_s=min(15.0, self._settings.heartbeat_s),
        )
        return [
            bell.run(),
            self._recorder.run(),
            self._tick(),
            self._trust.run(),
            self._watch_kills(),
            self._watch_work(),
            self._reconcile(),
            self._reap(),
            self._tell(),
            self._runner.run(),
            self._watch_runner(),
        ]

    # ------------------------------------------------------------------ the loop

    def _post(self, event: Event) -> None:
        self._events.put_nowait(event)

    async def _work(self) -> Leave:
        """Take events and perform effects until the dispatcher says to leave."""
        while True:
            event: Event | None = await self._events.get()
            self._tally.pass_time(runtime.boottime_s(), self._dispatcher.busy_nodes)
            while event is not None:  # hundreds come at once
                if isinstance(event, CouldNotStart):
                    event = self._check_site(event)
                effects = self._dispatcher.handle(event)
                self._log.debug("event.handled", what=event, effects=effects)
                for effect in effects:
                    if isinstance(effect, Leave):
                        return effect
                    self._perform(effect)
                if isinstance(event, PilotJoined):
                    self._learn_resources(event)
                event = None if self._events.empty() else self._events.get_nowait()

    def _check_site(self, event: CouldNotStart) -> Event:
        """Leave when the whole site is gone: no task is to fail for that."""
        if os.path.isdir(self._site):
            return event
        if self._failure is None:
            self._failure = LaunchError(f"the site's directory {self._site} is not there")
            self._post(DrainAsked(reason=str(self._failure)))
        return Skipped(id=event.id, attempt=event.attempt, at=event.at)

    def _learn_resources(self, event: PilotJoined) -> None:
        """Put on record what the largest node has, once pilots tell."""
        known = (max(self._largest[0], event.node.cores), max(self._largest[1], event.node.gpus))
        if known != self._largest:
            self._largest = known
            self._spawn(self._tell_resources())

    async def _tell_resources(self) -> None:
        await self._try(self._lease.set_resources(*self._largest))

    def _perform(self, effect: Effect) -> None:  # noqa: C901, PLR0912 - a line an effect
        match effect:
            case Ask(room):
                self._spawn(self._ask(room))
            case Announce():
                self._spawn(self._announce(effect))
            case Launch(claim) if self._trust.is_over:  # we stood still: others may have it soon
                now = runtime.utc_now()
                self._post(Skipped(id=claim.id, attempt=claim.attempt, at=now))
            case Launch():
                self._runner.launch(effect)
            case SetAside(nodes):
                self._set_aside(nodes)
            case Terminate(task_id, is_forced):
                self._runner.terminate(task_id, is_forced=is_forced)
            case Recall(pairs):
                self._runner.recall(pairs)
            case RecordStart(start):
                self._recorder.add_start(start)
            case RecordEnd(end):
                self._record_end(end)
            case MarkTimedOut(pairs):
                self._spawn(self._mark(lambda: self._lease.time_out(pairs)))
            case MarkDrained(reason):
                self._log.info("launcher.draining", reason=reason)
                runtime.hasten(self._asking, TICK_S)
                self._spawn(self._mark(lambda: self._lease.drain(reason)))
            case AskProspect():
                self._spawn(self._ask_prospect())
            case AskHeld():
                asyncio.get_running_loop().call_later(_TELL_S, self._doubt.set)
            case Leave():
                raise AssertionError("the loop ends there")
            case _:
                assert_never(effect)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        worker = self._group.create_task(work)
        self._workers.add(worker)
        worker.add_done_callback(self._workers.discard)

    # ------------------------------------------------------------------ effects

    async def _ask(self, room: Room | SlotRoom) -> None:
        try:
            at_most_s = TICK_S if self._dispatcher.is_leaving else None
            async with asyncio.timeout(at_most_s) as self._asking:
                claims = await self._try(self._claim(room))
        except TimeoutError:
            claims = None  # what it may yet hand out is given back when the lease is closed
        finally:
            self._asking = None
        if claims is None:
            self._post(ClaimFailed())
            self._doubt.set()
        else:
            self._post(Claimed(claims=tuple(claims)))

    async def _claim(self, room: Room | SlotRoom) -> list[Claim]:
        if self._wf_filter is not None and self._is_filter_stale:
            self._is_filter_stale = False  # first: a ring meanwhile makes it stale again
            try:
                self._workflows = await self._store.workflow_ids(self._wf_filter)
            except StoreUnavailableError:
                self._is_filter_stale = True
                raise
        return await self._lease.claim(room, self._workflows)

    async def _announce(self, effect: Announce) -> None:
        """Have a start on record before it is made."""
        who = {"id": effect.id, "attempt": effect.attempt}
        start = Start(**who, at=runtime.utc_now(), nodes=effect.nodes)
        if await self._recorder.write_start(start):
            self._post(Announced(**who))
        else:
            self._post(Skipped(**who, at=runtime.utc_now()))

    def _set_aside(self, nodes: Mapping[str, str]) -> None:
        for node in self._aside.keys() - nodes.keys():
            self._log.warning("node.readmitted", node=node, reason="others fail as well")
        for node in nodes.keys() - self._aside.keys():
            self._log.error("node.set_aside", node=node, reason=nodes[node])
        self._aside = nodes
        self.record["set_aside"] = dict(nodes)
        self._spawn(self._tell_aside())

    async def _tell_aside(self) -> None:
        await self._try(self._lease.set_aside(self._aside))

    def _record_end(self, end: End) -> None:
        self._recorder.add_end(end)
        self._tally.count(end)
        if end.outcome is Outcome.ERROR and self._tally.ended - self._tally.done <= _FAILURES_SHOWN:
            self._log.warning("task.failed", task=end.id, cause=str(end.cause), reason=end.reason)

    async def _mark(self, mark: Callable[[], Coroutine[Any, Any, int]]) -> None:
        """Write RUN_TIMEOUT for what runs, after the starts that are still on their way."""
        try:
            async with asyncio.timeout(TICK_S / 2):
                await self._recorder.flush()
        except TimeoutError:
            pass  # their end reports will say the same
        marked = await self._try(mark())
        self._log.info("tasks.timed_out", tasks=marked)
        self._written.set()

    async def _ask_prospect(self) -> None:
        await self._recorder.flush()  # what ended may set others free
        # Nothing runs: what we hold was claimed and the answer lost, and is to be given back first.
        held = await self._try(self._lease.held())
        if held:
            self._doubt.set()
        found = await self._try(
            self._lease.has_prospect(
                self._workflows,
                self._dispatcher.nodes,
                is_serial=self._job_mode is JobMode.SERIAL,
            )
        )
        has_none = held is not None and not held and found is False
        self._post(ProspectTold(has_prospect=not has_none))

    async def _try(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Return what the store answers; None, and what follows of it, when it does not."""
        try:
            return await runtime.detached(work)
        except LeaseLostError as error:
            self._post(LeaseLost(reason=str(error)))
        except StoreUnavailableError as error:
            self._log.warning("store.lost", error=str(error))
            if isinstance(error, OutcomeUnknownError):
                self._doubt.set()
        return None

    # ------------------------------------------------------------------ loops

    async def _tick(self) -> None:
        shown = 0
        while True:
            await asyncio.sleep(TICK_S)
            self._post(Ticked(now=runtime.boottime_s()))
            if self._trust.is_over and not self._dispatcher.is_leaving:
                # Others may take our tasks soon: end them now, while nobody can have started them.
                self._log.error("lease.not_trusted")
                runtime.hasten(self._asking, 0)
                self._post(DrainAsked(reason="the lease was not renewed for too long"))
                self._post(DrainAsked(reason="the lease was not renewed for too long"))
            if self._tally.ended != shown:
                shown = self._tally.ended
                self._log.info(
                    "launcher.progress",
                    running=self._dispatcher.running,
                    done=self._tally.done,
                    not_done=shown - self._tally.done,
                )

    def _on_ring(self, channel: str) -> None:
        if channel in (listener.KILL, listener.RESYNC):
            self._kill_rang.set()
        if channel in (listener.WORK, listener.RESYNC):
            self._work_rang.set()
        if channel == listener.RESYNC:
            self._doubt.set()

    async def _watch_kills(self) -> None:
        """Read the kill set when the bell rings, and now and then in case it did not."""
        while True:
            await _rung(self._kill_rang, self._settings.poll_s)
            doomed = await self._try(self._lease.doomed())
            if doomed:
                self._post(KillAsked(pairs=frozenset(doomed)))

    async def _watch_work(self) -> None:
        while True:
            await _rung(self._work_rang, self._settings.poll_s)
            self._is_filter_stale = True
            self._post(WorkRang())
            await asyncio.sleep(_RING_S)

    async def _reconcile(self) -> None:
        """Compare what we hold with what the store says, when in doubt and every few minutes."""
        wait_s = self._settings.reconcile_s
        while True:
            is_doubtful = await _rung(self._doubt, wait_s)
            # What was cut off may be committed a little later.
            wait_s = (
                min(_LATE_S, self._settings.reconcile_s)
                if is_doubtful
                else self._settings.reconcile_s
            )
            known = self._dispatcher.known | self._recorder.pending
            made = self._dispatcher.claims_made
            held = await self._try(self._lease.held())
            if held is not None:
                self._post(Reconciled(held=frozenset(held), known=known, claims_made=made))

    async def _reap(self) -> None:
        period_s = max(0.5, min(30.0, self._settings.lease_ttl_s / 4))
        while True:
            await asyncio.sleep(period_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            try:
                await self._try(reap(self._store, self._spools, own_lease=self._lease.id))
            except runtime.SHORTAGE as error:
                self._log.warning("reap.failed", error=str(error))

    async def _tell(self) -> None:
        """Ring for watchers and other launchers after what was written, not too often."""
        while True:
            await self._written.wait()
            self._written.clear()
            await self._try(self._store.ring())
            await asyncio.sleep(_TELL_S)

    async def _watch_runner(self) -> None:
        """Leave when nothing can be run any more."""
        error = await self._runner.failed()
        self._failure = error
        self._post(DrainAsked(reason=str(error).partition("\n")[0]))

    def _on_signal(self, name: str) -> None:
        now = runtime.boottime_s()
        if now - self._last_signal >= _SAME_SIGNAL_S:
            self._last_signal = now
            self._post(DrainAsked(reason=f"received {name}"))
            self._settlement.hurry()

    # ------------------------------------------------------------------ the end

    async def _tell_left_alone(self) -> None:
        """Say which tasks could run, and not here."""
        try:
            async with asyncio.timeout(TICK_S):
                found = await self._try(
                    self._lease.left_alone(self._dispatcher.whole, self._workflows)
                )
        except TimeoutError:
            return
        for why, tasks in (found or {}).items():
            self._log.warning("tasks.left_alone", tasks=tasks, why=_UNFIT[why])
        if found:
            self.record["left_alone"] = {_UNFIT[why]: tasks for why, tasks in found.items()}

    def _patience_s(self) -> float | None:
        """Return how long to wait for the last answers: not much longer than the allocation lasts."""
        if self._policy.deadline is None:
            return None
        left_s = self._policy.deadline - runtime.boottime_s()
        return max(left_s + self._settings.margin_s / 2, 10.0)

    async def _say_bye(self) -> None:
        """Let the guard go, and tell whoever waits for what we gave back."""
        if self._guard is not None:
            self._guard.bye()
        await self._try(self._store.ring())


async def _rung(bell: asyncio.Event, at_most_s: float) -> bool:
    """Wait for a ring, or for the safety net; tell whether it rang."""
    rang = await runtime.until(bell, at_most_s)
    bell.clear()
    return rang
