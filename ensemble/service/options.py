"""What `ensemble launch` was asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from ensemble.core.model import JobMode


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """The flags of `ensemble launch`."""

    job_mode: JobMode = JobMode.MPI
    #: Take only workflows whose name contains it.
    wf_filter: str | None = None
    #: Leave after so many minutes; None asks the batch scheduler.
    time_limit_minutes: float | None = None
    #: Use so many nodes of the allocation, or make so many virtual ones on this machine.
    nodes: int | None = None
    #: So many tasks share a node at least, whatever they say (serial mode).
    slots_per_node: int = 1
    #: Leave after so long with nothing to do; None is the site's setting.
    idle_timeout_s: float | None = None
    #: Stay when there is nothing to do.
    is_persistent: bool = False
    #: The batch job that this launcher was submitted as.
    batch_job: int | None = None
    debug: bool = False
