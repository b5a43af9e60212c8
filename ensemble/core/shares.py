"""The plan of serial mode: tasks take parts of nodes, and short ones are sent to a pilot ahead. Pure.

It keeps a mirror of each pilot's queue: the pilot decides what starts when, by the same code. A task
that is sent ahead starts there without a round trip as soon as something ends. How much is sent ahead
is bounded in time, and nothing is where tasks are long (docs/decisions/0007-serial-mode.md).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice

from ensemble.core.ahead import Ahead
from ensemble.core.events import Pair
from ensemble.core.model import Claim, Need, Node, Placement, SlotRoom, Vacancy
from ensemble.core.packing import NodeQueue, SlotBook
from ensemble.core.places import Kinds, Place, Ranking

#: Runs longer than this are not sent ahead.
_SHORT_S = 2.0
#: How much work is sent ahead, in seconds, and at most in tasks a node.
_AHEAD_S = 1.0
_AHEAD_PER_NODE = 512
#: The most that is claimed at once: a longer transaction would hold up the reports.
_BATCH = 512
#: Ticks in which nothing of a node's ended, after which what waits there is recalled.
_PATIENCE_TICKS = 2
#: Needs remembered, so that alike ones are one value.
_KNOWN = 1024
#: How many of the freest nodes are tried before all are.
_TRIED = 8
#: After so many changes, or needs, what is known of where a need fits is found anew.
_CHANGES = 4096
_NEEDS = 256


@dataclass(slots=True)
class _Search:
    """Where a need that found no place among the freest nodes may fit."""

    need: Need
    #: Nodes where it did when last seen.
    places: deque[Place]
    #: How many of the changes since then have been looked at.
    seen: int


class Shares:
    """The nodes with a pilot, and the tasks on them."""

    def __init__(self, slots_per_node: int = 1) -> None:
        """Begin without nodes: they come as their pilots join.

        Args:
            slots_per_node: So many tasks share a node at least, whatever their packing count says.
        """
        self._slots = slots_per_node
        #: The nodes as they are when nothing runs there, alike ones counted together.
        self._kinds = Kinds()
        self._places: dict[str, Place] = {}
        self._of: dict[int, Place] = {}
        self._by_free = Ranking(lambda place: -place.free)
        #: By the number of GPUs: a task waits where it will fit.
        self._by_waiting: dict[int, Ranking] = {}
        #: Nodes where something came free, in this order, and needs that look there.
        self._changes: list[Place] = []
        self._searches: dict[Need, _Search] = {}
        #: What is free, nodes that are alike counted together; and nodes that changed since.
        self._alike = Kinds()
        self._uncounted: dict[str, Place] = {}
        #: Tasks that are said to run.
        self._started: set[int] = set()
        #: Tasks that are not sent ahead: they wait here for a place.
        self._suspects = Ahead(0)
        self._known: dict[Need, Need] = {}
        self._kept: dict[tuple[int, Need], tuple[int, Need]] = {}
        #: Nodes that get nothing more, though their pilots are there.
        self._aside: set[str] = set()
        self._up = 0
        self._free = 0.0
        self._waiting = 0
        self._is_roomier = False
        self._wanted = 0
        #: The usual length of a run, in seconds; None until one has ended.
        self._usual_s: float | None = None
        self._ends = 0
        self._rate = 0.0

    # ------------------------------------------------------------------ nodes

    def add(self, node: Node, book: SlotBook) -> None:
        """A pilot joined: its node is free."""
        assert node.name not in self._places, "the node is in use"
        place = self._places[node.name] = Place(node, NodeQueue(book), Placement(nodes=(node,)))
        self._kinds.exchange(None, book.whole)
        self._up += 1
        self._changed(place, is_freer=True)

    def suspend(self, name: str) -> None:
        """Send nothing more to a node that cannot be reached; what it has stays in the book."""
        self._aside.discard(name)
        self._take_down(name)

    def _take_down(self, name: str) -> None:
        place = self._places.get(name)
        if place is None or not place.is_up:
            return
        place.is_up = False
        self._up -= 1
        self._free -= place.free
        self._waiting -= place.waits
        self._by_free.discard(place)
        self._by_waiting[len(place.queue.book.gpus)].discard(place)
        self._uncounted.pop(name, None)
        self._count(place)
        self._kinds.exchange(place.queue.book.whole, None)

    def remove(self, name: str) -> dict[int, bool]:
        """Forget a node; return the tasks that were on it, and whether each had its part of it."""
        self.suspend(name)
        place = self._places.pop(name, None)
        if place is None:
            return {}
        for task_id in place.tasks:
            del self._of[task_id]
        self._started.difference_update(place.tasks)
        return {task_id: task_id in place.queue.book for task_id in place.tasks}

    # ------------------------------------------------------------------ the plan

    @property
    def total(self) -> int:
        """How many nodes have a pilot, without those set aside."""
        return len(self._places) - len(self._aside)

    @property
    def busy(self) -> float:
        """How many nodes' worth is taken."""
        return max(self._up - self._free, 0.0)

    @property
    def kept(self) -> frozenset[Pair]:
        """Suspects without a place; what else waits does so at its pilot."""
        return self._suspects.pairs

    def place(self, claim: Claim) -> Placement | None:
        """Choose a node: the freest that has room now, else one where little waits."""
        need = need_of(claim, self._slots)
        if len(self._known) > _KNOWN:
            self._known.clear()
            self._kept.clear()
        need = self._known.setdefault(need, need)  # tasks are often alike: one value for all
        place = self._place_now(claim.id, need)
        if place is None and not claim.is_suspect:
            place = self._place_ahead(claim.id, need)
        if place is None:
            return None
        kept = (claim.attempt, need)
        place.tasks[claim.id] = self._kept.setdefault(kept, kept)
        self._of[claim.id] = place
        return place.placement

    def keep(self, claim: Claim) -> bool:
        """Keep a suspect until it has a place of its own; of others, nothing."""
        if claim.is_suspect:
            if not self._suspects:
                self._suspects.node_freed()  # it begins to wait now
            self._suspects.add(claim)
        return claim.is_suspect

    def pop(self) -> tuple[Claim, Placement] | None:
        """Take out a suspect that has a place now."""
        for _ in range(min(len(self._suspects), _TRIED)):
            claim = self._suspects.pop()
            placement = self.place(claim)
            if placement is not None:
                return claim, placement
            self._suspects.add(claim)
        return None

    def take(self, pairs: Collection[Pair]) -> list[Claim]:
        """Take out those of *pairs* that are kept."""
        return self._suspects.take(pairs)

    def clear(self) -> list[Claim]:
        """Take out all that are kept."""
        return self._suspects.clear()

    def set_aside(self, name: str) -> list[Pair]:
        """Send nothing more to a node; return what waits there and has not started."""
        place = self._places.get(name)
        if place is None or not place.is_up:
            return []
        self._agree(place)
        self._take_down(name)
        self._aside.add(name)
        return [(task_id, place.tasks[task_id][0]) for task_id in place.queue.waiting]

    def readmit(self, name: str) -> None:
        """Use a node again that was set aside, if its pilot is still there."""
        if name not in self._aside:
            return
        self._aside.remove(name)
        place = self._places[name]
        place.is_up = True
        place.free, place.waits = 0.0, 0
        self._up += 1
        self._kinds.exchange(None, place.queue.book.whole)
        self._changed(place, is_freer=True)

    def release(self, task_id: int) -> None:
        """Take a task's part back, and let its node go on with what waits there, as its pilot does."""
        place = self._of.pop(task_id, None)
        if place is None:
            return  # its node was removed
        del place.tasks[task_id]
        self._started.discard(task_id)
        queue = place.queue
        if not queue.drop(task_id):
            queue.book.release(task_id)
            place.still_ticks = 0
            self._ends += 1
        self._go_on(place)

    def started(self, task_id: int) -> None:
        """Take in that a task runs: its pilot may have chosen another one than we think."""
        if task_id in self._of:
            self._started.add(task_id)

    def learn(self, num_nodes: int, took_s: float) -> None:
        """Take in the length of a run: a moving mean of them is the usual one."""
        took_s = max(took_s, 0.0)
        last_s = took_s if self._usual_s is None else self._usual_s
        self._usual_s = last_s + (took_s - last_s) / 8

    def room(self, left_s: float | None) -> SlotRoom | None:
        """Ask for what is free, and for some tasks to send ahead."""
        self._is_roomier = False
        self._wanted = self._count_wanted()
        free = self._vacancies()
        if not free and self._waiting >= self._wanted / 2:
            return None
        ahead = max(self._wanted - self._waiting, 0)
        return SlotRoom(
            free=free,
            whole=self._kinds.told(),
            left_s=left_s,
            max_tasks=_BATCH,
            ahead=min(ahead, _BATCH),
            slots_per_node=self._slots,
        )

    def whole(self, left_s: float | None) -> SlotRoom:
        """Return the nodes as they are when nothing runs on them."""
        return SlotRoom(
            free=(),
            whole=self._kinds.told(),
            left_s=left_s,
            max_tasks=0,
            slots_per_node=self._slots,
        )

    def is_roomier(self) -> bool:
        """Tell whether more is free than when the store was asked."""
        return self._is_roomier

    def tick(self, *, is_closing: bool) -> tuple[list[Claim], list[Pair]]:
        """Let a second pass: what waits at a node where nothing ends is better off elsewhere."""
        self._rate, self._ends = max(float(self._ends), self._rate / 2), 0
        recalled: list[Pair] = []
        for place in self._places.values():
            place.still_ticks += 1
            if not place.waits or not place.is_up:
                continue
            self._agree(place)
            if is_closing or place.still_ticks >= _PATIENCE_TICKS:
                recalled += [(id, place.tasks[id][0]) for id in place.queue.waiting]
        if recalled:
            self._usual_s = None
        return self._suspects.tick(), recalled

    def validate(self, placed: Collection[int]) -> None:
        """Raise AssertionError unless just these tasks are placed and every node's book is right."""
        assert self._of.keys() == set(placed), "runs and shares differ"
        free = 0.0
        for place in self._places.values():
            place.queue.book.validate()
            free += place.queue.book.free if place.is_up else 0.0
            held = {id for id in place.tasks if id in place.queue.book}
            assert held.isdisjoint(place.queue.waiting), "a task runs and waits"
            assert held.union(place.queue.waiting) == place.tasks.keys(), "a task is misplaced"
            assert len(held) == len(place.queue.book), "a part is held by nobody"
        assert abs(free - self._free) < 1e-6, "free parts do not add up"
        waiting = sum(len(p.queue.waiting) for p in self._places.values() if p.is_up)
        assert waiting == self._waiting, "waiting tasks do not add up"

    # ------------------------------------------------------------------ choosing

    def _place_now(self, task_id: int, need: Need) -> Place | None:
        place = self._find_free(need)
        if place is not None:
            place.queue.book.claim(task_id, need)
            self._changed(place)
        return place

    def _find_free(self, need: Need) -> Place | None:
        """Return the freest node that has room; where that is none of the first, any that has."""
        if need not in self._searches:
            for place in islice(self._by_free.best(), _TRIED):
                if place.free * need.packing < 0.999:  # the others have even less
                    return None
                if place.has_room(need):
                    return place
            self._begin_search(need)
        return self._search(self._searches[need])

    def _search(self, search: _Search) -> Place | None:
        """Go on where it was left: nodes that had no room have none, unless they changed since."""
        while search.places or search.seen < len(self._changes):
            if not search.places:
                search.places.extend(self._changes[search.seen :])
                search.seen = len(self._changes)
            if search.places[0].has_room(search.need):
                search.places.rotate(-1)
                return search.places[-1]
            search.places.popleft()
        return None

    def _begin_search(self, need: Need) -> None:
        if len(self._searches) > _NEEDS:
            self._forget_searches()
        found = [place for place in self._places.values() if place.has_room(need)]
        found.sort(key=lambda place: -place.free)
        self._searches[need] = _Search(need, deque(found), len(self._changes))

    def _forget_searches(self) -> None:
        self._changes.clear()
        self._searches.clear()

    def _place_ahead(self, task_id: int, need: Need) -> Place | None:
        if self._waiting >= max(self._wanted, self._count_wanted()):
            return None
        for gpus, ranking in self._by_waiting.items():
            if gpus < need.gpus:
                continue
            for place in ranking.best():
                if place.queue.book.could_ever(need):
                    self._queue_up(place, task_id, need)
                    return place
        return None

    def _queue_up(self, place: Place, task_id: int, need: Need) -> None:
        if not place.waits:
            place.still_ticks = 0
        place.queue.add(task_id, need)
        self._go_on(place)

    def _go_on(self, place: Place) -> None:
        """Start what fits, as the pilot does."""
        while place.queue.waiting and place.queue.pop() is not None:
            pass
        self._changed(place, is_freer=True)

    def _agree(self, place: Place) -> None:
        """Let those run in the mirror that do on the node.

        Where needs differ, a pilot that saw ends and new tasks in another order chose others.
        """
        queue = place.queue
        odd = [task_id for task_id in queue.waiting if task_id in self._started]
        for task_id in odd:
            need = place.tasks[task_id][1]
            unseen = [other for other in queue.book.holders if other not in self._started]
            while unseen and not queue.book.fits(need):
                other = unseen.pop()
                queue.book.release(other)
                queue.add(other, place.tasks[other][1])
            queue.start(task_id)
        if odd:
            self._go_on(place)

    def _changed(self, place: Place, *, is_freer: bool = False) -> None:
        """Bring the sums up to date with a node.

        Args:
            place: The node.
            is_freer: Whether something may fit there that did not before.
        """
        if not place.is_up:
            return
        queue = place.queue
        free, waits = queue.book.free, len(queue.waiting)
        self._free += free - place.free
        self._waiting += waits - place.waits
        place.free, place.waits = free, waits
        self._by_free.update(place)
        self._ranking_for(place).update(place)
        self._uncounted[place.node.name] = place
        if is_freer and free > 0 and not waits:
            self._is_roomier = True
            if self._searches:
                self._changes.append(place)
            if len(self._changes) > _CHANGES:
                self._forget_searches()

    def _ranking_for(self, place: Place) -> Ranking:
        gpus = len(place.queue.book.gpus)
        if gpus not in self._by_waiting:
            self._by_waiting[gpus] = Ranking(lambda place: place.waits)
        return self._by_waiting[gpus]

    def _count_wanted(self) -> int:
        """Return how many tasks to hold at pilots for the next moment."""
        if self._usual_s is None or self._usual_s > _SHORT_S:
            return 0
        running = len(self._of) - self._waiting
        soon = _AHEAD_S * running / max(self._usual_s, 1e-4)
        at_rate = max(_AHEAD_S * self._rate, _AHEAD_PER_NODE)
        return math.ceil(min(soon, at_rate, _AHEAD_PER_NODE * len(self._places)))

    def _vacancies(self) -> tuple[Vacancy, ...]:
        """Return what is free, nodes that are alike counted together."""
        for place in self._uncounted.values():
            self._count(place)
        self._uncounted.clear()
        return self._alike.told()

    def _count(self, place: Place) -> None:
        book = place.queue.book
        vacancy = book.vacancy if place.is_open and place.free > 0 else None
        self._alike.exchange(place.vacancy, vacancy)
        place.vacancy = vacancy


def need_of(claim: Claim, slots_per_node: int = 1) -> Need:
    """Return what a task takes of its node."""
    return Need(
        packing=max(claim.node_packing_count, slots_per_node),
        threads=claim.threads_per_rank,
        threads_per_core=claim.threads_per_core,
        gpus=claim.gpus_per_rank,
        memory_mb=claim.memory_mb,
    )
