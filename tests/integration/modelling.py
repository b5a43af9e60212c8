"""What the store must say, worked out from the states' table and not from the SQL: one model of all tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

from ensemble.core.model import Cause, Outcome, Verdict
from ensemble.core.states import FINAL, RETRYABLE, RUNNABLE, State

#: How a launcher may report an end.
ENDINGS = {
    "well": (Outcome.DONE, None),
    "exit code": (Outcome.ERROR, Cause.EXIT_CODE),
    "signal": (Outcome.ERROR, Cause.SIGNAL),
    "no start": (Outcome.ERROR, Cause.COULD_NOT_START),
    "time limit": (Outcome.TIMEOUT, Cause.TIME_LIMIT),
    "cut off": (Outcome.TIMEOUT, Cause.ALLOCATION_ENDED),
    "killed": (Outcome.KILLED, Cause.KILLED_BY_USER),
    "lost": (Outcome.LOST, Cause.NODE_LOST),
    "given back": (Outcome.GIVEN_BACK, None),
}
CLOSED = frozenset({Verdict.DUPLICATE, Verdict.FENCED})


@dataclass
class Try:
    """One attempt."""

    lease: int
    is_started: bool = False
    outcome: Outcome | None = None


@dataclass
class Job:
    """One task of the model; its `parents` are those that it waits for."""

    id: int
    parents: tuple[int, ...]
    workflow: str = ""
    num_nodes: int = 1
    ranks_per_node: int = 1
    node_packing_count: int = 1
    wall_time_minutes: int = 0
    priority: int = 0
    max_retries: int = 0
    max_timeouts: int = 10
    max_losses: int = 3
    auto_timeout_retry: bool = True
    state: State = State.CREATED
    lease: int | None = None
    failures: int = 0
    timeouts: int = 0
    losses: int = 0
    cause: Cause | None = None
    tries: list[Try] = field(default_factory=list)
    moves: list[tuple[State, State]] = field(default_factory=list)

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where it comes in claim order."""
        return -self.priority, -self.num_nodes, -self.wall_time_minutes, self.id

    @property
    def is_serial(self) -> bool:
        return self.num_nodes == self.ranks_per_node == 1

    def fits(self, left_s: float | None) -> bool:
        return left_s is None or self.wall_time_minutes * 60 <= left_s

    def find(self, attempt: int) -> Try | None:
        return self.tries[attempt - 1] if 0 < attempt <= len(self.tries) else None


