"""What happens to a launcher (events), and what it then does (effects). Plain values.

Which effect answers with which event is said in dispatch.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ensemble.core.model import Claim, End, Placement, Room, Start

#: A task and its attempt.
Pair = tuple[int, int]

# ---------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """The store handed out these tasks; they are held under our lease."""

    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class ClaimFailed:
    """The store could not be asked; what it may have handed out is found by reconciling."""


@dataclass(frozen=True, slots=True)
class WorkRang:
    """Somebody says there is new work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A task's process runs."""

    id: int
    attempt: int
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class CouldNotStart:
    """A task's process could not be made; nothing of it runs."""

    id: int
    attempt: int
    at: datetime
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A task was to be ended before its process was made; nothing of it ever ran."""

    id: int
    attempt: int
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A task's whole process tree is gone."""

    id: int
    attempt: int
    at: datetime
    #: As a shell shows it: 128 + N after signal N.
    status: int
    #: Whether we signalled it before it exited: then status 0 does not mean that it finished.
    was_signalled: bool = False
    #: Why the MPI launcher could not start the program, when that is why it ended.
    start_error: str | None = None
    #: The last lines of its output, when it did not end well.
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KillAsked:
    """The kill set: held by us, and somebody moved them away from running."""

    pairs: frozenset[Pair]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time passed."""

    #: Monotonic seconds.
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainAsked:
    """The launcher is to leave; asked a second time, at once."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProspectTold:
    """Whether waiting tasks that would fit depend on something that runs somewhere."""

    has_prospect: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """What the store says we hold, asked when `known` was what we knew of."""

    held: frozenset[Pair]
    known: frozenset[Pair]
    #: `Dispatcher.claims_made` when it was asked: a claim made since makes the answer stale.
    claims_made: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseLost:
    """Others may take our tasks, or have."""

    reason: str


Event = (
    Claimed
    | ClaimFailed
    | WorkRang
    | Started
    | CouldNotStart
    | Skipped
    | Ended
    | KillAsked
    | Ticked
    | DrainAsked
    | ProspectTold
    | Reconciled
    | LeaseLost
)

# ---------------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class Ask:
    """Take tasks that fit *room* from the store."""

    room: Room


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a task on these nodes."""

    claim: Claim
    placement: Placement


@dataclass(frozen=True, slots=True)
class Terminate:
    """End a task's whole process tree; at once when forced, else after TERM and a grace."""

    id: int
    is_forced: bool = False


@dataclass(frozen=True, slots=True)
class RecordStart:
    """Report a start."""

    start: Start


@dataclass(frozen=True, slots=True)
class RecordEnd:
    """Report an end: the hold is released."""

    end: End


@dataclass(frozen=True, slots=True)
class MarkTimedOut:
    """Write RUN_TIMEOUT for tasks past their own limit, before they are ended."""

    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class MarkDrained:
    """Write RUN_TIMEOUT for everything that runs, before it is ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class AskProspect:
    """Find out whether waiting tasks that fit depend on something that runs."""


@dataclass(frozen=True, slots=True)
class AskHeld:
    """Compare with the store again, soon: a claim that was under way blurred the last answer."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Nothing is left to do: close the lease and exit."""

    reason: str
    #: Whether the lease was lost, so that nothing of ours could be recorded.
    is_lost: bool = False


Effect = (
    Ask
    | Launch
    | Terminate
    | RecordStart
    | RecordEnd
    | MarkTimedOut
    | MarkDrained
    | AskProspect
    | AskHeld
    | Leave
)
