"""A site as it is at one moment: what `ensemble status` and `ensemble queue` show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ensemble.config import QueueSettings
from ensemble.core.batchjob import BatchJob, DecisionNote, Service
from ensemble.core.model import Counts, Launcher
from ensemble.core.queues import Decision
from ensemble.core.states import State


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteView:
    """Everything on one screen."""

    counts: Counts
    workflows: Mapping[str, Mapping[State, int]]
    #: Those that live.
    launchers: Sequence[Launcher]
    #: Those that are queued or running.
    batch_jobs: Sequence[BatchJob]
    service: Service


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """Who submits, to which queues, what there is and was, and what comes next."""

    policies: Mapping[str, QueueSettings]
    service: Service
    plan: Sequence[Decision]
    #: All batch jobs that are queued or running ...
    active: Sequence[BatchJob]
    #: ... and the youngest, whatever became of them.
    jobs: Sequence[BatchJob]
    notes: Sequence[DecisionNote]
