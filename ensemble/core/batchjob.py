"""Batch jobs: allocations asked of a batch scheduler, whose scripts run launchers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from ensemble.core.model import JobMode


class JobState(StrEnum):
    """The life of a batch job, as far as we know it."""

    #: On record; being submitted, or nobody knows whether it was. -> SUBMITTED, REJECTED, LOST
    NEW = "NEW"
    #: The scheduler returned an id and has not listed it yet. -> any state below
    SUBMITTED = "SUBMITTED"
    #: It waits for its nodes.
    QUEUED = "QUEUED"
    #: It has its nodes, or still occupies them on its way out.
    RUNNING = "RUNNING"
    #: Final: its script ended with status 0.
    FINISHED = "FINISHED"
    #: Final: its script ended with another status.
    FAILED = "FAILED"
    #: Final: its time was over.
    TIMEOUT = "TIMEOUT"
    #: Final: somebody cancelled it.
    CANCELLED = "CANCELLED"
    #: Given up: a node failed, or the scheduler does not know it (any more). Its launcher may still live.
    LOST = "LOST"
    #: Final: the scheduler refused it, or it was never submitted.
    REJECTED = "REJECTED"


#: They count against a queue's limits.
ACTIVE = frozenset({JobState.NEW, JobState.SUBMITTED, JobState.QUEUED, JobState.RUNNING})
#: Nothing of such a job runs any more: evidence enough to end its launcher's lease.
OVER = frozenset({JobState.FINISHED, JobState.FAILED, JobState.TIMEOUT, JobState.CANCELLED})


#: How the reason of a queued batch job begins that waits for something that will not come.
STUCK = "stuck: "


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatchJob:
    """A batch job that is about to be submitted."""

    scheduler: str
    num_nodes: int
    wall_time_minutes: int
    job_mode: JobMode
    wf_filter: str | None = None
    project: str | None = None
    queue: str | None = None
    #: The queue policy it is for; None when a user submitted it by hand.
    policy: str | None = None
    #: Why it is submitted, for people.
    why: str = ""
    #: More words for the submit command.
    flags: tuple[str, ...] = ()
    #: So many tasks share a node at least (serial mode).
    slots_per_node: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """A batch job, past or present, as the store has it."""

    id: int
    #: What the scheduler calls it: `ens-SITE-TOKEN-ID`.
    name: str
    scheduler: str
    #: The scheduler's own id, as text; None as long as nobody knows it.
    scheduler_id: str | None
    state: JobState
    num_nodes: int
    wall_time_minutes: int
    job_mode: JobMode
    wf_filter: str | None
    project: str | None
    queue: str | None
    policy: str | None
    why: str
    #: Why it waits, or how it ended.
    reason: str | None
    exit_code: int | None
    #: The last lines of its output, of a job that ended without a word from its launcher.
    error: str | None
    #: What its launcher wrote when it left: exit status, reason, number of tasks. None if it did not.
    record: Mapping[str, Any] | None
    #: Looks in a row at a listing that did not show it.
    missing: int
    created_at: datetime
    submitted_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    #: When the scheduler will end it.
    ends_at: datetime | None
    #: The launcher that took it, and whether that one lives.
    launcher_id: int | None = None
    has_live_launcher: bool = False
    #: Seconds since its row was made, and since looks have missed it.
    age_s: float = 0.0
    missing_s: float | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        """Whether it counts against its queue's limits."""
        return self.state in ACTIVE

    @property
    def is_stuck(self) -> bool:
        """Whether it waits for something that will not come, as a look at the scheduler has found."""
        return self.state is JobState.QUEUED and (self.reason or "").startswith(STUCK)

    @property
    def tasks(self) -> int | None:
        """How many tasks its launcher ended, as it said when it left; None where it said nothing."""
        return None if self.record is None else int(self.record.get("tasks", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What is to be written about a batch job after a look at the scheduler."""

    id: int
    #: The state that it was judged by: written only while that still holds.
    was: JobState
    state: JobState
    reason: str | None = None
    #: As the listing has it. None when no listing shows the job: written only while the store counts it as missing.
    scheduler_id: str | None = None
    exit_code: int | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    ends_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The service of a site, as it was last heard of."""

    host: str | None
    pid: int | None
    period_s: float | None
    started_at: datetime | None
    seen_at: datetime | None
    stopped_at: datetime | None
    silent_s: float | None

    @property
    def is_running(self) -> bool:
        """Whether it was heard of within three of its periods, and has not said that it leaves."""
        if self.silent_s is None or self.stopped_at is not None:
            return False
        return self.silent_s < max(3 * (self.period_s or 0.0), 30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionNote:
    """A decision of the service that is on record."""

    at: datetime
    policy: str
    reason: str
    batch_job_id: int | None
