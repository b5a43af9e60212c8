"""The launcher's brain: events in, effects out. No await, no clock, no database in this file.

`Dispatcher.handle` takes in what happened and returns what to do, in order. The shell
(service/launcher.py) does it; what comes of an effect is the next event:

    Ask        -> Claimed | ClaimFailed
    Launch     -> Started, then Ended | CouldNotStart | Skipped; or PilotLost
    Announce   -> Announced
    Terminate  -> the Ended (or Skipped) of that task
    Recall     -> Skipped, for those that had not started
    AskProspect-> ProspectTold
    AskHeld    -> Reconciled
    RecordStart, RecordEnd, MarkTimedOut, MarkDrained, SetAside, Leave -> nothing

A task is in the book from Claimed until nothing of it runs any more (Ended); only then are its
nodes free and its hold reported for release. Time is what the last Ticked said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import assert_never

import msgspec

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
    Ended,
    Event,
    KillAsked,
    Launch,
    LeaseLost,
    Leave,
    MarkDrained,
    MarkTimedOut,
    NodesGone,
    Pair,
    PilotJoined,
    PilotLost,
    PilotSilent,
    ProspectTold,
    Recall,
    Reconciled,
    RecordEnd,
    RecordStart,
    SetAside,
    Skipped,
    Started,
    Terminate,
    Ticked,
    WorkRang,
)
from ensemble.core.health import Health
from ensemble.core.holding import Holding
from ensemble.core.model import Claim, End, Outcome, Placement, Room, SlotRoom, Start
from ensemble.core.packing import SlotBook
from ensemble.core.plan import Plan
from ensemble.core.runs import (
    Ending,
    Run,
    end_of,
    failed_start,
    lost_with_node,
    may_be_schedulers,
)
from ensemble.core.shares import Shares

#: An MPI launcher that runs for so long has started its program.
_SURE = timedelta(seconds=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a dispatcher goes by. All in seconds; instants are monotonic."""

    #: How many nodes there are, or will be.
    nodes: int = 1
    #: When everything must have been ended; None is never.
    deadline: float | None = None
    min_useful_s: float = 60.0
    idle_timeout_s: float = 60.0
    is_persistent: bool = False
    poll_s: float = 10.0
    #: How long an exit by signal waits for a drain that explains it; 0 outside batch jobs.
    signal_hold_s: float = 0.0


