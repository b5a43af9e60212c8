"""Connections to PostgreSQL: how they are made, what their errors mean, which queries there are.

asyncpg 0.32 or later: earlier releases hang on a black-holed network in spite of their time-outs.
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, TypeVar

import asyncpg
import msgspec

from ensemble.errors import (
    AllocationError,
    EnsembleError,
    IllegalMoveError,
    LeaseLostError,
    OutcomeUnknownError,
    StoreFullError,
    StoreUnavailableError,
    UsageError,
)

SCHEMA = "ensemble"
#: What the driver raises of its own. InternalClientError is neither of its two families: a statement
#: that is sent while the server's farewell is being read ends so.
DRIVER_ERRORS = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
T = TypeVar("T")

#: How long a statement may take that has very many tasks to look at or to change, in seconds.
PATIENCE_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a database is and as whom to connect; never printed with its password."""

    #: `postgresql://…`; the fields below override what it says. None means the fields say all.
    dsn: str | None = None
    host: str | None = None
    port: int | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    database: str | None = None
    #: The certificate authority to accept; None leaves TLS to the dsn.
    ca_file: str | None = None
    connect_timeout_s: float = 10.0
    command_timeout_s: float = 30.0
    #: What to type when it cannot be reached.
    hint: str = ""


# ---------------------------------------------------------------------------- connecting


async def connect(address: Address, *, name: str) -> asyncpg.Connection[Any]:
    """Open one connection.

    Args:
        name: Shown in pg_stat_activity.

    Raises:
        StoreUnavailableError: Nobody answers, or whoever does refuses.
    """
    try:
        connection = await asyncpg.connect(
            address.dsn,
            host=address.host,
            port=address.port,
            user=address.user,
            password=address.password,
            database=address.database,
            ssl=_ssl(address),
            timeout=address.connect_timeout_s,
            command_timeout=address.command_timeout_s,
            server_settings=_server_settings(name),
        )
        _keep_alive(connection)
        await connection.set_type_codec(
            "jsonb",
            schema="pg_catalog",
            encoder=lambda value: b"\x01" + msgspec.json.encode(value),
            decoder=lambda data: msgspec.json.decode(bytes(data)[1:]),
            format="binary",  # COPY needs binary
        )
    except (*DRIVER_ERRORS, ValueError) as error:
        raise unavailable(error, address) from error
    return connection


async def open_pool(address: Address, *, name: str, max_size: int) -> asyncpg.Pool[Any]:
    """Make a pool that opens connections when they are needed and none before."""

    async def dial(*_args: Any, **_options: Any) -> asyncpg.Connection[Any]:
        return await connect(address, name=name)

    async def keep(_connection: Any) -> None:
        """Spare the round trip that would reset a session: nobody here changes one."""

    # min_size 0: no storm of reconnections in the background after a restart of the server.
    return await asyncpg.create_pool(
        min_size=0,
        max_size=max_size,
        connect=dial,
        reset=keep,
        max_inactive_connection_lifetime=120,
    )


def _server_settings(name: str) -> dict[str, str]:
    return {
        "application_name": name,
        "search_path": SCHEMA,
        "timezone": "UTC",
        "jit": "off",
        # Whatever is a site's default: functions.sql needs a snapshot for each statement.
        "default_transaction_isolation": "read committed",
        "statement_timeout": "60000",
        "lock_timeout": "10000",
        "idle_in_transaction_session_timeout": "30000",
        # A client that vanished must not keep its locks.
        "tcp_keepalives_idle": "30",
        "tcp_keepalives_interval": "10",
        "tcp_keepalives_count": "3",
        "client_connection_check_interval": "10000",
    }


def _ssl(address: Address) -> ssl.SSLContext | None:
    if address.ca_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=address.ca_file)
    context.check_hostname = False  # verify-ca: login nodes have many names, the site's CA has one
    return context


def _keep_alive(connection: asyncpg.Connection[Any]) -> None:
    # asyncpg sets no keepalive (its issue 606) and has no public way to its socket.
    transport = getattr(connection, "_transport", None)
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)


# ---------------------------------------------------------------------------- errors

#: The statement was certainly not applied: it may be repeated at once.
NOT_APPLIED = frozenset({"40001", "40P01", "55P03", "57P03", "53300", "25006"})
#: The connection or the server went away: whether the statement was applied is not known.
UNKNOWN = frozenset({"57P01", "57P02", "57P04", "57P05", "40003", "57014", "25P03", "25P04"})
#: Another release's schema was brought in meanwhile: a function, table or column is missing, or a
#: plan is older than it. A launcher must not end its tasks for that.
OTHER_SCHEMA = frozenset({"42883", "42P01", "42703", "0A000", "3F000", "26000"})
#: A right is missing: somebody may give it back.
FORBIDDEN = frozenset({"42501"})
#: Codes that our own functions raise.
OWN: dict[str, type[EnsembleError]] = {
    "EN001": LeaseLostError,
    "EN002": IllegalMoveError,
    "EN003": AllocationError,
    "EN004": IllegalMoveError,
}


