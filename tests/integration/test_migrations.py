"""The schema: applied once, by one, and the same as what the program believes."""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

import ensemble
from ensemble.core import database, migrations
from ensemble.core.batchjob import JobState, NewBatchJob
from ensemble.core.database import parse_queries, queries, read_sql
from ensemble.core.jobs import Jobs
from ensemble.core.leases import Lease
from ensemble.core.migrations import migrate
from ensemble.core.model import JobMode
from ensemble.core.states import MOVES
from ensemble.core.store import Store
from ensemble.errors import SchemaError
from ensemble.site import OWNER


@pytest.fixture
async def fresh(site, address, owner):
    """The address of a database without a schema."""
    await owner.execute("DROP SCHEMA IF EXISTS ensemble CASCADE")
    yield site.address(OWNER)
    await owner.execute("DROP SCHEMA IF EXISTS ensemble CASCADE")
    await migrate(site.address(OWNER))


async def test_four_at_once_migrate_once(fresh, owner):
    async with asyncio.TaskGroup() as group:
        runs = [group.create_task(migrate(fresh)) for _ in range(4)]
    applied = [name for run in runs for name in run.result()]
    assert sorted(applied) == [*migrations.files().values(), "functions.sql"]
    assert await migrate(fresh) == []
    assert await owner.fetchval("SELECT count(*) FROM schema_version") == migrations.latest()
    store = await Store.open(replace(fresh))
    assert await store.check() == []
    await store.close()


_OLD_LAUNCHER = """
    INSERT INTO workflow (name) VALUES ('w');
    INSERT INTO task (workflow_id, state) VALUES (1, 'PREPROCESSED'), (1, 'JOB_FINISHED');
    INSERT INTO batch_job (scheduler, scheduler_id, state, num_nodes, wall_time_minutes, job_mode)
    VALUES ('slurm', '7', 'RUNNING', 2, 60, 'mpi'), ('slurm', '8', 'FINISHED', 1, 60, 'serial');
    INSERT INTO launcher (batch_job_id, host, boot_id, machine_id, pid_namespace, pid, start_ticks,
                          version, job_mode, nodes, scheduler, scheduler_job_id)
    VALUES (1, 'h', 'b', 'm', 'p', 1, 1, '0', 'mpi', '{n1}', 'slurm', '7');
    INSERT INTO lease (launcher_id, ttl, expires_at) VALUES (1, '1 hour', now() + interval '1 hour');
    CREATE FUNCTION register_launcher(
      jsonb, text, text, text, text[], text, text, int, interval, interval, int, int, interval)
    RETURNS TABLE (launcher_id bigint, lease_id bigint) LANGUAGE sql AS 'SELECT 1::bigint, 1::bigint';
"""


async def test_a_database_of_the_first_release_is_brought_up_with_what_is_in_it(fresh, owner):
    first = migrations.files()[1]
    text = read_sql(f"migrations/{first}")
    await owner.execute(migrations._LEDGER)
    await owner.execute(text)
    await owner.execute(
        "INSERT INTO schema_version (version, name, sha256) VALUES (1, $1, $2)",
        first,
        hashlib.sha256(text.encode()).hexdigest(),
    )
    await owner.execute(_OLD_LAUNCHER)
    assert await migrate(fresh) == [
        "0002_batch_jobs.sql",
        "0003_nodes_aside.sql",
        "functions.sql",
    ]
    assert (
        await owner.fetchval("SELECT count(*) FROM pg_proc WHERE proname = 'register_launcher'")
        == 1
    )
    store = await Store.open(fresh)
    try:
        old, running = await Jobs(store.pool).recent(10)
        assert (old.name, old.state, old.launcher_id) == ("", JobState.FINISHED, None)
        assert (running.scheduler_id, running.policy, running.missing) == ("7", None, 0)
        assert (running.launcher_id, running.has_live_launcher) == (1, True)
        await Lease(store.pool, 1, 1).renew()
        assert await owner.fetchval("SELECT count(*) FROM service") == 1
        [left] = await Jobs(store.pool).backlog(None)
        assert (left.workflow, left.tasks) == ("w", 1)
        new = NewBatchJob(scheduler="slurm", num_nodes=1, wall_time_minutes=1, job_mode=JobMode.MPI)
        opened = await Jobs(store.pool).open(new, site="s")
        assert (opened.id, opened.state) == (3, JobState.NEW)
    finally:
        await store.close()


