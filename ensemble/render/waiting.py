"""Why a runnable task has not been taken, as far as launchers on record tell. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble.core.model import JobMode, Launcher, TaskDetail
from ensemble.render.text import plural


def explain(found: TaskDetail, live: Sequence[Launcher], most_gpus: int | None) -> str | None:
    """Return what keeps a runnable task that nobody holds from being taken; None when nothing known does.

    What a launcher may decide by besides, the time it has left or its nodes' memory, is not on record.

    Args:
        found: The task.
        live: The launchers that run.
        most_gpus: The most GPUs of a node that a launcher of late told of; None where none did.
    """
    return "; ".join(_reasons(found, live, most_gpus)) or None


def _reasons(found: TaskDetail, live: Sequence[Launcher], most_gpus: int | None) -> list[str]:
    task = found.task
    has_several = task.num_nodes > 1 or task.ranks_per_node > 1
    open_to = [each for each in live if (each.wf_filter or "") in task.workflow]
    wide = [each for each in open_to if each.job_mode == JobMode.MPI]
    reasons = []
    if not live:
        reasons.append("no launcher runs (ensemble launch)")
    elif not open_to:
        reasons.append("no launcher that runs takes its workflow (--wf-filter)")
    if has_several and not wide:
        what = plural(task.num_nodes, "node") + f" x {plural(task.ranks_per_node, 'rank')}"
        reasons.append(f"{what}: only mpi mode takes it (ensemble launch --job-mode mpi)")
    elif wide and task.num_nodes > (most := max(len(each.nodes) for each in wide)):
        have = f"the largest launcher has {most:,}"
        reasons.append(f"it needs {plural(task.num_nodes, 'node')} and {have}")
    # Launchers in mpi mode hand out whole nodes and do not count GPUs.
    gpus = found.spec.get("gpus_per_rank", 0) * task.ranks_per_node
    if not wide and most_gpus is not None and gpus > most_gpus:
        reasons.append(
            f"it needs {plural(gpus, 'GPU')} per node, and no launcher of the last 30 days told of "
            f"a node with more than {most_gpus}"
        )
    return reasons
