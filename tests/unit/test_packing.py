from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from ensemble.core.model import Need, Node
from ensemble.core.packing import NodeBook, NodeQueue, SlotBook


def book(count):
    return NodeBook([Node(name=f"n{i}", cores=1) for i in range(count)])


def places(placement):
    return [int(name[1:]) for name in placement.names]


@settings(deadline=None)
@given(
    total=st.integers(0, 12),
    steps=st.lists(st.tuples(st.integers(0, 8), st.integers(-1, 13)), max_size=40),
)
def test_no_node_is_given_twice_and_a_claim_succeeds_exactly_when_enough_are_free(total, steps):
    nodes, held = book(total), {}
    for task_id, count in steps:
        free = nodes.free
        if task_id in held:
            assert nodes.claim(task_id, count) is None
            nodes.release(task_id)
            assert nodes.free == free + len(held.pop(task_id))
        else:
            placement = nodes.claim(task_id, count)
            assert (placement is not None) == (0 < count <= free)
            if placement is not None:
                held[task_id] = places(placement)
                assert len(set(held[task_id])) == count == free - nodes.free
        nodes.validate()
        taken = [place for given in held.values() for place in given]
        assert len(taken) == len(set(taken)) == total - nodes.free


@settings(deadline=None)
@given(total=st.integers(1, 12), taken=st.sets(st.integers(0, 11)), count=st.integers(1, 12))
def test_neighbours_are_given_when_there_are_enough(total, taken, count):
    nodes = book(total)
    for place in range(total):
        nodes.claim(place, 1)
    free = [place for place in range(total) if place not in taken]
    for place in free:
        nodes.release(place)
    placement = nodes.claim(100, count)
    has_run = any(set(range(start, start + count)) <= set(free) for start in range(total))
    if has_run:
        assert places(placement) == list(range(places(placement)[0], places(placement)[0] + count))
    elif placement is not None:
        assert places(placement) == free[:count]


def test_the_tightest_gap_is_used():
    nodes = book(7)
    for place in range(7):
        nodes.claim(place, 1)
    for place in (0, 1, 2, 4, 5):
        nodes.release(place)
    assert places(nodes.claim(10, 2)) == [4, 5]


def test_only_what_is_held_can_be_released():
    with pytest.raises(KeyError):
        book(1).release(3)


# ------------------------------------------------------------------ shared nodes

NEEDS = st.builds(
    Need,
    packing=st.sampled_from((1, 1, 2, 3, 4, 5, 7, 16, 64, 1_000_003)),
    threads=st.sampled_from((None, None, 1, 2, 3, 5, 8, 100)),
    threads_per_core=st.sampled_from((None, 1, 2, 3)),
    gpus=st.integers(0, 3),
    memory_mb=st.sampled_from((None, 0, 1, 500, 1000, 2000)),
)
#: Nodes with none, one or two hardware threads a core, not numbered in order.
CORES = st.sampled_from(
    ((), ((0,),), ((0,), (1,), (2,)), tuple((i, i + 8) for i in range(8)), ((4, 0), (5,), (6, 2)))
)
BOOKS = st.builds(
    SlotBook,
    CORES,
    st.sampled_from(((), ("0",), ("2", "3"), ("a", "b", "c", "d"))),
    st.sampled_from((None, 0, 1000, 4000)),
)


def cores_of(book, need):
    """How many whole cores a task takes: its threads', or its share of the node's."""
    if need.threads is None:
        return len(book.cores) // need.packing
    return min(math.ceil(need.threads / (need.threads_per_core or 1)), len(book.cores))


