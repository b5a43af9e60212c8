"""The nouns: values that everything else passes around. Frozen, and nothing here does anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from fractions import Fraction
from typing import Any

import msgspec

from ensemble.core.states import State


class JobMode(StrEnum):
    """How a launcher runs tasks."""

    #: One MPI launch per task, on whole nodes.
    MPI = "mpi"
    #: One MPI launch of pilots, a pilot on every node; single-node tasks share nodes.
    SERIAL = "serial"


class Output(StrEnum):
    """What becomes of a task's standard output and error."""

    #: A file in the work directory, `NAME.out`.
    FILE = "file"
    #: The last 16 kB in the store, and no file.
    TAIL = "tail"
    #: Nothing.
    NONE = "none"


class Outcome(StrEnum):
    """How an attempt ended, in the column `attempt.outcome`."""

    DONE = "done"
    ERROR = "error"
    TIMEOUT = "timeout"
    KILLED = "killed"
    LOST = "lost"
    #: Claimed, then given back without having been started.
    GIVEN_BACK = "given back"


class Cause(StrEnum):
    """Why a task failed, was stopped, or runs again: the column `cause`."""

    EXIT_CODE = "exit code"
    SIGNAL = "signal"
    OUT_OF_MEMORY = "out of memory"
    TIME_LIMIT = "time limit"
    ALLOCATION_ENDED = "allocation ended"
    KILLED_BY_USER = "killed by user"
    LAUNCHER_LOST = "launcher lost"
    NODE_LOST = "node lost"
    COULD_NOT_START = "could not start"
    PARENT = "parent"


class Unfit(StrEnum):
    """Why a launcher leaves a task alone that could run."""

    #: Several nodes or ranks: not for serial mode.
    RANKS = "ranks"
    #: More nodes than the launcher has.
    NODES = "nodes"
    #: More GPUs, or more memory, than any of its nodes has.
    GPUS = "gpus"
    MEMORY = "memory"
    #: Longer than the time that is left.
    TIME = "time"


