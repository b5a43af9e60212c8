r"""A backup: the rows of all tables at one moment, as text; and the way back.

    -- Ensemble backup 1
    -- {"ensemble": "0.1.0", "schema": 2, …}
    COPY workflow (id, name) FROM stdin;
    …rows as PostgreSQL's COPY writes them: one a line, and none of them is `\.`
    \.
    …
    -- {"rows": {"workflow": 1, …}, "used": {"task.id": 12, …}}

There is no schema in it. A restore makes the one that the backup had from the numbered migrations, fills
it, and applies the later ones; so a backup suits any version of PostgreSQL, needs none of its programs, and
outlives this release. A restore is one transaction: after an error the database is as it was.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import datetime
from graphlib import TopologicalSorter
from typing import Any, Protocol, TypeVar

import asyncpg
import msgspec

from ensemble.core import migrations
from ensemble.core.database import Address, connect, queries, read_sql, wrapped
from ensemble.errors import EnsembleError, SchemaError

T = TypeVar("T")

_TITLE = b"-- Ensemble backup "
_FORMAT = 1
COPY = re.compile(rb"COPY ([a-z0-9_]+) \(([a-z0-9_]+(?:, [a-z0-9_]+)*)\) FROM stdin;\n")
_END = b"\\.\n"
#: How much is read, and sent, at a time.
_BLOCK_BYTES = 1 << 18
_LINE_BYTES = 1 << 16
#: A statement of a backup may take as long as it needs.
LONG_S = 7 * 86400.0
#: The session of a backup and of a restore: no limits, and values in one form whatever the server's settings.
PLAIN = (
    "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET datestyle = 'ISO, YMD';"
    " SET intervalstyle = 'postgres'; SET extra_float_digits = 1"
)
#: Transaction ids mean nothing to another server: restored events lie before any that a watcher waits for.
_REPLACED = {("event", "xid"): "'0'::xid8"}


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup says about itself."""

    ensemble: str
    postgresql: str
    schema: int
    #: Checksum by number.
    migrations: dict[int, str]
    at: datetime


