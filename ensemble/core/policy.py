"""What batch jobs to submit, and why or why not. Pure: limits, batch jobs and backlog in, decisions out.

The backlog is first laid on what is there to take it: running launchers, and batch jobs that wait (demand.py). Only
what is left asks for more, as wide and as long as it needs and its queue allows, and never above a limit. Sizes are
estimates; the limits are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ensemble.core.batchjob import BatchJob, JobState
from ensemble.core.demand import Demand, Left
from ensemble.core.model import JobMode
from ensemble.core.queues import (
    Backlog,
    Capacity,
    Decision,
    QueuePolicy,
    QueueState,
    Rules,
    Submission,
)


def permit(
    policies: Sequence[QueuePolicy],
    states: Mapping[str, QueueState],
    jobs: Iterable[BatchJob],
    capacity: Iterable[Capacity],
    backlog: Iterable[Backlog],
    rules: Rules,
) -> list[Decision]:
    """Decide what to submit: for each policy its submissions, then why there are not more.

    Args:
        policies: In the order in which they are served.
        states: What keeps some from submitting, by name.
        jobs: All batch jobs that are queued or running.
        capacity: All launchers that run.
        backlog: Each kind of task once.
        rules: What holds for all.
    """
    listed = sorted((job for job in jobs if job.is_active), key=lambda job: job.id)
    # In this order the batch jobs that are submitted now will be counted next time, too.
    rooms = [*map(_running, capacity)]
    rooms += _awaited(listed, {room.batch_job_id for room in rooms}, policies, rules)
    left = Left(backlog, [*policies, *rooms], rules)
    demands = [Demand(policy, left) for policy in policies]
    for room in rooms:
        left.absorb(room)
    decisions: list[Decision] = []
    allowed = rules.max_now
    for demand in demands:
        name = demand.policy.name
        made = _serve(demand, states.get(name), [j for j in listed if j.policy == name], allowed)
        allowed -= len(made) - 1
        decisions += made
    return decisions


def _serve(
    demand: Demand, state: QueueState | None, jobs: Sequence[BatchJob], allowed: int
) -> list[Decision]:
    policy = demand.policy
    decisions: list[Decision] = []
    while True:
        reason = (
            _held_up(policy, state)
            or demand.reason_to_wait()
            or _at_limit(policy, jobs, len(decisions))
        )
        if reason is None and allowed <= len(decisions):
            reason = "enough for this minute (submissions_per_minute)"
        if reason is not None:
            return [*decisions, Decision(policy=policy.name, reason=reason)]
        submission = demand.size()
        decisions.append(Decision(policy=policy.name, reason=submission.why, submission=submission))
        demand.left.absorb(_promise(submission, demand.left.rules))


def _held_up(policy: QueuePolicy, state: QueueState | None) -> str | None:
    if not policy.enabled:
        return "switched off (enabled = false)"
    if state is None:
        return None
    reason = " ".join((state.reason or "no reason given").split())  # a scheduler's may have lines
    if state.paused_by is not None:
        return f"paused by {state.paused_by}: {reason} (ensemble queue resume {policy.name})"
    if state.retry_s is not None and state.retry_s > 0:
        return f"waits after a failure: {reason}"
    return None


def _at_limit(policy: QueuePolicy, jobs: Sequence[BatchJob], submitted: int) -> str | None:
    queued = len(jobs) + submitted
    if queued < policy.max_queued:
        return None
    limit = (
        f"at its limit: {queued} of max_queued = {policy.max_queued} batch jobs queued or running"
    )
    stuck = ", ".join(str(job.id) for job in jobs if job.is_stuck)
    return f"{limit} (stuck: {stuck})" if stuck else limit


def _running(room: Capacity) -> Capacity:
    """Return a launcher as it takes tasks: in mpi mode whatever GPUs they want."""
    return replace(room, node_gpus=None) if room.job_mode is JobMode.MPI else room


def _awaited(
    jobs: Iterable[BatchJob],
    registered: set[int | None],
    policies: Iterable[QueuePolicy],
    rules: Rules,
) -> list[Capacity]:
    """Return what the batch jobs will take whose launchers have not registered yet."""
    nodes_of = {policy.name: policy for policy in policies}
    rooms = []
    for job in jobs:
        is_taken = job.has_live_launcher or job.id in registered
        has_lost = job.launcher_id is not None and job.state is JobState.RUNNING
        if is_taken or has_lost or job.is_stuck:
            continue
        policy = nodes_of.get(job.policy or "")
        room = Capacity(
            batch_job_id=job.id,
            job_mode=job.job_mode,
            wf_filter=job.wf_filter,
            nodes=job.num_nodes,
            node_gpus=policy.node_gpus if policy else None,
            node_memory_mb=policy.node_memory_mb if policy else None,
            left_minutes=rules.useful_minutes(job.wall_time_minutes - _elapsed_minutes(job)),
            busy=0.0,
            slots_per_node=int(job.spec.get("slots_per_node", 1)),
        )
        rooms.append(room)
    return rooms


def _elapsed_minutes(job: BatchJob) -> float:
    """Return how long a batch job has had its nodes."""
    if job.state is not JobState.RUNNING or job.started_at is None:
        return 0.0
    waited_s = (job.started_at - job.created_at).total_seconds()
    return max(job.age_s - waited_s, 0.0) / 60


def _promise(submission: Submission, rules: Rules) -> Capacity:
    """Return what a batch job will take that is about to be submitted."""
    policy = submission.policy
    return Capacity(
        batch_job_id=None,
        job_mode=policy.job_mode,
        wf_filter=policy.wf_filter,
        nodes=submission.nodes,
        node_gpus=policy.node_gpus,
        node_memory_mb=policy.node_memory_mb,
        left_minutes=rules.useful_minutes(submission.minutes),
        busy=0.0,
        slots_per_node=policy.slots_per_node,
    )