class NewApp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to run something, registered under a name."""

    name: str
    #: Split into words once (shell quoting); `{name}` inside a word is filled from a task's params.
    command: str
    description: str = ""
    environ: dict[str, str] = msgspec.field(default_factory=dict)
    #: A bash script sourced once per node; the environment it leaves is the tasks' environment.
    env_script: str | None = None
    preprocess: str | None = None
    postprocess: str | None = None
    #: What becomes of its tasks' output, unless a task says otherwise.
    output: Output = Output.FILE


class NewTask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One program run to be added: an app with arguments, or a bare command, and what it needs."""

    app: str | None = None
    #: A bare command instead of an app: a string is split into words once, a list is taken as is.
    command: str | list[str] | None = None
    args: list[str] = msgspec.field(default_factory=list)
    params: dict[str, str] = msgspec.field(default_factory=dict)
    #: Part of the work directory's name; the app's or the program's name when empty.
    name: str = ""
    workflow: str = ""
    #: Ids of tasks that must finish first, or names of tasks of the same submission.
    parents: list[int | str] = msgspec.field(default_factory=list)
    wait_for_parents: bool = True
    num_nodes: int = 1
    ranks_per_node: int = 1
    #: CPU threads of one rank; the task's share of the node when None.
    threads_per_rank: int | None = None
    threads_per_core: int | None = None
    gpus_per_rank: int = 0
    memory_mb: int | None = None
    #: How many such tasks share a node in serial mode.
    node_packing_count: int = 1
    #: An estimate: orders tasks and decides whether one still fits; never kills. 0 is unknown.
    wall_time_minutes: int = 0
    #: A limit: the run is ended after so many minutes.
    time_limit_minutes: float | None = None
    priority: int = 0
    environ: dict[str, str] = msgspec.field(default_factory=dict)
    mpi_flags: list[str] = msgspec.field(default_factory=list)
    cpu_affinity: str | None = None
    input_files: list[str] = msgspec.field(default_factory=list)
    stage_in_url: str | None = None
    stage_out_url: str | None = None
    stage_out_files: list[str] = msgspec.field(default_factory=list)
    data: dict[str, Any] = msgspec.field(default_factory=dict)
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    #: How often a run that fails by itself (exit code, signal, own time limit) is repeated.
    max_retries: int = 0
    #: Whether a run that was cut off by the end of its allocation is repeated, and how often.
    auto_timeout_retry: bool = True
    max_timeouts: int = 10
    #: How often a run that was lost with its launcher or node is repeated.
    max_losses: int = 3
    post_error_handler: bool = False
    post_timeout_handler: bool = False
    #: What becomes of the output; None is the app's way, and `file` without an app.
    output: Output | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """A registered app, as the store has it."""

    id: int
    name: str
    command: str
    description: str
    environ: Mapping[str, str]
    env_script: str | None
    created_at: datetime
    output: Output = Output.FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task, as the store has it."""

    id: int
    name: str
    workflow: str
    app: str | None
    state: State
    argv: tuple[str, ...]
    #: Relative to the site's directory.
    workdir: str
    num_nodes: int
    ranks_per_node: int
    node_packing_count: int
    wall_time_minutes: int
    time_limit_minutes: float | None
    priority: int
    attempt: int
    failures: int
    timeouts: int
    losses: int
    pending_parents: int
    lease_id: int | None
    exit_code: int | None
    cause: Cause | None
    #: Details of the cause: who killed it and why, which signal, which parent.
    reason: str | None
    #: The last lines of the output of the last attempt that failed.
    error: str | None
    #: What becomes of its output.
    output: Output
    nodes: tuple[str, ...]
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    tags: Mapping[str, str]

    @property
    def is_held(self) -> bool:
        """Whether a launcher, or what it left behind, may still run a process of this task."""
        return self.lease_id is not None

    @property
    def is_claimed(self) -> bool:
        """Whether a launcher has taken it and has not reported its start."""
        return self.is_held and self.state in {State.PREPROCESSED, State.RESTART_READY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try at running a task."""

    task_id: int
    attempt: int
    lease_id: int
    nodes: tuple[str, ...]
    claimed_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    exit_code: int | None
    outcome: Outcome | None
    cause: Cause | None
    reason: str | None
    error: str | None
    #: The last 16 kB of the output, of a task whose output is `tail`.
    output: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEvent:
    """One move of a task, as the database's trigger wrote it."""

    id: int
    task_id: int
    at: datetime
    from_state: State
    to_state: State
    attempt: int
    lease_id: int | None
    #: The database role that made the move.
    actor: str
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDetail:
    """Everything on record about one task."""

    task: Task
    spec: Mapping[str, Any]
    parents: tuple[int, ...]
    children: tuple[int, ...]
    attempts: tuple[Attempt, ...]
    events: tuple[TaskEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A compute node of an allocation, or a virtual one on this machine."""

    #: What MPI launchers call it, and what is on record.
    name: str
    #: Hardware threads that tasks may use.
    cores: int
    gpus: int = 0
    #: A share of this machine: no host list is given to MPI launchers.
    is_virtual: bool = False


class Need(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a single-node task takes of its node (serial mode)."""

    #: It takes one part in so many of the node.
    packing: int = 1
    #: Hardware threads; its share of the node's cores when None.
    threads: int | None = None
    #: Hardware threads used of each core.
    threads_per_core: int | None = None
    gpus: int = 0
    memory_mb: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Vacancy:
    """What is free on each of some nodes that are alike (serial mode)."""

    #: How many such nodes.
    nodes: int
    #: The part of such a node that is free, as an exact fraction.
    share: Fraction
    #: Whole cores: free, and of the node.
    cores: int
    all_cores: int
    gpus: int
    #: None where the node does not say: then memory is not counted.
    memory_mb: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRoom:
    """What a launcher in serial mode can start now, or in a moment."""

    free: tuple[Vacancy, ...]
    #: The nodes when nothing runs on them: what fits none of these is left alone.
    whole: tuple[Vacancy, ...]
    #: Seconds until the launcher must be done; None is for ever.
    left_s: float | None
    max_tasks: int
    #: Tasks to take besides what fits now, to be started as others end.
    ahead: int = 0
    #: So many tasks share a node at least, whatever their node_packing_count says.
    slots_per_node: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a launcher can start now, or in a moment: never ask the store for more."""

    nodes: int
    #: Seconds until the launcher must be done; None is for ever.
    left_s: float | None
    max_tasks: int
    #: Single-node tasks to take besides, to be started as nodes become free.
    ahead: int = 0


class Claim(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A task that this launcher has taken and nobody else can, with what it takes to run it."""

    id: int
    attempt: int
    name: str
    workflow: str
    app: str | None
    argv: tuple[str, ...]
    #: Relative to the site's directory.
    workdir: str
    num_nodes: int = 1
    ranks_per_node: int = 1
    threads_per_rank: int | None = None
    threads_per_core: int | None = None
    gpus_per_rank: int = 0
    memory_mb: int | None = None
    node_packing_count: int = 1
    wall_time_minutes: int = 0
    time_limit_minutes: float | None = None
    output: Output = Output.FILE
    environ: Mapping[str, str] = msgspec.field(default_factory=dict)
    env_script: str | None = None
    mpi_flags: tuple[str, ...] = ()
    cpu_affinity: str | None = None
    parent_ids: tuple[int, ...] = ()
    #: Its last launcher was lost, and it may have killed it. Its start is to be on record before it is
    #: made: else a task that kills its launcher at once would never be known to have run.
    is_suspect: bool = False


class Placement(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The nodes that a claim runs on, in rank order."""

    nodes: tuple[Node, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes' names, for the record."""
        return tuple(node.name for node in self.nodes)


class Start(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The report that an attempt's process has been started."""

    id: int
    attempt: int
    at: datetime
    nodes: tuple[str, ...] = ()


class End(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The report that nothing of an attempt runs any more: closes the attempt, releases the hold."""

    id: int
    attempt: int
    outcome: Outcome
    #: The store's own clock when None.
    at: datetime | None = None
    #: Set when start and end are reported together.
    started_at: datetime | None = None
    nodes: tuple[str, ...] = ()
    #: The exit status as a shell shows it: 128 + N after signal N; None when nothing ran.
    exit_code: int | None = None
    cause: Cause | None = None
    reason: str | None = None
    #: The last lines of the output, for a run that failed.
    error: str | None = None
    #: The last 16 kB of the output, for a task whose output is `tail`.
    output: str | None = None


class Verdict(StrEnum):
    """What became of one row of a report."""

    APPLIED = "applied"
    #: The same report was applied before.
    DUPLICATE = "duplicate"
    #: Another attempt or lease owns the task now; nothing was changed.
    FENCED = "fenced"
    #: There is no such task (any more).
    MISSING = "missing"
    #: Somebody's open transaction holds the row; report it again.
    BUSY = "busy"


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherIdentity:
    """Who a launcher is: enough for anybody on the same host to tell whether it still lives."""

    host: str
    boot_id: str
    #: /etc/machine-id: two machines may have one host name.
    machine_id: str
    #: The pid name space: the same pid in another one is another process.
    pid_namespace: str
    pid: int
    #: Clock ticks after boot at which the process started (proc(5), stat field 22).
    start_ticks: int
    guard_pid: int | None = None
    guard_start_ticks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewLauncher:
    """What a launcher says of itself when it registers."""

    identity: LauncherIdentity
    version: str
    job_mode: JobMode
    wf_filter: str | None
    nodes: tuple[str, ...]
    scheduler: str
    scheduler_job_id: str | None
    restart_count: int = 0
    #: Seconds until its allocation ends; None when it does not.
    left_s: float | None = None
    #: Of its largest node, where that is known.
    node_cores: int | None = None
    node_gpus: int | None = None
    #: How long processes of it may live on other hosts after it has gone.
    linger_s: float = 0.0
    #: The batch job of ours whose script started it; it is registered only if it may take that one.
    batch_job_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """A launcher, past or present, as the store has it."""

    id: int
    lease_id: int
    host: str
    pid: int
    job_mode: str
    wf_filter: str | None
    nodes: tuple[str, ...]
    #: Of these, those that get no more tasks, and why.
    aside: Mapping[str, str]
    scheduler: str
    scheduler_job_id: str | None
    lease_state: str
    started_at: datetime
    ended_at: datetime | None
    last_seen_at: datetime
    tasks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """Which tasks: what is None does not restrict, and everything given must hold."""

    ids: tuple[int, ...] | None = None
    #: A substring of the workflow's name.
    workflow: str | None = None
    states: tuple[State, ...] | None = None
    #: A substring of the task's name.
    name: str | None = None
    app: str | None = None
    tags: Mapping[str, str] | None = None

    @property
    def is_everything(self) -> bool:
        """Whether nothing restricts it."""
        return self == Selector()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many tasks are in each state, and how many of those a launcher holds."""

    by_state: Mapping[State, int]
    held: Mapping[State, int]

    @property
    def total(self) -> int:
        """All tasks."""
        return sum(self.by_state.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What to change of a task; None leaves a field as it is."""

    workflow: str | None = None
    priority: int | None = None
    wall_time_minutes: int | None = None
    time_limit_minutes: float | None = None
    num_nodes: int | None = None
    ranks_per_node: int | None = None
    max_retries: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A broken invariant, found by `ensemble db check`."""

    check: str
    task_id: int
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """A place in the stream of events."""

    xid: str
    id: int
