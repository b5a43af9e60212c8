"""The books of nodes: which are free, whole or in part, and who has the rest. Pure.

Only `claim` and `release` write them; `validate` restates what must always hold.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from fractions import Fraction
from math import lcm

import msgspec

from ensemble.core.model import Need, Node, Placement, Vacancy


class NodeBook:
    """Whole nodes, each with at most one task (mpi mode)."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = tuple(nodes)
        self._free = set(range(len(self._nodes)))
        self._aside: set[int] = set()
        self._held: dict[int, tuple[int, ...]] = {}

    @property
    def total(self) -> int:
        """How many nodes there are, without those set aside."""
        return len(self._nodes) - len(self._aside)

    @property
    def held(self) -> int:
        """How many nodes have a task."""
        return sum(map(len, self._held.values()))

    @property
    def free(self) -> int:
        """How many nodes have no task."""
        return len(self._free)

    @property
    def holders(self) -> Set[int]:
        """The tasks that have nodes."""
        return self._held.keys()

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
        self._free.update(place for place in self._held.pop(task_id) if place not in self._aside)

    def set_aside(self, name: str) -> None:
        """Give a node to nobody any more; who has it keeps it."""
        found = self._find(name)
        self._aside |= found
        self._free -= found

    def readmit(self, name: str) -> None:
        """Give a node away again that was set aside."""
        found = self._find(name) & self._aside
        self._aside -= found
        self._free |= found.difference(*self._held.values())

    def _find(self, name: str) -> set[int]:
        return {i for i, node in enumerate(self._nodes) if node.name == name}

    def validate(self) -> None:
        """Raise AssertionError unless every node is free, set aside or held, by one task."""
        held = [i for places in self._held.values() for i in places]
        assert len(held) == len(set(held)), "a node is held twice"
        assert not self._free & {*held, *self._aside}, "a node is free and held, or set aside"
        known = self._free.union(held, self._aside)
        assert known == set(range(len(self._nodes))), "a node is lost"

    def _choose(self, count: int) -> tuple[int, ...]:
        """Return the tightest run of neighbours that suffices, else the first free nodes.

        Node lists come in the order of the network's topology, so neighbours are near; taking the
        tightest run leaves the wide ones for wide tasks.
        """
        runs = [run for run in _runs(sorted(self._free)) if len(run) >= count]
        if not runs:
            return tuple(sorted(self._free)[:count])
        return tuple(min(runs, key=len)[:count])


