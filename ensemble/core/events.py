"""What happens to a launcher (events), and what it then does (effects). Plain values.

Which effect answers with which event is said in dispatch.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from ensemble.core.model import Claim, End, Node, Placement, Room, SlotRoom, Start

#: A task and its attempt.
Pair = tuple[int, int]


class Value(msgspec.Struct, frozen=True, gc=False):
    """What passes here thousands of times a second: cheap to make, and no work for the collector."""


# ---------------------------------------------------------------------------- events


class Claimed(Value, frozen=True, kw_only=True):
    """The store handed out these tasks; they are held under our lease."""

    claims: tuple[Claim, ...]


class ClaimFailed(Value, frozen=True):
    """The store could not be asked; what it may have handed out is found by reconciling."""


class WorkRang(Value, frozen=True):
    """Somebody says there is new work."""


class Started(Value, frozen=True, kw_only=True):
    """A task's process runs."""

    id: int
    attempt: int
    at: datetime
    #: Whether that is the program itself, and not an MPI launcher that may yet fail to start it.
    is_certain: bool = True


class CouldNotStart(Value, frozen=True, kw_only=True):
    """A task's process could not be made; nothing of it runs."""

    id: int
    attempt: int
    at: datetime
    reason: str


class Skipped(Value, frozen=True, kw_only=True):
    """A task was to be ended before its process was made; nothing of it ever ran."""

    id: int
    attempt: int
    at: datetime


class Ended(Value, frozen=True, kw_only=True):
    """A task's whole process tree is gone."""

    id: int
    attempt: int
    at: datetime
    #: As a shell shows it: 128 + N after signal N.
    status: int
    #: Whether we signalled it before it exited: then status 0 does not mean that it finished.
    was_signalled: bool = False
    #: Whether its MPI launcher's words allow that a scheduler which ends the batch job did it.
    is_cut_off: bool = False
    #: Why it was its MPI launcher that failed, and not the task, when a node was lost under it.
    lost: str | None = None
    #: Why the MPI launcher could not start the program, when that is why it ended.
    start_error: str | None = None
    #: The last lines of its output, when it did not end well.
    error: str | None = None
    #: The last 16 kB of its output, when that is kept in the store.
    output: str | None = None
    #: When its process was made, where the pilot tells that only now.
    started_at: datetime | None = None


class PilotJoined(Value, frozen=True, kw_only=True):
    """A node's pilot is there (serial mode)."""

    node: Node
    #: Hardware threads by core, devices, and memory that tasks may have.
    cores: tuple[tuple[int, ...], ...]
    gpus: tuple[str, ...]
    memory_mb: int | None


class PilotSilent(Value, frozen=True, kw_only=True):
    """A node's pilot cannot be reached; its tasks may still run."""

    node: str


class PilotLost(Value, frozen=True, kw_only=True):
    """Nothing of a node's pilot and its tasks runs any more."""

    node: str
    at: datetime
    reason: str
    #: Whether the node gets no other one.
    is_final: bool = False


class NodesGone(Value, frozen=True, kw_only=True):
    """The scheduler has taken nodes out of the batch job."""

    names: tuple[str, ...]
    reason: str


class KillAsked(Value, frozen=True, kw_only=True):
    """The kill set: held by us, and somebody moved them away from running."""

    pairs: frozenset[Pair]


class Ticked(Value, frozen=True, kw_only=True):
    """Time passed."""

    #: Monotonic seconds.
    now: float


class DrainAsked(Value, frozen=True, kw_only=True):
    """The launcher is to leave; asked a second time, at once."""

    reason: str


class ProspectTold(Value, frozen=True, kw_only=True):
    """Whether waiting tasks that would fit depend on something that runs somewhere."""

    has_prospect: bool


class Reconciled(Value, frozen=True, kw_only=True):
    """What the store says we hold, asked when `known` was what we knew of."""

    held: frozenset[Pair]
    known: frozenset[Pair]
    #: `Dispatcher.claims_made` when it was asked: a claim made since makes the answer stale.
    claims_made: int


class LeaseLost(Value, frozen=True, kw_only=True):
    """Others may take our tasks, or have."""

    reason: str


class Announced(Value, frozen=True, kw_only=True):
    """A start is on record, before anything was started."""

    id: int
    attempt: int


Event = (
    Claimed
    | Announced
    | ClaimFailed
    | WorkRang
    | Started
    | CouldNotStart
    | Skipped
    | Ended
    | PilotJoined
    | PilotSilent
    | PilotLost
    | NodesGone
    | KillAsked
    | Ticked
    | DrainAsked
    | ProspectTold
    | Reconciled
    | LeaseLost
)

# ---------------------------------------------------------------------------- effects


class Ask(Value, frozen=True):
    """Take tasks that fit *room* from the store."""

    room: Room | SlotRoom


class Launch(Value, frozen=True):
    """Start a task on these nodes."""

    claim: Claim
    placement: Placement


class Announce(Value, frozen=True):
    """Have a start put on record now; the task is launched when it is there."""

    id: int
    attempt: int
    nodes: tuple[str, ...]


class SetAside(Value, frozen=True):
    """Say which nodes get no more tasks, as what starts elsewhere does not start there."""

    nodes: Mapping[str, str]


class Terminate(Value, frozen=True):
    """End a task's whole process tree; at once when forced, else after TERM and a grace."""

    id: int
    is_forced: bool = False


class Recall(Value, frozen=True):
    """Take back from pilots what they have not started."""

    pairs: tuple[Pair, ...]


class RecordStart(Value, frozen=True):
    """Report a start."""

    start: Start


class RecordEnd(Value, frozen=True):
    """Report an end: the hold is released."""

    end: End


class MarkTimedOut(Value, frozen=True):
    """Write RUN_TIMEOUT for tasks past their own limit, before they are ended."""

    pairs: tuple[Pair, ...]


class MarkDrained(Value, frozen=True):
    """Write RUN_TIMEOUT for everything that runs, before it is ended."""

    reason: str


class AskProspect(Value, frozen=True):
    """Find out whether waiting tasks that fit depend on something that runs."""


class AskHeld(Value, frozen=True):
    """Compare with the store again, soon: a claim that was under way blurred the last answer."""


class Leave(Value, frozen=True):
    """Nothing is left to do: close the lease and exit."""

    reason: str
    #: Whether the lease was lost, so that nothing of ours could be recorded.
    is_lost: bool = False


Effect = (
    Ask
    | Announce
    | Launch
    | SetAside
    | Terminate
    | Recall
    | RecordStart
    | RecordEnd
    | MarkTimedOut
    | MarkDrained
    | AskProspect
    | AskHeld
    | Leave
)
