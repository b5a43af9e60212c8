"""The node book: which nodes are free and who has the others. Pure.

Only `claim` and `release` write it; `validate` restates what must always hold.
"""

from __future__ import annotations

from collections.abc import Sequence

from ensemble.core.model import Node, Placement


class NodeBook:
    """Whole nodes, each with at most one task (mpi mode)."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = tuple(nodes)
        self._free = set(range(len(self._nodes)))
        self._held: dict[int, tuple[int, ...]] = {}

    @property
    def total(self) -> int:
        """How many nodes there are."""
        return len(self._nodes)

    @property
    def free(self) -> int:
        """How many nodes have no task."""
        return len(self._free)

    def claim(self, task_id: int, count: int) -> Placement | None:
        """Give *count* nodes to a task, neighbours if possible; None when so many are not free."""
        if task_id in self._held or not 0 < count <= len(self._free):
            return None
        chosen = self._choose(count)
        self._free.difference_update(chosen)
        self._held[task_id] = chosen
        return Placement(nodes=tuple(self._nodes[i] for i in chosen))

    def release(self, task_id: int) -> None:
        """Take a task's nodes back."""
        self._free.update(self._held.pop(task_id))

    def validate(self) -> None:
        """Raise AssertionError unless every node is free or held, by one task."""
        held = [i for places in self._held.values() for i in places]
        assert len(held) == len(set(held)), "a node is held twice"
        assert not self._free & set(held), "a node is free and held"
        assert self._free | set(held) == set(range(len(self._nodes))), "a node is lost"

    def _choose(self, count: int) -> tuple[int, ...]:
        """Return the tightest run of neighbours that suffices, else the first free nodes.

        Node lists come in the order of the network's topology, so neighbours are near; taking the
        tightest run leaves the wide ones for wide tasks.
        """
        runs = [run for run in _runs(sorted(self._free)) if len(run) >= count]
        if not runs:
            return tuple(sorted(self._free)[:count])
        return tuple(min(runs, key=len)[:count])


def _runs(places: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs
