"""The plans of the hot statements: an index each, whatever the history and the other workflows."""

from __future__ import annotations

import json
import re
from itertools import product

import pytest

from ensemble.core.database import queries, read_sql

MODES = "force_generic_plan", "force_custom_plan"
PARAMETERS = {
    "next_size": {"p_workflows": "int[]", "p_priority": "int", "p_nodes": "int"},
    "lock_runnable": {
        "p_workflows": "int[]",
        "p_priority": "int",
        "p_nodes": "int",
        "p_minutes": "int",
        "p_limit": "int",
    },
    "list_kinds": {"p_workflows": "int[]", "p_after": "int", "p_limit": "int"},
    "leading_kinds": {
        "p_workflows": "int[]",
        "p_minutes": "int",
        "p_limit": "int",
        "v_priority": "int",
    },
    "next_priority": {"p_workflows": "int[]", "p_shapes": "int[]", "p_priority": "int"},
    "next_fitting_priority": {
        "p_workflows": "int[]",
        "p_shapes": "int[]",
        "p_priority": "int",
        "p_minutes": "int",
    },
    "view_serial": {
        "p_workflows": "int[]",
        "p_shapes": "int[]",
        "p_limits": "int[]",
        "p_priority": "int",
        "p_minutes": "int",
    },
    "lock_serial": {
        "p_workflows": "int[]",
        "p_shapes": "int[]",
        "p_limits": "int[]",
        "p_priority": "int",
        "p_minutes": "int",
    },
    "left_alone": {
        "p_workflows": "int[]",
        "p_is_serial": "boolean",
        "p_nodes": "int",
        "p_gpus": "int[]",
        "p_memory_mb": "int[]",
        "p_minutes": "int",
        "p_limit": "int",
    },
    "drain_tasks": {"p_lease": "bigint", "p_reason": "text"},
}
VALUES = {
    "p_workflows": "'{2,3}'",
    "p_priority": "0",
    "p_nodes": "1",
    "p_minutes": "60",
    "p_limit": "128",
    "p_after": "0",
    "p_shapes": "'{1,1}'",
    "p_limits": "'{100,100}'",
    "p_is_serial": "true",
    "p_gpus": "'{0}'",
    "p_memory_mb": "'{NULL}'",
    "v_priority": "0",
    "p_lease": "7",
    "p_reason": "'x'",
}


def bodies(function):
    """The statements of a function of functions.sql, with $1, $2, … for its parameters."""
    text = read_sql("functions.sql")
    body = re.search(rf"FUNCTION {function}\(.*?\$\$(.*?)\$\$", text, re.S)[1]
    found = re.findall(r"RETURN QUERY(.*?);", body, re.S) or [body]
    for place, name in enumerate(PARAMETERS[function], 1):
        found = [re.sub(rf"\b{name}\b", f"${place}", statement) for statement in found]
    return found


def walk(plan):
    yield plan
    for child in plan.get("Plans", ()):
        yield from walk(child)


@pytest.fixture
async def crowd(desk, owner):
    """50,000 finished tasks and 10,000 runnable ones of workflow 1, a few of workflows 2 and 3."""
    for name in ("crowd", "mine", "mine too"):
        await desk.add(20, workflow=name)
    async with owner.transaction():
        await owner.execute("ALTER TABLE task DISABLE TRIGGER USER")
        await owner.execute(
            "INSERT INTO task (workflow_id, state, num_nodes, wall_time_minutes)"
            " SELECT 1, CASE WHEN n <= 50000 THEN 'JOB_FINISHED' ELSE 'PREPROCESSED' END,"
            " n % 7 + 1, n % 100 FROM generate_series(1, 60000) n"
        )
        await owner.execute("ALTER TABLE task ENABLE TRIGGER USER")
    await owner.execute("ANALYZE task")
    yield owner
    await owner.execute("TRUNCATE task CASCADE")


async def explain(connection, statement, types, values, mode):
    await connection.execute(f"SET plan_cache_mode = {mode}")
    await connection.execute(f"PREPARE hot ({', '.join(types)}) AS {statement}")
    try:
        text = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE hot ({', '.join(values)})")
    finally:
        await connection.execute("DEALLOCATE hot")
    return list(walk(json.loads(text)[0]["Plan"]))


