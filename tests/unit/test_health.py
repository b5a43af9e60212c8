"""Whose fault a failed start was: the task's, or the node's."""

from __future__ import annotations

from ensemble.core.health import LIMIT, Health
from ensemble.core.model import Cause, End, Outcome


def failed(task_id: int, *nodes: str) -> End:
    return End(
        id=task_id, attempt=1, outcome=Outcome.ERROR, nodes=nodes, cause=Cause.COULD_NOT_START,
        reason="no such file",
    )  # fmt: skip


def test_what_fails_on_two_nodes_and_runs_nowhere_is_the_tasks_own_fault():
    health = Health(4)
    assert health.fails("p", failed(0, "n0")) == []
    for task_id in range(1, 50):
        end = failed(task_id, f"n{task_id % 4}")
        assert health.fails("p", end) == [end]
    assert not health.aside
    assert health.pairs == [(0, 1)]


def test_where_there_is_one_node_a_failure_is_the_tasks_own():
    health = Health(1)
    end = failed(1, "n1")
    assert health.fails("p", end) == [end]


def test_a_node_that_fails_before_anything_runs_elsewhere_is_found_out_once_it_does():
    health = Health(2)
    for task_id in range(LIMIT):
        assert health.fails("p", failed(task_id, "n2")) == []
    health.runs("p", ["n1"])
    ends = health.fails("p", failed(LIMIT, "n2"))
    assert [end.id for end in ends] == list(range(LIMIT + 1))
    assert {end.outcome for end in ends} == {Outcome.LOST}


def test_a_program_that_ran_on_this_very_node_only_is_no_evidence():
    health = Health(2)
    health.runs("p", ["n1"])
    end = failed(1, "n1")
    assert health.fails("p", end) == [end]


def test_a_node_that_fails_what_runs_elsewhere_is_set_aside_and_its_tasks_run_again():
    health = Health(2)
    health.runs("p", ["n1"])
    for task_id in range(1, LIMIT):
        assert health.fails("p", failed(task_id, "n2")) == []
    assert health.pairs == [(task_id, 1) for task_id in range(1, LIMIT)]
    ends = health.fails("p", failed(LIMIT, "n2"))
    assert list(health.aside) == ["n2"]
    assert [end.id for end in ends] == list(range(1, LIMIT + 1))
    assert {(end.outcome, end.cause) for end in ends} == {(Outcome.LOST, Cause.NODE_LOST)}
    assert "no such file" in health.aside["n2"]
    assert not health.pairs
    [late] = health.fails("other", failed(9, "n2"))
    assert late.outcome is Outcome.LOST


def test_a_start_between_failures_is_an_alibi():
    health = Health(2)
    health.runs("p", ["n1"])
    for task_id in range(100):
        end = failed(task_id, "n2")
        assert health.fails("p", end) == []
        assert health.runs("q", ["n2"]) == [end]
    assert not health.aside


def test_what_ails_all_nodes_is_no_fault_of_theirs():
    health = Health(2)
    for node in ("n1", "n2"):
        health.runs("p", [node])
    for task_id in range(LIMIT):
        health.fails("p", failed(task_id, "n1"))
    assert list(health.aside) == ["n1"]
    told = []
    for task_id in range(10, 10 + LIMIT):
        told += health.fails("p", failed(task_id, "n2"))
    assert [end.id for end in told] == list(range(10, 10 + LIMIT))
    assert {end.outcome for end in told} == {Outcome.ERROR}
    assert not health.aside
    for task_id in range(20, 20 + LIMIT):
        health.fails("p", failed(task_id, "n1"))
    assert not health.aside  # next time it takes more


def test_no_more_than_a_part_of_many_nodes_is_set_aside():
    health = Health(100)
    health.runs("p", ["n98"])
    health.runs("p", ["n99"])
    for node in range(50):
        for task_id in range(LIMIT):
            health.fails("p", failed(100 * node + task_id, f"n{node}"))
        assert len(health.aside) <= 25
    assert not health.pairs or len(health.pairs) < 100


def test_of_a_wide_task_those_nodes_are_to_blame_that_start_nothing_else():
    health = Health(4)
    health.runs("p", ["n9"])
    for task_id in range(1, LIMIT):
        assert health.fails("p", failed(task_id, "n1", "n2")) == []
        assert health.runs("q", ["n1"]) == []  # n2 may still be to blame
    ends = health.fails("p", failed(LIMIT, "n1", "n2"))
    assert list(health.aside) == ["n2"]
    assert len(ends) == LIMIT


def test_a_failure_is_not_held_back_for_ever():
    health = Health(2)
    health.runs("p", ["n1"])
    end = failed(1, "n2")
    health.fails("p", end)
    assert health.tick(0.0) == []
    assert health.tick(4.9) == []
    assert health.tick(5.1) == [end]
    assert len(health) == 0


def test_a_node_whose_pilot_is_new_begins_anew():
    health = Health(2)
    health.runs("p", ["n1"])
    for task_id in range(LIMIT):
        health.fails("p", failed(task_id, "n2"))
    health.trust("n2")
    assert health.fails("p", failed(7, "n2")) == []


def test_programs_without_number_are_no_leak():
    health = Health(4)
    for number in range(5000):
        health.runs(f"p{number}", ["n1"])
    assert len(health._ran_on) <= 1024
