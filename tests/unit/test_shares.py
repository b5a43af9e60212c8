from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from ensemble.core import shares as module
from ensemble.core.model import Claim, Need, Node, Vacancy
from ensemble.core.packing import NodeQueue, SlotBook
from ensemble.core.shares import Shares, need_of


def task(task_id: int, packing: int = 1, **more) -> Claim:
    return Claim(
        id=task_id,
        attempt=1,
        name="t",
        workflow="",
        app=None,
        argv=("true",),
        workdir="d",
        node_packing_count=packing,
        **more,
    )


def book(cores: int = 0, gpus: int = 0, memory_mb: int | None = None) -> SlotBook:
    return SlotBook([[core] for core in range(cores)], [str(gpu) for gpu in range(gpus)], memory_mb)


def plan_of(*books: SlotBook, slots: int = 1) -> Shares:
    plan = Shares(slots)
    for number, each in enumerate(books):
        plan.add(Node(name=f"n{number}", cores=len(each.cores)), each)
    return plan


def place(plan: Shares, *claims: Claim) -> list[str | None]:
    """Place these; return the nodes."""
    placed = [plan.place(claim) for claim in claims]
    return [None if each is None else each.names[0] for each in placed]


def learn(plan: Shares, took_s: float) -> None:
    for _ in range(100):
        plan.learn(1, took_s)


def waiting(plan: Shares) -> set[int]:
    return {id for place in plan._places.values() for id in place.queue.waiting}


# ------------------------------------------------------------------ where tasks go


def test_tasks_are_spread_over_the_freest_nodes():
    plan = plan_of(book(), book(), book())
    names = place(plan, *(task(i, 4) for i in range(1, 7)))
    assert sorted(names) == ["n0", "n0", "n1", "n1", "n2", "n2"]
    for task_id in (1, 2, 3):
        plan.release(task_id)
    plan.release(5)
    freest = names[4]
    assert place(plan, task(10, 4)) == [freest]


@settings(deadline=None)
@given(packings=st.lists(st.sampled_from((1, 2, 3, 4, 8)), max_size=40))
def test_a_task_goes_to_a_freest_node_while_there_is_room(packings):
    plan, free = plan_of(book(), book(), book()), {f"n{i}": Fraction(1) for i in range(3)}
    for task_id, packing in enumerate(packings):
        (name,) = place(plan, task(task_id, packing))
        part = Fraction(1, packing)
        if name is None:
            assert max(free.values()) < part
        else:
            assert free[name] == max(free.values())
            free[name] -= part
    plan.validate(set(plan._of))
    assert plan.busy == pytest.approx(float(3 - sum(free.values())))


def test_no_task_has_a_place_before_a_pilot_has_joined():
    plan = Shares()
    assert plan.room(None) is None
    assert plan.place(task(1)) is None
    assert plan.total == plan.busy == 0


def test_slots_per_node_let_tasks_share_that_say_nothing():
    plan = plan_of(book(), slots=4)
    assert place(plan, *(task(i) for i in range(5))) == ["n0"] * 4 + [None]
    assert need_of(task(1, 2), 4).packing == 4
    assert need_of(task(1, 8), 4).packing == 8
    assert plan.room(None) is None
    assert plan.whole(None).slots_per_node == 4


def test_gpus_are_found_on_the_fullest_node():
    plan = plan_of(*(book() for _ in range(30)), book(gpus=1))
    assert place(plan, task(1, 2)) != [None]
    (where,) = place(plan, task(2, 2, gpus_per_rank=1))
    assert where == "n30"
    assert place(plan, task(3, 4, gpus_per_rank=1)) == [None]
    plan.release(2)
    assert place(plan, task(4, 4, gpus_per_rank=1)) == ["n30"]


def test_what_a_dropped_task_waited_for_is_others_at_once():
    plan = plan_of(book())
    place(plan, task(1, 2))
    plan.learn(1, 0.1)
    assert place(plan, task(2, 1)) == ["n0"]
    assert waiting(plan) == {2}
    assert plan.room(None).free == ()
    plan.release(2)
    assert plan.room(None).free[0].share == Fraction(1, 2)
    assert place(plan, task(3, 2)) == ["n0"]
    assert waiting(plan) == set()


