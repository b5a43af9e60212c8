"""The deciding core against a small model of its world: a scheduler, launchers and tasks.

For a while the world is hostile: estimates are wrong, batch jobs get stuck, fail, vanish or are cancelled, launchers
die, users pause queues and add tasks. Each round checks what is decided. Then the world behaves, and all that can
be run must come to an end.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import count

from hypothesis import HealthCheck, given, settings, strategies as st

from ensemble.core.batchjob import BatchJob, JobState
from ensemble.core.model import JobMode
from ensemble.core.policy import permit
from ensemble.core.queues import (
    Backlog,
    Capacity,
    Decision,
    QueuePolicy,
    QueueState,
    Rules,
    unfit,
)

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
ROUND_MINUTES = 5
WORKFLOWS = ("a", "b", "ab", "c")
FILTERS = (None, None, None, "a", "b", "ab", "zz")
TRIES = 3


@dataclass
class Work:
    """A task in the store."""

    kind: Backlog
    #: How long it really takes.
    takes: float
    parent: Work | None = None
    state: str = "runnable"  # or running, done, failed
    tries: int = TRIES

    @property
    def waits(self) -> bool:
        return self.parent is not None and self.parent.state != "done"

    @property
    def is_runnable(self) -> bool:
        return self.state == "runnable" and not self.waits

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed") or (
            self.parent is not None and self.parent.state == "failed"
        )


@dataclass
class Launcher:
    """A launcher, as it is registered."""

    id: int
    job_id: int | None
    job_mode: JobMode
    wf_filter: str | None
    nodes: int
    node_gpus: int
    memory_mb: int | None
    slots: int
    left: float | None
    running: list[tuple[Work, float]] = field(default_factory=list)
    idle: int = 0

    def share(self, kind: Backlog) -> Fraction:
        if self.job_mode is JobMode.MPI:
            return Fraction(kind.num_nodes)
        return Fraction(1, max(kind.packing, self.slots))

    def takes(self, kind: Backlog) -> bool:
        is_single = kind.num_nodes == kind.ranks_per_node == 1
        is_roomy = kind.gpus <= self.node_gpus and (kind.memory_mb or 0) <= (
            self.memory_mb or 10**9
        )
        return (
            (self.wf_filter is None or self.wf_filter in kind.workflow)
            and (self.left is None or kind.wall_time_minutes <= int(self.left))
            and (self.job_mode is JobMode.MPI or (is_single and is_roomy))
        )

    def claim(self, works: list[Work]) -> None:
        free = self.nodes - sum(self.share(work.kind) for work, _ in self.running)
        order = sorted(works, key=lambda w: (-w.kind.num_nodes, -w.kind.wall_time_minutes))
        for work in order:
            if work.is_runnable and self.takes(work.kind) and self.share(work.kind) <= free:
                free -= self.share(work.kind)
                work.state = "running"
                self.running.append((work, 0.0))

    def minute(self, works: list[Work]) -> bool:
        """Let a minute pass; tell whether it stays."""
        self.claim(works)
        self.idle = 0 if self.running else self.idle + 1
        self.running = [(work, ran + 1) for work, ran in self.running]
        for work, ran in self.running:
            if ran >= work.takes:
                work.state = "done"
        self.running = [(work, ran) for work, ran in self.running if work.state != "done"]
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                self.stop()
                return False
        return self.job_id is None or self.idle < 2

    def stop(self) -> None:
        """Time is over for what runs, or the launcher is dead."""
        for work, _ in self.running:
            work.tries -= 1
            work.state = "runnable" if work.tries else "failed"
        self.running = []


class World:
    """Scheduler, store and launchers."""

    def __init__(self, policies, rules, rng):
        self.policies = policies
        self.by_name = {policy.name: policy for policy in policies}
        self.rules = rules
        self.rng = rng
        self.now = 0.0
        self.ids = count(1)
        self.works: list[Work] = []
        self.jobs: dict[int, BatchJob] = {}
        self.waits: dict[int, int] = {}
        self.ends: dict[int, float] = {}
        self.launchers: list[Launcher] = []
        self.paused: dict[str, QueueState] = {}

    # ---------------------------------------------------------------- what the store says

    def moment(self):
        return EPOCH + timedelta(minutes=self.now)

    def listed(self) -> list[BatchJob]:
        alive = {launcher.job_id for launcher in self.launchers}
        jobs = [
            replace(
                job,
                age_s=(self.moment() - job.created_at).total_seconds(),
                has_live_launcher=job.id in alive,
            )
            for job in self.jobs.values()
        ]
        return jobs[::-1]  # the youngest first, as the store has it

    def backlog(self) -> list[Backlog]:
        kinds: Counter[Backlog] = Counter()
        for work in self.works:
            if work.is_runnable:
                kinds[work.kind] += 1
            elif work.state == "runnable" and work.parent.state == "running":
                kinds[replace(work.kind, is_soon=True)] += 1
        return [replace(kind, tasks=number) for kind, number in kinds.items()]

    def capacity(self) -> list[Capacity]:
        return [
            Capacity(
                batch_job_id=launcher.job_id,
                job_mode=launcher.job_mode,
                wf_filter=launcher.wf_filter,
                nodes=launcher.nodes,
                node_gpus=launcher.node_gpus,
                left_minutes=launcher.left,
                busy=sum(
                    float(launcher.share(work.kind))
                    * max(1, (work.kind.wall_time_minutes or self.rules.assumed_minutes) - ran)
                    for work, ran in launcher.running
                ),
                slots_per_node=launcher.slots,
            )
            for launcher in self.launchers
        ]

    # ---------------------------------------------------------------- a round

    def decide(self, rules: Rules) -> list[Decision]:
        return permit(
            self.policies, self.paused, self.listed(), self.capacity(), self.backlog(), rules
        )

    def fill(self) -> None:
        """Decide, check it, and submit."""
        decisions = self.decide(self.rules)
        self.check(decisions)
        made = [decision.submission for decision in decisions if decision.submission]
        for submission in made:
            self.submit(submission.policy, submission.nodes, submission.minutes)
        for policy in self.policies:
            queued = sum(job.is_active and job.policy == policy.name for job in self.jobs.values())
            assert queued <= policy.max_queued
        again = self.decide(replace(self.rules, max_now=self.rules.max_now - len(made)))
        assert not any(decision.submission for decision in again), "it has changed its mind"

    def check(self, decisions: list[Decision]) -> None:
        final = [decision.policy for decision in decisions if decision.submission is None]
        assert final == [policy.name for policy in self.policies]
        assert list(dict.fromkeys(decision.policy for decision in decisions)) == final
        made = [decision for decision in decisions if decision.submission]
        assert len(made) <= self.rules.max_now
        assert len(made) <= sum(work.is_runnable for work in self.works)
        for decision in decisions:
            assert decision.reason
            assert decision.reason.isprintable()
        for decision in made:
            submission, policy = decision.submission, decision.submission.policy
            assert policy.name == decision.policy
            assert policy.enabled
            assert policy.name not in self.paused
            assert policy.min_nodes <= submission.nodes <= policy.max_nodes
            assert policy.min_minutes <= submission.minutes <= policy.max_minutes
            assert any(
                self.can_run(policy, submission.nodes, submission.minutes, work.kind)
                for work in self.works
                if work.is_runnable
            ), "its launcher could do nothing"

    def can_run(self, policy: QueuePolicy, nodes: int, minutes: int, kind: Backlog) -> bool:
        """Tell whether this batch job can run a task, if its launcher starts as slowly as is allowed for."""
        if unfit(policy, kind, self.rules):
            return False
        launcher = self.launcher(policy, None, nodes, self.time(minutes, 1.0))
        return launcher.takes(kind) and kind.num_nodes <= nodes

    def time(self, minutes: int, slowness: float) -> float:
        """Return what a launcher has of an allocation."""
        left = minutes - slowness * min(1.0, minutes / 10)
        return left - min(self.rules.margin_minutes, left / 10)

    def launcher(self, policy, job_id, nodes, left) -> Launcher:
        return Launcher(
            id=next(self.ids),
            job_id=job_id,
            job_mode=policy.job_mode,
            wf_filter=policy.wf_filter,
            nodes=nodes,
            node_gpus=8 if policy.node_gpus is None else policy.node_gpus,
            memory_mb=policy.node_memory_mb,
            slots=policy.slots_per_node,
            left=left,
        )

    def submit(self, policy: QueuePolicy, nodes: int, minutes: int, *, by_hand: bool = False):
        job_id = next(self.ids)
        self.jobs[job_id] = BatchJob(
            id=job_id,
            name=f"ens-{job_id}",
            scheduler="slurm",
            scheduler_id=str(job_id),
            state=JobState.QUEUED,
            num_nodes=nodes,
            wall_time_minutes=minutes,
            job_mode=policy.job_mode,
            wf_filter=policy.wf_filter,
            project=None,
            queue=None,
            policy=None if by_hand else policy.name,
            why="",
            reason=None,
            exit_code=None,
            error=None,
            record=None,
            missing=0,
            created_at=self.moment(),
            submitted_at=self.moment(),
            started_at=None,
            ended_at=None,
            ends_at=None,
            spec={"slots_per_node": policy.slots_per_node, "by": policy.name},
        )
        self.waits[job_id] = job_id % 4

    # ---------------------------------------------------------------- time

    def start(self, job: BatchJob, *, has_launcher: bool = True) -> None:
        policy = self.by_name[job.spec["by"]]
        self.jobs[job.id] = replace(
            job, state=JobState.RUNNING, reason=None, started_at=self.moment()
        )
        self.ends[job.id] = self.now + job.wall_time_minutes
        if has_launcher:
            left = self.time(job.wall_time_minutes, (job.id % 3) / 2)
            launcher = self.launcher(policy, job.id, job.num_nodes, left)
            self.jobs[job.id] = replace(self.jobs[job.id], launcher_id=launcher.id)
            self.launchers.append(launcher)

    def end(self, job_id: int, state: JobState) -> None:
        self.jobs[job_id] = replace(self.jobs[job_id], state=state)
        for launcher in [each for each in self.launchers if each.job_id == job_id]:
            self.die(launcher)

    def die(self, launcher: Launcher) -> None:
        launcher.stop()
        self.launchers.remove(launcher)

    def pass_time(self) -> None:
        for _ in range(ROUND_MINUTES):
            for launcher in list(self.launchers):
                if not launcher.minute(self.works):
                    self.die(launcher)
                    self.end(launcher.job_id, JobState.FINISHED)
            self.now += 1
        for job_id, at in self.ends.items():
            if self.jobs[job_id].is_active and at <= self.now:
                self.end(job_id, JobState.TIMEOUT)

    def queued(self) -> list[BatchJob]:
        return [job for job in self.jobs.values() if job.state is JobState.QUEUED]

    def behave(self) -> None:
        for job in self.queued():
            self.waits[job.id] -= 1
            if self.waits[job.id] < 0:
                self.start(job)

    def trouble(self) -> None:
        """Let anything happen."""
        for job in self.queued():
            self._trouble_queued(job, self.rng.randrange(12))
        for launcher in list(self.launchers):
            event = self.rng.randrange(10)
            if event == 0:
                self.die(launcher)  # its batch job may go on for a while
            elif event == 1 and launcher.job_id is not None:
                self.end(launcher.job_id, JobState.FAILED)
        policy = self.policies[self.rng.randrange(len(self.policies))]
        self._trouble_queue(policy, self.rng.randrange(10))

    def _trouble_queued(self, job: BatchJob, event: int) -> None:
        match event:
            case 0 | 1 | 2:
                self.start(job)
            case 3:
                self.start(job, has_launcher=False)
            case 4 | 5 | 6:
                ends = {4: JobState.FAILED, 5: JobState.CANCELLED, 6: JobState.LOST}
                self.end(job.id, ends[event])
            case 7:
                self.jobs[job.id] = replace(job, reason="stuck: held")
            case _:
                pass  # it waits

    def _trouble_queue(self, policy: QueuePolicy, event: int) -> None:
        name = policy.name
        match event:
            case 0:
                self.paused[name] = QueueState(name=name, paused_by="user")
            case 1 | 2:
                self.paused.pop(name, None)
            case 3:
                self.paused[name] = QueueState(name=name, retry_s=5.0, reason="no\nanswer")
            case 4:
                nodes, minutes = 1 + self.rng.randrange(20), 1 + self.rng.randrange(90)
                self.submit(policy, nodes, minutes, by_hand=True)
            case 5:  # on a laptop, for ever
                self.launchers.append(self.launcher(policy, None, 1, None))
            case _:
                pass

    def calm_down(self) -> None:
        self.paused = {name: state for name, state in self.paused.items() if state.paused_by}
        for job in self.queued():
            self.jobs[job.id] = replace(job, reason=None)

    def is_wanted(self, work: Work) -> bool:
        """Tell whether a task has to come to an end."""
        return not work.is_over and any(
            policy.enabled
            and policy.max_queued
            and policy.name not in self.paused
            and (policy.wf_filter or "") in work.kind.workflow
            and unfit(policy, work.kind, self.rules) is None
            for policy in self.policies
        )


@st.composite
def queue_policies(draw, name):
    min_nodes, min_minutes = draw(st.integers(1, 4)), draw(st.sampled_from([1, 5, 10, 30]))
    return QueuePolicy(
        name=name,
        enabled=draw(st.integers(0, 9)) > 0,
        job_mode=draw(st.sampled_from(JobMode)),
        wf_filter=draw(st.sampled_from(FILTERS)),
        max_queued=draw(st.sampled_from([1, 1, 2, 4, 0])),
        min_nodes=min_nodes,
        max_nodes=min_nodes + draw(st.sampled_from([12, 3, 1, 0])),
        min_minutes=min_minutes,
        max_minutes=min_minutes + draw(st.sampled_from([90, 30, 4, 0])),
        slots_per_node=draw(st.sampled_from([1, 1, 4])),
        node_gpus=draw(st.sampled_from([None, None, 4, 0])),
        node_memory_mb=draw(st.sampled_from([None, None, 1000])),
    )


@st.composite
def some_tasks(draw):
    """Return a few tasks that are alike, right or wrong about their length."""
    nodes = draw(st.sampled_from([1, 1, 1, 2, 3, 5, 16]))
    stated = draw(st.sampled_from([0, 1, 4, 7, 10, 25, 57, 80]))
    kind = Backlog(
        workflow=draw(st.sampled_from(WORKFLOWS)),
        num_nodes=nodes,
        ranks_per_node=draw(st.sampled_from([1, 1, 1, 2])),
        packing=draw(st.sampled_from([1, 3, 10])) if nodes == 1 else 1,
        gpus=draw(st.sampled_from([0, 0, 0, 1, 8])),
        memory_mb=draw(st.sampled_from([None, None, None, 10, 5000])),
        wall_time_minutes=stated,
        tasks=1,
    )
    takes = draw(st.sampled_from([0.2, 1.0, 1.0, 3.0])) * (stated or draw(st.integers(1, 100)))
    has_parents = draw(st.booleans())
    works = [Work(kind, takes) for _ in range(draw(st.integers(1, 25)))]
    if has_parents:
        works += [Work(kind, takes, parent=work) for work in works]
    return works


rules = st.builds(
    Rules,
    assumed_minutes=st.sampled_from([1.0, 10.0, 45.0]),
    margin_minutes=st.sampled_from([0.0, 0.1, 2.0, 5.0]),
    max_now=st.sampled_from([1, 3, 1000]),
    typical_minutes=st.dictionaries(
        st.sampled_from(WORKFLOWS), st.sampled_from([0.0, 0.5, 20.0, 1e6])
    ),
)


@st.composite
def worlds(draw):
    number = draw(st.integers(1, 4))
    policies = [draw(queue_policies(f"q{index}")) for index in range(number)]
    return World(policies, draw(rules), draw(st.randoms(use_true_random=False)))


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(worlds(), st.lists(some_tasks(), min_size=1, max_size=6), st.integers(0, 30))
def test_limits_hold_whatever_happens_and_all_that_can_run_ends_when_nothing_does(
    world, batches, hostile_rounds
):
    world.works += batches.pop()
    for _ in range(hostile_rounds):
        if batches and world.rng.randrange(4) == 0:
            world.works += batches.pop()
        world.fill()
        world.trouble()
        world.pass_time()
    for batch in batches:
        world.works += batch
    world.calm_down()
    # At the worst each batch job runs one attempt of one task, for two hours after a wait of four rounds.
    for _ in range(60 + 30 * TRIES * len(world.works)):
        world.fill()
        if not any(world.is_wanted(work) for work in world.works):
            break
        world.behave()
        world.pass_time()
    rest = [work for work in world.works if world.is_wanted(work)]
    assert not rest, world.decide(world.rules)
