"""Which nodes cannot start what starts elsewhere. Pure.

A node without its file system fails a task in a millisecond and takes the next: it would fail an
ensemble within minutes. A missing program fails just so, but everywhere: what tells the two apart is
that the program runs on another node. A failure that may be its node's fault is held back until it is
known whose it was; tasks that such a node failed run elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from ensemble.core.events import Pair
from ensemble.core.model import Cause, End, Outcome

#: A node that fails so many tasks in a row is set aside.
LIMIT = 3
#: After so many seconds without another word, a failure is its task's own.
_HOLD_S = 5.0
#: How many programs are remembered.
_PROGRAMS = 1024


@dataclass(slots=True, kw_only=True)
class _Doubt:
    """A failure, and the nodes whose fault it may be."""

    end: End
    nodes: set[str]
    #: Counted from the first tick after it.
    until: float | None = None


class Health:
    """The nodes of a launcher, as far as starts there tell."""

    def __init__(self) -> None:
        """Trust all nodes."""
        #: Up to two nodes on which each program has run.
        self._ran_on: dict[str, tuple[str, ...]] = {}
        #: How many starts in a row have failed on each node.
        self._failed: dict[str, int] = {}
        self._doubts: list[_Doubt] = []
        #: The nodes that were set aside, and why.
        self.aside: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._doubts)

    @property
    def pairs(self) -> list[Pair]:
        """The attempts whose ends are held back."""
        return [(doubt.end.id, doubt.end.attempt) for doubt in self._doubts]

    def runs(self, program: str, nodes: Sequence[str]) -> list[End]:
        """Take in that a program runs on nodes; return the failures that are not their fault."""
        known = self._ran_on.get(program, ())
        if len(known) < 2 and known[:1] != tuple(nodes[:1]):
            if len(self._ran_on) >= _PROGRAMS:
                self._ran_on.clear()
            self._ran_on[program] = (*known, *nodes)[:2]
        if not self._failed:
            return []
        for node in nodes:
            self._failed.pop(node, None)
        for doubt in self._doubts:
            doubt.nodes.difference_update(nodes)
        return self._take(lambda doubt: not doubt.nodes)

    def fails(self, program: str, end: End, *, others: int) -> tuple[list[End], list[str]]:
        """Take in that a program could not be started.

        Args:
            program: What was to be started.
            end: The report of that, with its nodes.
            others: How many nodes there would be without these.

        Returns:
            What to report now, and the nodes to set aside.
        """
        nodes = set(end.nodes)
        if not nodes.isdisjoint(self.aside):
            return [self._as_lost(end)], []
        if others <= 0 or nodes.issuperset(self._ran_on.get(program, ())):
            return [end], []
        self._doubts.append(_Doubt(end=end, nodes=nodes))
        for node in end.nodes:
            self._failed[node] = self._failed.get(node, 0) + 1
        bad = [node for node in end.nodes if self._failed[node] >= LIMIT]
        for node in bad:
            del self._failed[node]
            self.aside[node] = (
                f"{node} was set aside: {LIMIT} tasks in a row that start elsewhere could not "
                f"start there, the last: {end.reason}"
            )
        return [
            self._as_lost(end) for end in self._take(lambda d: not d.nodes.isdisjoint(bad))
        ], bad

    def trust(self, node: str) -> None:
        """Let a node begin anew."""
        self.aside.pop(node, None)
        self._failed.pop(node, None)

    def tick(self, now: float) -> list[End]:
        """Let time pass; return the failures that were no node's fault, as it seems."""
        due = self._take(lambda doubt: doubt.until is not None and doubt.until <= now)
        for doubt in self._doubts:
            if doubt.until is None:
                doubt.until = now + _HOLD_S
        return due

    def clear(self) -> list[End]:
        """Hold nothing back any more; return what was."""
        return self._take(lambda _: True)

    def _take(self, is_settled: Callable[[_Doubt], bool]) -> list[End]:
        taken = [doubt.end for doubt in self._doubts if is_settled(doubt)]
        self._doubts = [doubt for doubt in self._doubts if not is_settled(doubt)]
        return taken

    def _as_lost(self, end: End) -> End:
        why = next(self.aside[node] for node in end.nodes if node in self.aside)
        return msgspec.structs.replace(end, outcome=Outcome.LOST, cause=Cause.NODE_LOST, reason=why)
