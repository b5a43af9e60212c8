"""The table of moves, and the page about it.

After a change of MOVES: `python tests/unit/test_states.py` writes the table in docs/states.md.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from ensemble.core.states import (
    FINAL,
    MOVES,
    RETRYABLE,
    RUNNABLE,
    State,
    check_move,
    is_legal_history,
)
from ensemble.errors import IllegalMoveError

PAGE = Path(__file__).parents[2] / "docs" / "states.md"
BEGIN, END = "<!-- moves: begin -->\n", "<!-- moves: end -->\n"


def table() -> str:
    lines = ["| from | to | who moves it |", "|---|---|---|"]
    for start, finishes in MOVES.items():
        lines += [f"| {start} | {finish} | {actor} |" for finish, actor in finishes.items()]
    return "\n".join(lines) + "\n"


def split_page() -> tuple[str, str, str]:
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    found, after = rest.split(END)
    return before, found, after


def test_the_page_has_the_table_of_this_program():
    assert split_page()[1] == table(), "run: python tests/unit/test_states.py"


def test_the_page_has_a_paragraph_for_every_state():
    text = PAGE.read_text("utf-8")
    assert [state for state in State if f"\n**{state}**" not in text] == []


def test_every_state_has_its_moves():
    assert list(MOVES) == sorted(State, key=list(MOVES).index)
    assert set(MOVES) == set(State)


def test_every_state_is_reached_and_none_moves_to_itself():
    reached = {finish for finishes in MOVES.values() for finish in finishes}
    assert reached == set(State) - {State.CREATED}
    assert [state for state in State if state in MOVES[state]] == []


def test_nothing_leaves_a_final_state_but_a_retry():
    assert MOVES[State.JOB_FINISHED] == {}
    assert FINAL - {State.JOB_FINISHED} == RETRYABLE
    for state in RETRYABLE:
        assert set(MOVES[state]) == {State.PREPROCESSED, State.AWAITING_PARENTS}
        assert set(MOVES[state].values()) == {"user"}


def test_what_is_not_final_can_be_killed():
    assert {state for state in State if State.USER_KILLED in MOVES[state]} == set(State) - FINAL


def test_what_is_runnable_can_run():
    assert {state for state in State if State.RUNNING in MOVES[state]} == RUNNABLE


def test_an_illegal_move_says_what_is_legal():
    check_move(41, State.RUNNING, State.RUN_DONE)
    with pytest.raises(IllegalMoveError) as caught:
        check_move(41, State.FAILED, State.RUNNING)
    assert str(caught.value) == (
        "task 41 is FAILED and cannot become RUNNING; it may become AWAITING_PARENTS, PREPROCESSED"
    )
    with pytest.raises(IllegalMoveError, match="nothing: it is final"):
        check_move(41, State.JOB_FINISHED, State.RUNNING)


def path(*states: State) -> list[tuple[State, State]]:
    return list(pairwise(states))


def test_histories():
    s = State
    assert is_legal_history([])
    assert is_legal_history(path(s.CREATED, s.PREPROCESSED, s.RUNNING, s.RUN_ERROR, s.FAILED))
    assert is_legal_history(path(s.CREATED, s.PREPROCESSED, s.JOB_FINISHED))
    assert not is_legal_history(path(s.PREPROCESSED, s.RUNNING))  # no beginning
    assert not is_legal_history(path(s.CREATED, s.RUNNING))
    assert not is_legal_history([(s.CREATED, s.PREPROCESSED), (s.RUNNING, s.RUN_DONE)])  # a gap


if __name__ == "__main__":
    before, _, after = split_page()
    PAGE.write_text(before + BEGIN + table() + END + after, "utf-8")
