"""The private PostgreSQL server of a site: made, started, stopped, reached.

<site>/db/     0700
  cluster.json   how it was made           server.json   who has the data directory now
  secrets.json   the roles' passwords      pgpass        the user's, for psql
  ca.crt ca.key  the site's authority      server.crt server.key postgres.log pgdata/
  lock           held around start and stop
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from ensemble.config import StoreSettings
from ensemble.drivers.pg import (
    binaries as pgbinaries,
    creation as pgcreation,
    owner as pgowner,
    server as pgserver,
)
from ensemble.drivers.pg.addresses import LOOPBACK
from ensemble.drivers.pg.files import DATABASE, Role
from ensemble.drivers.pg.layout import Layout
from ensemble.drivers.pg.owner import Owner
from ensemble.drivers.pg.server import StopMode
from ensemble.errors import ClusterError

__all__ = ["Cluster", "ClusterStatus", "Connection", "Role", "StopMode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """A site's server as it is now."""

    is_running: bool
    #: Where it was last started; empty when it never was.
    host: str
    port: int | None
    #: Of this host's processes; None when it is not running, or elsewhere.
    pid: int | None
    version: str
    data_dir: Path
    #: What a reader should know about where it runs and as whom; may be empty.
    owner_note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to connect to the database in one role."""

    #: To be tried in this order.
    hosts: tuple[str, ...]
    port: int
    user: str
    password: str = field(repr=False)
    database: str
    #: The authority to pin (verify-ca: login nodes have many names); None when there is no TLS.
    ca_file: Path | None


class Cluster:
    """The database server that belongs to a site directory."""

    def __init__(self, site: Path, settings: StoreSettings) -> None:
        self.folder = site.absolute() / "db"
        self._settings = settings

    @property
    def exists(self) -> bool:
        """Whether it was made; says nothing about whether it runs."""
        return (self.folder / "cluster.json").is_file()

    async def create(self) -> None:
        """Make the database, with its roles and secrets; it is not started.

        Built aside and renamed, so that after an error or a crash there is none rather than half of one.

        Raises:
            ClusterError: There is one already, another process is making it, or it cannot be made.
        """
        self._refuse_existing()
        if not self._settings.allow_network_fs:
            pgowner.refuse_network_filesystem(self.folder.parent)
        binaries = await pgbinaries.find(self._settings.bin_dir)
        async with pgowner.locked(self.folder.parent, timeout_s=0):
            self._refuse_existing()
            await pgcreation.create(self.folder, binaries)

    async def start(self, *, takeover: bool = False) -> ClusterStatus:
        """Start the server unless it runs; returns when it accepts connections.

        It outlives this process and its session.

        Args:
            takeover: The recorded host is gone for good and will never write to the data again.

        Raises:
            ClusterError: Another host has the data directory, or the server does not start.
        """
        layout = Layout.load(self.folder)
        layout.check()
        if not self._settings.allow_network_fs:
            pgowner.refuse_network_filesystem(layout.data_dir)
        async with self._locked():
            owner = layout.owner()
            await pgserver.refuse_other_owner(layout, owner, takeover=takeover)
            if owner is None:
                _refuse_unrecorded(layout)
            pid = None if owner is None else await pgserver.find_running(layout, owner.port)
            if pid is not None and owner is not None:
                if owner.pid != pid:
                    pgserver.own(layout, owner, pid)
                if not await pgserver.wait_ready(layout):
                    pid = None  # it was on its way down
            if pid is None:
                port = None if owner is None else owner.port
                await pgserver.launch(layout, self._settings, port)
                if not await pgserver.wait_ready(layout):
                    raise ClusterError(
                        f"the server ended as soon as it had started (see {layout.log_file})"
                    )
        return await self.status()

    async def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server if it runs; returns when its processes are gone.

        Args:
            mode: `smart` waits for clients to leave, `fast` sends them away, `immediate` is a crash.

        Raises:
            ClusterError: It runs on another host, or does not stop.
        """
        layout = Layout.load(self.folder)
        layout.check()
        async with self._locked():
            owner = layout.owner()
            if owner and pgowner.whereabouts(owner, pgowner.here()) == "elsewhere":
                raise ClusterError(f"the database was started on {owner.host}; stop it there")
            pid = pgowner.postmaster_pid(layout.data_dir)
            if pid is not None:
                await pgserver.halt(layout, self._settings, pid, mode)
            if owner:
                pgserver.own(layout, owner, None)

    async def status(self) -> ClusterStatus:
        """Return whether the server runs, and where."""
        layout = Layout.load(self.folder)
        owner = layout.owner()
        where = pgowner.whereabouts(owner, pgowner.here())
        pid = None if where == "elsewhere" else pgowner.postmaster_pid(layout.data_dir)
        is_running = pid is not None
        if owner and where == "elsewhere":
            is_running = await pgserver.find_answering(owner) is not None
        return ClusterStatus(
            is_running=is_running,
            host=owner.host if owner else "",
            port=owner.port if owner else None,
            pid=pid,
            version=(owner.version if owner else "") or str(layout.major()),
            data_dir=layout.data_dir,
            owner_note=_note(layout, owner, where),
        )

    def connection(self, role: Role) -> Connection:
        """Return how to connect as *role* from this host.

        Raises:
            ClusterError: The server was never started, or cannot be reached from this host.
        """
        layout = Layout.load(self.folder)
        owner = _started(layout)
        is_local = pgowner.is_same_host(owner, pgowner.here())
        hosts = (*((LOOPBACK,) if is_local else ()), *owner.addresses)
        if not hosts:
            raise ClusterError(
                f"the database listens only on {owner.host} itself; set store.listen in "
                "ensemble.toml to an address that this host reaches, and restart it there"
            )
        return Connection(
            hosts=hosts,
            port=owner.port,
            user=str(role),
            password=layout.password(role),
            database=DATABASE,
            ca_file=layout.ca_file if owner.has_tls else None,
        )

    def url(self, role: Role) -> str:
        """Return the address of the database, without the password, for people."""
        there = self.connection(role)
        hosts = ",".join(f"{_bracketed(host)}:{there.port}" for host in there.hosts)
        tls = f"?sslmode=verify-ca&sslrootcert={there.ca_file}" if there.ca_file else ""
        return f"postgresql://{there.user}@{hosts}/{there.database}{tls}"

    def psql(self) -> tuple[list[str], dict[str, str]]:
        """Return the argument list and the environment to run psql with, as `ensemble_user`.

        No password is in either: psql reads it from a 0600 file of the site.
        """
        there = self.connection(Role.USER)
        layout = Layout.load(self.folder)
        beside = Path(_started(layout).bin_dir) / "psql"
        program = str(beside) if os.access(beside, os.X_OK) else shutil.which("psql")
        if program is None:
            raise ClusterError("this PostgreSQL has no psql, and there is none on PATH")
        tls = {"PGSSLMODE": "disable"}
        if there.ca_file:
            tls = {"PGSSLMODE": "verify-ca", "PGSSLROOTCERT": str(there.ca_file)}
        return [program], {
            **{name: value for name, value in os.environ.items() if not name.startswith("PG")},
            **tls,
            "PGHOST": ",".join(there.hosts),
            "PGPORT": str(there.port),
            "PGUSER": there.user,
            "PGDATABASE": there.database,
            "PGPASSFILE": str(layout.pgpass_file),
        }

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.folder):
            raise ClusterError(
                f"{self.folder} exists: this site has a database (ensemble db start)"
            )

    def _locked(self) -> contextlib.AbstractAsyncContextManager[bool]:
        return pgowner.locked(self.folder / "lock", timeout_s=2 * pgserver.WAIT_S)


def _refuse_unrecorded(layout: Layout) -> None:
    pid = pgowner.postmaster_pid(layout.data_dir)
    if pid is not None:
        raise ClusterError(
            f"a server (pid {pid}) has {layout.data_dir} open, but server.json is missing; "
            "stop it first (ensemble db stop)"
        )


def _started(layout: Layout) -> Owner:
    owner = layout.owner()
    if owner is None:
        raise ClusterError("the database was never started (ensemble db start)")
    return owner


def _note(layout: Layout, owner: Owner | None, where: str) -> str:
    notes = []
    if owner and where == "elsewhere":
        notes.append(f"started on {owner.host}")
    if layout.account.kind == "account":
        notes.append(f"run by {layout.account.name}, data in {layout.home}")
    if layout.account.kind == "namespace":
        notes.append("run by root in a user namespace")
    if owner and not owner.has_tls:
        notes.append("no TLS: this PostgreSQL was built without OpenSSL, loopback only")
    return "; ".join(notes)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