def test_a_device_that_comes_free_as_another_task_takes_the_part_is_found():
    plan = plan_of(book(gpus=1))
    place(plan, task(1, 2, gpus_per_rank=1), task(2, 2))
    plan.learn(1, 0.1)
    assert place(plan, task(3, 2)) == ["n0"]
    assert waiting(plan) == {3}
    plan._wanted, plan._usual_s = 0, None
    assert place(plan, task(4, 2, gpus_per_rank=1)) == [None]
    plan.release(1)  # 3 has its part, but not its GPU
    plan.release(2)
    assert place(plan, task(4, 2, gpus_per_rank=1)) == ["n0"]
    assert waiting(plan) == set()


def test_what_fits_beside_a_task_that_waits_starts_as_it_does_at_the_pilot():
    plan = plan_of(book())
    plan.learn(1, 0.01)
    place(plan, task(1, 2), task(2, 1))
    assert waiting(plan) == {2}
    assert place(plan, task(3, 2)) == ["n0"]
    assert waiting(plan) == {2}
    plan.validate({1, 2, 3})


# ------------------------------------------------------------------ what the store is asked


def test_nodes_that_are_alike_are_counted_together():
    plan = plan_of(book(4), book(4), book(4), book(8, gpus=2, memory_mb=100))
    place(plan, task(1, 2))
    room = plan.room(90.0)
    assert room.left_s == 90.0
    assert room.ahead == 0
    assert sum(kind.nodes for kind in room.free) == sum(kind.nodes for kind in room.whole) == 4
    assert Vacancy(nodes=2, share=Fraction(1), cores=4, all_cores=4, gpus=0, memory_mb=None) in set(
        room.free
    )
    assert {(kind.nodes, kind.gpus) for kind in room.whole} == {(3, 0), (1, 2)}


NEEDS = st.fixed_dictionaries(
    {
        "packing": st.sampled_from((1, 2, 3, 4, 8)),
        "threads_per_rank": st.sampled_from((None, None, 1, 2)),
        "gpus_per_rank": st.sampled_from((0, 0, 0, 1)),
        "memory_mb": st.sampled_from((None, None, 100, 600)),
    }
)


class Nodes:
    """A plan of three nodes that come and go, and what is on them."""

    def __init__(self):
        self.plan, self.tasks = Shares(), 0
        self.alive, self.down = set(), set()
        self.placed: dict[int, str] = {}

    def add(self, n, _need):
        if f"n{n % 3}" not in self.alive | self.down:
            self.plan.add(Node(name=f"n{n % 3}", cores=4), book(4, n % 2, (None, 1000)[n % 2]))
            self.alive.add(f"n{n % 3}")

    def suspend(self, n, _need):
        name = f"n{n % 3}"
        self.plan.suspend(name)
        self.down |= {name} & self.alive
        self.alive.discard(name)

    def remove(self, n, _need):
        name = f"n{n % 3}"
        gone = self.plan.remove(name)
        assert set(gone) == {id for id, where in self.placed.items() if where == name}
        for task_id in gone:
            del self.placed[task_id]
        self.alive.discard(name)
        self.down.discard(name)

    def place(self, _n, need):
        self.tasks += 1
        claim = task(self.tasks, **need)
        fits = {p.node.name for p in self.plan._places.values() if p.has_room(need_of(claim))}
        placement = self.plan.place(claim)
        assert placement is not None or not fits
        if placement is not None:
            self.placed[claim.id] = placement.names[0]
            assert placement.names[0] in (fits or self.alive)

    def end(self, n, _need):
        if self.placed:
            task_id = sorted(self.placed)[n % len(self.placed)]
            del self.placed[task_id]
            self.plan.release(task_id)

    def learn(self, n, _need):
        self.plan.learn(1, (0.1, 30.0)[n % 2])

    def tick(self, _n, _need):
        self.plan.tick(is_closing=False)


COMINGS_AND_GOINGS = [
    Nodes.add,
    Nodes.place,
    Nodes.place,
    Nodes.place,
    Nodes.end,
    Nodes.end,
    Nodes.suspend,
    Nodes.remove,
    Nodes.learn,
    Nodes.tick,
]


@settings(deadline=None, max_examples=200)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(COMINGS_AND_GOINGS), st.integers(0, 100), NEEDS), max_size=80
    )
)
def test_the_room_is_what_is_free_and_whatever_fits_it_has_a_place(steps):
    nodes = Nodes()
    nodes.add(0, {})
    nodes.add(1, {})
    for action, n, need in steps:
        action(nodes, n, need)
        nodes.plan.validate(nodes.placed)
        assert nodes.plan.total == len(nodes.alive | nodes.down)
        check_room(nodes.plan)


