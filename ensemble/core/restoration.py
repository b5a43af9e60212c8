"""The way back from a backup to a database that works: what was under way then is ended first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import asyncpg

from ensemble.core import migrations
from ensemble.core.backup import (
    COPY,
    LONG_S,
    PLAIN,
    Head,
    Rows,
    Source,
    damaged,
    highest_used,
    list_tables,
    quoted,
)
from ensemble.core.database import SCHEMA, Address, connect, queries, wrapped
from ensemble.errors import EnsembleError, TakenError

#: Ids that a restore leaves out: what was added after the backup, and is lost, had some of them, and its work
#: directories, batch scripts and launchers may still be there.
_GAP = 1_000_000
#: A launcher that was not heard of for so long is no obstacle to a restore.
_SILENT_S = 120.0
_RELEASE_AT_ONCE = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a restore did."""

    rows: dict[str, int]
    #: Launchers that lived when the backup was made.
    launchers: int
    #: Tasks that these had, and which may be taken again.
    released: int
    #: Active batch jobs that were given up.
    batch_jobs: int
    #: Tables that are not Ensemble's.
    skipped: list[str] = field(default_factory=list)


async def restore(
    address: Address, source: Source, head: Head, *, replace: bool = False
) -> Restored:
    """Fill the database with a backup, all of it or, after an error, nothing.

    What launchers had taken when the backup was made is free again, and no loss counts for that; their leases
    and batch jobs are over, and the site's batch jobs get other names from now on. Watchers see none of the
    restored events.

    Args:
        address: As the owner of the schema.
        source: Where `read_head` left it.
        head: What that returned.
        replace: Whatever the database holds is replaced.

    Raises:
        EnsembleError: The backup is damaged; or the database is not empty and *replace* was not given.
        TakenError: A launcher or the service lives.
        SchemaError: The database has a newer schema than this program.
        StoreUnavailableError: It cannot be reached.
    """
    connection = await connect(address, name="ensemble restore")
    try:
        async with wrapped():
            await connection.execute(f"{PLAIN}; SET lock_timeout = '3s'")
            await migrations.lock(connection)
            if not await connection.fetchval(queries()["try_service_lock"]):
                raise TakenError(
                    "the service of this site runs: stop it first (ensemble serve --stop)",
                    host=None,
                    pid=None,
                )
            async with connection.transaction():
                used = await _make_room(connection, replace=replace)
                done = await _fill(connection, source, head, used)
            await connection.execute(f"ANALYZE {quoted(await list_tables(connection))}")
            await connection.execute(queries()["ring"])
            return done
    finally:
        connection.terminate()


async def _make_room(connection: asyncpg.Connection[Any], *, replace: bool) -> dict[str, int]:
    """Drop the schema, where that may be; return which ids were used."""
    if not await connection.fetchval("SELECT to_regclass('schema_version')::text"):
        return {}
    applied = await connection.fetch(queries()["select_migrations"])
    migrations.check_version(
        max((row["version"] for row in applied), default=None), may_be_older=True
    )
    tables = await list_tables(connection)
    try:
        if tables:
            await connection.execute(f"LOCK TABLE {quoted(tables)} IN ACCESS EXCLUSIVE MODE")
    except asyncpg.LockNotAvailableError as error:
        raise EnsembleError(
            "somebody's transaction uses the tables: end it (ensemble db psql?), then repeat"
        ) from error
    await _refuse_contents(connection, replace=replace)
    used = await highest_used(connection)
    await connection.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
    return used


async def _refuse_contents(connection: asyncpg.Connection[Any], *, replace: bool) -> None:
    row = await connection.fetchrow(queries()["count_contents"])
    assert row is not None
    found = ", ".join(f"{name}: {count:,}" for name, count in row.items() if count)
    if found and not replace:
        raise EnsembleError(
            f"the database is not empty ({found}): restore into a new site (ensemble init), or have all "
            "that replaced (ensemble db restore --force)"
        )
    live = await connection.fetchrow(queries()["last_heard"])
    if live is not None and live["silent_s"] < _SILENT_S:
        raise TakenError(
            f"launcher {live['id']} on {live['host']} may live: it was heard of {live['silent_s']:.0f} s ago; "
            f"end it, or wait until it has been silent for {_SILENT_S:.0f} s",
            host=live["host"],
            pid=None,
        )


async def _fill(
    connection: asyncpg.Connection[Any], source: Source, head: Head, used: dict[str, int]
) -> Restored:
    await migrations.apply(connection, up_to=head.schema)
    tables = await list_tables(connection)
    # Migrations bring rows of their own.
    await connection.execute(f"TRUNCATE {quoted(tables)}")
    rows, skipped = Rows(source), []
    while copy := COPY.fullmatch(line := rows.line()):
        table, columns = copy[1].decode(), copy[2].decode().split(", ")
        if table in tables:
            await _copy_in(connection, table, columns, rows)
        else:
            skipped.append(table)
            async for _ in rows.of(table):
                pass
    foot = rows.end(line)
    # Only now, as the triggers would take each row for something that happens.
    await migrations.apply(connection)
    await _number_on(connection, here=used, backed_up=foot.used, source=source)
    return await _take_back(connection, foot.rows, skipped)


async def _copy_in(
    connection: asyncpg.Connection[Any], table: str, columns: list[str], rows: Rows
) -> None:
    try:
        await connection.copy_to_table(
            table, schema_name=SCHEMA, columns=columns, source=rows.of(table), timeout=LONG_S
        )
    except asyncpg.PostgresError as error:
        # Malformed values, broken constraints, unknown columns: what no backup has.
        if (error.sqlstate or "")[:2] in ("22", "23", "42"):
            raise damaged(rows.source, f"table {table}: {str(error).splitlines()[0]}") from error
        raise


async def _number_on(
    connection: asyncpg.Connection[Any],
    *,
    here: dict[str, int],
    backed_up: dict[str, int],
    source: Source,
) -> None:
    """Let ids go on above all that were ever used, as far as anybody knows, and some more."""
    for row in await connection.fetch(queries()["list_identities"]):
        name = f"{row['name']}.{row['column']}"
        column, table = quoted([row["column"]]), quoted([row["name"]])
        most = await connection.fetchval(f"SELECT max({column}) FROM {table}")  # noqa: S608
        gap = _GAP if row["is_wide"] else 0
        last = max(most or 0, backed_up.get(name, 0)) + gap
        last = max(last, here.get(name, 0))
        if last >= (2**62 if row["is_wide"] else 2**31):
            raise damaged(source, f"{name} has been as high as {last}")
        if last:
            await connection.execute("SELECT setval($1::text::regclass, $2)", row["sequence"], last)


async def _take_back(
    connection: asyncpg.Connection[Any], rows: dict[str, int], skipped: list[str]
) -> Restored:
    """End what was under way when the backup was made."""
    closed = await connection.fetch(queries()["close_restored_leases"])
    await connection.execute(queries()["forgive_losses"])
    released = 0
    for row in await connection.fetch(queries()["unswept_leases"]):
        last_id: int | None = 0
        while last_id is not None:
            [given] = await connection.fetch(
                "SELECT * FROM release_lost($1, $2, $3)", row["id"], _RELEASE_AT_ONCE, last_id
            )
            released, last_id = released + given["released"], given["last_id"]
    given_up = await connection.fetch(queries()["give_up_batch_jobs"])
    await connection.execute(queries()["renew_service"])
    return Restored(
        rows=rows,
        launchers=len(closed),
        released=released,
        batch_jobs=len(given_up),
        skipped=skipped,
    )