async def test_there_is_one_service_and_no_second_row(owner):
    with pytest.raises(asyncpg.UniqueViolationError):
        await owner.execute("INSERT INTO service DEFAULT VALUES")
    with pytest.raises(asyncpg.CheckViolationError):
        await owner.execute("INSERT INTO service (is_only) VALUES (false)")


async def test_a_store_without_a_schema_says_what_to_type(fresh):
    with pytest.raises(SchemaError, match="ensemble db migrate"):
        await Store.open(fresh)


async def test_a_newer_schema_is_refused(site, address, owner):
    await owner.execute("INSERT INTO schema_version VALUES (9999, 'later', '')")
    try:
        with pytest.raises(SchemaError, match="9999, newer than"):
            await migrate(site.address(OWNER))
        with pytest.raises(SchemaError, match="9999, newer than"):
            await Store.open(address)
    finally:
        await owner.execute("DELETE FROM schema_version WHERE version = 9999")


async def test_an_edited_migration_is_refused(site, address, owner):
    before = await owner.fetchval("SELECT sha256 FROM schema_version WHERE version = 1")
    await owner.execute("UPDATE schema_version SET sha256 = 'other' WHERE version = 1")
    try:
        with pytest.raises(SchemaError, match=r"0001_initial\.sql was applied"):
            await migrate(site.address(OWNER))
    finally:
        await owner.execute("UPDATE schema_version SET sha256 = $1 WHERE version = 1", before)


async def test_functions_are_applied_again_when_they_changed(site, desk, owner):
    await owner.execute("DROP FUNCTION drain_tasks; DELETE FROM move")
    assert await migrate(site.address(OWNER)) == []
    await owner.execute("UPDATE schema_script SET sha256 = 'older'")
    assert await migrate(site.address(OWNER)) == ["functions.sql"]
    assert await owner.fetchval("SELECT count(*) FROM move") > 20
    lease = await desk.register()
    assert await lease.drain("x") == 0


async def test_the_database_has_the_programs_moves(owner, address):
    rows = await owner.fetch("SELECT from_state, to_state, actor FROM move")
    wanted = {(a, b, c) for a, row in MOVES.items() for b, c in row.items()}
    assert {tuple(row) for row in rows} == wanted


async def test_every_function_and_trigger_is_there(owner, address):
    text = read_sql("functions.sql")
    functions = set(re.findall(r"CREATE OR REPLACE FUNCTION (\w+)", text))
    found = await owner.fetch(
        "SELECT proname::text FROM pg_proc WHERE pronamespace = 'ensemble'::regnamespace"
    )
    assert {row[0] for row in found} == functions
    assert len(found) == len(functions)  # no older signature beside the new one
    triggers = set(re.findall(r"CREATE TRIGGER (\w+)", text))
    found = await owner.fetch(
        "SELECT tgname::text FROM pg_trigger WHERE tgrelid = 'task'::regclass"
        " AND NOT tgisinternal AND tgenabled = 'O'"
    )
    assert {row[0] for row in found} == triggers


async def test_every_query_prepares_and_has_the_parameters_it_says(psql):
    for name, (params, text) in parse_queries(read_sql("queries.sql")).items():
        try:
            statement = await psql.prepare(text)
        except asyncpg.PostgresError as error:
            raise AssertionError(f"{name}: {error}") from error
        assert len(statement.get_parameters()) == len(params), name


def test_every_query_that_is_used_exists_and_every_one_is_used():
    source = "\n".join(
        path.read_text("utf-8") for path in Path(ensemble.__file__).parent.rglob("*.py")
    )
    used = set(re.findall(r'queries\(\)\[\s*"(\w+)"\s*\]', source)) | {
        name for name in queries() if f'"{name}"' in source
    }
    assert used == set(queries())


async def test_every_function_that_is_called_exists_with_so_many_arguments(owner, address):
    folder = Path(database.__file__).parent
    for path in folder.glob("*.py"):
        calls = re.findall(r"(?:FROM|SELECT) (\w+_\w+)\(((?:\$\d+|,|\s)*)", path.read_text("utf-8"))
        for name, arguments in calls:
            count = arguments.count("$")
            assert await owner.fetchval(
                "SELECT count(*) FROM pg_proc WHERE proname = $1 AND pronargs >= $2", name, count
            ), name
