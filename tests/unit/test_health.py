"""Whose fault a failed start was: the task's, or the node's."""

from __future__ import annotations

from ensemble.core.health import LIMIT, Health
from ensemble.core.model import Cause, End, Outcome


def failed(task_id: int, *nodes: str) -> End:
    return End(
        id=task_id, attempt=1, outcome=Outcome.ERROR, nodes=nodes, cause=Cause.COULD_NOT_START,
        reason="no such file",
    )  # fmt: skip


def test_what_runs_nowhere_is_the_tasks_own_fault_at_once():
    health = Health()
    for task_id in range(50):
        end = failed(task_id, f"n{task_id % 4}")
        assert health.fails("p", end, others=3) == ([end], [])
    assert not health.aside


def test_a_program_that_ran_on_this_very_node_only_is_no_evidence():
    health = Health()
    health.runs("p", ["n1"])
    end = failed(1, "n1")
    assert health.fails("p", end, others=1) == ([end], [])


def test_a_node_that_fails_what_runs_elsewhere_is_set_aside_and_its_tasks_run_again():
    health = Health()
    health.runs("p", ["n1"])
    for task_id in range(1, LIMIT):
        assert health.fails("p", failed(task_id, "n2"), others=1) == ([], [])
    assert health.pairs == [(task_id, 1) for task_id in range(1, LIMIT)]
    ends, bad = health.fails("p", failed(LIMIT, "n2"), others=1)
    assert bad == ["n2"]
    assert [end.id for end in ends] == list(range(1, LIMIT + 1))
    assert {(end.outcome, end.cause) for end in ends} == {(Outcome.LOST, Cause.NODE_LOST)}
    assert "no such file" in health.aside["n2"]
    assert not health.pairs
    [late], again = health.fails("other", failed(9, "n2"), others=1)
    assert (late.outcome, again) == (Outcome.LOST, [])


def test_a_start_between_failures_is_an_alibi():
    health = Health()
    health.runs("p", ["n1"])
    for task_id in range(100):
        end = failed(task_id, "n2")
        assert health.fails("p", end, others=1) == ([], [])
        assert health.runs("q", ["n2"]) == [end]
    assert not health.aside


def test_the_last_node_is_never_set_aside():
    health = Health()
    health.runs("p", ["n1"])
    for task_id in range(10):
        assert health.fails("p", failed(task_id, "n2"), others=0)[1] == []


def test_of_a_wide_task_those_nodes_are_to_blame_that_start_nothing_else():
    health = Health()
    health.runs("p", ["n9"])
    for task_id in range(1, LIMIT):
        assert health.fails("p", failed(task_id, "n1", "n2"), others=2) == ([], [])
        assert health.runs("q", ["n1"]) == []  # n2 may still be to blame
    ends, bad = health.fails("p", failed(LIMIT, "n1", "n2"), others=2)
    assert bad == ["n2"]
    assert len(ends) == LIMIT


def test_a_failure_is_not_held_back_for_ever():
    health = Health()
    health.runs("p", ["n1"])
    end = failed(1, "n2")
    health.fails("p", end, others=1)
    assert health.tick(0.0) == []
    assert health.tick(4.9) == []
    assert health.tick(5.1) == [end]
    assert len(health) == 0


def test_a_node_whose_pilot_is_new_begins_anew():
    health = Health()
    health.runs("p", ["n1"])
    for task_id in range(LIMIT):
        health.fails("p", failed(task_id, "n2"), others=1)
    health.trust("n2")
    assert health.fails("p", failed(7, "n2"), others=1) == ([], [])


def test_programs_without_number_are_no_leak():
    health = Health()
    for number in range(5000):
        health.runs(f"p{number}", ["n1"])
    assert len(health._ran_on) <= 1024
