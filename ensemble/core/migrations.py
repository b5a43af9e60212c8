"""Bring a database to this program's schema: numbered files, forward only, each on record.

One session lock for the whole run, taken by polling: a session that blocks inside
pg_advisory_lock() holds a snapshot that another's CREATE INDEX CONCURRENTLY would wait for.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from importlib import resources
from typing import Any

import asyncpg

from ensemble.core.database import SCHEMA, Address, connect, read_sql, wrapped
from ensemble.core.states import MOVES
from ensemble.errors import SchemaError

_LOCK = int.from_bytes(hashlib.sha256(b"ensemble.migrate").digest()[:8], "big", signed=True)
_FUNCTIONS = "functions.sql"
_LEDGER = f"""
    CREATE SCHEMA IF NOT EXISTS {SCHEMA};
    CREATE TABLE IF NOT EXISTS {SCHEMA}.schema_version (
      version int PRIMARY KEY, name text NOT NULL, sha256 text NOT NULL,
      applied_at timestamptz NOT NULL DEFAULT now());
    CREATE TABLE IF NOT EXISTS {SCHEMA}.schema_script (
      name text PRIMARY KEY, sha256 text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now());
"""


def files() -> dict[int, str]:
    """Return the names of the migration files by number."""
    folder = resources.files("ensemble.core").joinpath("sql").joinpath("migrations")
    names = (entry.name for entry in folder.iterdir())
    return {
        int(m[1]): name for name in sorted(names) if (m := re.match(r"(\d{4})_\w+\.sql$", name))
    }


def latest() -> int:
    """Return the schema version that this program is made for."""
    return max(files())


async def migrate(address: Address) -> list[str]:
    """Apply what is missing and return its names; changes nothing when all is there.

    Raises:
        SchemaError: The database is newer than this program, or an applied file was edited.
        StoreUnavailableError: It cannot be reached.
    """
    connection = await connect(address, name="ensemble migrate")
    try:
        async with wrapped():
            await lock(connection)
            return await apply(connection)
    finally:
        connection.terminate()


async def lock(connection: asyncpg.Connection[Any]) -> None:
    """Wait until nobody else changes the schema, and keep others from it while this session lasts."""
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):
        await asyncio.sleep(0.2)


async def apply(connection: asyncpg.Connection[Any], *, up_to: int | None = None) -> list[str]:
    """Apply what is missing over *connection*, whose session holds the lock; return its names.

    Args:
        up_to: The schema version to stop at, without functions and triggers; None is this program's schema.
    """
    await connection.execute("SET lock_timeout = '5s'; SET statement_timeout = 0")
    # Asked first: CREATE ... IF NOT EXISTS prints a notice for each one that is there.
    if not await connection.fetchval("SELECT to_regclass($1)::text", f"{SCHEMA}.schema_script"):
        await connection.execute(_LEDGER)
    rows = await connection.fetch("SELECT version, sha256 FROM schema_version")
    applied = {row["version"]: row["sha256"] for row in rows}
    check_version(max(applied, default=None), may_be_older=True)
    done: list[str] = []
    for version, name in files().items():
        text = read_sql(f"migrations/{name}")
        digest = hashlib.sha256(text.encode()).hexdigest()
        if up_to is not None and version > up_to:
            return done
        if version in applied:
            if applied[version] != digest:
                raise SchemaError(f"migration {name} was applied to this database in another form")
            continue
        async with connection.transaction():
            await connection.execute(text)
            await connection.execute(
                "INSERT INTO schema_version (version, name, sha256) VALUES ($1, $2, $3)",
                version,
                name,
                digest,
            )
        done.append(name)
    return done if up_to is not None else done + await _apply_functions(connection)


def functions_digest() -> str:
    """Return the checksum of the functions that this program calls."""
    return hashlib.sha256((read_sql(_FUNCTIONS) + repr(_moves())).encode()).hexdigest()


def _moves() -> list[tuple[str, str, str]]:
    return [(a, b, str(actor)) for a, row in MOVES.items() for b, actor in row.items()]


async def _apply_functions(connection: asyncpg.Connection[Any]) -> list[str]:
    name, digest = _FUNCTIONS, functions_digest()
    if (
        await connection.fetchval("SELECT sha256 FROM schema_script WHERE name = $1", name)
        == digest
    ):
        return []
    async with connection.transaction():
        await connection.execute(read_sql(name))
        await connection.execute("DELETE FROM move")
        await connection.executemany("INSERT INTO move VALUES ($1, $2, $3)", _moves())
        await connection.execute(
            "INSERT INTO schema_script (name, sha256) VALUES ($1, $2) "
            "ON CONFLICT (name) DO UPDATE SET sha256 = excluded.sha256, applied_at = now()",
            name,
            digest,
        )
    return [name]


def check_functions(digest: str | None) -> None:
    """Raise SchemaError unless the database's functions, of this checksum, are this program's."""
    if digest != functions_digest():
        raise SchemaError(
            "the database's functions are those of another release of Ensemble: "
            "ensemble db migrate (launchers of the other release should have ended)"
        )


def check_version(found: int | None, *, may_be_older: bool = False) -> None:
    """Raise SchemaError unless a database of version *found* suits this program."""
    wanted = latest()
    if found is not None and found > wanted:
        raise SchemaError(
            f"the database has schema {found}, newer than this program's {wanted}: "
            "use the newer Ensemble that made it"
        )
    if not may_be_older and (found is None or found < wanted):
        raise SchemaError(
            f"the database has schema {found or 'none'}, this program needs {wanted}: "
            "ensemble db migrate"
        )