def check_room(plan: Shares) -> None:
    open_ = [
        p.queue.book.vacancy
        for p in plan._places.values()
        if p.is_up and not p.queue.waiting and p.queue.book.vacancy.share > 0
    ]
    room = plan.room(None)
    if room is None:
        assert not open_
        return
    told = {(kind.share, kind.cores, kind.gpus, kind.memory_mb): kind.nodes for kind in room.free}
    assert len(told) == len(room.free)
    assert sum(told.values()) == len(open_)
    for kind in open_:
        assert told[kind.share, kind.cores, kind.gpus, kind.memory_mb] == open_.count(kind)
    assert not plan.is_roomier()


def test_a_node_with_the_last_gpu_is_told_of_among_many_that_have_more_room():
    plan = plan_of(*(book(memory_mb=1000 + i) for i in range(300)), book(gpus=1, memory_mb=10))
    place(plan, *(task(i, 2) for i in range(301)))
    room = plan.room(None)
    assert len(room.free) <= 64
    assert max(kind.gpus for kind in room.free) == 1
    assert max(kind.memory_mb for kind in room.free) == 1299


def test_more_is_free_only_when_something_came_free_since_the_store_was_asked():
    plan = plan_of(book(), book())
    place(plan, task(1), task(2))
    plan.room(None)
    assert not plan.is_roomier()
    plan.release(1)
    assert plan.is_roomier()
    plan.room(None)
    assert not plan.is_roomier()
    plan.suspend("n0")
    plan.release(2)  # less is free than was asked for; but it is free
    assert plan.is_roomier()


# ------------------------------------------------------------------ ahead


def test_only_short_tasks_are_sent_ahead():
    plan = plan_of(book())
    place(plan, task(1))
    assert plan.room(None) is None
    learn(plan, 0.1)
    room = plan.room(None)
    assert room.free == ()
    assert 0 < room.ahead <= 11
    learn(plan, 60.0)
    assert plan.place(task(2)) is not None, "the store was asked for it before"
    assert plan.room(None) is None
    assert plan.place(task(3)) is None


def test_what_is_sent_ahead_is_bounded_by_time_and_by_number():
    plan = plan_of(*(book() for _ in range(4)), slots=8)
    place(plan, *(task(i) for i in range(32)))
    learn(plan, 0.5)
    assert plan.room(None).ahead == 64  # a second of 32 tasks of half a second
    learn(plan, 1e-6)
    assert plan.room(None).ahead == module._AHEAD_PER_NODE  # nothing has ended yet
    plan._rate = 1e6
    assert plan.room(None).ahead == module._BATCH
    names = place(plan, *(task(i) for i in range(100, 100 + 3000)))
    held = [name for name in names if name is not None]
    assert len(held) == 4 * module._AHEAD_PER_NODE
    assert {held.count(f"n{i}") for i in range(4)} == {module._AHEAD_PER_NODE}, "not spread"


def test_nothing_waits_where_it_could_never_start():
    plan = plan_of(book(), book(gpus=1), book(gpus=4, memory_mb=10))
    place(plan, task(1), task(2), task(3))
    learn(plan, 0.1)
    assert place(plan, *(task(i, gpus_per_rank=1, memory_mb=50) for i in (4, 5))) == ["n1", "n1"]
    assert place(plan, task(6, gpus_per_rank=5)) == [None]


def test_nothing_is_sent_to_a_node_whose_pilot_is_silent():
    plan = plan_of(book(), book(), slots=2)
    learn(plan, 0.1)
    plan.suspend("n0")
    assert place(plan, *(task(i) for i in range(4))) == ["n1"] * 4
    assert plan.room(None).whole[0].nodes == 1
    plan.suspend("n1")
    assert plan.room(None) is None or not plan.room(None).free
    assert place(plan, task(9)) == [None]


# ------------------------------------------------------------------ patience


def test_where_nothing_ends_what_waits_is_recalled_and_no_more_is_sent():
    plan = plan_of(book(), book())
    place(plan, task(1), task(2))
    learn(plan, 0.1)
    (where,) = place(plan, task(3))
    assert plan.tick(is_closing=False) == ([], [])
    assert plan.tick(is_closing=False) == ([], [(3, 1)])
    assert plan.room(None) is None, "runs are not short any more"
    plan.release(3)
    assert where in ("n0", "n1")
    assert plan.tick(is_closing=False) == ([], [])


