"""The making of a site's database: built aside, then renamed into place."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from ensemble import log
from ensemble.drivers.pg import account as pgaccount
from ensemble.drivers.pg.account import Account
from ensemble.drivers.pg.binaries import Binaries
from ensemble.drivers.pg.files import (
    DATABASE,
    LOCAL_CONFIGURATION,
    Role,
    access_rules,
    configuration,
    setup_statements,
    write_private,
)
from ensemble.drivers.pg.layout import Layout, refuse_unquotable
from ensemble.drivers.pg.passwords import make_password
from ensemble.drivers.process import Completed
from ensemble.errors import ClusterError

_SUPERUSER = "postgres"
_BUILDING = "db.tmp-"


async def create(folder: Path, binaries: Binaries) -> None:
    """Make the database in *folder*, which does not exist; after an error it still does not.

    The caller holds the lock of the directory above.
    """
    _sweep(folder.parent)
    refuse_unquotable(folder)
    building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=folder.parent))
    try:
        layout = await _lay_out(building, folder.parent, binaries)
        await _initialize(layout, await pgaccount.readable(binaries, layout.account))
        _publish(building, folder)
    except BaseException:
        _discard(building)
        raise


def issue_certificate(layout: Layout, names: Iterable[str]) -> None:
    """Give the server a certificate for *names*, unless it has one that will do."""
    # Here: cryptography takes 30 ms to import, and most commands only connect.
    from ensemble.drivers.pg import certificates

    now = datetime.fromtimestamp(time.time(), UTC)
    wanted = list(names)
    path = layout.home / "server.crt"
    if path.exists() and certificates.covers(path.read_bytes(), wanted, now=now):
        return
    authority = certificates.KeyPair(
        certificate=layout.ca_file.read_bytes(), key=(layout.folder / "ca.key").read_bytes()
    )
    pair = certificates.issue_server(authority, wanted, now=now)
    layout.give(layout.home / "server.key", pair.key)
    layout.give(path, pair.certificate)


async def has_tls(layout: Layout, binaries: Binaries) -> bool:
    """Return whether this PostgreSQL was built with OpenSSL."""
    # An empty configuration: one that says `ssl = on` cannot even be read without OpenSSL.
    arguments = ("-D", str(layout.data_dir), "-c", "config_file=/dev/null", "-C", "ssl_library")
    answer = await layout.account.run(binaries.program("postgres"), *arguments)
    _demand(answer, "postgres -C ssl_library")
    return bool(answer.stdout.strip())


async def _lay_out(building: Path, site: Path, binaries: Binaries) -> Layout:
    """Decide as whom the server runs, and record at once what would have to be cleaned up."""
    account = await pgaccount.choose(building)
    home = building
    if account.kind == "account":
        home = pgaccount.make_home(site, account)
        log.get_logger().warning(
            "cluster.placed_elsewhere",
            home=str(home),
            account=account.name,
            reason="PostgreSQL refuses root, and user namespaces are forbidden here",
        )
    # Paths below the site are found from the site, so that it may be moved; hence no home then.
    layout = Layout(folder=building, home=home, account=account)
    layout.save(binaries.version)
    return layout


async def _initialize(layout: Layout, binaries: Binaries) -> None:
    _make_directory(layout.data_dir, layout.account)
    await _initdb(layout, binaries)
    _write_secrets(layout)
    layout.give(layout.log_file, "")
    layout.give(layout.data_dir / "local.conf", LOCAL_CONFIGURATION)
    layout.give(layout.data_dir / "ensemble.conf", configuration(port=1, listen=(), has_tls=False))
    layout.give(layout.data_dir / "pg_hba.conf", access_rules(networks=(), has_tls=True))
    main = layout.data_dir / "postgresql.conf"
    layout.give(main, main.read_text("utf-8") + "\ninclude 'ensemble.conf'\n")
    await _make_roles(layout, binaries)


async def _initdb(layout: Layout, binaries: Binaries) -> None:
    answer = await layout.account.run(
        binaries.program("initdb"),
        f"--pgdata={layout.data_dir}",
        f"--username={_SUPERUSER}",
        # Nobody at all until our own rules are written, which name our roles only.
        "--auth-local=reject",
        "--auth-host=reject",
        "--encoding=UTF8",
        "--no-locale",
        "--data-checksums",
        "--no-instructions",
        timeout_s=300,
    )
    _demand(answer, "initdb")


async def _make_roles(layout: Layout, binaries: Binaries) -> None:
    """Make roles and database in single-user mode: no server, no superuser with a password."""
    passwords = {role: layout.password(role) for role in Role}
    # One error ends it; and the log of that error does not show the statement.
    options = ("-c", "exit_on_error=on", "-c", "log_min_error_statement=panic")
    answer = await layout.account.run(
        binaries.program("postgres"),
        "--single",
        "-D",
        str(layout.data_dir),
        *options,
        "template1",
        stdin=setup_statements(passwords).encode(),
    )
    _demand(answer, "postgres --single")


def _write_secrets(layout: Layout) -> None:
    from ensemble.drivers.pg import certificates

    passwords = {role: make_password() for role in Role}
    layout.save_passwords(passwords)
    user = f"{DATABASE}:{Role.USER}:{passwords[Role.USER]}"
    write_private(layout.pgpass_file, f"*:*:{user}\n")
    now = datetime.fromtimestamp(time.time(), UTC)
    authority = certificates.make_authority(layout.folder.parent.name, now=now)
    write_private(layout.folder / "ca.key", authority.key)
    write_private(layout.ca_file, authority.certificate)
    write_private(layout.folder / "lock", "")
    issue_certificate(layout, ["localhost", "127.0.0.1"])


def _make_directory(path: Path, account: Account) -> None:
    path.mkdir(mode=0o700)
    if account.kind == "account":
        os.chown(path, *account.ids())


def _publish(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ClusterError(f"{folder} exists already; nothing was made") from error
        raise ClusterError(f"cannot make {folder}: {error.strerror}") from error


def _sweep(site: Path) -> None:
    """Remove what a killed creation left behind; whoever holds the lock is alone here."""
    for leftover in site.glob(f"{_BUILDING}*"):
        _discard(leftover)


def _discard(building: Path) -> None:
    try:
        home = Layout.load(building).home
    except ClusterError:
        home = building
    if home.parent == pgaccount.ACCOUNT_ROOT:
        shutil.rmtree(home, ignore_errors=True)
    shutil.rmtree(building, ignore_errors=True)


def _demand(answer: Completed, what: str) -> None:
    if answer.code == 0:
        return
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "FATAL" in line or "error:" in line] or lines
    raise ClusterError(f"{what} failed: {telling[-1] if telling else f'exit {answer.code}'}")
