from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from ensemble.core.model import Node
from ensemble.core.packing import NodeBook


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