def test_where_tasks_end_nothing_is_recalled():
    plan = plan_of(book())
    place(plan, task(1))
    learn(plan, 0.1)
    for task_id in range(2, 20):
        place(plan, task(task_id))
        assert plan.tick(is_closing=False) == ([], [])
        plan.release(task_id - 1)


def test_a_node_that_was_idle_for_long_is_not_out_of_patience_at_once():
    plan = plan_of(book())
    for _ in range(100):
        plan.tick(is_closing=False)
    learn(plan, 0.1)
    place(plan, task(1), task(2))
    assert plan.tick(is_closing=False) == ([], [])


def test_what_waits_at_a_silent_pilot_does_not_end_sending_ahead_elsewhere():
    plan = plan_of(book(), book())
    place(plan, task(1), task(2))
    learn(plan, 0.1)
    names = place(plan, task(3), task(4))
    plan.suspend("n0")
    for task_id, name in zip((1, 2), ("n0", "n1"), strict=True):
        assert plan._of[task_id].node.name == name
    for _ in range(5):
        if names[0] == "n1":
            plan._places["n1"].still_ticks = 0
        plan._places["n1"].still_ticks = 0
        assert plan.tick(is_closing=False) == ([], [])
    assert plan.room(None) is not None


def test_at_the_end_everything_that_waits_is_recalled():
    plan = plan_of(book())
    place(plan, task(1))
    learn(plan, 0.1)
    place(plan, task(2), task(3))
    assert plan.tick(is_closing=True) == ([], [(2, 1), (3, 1)])


# ------------------------------------------------------------------ nodes that come and go


def test_a_node_comes_back_empty():
    plan = plan_of(book(), book())
    place(plan, *(task(i, 2) for i in range(4)))
    plan.suspend("n0")
    plan.suspend("n0")
    assert sorted(plan.remove("n0")) == [0, 2]
    assert not plan.remove("n0")
    plan.release(0)  # a late word of what was lost
    plan.validate({1, 3})
    plan.add(Node(name="n0", cores=0), book())
    assert plan.busy == 1.0
    assert place(plan, task(5), task(6)) == ["n0", None]
    plan.validate({1, 3, 5})


def test_a_node_that_is_in_use_does_not_join_again():
    plan = plan_of(book())
    with pytest.raises(AssertionError):
        plan.add(Node(name="n0", cores=0), book())


# ------------------------------------------------------------------ the mirror


@dataclass
class ModelPilot:
    """A pilot's queue: gets messages late, reports late, and lets tasks end when it pleases."""

    queue: NodeQueue
    inbox: deque = field(default_factory=deque)
    outbox: deque = field(default_factory=deque)
    report: dict = field(default_factory=lambda: {"dropped": [], "ran": [], "done": []})
    needs: dict = field(default_factory=dict)

    def read(self):
        if self.inbox:
            what, claim_id, need = self.inbox.popleft()
            if what == "run":
                self.needs[claim_id] = need
                self.queue.add(claim_id, need)
            elif self.queue.drop(claim_id):
                self.report["dropped"].append(claim_id)
            self.fill()

    def fill(self):
        while (found := self.queue.pop()) is not None:
            self.report["ran"].append(found[0])

    def end(self, n):
        running = sorted(self.queue.book.holders)
        if running:
            task_id = running[n % len(running)]
            self.queue.book.release(task_id)
            self.report["done"].append(task_id)
            self.fill()

    def send(self):
        report, self.report = self.report, {"dropped": [], "ran": [], "done": []}
        report["ran"] = [id for id in report["ran"] if id not in report["done"]]
        self.outbox.append(report)