class SlotBook:
    """One node that tasks share (serial mode): a part of it, cores, GPUs and memory for each.

    The pilot's book says which cores and GPUs a task gets; the launcher keeps one of each node, too, to
    know what to ask the store for. All arithmetic is exact: the part of the node that is free is counted
    in units of 1/`_units`, a common multiple of all packing counts in it.
    """

    def __init__(
        self,
        cores: Sequence[Sequence[int]],
        gpus: Sequence[str] = (),
        memory_mb: int | None = None,
    ) -> None:
        """Take a node that is free.

        Args:
            cores: The node's hardware threads, by core.
            gpus: Its devices' names.
            memory_mb: What it has, where that is to be counted.
        """
        self.cores = tuple(tuple(core) for core in cores)
        self.gpus = tuple(gpus)
        self.memory_mb = memory_mb
        self._units = self._free = 1
        self._free_cores = list(range(len(self.cores)))
        self._free_gpus = list(range(len(self.gpus)))
        self._free_mb = memory_mb or 0
        self._held: dict[int, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, task_id: int) -> bool:
        return task_id in self._held

    @property
    def holders(self) -> Set[int]:
        """The tasks that have a part."""
        return self._held.keys()

    @property
    def free(self) -> float:
        """The part of the node that is free; to compare nodes by, not to decide what fits."""
        return self._free / self._units

    @property
    def vacancy(self) -> Vacancy:
        """What is free, for the store to choose by."""
        return Vacancy(
            nodes=1,
            share=Fraction(self._free, self._units),
            cores=len(self._free_cores),
            all_cores=len(self.cores),
            gpus=len(self._free_gpus),
            memory_mb=None if self.memory_mb is None else self._free_mb,
        )

    @property
    def whole(self) -> Vacancy:
        """What the node has when nothing runs on it."""
        return Vacancy(
            nodes=1,
            share=Fraction(1),
            cores=len(self.cores),
            all_cores=len(self.cores),
            gpus=len(self.gpus),
            memory_mb=self.memory_mb,
        )

    def claim(self, task_id: int, need: Need) -> Slot | None:
        """Give a task its part; None when that is not free now."""
        if task_id in self._held or not self.fits(need):
            return None
        cores = self._cores_for(need)
        memory_mb = self._memory_for(need)
        if self._units % need.packing:
            self._divide(need.packing)
        self._free -= self._units // need.packing
        self._free_mb -= memory_mb
        held = _Held(
            need, tuple(self._free_cores[:cores]), tuple(self._free_gpus[: need.gpus]), memory_mb
        )
        del self._free_cores[:cores], self._free_gpus[: need.gpus]
        self._held[task_id] = held
        threads = (need.threads_per_core or 1) if need.threads is not None else None
        cpus = tuple(cpu for core in held.cores for cpu in self.cores[core][:threads])
        return Slot(cpus=cpus, gpus=tuple(self.gpus[place] for place in held.gpus))

    def fits(self, need: Need) -> bool:
        """Tell whether what a task takes is free now."""
        return (
            self._units <= self._free * need.packing
            and self._cores_for(need) <= len(self._free_cores)
            and need.gpus <= len(self._free_gpus)
            and self._memory_for(need) <= self._free_mb
        )

    def release(self, task_id: int) -> None:
        """Take a task's part back."""
        held = self._held.pop(task_id)
        if not self._held:
            self._units = self._free = 1
        else:
            self._free += self._units // held.need.packing
        self._free_mb += held.memory_mb
        if held.cores:
            self._free_cores = sorted([*self._free_cores, *held.cores])
        if held.gpus:
            self._free_gpus = sorted([*self._free_gpus, *held.gpus])

    def could_ever(self, need: Need) -> bool:
        """Tell whether the task would fit if nothing else were here."""
        return need.gpus <= len(self.gpus) and self._memory_for(need) <= (self.memory_mb or 0)

    def validate(self) -> None:
        """Raise AssertionError unless every part of the node is free or held, by one task."""
        used = sum((Fraction(1, held.need.packing) for held in self._held.values()), Fraction(0))
        assert used + Fraction(self._free, self._units) == 1, "parts do not add up to the node"
        for name, free, taken, all_ in (
            (
                "core",
                self._free_cores,
                [c for h in self._held.values() for c in h.cores],
                self.cores,
            ),
            ("GPU", self._free_gpus, [g for h in self._held.values() for g in h.gpus], self.gpus),
        ):
            assert sorted([*free, *taken]) == list(range(len(all_))), (
                f"a {name} is held twice or lost"
            )
            assert free == sorted(free), f"free {name}s are out of order"
        assert self._free_mb >= 0
        used_mb = sum(held.memory_mb for held in self._held.values())
        assert self._free_mb + used_mb == (self.memory_mb or 0), "memory does not add up"

    def _cores_for(self, need: Need) -> int:
        """Return how many whole cores the task gets; 0 where more tasks than cores share the node."""
        if need.threads is None:
            return len(self.cores) // need.packing
        return min(-(-need.threads // (need.threads_per_core or 1)), len(self.cores))

    def _memory_for(self, need: Need) -> int:
        """Return the memory that is set aside for the task; 0 where memory is not counted."""
        return 0 if self.memory_mb is None else need.memory_mb or 0

    def _divide(self, packing: int) -> None:
        """Count in units that this packing count divides, and those of all tasks that are here."""
        self._units = lcm(packing, *{held.need.packing for held in self._held.values()})
        self._free = self._units - sum(
            self._units // held.need.packing for held in self._held.values()
        )


class NodeQueue:
    """One shared node and what waits for a part of it, in order.

    What fits starts, also past a task that does not: but after so many have passed the one that waits
    longest, nothing more does until it has its turn.
    """

    #: How many may pass.
    PATIENCE = 64

    def __init__(self, book: SlotBook) -> None:
        """Queue for a node."""
        self.book = book
        self._order = 0
        #: Who waits longest, and how many have passed it.
        self._first: int | None = None
        self._passed = 0
        #: By need, as tasks are often alike: task and its place in the order.
        self._waiting: dict[Need, dict[int, int]] = {}
        self._needs: dict[int, Need] = {}

    @property
    def waiting(self) -> Set[int]:
        """The tasks that wait."""
        return self._needs.keys()

    def add(self, task_id: int, need: Need) -> None:
        """Let a task wait."""
        self._order += 1
        self._needs[task_id] = need
        self._waiting.setdefault(need, {})[task_id] = self._order

    def drop(self, task_id: int) -> bool:
        """Forget a task that waits; False when it does not."""
        need = self._needs.pop(task_id, None)
        if need is None:
            return False
        alike = self._waiting[need]
        del alike[task_id]
        if not alike:
            del self._waiting[need]
        return True

    def start(self, task_id: int) -> bool:
        """Start this task, whoever waits longer; False when it does not fit, or does not wait."""
        need = self._needs.get(task_id)
        if need is None or self.book.claim(task_id, need) is None:
            return False
        return self.drop(task_id)

    def pop(self) -> tuple[int, Slot] | None:
        """Start the first task that fits: it has its part from now on. None when none may start."""
        heads = [(next(iter(alike.items())), need) for need, alike in self._waiting.items()]
        if len(heads) > 1:
            heads.sort(key=lambda head: head[0][1])
        if heads and heads[0][0][0] != self._first:
            self._first, self._passed = heads[0][0][0], 0
        for (task_id, _), need in heads:
            slot = self.book.claim(task_id, need)
            if slot is not None:
                self._passed += 1
                self.drop(task_id)
                return task_id, slot
            if self._passed >= self.PATIENCE:
                return None
        return None


class Slot(msgspec.Struct, frozen=True, gc=False):
    """What a task has of its node."""

    #: The hardware threads to bind it to; none is no binding.
    cpus: tuple[int, ...]
    gpus: tuple[str, ...]


class _Held(msgspec.Struct, frozen=True, gc=False):
    need: Need
    cores: tuple[int, ...]
    gpus: tuple[int, ...]
    memory_mb: int


def _runs(places: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs
