"""A site: the directory that holds everything of one user's work, and the way to its database."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemble import config
from ensemble.config import SITE_FILE, Settings, StoreSettings
from ensemble.core.database import Address
from ensemble.core.migrations import migrate
from ensemble.drivers import template
from ensemble.drivers.batch import find_scheduler_names
from ensemble.drivers.pg import owner as pgowner
from ensemble.drivers.pg.files import Role
from ensemble.drivers.postgres import Cluster
from ensemble.errors import ConfigError

FOLDERS = ("templates", "qsubmit", "data", "log")
OWNER = Role.OWNER
USER = Role.USER
TASK = Role.TASK
#: How long to wait for another `init` of the same site.
_PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A site's directory and its settings."""

    path: Path
    settings: Settings

    @classmethod
    def find(cls, named: str | None = None, *, environ: Mapping[str, str] | None = None) -> Site:
        """Find a site as the command line does: *named*, $ENSEMBLE_SITE, or a parent directory.

        Raises:
            NotFoundError: There is none.
            ConfigError: Its settings are wrong.
        """
        env = os.environ if environ is None else environ
        path = config.find_site(Path.cwd(), named=named, environ=env)
        return cls(path=path, settings=config.load(path, environ=env))

    @property
    def cluster(self) -> Cluster | None:
        """The site's own PostgreSQL; None when the database is an external one."""
        if self.settings.store.dsn is not None:
            return None
        return Cluster(self.path, self.settings.store)

    def address(self, role: Role = USER) -> Address:
        """Return where the database is, for one of the roles; an external one has only its own."""
        store = self.settings.store
        if store.dsn is not None:
            return _external(store)
        link = Cluster(self.path, store).connection(role)
        return Address(
            host=link.hosts[0],
            port=link.port,
            user=link.user,
            password=link.password,
            database=link.database,
            ca_file=None if link.ca_file is None else str(link.ca_file),
            connect_timeout_s=store.connect_timeout_s,
            command_timeout_s=store.command_timeout_s,
            hint=f"start it: ensemble --site {self.path} db start",
        )


def _external(store: StoreSettings) -> Address:
    return Address(
        dsn=store.dsn,
        connect_timeout_s=store.connect_timeout_s,
        command_timeout_s=store.command_timeout_s,
        hint="check [store] dsn in ensemble.toml, and that the server runs",
    )


def program(site: str, *words: str) -> list[str]:
    """Return the command line of another run of this very program."""
    # -P: a file of the current directory must not stand in for a module.
    return [sys.executable, "-P", "-m", "ensemble", "--site", site, *words]


async def create(
    path: Path,
    *,
    dsn: str | None = None,
    listen: tuple[str, ...] = (),
    bin_dir: str | None = None,
    allow_network_fs: bool = False,
    scheduler: str | None = None,
) -> bool:
    """Make a site in *path*, with a database of its own or in the external one at *dsn*.

    May be repeated: a site that is there is left as it is, and one that was interrupted is
    finished. Of several at the same moment one makes it and the others find it made.

    Args:
        scheduler: The batch scheduler it is for; None is the one whose commands are on PATH, else `local`.

    Returns:
        Whether it was made now.

    Raises:
        ConfigError: *dsn* holds a password, or *path* cannot be a directory.
        ClusterError: The database could not be made or started.
    """
    if dsn is not None:
        config.check_dsn(dsn, source="--dsn")
    try:
        for name in FOLDERS:
            (path / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make a site in {path}: {error.strerror}") from error
    # Not the site itself: the database's creation locks that.
    async with pgowner.locked(path / "log", timeout_s=_PATIENCE_S):
        if (path / SITE_FILE).exists():
            return False
        settings = StoreSettings(
            dsn=dsn, listen=list(listen), bin_dir=bin_dir, allow_network_fs=allow_network_fs
        )
        found = [scheduler] if scheduler else find_scheduler_names(os.environ) or ["local"]
        chosen = template.choose(os.environ, found, os.uname().nodename)
        template.install(chosen, path)
        await _prepare_database(path, settings)
        _write_settings(path, settings, found[0], chosen)
        return True


async def _prepare_database(path: Path, store: StoreSettings) -> None:
    if store.dsn is not None:
        await migrate(_external(store))
        return
    cluster = Cluster(path, store)
    if not cluster.exists:
        await cluster.create()
    await cluster.start()
    try:
        await migrate(Site(path=path, settings=Settings(store=store)).address(OWNER))
    except BaseException:
        await cluster.stop()  # without a settings file nobody would find it
        raise


def _write_settings(path: Path, store: StoreSettings, scheduler: str, chosen: str) -> None:
    lines = [
        "# Settings of this site; every key, its default and its unit: docs/config.md.",
        f"name = {_quote(path.name.encode(errors='replace').decode())}",
        "",
        "[store]",
    ]
    lines.append(f"dsn = {_quote(store.dsn)}" if store.dsn else "# dsn = 'postgresql://…'")
    if store.bin_dir:
        lines.append(f"bin_dir = {_quote(store.bin_dir)}")
    if store.allow_network_fs:
        lines.append("allow_network_fs = true")
    if store.listen:
        lines.append(f"listen = [{', '.join(map(_quote, store.listen))}]")
    lines += [
        "",
        "[scheduler]",
        f"kind = {_quote(scheduler)}",
        f"# templates/job.sh was copied from Ensemble's own {chosen}: look through it before the first job.",
        "",
        "# What `ensemble serve` may submit: a table for each queue (docs/submitting-jobs.md, docs/sites.md).",
        "# [queue.debug]",
        "# project = 'MyProject'",
        "# max_queued = 1",
        "# max_nodes = 2",
        "# max_minutes = 60",
    ]
    temporary = path / f".{SITE_FILE}.{os.getpid()}"
    temporary.write_text("\n".join(lines) + "\n", "utf-8")
    temporary.rename(path / SITE_FILE)


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
