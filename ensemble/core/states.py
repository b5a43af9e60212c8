"""The life of a task: its states, and the one table of legal moves.

Three readers share `MOVES`: this program, the table `move` that the database's trigger checks, and
docs/states.md. A test compares them.

    CREATED -> (AWAITING_PARENTS) -> READY -> STAGED_IN -> PREPROCESSED -> RUNNING -> RUN_DONE
            -> POSTPROCESSED -> JOB_FINISHED

Steps with nothing to do are skipped in the statement that would have entered them, so a move may be
a *shortcut* over them: PREPROCESSED -> JOB_FINISHED is a task that was started and ended well
between two reports and has nothing to postprocess or stage out.

A task is *held* while its `lease_id` is set, whatever its state; only what is not held can be
claimed, removed or retried. Moves say nothing about holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from ensemble.errors import IllegalMoveError


class State(StrEnum):
    """Where a task stands. The comment says who moves it on."""

    #: Where every history begins; the insert itself moves on.
    CREATED = "CREATED"
    #: The transaction in which the last parent finishes.
    AWAITING_PARENTS = "AWAITING_PARENTS"
    #: The stager: stage in.
    READY = "READY"
    #: The stager: preprocess.
    STAGED_IN = "STAGED_IN"
    #: A launcher claims it (held, same state) and starts it.
    PREPROCESSED = "PREPROCESSED"
    #: Its launcher, or the reaper when the launcher is lost.
    RUNNING = "RUNNING"
    #: The stager: postprocess.
    RUN_DONE = "RUN_DONE"
    #: The stager: stage out.
    POSTPROCESSED = "POSTPROCESSED"
    #: Nobody: it ended well.
    JOB_FINISHED = "JOB_FINISHED"
    #: The transaction that releases the hold: retry policy or error handler.
    RUN_ERROR = "RUN_ERROR"
    #: The transaction that releases the hold: time-out policy or handler.
    RUN_TIMEOUT = "RUN_TIMEOUT"
    #: A launcher, as from PREPROCESSED: it ran before and may run again.
    RESTART_READY = "RESTART_READY"
    #: Nobody but `ensemble retry`.
    FAILED = "FAILED"
    #: Nobody but `ensemble retry`.
    USER_KILLED = "USER_KILLED"


class Actor(StrEnum):
    """Who makes a move."""

    ADD = "add"
    PARENT = "parent"
    STAGER = "stager"
    LAUNCHER = "launcher"
    POLICY = "policy"
    USER = "user"


RUNNABLE = frozenset({State.PREPROCESSED, State.RESTART_READY})
FINAL = frozenset({State.JOB_FINISHED, State.FAILED, State.USER_KILLED})
#: What `ensemble retry` takes back.
RETRYABLE = frozenset({State.FAILED, State.USER_KILLED})

_A, _P, _S, _L, _Y, _U = Actor
# What a launcher reports of a task that it claimed, whether or not the start was reported before.
_FROM_CLAIMED = {
    State.RUN_DONE: _L,
    State.JOB_FINISHED: _L,  # shortcut: nothing to postprocess or stage out
    State.RUN_ERROR: _L,
    State.RUN_TIMEOUT: _L,
    State.USER_KILLED: _U,
}

MOVES: Mapping[State, Mapping[State, Actor]] = {
    State.CREATED: {
        State.AWAITING_PARENTS: _A,
        State.READY: _A,
        State.PREPROCESSED: _A,  # shortcut: nothing to wait for, stage in or preprocess
        State.FAILED: _A,  # a parent had failed already
        State.USER_KILLED: _U,
    },
    State.AWAITING_PARENTS: {
        State.READY: _P,
        State.PREPROCESSED: _P,  # shortcut: nothing to stage in or preprocess
        State.FAILED: _P,
        State.USER_KILLED: _U,
    },
    State.READY: {State.STAGED_IN: _S, State.FAILED: _S, State.USER_KILLED: _U},
    State.STAGED_IN: {State.PREPROCESSED: _S, State.FAILED: _S, State.USER_KILLED: _U},
    State.PREPROCESSED: {State.RUNNING: _L, **_FROM_CLAIMED},
    State.RESTART_READY: {State.RUNNING: _L, **_FROM_CLAIMED},
    State.RUNNING: {
        **_FROM_CLAIMED,
        State.RESTART_READY: _Y,  # its launcher was lost
        State.FAILED: _Y,  # its launcher was lost once too often
    },
    State.RUN_DONE: {
        State.POSTPROCESSED: _S,
        State.JOB_FINISHED: _S,  # shortcut: nothing to stage out
        State.FAILED: _S,
        State.USER_KILLED: _U,
    },
    State.POSTPROCESSED: {State.JOB_FINISHED: _S, State.FAILED: _S, State.USER_KILLED: _U},
    State.JOB_FINISHED: {},
    State.RUN_ERROR: {State.RESTART_READY: _Y, State.FAILED: _Y, State.USER_KILLED: _U},
    State.RUN_TIMEOUT: {
        State.RUN_DONE: _L,  # it ended well after all
        State.JOB_FINISHED: _L,  # likewise, with nothing to postprocess or stage out
        State.RESTART_READY: _Y,
        State.FAILED: _Y,
        State.USER_KILLED: _U,
    },
    State.FAILED: {State.PREPROCESSED: _U, State.AWAITING_PARENTS: _U},
    State.USER_KILLED: {State.PREPROCESSED: _U, State.AWAITING_PARENTS: _U},
}


def check_move(task_id: int, start: State, finish: State) -> None:
    """Raise IllegalMoveError, with the moves that are legal, unless *start* may become *finish*."""
    legal = MOVES[start]
    if finish not in legal:
        choice = ", ".join(sorted(legal)) or "nothing: it is final"
        raise IllegalMoveError(
            f"task {task_id} is {start} and cannot become {finish}; it may become {choice}"
        )


def is_legal_history(path: list[tuple[State, State]]) -> bool:
    """Tell whether *path*, the (from, to) pairs of a task's events in order, is possible."""
    here = State.CREATED
    for start, finish in path:
        if start != here or finish not in MOVES[start]:
            return False
        here = finish
    return True
