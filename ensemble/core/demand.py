"""The backlog, laid on what is there to take it, and what is left for each queue policy. Pure.

Tasks that no policy and no launcher could tell apart, but for how long they take, are a *lane*: there are few, however
many tasks wait.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import mul
from typing import NamedTuple

from ensemble.core.queues import (
    Backlog,
    Capacity,
    QueuePolicy,
    Rules,
    Submission,
    ceil,
    fits,
    is_single,
    share_of,
    unfit,
)

#: What is left over is not worth a batch job of its own while others absorb so much more of its kind.
_WORTH = 0.1
#: A launcher without an end absorbs no more than this: a laptop's is no reason to leave a cluster idle.
_HORIZON_MINUTES = 120.0


class _Amount(NamedTuple):
    """How much there is of some tasks."""

    tasks: int
    #: All their minutes together, and those of the longest.
    minutes: float
    longest: float


class _Lane:
    """Tasks that nothing has absorbed yet, and that differ in nothing but how long they take."""

    def __init__(self, sample: Backlog, tasks_of: Mapping[float, int]) -> None:
        """Take them.

        Args:
            sample: The shortest; its workflow stands for all that the same filters let through.
            tasks_of: How many there are by minutes.
        """
        self.sample = sample
        self.num_nodes = sample.num_nodes
        self._lengths = sorted(tasks_of)
        self._counts = [tasks_of[length] for length in self._lengths]
        self._now: dict[float, _Amount] = {}
        self._first: dict[float, _Amount] = {}
        #: The longest that some launcher or batch job would start.
        self._reach = 0.0

    def left(self, limit: float = math.inf) -> _Amount:
        """Return how much is left of what is started when so many minutes are."""
        if limit not in self._now:
            end = self._end(limit)
            counts = self._counts[:end]
            self._now[limit] = _Amount(
                sum(counts),
                sum(map(mul, counts, self._lengths)),
                self._lengths[end - 1] if end else 0.0,
            )
            self._first.setdefault(limit, self._now[limit])
        return self._now[limit]

    def absorbed(self, limit: float) -> _Amount:
        """Return how much is gone since `left` was first asked."""
        now, first = self.left(limit), self._first[limit]
        return _Amount(first.tasks - now.tasks, first.minutes - now.minutes, first.longest)

    def is_beyond_all(self, limit: float) -> bool:
        """Tell whether some of what is left is more than any launcher or batch job would start."""
        longest = self.left(limit).longest if self.sample.wall_time_minutes else 0.0
        return self._reach <= 0 or longest > self._reach

    def give(self, room: Capacity, free: float, minutes: float) -> float:
        """Give a launcher what it has room for, the longest first; return the node-minutes left to it.

        Args:
            room: The launcher.
            free: Its node-minutes that are not spoken for.
            minutes: How long it stays.
        """
        limit = math.inf if room.left_minutes is None else minutes
        self._reach = max(self._reach, limit)
        if free <= 0 or not self._lengths:
            return free
        share = share_of(self.sample, room.job_mode, room.slots_per_node)
        end = self._end(limit)
        while end and free > 0:
            begin, taken = end, 0
            while begin:
                cost = share * min(self._lengths[begin - 1], minutes)
                taken = min(int(free / cost + 1e-9), self._counts[begin - 1])
                free = max(free - taken * cost, 0.0)
                self._counts[begin - 1] -= taken
                if self._counts[begin - 1]:
                    break
                begin -= 1
            if taken or begin < end:
                self._now.clear()
            del self._lengths[begin:end], self._counts[begin:end]
            # There is no room for more of that length: on to those that are short enough.
            end = bisect_right(self._lengths, free / share, 0, max(begin - 1, 0))
        return free

    def _end(self, limit: float) -> int:
        """Return where those begin that are not started when so many minutes are left."""
        if self.sample.wall_time_minutes:
            return bisect_right(self._lengths, limit)
        return len(self._lengths)  # nobody has said how long they take: they are tried


class Left:
    """The backlog that nothing has absorbed yet: what can run now comes first, wider first."""

    def __init__(
        self, backlog: Iterable[Backlog], takers: Sequence[QueuePolicy | Capacity], rules: Rules
    ) -> None:
        self.rules = rules
        self.lanes = sorted(
            _lanes(backlog, takers, rules),
            key=lambda lane: (lane.sample.is_soon, -lane.num_nodes),
        )
        self._lanes_of: dict[Hashable, list[_Lane]] = {}

    def absorb(self, room: Capacity) -> None:
        """Lay tasks on a launcher until it is full."""
        minutes = _HORIZON_MINUTES if room.left_minutes is None else room.left_minutes
        free = room.nodes * minutes - room.busy
        if free <= 0:
            return
        for lane in self._lanes_for(room):
            if lane.num_nodes <= room.nodes:
                free = lane.give(room, free, minutes)

    def _lanes_for(self, room: Capacity) -> list[_Lane]:
        kind = (room.job_mode, room.wf_filter, room.node_gpus, room.node_memory_mb)
        if kind not in self._lanes_of:  # many launchers are alike
            self._lanes_of[kind] = [lane for lane in self.lanes if fits(room, lane.sample)]
        return self._lanes_of[kind]


def _lanes(
    backlog: Iterable[Backlog], takers: Sequence[QueuePolicy | Capacity], rules: Rules
) -> list[_Lane]:
    """Sort the backlog by all that any policy or launcher may ask about it, but for length."""
    filters = sorted({taker.wf_filter or "" for taker in takers})
    gpus = sorted({taker.node_gpus for taker in takers if taker.node_gpus is not None})
    memory = sorted({taker.node_memory_mb for taker in takers if taker.node_memory_mb is not None})
    passed: dict[str, tuple[bool, ...]] = {}
    samples: dict[Hashable, Backlog] = {}
    lanes: dict[Hashable, Counter[float]] = {}
    for tasks in backlog:
        if tasks.workflow not in passed:
            passed[tasks.workflow] = tuple(words in tasks.workflow for words in filters)
        is_alone = is_single(tasks)
        lane = (
            tasks.num_nodes,
            is_alone,
            tasks.packing if is_alone else 1,
            bisect_left(gpus, tasks.gpus),
            bisect_left(memory, tasks.memory_mb or 0),
            tasks.wall_time_minutes > 0,
            tasks.is_soon,
            passed[tasks.workflow],
        )
        lanes.setdefault(lane, Counter())[rules.estimate(tasks)] += tasks.tasks
        sample = samples.setdefault(lane, tasks)
        if tasks.wall_time_minutes < sample.wall_time_minutes:
            samples[lane] = tasks
    return [_Lane(samples[lane], lengths) for lane, lengths in lanes.items()]


class Demand:
    """What a policy could take of what nothing has absorbed yet."""

    def __init__(self, policy: QueuePolicy, left: Left) -> None:
        self.policy = policy
        self.left = left
        self._limit = left.rules.useful_minutes(policy.max_minutes)
        self._lanes: list[_Lane] = []
        self._unfit: list[_Lane] = []
        for lane in left.lanes:
            if (policy.wf_filter or "") in lane.sample.workflow:
                lane.left(self._limit)  # to know what is absorbed from now on
                why = unfit(policy, lane.sample, left.rules)
                (self._lanes if why is None else self._unfit).append(lane)

    def reason_to_wait(self) -> str | None:
        """Tell why nothing should be submitted, as far as work goes; None when something should."""
        lanes = self._wanted(is_soon=False)
        if not lanes:
            return self._nothing()
        if any(lane.is_beyond_all(self._limit) for lane in lanes):
            return None
        absorbed = sum(
            self._nodes(lane) * lane.absorbed(self._limit).minutes
            for lane in self._lanes
            if not lane.sample.is_soon
        )
        if self._work(lanes) < _WORTH * absorbed:
            return "launchers and queued batch jobs will take nearly all that could run here"
        return None

    def _wanted(self, *, is_soon: bool) -> list[_Lane]:
        return [
            lane
            for lane in self._lanes
            if lane.sample.is_soon is is_soon and lane.left(self._limit).tasks
        ]

    def _nodes(self, lane: _Lane) -> float:
        """Return how many nodes one of its tasks takes here."""
        return share_of(lane.sample, self.policy.job_mode, self.policy.slots_per_node)

    def _work(self, lanes: Iterable[_Lane]) -> float:
        """Return how many node-minutes are left."""
        return sum(self._nodes(lane) * lane.left(self._limit).minutes for lane in lanes)

    def _nothing(self) -> str:
        words = []
        lanes = [lane for lane in self._lanes if not lane.sample.is_soon]
        if any(lane.absorbed(self._limit).tasks for lane in lanes):
            words.append("launchers and queued batch jobs will take all that could run here")
        reasons: Counter[str] = Counter()
        for lane in (*lanes, *self._unfit):
            left = lane.left()
            if left.tasks and not lane.sample.is_soon:
                longest = replace(lane.sample, wall_time_minutes=math.ceil(left.longest))
                known = longest if lane.sample.wall_time_minutes else lane.sample
                reasons[unfit(self.policy, known, self.left.rules) or ""] += left.tasks
        words += [f"{_tasks(n)} {why}" for why, n in reasons.most_common()]
        if words:
            return "; ".join(words)
        named = "" if self.policy.wf_filter is None else f" of wf_filter = {self.policy.wf_filter}"
        return f"nothing{named} is runnable"

    def size(self) -> Submission:
        """Size a batch job for what is left: as short as it may be, then as wide, then longer."""
        policy, rules = self.policy, self.left.rules
        now, soon = self._wanted(is_soon=False), self._wanted(is_soon=True)
        work = self._work((*now, *soon))
        parallel = sum(self._nodes(lane) * lane.left(self._limit).tasks for lane in (*now, *soon))
        # It must do for what can run now; what comes soon may find another.
        longest = max(lane.left(self._limit).longest for lane in now)
        widest = max(lane.sample.num_nodes for lane in now)
        least = max(policy.min_nodes, widest)
        shortest = _clamp(rules.needed_minutes(longest), policy.min_minutes, policy.max_minutes)
        useful = rules.useful_minutes(shortest)
        nodes = _clamp(ceil(min(work / useful, parallel)), least, policy.max_nodes)
        minutes = _clamp(rules.needed_minutes(work / nodes), shortest, policy.max_minutes)
        why = (
            f"{_tasks(self._count(now))}{f' and {self._count(soon):,} soon' if soon else ''}, "
            f"{work:,.0f} node-minutes, widest {widest}, longest {longest:,.0f} min: "
            f"{nodes} {'node' if nodes == 1 else 'nodes'} for {minutes} min"
        )
        return Submission(policy=policy, nodes=nodes, minutes=minutes, why=why)

    def _count(self, lanes: Iterable[_Lane]) -> int:
        return sum(lane.left(self._limit).tasks for lane in lanes)


def _tasks(number: int) -> str:
    return f"{number:,} {'task' if number == 1 else 'tasks'}"


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