class Foot(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a whole backup."""

    #: By table.
    rows: dict[str, int]
    #: The highest number that was ever given out, by `table.column`.
    used: dict[str, int]


class Source(Protocol):
    """A backup that is open for reading."""

    #: The name of the file, for errors.
    name: str

    def readline(self, limit: int, /) -> bytes:
        """Return the next line, or its first *limit* bytes; nothing at the end."""
        ...

    def readlines(self, hint: int, /) -> list[bytes]:
        """Return the next lines, of about *hint* bytes together."""
        ...


# ---------------------------------------------------------------------------- backing up


async def back_up(address: Address, write: Callable[[bytes], object], *, release: str) -> Foot:
    """Write everything that the database holds at one moment; nobody who works with it is held up.

    Args:
        address: As whoever may read all of it.
        write: Is given the backup, piece by piece.
        release: Of this program, for the record.

    Raises:
        SchemaError: The database is newer than this program, or has no schema.
        StoreUnavailableError: It cannot be reached.
    """
    connection = await connect(address, name="ensemble backup")
    try:
        async with wrapped():
            return await _back_up(connection, write, release)
    finally:
        connection.terminate()


async def _back_up(
    connection: asyncpg.Connection[Any], write: Callable[[bytes], object], release: str
) -> Foot:
    if not await connection.fetchval("SELECT to_regclass('schema_version')::text"):
        raise SchemaError("the database has no schema yet: there is nothing to back up")
    await connection.execute(PLAIN)
    tables = await list_tables(connection)
    # Not a `transaction()`: after an error of *write* a roll-back would wait for rows that nobody reads. It ends
    # with its connection.
    await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    # Before the snapshot, which the next statement takes: a migration comes before all of it, or after.
    await connection.execute(f"LOCK TABLE {quoted(tables)} IN ACCESS SHARE MODE")
    tables = await list_tables(connection)
    head = await _head(connection, release)
    migrations.check_version(head.schema, may_be_older=True)
    write(_TITLE + b"%d\n" % _FORMAT + _as_comment(head))
    rows = {}
    for table, columns in tables.items():
        write(f"COPY {table} ({', '.join(columns)}) FROM stdin;\n".encode())
        rows[table] = await _copy_out(connection, table, columns, write)
        write(_END)
    # Sequences know no snapshots: read last, they are past everything above.
    foot = Foot(rows=rows, used=await highest_used(connection))
    write(_as_comment(foot))
    return foot


async def _copy_out(
    connection: asyncpg.Connection[Any],
    table: str,
    columns: list[str],
    write: Callable[[bytes], object],
) -> int:
    wanted = [_REPLACED.get((table, column), f'"{column}"') for column in columns]
    count = 0

    async def take(block: bytes) -> None:
        nonlocal count
        count += block.count(b"\n")
        write(block)

    await connection.copy_from_query(
        f"SELECT {', '.join(wanted)} FROM {quoted([table])}",  # noqa: S608 - names of the catalog, checked there
        output=take,
        timeout=LONG_S,
    )
    return count


async def list_tables(connection: asyncpg.Connection[Any]) -> dict[str, list[str]]:
    """Return the columns of each table, in an order in which foreign keys can be satisfied."""
    found = {row["name"]: row for row in await connection.fetch(queries()["list_tables"])}
    order = TopologicalSorter({name: row["parents"] for name, row in found.items()}).static_order()
    return {name: found[name]["columns"] for name in order if name in found}


async def _head(connection: asyncpg.Connection[Any], release: str) -> Head:
    applied = await connection.fetch(queries()["select_migrations"])
    return Head(
        ensemble=release,
        postgresql=await connection.fetchval("SHOW server_version"),
        schema=max((row["version"] for row in applied), default=0),
        migrations={row["version"]: row["sha256"] for row in applied},
        at=await connection.fetchval("SELECT now()"),
    )


async def highest_used(connection: asyncpg.Connection[Any]) -> dict[str, int]:
    """Return the highest number that each column ever gave out, by `table.column`."""
    used = {}
    for row in await connection.fetch(queries()["list_identities"]):
        used[f"{row['name']}.{row['column']}"] = await connection.fetchval(
            f"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {row['sequence']}"  # noqa: S608
        )
    return used


def quoted(names: Iterable[str]) -> str:
    """Return names as a statement lists them."""
    return ", ".join(f'"{name}"' for name in names)


def _as_comment(value: Head | Foot) -> bytes:
    return b"-- " + msgspec.json.encode(value) + b"\n"


# ---------------------------------------------------------------------------- reading


def read_head(source: Source) -> Head:
    """Return what a backup says about itself, which leaves *source* at its rows.

    Raises:
        EnsembleError: It is no backup, or a damaged one.
        SchemaError: A newer Ensemble made it, or one with other migrations.
    """
    title = source.readline(_LINE_BYTES)
    if not title.startswith(_TITLE):
        raise EnsembleError(
            f"{source.name} is not a backup of Ensemble (ensemble db backup {source.name} makes one)"
        )
    if title != _TITLE + b"%d\n" % _FORMAT:
        raise SchemaError(
            f"{source.name} was made by a newer Ensemble, in a form that this one cannot read: use that one"
        )
    head = _from_comment(source.readline(_LINE_BYTES), Head, source)
    if head.schema > migrations.latest():
        raise SchemaError(
            f"{source.name} has schema {head.schema}, newer than this program's {migrations.latest()}: "
            f"use Ensemble {head.ensemble}, which made it, or a later one"
        )
    files = migrations.files()
    for version, digest in head.migrations.items():
        text = read_sql(f"migrations/{files[version]}") if version in files else ""
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise SchemaError(
                f"{source.name} was made with another form of migration {version}: "
                f"use Ensemble {head.ensemble}, which made it"
            )
    if sorted(head.migrations) != list(range(1, head.schema + 1)) or head.schema < 1:
        raise damaged(source, "its list of migrations has gaps")
    return head


async def verify(source: Source) -> Head:
    """Read a backup to its end, which needs no database; return what it says about itself.

    Raises:
        EnsembleError: It is no backup, or damaged, or cut off.
        SchemaError: A newer Ensemble made it, or one with other migrations.
    """
    head = read_head(source)
    rows = Rows(source)
    while copy := COPY.fullmatch(line := rows.line()):
        async for _ in rows.of(copy[1].decode()):
            pass
    rows.end(line)
    return head


class Rows:
    """The rows of a backup, table by table, and how many there were."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.counts: dict[str, int] = {}
        self._ahead: list[bytes] = []

    def line(self) -> bytes:
        """Return the line after a table's rows."""
        return self._ahead.pop(0) if self._ahead else self.source.readline(_LINE_BYTES)

    async def of(self, table: str) -> AsyncIterator[bytes]:
        """Yield the rows of a table, many at a time."""
        self.counts[table] = 0
        while True:
            block = self._ahead or self.source.readlines(_BLOCK_BYTES)
            self._ahead = []
            if not block:
                raise damaged(self.source, f"it ends in table {table}")
            if _END not in block:
                self.counts[table] += len(block)
                yield b"".join(block)
                continue
            end = block.index(_END)
            self._ahead = block[end + 1 :]
            self.counts[table] += end
            yield b"".join(block[:end])
            return

    def end(self, line: bytes) -> Foot:
        """Return what the last line says, which is true."""
        foot = _from_comment(line, Foot, self.source)
        if self.line() or self.counts != foot.rows:
            raise damaged(self.source, "it does not hold the rows that it says it holds")
        return foot


def _from_comment(line: bytes, kind: type[T], source: Source) -> T:
    """Return what a line about the backup says."""
    try:
        return msgspec.json.decode(line.removeprefix(b"-- "), type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise damaged(source, "a line about it is not what it should be") from error


def damaged(source: Source, what: str) -> EnsembleError:
    """Return the error for a backup that is not what it was."""
    return EnsembleError(f"{source.name} is damaged or cut off ({what}): use another backup")
