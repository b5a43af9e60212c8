"""A submission becomes rows: one transaction, three COPYs, ids in the order of dependence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ensemble.core import submission
from ensemble.core.database import PATIENCE_S, queries
from ensemble.core.model import App, Cause, NewTask
from ensemble.core.states import State
from ensemble.core.submission import Layout, Resolved
from ensemble.errors import NotFoundError, UsageError

#: What tasks of the same shape have in common.
_Shape = tuple[int, int | None, int | None, int, int | None]
_TASK_COLUMNS = (
    "id",
    "workflow_id",
    "app_id",
    "num_nodes",
    "ranks_per_node",
    "shape_id",
    "wall_time_minutes",
    "priority",
    "pending_parents",
    "max_retries",
    "max_timeouts",
    "max_losses",
    "auto_timeout_retry",
    "state",
    "cause",
    "reason",
)
_SPEC_COLUMNS = (
    "task_id",
    "name",
    "workdir",
    "argv",
    "params",
    "environ",
    "env_script",
    "time_limit_minutes",
    "mpi_flags",
    "cpu_affinity",
    "output",
    "wait_for_parents",
    "data",
    "tags",
)


def resolve_all(tasks: Sequence[NewTask], apps: Mapping[str, App]) -> list[Resolved]:
    """Check every task; the error of one names its place."""
    resolved = []
    for place, task in enumerate(tasks, 1):
        try:
            resolved.append(submission.resolve(task, apps))
        except UsageError as error:
            if len(tasks) == 1:
                raise
            raise UsageError(f"task {place} of {len(tasks)}: {error}") from error
    return resolved


async def insert(
    connection: Any,
    resolved: Sequence[Resolved],
    sequence: Sequence[int],
    names: Sequence[str],
    key: str | None,
    layout: Layout = "sharded",
) -> list[int]:
    """Write one submission; ids rise along *sequence*, so that parents come before children."""
    # Before the transaction: a new workflow's name is locked for a moment, not for the whole COPY.
    workflows = await workflow_ids(connection, {task.new.workflow for task in resolved})
    shapes = await _shape_ids(connection, {_shape(task.new) for task in resolved})
    async with connection.transaction():
        # While the rows are made here, the server hears nothing. Not without end: whoever is stopped in this holds its
        # key and its parents.
        await connection.execute(
            "SET LOCAL statement_timeout = 0;"
            f" SET LOCAL idle_in_transaction_session_timeout = {round(1000 * PATIENCE_S)}"
        )
        drawn = await connection.fetch(queries()["next_task_ids"], len(resolved))
        ids = [0] * len(resolved)
        for place, row in zip(sequence, drawn, strict=True):
            ids[place] = row[0]
        if key is not None:
            earlier = await _claim_key(connection, key, ids)
            if earlier is not None:
                return earlier
        edges = _edges(resolved, ids, names)
        states = await _parent_states(connection, resolved)
        tasks, specs = [], []
        dead: dict[int, int] = {}  # failed at birth: task -> parent
        for place in sequence:
            task, task_id = resolved[place], ids[place]
            waits = task.new.wait_for_parents
            parents = edges.get(task_id, ()) if waits else ()
            lost = [
                p
                for p in parents
                if p in dead or states.get(p) in (State.FAILED, State.USER_KILLED)
            ]
            if lost:
                dead[task_id] = lost[0]
            pending = sum(states.get(p) is not State.JOB_FINISHED for p in parents)
            workflow_id, shape_id = workflows[task.new.workflow], shapes[_shape(task.new)]
            tasks.append(_task_row(task, task_id, workflow_id, shape_id, pending, lost))
            specs.append(_spec_row(task, task_id, layout))
        await _copy(connection, "task", tasks, _TASK_COLUMNS)
        if dead:
            await connection.execute(queries()["end_at_birth"], list(dead), timeout=PATIENCE_S)
        await _copy(connection, "task_spec", specs, _SPEC_COLUMNS)
        links = [
            (parent, ids[place], task.new.wait_for_parents)
            for place, task in enumerate(resolved)
            for parent in edges.get(ids[place], ())
        ]
        if links:
            await _copy(connection, "task_parent", links, ("parent_id", "child_id", "waits"))
    return ids


async def _copy(connection: Any, table: str, rows: list[Any], columns: Sequence[str]) -> None:
    await connection.copy_records_to_table(table, records=rows, columns=columns, timeout=PATIENCE_S)


async def _claim_key(connection: Any, key: str, ids: list[int]) -> list[int] | None:
    if await connection.fetchval(queries()["insert_submission"], key, ids) is not None:
        return None
    earlier: list[int] = await connection.fetchval(queries()["select_submission"], key)
    return earlier


async def workflow_ids(connection: Any, names: set[str]) -> dict[str, int]:
    """Return the ids of these workflows, made where they are new."""
    await connection.execute(queries()["insert_workflows"], sorted(names))
    rows = await connection.fetch(queries()["named_workflows"], sorted(names))
    return {row["name"]: row["id"] for row in rows}


async def _shape_ids(connection: Any, shapes: set[_Shape]) -> dict[_Shape, int]:
    """Return the ids of these shapes, made where they are new."""
    if not shapes:
        return {}
    columns = [list(column) for column in zip(*shapes, strict=True)]
    rows = await connection.fetch(queries()["select_shapes"], *columns)
    if len(rows) < len(shapes):
        await connection.execute(queries()["insert_shapes"], *columns)
        rows = await connection.fetch(queries()["select_shapes"], *columns)
    return {tuple(row[1:]): row[0] for row in rows}


def _shape(new: NewTask) -> _Shape:
    return (
        new.node_packing_count,
        new.threads_per_rank,
        new.threads_per_core,
        new.gpus_per_rank,
        new.memory_mb,
    )


def _edges(
    resolved: Sequence[Resolved], ids: Sequence[int], names: Sequence[str]
) -> dict[int, tuple[int, ...]]:
    edges = {}
    places = {name: place for place, name in enumerate(names)}  # those that matter are unique
    for place, task in enumerate(resolved):
        if task.new.parents:
            given = [parent for parent in task.new.parents if isinstance(parent, int)]
            named = [ids[places[p]] for p in task.new.parents if isinstance(p, str)]
            edges[ids[place]] = tuple(dict.fromkeys([*given, *named]))
    return edges


async def _parent_states(connection: Any, resolved: Sequence[Resolved]) -> dict[int, State]:
    """Lock the parents that were there before; say which are missing."""
    wanted = {p for task in resolved for p in task.new.parents if isinstance(p, int)}
    if not wanted:
        return {}
    rows = await connection.fetch(queries()["lock_parents"], sorted(wanted))
    states = {row["id"]: State(row["state"]) for row in rows}
    for missing in sorted(wanted - states.keys()):
        raise NotFoundError(f"there is no task {missing} to wait for (ensemble ls)")
    return states


def _task_row(
    task: Resolved,
    task_id: int,
    workflow_id: int,
    shape_id: int,
    pending: int,
    lost: Sequence[int],
) -> tuple[Any, ...]:
    new = task.new
    state, cause, reason = State.PREPROCESSED, None, None
    if lost:
        state, cause, reason = State.FAILED, Cause.PARENT, f"task {lost[0]}"
    elif pending:
        state = State.AWAITING_PARENTS
    return (
        task_id,
        workflow_id,
        task.app_id,
        new.num_nodes,
        new.ranks_per_node,
        shape_id,
        new.wall_time_minutes,
        new.priority,
        pending,
        new.max_retries,
        new.max_timeouts,
        new.max_losses,
        new.auto_timeout_retry,
        state,
        cause,
        reason,
    )


def _spec_row(task: Resolved, task_id: int, layout: Layout) -> tuple[Any, ...]:
    new = task.new
    return (
        task_id,
        task.name,
        submission.workdir(task_id, task.name, layout),
        task.argv,
        new.params,
        task.environ,
        task.env_script,
        new.time_limit_minutes,
        new.mpi_flags,
        new.cpu_affinity,
        task.output,
        new.wait_for_parents,
        new.data,
        new.tags,
    )
