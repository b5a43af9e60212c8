"""A task while a launcher has it, and what its end means. Pure."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import assert_never

import msgspec

from ensemble.core.events import Ended
from ensemble.core.model import Cause, Claim, End, Outcome, Placement

#: What schedulers send to everything in a job that ends.
_SCHEDULER_SIGNALS = frozenset(
    128 + number
    for number in (
        signal.SIGTERM,
        signal.SIGKILL,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGUSR1,
        signal.SIGUSR2,
    )
)


class Ending(Enum):
    """Why a task is being ended."""

    KILLED = auto()
    TIME_LIMIT = auto()
    DRAINED = auto()
    LOST = auto()


@dataclass(slots=True, kw_only=True)
class Run:
    """A task in the book: of its claim, only what is needed until its end."""

    id: int
    attempt: int
    num_nodes: int
    time_limit_minutes: float | None
    placement: Placement
    program: str
    started_at: datetime | None = None
    #: Counted from the first tick after the start, so that a limit is never enforced early.
    limit_at: float | None = None
    ending: Ending | None = None

    @classmethod
    def of(cls, claim: Claim, placement: Placement) -> Run:
        """Begin a claimed task's run."""
        return cls(
            id=claim.id,
            attempt=claim.attempt,
            num_nodes=claim.num_nodes,
            time_limit_minutes=claim.time_limit_minutes,
            placement=placement,
            program=claim.argv[0],
        )


def failed_start(
    run: Run,
    at: datetime,
    reason: str,
    *,
    status: int | None = None,
    output: str | None = None,
) -> End:
    """Return the end of a run whose program could not be started, with what its launcher printed."""
    return End(
        id=run.id,
        attempt=run.attempt,
        outcome=Outcome.ERROR,
        at=at,
        started_at=run.started_at,
        nodes=run.placement.names,
        exit_code=status,
        cause=Cause.COULD_NOT_START,
        reason=reason,
        error=reason,
        output=output,
    )


def end_of(run: Run, event: Ended, leaving: str | None = None) -> End:
    """Return the end of a run whose processes are gone.

    Args:
        run: The run.
        event: Its end.
        leaving: Why the launcher leaves, if it does.
    """
    outcome, cause, reason = _meaning(run, event)
    if cause is Cause.ALLOCATION_ENDED:
        reason = leaving
    return End(
        id=run.id,
        attempt=run.attempt,
        outcome=outcome,
        at=event.at,
        started_at=run.started_at,
        nodes=run.placement.names,
        exit_code=event.status,
        cause=cause,
        reason=reason,
        error=None if outcome is Outcome.DONE else event.error,
        output=event.output,
    )


def lost_with_node(run: Run, at: datetime | None, reason: str) -> End:
    """Return the end of a run whose node was lost, with everything that ran there."""
    outcome, cause, why = Outcome.LOST, Cause.NODE_LOST, reason
    match run.ending:
        case Ending.KILLED:
            outcome, cause, why = Outcome.KILLED, Cause.KILLED_BY_USER, reason
        case Ending.TIME_LIMIT:
            outcome, cause, why = Outcome.TIMEOUT, Cause.TIME_LIMIT, _limit(run)
        case Ending.DRAINED:
            outcome, cause, why = Outcome.TIMEOUT, Cause.ALLOCATION_ENDED, reason
        case Ending.LOST | None:
            pass
        case _:
            assert_never(run.ending)
    return End(
        id=run.id,
        attempt=run.attempt,
        outcome=outcome,
        at=at,
        started_at=run.started_at,
        nodes=run.placement.names,
        cause=cause,
        reason=why,
    )


def _limit(run: Run) -> str:
    return f"{run.time_limit_minutes:g} minutes"


def _meaning(run: Run, event: Ended) -> tuple[Outcome, Cause | None, str | None]:
    if event.status == 0 and not event.was_signalled:
        return Outcome.DONE, None, None  # it ended well before our signal reached it
    match run.ending:
        case Ending.KILLED:
            return Outcome.KILLED, Cause.KILLED_BY_USER, None
        case Ending.TIME_LIMIT:
            return Outcome.TIMEOUT, Cause.TIME_LIMIT, _limit(run)
        case Ending.DRAINED:
            return Outcome.TIMEOUT, Cause.ALLOCATION_ENDED, None
        case Ending.LOST | None if event.lost is not None:
            return Outcome.LOST, Cause.NODE_LOST, event.lost
        case Ending.LOST | None:
            return _failure(event.status)
        case _:
            assert_never(run.ending)


def _failure(status: int) -> tuple[Outcome, Cause, str]:
    if 128 < status <= 128 + signal.NSIG:
        try:
            return Outcome.ERROR, Cause.SIGNAL, signal.Signals(status - 128).name
        except ValueError:
            pass
    return Outcome.ERROR, Cause.EXIT_CODE, str(status)


def explained(end: End, reason: str) -> End:
    """Return *end*, a failure or a loss, as the cut-off by the allocation's end that it was; what never ran, as it is."""
    if end.started_at is None:
        return end
    return msgspec.structs.replace(
        end, outcome=Outcome.TIMEOUT, cause=Cause.ALLOCATION_ENDED, reason=reason
    )


def may_be_schedulers(status: int) -> bool:
    """Tell whether an exit status is what the signals of an ending batch job leave."""
    return status in _SCHEDULER_SIGNALS
