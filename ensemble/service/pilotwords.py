"""Between what the dispatcher says and what pilots say. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from ensemble.core.events import CouldNotStart, Ended, Skipped, Started
from ensemble.core.model import Claim
from ensemble.core.shares import need_of
from ensemble.core.wire import Report, Work


def work_of(claim: Claim, slots_per_node: int) -> Work:
    """Return what a pilot has to know of a task to run it."""
    return Work(
        id=claim.id,
        attempt=claim.attempt,
        name=claim.name,
        workflow=claim.workflow,
        argv=claim.argv,
        workdir=claim.workdir,
        output=claim.output,
        environ=claim.environ,
        env_script=claim.env_script,
        parent_ids=claim.parent_ids,
        need=need_of(claim, slots_per_node),
        is_bound=claim.cpu_affinity != "none",
    )


def events_of(report: Report, now: datetime) -> Iterator[Skipped | Started | CouldNotStart | Ended]:
    """Yield what a pilot reports as events.

    Args:
        now: When the report came.
    """
    # Times of the pilot's clock become ours by their age: no two hosts need agree on the time of day.
    at_zero = now - timedelta(seconds=report.now)

    def time(at: float) -> datetime:
        return min(at_zero + timedelta(seconds=at), now)

    for task_id, attempt in report.dropped:
        yield Skipped(id=task_id, attempt=attempt, at=now)
    for ran in report.ran:
        yield Started(id=ran.id, attempt=ran.attempt, at=time(ran.at))
    for failed in report.failed:
        yield CouldNotStart(
            id=failed.id, attempt=failed.attempt, at=time(failed.at), reason=failed.reason
        )
    for done in report.done:
        yield Ended(
            id=done.id,
            attempt=done.attempt,
            at=time(done.at),
            status=done.status,
            was_signalled=done.was_signalled,
            error=done.error,
            output=done.output,
            started_at=time(done.started_at),
        )
