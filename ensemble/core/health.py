"""Which nodes cannot start what starts elsewhere. Pure.

A node without its file system fails a task in a millisecond and takes the next: it would fail an
ensemble within minutes. A missing program fails just so, but everywhere: what tells the two apart is
that the program runs on another node. A failure that may be its node's fault is held back until it is
known whose it was; tasks that such a node failed run elsewhere.

What ails more than a few nodes is no fault of theirs (a disk that is full, a program that was removed):
then all are trusted again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from ensemble.core.events import Pair
from ensemble.core.model import Cause, End, Outcome

#: A node that fails so many tasks in a row is set aside; twice as many after each time that was wrong.
LIMIT = 3
#: The part of the nodes that may be set aside, one at least.
_PART = 4
#: After so many seconds without another word, a failure is its task's own.
_HOLD_S = 5.0
#: How many programs are remembered.
_PROGRAMS = 1024
#: How many failures of programs that ran nowhere yet are held back.
_DOUBTS = 256


@dataclass(slots=True, kw_only=True)
class _Doubt:
    """A failure, and the nodes whose fault it may be."""

    end: End
    nodes: set[str]
    #: Counted from the first tick after it.
    until: float | None = None


class Health:
    """The nodes of a launcher, as far as starts there tell."""

    def __init__(self, nodes: int) -> None:
        """Trust all nodes.

        Args:
            nodes: How many there are, or will be.
        """
        self._nodes = nodes
        #: Up to two nodes on which each program has run; and, of those that ran nowhere, has failed.
        self._ran_on: dict[str, tuple[str, ...]] = {}
        self._failed_on: dict[str, tuple[str, ...]] = {}
        #: How many starts in a row have failed on each node.
        self._failed: dict[str, int] = {}
        #: How many tasks in a row were lost on each node.
        self._lost: dict[str, int] = {}
        self._doubts: list[_Doubt] = []
        self._limit = LIMIT
        #: The nodes that are set aside, and why; and those of them that are never trusted again.
        self.aside: dict[str, str] = {}
        self._gone: set[str] = set()

    def __len__(self) -> int:
        return len(self._doubts)

    @property
    def pairs(self) -> list[Pair]:
        """The attempts whose ends are held back."""
        return [(doubt.end.id, doubt.end.attempt) for doubt in self._doubts]

    def runs(self, program: str, nodes: Sequence[str]) -> list[End]:
        """Take in that a program runs on nodes; return the failures that are not their fault."""
        _note(self._ran_on, program, nodes)
        if self._lost:
            for node in nodes:
                self._lost.pop(node, None)
        if not self._failed:
            return []
        cleared = [node for node in nodes if self._failed.pop(node, 0)]
        if not cleared:
            return []
        for doubt in self._doubts:
            doubt.nodes.difference_update(cleared)
        return self._take(lambda doubt: not doubt.nodes)

    def fails(self, program: str, end: End) -> list[End]:
        """Take in that a program could not be started; return what to report now.

        `aside` may be another afterwards.

        Args:
            program: What was to be started.
            end: The report of that, with its nodes.
        """
        nodes = set(end.nodes)
        if not nodes.isdisjoint(self.aside):
            return [self._as_lost(end)]
        if self._there <= len(nodes) or self._is_its_own(program, nodes):
            return [end]
        self._doubts.append(_Doubt(end=end, nodes=nodes))
        for node in end.nodes:
            self._failed[node] = self._failed.get(node, 0) + 1
        if program not in self._ran_on:
            return []
        bad = [node for node in end.nodes if self._failed[node] >= self._limit]
        if not bad:
            return []
        if self._on_trial + len(bad) > self._most:
            return self._forgive()
        for node in bad:
            self.aside[node] = (
                f"{node} was set aside: {self._failed.pop(node)} tasks in a row that start "
                f"elsewhere could not start there, the last: {end.reason}"
            )
        return [self._as_lost(end) for end in self._take(lambda d: not d.nodes.isdisjoint(bad))]

    def loses(self, end: End) -> None:
        """Take in that a task was lost with one of its nodes; `aside` may be another afterwards."""
        for node in set(end.nodes).difference(self.aside):
            self._lost[node] = self._lost.get(node, 0) + 1
            if self._lost[node] >= LIMIT and self._on_trial < self._most:
                self.aside[node] = (
                    f"{node} was set aside: {self._lost.pop(node)} tasks in a row were lost there"
                )

    @property
    def is_any(self) -> bool:
        """Whether a node is there, or may come yet."""
        return self._there > 0

    @property
    def _there(self) -> int:
        """How many nodes there are that are not gone for good."""
        return self._nodes - len(self._gone)

    @property
    def _most(self) -> int:
        """How many of them may be set aside: never the last."""
        return min(max(self._there // _PART, 1), max(self._there - 1, 0))

    @property
    def _on_trial(self) -> int:
        """How many nodes are set aside by what we saw, which may be wrong."""
        return len(self.aside) - len(self._gone)

    def _is_its_own(self, program: str, nodes: set[str]) -> bool:
        """Tell whether a failure is plainly its task's own fault."""
        if program in self._ran_on:
            return nodes.issuperset(self._ran_on[program])
        _note(self._failed_on, program, sorted(nodes))
        return len(self._failed_on[program]) > 1 or len(self._doubts) >= _DOUBTS

    def _forgive(self) -> list[End]:
        """Trust all nodes again: it was the tasks, or what all nodes share."""
        self._limit *= 2
        self._failed.clear()
        self._lost.clear()
        for node in self.aside.keys() - self._gone:
            del self.aside[node]
        return self.clear()

    def give_up(self, node: str, reason: str) -> list[End]:
        """Set a node aside that is not there any more, or is lost again and again, however many there are.

        What ran there only, is as if it had run nowhere. Where too few nodes are left beside those on trial, all of
        these are trusted again.

        Returns:
            The failures to report then.
        """
        self.trust(node)
        self._gone.add(node)
        self.aside[node] = f"{node} was set aside: {reason}"
        for known in (self._ran_on, self._failed_on):
            for program in [program for program, nodes in known.items() if node in nodes]:
                known[program] = tuple(each for each in known[program] if each != node)
                if not known[program]:
                    del known[program]
        return self._forgive() if self._on_trial > self._most else []

    def trust(self, node: str) -> None:
        """Let a node begin anew."""
        self.aside.pop(node, None)
        self._failed.pop(node, None)
        self._lost.pop(node, None)
        self._gone.discard(node)

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


def _note(known: dict[str, tuple[str, ...]], program: str, nodes: Sequence[str]) -> None:
    """Remember one or two nodes of a program."""
    found = known.get(program, ())
    if len(found) < 2 and found != tuple(nodes):
        if len(known) >= _PROGRAMS:
            known.clear()
        known[program] = tuple(dict.fromkeys((*found, *nodes)))[:2]