class Ledger:
    """The rules of a shared node, said another way."""

    def __init__(self, book):
        self.book = book
        self.tasks = {}

    def fits(self, need):
        needs = [*(task[0] for task in self.tasks.values()), need]
        return (
            sum(Fraction(1, each.packing) for each in needs) <= 1
            and sum(cores_of(self.book, each) for each in needs) <= len(self.book.cores)
            and sum(each.gpus for each in needs) <= len(self.book.gpus)
            and (
                self.book.memory_mb is None
                or sum(each.memory_mb or 0 for each in needs) <= self.book.memory_mb
            )
        )

    def claim(self, task_id, need):
        fits = self.fits(need)
        assert self.book.fits(need) is fits
        slot = self.book.claim(task_id, need)
        assert (slot is not None) == fits
        if slot is not None:
            self.tasks[task_id] = (need, slot)
        return slot

    def release(self, task_id):
        self.book.release(task_id)
        del self.tasks[task_id]

    def check(self):
        self.book.validate()
        slots = [slot for _, slot in self.tasks.values()]
        for held in (
            [cpu for s in slots for cpu in s.cpus],
            [gpu for s in slots for gpu in s.gpus],
        ):
            assert len(held) == len(set(held)), "given twice at a time"
        for need, slot in self.tasks.values():
            count = cores_of(self.book, need)
            used = [core for core in self.book.cores if set(core) & set(slot.cpus)]
            assert len(used) == count, "a core is shared, or was not given"
            per_core = None if need.threads is None else need.threads_per_core or 1
            assert sorted(slot.cpus) == sorted(cpu for core in used for cpu in core[:per_core])
            assert len(slot.gpus) == need.gpus
        share = 1 - sum(Fraction(1, need.packing) for need, _ in self.tasks.values())
        assert self.book.vacancy.share == share
        assert self.book.free == float(share)


@settings(deadline=None)
@given(book=BOOKS, steps=st.lists(st.tuples(st.integers(0, 20), NEEDS), max_size=60))
def test_a_shared_node_is_never_over_committed_and_takes_whatever_fits(book, steps):
    ledger = Ledger(book)
    for task_id, need in steps:
        if task_id in ledger.tasks:
            assert book.claim(task_id, need) is None, "it has its part"
            ledger.release(task_id)
        else:
            ledger.claim(task_id, need)
        ledger.check()
    for task_id in list(ledger.tasks):
        ledger.release(task_id)
    assert book.vacancy == book.whole


@settings(deadline=None)
@given(book=BOOKS, before=st.lists(NEEDS, max_size=6), need=NEEDS)
def test_a_release_undoes_a_claim_exactly(book, before, need):
    ledger = Ledger(book)
    for task_id, each in enumerate(before):
        ledger.claim(task_id, each)
    free, held = book.vacancy, set(book.holders)
    first = ledger.claim(100, need)
    if first is not None:
        ledger.release(100)
        assert book.vacancy == free
        assert set(book.holders) == held
        assert book.claim(100, need) == first


@settings(deadline=None)
@given(book=BOOKS, need=NEEDS)
def test_what_could_ever_fit_fits_an_empty_node(book, need):
    assert book.could_ever(need) == book.fits(need)


def node_of(cores, *, threads_per_core=1, gpus=(), memory_mb=None):
    return SlotBook(
        [[core + cores * thread for thread in range(threads_per_core)] for core in range(cores)],
        gpus,
        memory_mb,
    )


def test_tasks_of_different_packing_counts_share_a_node_to_the_last_part():
    book = node_of(12)
    cpus = [book.claim(i, Need(packing=p)).cpus for i, p in enumerate((2, 3, 6))]
    assert [len(each) for each in cpus] == [6, 4, 2]
    assert book.free == 0
    assert book.claim(9, Need(packing=1000)) is None


def test_a_third_is_a_third():
    book = node_of(0)
    assert all(book.claim(i, Need(packing=3)) for i in range(3))
    assert book.claim(3, Need(packing=10**6)) is None
    book = node_of(0)
    assert all(book.claim(i, Need(packing=49)) for i in range(49))
    assert not book.fits(Need(packing=49))


def test_the_units_of_a_node_that_is_never_empty_stay_small():
    book = node_of(0)
    book.claim(0, Need(packing=2))
    for packing in range(1000, 3000):
        book.claim(1, Need(packing=packing))
        book.release(1)
    assert book._units <= 2 * 3000
    assert book.vacancy.share == Fraction(1, 2)


def test_all_hardware_threads_of_its_cores_go_to_a_task_that_states_no_number():
    book = node_of(4, threads_per_core=2)
    assert book.claim(1, Need(packing=2)).cpus == (0, 4, 1, 5)


@pytest.mark.parametrize(
    ("threads", "per_core", "cpus"),
    [
        (1, None, (0,)),
        (2, None, (0, 1)),
        (2, 1, (0, 1)),
        (2, 2, (0, 4)),
        (3, 2, (0, 4, 1, 5)),
        (4, 9, (0, 4)),
        (99, None, (0, 1, 2, 3)),
    ],
)
def test_stated_threads_take_whole_cores(threads, per_core, cpus):
    book = node_of(4, threads_per_core=2)
    need = Need(packing=4, threads=threads, threads_per_core=per_core)
    assert book.claim(1, need).cpus == cpus


