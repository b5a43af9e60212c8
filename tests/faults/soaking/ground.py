"""The soak's own site, its database, and every process that belongs to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from bench.memory import role_of
from ensemble.config import StoreSettings
from ensemble.drivers import proctree
from ensemble.drivers.pg.layout import Layout
from ensemble.drivers.postgres import Cluster
from ensemble.errors import ClusterError
from ensemble.site import Site, create

LEASE_S = 8.0
#: Faults show within seconds what takes an hour with the defaults.
SETTINGS = f"""
name = "soak"
[store]
{{store}}
connect_timeout_s = 3
command_timeout_s = 4
[scheduler]
kind = "local"
max_running = 2
[launcher]
lease_ttl_s = {LEASE_S}
heartbeat_s = 0.7
grace_s = 0.7
margin_s = 3
min_useful_s = 0
idle_timeout_s = 2
poll_s = 3
reconcile_s = 10
signal_hold_s = 0.5
pilot_join_s = 20
pilot_patience_s = 4
[mpi]
command = "{{mpi}}"
[service]
period_s = 2
submissions_per_minute = 60
lost_looks = 2
lost_s = 1
retry_s = 1
capacity_retry_s = 1
max_failures = 1000
[queue.soak]
job_mode = "serial"
max_queued = 2
min_minutes = 1
max_minutes = 1
slots_per_node = 4
"""


@dataclass(frozen=True)
class Process:
    """A process of the site, at one moment; number and start name it for good."""

    pid: int
    ppid: int
    start_ticks: int
    #: What it is: launcher, guard of launcher, pilot, mpirun, task, …
    role: str
    words: str

    def send(self, number: int) -> bool:
        """Signal it; tell whether it was still there."""
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(self.pid)
            try:
                stat = proctree.read_stat(self.pid)
                if stat is not None and stat.start_ticks == self.start_ticks:
                    signal.pidfd_send_signal(pidfd, number)
                    return True
            finally:
                os.close(pidfd)
        return False


class Ground:
    """A site in a scratch directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.site = Site.find(str(path))
        assert self.site.cluster is not None
        self.cluster: Cluster = self.site.cluster
        #: Whether the directory stays, for somebody to look at.
        self.is_kept = False

    def processes(self) -> list[Process]:
        """Find everything of this site that lives: by its command line, or the environment of a task."""
        living = (each for each in proctree.scan().values() if not each.is_zombie)
        found = (self._look(each) for each in living if each.pid != os.getpid())
        return [each for each in found if each is not None]

    def _look(self, stat: proctree.Stat) -> Process | None:
        path = os.fsencode(self.path)
        try:
            words = Path(f"/proc/{stat.pid}/cmdline").read_bytes()
        except OSError:
            return None
        environ = proctree.read_environ(stat.pid)
        if path not in words and b"ENSEMBLE_SITE=" + path + b"\0" not in environ + b"\0":
            return None
        text = os.fsdecode(words).replace("\0", " ").strip()
        role = "task" if proctree.parse_token(environ) else _role(stat.pid, text)
        return Process(stat.pid, stat.ppid, stat.start_ticks, role, text)

    def workers(self) -> list[Process]:
        """Find what is to be gone at the end: all but the database."""
        return [each for each in self.processes() if each.role != "postgres"]

    @property
    def postmaster(self) -> int | None:
        """The database's first process, if it runs."""
        with contextlib.suppress(OSError, ValueError):
            file = Layout.load(self.cluster.folder).data_dir / "postmaster.pid"
            return int(file.read_text().split()[0])
        return None

    async def restore(self) -> None:
        """Have the database up, whatever was done to it."""
        end = (
            time.monotonic() + 180
        )  # a start waits for a minute, in vain where a stop is under way
        while True:
            try:
                await self.cluster.start()
            except ClusterError:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.5)
            else:
                return

    async def clear(self) -> None:
        """End everything without ceremony."""
        while left := self.workers():
            for each in left:
                each.send(signal.SIGKILL)
            await asyncio.sleep(0.05)
        with contextlib.suppress(ClusterError):
            await self.cluster.stop("immediate")


def _role(pid: int, text: str) -> str:
    name = Path(text.split(" ", 1)[0]).name
    if name.startswith("postgres"):
        return "postgres"
    if "localbatch.py" in text:
        return "batch job"
    if " serve" in text:
        return "service"
    if name.startswith(("mpiexec", "mpirun", "hydra", "orte", "prte")):
        return "mpirun"
    return role_of(pid) or "other"


@contextlib.asynccontextmanager
async def soak_ground() -> AsyncIterator[Ground]:
    """Make a site with a running database; afterwards everything of it has ended.

    Its directory is removed, but for one that is to be looked at (`is_kept`).
    """
    path = Path(tempfile.mkdtemp(prefix="ensemble-soak-"))
    ground = None
    try:
        if os.access("/dev/shm", os.W_OK | os.X_OK):
            (path / "data").symlink_to(tempfile.mkdtemp(prefix=f"{path.name}-", dir="/dev/shm"))
        await create(path, scheduler="local")
        store = Site.find(str(path)).settings.store
        (path / "ensemble.toml").write_text(_settings(store), "utf-8")
        ground = Ground(path)
        yield ground
    finally:
        if ground is not None:
            await ground.clear()
        if ground is None or not ground.is_kept:
            shutil.rmtree((path / "data").resolve(), ignore_errors=True)
            shutil.rmtree(path, ignore_errors=True)


def _settings(store: StoreSettings) -> str:
    bin_dir = f'bin_dir = "{store.bin_dir}"' if store.bin_dir else ""
    beside = Path(sys.executable).with_name("mpiexec")
    mpi = str(beside) if beside.exists() else shutil.which("mpiexec")
    return SETTINGS.format(store=bin_dir, mpi=mpi)