async def test_hot_statements_use_their_indexes(crowd):
    wanted = [
        ("next_size", 0, "task_runnable_idx"),
        ("next_size", 1, "task_runnable_workflow_idx"),
        ("lock_runnable", 0, "task_runnable_idx"),
        ("lock_runnable", 1, "task_runnable_workflow_idx"),
        ("list_kinds", 0, "task_runnable_serial_idx"),
        ("list_kinds", 1, "task_runnable_serial_workflow_idx"),
        ("leading_kinds", 0, "task_runnable_idx"),
        ("leading_kinds", 1, "task_runnable_workflow_idx"),
        ("next_priority", 0, "task_runnable_serial_idx"),
        ("next_priority", 1, "task_runnable_serial_workflow_idx"),
        ("next_fitting_priority", 0, "task_runnable_serial_idx"),
        ("view_serial", 0, "task_runnable_serial_idx"),
        ("view_serial", 1, "task_runnable_serial_workflow_idx"),
        ("lock_serial", 0, "task_runnable_serial_idx"),
        ("lock_serial", 1, "task_runnable_serial_workflow_idx"),
        ("left_alone", 0, "task_runnable_workflow_idx"),
        ("drain_tasks", 0, "task_held_idx"),
    ]
    cases = [
        (f"{function}/{place}", bodies(function)[place], PARAMETERS[function], index)
        for function, place, index in wanted
    ]
    cases += [
        (name, queries()[name], {"p_lease": "bigint"}, "task_held_idx")
        for name in ("select_held", "select_doomed")
    ]
    for mode in MODES:
        for name, statement, parameters, index in cases:
            values = [VALUES[parameter] for parameter in parameters]
            nodes = await explain(crowd, statement, parameters.values(), values, mode)
            scans = {
                (node["Node Type"], node.get("Index Name"))
                for node in nodes
                if node.get("Relation Name") == "task" or "Index Name" in node
            }
            used = {found for _, found in scans}
            assert index in used, f"{name}, {mode}: {scans}"
            kinds = {node["Node Type"] for node in nodes if node.get("Relation Name") == "task"}
            assert "Seq Scan" not in kinds, f"{name}, {mode}: {scans}"
            if "serial" in index:
                assert kinds <= {"Index Scan", "Index Only Scan"}, f"{name}, {mode}: {scans}"


@pytest.fixture
async def past(crowd):
    """Beside the crowd, 30,000 batch jobs that have ended, with their launchers, and three that have not."""
    async with crowd.transaction():
        await crowd.execute(
            "INSERT INTO batch_job (scheduler, scheduler_id, state, num_nodes, wall_time_minutes, job_mode)"
            " SELECT 'slurm', n::text, CASE WHEN n % 10000 = 0 THEN 'QUEUED' ELSE 'FINISHED' END, 1, 1,"
            " 'mpi' FROM generate_series(1, 30000) n"
        )
        await crowd.execute(
            "INSERT INTO launcher (batch_job_id, host, boot_id, machine_id, pid_namespace, pid,"
            " start_ticks, version, job_mode, nodes, scheduler)"
            " SELECT id, 'h', 'b', 'm', 'p', 1, 1, '0', 'mpi', '{n}', 'slurm' FROM batch_job"
        )
        await crowd.execute(
            "INSERT INTO lease (launcher_id, state, ttl, expires_at, closed_at, swept)"
            " SELECT id, 'RELEASED', '1 hour', now(), now(), true FROM launcher"
        )
        await crowd.execute(
            "INSERT INTO attempt (task_id, attempt, lease_id, started_at, ended_at, outcome)"
            " SELECT id, 1, 1, now(), now(), 'done' FROM task WHERE state = 'JOB_FINISHED'"
        )
    await crowd.execute("ANALYZE batch_job, launcher, lease, attempt")
    yield crowd
    await crowd.execute("TRUNCATE attempt, lease, launcher, batch_job CASCADE")


JOBS = "batch_job", "launcher", "lease"
#: What the service asks: the query, its types and values, the indexes it must use, the tables it must not scan.
ASKED = [
    (
        "select_batch_jobs",
        ["bigint[]", "bool", "int"],
        ["NULL", "true", "0"],
        {"batch_job_active_idx", "batch_job_pkey", "launcher_batch_job_idx"},
        JOBS,
    ),
    (
        "select_batch_jobs",
        ["bigint[]", "bool", "int"],
        ["'{7}'", "false", "0"],
        {"batch_job_pkey", "launcher_batch_job_idx"},
        JOBS,
    ),
    (
        "select_capacity",
        ["float8", "text[]", "float8[]"],
        ["10", "'{}'", "'{}'"],
        {"lease_active_idx", "task_held_idx"},
        ("lease", "task"),
    ),
    (
        "select_soon",
        ["int[]", "int", "int"],
        ["NULL", "100", "100"],
        {"task_held_idx", "task_pkey"},
        ("task",),
    ),
    ("typical_minutes", ["int"], ["1000"], {"attempt_pkey"}, ("attempt",)),
]


