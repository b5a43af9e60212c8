"""Starting and stopping the server of one data directory, and who may."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Literal

import msgspec

from ensemble import log
from ensemble.config import StoreSettings
from ensemble.drivers.pg import (
    account as pgaccount,
    addresses as pgaddresses,
    binaries as pgbinaries,
    owner as pgowner,
)
from ensemble.drivers.pg.addresses import LOOPBACK
from ensemble.drivers.pg.binaries import Binaries
from ensemble.drivers.pg.creation import has_tls, issue_certificate
from ensemble.drivers.pg.files import access_rules, complaint, configuration
from ensemble.drivers.pg.layout import Layout, refuse_unquotable
from ensemble.drivers.pg.owner import Owner
from ensemble.errors import ClusterError

#: How long pg_ctl waits for the server to be up, or gone.
WAIT_S = 60
#: A log larger than this is put aside when the server starts.
LOG_LIMIT_BYTES = 20 * 1024 * 1024
#: For so long the processes of a killed server may still be leaving.
_LEAVING_S = 20.0
#: For so long a port that is taken may become free again: launchers that run know no other.
_PORT_S = 10.0
#: What the log says when another process took the port between our look and the server's.
_PORT_TAKEN = ("could not bind", "Address already in use")
_STILL_LEAVING = ("is still in use", "Is another postmaster")

StopMode = Literal["smart", "fast", "immediate"]


async def refuse_other_owner(layout: Layout, owner: Owner | None, *, takeover: bool) -> None:
    """Raise ClusterError when another host, or another container, has the data directory.

    Even *takeover* does not help while a server answers there.
    """
    here = pgowner.here()
    if owner is None or pgowner.whereabouts(owner, here) != "elsewhere":
        return
    place = owner.host if owner.host != here.host else f"{owner.host} (another container of it)"
    answering = await find_answering(owner)
    if answering is not None:
        raise ClusterError(
            f"the database runs on {place} and answers at {answering}:{owner.port}; stop it there "
            "(ensemble db stop)"
        )
    if not takeover:
        raise ClusterError(
            f"the database was started on {place} and never stopped there: two servers would "
            "destroy it; stop it there (ensemble db stop), or if that host is gone for good: "
            "ensemble db start --takeover"
        )
    log.get_logger().warning("cluster.taken_over", data_dir=str(layout.data_dir), host=owner.host)


async def find_answering(owner: Owner) -> str | None:
    """Return an address at which *owner*'s server can be seen from here, None when at none."""
    local = [LOOPBACK] if pgowner.is_same_host(owner, pgowner.here()) else []
    for address in [*local, *owner.addresses]:
        if await pgaddresses.answers(address, owner.port):
            return address
    return None


async def launch(layout: Layout, settings: StoreSettings, wanted_port: int | None) -> Owner:
    """Start a server on a data directory that none has open, and record that it is ours.

    Args:
        wanted_port: Taken when it is free, or soon becomes so.

    Raises:
        ClusterError: It does not start; names its log and what that says.
    """
    binaries = await _choose_binaries(layout, settings)
    is_encrypted = await has_tls(layout, binaries)
    addresses = _choose_addresses(settings, has_tls=is_encrypted)
    _forget_dead(layout)
    _put_log_aside(layout)
    port = await _choose_port((LOOPBACK, *addresses), wanted_port)
    deadline = asyncio.get_running_loop().time() + _LEAVING_S
    while True:
        port = pgaddresses.free_port((LOOPBACK, *addresses), port)
        # Ours from before the first write: were this process to die now, other hosts keep off.
        owner = Owner(
            **msgspec.structs.asdict(pgowner.here()),
            port=port,
            addresses=addresses,
            has_tls=is_encrypted,
            bin_dir=str(binaries.bin_dir),
            version=binaries.version,
        )
        owner = own(layout, owner, os.getpid())
        _configure(layout, owner, settings)
        problem = await _try_start(layout, binaries)
        if problem is None:
            if wanted_port not in (None, port):
                log.get_logger().warning(
                    "cluster.port_changed",
                    was=wanted_port,
                    port=port,
                    hint="launchers and a service of this site that run do not find it: start them again",
                )
            return own(layout, owner, pgowner.postmaster_pid(layout.data_dir))
        if not _may_pass(problem) or asyncio.get_running_loop().time() > deadline:
            own(layout, owner, pgowner.postmaster_pid(layout.data_dir))
            raise ClusterError(f"PostgreSQL does not start: {problem} (see {layout.log_file})")
        await asyncio.sleep(0.25)


async def halt(layout: Layout, settings: StoreSettings, pid: int, mode: StopMode) -> None:
    """Stop the server *pid*; returns when it is gone.

    Raises:
        ClusterError: It does not stop.
    """
    binaries = await _choose_binaries(layout, settings)
    answer = await _pg_ctl(layout, binaries, "stop", "-m", mode)
    if answer is not None:
        raise ClusterError(
            f"PostgreSQL (pid {pid}) does not stop: {answer} (see {layout.log_file}; "
            "a smart stop waits for every client, a fast one does not)"
        )
    # pg_ctl is content when postmaster.pid is gone, which is a moment before the process is.
    try:
        async with asyncio.timeout(WAIT_S):
            while pgowner.start_ticks(pid) is not None:
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise ClusterError(f"PostgreSQL (pid {pid}) has stopped but does not end") from None


