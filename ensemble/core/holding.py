"""Ends that are not reported yet: the end of the batch job may explain them in a moment. Pure.

A scheduler that ends a job often signals its tasks, or takes its nodes, before the launcher hears of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ensemble.core.events import Pair
from ensemble.core.model import End
from ensemble.core.runs import explained


@dataclass(slots=True, kw_only=True)
class _Held:
    end: End
    #: When it is what it seems; counted from the first tick after it.
    until: float | None = None


class Holding:
    """Exits by signal and losses of nodes that a drain may yet explain."""

    def __init__(self, hold_s: float) -> None:
        """Hold nothing yet.

        Args:
            hold_s: How long to hold; 0 holds nothing.
        """
        self._hold_s = hold_s
        self._held: list[_Held] = []

    def __len__(self) -> int:
        return len(self._held)

    @property
    def pairs(self) -> list[Pair]:
        """The attempts whose ends are held."""
        return [(held.end.id, held.end.attempt) for held in self._held]

    def take(self, end: End) -> bool:
        """Hold an end; False where that is not done."""
        if self._hold_s > 0:
            self._held.append(_Held(end=end))
        return self._hold_s > 0

    def tick(self, now: float) -> list[End]:
        """Let time pass; return the ends that nothing has explained."""
        due = [held.end for held in self._held if held.until is not None and held.until <= now]
        self._held = [held for held in self._held if held.until is None or held.until > now]
        for held in self._held:
            if held.until is None:
                held.until = now + self._hold_s
        return due

    def explain(self, reason: str) -> list[End]:
        """Return all ends as the cut-offs by the allocation's end that they were."""
        ends = [explained(held.end, reason) for held in self._held]
        self._held.clear()
        return ends

    def clear(self) -> None:
        """Forget all: nothing can be reported any more."""
        self._held.clear()
