"""Nodes with a pilot, as the plan of serial mode keeps them: each, ranked, and counted by kind. Pure."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

from ensemble.core.model import Need, Node, Placement, Vacancy
from ensemble.core.packing import NodeQueue

#: Kinds of free nodes told to the store: of each thing, those that have most of it.
_KINDS = 64
_KINDS_BY_ONE = 16


@dataclass(slots=True)
class Place:
    """A node with a pilot."""

    node: Node
    queue: NodeQueue
    placement: Placement
    #: Whether its pilot can be reached: if not, nothing new is sent there.
    is_up: bool = True
    still_ticks: int = 0
    #: The attempts that are here, and what each takes.
    tasks: dict[int, tuple[int, Need]] = field(default_factory=dict)
    #: As counted in the sums over all nodes: its free part, how many wait, and what it is to the store.
    free: float = 0.0
    waits: int = 0
    vacancy: Vacancy | None = None

    @property
    def is_open(self) -> bool:
        """Whether a task may start here at once: what waits comes first."""
        return self.is_up and not self.queue.waiting

    def has_room(self, need: Need) -> bool:
        """Tell whether a task may start here at once, and fits."""
        return self.is_open and self.queue.book.fits(need)


class Kinds:
    """How many nodes there are of each kind."""

    def __init__(self) -> None:
        """Begin without nodes."""
        self._numbers: Counter[Vacancy] = Counter()

    def exchange(self, old: Vacancy | None, new: Vacancy | None) -> None:
        """Count a node as *new* that was counted as *old*; None is not at all."""
        if old == new:
            return
        if old is not None:
            self._numbers[old] -= 1
            if not self._numbers[old]:
                del self._numbers[old]
        if new is not None:
            self._numbers[new] += 1

    def told(self) -> tuple[Vacancy, ...]:
        """Return the kinds as the store is told of them, with their numbers."""
        return tuple(replace(kind, nodes=self._numbers[kind]) for kind in _notable(self._numbers))


def _notable(kinds: Collection[Vacancy]) -> Collection[Vacancy]:
    """Return the kinds of nodes that the store should know of, for its choice has a limit."""
    if len(kinds) <= _KINDS:
        return kinds
    keys: tuple[Callable[[Vacancy], tuple[float, ...]], ...] = (
        lambda kind: (float(kind.share), kind.cores),
        lambda kind: (kind.cores, float(kind.share)),
        lambda kind: (kind.gpus, kind.memory_mb or 0, float(kind.share)),
        lambda kind: (kind.memory_mb or 0, kind.gpus, float(kind.share)),
    )
    best = (kind for key in keys for kind in heapq.nlargest(_KINDS_BY_ONE, kinds, key=key))
    return dict.fromkeys(best)


class Ranking:
    """Nodes by a key that changes, the smallest first: a heap in which old entries are left to rot."""

    def __init__(self, key: Callable[[Place], float]) -> None:
        self._key = key
        self._version = 0
        self._heap: list[tuple[float, int, Place]] = []
        self._current: dict[str, tuple[float, int, Place]] = {}

    def update(self, place: Place) -> None:
        """Take in that a node is new, or that its key may have changed."""
        key = self._key(place)
        known = self._current.get(place.node.name)
        if known is not None and known[0] == key and known[2] is place:
            return
        self._version += 1
        entry = self._current[place.node.name] = (key, self._version, place)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 64 + 4 * len(self._current):
            self._heap = list(self._current.values())
            heapq.heapify(self._heap)

    def discard(self, place: Place) -> None:
        """Forget a node."""
        self._current.pop(place.node.name, None)

    def best(self) -> Iterator[Place]:
        """Yield nodes, the first of the ranking first; the last one yielded may be changed."""
        looked: list[tuple[float, int, Place]] = []
        try:
            while self._heap:
                entry = heapq.heappop(self._heap)
                if self._current.get(entry[2].node.name) is entry:
                    looked.append(entry)
                    yield entry[2]
        finally:
            for entry in looked:
                if self._current.get(entry[2].node.name) is entry:
                    heapq.heappush(self._heap, entry)