async def find_running(layout: Layout, port: int) -> int | None:
    """Return the pid of the server that has the data directory open here, None when none has.

    One that was killed is seen for a moment yet, so only one that answers counts.

    Raises:
        ClusterError: It lives, but does not answer within a minute.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_S
    while (pid := pgowner.postmaster_pid(layout.data_dir)) is not None:
        if await pgaddresses.answers(LOOPBACK, port):
            return pid
        if loop.time() > deadline:
            raise ClusterError(
                f"the server (pid {pid}) does not answer at {LOOPBACK}:{port} (see {layout.log_file})"
            )
        await asyncio.sleep(0.1)
    return None


async def wait_ready(layout: Layout) -> bool:
    """Return when the server accepts connections; False when it is gone instead.

    Raises:
        ClusterError: It does not within a minute.
    """
    try:
        async with asyncio.timeout(WAIT_S):
            while not pgowner.is_ready(layout.data_dir):
                if pgowner.postmaster_pid(layout.data_dir) is None:
                    return False
                await asyncio.sleep(0.05)
            return True
    except TimeoutError:
        raise ClusterError(
            f"the server accepts no connections yet: {complaint(layout.log_file)} "
            f"(see {layout.log_file})"
        ) from None


def own(layout: Layout, owner: Owner, pid: int | None) -> Owner:
    """Record that process *pid* has the data directory, None for nobody."""
    ticks = None if pid is None else pgowner.start_ticks(pid)
    owned = msgspec.structs.replace(owner, pid=pid, start_ticks=ticks)
    layout.set_owner(owned)
    return owned


async def _choose_binaries(layout: Layout, settings: StoreSettings) -> Binaries:
    found = await pgbinaries.find(settings.bin_dir, major=layout.major())
    binaries = await pgaccount.readable(found, layout.account)
    refuse_unquotable(binaries.bin_dir)
    return binaries


def _choose_addresses(settings: StoreSettings, *, has_tls: bool) -> list[str]:
    if not settings.listen:
        return []
    logger = log.get_logger()
    if not has_tls:
        logger.warning(
            "cluster.listens_on_loopback_only",
            reason="this PostgreSQL was built without OpenSSL, so nothing would be encrypted",
        )
        return []
    if not settings.allow:
        logger.warning(
            "cluster.allows_no_network", reason="store.listen is set, but store.allow is empty"
        )
    addresses = pgaddresses.resolve_addresses(settings.listen)
    return [address for address in addresses if address != LOOPBACK]


async def _choose_port(addresses: Sequence[str], wanted: int | None) -> int:
    """Return *wanted*, if need be after a while; any port that is free when it stays taken."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _PORT_S
    while True:
        port = pgaddresses.free_port(addresses, wanted)
        if wanted in (None, port) or loop.time() > deadline:
            return port
        await asyncio.sleep(0.25)


def _configure(layout: Layout, owner: Owner, settings: StoreSettings) -> None:
    """Write what the server reads at its start: settings may have changed since the last one."""
    # A client on this host comes from the address that it connects to.
    own_networks = pgaddresses.check_networks(owner.addresses)
    allowed = pgaddresses.check_networks(settings.allow) if owner.addresses else []
    data_dir = layout.data_dir
    layout.give(
        data_dir / "ensemble.conf",
        configuration(port=owner.port, listen=owner.addresses, has_tls=owner.has_tls),
    )
    layout.give(
        data_dir / "pg_hba.conf",
        access_rules(networks=[*own_networks, *allowed], has_tls=owner.has_tls),
    )
    issue_certificate(layout, ["localhost", LOOPBACK, owner.host, *owner.addresses])


def _forget_dead(layout: Layout) -> None:
    """Remove the lock of a dead server whose pid another process has now.

    PostgreSQL itself would take that process for the server. That none of the dead server's own
    processes is left, it checks in shared memory besides.
    """
    if pgowner.postmaster_pid(layout.data_dir) is None:
        (layout.data_dir / "postmaster.pid").unlink(missing_ok=True)


def _put_log_aside(layout: Layout) -> None:
    log_file = layout.log_file
    if log_file.exists() and log_file.stat().st_size > LOG_LIMIT_BYTES:
        log_file.replace(log_file.with_suffix(".log.1"))
    if not log_file.exists():
        layout.give(log_file, "")


async def _try_start(layout: Layout, binaries: Binaries) -> str | None:
    """Return what the server complained about, None when it runs."""
    before = layout.log_file.stat().st_size
    problem = await _pg_ctl(layout, binaries, "start", "-l", str(layout.log_file))
    said = complaint(layout.log_file, after=before, words=_PORT_TAKEN)
    if problem is not None:
        return said or complaint(layout.log_file, after=before) or problem
    if said:
        # It runs, but not on every address: somebody else's server may answer at ours.
        await _pg_ctl(layout, binaries, "stop", "-m", "fast")
        return said
    return None


async def _pg_ctl(layout: Layout, binaries: Binaries, *arguments: str) -> str | None:
    """Run pg_ctl and wait for its effect; return its complaint, None when it has none.

    It starts the server in a session of its own, with the log file for its output: nothing of ours
    is held open by it.
    """
    answer = await layout.account.run(
        binaries.program("pg_ctl"),
        *arguments,
        f"--pgdata={layout.data_dir}",
        "--silent",
        "--wait",
        f"--timeout={WAIT_S}",
        timeout_s=WAIT_S + 15,
        is_daemon=True,
    )
    if answer.code == 0:
        return None
    return " ".join((answer.stderr or answer.stdout).split()) or f"pg_ctl exit {answer.code}"


def _may_pass(problem: str) -> bool:
    return any(words in problem for words in (*_PORT_TAKEN, *_STILL_LEAVING))