# One past for all of them: it takes seconds to make.
async def test_what_the_service_asks_does_not_grow_with_history(past):
    for mode in MODES:
        for name, types, values, indexes, tables in ASKED:
            nodes = await explain(past, queries()[name], types, values, mode)
            used = {node.get("Index Name") for node in nodes}
            assert indexes <= used, f"{name}{values}, {mode}: {used}"
            scanned = {node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"}
            assert not scanned & set(tables), f"{name}{values}, {mode}: {scanned}"


async def test_the_backlog_is_read_from_an_index_in_claim_order(past):
    indexes = {"NULL": "task_runnable_idx", "'{2,3}'": "task_runnable_workflow_idx"}
    types = ["int[]", "int", "int", "int"]
    for mode, width in product(MODES, (["0", "2"], ["2", "2147483647"])):
        for workflows, index in indexes.items():
            values = [workflows, "100", *width]
            nodes = await explain(past, queries()["select_backlog"], types, values, mode)
            scans = [node for node in nodes if node.get("Relation Name") == "task"]
            assert {node["Node Type"] for node in scans} == {"Index Scan"}, f"{mode}: {scans}"
            assert index in {node["Index Name"] for node in scans}, mode
            conditions = [node["Index Cond"] for node in scans if node["Index Name"] == index]
            assert all("num_nodes" in condition for condition in conditions), f"{mode}: {scans}"


async def test_a_selection_reads_the_wide_table_only_for_what_is_in_it(crowd):
    types = ["bigint[]", "text", "text[]", "text", "text", "jsonb"]
    tables = {"task", "workflow"}
    cases = [
        (["NULL", "NULL", "NULL", "NULL", "NULL", "NULL"], tables),
        (["NULL", "'crowd'", "'{FAILED}'", "NULL", "'app'", "NULL"], tables | {"app"}),
        (["NULL", "NULL", "NULL", "'x'", "NULL", "NULL"], tables | {"task_spec"}),
        (["NULL", "NULL", "NULL", "NULL", "NULL", "'{}'"], tables | {"task_spec"}),
    ]
    for values, wanted in cases:
        nodes = await explain(
            crowd, queries()["select_task_ids"], types, values, "force_custom_plan"
        )
        assert {n["Relation Name"] for n in nodes if "Relation Name" in n} == wanted, values


async def blocks(connection, call):
    for _ in range(2):  # the first reads the catalogue, too
        text = await connection.fetchval(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM {call}"
        )
    plan = json.loads(text)[0]["Plan"]
    return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


async def test_a_filtered_claim_reads_little_beside_a_crowd(crowd):
    assert await blocks(crowd, "next_size('{2,3}', 0, 1)") < 50


@pytest.fixture
async def flood(desk, owner):
    """One short task, and 10,000 each that are too long, of another shape and of another workflow."""
    [short] = await desk.add(1, workflow="mine", wall_time_minutes=5, memory_mb=1)
    [other] = await desk.add(1, workflow="other", memory_mb=2)
    async with owner.transaction():
        await owner.execute("ALTER TABLE task DISABLE TRIGGER USER")
        for like, workflow, minutes in ((short, 1, 99), (other, 1, 5), (short, 2, 5)):
            await owner.execute(
                "INSERT INTO task (shape_id, workflow_id, state, wall_time_minutes)"
                " SELECT (SELECT shape_id FROM task WHERE id = $1), $2, 'PREPROCESSED', $3"
                " FROM generate_series(1, 10000) n",
                like,
                workflow,
                minutes,
            )
        await owner.execute("ALTER TABLE task ENABLE TRIGGER USER")
    await owner.execute("ANALYZE task")
    yield owner, short
    await owner.execute("TRUNCATE task CASCADE")


@pytest.mark.parametrize(("workflows", "fitting"), [("'{1}'", 1), ("NULL", 2)])
async def test_a_serial_claim_reads_little_beside_what_does_not_fit(
    desk, flood, workflows, fitting
):
    owner, short = flood
    lease = await desk.register()
    node = "'{1}', '{1}', '{1}', '{8}', '{8}', '{0}', '{1}', '{0}', '{1}'"
    call = f"claim_serial({lease.id}, {workflows}, 10, 0, 1, 1, {node})"
    assert await blocks(owner, call) < 300
    taken = await desk.sql("SELECT array_agg(id) FROM task WHERE lease_id IS NOT NULL")
    assert short in taken
    assert len(taken) == fitting
