"""As whom PostgreSQL's programs run: they refuse root, and Ensemble is often run by root in containers.

Root runs them in a user namespace in which it is somebody else: files stay root's, under root's
modes. Where namespaces are forbidden, an unprivileged account of the machine runs them, with its
data under `ACCOUNT_ROOT`, since it may not enter root's directories and those are not loosened.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import pwd
import shutil
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ensemble.drivers import process
from ensemble.drivers.pg.binaries import Binaries
from ensemble.errors import ClusterError, LaunchError

ACCOUNT_ROOT = Path("/var/lib/ensemble")
#: Tried in this order. Other programs may run as `nobody`, and could then read the data.
ACCOUNTS = ("postgres", "nobody")
#: uvloop lets a child inherit the other ends of its own pipes: a server that is left behind would
#: hold them, and whoever started it would wait for their end as long as the server lives.
_CLOSE_DESCRIPTORS = """
import contextlib, os, sys
for descriptor in map(int, os.listdir("/proc/self/fd")):
    if descriptor > 2:
        with contextlib.suppress(OSError):
            os.close(descriptor)
os.execvp(sys.argv[1], sys.argv[1:])
"""
_WITHOUT_DESCRIPTORS = (sys.executable, "-ISc", _CLOSE_DESCRIPTORS)
_NAMESPACE = ("unshare", "--user", "--map-user=1000", "--map-group=1000", "--")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """How to run PostgreSQL's programs so that they accept their user."""

    kind: Literal["self", "namespace", "account"]
    #: Of `account` only.
    name: str = ""

    @property
    def prefix(self) -> list[str]:
        """What comes before the program in its argument list."""
        if self.kind == "self":
            return []
        if self.kind == "namespace":
            return list(_NAMESPACE)
        uid, gid = self.ids()
        return ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--"]

    def ids(self) -> tuple[int, int]:
        """Return the uid and gid that own the data directory, as seen from outside."""
        if self.kind != "account":
            return os.geteuid(), os.getegid()
        try:
            entry = pwd.getpwnam(self.name)
        except KeyError:
            raise ClusterError(
                f"this database belongs to the account {self.name}, which this machine lacks"
            ) from None
        return entry.pw_uid, entry.pw_gid

    async def run(
        self,
        *argv: str,
        stdin: bytes | None = None,
        timeout_s: float = 120.0,
        is_daemon: bool = False,
    ) -> process.Completed:
        """Run a program as this account, away from our directory and without libpq's variables.

        Args:
            is_daemon: It leaves a process behind, which must hold none of our descriptors.

        Raises:
            ClusterError: It could not be started or did not end in time.
        """
        try:
            return await process.run(
                [*(_WITHOUT_DESCRIPTORS if is_daemon else ()), *self.prefix, *argv],
                env=environment(),
                cwd="/",
                stdin=stdin,
                timeout_s=timeout_s,
            )
        except LaunchError as error:
            raise ClusterError(str(error)) from error


def environment() -> dict[str, str]:
    """Return our environment without what would redirect PostgreSQL's programs, in English."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "LC_ALL": "C"}


async def choose(folder: Path) -> Account:
    """Return how to run programs that write into *folder*, an existing directory of ours.

    Raises:
        ClusterError: We are root, and nothing works.
    """
    if os.geteuid() != 0:
        return Account(kind="self")
    if await _can_write(Account(kind="namespace"), folder):
        return Account(kind="namespace")
    for name in ACCOUNTS:
        account = Account(kind="account", name=name)
        if await _can_write(account, None):
            return account
    raise ClusterError(
        "PostgreSQL refuses to run as root, and here root may neither make user namespaces "
        f"(unshare --user) nor become {' or '.join(ACCOUNTS)} (setpriv); "
        "run ensemble as an ordinary user"
    )


async def _can_write(account: Account, folder: Path | None) -> bool:
    try:
        test = ["true"] if folder is None else ["test", "-w", str(folder)]
        return (await account.run(*test, timeout_s=10)).code == 0
    except ClusterError:
        return False


def make_home(site: Path, account: Account) -> Path:
    """Make a directory that *account* may read but not write, for this site's data.

    Raises:
        ClusterError: `ACCOUNT_ROOT` cannot be made, or is closed to others already.
    """
    _, gid = account.ids()
    digest = hashlib.sha256(str(site).encode()).hexdigest()[:12]
    _make_account_root()
    home = Path(tempfile.mkdtemp(prefix=f"{digest}-", dir=ACCOUNT_ROOT))
    os.chown(home, 0, gid)
    home.chmod(0o750)
    return home


def _make_account_root() -> None:
    try:
        ACCOUNT_ROOT.mkdir(mode=0o755)
        ACCOUNT_ROOT.chmod(0o755)
    except FileExistsError:
        pass
    except OSError as error:
        raise ClusterError(f"cannot make {ACCOUNT_ROOT}: {error.strerror}") from error
    mode = ACCOUNT_ROOT.stat()
    if mode.st_uid != 0 or stat.S_IMODE(mode.st_mode) & 0o022 or not mode.st_mode & stat.S_IXOTH:
        raise ClusterError(
            f"{ACCOUNT_ROOT} must be root's, writable by root only and open to all (mode 755)"
        )


async def readable(binaries: Binaries, account: Account) -> Binaries:
    """Return *binaries*, or a copy of them under `ACCOUNT_ROOT` when *account* cannot run them."""
    if account.kind != "account":
        return binaries
    # Not by running it: setpriv keeps root's rights until after it has found the program.
    if (await account.run("test", "-x", binaries.program("postgres"), timeout_s=10)).code == 0:
        return binaries
    _make_account_root()
    # Before the bin directory come lib and share: PostgreSQL finds them relative to its programs.
    source = binaries.bin_dir.parent
    digest = hashlib.sha256(str(source).encode()).hexdigest()[:8]
    copy = ACCOUNT_ROOT / f"postgresql-{binaries.version}-{digest}"
    if not copy.is_dir():
        await asyncio.to_thread(_copy_tree, source, copy)
    copied = Binaries(bin_dir=copy / binaries.bin_dir.name, version=binaries.version)
    answer = await account.run(copied.program("postgres"), "--version", timeout_s=10)
    if answer.code != 0:
        raise ClusterError(
            f"{account.name} cannot run {binaries.bin_dir}/postgres, nor its copy in {copy}; "
            "set store.bin_dir to a PostgreSQL that every user may run"
        )
    return copied


def _copy_tree(source: Path, copy: Path) -> None:
    partial = Path(tempfile.mkdtemp(prefix=".copy-", dir=copy.parent))
    try:
        shutil.copytree(source, partial / "tree", symlinks=True)
        (partial / "tree").chmod(0o755)
        (partial / "tree").rename(copy)
    except (OSError, shutil.Error) as error:
        raise ClusterError(f"cannot copy {source} to {copy}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
