"""The whole brain against a small model of its world, under any order of events that can occur.

The model keeps what the shell and the store keep: a queue of events, answers on their way, reports
not yet written, processes. `World` checks every effect as it comes; the test checks the end.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from hypothesis import HealthCheck, given, settings, strategies as st

from ensemble.core.dispatch import Dispatcher, Policy
from ensemble.core.events import (
    Announce,
    Announced,
    Ask,
    AskProspect,
    Claimed,
    ClaimFailed,
    CouldNotStart,
    DrainAsked,
    Ended,
    KillAsked,
    Launch,
    LeaseLost,
    Leave,
    MarkDrained,
    MarkTimedOut,
    ProspectTold,
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
from ensemble.core.model import Claim, Node, Outcome, Room
from ensemble.core.wholenodes import WholeNodes

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
STATUSES = (0, 0, 1, 143, 137, 130)


@dataclass
class Row:
    """A task in the store."""

    id: int
    width: int
    limit: float | None
    state: str = "runnable"  # or running, timeout, killed, done
    attempt: int = 0
    is_held: bool = False
    tries_left: int = 2
    is_suspect: bool = False

    @property
    def pair(self):
        return self.id, self.attempt


@dataclass
class Proc:
    """What the shell knows of a launched task."""

    claim: Claim
    nodes: tuple[str, ...]
    is_running: bool = False
    is_doomed: bool = False
    was_signalled: bool = False
    is_posted: bool = False  # its last event is in the queue: nothing of it is left
    began: float = 0.0


@dataclass
class World:
    nodes: int
    policy: Policy
    is_quick: bool = False
    now: float = 100.0
    rows: dict[int, Row] = field(default_factory=dict)
    queue: deque = field(default_factory=deque)
    asked: Room | None = None
    committed: list[Claim] | None = None
    lease_is_gone: bool = False
    loss_is_told: bool = False
    procs: dict[int, Proc] = field(default_factory=dict)
    announced: dict[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)
    on_record: set = field(default_factory=set)
    aside: set[str] = field(default_factory=set)
    reports: dict = field(default_factory=dict)
    prospect_asked: bool = False
    reconciling: tuple | None = None
    doomed: frozenset | None = None
    delivered: set = field(default_factory=set)
    revoked: set = field(default_factory=set)
    ends: Counter = field(default_factory=Counter)
    starts: Counter = field(default_factory=Counter)
    left: Leave | None = None

    def __post_init__(self):
        names = [Node(name=f"n{i}", cores=4) for i in range(self.nodes)]
        self.brain = Dispatcher(WholeNodes(names), self.policy, now=self.now)
        self.queue.append(WorkRang())

    # ---------------------------------------------------------------- effects

    def handle(self):
        """Let the brain take the next event, and perform what it says."""
        if not self.queue or self.left:
            return
        event = self.queue.popleft()
        if isinstance(event, Claimed):
            self.delivered |= {(c.id, c.attempt) for c in event.claims}
        if isinstance(event, LeaseLost):
            self.loss_is_told = True
        if isinstance(event, Ended | Skipped | CouldNotStart):
            self.procs.pop(event.id, None)  # none of a suspect that was refused
        effects = self.brain.handle(event)
        self.brain.validate()
        for effect in effects:
            assert self.left is None, "an effect after Leave"
            self.perform(effect)

    def perform(self, effect):  # noqa: C901 - a line an effect
        match effect:
            case Ask(room):
                assert self.asked is None, "two questions at a time"
                assert not self.brain.is_leaving
                assert 0 <= room.nodes <= self.nodes
                assert room.max_tasks > 0
                assert room.left_s is None or room.left_s >= self.policy.min_useful_s
                self.asked = room
            case Launch(claim, placement):
                assert claim.id not in self.procs, "launched twice at once"
                taken = {name for proc in self.procs.values() for name in proc.nodes}
                assert not taken & set(placement.names), "a node over-committed"
                assert len(placement.nodes) == claim.num_nodes
                assert (claim.id, claim.attempt) not in self.ends
                assert not self.aside & set(placement.names) or claim.is_suspect
                assert not claim.is_suspect or (claim.id, claim.attempt) in self.on_record
                self.procs[claim.id] = Proc(claim, placement.names)
            case Terminate(task_id):
                proc = self.procs[task_id]
                proc.is_doomed = True
                proc.was_signalled = proc.was_signalled or (proc.is_running and not proc.is_posted)
            case Announce(task_id, attempt, nodes):
                assert self.rows[task_id].is_suspect
                taken = {name for proc in self.procs.values() for name in proc.nodes}
                assert not (taken | self.aside) & set(nodes)
                self.announced[task_id, attempt] = nodes
            case SetAside(nodes):
                self.aside = set(nodes)
                assert len(self.aside) < self.nodes
            case RecordStart(start):
                assert not self.loss_is_told
                self.starts[start.id, start.attempt] += 1
            case RecordEnd(end):
                assert not self.loss_is_told, "reported without a lease"
                self.ends[end.id, end.attempt] += 1
                self.reports[end.id, end.attempt] = end
            case MarkTimedOut(pairs):
                for row in self.rows.values():
                    if row.is_held and row.pair in pairs and row.state == "running":
                        row.state = "timeout"
            case MarkDrained():
                for row in self.rows.values():
                    if row.is_held and row.state == "running":
                        row.state = "timeout"
            case AskProspect():
                assert not self.prospect_asked
                self.prospect_asked = True
            case Leave():
                assert not self.procs, "left with processes"
                assert self.asked is None, "left with a claim on its way"
                self.left = effect

    # ---------------------------------------------------------------- what happens

    def add(self, n):
        task_id = len(self.rows) + 1
        limit = (None, None, 0.05)[n % 3]
        width = 1 + n % 4 if n % 3 == 0 else 1
        self.rows[task_id] = Row(task_id, width=width, limit=limit, is_suspect=n % 5 == 4)
        self.queue.append(WorkRang())

    def commit(self, _n):
        """The store hands tasks out, as its `claim_tasks` does; the answer is on its way."""
        if self.asked is None or self.committed is not None:
            return
        self.committed = []
        if self.lease_is_gone:
            return
        room = self.asked
        free = room.nodes + room.ahead
        ready = [r for r in self.rows.values() if r.state == "runnable" and not r.is_held]
        for row in sorted(ready, key=lambda row: (-row.width, row.id)):
            fits = free > 0 and row.width <= max(free - room.ahead, 1)
            if fits and len(self.committed) < room.max_tasks:
                free -= row.width
                row.is_held, row.attempt = True, row.attempt + 1
                self.committed.append(
                    Claim(
                        id=row.id,
                        attempt=row.attempt,
                        name="t",
                        workflow="",
                        app=None,
                        argv=("t",),
                        workdir="d",
                        num_nodes=row.width,
                        time_limit_minutes=row.limit,
                        is_suspect=row.is_suspect,
                    )
                )

    def answer(self, n):
        if self.committed is None:
            return
        claims, self.committed, self.asked = tuple(self.committed), None, None
        if self.lease_is_gone:
            self.queue += [LeaseLost(reason="reaped"), ClaimFailed()]
        else:
            self.queue.append(ClaimFailed() if n % 5 == 0 else Claimed(claims=claims))

    def fail_ask(self, _n):
        if self.asked is not None and self.committed is None:
            self.asked = None
            self.queue.append(ClaimFailed())

    def announce(self, n):
        """A start is on record, or the store says that it is not ours."""
        if not self.announced:
            return
        (task_id, attempt), _ = pair, _ = sorted(self.announced.items())[n % len(self.announced)]
        del self.announced[pair]
        row = self.rows[task_id]
        if row.is_held and row.pair == pair:
            row.state = "running" if row.state == "runnable" else row.state
            self.on_record.add(pair)
            self.queue.append(Announced(id=task_id, attempt=attempt))
        else:
            self.queue.append(Skipped(id=task_id, attempt=attempt, at=self.time))

    def _proc(self, n, *, is_running):
        found = [p for p in self.procs.values() if p.is_running is is_running and not p.is_posted]
        return found[n % len(found)] if found else None

    def start(self, n):
        proc = self._proc(n, is_running=False)
        if proc is None:
            return
        who = {"id": proc.claim.id, "attempt": proc.claim.attempt, "at": self.time}
        if proc.is_doomed:
            proc.is_posted = True
            self.queue.append(Skipped(**who))
        elif n % 7 == 6:
            proc.is_posted = True
            self.queue.append(CouldNotStart(reason="no such file", **who))
        else:
            proc.is_running, proc.began = True, self.now
            row = self.rows[proc.claim.id]
            if row.is_held and row.pair == (proc.claim.id, proc.claim.attempt):
                row.state = "running" if row.state == "runnable" else row.state
            self.queue.append(Started(**who))

    def end(self, n):
        proc = self._proc(n, is_running=True)
        if proc is None:
            return
        proc.is_posted = True
        status = 143 if proc.was_signalled and n % 3 else STATUSES[n % len(STATUSES)]
        took = timedelta(seconds=0.02 if self.is_quick else 5)
        self.queue.append(
            Ended(
                id=proc.claim.id,
                attempt=proc.claim.attempt,
                at=EPOCH + timedelta(seconds=proc.began) + took,
                status=status,
                was_signalled=proc.was_signalled,
                start_error="no such host" if status == 1 and n % 2 == 0 else None,
            )
        )

    @property
    def time(self):
        return EPOCH + timedelta(seconds=self.now)

    def write(self, _n):
        """The reports reach the store."""
        became_ready = False
        for pair, end in self.reports.items():
            row = self.rows[pair[0]]
            if self.lease_is_gone or not row.is_held or row.pair != pair:
                continue
            row.is_held = False
            if row.state == "killed":
                continue
            if end.outcome is Outcome.GIVEN_BACK:
                became_ready = True
            elif end.outcome is Outcome.DONE or row.tries_left == 0:
                row.state = "done"
            else:
                row.state, row.tries_left, became_ready = "runnable", row.tries_left - 1, True
        self.reports.clear()
        if became_ready:
            self.queue.append(WorkRang())

    def kill(self, n):
        rows = [r for r in self.rows.values() if r.state not in ("killed", "done")]
        if rows:
            rows[n % len(rows)].state = "killed"

    def read_doomed(self, _n):
        self.doomed = frozenset(
            row.pair
            for row in self.rows.values()
            if row.is_held and row.state in ("killed", "timeout") and not self.lease_is_gone
        )

    def tell_doomed(self, _n):
        if self.doomed is not None:
            self.queue.append(KillAsked(pairs=self.doomed))
            self.doomed = None

    def reconcile(self, _n):
        if self.reconciling is None:
            self.reconciling = (self.brain.known | self.reports.keys(), self.brain.claims_made)
        elif len(self.reconciling) == 2:
            held = frozenset(row.pair for row in self.rows.values() if row.is_held)
            self.reconciling = (*self.reconciling, held)
        else:
            known, made, held = self.reconciling
            self.queue.append(Reconciled(held=held, known=frozenset(known), claims_made=made))
            self.reconciling = None
            while any(isinstance(event, Reconciled) for event in self.queue):
                self.handle()
                if self.left:
                    return

    def revoke(self, n):
        """Somebody edits the store by hand."""
        rows = [
            self.rows[i] for i, p in self.procs.items() if self.rows[i].is_held and p.is_running
        ]
        if rows:
            row = rows[n % len(rows)]
            self.revoked.add(row.pair)
            row.is_held, row.state = False, "runnable"

    def tick(self, n):
        self.now += (1, 1, 3, 11, 40)[n % 5]
        self.queue.append(Ticked(now=self.now))

    def foresee(self, n):
        if self.prospect_asked:
            self.prospect_asked = False
            self.queue.append(ProspectTold(has_prospect=n % 2 == 0))

    def drain(self, _n):
        self.queue.append(DrainAsked(reason="TERM"))

    def lose(self, _n):
        if not self.lease_is_gone:
            self.lease_is_gone = True
            for row in self.rows.values():
                if row.is_held:
                    row.is_held = False
            self.queue.append(LeaseLost(reason="reaped"))

    # ---------------------------------------------------------------- a calm end

    def settle(self):  # noqa: C901 - a line for each thing that may be next
        """Let everything happen that is under way, and nothing else; no time passes."""
        for _ in range(2000):
            if self.left:
                return
            if self.queue:
                self.handle()
            elif self.asked is not None:
                self.commit(0)
                self.answer(1)
            elif self.announced:
                self.announce(0)
            elif (proc := self._proc(0, is_running=False)) is not None:
                self.start(0)
            elif (proc := self._proc(0, is_running=True)) is not None:
                self.end(1 if proc.was_signalled else 0)
            elif self.reports:
                self.write(0)
            else:
                return
        raise AssertionError("it never comes to rest")

    def check_nothing_left_out(self):
        ready = [r for r in self.rows.values() if r.state == "runnable" and not r.is_held]
        has_time = self.policy.deadline is None or (
            self.policy.deadline - self.now >= self.policy.min_useful_s
        )
        if has_time and not self.brain.is_leaving:
            nodes = self.nodes - len(self.aside)
            assert not [r for r in ready if r.width <= nodes], "a task that fits is left"


def rest(_world, _n):
    """Nothing happens: what a failing example shrinks to."""


ACTIONS = (
    [rest]
    + [World.add, World.commit, World.answer, World.start, World.end, World.write] * 3
    + [World.announce] * 2
    + [World.tick, World.reconcile, World.kill, World.read_doomed, World.tell_doomed] * 2
    + [World.fail_ask, World.foresee, World.revoke]
)
STEPS = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 839), st.sampled_from((0, 1, 1, 2, 9))),
    min_size=80,
    max_size=120,
)
#: Whether, and when, it is drained or loses its lease.
FATES = st.tuples(st.sampled_from((None, None, World.drain, World.lose)), st.integers(0, 80))
POLICIES = st.builds(
    Policy,
    deadline=st.sampled_from((None, None, 160.0)),
    min_useful_s=st.just(20.0),
    idle_timeout_s=st.just(30.0),
    poll_s=st.sampled_from((1.0, 10.0)),
    signal_hold_s=st.sampled_from((0.0, 2.0)),
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    nodes=st.integers(1, 4),
    tasks=st.integers(0, 12),
    is_quick=st.booleans(),
    policy=POLICIES,
    steps=STEPS,
    fate=FATES,
)
def test_whatever_happens_tasks_are_run_once_reported_once_and_the_launcher_leaves(
    nodes, tasks, is_quick, policy, steps, fate
):
    world = World(nodes, replace(policy, nodes=nodes), is_quick)
    for n in range(tasks):
        world.add(n)
    blow, moment = fate
    for place, (action, n, handled) in enumerate(steps):
        if world.left:
            break
        action(world, n)
        if place == moment and blow is not None:
            blow(world, n)
        for _ in range(handled):
            world.handle()

    calm(world)

    assert world.left is not None, "it never leaves"
    assert world.left.is_lost == world.loss_is_told
    assert world.brain.handle(Ticked(now=1e6)) == []
    assert world.brain.handle(LeaseLost(reason="late")) == []
    assert all(count == 1 for count in world.ends.values()), "reported twice"
    assert all(count == 1 for count in world.starts.values())
    if not world.loss_is_told:
        assert world.delivered - world.revoked <= world.ends.keys(), "an end is not reported"


def calm(world):
    """The store answers, nobody kills or drains any more: the launcher does its work and leaves."""
    world.settle()
    while world.reconciling is not None and not world.left:
        world.reconcile(0)
    for _ in range(3):  # what the store handed out in lost answers comes back
        if not world.left:
            world.reconcile(0)
    world.tick(3)
    world.settle()
    if not world.left:
        world.check_nothing_left_out()
    for _ in range(200):
        if world.left:
            return
        world.tick(0)
        world.settle()
        world.foresee(1)
        world.settle()