class Pair:
    """A launcher's plan of one node, and the node."""

    def __init__(self, gpus, memory_mb):
        self.plan = plan_of(book(4, gpus, memory_mb))
        self.pilot = ModelPilot(NodeQueue(book(4, gpus, memory_mb)))
        self.held = set()
        self.count = 0

    def send(self, need):
        self.count += 1
        claim = task(self.count, **need)
        if self.plan.place(claim) is not None:
            self.held.add(claim.id)
            self.pilot.inbox.append(("run", claim.id, need_of(claim)))

    def recall(self, n):
        if self.held:
            self.pilot.inbox.append(("drop", sorted(self.held)[n % len(self.held)], None))

    def hear(self):
        if self.pilot.outbox:
            report = self.pilot.outbox.popleft()
            for task_id in report["dropped"]:
                self.forget(task_id)
            for task_id in report["ran"]:
                self.plan.started(task_id)
            for task_id in report["done"]:
                self.forget(task_id)

    def forget(self, task_id):
        self.held.remove(task_id)
        self.plan.release(task_id)
        self.plan.validate(self.held)

    def tick(self):
        _, recalled = self.plan.tick(is_closing=False)
        self.pilot.inbox.extend(("drop", task_id, None) for task_id, _ in recalled)

    def come_to_rest(self):
        while self.pilot.inbox:
            self.pilot.read()
        self.pilot.send()
        while self.pilot.outbox:
            self.hear()

    def is_mirrored(self):
        (mirror,) = self.plan._places.values()
        return set(mirror.queue.book.holders) == set(self.pilot.queue.book.holders) and set(
            mirror.queue.waiting
        ) == set(self.pilot.queue.waiting)


def act(pair: Pair, what: str, n: int, need: dict) -> None:
    match what:
        case "place":
            learn(pair.plan, 0.05)
            pair.send(need)
        case "recall":
            pair.recall(n)
        case "read":
            pair.pilot.read()
        case "end":
            pair.pilot.end(n)
        case "send":
            pair.pilot.send()
        case "hear":
            pair.hear()
        case "tick":
            pair.tick()
    pair.plan.validate(pair.held)
    pair.pilot.queue.book.validate()


ACTS = st.sampled_from(
    "place place place read read read end end send hear tick recall".split()  # noqa: SIM905
)


@settings(deadline=None, max_examples=200)
@given(
    packing=st.sampled_from((1, 2, 4, 8)),
    steps=st.lists(st.tuples(ACTS, st.integers(0, 50)), max_size=120),
)
def test_with_tasks_that_are_alike_the_mirror_is_right_as_soon_as_all_is_heard(packing, steps):
    pair = Pair(0, None)
    for what, n in steps:
        act(pair, what, n, {"packing": packing})
    pair.come_to_rest()
    assert pair.is_mirrored()


@settings(deadline=None, max_examples=300)
@given(
    gpus=st.integers(0, 2),
    memory_mb=st.sampled_from((None, 1000)),
    steps=st.lists(st.tuples(ACTS, st.integers(0, 50), NEEDS), max_size=120),
)
def test_with_any_tasks_the_mirror_is_right_a_tick_after_all_is_heard(gpus, memory_mb, steps):
    pair = Pair(gpus, memory_mb)
    for what, n, need in steps:
        act(pair, what, n, need)
    pair.come_to_rest()
    pair.tick()
    pair.pilot.inbox.clear()
    pair.plan.validate(pair.held)
    assert pair.is_mirrored()


def test_a_pilot_that_saw_another_order_is_believed():
    pair = Pair(0, None)
    learn(pair.plan, 0.05)
    for packing in (2, 2):
        pair.send({"packing": packing})
    pair.pilot.read()
    pair.pilot.read()
    pair.send({"packing": 1})
    pair.pilot.read()
    pair.pilot.end(0)
    pair.pilot.end(0)  # 3 runs there
    pair.send({"packing": 2})
    pair.pilot.read()  # and 4 waits
    pair.pilot.send()
    pair.hear()
    assert not pair.is_mirrored()
    pair.tick()
    assert pair.is_mirrored()
    assert waiting(pair.plan) == {4}
    pair.plan.validate({3, 4})


def test_needs_that_never_come_again_are_forgotten():
    plan = plan_of(book(memory_mb=10**6))
    place(plan, task(0))
    for task_id in range(1, 3000):
        assert plan.place(task(task_id, memory_mb=task_id)) is None
    assert len(plan._searches) <= 300
    assert len(plan._known) <= 1100


def test_changes_are_forgotten():
    plan = plan_of(book(gpus=1))
    place(plan, task(0, gpus_per_rank=1, packing=2))
    assert place(plan, task(1, 2, gpus_per_rank=1)) == [None]
    for task_id in range(2, 20000):
        assert place(plan, task(task_id, 2)) == ["n0"]
        plan.release(task_id)
    assert len(plan._changes) < 10000


def test_a_need_has_as_many_threads_as_it_says():
    claim = task(1, 3, threads_per_rank=5, threads_per_core=2, gpus_per_rank=1, memory_mb=7)
    assert need_of(claim) == Need(packing=3, threads=5, threads_per_core=2, gpus=1, memory_mb=7)
