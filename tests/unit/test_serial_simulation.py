"""Serial mode's brain against a small model of nodes, pilots and store, under any order of events.

Everything that travels is late: claims, messages to pilots, their reports. A pilot may fall silent at
any moment; its tasks run on until its node is known to be dead. The model checks as it goes that no
task runs twice at a time and no node is over-committed, and at the end that every attempt handed out
was reported once.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction

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
from ensemble.core.model import Claim, Need, Node, Outcome, SlotRoom, Vacancy
from ensemble.core.packing import NodeQueue, SlotBook
from ensemble.core.shares import Shares, need_of

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
STATUSES = (0, 0, 0, 1, 137, 143)
#: Cores, GPUs and memory of the nodes.
HARDWARE = ((4, 0, None), (4, 1, None), (8, 2, 1000), (0, 0, 500))
#: What tasks take; the last ones do not fit every node, or none.
KINDS = (
    {"node_packing_count": 4},
    {"node_packing_count": 2, "threads_per_rank": 3},
    {"node_packing_count": 3},
    {},
    {"node_packing_count": 8, "memory_mb": 300},
    {"node_packing_count": 2, "gpus_per_rank": 1},
    {"gpus_per_rank": 2, "memory_mb": 900},
    {"gpus_per_rank": 3},
)


@dataclass
class Row:
    """A task in the store."""

    id: int
    kind: int
    limit: float | None
    state: str = "runnable"  # or running, timeout, killed, done
    attempt: int = 0
    is_held: bool = False
    tries_left: int = 2

    @property
    def pair(self):
        return self.id, self.attempt

    @property
    def claim(self):
        return Claim(
            id=self.id,
            attempt=self.attempt,
            name="t",
            workflow="",
            app=None,
            argv=("t",),
            workdir="d",
            time_limit_minutes=self.limit,
            is_suspect=self.id % 6 == 5,
            **KINDS[self.kind],
        )


@dataclass
class Reporting:
    dropped: list = field(default_factory=list)
    ran: list = field(default_factory=list)
    failed: list = field(default_factory=list)
    done: list = field(default_factory=list)


class Pilot:
    """A node: starts what fits, by the book; hears and reports late."""

    def __init__(self, name, number):
        self.name = name
        cores, gpus, memory_mb = HARDWARE[number % len(HARDWARE)]
        self.cores = tuple((core,) for core in range(cores))
        self.gpus = tuple(map(str, range(gpus)))
        self.memory_mb = memory_mb
        self.queue = NodeQueue(SlotBook(self.cores, self.gpus, memory_mb))
        self.inbox = deque()
        self.reports = deque()
        self.report = Reporting()
        self.is_silent = False
        self.waiting: dict[int, Claim] = {}
        self.running: dict[int, tuple[Claim, float]] = {}
        self.slots: dict[int, object] = {}
        self.signalled: set[int] = set()

    def join(self):
        node = Node(name=self.name, cores=len(self.cores), gpus=len(self.gpus))
        return PilotJoined(node=node, cores=self.cores, gpus=self.gpus, memory_mb=self.memory_mb)

    @property
    def pairs(self):
        return {(claim.id, claim.attempt) for claim, _ in self.running.values()}

    def validate(self):
        self.queue.book.validate()
        needs = [need_of(claim) for claim, _ in self.running.values()]
        assert sum(Fraction(1, need.packing) for need in needs) <= 1
        assert sum(need.gpus for need in needs) <= len(self.gpus)
        cpus = [cpu for slot in self.slots.values() for cpu in slot.cpus]
        assert len(cpus) == len(set(cpus))


class World:
    def __init__(self, nodes, policy, *, is_quick):
        self.policy, self.is_quick = policy, is_quick
        self.now = 100.0
        self.brain = Dispatcher(Shares(), policy, now=self.now)
        self.queue = deque()
        self.pilots: dict[str, Pilot] = {}
        self.missing = [f"n{i}" for i in range(nodes)]
        self.numbers = {name: i for i, name in enumerate(self.missing)}
        self.of: dict[int, tuple[Pilot, int]] = {}
        self.rows: dict[int, Row] = {}
        self.announced: set[tuple[int, int]] = set()
        self.on_record = set()
        self.aside: set[str] = set()
        self.asked: SlotRoom | None = None
        self.committed: list[Claim] | None = None
        self.reports = {}
        self.reconciling = None
        self.prospect_asked = False
        self.lease_is_gone = self.loss_is_told = False
        self.delivered, self.ends, self.starts = set(), Counter(), Counter()
        self.ran = set()
        self.left: Leave | None = None

    @property
    def time(self):
        return EPOCH + timedelta(seconds=self.now)

    # ---------------------------------------------------------------- the brain

    def handle(self):
        if not self.queue or self.left:
            return
        event = self.queue.popleft()
        if isinstance(event, Claimed):
            self.delivered |= {(c.id, c.attempt) for c in event.claims}
        self.loss_is_told = self.loss_is_told or isinstance(event, LeaseLost)
        effects = self.brain.handle(event)
        self.brain.validate()
        for effect in effects:
            assert self.left is None, "an effect after Leave"
            self.perform(effect)

    def perform(self, effect):  # noqa: C901 - a line an effect
        match effect:
            case Ask(room):
                assert self.asked is None, "two questions at a time"
                assert room.free or room.ahead
                assert not self.brain.is_leaving
                self.asked = room
            case Launch(claim, placement):
                (name,) = placement.names
                assert (claim.id, claim.attempt) not in self.ends
                assert name not in self.aside or claim.is_suspect
                assert not claim.is_suspect or (claim.id, claim.attempt) in self.on_record
                if name not in self.pilots:
                    return  # lost a moment ago: the brain will hear of it next
                pilot = self.pilots[name]
                self.of[claim.id] = (pilot, claim.attempt)
                self.tell(pilot, ("run", claim))
            case Terminate(task_id):
                if task_id in self.of:
                    pilot, attempt = self.of[task_id]
                    self.tell(pilot, ("kill", (task_id, attempt)))
            case Recall(pairs):
                for task_id, attempt in pairs:
                    pilot, known = self.of.get(task_id, (None, 0))
                    if known == attempt:
                        self.tell(pilot, ("recall", (task_id, attempt)))
            case Announce(task_id, attempt):
                self.announced.add((task_id, attempt))
            case SetAside(nodes):
                self.aside = set(nodes)
            case RecordStart(start):
                assert not self.loss_is_told
                self.starts[start.id, start.attempt] += 1
                row = self.rows[start.id]
                if row.is_held and row.pair == (start.id, start.attempt):
                    row.state = "running" if row.state == "runnable" else row.state
            case RecordEnd(end):
                assert not self.loss_is_told, "reported without a lease"
                self.ends[end.id, end.attempt] += 1
                self.reports[end.id, end.attempt] = end
                self.check_end(end)
            case AskProspect():
                assert not self.prospect_asked
                assert self.brain.nodes
                self.prospect_asked = True
            case Leave():
                assert self.asked is None, "left with a claim on its way"
                assert not self.alive(), "left with tasks"
                self.left = effect
            case _:
                pass

    def check_end(self, end):
        """Whether something ran is told as it was, but for nodes that are lost."""
        has_run = (end.id, end.attempt) in self.ran
        if end.outcome is Outcome.GIVEN_BACK:
            assert not has_run
        elif end.outcome in (Outcome.DONE, Outcome.ERROR) and end.exit_code is not None:
            assert has_run
            assert end.started_at is not None

    def tell(self, pilot, message):
        """Messages to a pilot that cannot be reached are lost."""
        if self.pilots.get(pilot.name) is pilot and not pilot.is_silent:
            pilot.inbox.append(message)

    def alive(self):
        return [id for pilot in self.pilots.values() for id in pilot.running]

    # ---------------------------------------------------------------- pilots

    def some(self, n, *, silent=False):
        found = [p for p in self.pilots.values() if p.is_silent is silent]
        return found[n % len(found)] if found else None

    def join(self, n):
        if self.missing:
            name = self.missing.pop(n % len(self.missing))
            self.aside.discard(name)
            self.pilots[name] = Pilot(name, self.numbers[name])
            self.queue.append(self.pilots[name].join())

    def read(self, n):
        pilot = self.some(n)
        if pilot is None or not pilot.inbox:
            return
        what, said = pilot.inbox.popleft()
        if what == "run":
            pilot.waiting[said.id] = said
            pilot.queue.add(said.id, need_of(said))
        else:
            task_id, attempt = said
            waits = pilot.waiting.get(task_id)
            if waits is not None and waits.attempt == attempt:
                del pilot.waiting[task_id]
                pilot.queue.drop(task_id)
                pilot.report.dropped.append(said)
            elif what == "kill" and said in pilot.pairs:
                pilot.signalled.add(task_id)
        self.fill(pilot)

    def fill(self, pilot):
        while (found := pilot.queue.pop()) is not None:
            task_id, slot = found
            claim = pilot.waiting.pop(task_id)
            if (task_id + claim.attempt) % 11 == 10:
                pilot.queue.book.release(task_id)
                pilot.report.failed.append((task_id, claim.attempt))
                continue
            assert task_id not in self.alive(), "two attempts at a time"
            pilot.running[task_id] = (claim, self.now)
            pilot.slots[task_id] = slot
            self.ran.add((task_id, claim.attempt))
            pilot.report.ran.append((task_id, claim.attempt))
        pilot.validate()

    def end(self, n):
        pilot = self.some(n)
        if pilot is None or not pilot.running:
            return
        task_id = sorted(pilot.running)[n // 7 % len(pilot.running)]
        claim, began = pilot.running.pop(task_id)
        del pilot.slots[task_id]
        pilot.queue.book.release(task_id)
        was_signalled = task_id in pilot.signalled
        pilot.signalled.discard(task_id)
        status = 143 if was_signalled and n % 3 else STATUSES[n % len(STATUSES)]
        pilot.report.done.append((task_id, claim.attempt, began, status, was_signalled))
        self.fill(pilot)

    def report(self, n):
        pilot = self.some(n)
        if pilot is not None:
            pilot.reports.append(pilot.report)
            pilot.report = Reporting()

    def hear(self, n):
        """A report has come: its events are in the queue, in the order that the link gives them."""
        pilot = self.some(n)
        if pilot is None or not pilot.reports:
            return
        report = pilot.reports.popleft()
        ended = {done[0] for done in report.done}
        for task_id, attempt in report.dropped:
            self.of.pop(task_id, None)
            self.queue.append(Skipped(id=task_id, attempt=attempt, at=self.time))
        for task_id, attempt in report.ran:
            if task_id not in ended:
                self.queue.append(Started(id=task_id, attempt=attempt, at=self.time))
        for task_id, attempt in report.failed:
            self.of.pop(task_id, None)
            self.queue.append(
                CouldNotStart(id=task_id, attempt=attempt, at=self.time, reason="no such file")
            )
        for task_id, attempt, began, status, was_signalled in report.done:
            self.of.pop(task_id, None)
            start = EPOCH + timedelta(seconds=began)
            self.queue.append(
                Ended(
                    id=task_id,
                    attempt=attempt,
                    at=start + timedelta(seconds=0.05 if self.is_quick else 30),
                    status=status,
                    was_signalled=was_signalled,
                    started_at=start,
                )
            )

    def silence(self, n):
        """The connection breaks: what was on its way either way is lost."""
        pilot = self.some(n)
        if pilot is not None:
            pilot.is_silent = True
            pilot.inbox.clear()
            pilot.reports.clear()
            self.queue.append(PilotSilent(node=pilot.name))

    def bury(self, n):
        """Nothing of a silent pilot is left."""
        pilot = self.some(n, silent=True)
        if pilot is not None:
            del self.pilots[pilot.name]
            self.of = {id: where for id, where in self.of.items() if where[0] is not pilot}
            self.missing.append(pilot.name)
            self.queue.append(PilotLost(node=pilot.name, at=self.time, reason="killed"))

    # ---------------------------------------------------------------- the store

    def add(self, n):
        task_id = len(self.rows) + 1
        self.rows[task_id] = Row(task_id, n % len(KINDS), (None, None, 0.05)[n % 3])
        self.queue.append(WorkRang())

    def commit(self, n):
        """The store hands out tasks that fit what is free, and some more; the answer is on its way."""
        if self.asked is None or self.committed is not None:
            return
        self.committed = []
        if self.lease_is_gone:
            return
        free = [_Left(kind) for kind in self.asked.free for _ in range(kind.nodes)]
        ahead = self.asked.ahead
        rows = [r for r in self.rows.values() if r.state == "runnable" and not r.is_held]
        for row in rows[n % 3 :] + rows[: n % 3]:
            need = need_of(row.claim)
            if any(left.take(need) for left in free):
                pass
            elif ahead and any(_Left(kind).take(need) for kind in self.asked.whole):
                ahead -= 1
            else:
                continue
            row.is_held, row.attempt = True, row.attempt + 1
            self.committed.append(row.claim)

    def answer(self, n):
        if self.committed is None:
            return
        claims, self.committed, self.asked = tuple(self.committed), None, None
        if self.lease_is_gone:
            self.queue += [LeaseLost(reason="reaped"), ClaimFailed()]
        else:
            self.queue.append(ClaimFailed() if n % 5 == 0 else Claimed(claims=claims))

    def announce(self, n):
        """A start is on record, or the store says that it is not ours."""
        if not self.announced:
            return
        pair = sorted(self.announced)[n % len(self.announced)]
        self.announced.remove(pair)
        row = self.rows[pair[0]]
        if row.is_held and row.pair == pair:
            row.state = "running" if row.state == "runnable" else row.state
            self.on_record.add(pair)
            self.queue.append(Announced(id=pair[0], attempt=pair[1]))
        else:
            self.queue.append(Skipped(id=pair[0], attempt=pair[1], at=self.time))

    def write(self, _n):
        """The reports reach the store."""
        for pair, end in self.reports.items():
            row = self.rows[pair[0]]
            if self.lease_is_gone or not row.is_held or row.pair != pair:
                continue
            row.is_held = False
            if row.state == "killed":
                continue
            if end.outcome is Outcome.GIVEN_BACK:
                self.queue.append(WorkRang())
            elif end.outcome is Outcome.DONE or not row.tries_left:
                row.state = "done"
            else:
                row.state, row.tries_left = "runnable", row.tries_left - 1
                self.queue.append(WorkRang())
        self.reports.clear()

    def kill(self, n):
        rows = [row for row in self.rows.values() if row.state not in ("killed", "done")]
        if rows:
            row = rows[n % len(rows)]
            row.state = "killed"
            if row.is_held and not self.lease_is_gone:
                self.queue.append(KillAsked(pairs=frozenset({row.pair})))

    def reconcile(self, _n):
        if self.reconciling is None:
            self.reconciling = (self.brain.known | self.reports.keys(), self.brain.claims_made)
            return
        known, made = self.reconciling
        self.reconciling = None
        held = frozenset(row.pair for row in self.rows.values() if row.is_held)
        self.queue.append(Reconciled(held=held, known=frozenset(known), claims_made=made))
        while self.queue and not self.left:
            self.handle()

    def tick(self, n):
        self.now += (1, 1, 1, 3, 11, 40)[n % 6]
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
                row.is_held = False
                row.state = "done"  # somebody else runs them
            self.queue.append(LeaseLost(reason="reaped"))

    # ---------------------------------------------------------------- a calm end

    def settle(self):  # noqa: C901 - a line for each thing that may be next
        """Let everything happen that is under way, and nothing else; no time passes."""
        for _ in range(3000):
            if self.left:
                return
            pilots = list(enumerate(p for p in self.pilots.values() if not p.is_silent))
            if self.queue:
                self.handle()
            elif any(p.is_silent for p in self.pilots.values()):
                self.bury(0)
            elif self.announced:
                self.announce(0)
            elif found := [i for i, p in pilots if p.inbox]:
                self.read(found[0])
            elif found := [i for i, p in pilots if p.report != Reporting()]:
                self.report(found[0])
            elif found := [i for i, p in pilots if p.reports]:
                self.hear(found[0])
            elif self.asked is not None:
                self.commit(0)
                self.answer(1)
            elif found := [i for i, p in pilots if p.running]:
                self.end(found[0])
            elif self.reports:
                self.write(0)
            else:
                return
        raise AssertionError("it never comes to rest")

    def check_nothing_left_out(self):
        ready = [r for r in self.rows.values() if r.state == "runnable" and not r.is_held]
        deadline = self.policy.deadline
        if deadline is not None and deadline - self.now < self.policy.min_useful_s:
            return
        if not self.brain.is_leaving:
            for row in ready:
                need = need_of(row.claim)
                pilots = [p for p in self.pilots.values() if p.name not in self.aside]
                fits = [p.name for p in pilots if p.queue.book.could_ever(need)]
                assert not fits, f"{row} is left, and would fit {fits}"


class _Left:
    """What is left of a node that the store was told of."""

    def __init__(self, kind: Vacancy):
        self.share, self.cores, self.gpus = kind.share, kind.cores, kind.gpus
        self.all_cores, self.memory_mb = kind.all_cores, kind.memory_mb

    def take(self, need: Need) -> bool:
        share = Fraction(1, need.packing)
        cores = self.all_cores // need.packing
        if need.threads is not None:
            cores = min(-(-need.threads // (need.threads_per_core or 1)), self.all_cores)
        memory_mb = 0 if self.memory_mb is None else need.memory_mb or 0
        if (
            share > self.share
            or cores > self.cores
            or need.gpus > self.gpus
            or memory_mb > (self.memory_mb or 0)
        ):
            return False
        self.share -= share
        self.cores -= cores
        self.gpus -= need.gpus
        if self.memory_mb is not None:
            self.memory_mb -= memory_mb
        return True


def rest(_world, _n):
    """Nothing happens: what a failing example shrinks to."""


ACTIONS = [
    rest,
    *[World.add, World.commit, World.answer, World.read, World.end, World.report, World.hear] * 4,
    *[World.write, World.tick, World.read, World.join, World.announce] * 2,
    *[World.kill, World.reconcile, World.silence, World.bury, World.foresee],
]
STEPS = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 839), st.sampled_from((0, 1, 1, 2, 9))),
    min_size=80,
    max_size=120,
)
#: Whether, and when, it is drained or loses its lease.
FATES = st.tuples(st.sampled_from((None, None, World.drain, World.lose)), st.integers(0, 80))
POLICIES = st.builds(
    Policy,
    deadline=st.sampled_from((None, None, 170.0)),
    min_useful_s=st.just(20.0),
    idle_timeout_s=st.just(30.0),
    poll_s=st.sampled_from((1.0, 10.0)),
    signal_hold_s=st.sampled_from((0.0, 2.0)),
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    nodes=st.integers(1, 5),
    tasks=st.integers(0, 30),
    is_quick=st.booleans(),
    policy=POLICIES,
    steps=STEPS,
    fate=FATES,
)
def test_whatever_happens_tasks_are_run_once_reported_once_and_the_launcher_leaves(
    nodes, tasks, is_quick, policy, steps, fate
):
    world = World(nodes, replace(policy, nodes=nodes), is_quick=is_quick)
    for n in range(tasks):
        world.add(n * 5)
    for _ in range(nodes // 2 + 1):
        world.join(0)
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
    assert world.brain.running == 0, "something is left in the books"
    assert abs(world.brain.busy_nodes) < 1e-9
    assert not world.brain._plan._of, "something is left in the mirror"
    assert world.brain.handle(Ticked(now=1e6)) == []
    assert all(count == 1 for count in world.ends.values()), "reported twice"
    assert all(count == 1 for count in world.starts.values())
    if not world.loss_is_told:
        assert world.delivered <= world.ends.keys(), "an end is not reported"


def calm(world):  # noqa: C901 - one step after the other
    """All pilots are back, nobody kills or drains: the launcher does its work and leaves."""
    world.settle()
    while world.missing and not world.left:
        world.join(0)
    for _ in range(6):  # what the store handed out in lost answers comes back
        if not world.left:
            world.reconcile(0)
            world.settle()
    for n in (0, 0, 0, 4):
        if not world.left:
            world.tick(n)
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