class Model:
    """All tasks, which leases live, and which rows somebody's open transaction has locked."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}
        self.leases: dict[int, str] = {}
        self.locked: set[int] = set()

    # ------------------------------------------------------------------ looking

    def pending(self, job: Job) -> int:
        """Count the parents that have not finished."""
        return sum(
            self.jobs[p].state is not State.JOB_FINISHED for p in job.parents if p in self.jobs
        )

    def children(self, task_id: int) -> list[Job]:
        return [job for job in self.jobs.values() if task_id in job.parents]

    def below(self, task_id: int) -> set[int]:
        """Everything that waits for a task, directly or not."""
        found: set[int] = set()
        todo = [task_id]
        while todo:
            more = {child.id for child in self.children(todo.pop())} - found
            found |= more
            todo += more
        return found

    def is_entangled(self, ids: list[int]) -> bool:
        """Whether a user's change of these tasks might wait for somebody's open transaction."""
        near, size = {i for i in ids if i in self.jobs}, 0
        while size != len(near):
            size = len(near)
            for job in self.jobs.values():
                family = {job.id, *(p for p in job.parents if p in self.jobs)}
                if family & near:
                    near |= family
        return bool(near & self.locked)

    def held(self, lease: int) -> list[Job]:
        return [job for job in self.jobs.values() if job.lease == lease]

    def claimable(self) -> list[Job]:
        """What can be claimed now, in claim order."""
        found = (
            job
            for job in self.jobs.values()
            if job.state in RUNNABLE and job.lease is None and job.id not in self.locked
        )
        return sorted(found, key=lambda job: job.place)

    def choose(
        self,
        nodes: int,
        ahead: int,
        left_s: float | None,
        most: int,
        workflows: set[str] | None,
    ) -> list[Job]:
        """What a launcher with whole nodes must get."""
        chosen = []
        for job in self.claimable():
            if len(chosen) == most:
                break
            if not job.fits(left_s) or (workflows is not None and job.workflow not in workflows):
                continue
            if job.num_nodes <= nodes:
                nodes -= job.num_nodes
            elif job.num_nodes == 1 and ahead > 0:
                ahead -= 1
            else:
                continue
            chosen.append(job)
        return chosen

    # ------------------------------------------------------------------ moving

    def _move(self, job: Job, to: State) -> None:
        """Move one task, and with it whatever waits for it."""
        if job.state is to:
            return
        job.moves.append((job.state, to))
        job.state = to
        for child in self.children(job.id):
            if child.state is not State.AWAITING_PARENTS:
                continue
            if to is State.JOB_FINISHED and self.pending(child) == 0:
                self._move(child, State.PREPROCESSED)
            elif to in (State.FAILED, State.USER_KILLED):
                child.cause = Cause.PARENT
                self._move(child, State.FAILED)

    def _retry_policy(self, job: Job) -> None:
        """Decide about what is RUN_ERROR or RUN_TIMEOUT."""
        if job.state is State.RUN_ERROR or job.cause is Cause.TIME_LIMIT:
            again = job.failures < job.max_retries
            job.failures += 1
        else:
            again = job.auto_timeout_retry and job.timeouts < job.max_timeouts
            job.timeouts += 1
        self._move(job, State.RESTART_READY if again else State.FAILED)

    def _lose(self, job: Job, cause: Cause) -> None:
        """End what ran and was lost; what had only been claimed is as it was before."""
        if job.state is State.RUNNING:
            again = job.losses < job.max_losses
            job.losses += 1
            job.cause = cause
            self._move(job, State.RESTART_READY if again else State.FAILED)
        elif job.state is State.RUN_TIMEOUT:
            self._retry_policy(job)

    def add(self, job: Job) -> None:
        self.jobs[job.id] = job
        dead = any(self.jobs[p].state in RETRYABLE for p in job.parents)
        if dead:
            job.cause = Cause.PARENT
            self._move(job, State.FAILED)
        else:
            self._move(job, State.AWAITING_PARENTS if self.pending(job) else State.PREPROCESSED)

    def claim(self, job: Job, lease: int) -> None:
        job.lease = lease
        job.tries.append(Try(lease))

    # ------------------------------------------------------------------ reports

    def judge(
        self, lease: int, task_id: int, attempt: int, ending: str | None = None
    ) -> frozenset[Verdict]:
        """Which answers a report of an end, or of a start, may get; what it must not be told is not among them."""
        job = self.jobs.get(task_id)
        if job is None:
            return frozenset({Verdict.MISSING})
        one = job.find(attempt)
        if one is None or one.lease != lease:
            return frozenset({Verdict.FENCED})
        is_live = self.leases[lease] == "ACTIVE"
        if one.outcome is not None:
            return frozenset({Verdict.DUPLICATE}) if is_live else CLOSED
        if not is_live:
            return frozenset({Verdict.FENCED})
        if ending is None and one.is_started:
            return frozenset({Verdict.DUPLICATE})
        if task_id in self.locked:
            return frozenset({Verdict.BUSY})
        if ending is not None and self.is_in_the_way(
            task_id, lambda model: model.finish(task_id, ending)
        ):
            return frozenset({Verdict.BUSY, Verdict.APPLIED})
        return frozenset({Verdict.APPLIED})

    def is_in_the_way(self, task_id: int, change: Callable[[Model], None]) -> bool:
        """Whether *change* ends a task that something waits for which is locked, or something below it is."""
        then = copy.deepcopy(self)
        change(then)
        before, after = self.jobs[task_id].state, then.jobs[task_id].state
        return before is not after and after in FINAL and bool(self.below(task_id) & self.locked)

    def start(self, task_id: int) -> None:
        job = self.jobs[task_id]
        job.tries[-1].is_started = True
        if job.state in RUNNABLE:
            self._move(job, State.RUNNING)

    def finish(self, task_id: int, ending: str) -> None:
        job = self.jobs[task_id]
        one = job.tries[-1]
        outcome, cause = ENDINGS[ending]
        if outcome is Outcome.GIVEN_BACK and one.is_started:
            # What has been started cannot be given back as if it had not.
            outcome, cause = Outcome.LOST, Cause.LAUNCHER_LOST
        one.outcome, job.lease = outcome, None
        if job.state is State.USER_KILLED:
            if outcome is not Outcome.GIVEN_BACK:
                one.outcome = Outcome.KILLED
        elif outcome is Outcome.DONE:
            job.cause = None
            self._move(job, State.JOB_FINISHED)
        elif outcome is Outcome.LOST:
            self._lose(job, cause)
        elif outcome is not Outcome.GIVEN_BACK:
            if job.state is not State.RUN_TIMEOUT:
                job.cause = cause
                self._move(
                    job, State.RUN_TIMEOUT if outcome is Outcome.TIMEOUT else State.RUN_ERROR
                )
            self._retry_policy(job)

    def cut_off(self, lease: int, cause: Cause, ids: set[int]) -> int:
        """Mark what runs RUN_TIMEOUT; return how many. They stay held."""
        if self.leases[lease] != "ACTIVE":
            return 0
        found = [
            job
            for job in self.held(lease)
            if job.id in ids and job.state is State.RUNNING and job.id not in self.locked
        ]
        for job in found:
            job.cause = cause
            self._move(job, State.RUN_TIMEOUT)
        return len(found)

    def release(self, job: Job) -> None:
        """Take a task from a lease that was closed."""
        job.lease = None
        is_killed = job.state is State.USER_KILLED
        job.tries[-1].outcome = Outcome.KILLED if is_killed else Outcome.LOST
        self._lose(job, Cause.LAUNCHER_LOST)

    # ------------------------------------------------------------------ users

    def kill(self, ids: list[int]) -> dict[int, bool]:
        found = [self.jobs[i] for i in ids if i in self.jobs and self.jobs[i].state not in FINAL]
        for job in found:
            job.cause = Cause.KILLED_BY_USER
            job.moves.append((job.state, State.USER_KILLED))
            job.state = State.USER_KILLED
        for job in found:  # after all of them: what is killed itself does not fail with its parent
            for child in self.children(job.id):
                if child.state is State.AWAITING_PARENTS:
                    child.cause = Cause.PARENT
                    self._move(child, State.FAILED)
        return {job.id: job.lease is not None for job in found}

    def retry(self, ids: list[int]) -> list[int]:
        chosen = {i for i in ids if i in self.jobs and self.jobs[i].state in RETRYABLE}
        todo = list(chosen)
        while todo:
            more = {
                child.id
                for child in self.children(todo.pop())
                if child.state is State.FAILED and child.cause is Cause.PARENT
            } - chosen
            chosen |= more
            todo += more
        while stays := {i for i in chosen if self._stays_dead(self.jobs[i], chosen)}:
            chosen -= stays
        for job in (self.jobs[i] for i in sorted(chosen)):
            job.failures = job.timeouts = job.losses = 0
            job.cause = None
            to = State.AWAITING_PARENTS if self.pending(job) else State.PREPROCESSED
            job.moves.append((job.state, to))
            job.state = to
        return sorted(chosen)

    def _stays_dead(self, job: Job, chosen: set[int]) -> bool:
        return job.lease is not None or any(
            self.jobs[p].state in RETRYABLE and p not in chosen
            for p in job.parents
            if p in self.jobs
        )

    def remove(self, ids: list[int]) -> list[int]:
        gone = {i for i in ids if i in self.jobs and self.jobs[i].lease is None}
        while kept := {i for i in gone if self._is_needed(self.jobs[i], gone)}:
            gone -= kept
        for task_id in gone:
            del self.jobs[task_id]
        return sorted(gone)

    def _is_needed(self, job: Job, gone: set[int]) -> bool:
        """Whether something that stays waits for it, or would again after a retry."""
        return any(
            child.state is State.AWAITING_PARENTS
            or (job.state is not State.JOB_FINISHED and self.pending(child) > 0)
            for child in self.children(job.id)
            if child.id not in gone
        )
