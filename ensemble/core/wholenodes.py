"""The plan of mpi mode: a task has whole nodes to itself. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ensemble.core.ahead import Ahead
from ensemble.core.events import Pair
from ensemble.core.model import Claim, Node, Placement, Room
from ensemble.core.packing import NodeBook


class WholeNodes:
    """The node book, and the single-node tasks claimed ahead for it."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        """Take nodes that are free."""
        self._book = NodeBook(nodes)
        self._ahead = Ahead(len(nodes))
        self._asked_nodes = 0

    @property
    def total(self) -> int:
        """How many nodes there are."""
        return self._book.total

    @property
    def busy(self) -> float:
        """How many nodes have a task."""
        return self._book.held

    @property
    def kept(self) -> frozenset[Pair]:
        """The attempts claimed ahead."""
        return self._ahead.pairs

    def place(self, claim: Claim) -> Placement | None:
        """Give a task free nodes; None when there are not enough."""
        return self._book.claim(claim.id, claim.num_nodes)

    def keep(self, claim: Claim) -> bool:
        """Keep a single-node task for the next free node."""
        if claim.num_nodes == 1:
            self._ahead.add(claim)
        return claim.num_nodes == 1

    def pop(self) -> tuple[Claim, Placement] | None:
        """Take out the first task that was claimed ahead, when a node is free for it."""
        if not (self._ahead and self._book.free):
            return None
        claim = self._ahead.pop()
        placement = self._book.claim(claim.id, 1)
        assert placement is not None, "the task has a node already"
        return claim, placement

    def take(self, pairs: Collection[Pair]) -> list[Claim]:
        """Take out those of *pairs* that were claimed ahead."""
        return self._ahead.take(pairs)

    def clear(self) -> list[Claim]:
        """Take out all that were claimed ahead."""
        return self._ahead.clear()

    def set_aside(self, name: str) -> list[Pair]:
        """Give a node to nobody any more; nothing waits there."""
        self._book.set_aside(name)
        return []

    def readmit(self, name: str) -> None:
        """Use a node again that was set aside."""
        self._book.readmit(name)

    def release(self, task_id: int) -> None:
        """Take a task's nodes back."""
        self._book.release(task_id)
        self._ahead.node_freed()

    def started(self, task_id: int) -> None:
        """Nothing changes: it has had its nodes since it was placed."""

    def learn(self, num_nodes: int, took_s: float) -> None:
        """Take in the length of a run: short single-node ones are claimed ahead."""
        if num_nodes == 1:
            self._ahead.learn(took_s)

    def room(self, left_s: float | None) -> Room | None:
        """Ask for the free nodes, and for some tasks ahead."""
        wanted = self._ahead.wanted()
        if not (self._book.free or len(self._ahead) < wanted / 2):
            return None
        self._asked_nodes = self._book.free
        ahead = max(wanted - len(self._ahead), 0)
        return Room(
            nodes=self._book.free, left_s=left_s, max_tasks=self._book.free + ahead, ahead=ahead
        )

    def whole(self, left_s: float | None) -> Room:
        """Return all the nodes."""
        return Room(nodes=self._book.total, left_s=left_s, max_tasks=self._book.total)

    def is_roomier(self) -> bool:
        """Tell whether a task that was too wide for what we asked for may fit now."""
        return self._book.free > self._asked_nodes

    def tick(self, *, is_closing: bool) -> tuple[list[Claim], list[Pair]]:
        """Let a second pass: where no node comes free, others may have what was claimed ahead."""
        return self._ahead.tick(), []

    def validate(self, placed: Collection[int]) -> None:
        """Raise AssertionError unless just these tasks have nodes, and no task waits beside a free one."""
        self._book.validate()
        assert self._book.holders == set(placed), "runs and node book differ"
        assert not (self._ahead and self._book.free), "a node is free and a task waits for one"
