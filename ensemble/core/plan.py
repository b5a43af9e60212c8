"""What the dispatcher asks of a job mode: where tasks go, and for how many more there is room. Pure.

`WholeNodes` (mpi mode) and `Shares` (serial mode) are plans over the books in packing.py.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from ensemble.core.events import Pair
from ensemble.core.model import Claim, Placement, Room, SlotRoom


class Plan(Protocol):
    """The nodes of a launcher, and what is on them."""

    @property
    def total(self) -> int:
        """How many nodes there are, now."""

    @property
    def busy(self) -> float:
        """How many nodes' worth is taken."""

    @property
    def kept(self) -> frozenset[Pair]:
        """The attempts that wait here for a node, not launched yet."""

    def place(self, claim: Claim) -> Placement | None:
        """Find a place for a task; None when there is none."""

    def keep(self, claim: Claim) -> bool:
        """Keep a task that has no place for a later moment; False where that is not done."""

    def pop(self) -> tuple[Claim, Placement] | None:
        """Take out a kept task that has a place now."""

    def take(self, pairs: Collection[Pair]) -> list[Claim]:
        """Take out those of *pairs* that are kept."""

    def clear(self) -> list[Claim]:
        """Take out all that are kept."""

    def set_aside(self, name: str) -> list[Pair]:
        """Send nothing more to a node; return what waits there and has not started."""

    def readmit(self, name: str) -> None:
        """Use a node again that was set aside."""

    def release(self, task_id: int) -> None:
        """Nothing of a placed task runs any more."""

    def started(self, task_id: int) -> None:
        """A placed task runs."""

    def learn(self, num_nodes: int, took_s: float) -> None:
        """Take in how long a run on so many nodes took."""

    def room(self, left_s: float | None) -> Room | SlotRoom | None:
        """Return what to ask the store for now; None when nothing more is wanted."""

    def whole(self, left_s: float | None) -> Room | SlotRoom:
        """Return the room there is when nothing runs: what does not fit in is left alone."""

    def is_roomier(self) -> bool:
        """Tell whether more is free than when `room` was last asked."""

    def tick(self, *, is_closing: bool) -> tuple[list[Claim], list[Pair]]:
        """Let a second pass; return what was kept, and what was placed and has not started, too long.

        Args:
            is_closing: Nothing more is to start: what waits at a pilot has waited long enough.
        """

    def validate(self, placed: Collection[int]) -> None:
        """Raise AssertionError unless just these tasks are placed and the books are right."""