def unavailable(error: Exception, address: Address) -> EnsembleError:
    """Say in one line that the database at *address* cannot be reached, and what to type."""
    where = f"{address.host or address.dsn or 'localhost'}" + (
        f":{address.port}" if address.port else ""
    )
    where = re.sub(r"//([^:/@]*):.*@", r"//\1@", where)
    where = re.sub(r"(password=)[^&\s]*", r"\1***", where)
    detail = str(error) or type(error).__name__
    hint = f" ({address.hint})" if address.hint else ""
    return StoreUnavailableError(f"cannot reach the database at {where}: {detail}{hint}")


def wrap(error: Exception) -> Exception:
    """Return what *error*, from the driver, means to us; anything unknown as it is."""
    if isinstance(error, asyncpg.PostgresError):
        return _wrap_server_error(error, error.sqlstate or "")
    if isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError):
        return UsageError(f"the database cannot take a value: {error}")  # the driver never sent it
    if isinstance(error, ConnectionRefusedError):
        return StoreUnavailableError(f"the database does not answer: {error}")
    if isinstance(error, DRIVER_ERRORS):
        return OutcomeUnknownError(f"lost the database: {str(error) or type(error).__name__}")
    return error


def _wrap_server_error(error: Exception, code: str) -> Exception:
    line = (str(error).splitlines() or [type(error).__name__])[0]  # without HINT and DETAIL
    if code in OWN:
        return OWN[code](line)
    # 53100 is a full disk; class 58, I/O errors, is how one under the WAL ends a session.
    if code == "53100" or code.startswith("58"):
        return StoreFullError(f"the database cannot write: {line}")
    if code.startswith("22"):
        return UsageError(f"the database cannot take a value: {line}")
    # 53: connections, memory; XX: the server's own fault.
    if code in NOT_APPLIED | OTHER_SCHEMA | FORBIDDEN or code[:2] in ("53", "XX"):
        return StoreUnavailableError(f"the database refused for now: {line}")
    if code in UNKNOWN or code.startswith("08"):
        return OutcomeUnknownError(f"the database went away: {line}")
    return error


@asynccontextmanager
async def wrapped() -> AsyncIterator[None]:
    """Turn the driver's errors into ours, at the edge, once."""
    try:
        yield
    except EnsembleError:
        raise
    except DRIVER_ERRORS as error:
        better = wrap(error)
        if better is error:
            raise
        raise better from error


def storable(value: T) -> T:
    """Return a value that PostgreSQL's text can hold: what a program or a scheduler printed may be anything."""
    if isinstance(value, str):
        clean = value.encode("utf-8", "replace").decode()
        return type(value)(clean.replace("\0", "\N{REPLACEMENT CHARACTER}"))
    return value


async def fetch_patiently(
    pool: asyncpg.Pool[Any], statement: str, *values: Any, timeout_s: float
) -> list[asyncpg.Record]:
    """Return the rows of one statement that may take longer than others may."""
    async with pool.acquire() as connection, connection.transaction():
        # With a statement of its own: one that runs keeps the limit that it began with.
        await connection.execute(f"SET LOCAL statement_timeout = {math.ceil(1000 * timeout_s)}")
        return await connection.fetch(statement, *values, timeout=timeout_s)


async def again_on_deadlock(call: Callable[[], Awaitable[T]], *, tries: int = 5) -> T:
    """Repeat *call* when the server ended it to break a deadlock: it was certainly not applied."""
    for left in reversed(range(tries)):
        try:
            return await call()
        except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
            if not left:
                raise
            await asyncio.sleep(0.01 * (tries - left))
    raise AssertionError("unreachable")


# ---------------------------------------------------------------------------- queries

_HEAD = re.compile(r"^-- (\w+)\(([^)]*)\)$")


@cache
def queries() -> dict[str, str]:
    """Return the named statements of sql/queries.sql."""
    return {name: text for name, (_, text) in parse_queries(read_sql("queries.sql")).items()}


def parse_queries(text: str) -> dict[str, tuple[list[str], str]]:
    """Split *text* at its `-- name(parameters)` lines; return parameters and statement by name."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    here: list[str] = []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            here = []
            found[head[1]] = ([p.strip() for p in head[2].split(",") if p.strip()], here)
        elif not line.startswith("-- "):
            here.append(line)
    return {name: (params, "\n".join(body).strip()) for name, (params, body) in found.items()}


def read_sql(name: str) -> str:
    """Return the text of a file of the sql/ directory."""
    return resources.files("ensemble.core").joinpath("sql").joinpath(name).read_text("utf-8")