def test_more_tasks_than_cores_are_bound_to_none():
    book = node_of(2)
    slots = [book.claim(i, Need(packing=8)) for i in range(8)]
    assert [slot.cpus for slot in slots] == [()] * 8
    assert book.vacancy.cores == 2


def test_gpus_come_back_in_order():
    book = node_of(4, gpus=("0", "1", "2", "3"))
    for i in range(4):
        book.claim(i, Need(packing=4, gpus=1))
    for i in (2, 0):
        book.release(i)
    assert book.claim(9, Need(packing=4, gpus=2)).gpus == ("0", "2")


def test_memory_is_counted_where_it_is_known():
    assert node_of(1, memory_mb=1000).claim(1, Need(memory_mb=1001)) is None
    assert node_of(1, memory_mb=1000).claim(1, Need(memory_mb=1000)) is not None
    assert node_of(1).claim(1, Need(memory_mb=10**9)) is not None


# ------------------------------------------------------------------ what waits for a part


@settings(deadline=None)
@given(
    book=BOOKS,
    steps=st.lists(st.tuples(st.sampled_from("aaerd"), st.integers(0, 30), NEEDS), max_size=80),
)
def test_nothing_waits_that_would_fit_and_nothing_runs_twice(book, steps):
    queue, ledger, needs = NodeQueue(book), Ledger(book), {}

    def fill():
        while (found := queue.pop()) is not None:
            task_id, slot = found
            assert ledger.fits(needs[task_id])
            ledger.tasks[task_id] = (needs[task_id], slot)

    for number, (what, n, need) in enumerate(steps):
        waiting = set(queue.waiting)
        if what == "a" and book.could_ever(need):
            needs[number] = need
            queue.add(number, need)
        elif what == "e" and ledger.tasks:
            ledger.release(sorted(ledger.tasks)[n % len(ledger.tasks)])
        elif what == "d":
            assert queue.drop(n) == (n in waiting)
        fill()
        ledger.check()
        assert not [id for id in queue.waiting if ledger.fits(needs[id])]  # no 64 have passed
        assert not set(queue.waiting) & set(book.holders)


@settings(deadline=None)
@given(packings=st.lists(st.sampled_from((4, 4, 8, 64)), min_size=300, max_size=300))
def test_a_task_that_takes_the_whole_node_is_passed_so_often_and_not_more(packings):
    book = SlotBook(())
    queue = NodeQueue(book)
    queue.add(0, Need(packing=2))
    queue.pop()
    queue.add(-1, Need(packing=1))
    started = []
    for task_id, packing in enumerate(packings, 1):
        queue.add(task_id, Need(packing=packing))
        while (found := queue.pop()) is not None:
            started.append(found[0])
        if started and started[-1] == -1:
            break
        if len(book) > 1 or not queue.waiting:
            book.release(min(book.holders))
    while -1 not in started:
        book.release(min(book.holders))
        while (found := queue.pop()) is not None:
            started.append(found[0])
    assert started.index(-1) <= NodeQueue.PATIENCE


def test_patience_is_not_inherited_from_a_task_that_was_dropped():
    book = SlotBook(())
    book.claim(0, Need(packing=2))
    queue = NodeQueue(book)
    queue.add(-1, Need(packing=1))
    for task_id in range(1, NodeQueue.PATIENCE + 1):
        queue.add(task_id, Need(packing=2))
        assert queue.pop() is not None
        book.release(task_id)
    queue.add(-2, Need(packing=1))
    queue.add(100, Need(packing=2))
    assert queue.pop() is None
    queue.drop(-1)
    assert queue.pop()[0] == 100


def test_tasks_start_in_the_order_they_came():
    queue = NodeQueue(SlotBook(()))
    for task_id, packing in enumerate((4, 2, 4, 2, 4)):
        queue.add(task_id, Need(packing=packing))
    assert [queue.pop()[0] for _ in range(3)] == [0, 1, 2]
    assert queue.pop() is None
    assert set(queue.waiting) == {3, 4}


def test_one_task_can_be_started_out_of_turn_if_it_fits():
    queue = NodeQueue(SlotBook(()))
    for task_id, packing in enumerate((2, 2, 1)):
        queue.add(task_id, Need(packing=packing))
    assert queue.start(1)
    assert not queue.start(1)
    assert not queue.start(2)
    assert not queue.start(77)
    assert set(queue.waiting) == {0, 2}
    assert set(queue.book.holders) == {1}
