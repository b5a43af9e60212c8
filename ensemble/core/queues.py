"""Queue policies, and what they are decided by: the backlog, and what is there to take it. Pure values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from ensemble.core.model import JobMode

#: How long the start of a launcher takes. Of a short allocation, that and the margin take this part at most.
_START_MINUTES = 1.0
_SHORT = 0.1
#: Minutes are compared as if there were nothing smaller.
_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePolicy:
    """What may be submitted to one queue: `[queue.NAME]` of ensemble.toml."""

    name: str
    enabled: bool = True
    #: The scheduler's name for it; None is its default queue.
    queue: str | None = None
    project: str | None = None
    job_mode: JobMode = JobMode.MPI
    #: Only workflows whose name contains it.
    wf_filter: str | None = None
    #: Batch jobs at a time, waiting or running.
    max_queued: int = 1
    min_nodes: int = 1
    max_nodes: int = 1
    min_minutes: int = 10
    max_minutes: int = 60
    template: str = "job.sh"
    #: More words for the submit command.
    flags: tuple[str, ...] = ()
    #: So many tasks share a node at least (serial mode).
    slots_per_node: int = 1
    #: What one of its nodes has, where that is known: tasks that want more are not submitted for.
    node_gpus: int | None = None
    node_memory_mb: int | None = None

    @property
    def widest(self) -> int:
        """How many nodes a task may want at most."""
        return 1 if self.job_mode is JobMode.SERIAL else self.max_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """Tasks that are alike and could run now, or soon."""

    workflow: str
    num_nodes: int
    ranks_per_node: int
    #: As many share a node, in serial mode.
    packing: int
    #: Per node.
    gpus: int
    memory_mb: int | None
    #: As stated; 0 is unknown.
    wall_time_minutes: int
    tasks: int
    #: Whether they wait for something that runs.
    is_soon: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What can take tasks: a launcher that runs, or a batch job that will start one."""

    batch_job_id: int | None
    job_mode: JobMode
    wf_filter: str | None
    nodes: int
    node_gpus: int | None
    #: Until it leaves; None is for ever.
    left_minutes: float | None
    #: Node-minutes that what it holds will still take.
    busy: float
    slots_per_node: int = 1
    node_memory_mb: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """What keeps a queue policy from submitting, besides its limits."""

    name: str
    #: `user` or `service`.
    paused_by: str | None = None
    paused_at: datetime | None = None
    reason: str | None = None
    #: Failures of the same kind in a row.
    failures: int = 0
    kind: str | None = None
    retry_at: datetime | None = None
    #: Seconds until then, by the store's clock.
    retry_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for all queues."""

    #: How long a task runs that does not tell, where no other of its workflow has.
    assumed_minutes: float = 10.0
    #: How long before its end a launcher begins to leave.
    margin_minutes: float = 2.0
    #: Submissions that are allowed now, in all queues together.
    max_now: int = 1000
    #: Mean minutes of tasks by workflow.
    typical_minutes: Mapping[str, float] = field(default_factory=dict)

    def useful_minutes(self, minutes: float) -> float:
        """Return how much of an allocation tasks can use: without its start and the launcher's margin."""
        margin = min(self.margin_minutes, _SHORT * minutes)
        return round(minutes - margin - min(_START_MINUTES, _SHORT * minutes), _DIGITS)

    def needed_minutes(self, useful: float) -> int:
        """Return how long an allocation must be for that many useful minutes."""
        margin, start = self.margin_minutes, _START_MINUTES
        return ceil(
            min(
                useful + margin + start,
                (useful + margin) / (1 - _SHORT),
                (useful + start) / (1 - _SHORT),
                useful / (1 - 2 * _SHORT),
            )
        )

    def estimate(self, backlog: Backlog) -> float:
        """Return how long one of these tasks is taken to run, in minutes."""
        if backlog.wall_time_minutes:
            return float(backlog.wall_time_minutes)
        return max(self.typical_minutes.get(backlog.workflow, self.assumed_minutes), 0.001)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A batch job to be submitted."""

    policy: QueuePolicy
    nodes: int
    minutes: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is done about one queue policy now: submit, or not, and why."""

    policy: str
    reason: str
    submission: Submission | None = None


def unfit(policy: QueuePolicy, tasks: Backlog, rules: Rules) -> str | None:
    """Tell why no batch job of *policy* could run these tasks; None when one could.

    The words follow a number of tasks.
    """
    useful = rules.useful_minutes(policy.max_minutes)
    reasons = (
        (
            policy.job_mode is JobMode.SERIAL and not is_single(tasks),
            "of several ranks or nodes (job_mode = serial)",
        ),
        (tasks.num_nodes > policy.max_nodes, f"wider than max_nodes = {policy.max_nodes}"),
        (
            _exceeds(tasks.gpus, policy.node_gpus),
            f"with more GPUs than node_gpus = {policy.node_gpus}",
        ),
        (
            _exceeds(tasks.memory_mb, policy.node_memory_mb),
            f"with more memory than node_memory_mb = {policy.node_memory_mb}",
        ),
        (
            tasks.wall_time_minutes > useful,
            f"longer than the {math.floor(useful)} useful minutes of max_minutes = {policy.max_minutes}",
        ),
    )
    return next((why for is_so, why in reasons if is_so), None)


def is_single(tasks: Backlog) -> bool:
    """Tell whether these run on one node with one rank, as serial mode wants."""
    return tasks.num_nodes == tasks.ranks_per_node == 1


def _exceeds(wanted: int | None, limit: int | None) -> bool:
    return limit is not None and (wanted or 0) > limit


def share_of(tasks: Backlog, mode: JobMode, slots_per_node: int) -> float:
    """Return how many nodes one of these tasks takes."""
    if mode is JobMode.MPI:
        return float(tasks.num_nodes)
    return 1 / max(tasks.packing, slots_per_node)


def fits(room: Capacity, tasks: Backlog) -> bool:
    """Tell whether a launcher takes tasks like these, if it has as many nodes and the time."""
    return (
        (room.job_mode is JobMode.MPI or is_single(tasks))
        and (room.wf_filter or "") in tasks.workflow
        and not _exceeds(tasks.gpus, room.node_gpus)
        and not _exceeds(tasks.memory_mb, room.node_memory_mb)
    )


def ceil(value: float) -> int:
    """Return the next whole number, as if there were no rounding errors."""
    return math.ceil(round(value, _DIGITS))
