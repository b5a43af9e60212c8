"""Which host may open a site's data directory.

PostgreSQL's own lock, postmaster.pid, holds a process id and means nothing on another host or in
another container; two servers on one data directory destroy it. So the server's whereabouts are
written next to the data, and another host keeps off unless it is told to take over.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import msgspec

from ensemble import log
from ensemble.errors import ClusterError

#: File systems that other hosts write to as well, as /proc/self/mountinfo names them.
# fmt: off
NETWORK_FILESYSTEMS = frozenset((
    "afs", "acfs", "beegfs", "beegfs_nodev", "ceph", "cifs", "coda", "dvs", "fhgfs",
    "fuse.ceph", "fuse.ceph-fuse", "fuse.gcsfuse", "fuse.glusterfs", "fuse.gpfs",
    "fuse.mfs", "fuse.moosefs", "fuse.orangefs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs",
    "gfs", "gfs2", "glusterfs", "gpfs", "lustre", "mmfs", "ncpfs", "nfs", "nfs4", "ocfs2",
    "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "wekafs",
))
# fmt: on
#: What flock says where it cannot work; EBADF is NFS's answer for a directory.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """A place where process ids mean something: a pid namespace of one boot of one host."""

    host: str
    machine_id: str
    boot_id: str
    pid_namespace: str


class Owner(Here, frozen=True, kw_only=True):
    """Who has the data directory: the contents of server.json."""

    port: int
    #: The postmaster, or whoever is just starting it; None after an orderly stop.
    pid: int | None = None
    #: When that process began, in clock ticks since boot: a pid alone may have been used again.
    start_ticks: int | None = None
    #: Where it listens besides 127.0.0.1.
    addresses: list[str] = msgspec.field(default_factory=list)
    has_tls: bool = True
    bin_dir: str = ""
    version: str = ""


def here() -> Here:
    """Return where this process is."""
    return Here(
        host=socket.gethostname(),
        machine_id=_read("/etc/machine-id"),
        boot_id=_read("/proc/sys/kernel/random/boot_id"),
        pid_namespace=_pid_namespace(),
    )


def whereabouts(owner: Owner | None, now_here: Here) -> Literal["nobody", "here", "elsewhere"]:
    """Return whether *owner* holds the data directory, and if so whether we can see its process."""
    if owner is None or owner.pid is None:
        return "nobody"
    if owner.boot_id == now_here.boot_id:
        # Another container of this host: its processes are out of our sight.
        return "here" if owner.pid_namespace == now_here.pid_namespace else "elsewhere"
    return "nobody" if is_same_host(owner, now_here) else "elsewhere"


def is_same_host(one: Here, other: Here) -> bool:
    """Return whether two records are of one machine, perhaps of two boots of it.

    Names alone do not say so: every other container is called localhost. Where there is no machine id, as
    in slim containers, two boots of one machine cannot be told from two machines.
    """
    if (one.host, one.machine_id) != (other.host, other.machine_id):
        return False
    return bool(one.machine_id) or (bool(one.boot_id) and one.boot_id == other.boot_id)


def start_ticks(pid: int) -> int | None:
    """Return when a process began, in clock ticks since boot; None when it is not running."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    # proc(5): state is field 3, starttime field 22; the name before them may hold blanks.
    if not fields or fields[0] in "ZX":
        return None
    return int(fields[19])


def postmaster_pid(data_dir: Path) -> int | None:
    """Return the pid of the server that has *data_dir* open on this host, None when none has.

    A server's working directory is its data directory, which tells it from a process that was
    given a dead server's pid.
    """
    line = _read(data_dir / "postmaster.pid").partition("\n")[0]
    if not line.isdigit() or start_ticks(int(line)) is None:
        return None
    try:
        is_ours = Path(f"/proc/{line}/cwd").samefile(data_dir)
    except PermissionError:
        is_ours = _read(f"/proc/{line}/comm") in ("postgres", "postmaster")
    except OSError:
        is_ours = False
    return int(line) if is_ours else None


def is_ready(data_dir: Path) -> bool:
    """Return whether the server that has *data_dir* open says that it accepts connections."""
    # Line 8 of postmaster.pid (src/include/utils/pidfile.h) is what pg_ctl --wait looks at too.
    lines = _read(data_dir / "postmaster.pid").splitlines()
    return len(lines) >= 8 and lines[7].strip() == "ready"


def network_filesystem(path: Path, mountinfo: str) -> str | None:
    """Return the type of the network file system *path* is on, None when it is on a local one.

    Args:
        path: Absolute, without symbolic links.
        mountinfo: The text of /proc/self/mountinfo, see proc(5).
    """
    kind, longest = "", -1
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        place = Path(_unescape(before.split()[4]))
        # Of two mounts in one place the later one is seen.
        if path.is_relative_to(place) and len(place.parts) >= longest:
            kind, longest = after.split()[0], len(place.parts)
    return kind if kind in NETWORK_FILESYSTEMS else None


def refuse_network_filesystem(path: Path) -> None:
    """Raise ClusterError when *path* is on a network file system."""
    kind = network_filesystem(path.resolve(), _read("/proc/self/mountinfo"))
    if kind is not None:
        raise ClusterError(
            f"{path} is on a network file system ({kind}), where a database may be slow or lost; "
            "put the site on a local disk, name a server with store.dsn, "
            "or set store.allow_network_fs = true"
        )


@contextlib.asynccontextmanager
async def locked(path: Path, *, timeout_s: float) -> AsyncIterator[bool]:
    """Hold an exclusive lock on a file or directory; yields False where there are no locks.

    Raises:
        ClusterError: Another process held it for *timeout_s*.
    """
    descriptor = _open_lock(path)
    try:
        yield await _lock(descriptor, path, timeout_s)
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except IsADirectoryError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ClusterError(f"cannot open {path}: {error.strerror}") from error


async def _lock(descriptor: int, path: Path, timeout_s: float) -> bool:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if loop.time() >= deadline:
                raise ClusterError(
                    f"another ensemble process is creating, starting or stopping the database "
                    f"(it holds {path}); try again when it is done"
                ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise ClusterError(f"cannot lock {path}: {error.strerror}") from error
            log.get_logger().warning("lock.unsupported", path=str(path))
            return False
        await asyncio.sleep(0.05)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)