class Dispatcher:
    """Decides for one launcher which tasks run where, and when it leaves."""

    def __init__(self, plan: Plan, policy: Policy, *, now: float) -> None:
        self._plan = plan
        self._policy = policy
        self._now = now
        self._runs: dict[int, Run] = {}
        #: Of these, suspects whose start is not on record yet: they are not launched.
        self._unannounced: dict[int, Claim] = {}
        self._holding = Holding(policy.signal_hold_s)
        self._health = Health(policy.nodes)
        #: The nodes that the plan has set aside.
        self._aside: frozenset[str] = frozenset()
        self._is_claiming = False
        #: Something changed since we asked: an empty answer is not the last word.
        self._ask_again = False
        #: The last question failed: the next one waits for a tick.
        self._is_store_away = False
        #: Killed while the store's answer was on its way: may be in it.
        self._killed_unseen: set[Pair] = set()
        self._last_ask = now
        self._idle_since: float | None = now
        self._is_asking_prospect = False
        #: Nothing is left to do, it seems: an empty answer is the last word.
        self._is_last_look = False
        self._leaving: str | None = None
        self._is_gone = False
        self._is_lost = False
        self.claims_made = 0

    @property
    def known(self) -> frozenset[Pair]:
        """The attempts that we hold: running, claimed ahead, or ended and held back."""
        runs = [(run.id, run.attempt) for run in self._runs.values()]
        return self._plan.kept.union(runs, self._holding.pairs, self._health.pairs)

    @property
    def running(self) -> int:
        """How many tasks are starting or running."""
        return len(self._runs)

    @property
    def busy_nodes(self) -> float:
        """How many nodes' worth is taken."""
        return self._plan.busy

    @property
    def nodes(self) -> int:
        """How many nodes there are, now."""
        return self._plan.total

    @property
    def whole(self) -> Room | SlotRoom:
        """The room there is when nothing runs, for the time that is left."""
        left_s = self._left_s()
        return self._plan.whole(None if left_s is None else max(left_s, 0.0))

    @property
    def is_leaving(self) -> bool:
        """Whether no task will be started any more."""
        return self._leaving is not None

    def handle(self, event: Event) -> list[Effect]:  # noqa: C901, PLR0912, PLR0915 - a line an event
        """Take in one event; return what to do, in order."""
        if self._is_gone:
            return []
        match event:
            case Ended():
                effects = self._ended(event)
            case Announced():
                effects = self._announced(event)
            case Started():
                effects = self._started(event)
            case Claimed():
                effects = self._claimed(event)
            case ClaimFailed():
                self._is_claiming = self._is_last_look = False
                self._is_store_away = True
                self._killed_unseen.clear()
                effects = []
            case WorkRang():
                self._ask_again = self._is_claiming
                effects = self._refill()
            case CouldNotStart():
                effects = self._could_not_start(event)
            case Skipped():
                effects = self._skipped(event)
            case PilotJoined() | PilotSilent() | PilotLost():
                effects = self._pilot(event)
            case NodesGone(names=names, reason=reason):
                effects = self._give_up(reason, *names)
            case KillAsked():
                effects = self._kill(event.pairs)
            case Ticked():
                effects = self._ticked(event.now)
            case DrainAsked():
                effects = self._drain(event.reason)
            case ProspectTold():
                effects = self._prospect_told(has_prospect=event.has_prospect)
            case Reconciled():
                effects = self._reconcile(event)
            case LeaseLost():
                effects = self._lose(event.reason)
            case _:
                assert_never(event)
        return [*effects, *self._maybe_leave()]

    def validate(self) -> None:
        """Raise AssertionError unless the invariants hold."""
        self._plan.validate(self._runs.keys())
        assert all(run.id == task_id for task_id, run in self._runs.items())
        held = [*self._runs, *(task_id for task_id, _ in self._plan.kept)]
        assert len(held) == len(set(held)), "a task is held twice"
        ended = {*self._holding.pairs, *self._health.pairs}
        assert ended.isdisjoint((run.id, run.attempt) for run in self._runs.values())
        assert self._unannounced.keys() <= self._runs.keys(), "what was given up is to be launched"
        assert not (self._is_gone and held), "left with tasks"

    # ------------------------------------------------------------------ taking work

    def _refill(self) -> list[Effect]:
        """Start what was kept, and ask for work for what is free, one question at a time."""
        if self.is_leaving:
            return []
        if not self._has_time():
            return self._give_back(*self._plan.clear())
        effects: list[Effect] = []
        while (found := self._plan.pop()) is not None:
            claim, placement = found
            effects += self._launch(claim, placement)
        if self._is_claiming:
            # A task that was too wide for what we asked for may fit now.
            self._ask_again = self._ask_again or self._plan.is_roomier()
            return effects
        if self._is_store_away:
            self._ask_again = True
            return effects
        room = self._plan.room(self._left_s())
        if room is None:
            return effects
        self._is_claiming = True
        self._ask_again = False
        self._last_ask = self._now
        return [*effects, Ask(room)]

    def _claimed(self, event: Claimed) -> list[Effect]:
        self._is_claiming = False
        self.claims_made += 1
        effects: list[Effect] = []
        for claim in event.claims:
            if (claim.id, claim.attempt) in self._killed_unseen:
                effects += self._give_back(claim)
            else:
                effects += self._place(claim)
        self._killed_unseen.clear()
        if event.claims or self._ask_again:
            effects += self._refill()
        elif self._is_last_look and not self.is_leaving:
            self._leaving = "no work is left"
        self._is_last_look = False
        return [*effects, *self._consider_leaving()]

    def _place(self, claim: Claim) -> list[Effect]:
        """Launch a claimed task where there is room; else keep it for later, or give it back."""
        if not self.is_leaving and claim.id not in self._runs:
            placement = self._plan.place(claim)
            if placement is not None:
                return self._launch(claim, placement)
            if self._plan.keep(claim):
                return []
        return self._give_back(claim)

    def _launch(self, claim: Claim, placement: Placement) -> list[Effect]:
        self._runs[claim.id] = Run.of(claim, placement)
        self._idle_since = None
        if claim.is_suspect:
            self._unannounced[claim.id] = claim
            return [Announce(claim.id, claim.attempt, placement.names)]
        return [Launch(claim, placement)]

    def _announced(self, event: Announced) -> list[Effect]:
        run = self._run(event.id, event.attempt)
        if run is None or event.id not in self._unannounced:
            return []
        return [Launch(self._unannounced.pop(event.id), run.placement)]

    def _give_back(self, *claims: Claim | Run, at: datetime | None = None) -> list[Effect]:
        """Report claims that were never started; without the lease there is nothing to give back."""
        if self._is_lost:
            return []
        return [
            RecordEnd(End(id=claim.id, attempt=claim.attempt, outcome=Outcome.GIVEN_BACK, at=at))
            for claim in claims
        ]

    # ------------------------------------------------------------------ nodes that come and go

    def _pilot(self, event: PilotJoined | PilotSilent | PilotLost) -> list[Effect]:
        assert isinstance(self._plan, Shares)
        match event:
            case PilotSilent():
                self._plan.suspend(event.node)
                return []
            case PilotLost():
                effects = self._lose_tasks(self._plan.remove(event.node), event)
                if event.is_final:
                    effects += self._give_up(event.reason, event.node)
                return effects
            case PilotJoined():
                return self._use(event, self._plan)

    def _use(self, event: PilotJoined, plan: Shares) -> list[Effect]:
        """Take a node into the plan, as new."""
        effects = self._trust(event.node.name)
        plan.add(event.node, SlotBook(event.cores, event.gpus, event.memory_mb))
        if self._idle_since is not None:
            self._idle_since = self._now
        self._ask_again = self._is_claiming
        return [*effects, *self._refill()]

    def _trust(self, name: str) -> list[Effect]:
        """Begin anew with a node, whatever it did before."""
        self._health.trust(name)
        if name not in self._aside:
            return []
        self._aside -= {name}
        return [SetAside(dict(self._health.aside))]

    def _give_up(self, reason: str, *names: str) -> list[Effect]:
        """Give nodes that are gone for good no more tasks."""
        ends = [end for name in names for end in self._health.give_up(name, reason)]
        return [*map(RecordEnd, ends), *self._set_aside()]

    def _lose_tasks(self, had_place: Mapping[int, bool], event: PilotLost) -> list[Effect]:
        """Report what was on a lost node; in a batch job that ends, pilots are lost before we hear of it."""
        effects: list[Effect] = []
        for task_id in had_place:
            run = self._runs.pop(task_id)
            if self._unannounced.pop(task_id, None):
                effects += self._give_back(run)
                continue
            if run.started_at is None and had_place[task_id]:
                run.started_at = event.at  # it may have killed its pilot before that could tell
            if run.started_at is None and run.ending is Ending.DRAINED:
                effects += self._give_back(run)
                continue
            end = lost_with_node(run, event.at, event.reason)
            if run.ending is Ending.LOST:
                continue
            if run.ending is not None or self.is_leaving or not self._holding.take(end):
                effects.append(RecordEnd(end))
        if not self._runs and self._idle_since is None:
            self._idle_since = self._now
        return [*effects, *self._refill()]

    # ------------------------------------------------------------------ a task's life

    def _started(self, event: Started) -> list[Effect]:
        run = self._run(event.id, event.attempt)
        if run is None:
            return []
        run.started_at = event.at
        self._plan.started(event.id)
        if run.ending is Ending.LOST:
            return []
        start = Start(id=event.id, attempt=event.attempt, at=event.at, nodes=run.placement.names)
        return [RecordStart(start), *(self._runs_well(run) if event.is_certain else ())]

    def _could_not_start(self, event: CouldNotStart) -> list[Effect]:
        run = self._take_out(event.id, event.attempt)
        if run is None or run.ending is Ending.LOST:
            return self._refill()
        return [*self._fails(run, failed_start(run, event.at, event.reason)), *self._refill()]

    def _skipped(self, event: Skipped) -> list[Effect]:
        run = self._take_out(event.id, event.attempt)
        if run is None or run.ending is Ending.LOST:
            return self._refill()
        return [*self._give_back(run, at=event.at), *self._refill()]

    def _ended(self, event: Ended) -> list[Effect]:
        run = self._take_out(event.id, event.attempt)
        if run is None or run.ending is Ending.LOST:
            return self._refill()
        if event.start_error is not None and run.ending is None:
            end = failed_start(
                run, event.at, event.start_error, status=event.status, output=event.output
            )
            return [*self._fails(run, end), *self._refill()]
        run.started_at = event.started_at or run.started_at
        if run.started_at is not None:
            if event.at < run.started_at:  # two reports, each dated by its own age
                event = msgspec.structs.replace(event, at=run.started_at)
            self._plan.learn(run.num_nodes, (event.at - run.started_at).total_seconds())
        end = end_of(run, event, self._leaving)
        is_doubtful = event.lost or event.is_cut_off or may_be_schedulers(event.status)
        may_be_explained = run.ending is None and is_doubtful and not self.is_leaving
        is_held = may_be_explained and self._holding.take(end)
        effects: list[Effect] = [] if is_held else [RecordEnd(end)]
        if end.outcome is Outcome.DONE or event.started_at is not None:
            effects += self._runs_well(run)
        elif end.outcome is Outcome.LOST:
            self._health.loses(end)
            effects += self._set_aside()
        return [*effects, *self._refill()]

    def _runs_well(self, run: Run) -> list[Effect]:
        """Take in that a program runs; report the failures that were not these nodes' fault."""
        return [*map(RecordEnd, self._health.runs(run.program, run.placement.names))]

    def _fails(self, run: Run, end: End) -> list[Effect]:
        """Report a failed start, or hold it back: it may be the node that fails."""
        if self.is_leaving or run.ending is not None:
            return [RecordEnd(end)]
        effects = self._note_long_runs(run.program, end.at)
        effects += map(RecordEnd, self._health.fails(run.program, end))
        return [*effects, *self._set_aside()]

    def _set_aside(self) -> list[Effect]:
        """Do as health says, where it says something new: give some nodes no more tasks, or trust them again."""
        aside = self._health.aside
        if aside.keys() == self._aside:
            return []
        for name in self._aside - aside.keys():
            self._plan.readmit(name)
        new = aside.keys() - self._aside
        waiting = [pair for name in new for pair in self._plan.set_aside(name)]
        self._aside = frozenset(aside)
        effects: list[Effect] = [Recall(tuple(waiting))] if waiting else []
        return [*effects, SetAside(dict(aside))]

    def _note_long_runs(self, program: str, now: datetime | None) -> list[Effect]:
        """Take in that a program runs where its MPI launcher has not failed for so long."""
        if now is None or len(self._runs) > self._plan.total:
            return []  # where tasks share nodes, each start is certain
        effects: list[Effect] = []
        for run in self._runs.values():
            if run.program == program and run.started_at and now - run.started_at > _SURE:
                effects += self._runs_well(run)
        return effects

    def _run(self, task_id: int, attempt: int) -> Run | None:
        run = self._runs.get(task_id)
        return run if run is not None and run.attempt == attempt else None

    def _take_out(self, task_id: int, attempt: int) -> Run | None:
        run = self._run(task_id, attempt)
        if run is not None:
            del self._runs[task_id]
            self._unannounced.pop(task_id, None)
            self._plan.release(task_id)
            if not self._runs:
                self._idle_since = self._now
        return run

    # ------------------------------------------------------------------ ending tasks

    def _kill(self, pairs: frozenset[Pair]) -> list[Effect]:
        effects = self._give_back(*self._plan.take(pairs))
        if self._is_claiming:
            self._killed_unseen |= pairs
        for task_id, attempt in sorted(pairs):
            run = self._run(task_id, attempt)
            if run is not None and run.ending is None:
                effects += self._end(run, Ending.KILLED)
        return effects

    def _end(self, run: Run, ending: Ending, *, is_forced: bool = False) -> list[Effect]:
        """Have a task ended; one that was not launched is over at once."""
        run.ending = ending
        if run.id not in self._unannounced:
            return [Terminate(run.id, is_forced=is_forced)]
        self._take_out(run.id, run.attempt)
        if ending is Ending.LOST:
            return []
        if ending is Ending.DRAINED:
            return self._give_back(run)
        return [RecordEnd(lost_with_node(run, None, "it was not started"))]

    def _time_out(self) -> list[Effect]:
        due = []
        for run in self._runs.values():
            limit = run.time_limit_minutes
            if limit is None or run.started_at is None or run.ending is not None:
                continue
            if run.limit_at is None:
                run.limit_at = self._now + 60 * limit
            elif run.limit_at <= self._now:
                due.append(run)
        if not due:
            return []
        for run in due:
            run.ending = Ending.TIME_LIMIT
        pairs = tuple((run.id, run.attempt) for run in due)
        return [MarkTimedOut(pairs), *(Terminate(task_id) for task_id, _ in pairs)]

    def _drain(self, reason: str) -> list[Effect]:
        is_second = self.is_leaving
        self._leaving = self._leaving or reason
        effects: list[Effect] = [] if is_second else [MarkDrained(reason)]
        effects += self._give_back(*self._plan.clear())
        effects += map(RecordEnd, self._holding.explain(reason))
        effects += map(RecordEnd, self._health.clear())
        for run in list(self._runs.values()):
            if run.ending is None:
                effects += self._end(run, Ending.DRAINED, is_forced=is_second)
            elif is_second:
                effects.append(Terminate(run.id, is_forced=True))
        return effects

    def _lose(self, reason: str) -> list[Effect]:
        """Others may run our tasks: end them at once and report nothing."""
        if self._is_lost:
            return []
        self._leaving = reason
        self._holding.clear()
        self._health.clear()
        self._plan.clear()
        self._is_lost = True
        effects: list[Effect] = []
        for run in list(self._runs.values()):
            effects += self._end(run, Ending.LOST, is_forced=True)
        return effects

    # ------------------------------------------------------------------ time

    def _ticked(self, now: float) -> list[Effect]:
        self._now = now
        ends = [*self._holding.tick(now), *self._health.tick(now)]
        effects = [*map(RecordEnd, ends), *self._time_out()]
        effects += self._tick_plan()
        if self._is_over() and not self.is_leaving:
            return [*effects, *self._drain("the time of the allocation is over")]
        may_ask = self._is_store_away and self._ask_again
        self._is_store_away = False
        if may_ask or now - self._last_ask >= self._policy.poll_s:
            effects += self._refill()
        return [*effects, *self._consider_leaving()]

    def _tick_plan(self) -> list[Effect]:
        """Give back, or take back from pilots, what has waited too long or will not start any more."""
        kept, waiting = self._plan.tick(is_closing=self.is_leaving or not self._has_time())
        effects = self._give_back(*kept)
        return [*effects, Recall(tuple(waiting))] if waiting else effects

    def _left_s(self) -> float | None:
        return None if self._policy.deadline is None else self._policy.deadline - self._now

    def _has_time(self) -> bool:
        left_s = self._left_s()
        return left_s is None or left_s >= self._policy.min_useful_s

    def _is_over(self) -> bool:
        left_s = self._left_s()
        return left_s is not None and left_s <= 0

    def _consider_leaving(self) -> list[Effect]:
        """Leave when there is nothing to do, or no time to do anything more."""
        if self._runs or self._is_claiming or self.is_leaving or self._holding:
            return []
        if not self._has_time():
            self._leaving = "no time is left to start anything"
            return []
        if not self._health.is_any:
            self._leaving = "no node is left"
            return self._give_back(*self._plan.clear())
        if self._policy.is_persistent or self._is_asking_prospect or not self._is_long_idle():
            return []
        self._is_asking_prospect = True
        # Nothing runs that could tell whose fault the failed starts were.
        return [*map(RecordEnd, self._health.clear()), AskProspect()]

    def _is_long_idle(self) -> bool:
        if self._runs or self._is_claiming or self._holding or self._idle_since is None:
            return False
        if not self._plan.total:
            return False  # pilots are on their way
        return self._now - self._idle_since >= self._policy.idle_timeout_s

    def _prospect_told(self, *, has_prospect: bool) -> list[Effect]:
        self._is_asking_prospect = False
        if has_prospect and not self._runs:
            self._idle_since = self._now
        elif self._is_long_idle() and not self.is_leaving:  # still: work may have come and gone
            # What ended last may have set tasks free after we had asked for work.
            effects = self._refill()
            self._is_last_look = self._is_claiming
            return effects
        return []

    def _maybe_leave(self) -> list[Effect]:
        if self._leaving is None or self._is_gone or self._runs or self._is_claiming:
            return []
        self._is_gone = True
        ends = map(RecordEnd, self._health.clear())
        return [*ends, Leave(self._leaving, is_lost=self._is_lost)]

    # ------------------------------------------------------------------ agreement with the store

    def _reconcile(self, event: Reconciled) -> list[Effect]:
        """Give back what was handed out and never reached us; end what is not ours any more."""
        if self._is_lost:
            return []
        effects: list[Effect] = []
        strange = sorted(event.held - event.known - self.known)
        if strange and (self._is_claiming or event.claims_made != self.claims_made):
            effects.append(AskHeld())  # they may be in an answer that is on its way
        else:
            for task_id, attempt in strange:
                end = End(id=task_id, attempt=attempt, outcome=Outcome.GIVEN_BACK)
                effects.append(RecordEnd(end))
        gone = (event.known & self.known) - event.held
        self._plan.take(gone)
        for task_id, attempt in sorted(gone):
            run = self._run(task_id, attempt)
            if run is not None and run.ending is not Ending.LOST:
                effects += self._end(run, Ending.LOST, is_forced=True)
        return effects
