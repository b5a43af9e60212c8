"""A private Slurm of four nodes on this machine: to test with, and to play with.

python tests/slurm/cluster.py    a shell inside it; all is gone when the shell ends
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("n0", "n1", "n2", "n3")
#: Debian keeps the daemons where an ordinary user's PATH does not look.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
#: What slurmctld and the slurmds read; slurm.conf is the clients'.
DAEMONS_CONF = "daemons.conf"
#: A job in one of these is over.
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


def find_missing() -> str | None:
    """Return the name of a program of Slurm's that is not here; None when all are."""
    names = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "sinfo", "scancel")
    return next((name for name in names if shutil.which(name, path=PATH) is None), None)


@dataclass(kw_only=True)
class Slurm:
    """The cluster: it knows its daemons, and nobody else's."""

    #: Short, as the paths of sockets are; everything of the cluster is in it.
    path: Path
    #: What clients need.
    environ: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @classmethod
    def start(cls, template: str) -> Slurm:
        """Start all daemons; return when the nodes are idle, after some 2 s."""
        path = Path(tempfile.mkdtemp(prefix="slurm-"))
        for name in ("state", "log", *(f"spool/{node}" for node in NODES)):
            (path / name).mkdir(parents=True)
        values = {"@DIR@": str(path), "@USER@": getpass.getuser()}
        numbers = free_ports(1 + len(NODES))
        values |= {f"@PORT{n}@": str(number) for n, number in enumerate(numbers[1:])}
        values["@PORT@"] = str(numbers[0])
        for word, value in values.items():
            template = template.replace(word, value)
        (path / "slurm.conf").write_text(template)
        # A step that cannot tell slurmctld of its end sleeps for a minute, and keeps its nodes. Daemons, and they
        # alone, go on trying for as long as a test has slurmctld away; whatever runs in a job is a client, as always.
        prolog = path / "prolog.sh"
        prolog.write_text(f"#!/bin/sh\necho export SLURM_CONF={path}/slurm.conf\n")
        prolog.chmod(0o755)
        (path / DAEMONS_CONF).write_text(f"{template}MessageTimeout=60\nTaskProlog={prolog}\n")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SRUN_"))}
        environ = inherited | {"SLURM_CONF": str(path / "slurm.conf"), "PATH": PATH}
        cluster = cls(path=path, environ=environ)
        try:
            cluster._run_daemon("slurmctld", "-c")
            for node in NODES:
                cluster.start_node(node)
            cluster.wait_until_idle()
        except BaseException:
            cluster.stop()
            logs = [f"{log.name}: {log.read_text()[-2000:]}" for log in path.glob("log/*")]
            shutil.rmtree(path, ignore_errors=True)
            print("\n".join(logs), file=sys.stderr)
            raise
        return cluster

    def _run_daemon(self, name: str, *words: str) -> None:
        # In the foreground, so that it is this process's child and can be ended by its handle.
        program = shutil.which(name, path=PATH)
        assert program is not None
        key = words[-1] if name == "slurmd" else name
        environ = self.environ | {"SLURM_CONF": str(self.path / DAEMONS_CONF)}
        with (self.path / "log" / f"{key}.out").open("ab") as output:
            self.daemons[key] = subprocess.Popen(
                [program, "-D", *words], env=environ, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, cwd=self.path, start_new_session=True,
            )  # fmt: skip

    def start_node(self, name: str) -> None:
        """Switch a node on."""
        self._run_daemon("slurmd", "-N", name)

    def stop_node(self, name: str) -> None:
        """Cut a node's power: its daemon and all that runs there is gone at once."""
        found = {pid for pid in self.processes() if f"SLURMD_NODENAME={name}" in environ_of(pid)}
        found |= {parent for pid in found if is_step_daemon(parent := parent_of(pid))}
        self.daemons[name].kill()
        self.daemons.pop(name).wait()
        # All at once: who is killed first must not be missed by who is killed last. Children first: the kernel
        # wakes what is stopped where nobody is left above it (setpgid(2), orphaned process groups).
        kill(found, signal.SIGSTOP)
        kill(sorted(found, key=lambda pid: depth(pid, found), reverse=True))

    @contextlib.contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Cut a node's power for a while."""
        self.stop_node(name)
        try:
            yield
        finally:
            self.start_node(name)
            with contextlib.suppress(AssertionError):  # it was not missed meanwhile
                self.run("scontrol", "update", f"nodename={name}", "state=resume")

    def stop_controller(self, number: int = signal.SIGTERM) -> None:
        """End slurmctld; by default it saves its state first. Jobs and nodes go on."""
        self.daemons["slurmctld"].send_signal(number)
        self.daemons.pop("slurmctld").wait()

    def start_controller(self) -> None:
        """Start slurmctld with the state that it had; return when it knows its nodes again.

        For the three seconds before that it refuses job steps: "Memory required by task is not available".
        """
        self._run_daemon("slurmctld")
        wait_for(self._has_nodes, within_s=30)

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Stop slurmctld for a while."""
        self.stop_controller()
        try:
            yield
        finally:
            self.start_controller()

    def _has_nodes(self) -> bool:
        done = subprocess.run(
            ["scontrol", "show", "node"], env=self.environ, check=False, capture_output=True
        )
        return done.returncode == 0 and b"SlurmdStartTime=None" not in done.stdout

    def declare_down(self, name: str) -> None:
        """Tell the controller of a node's loss, which it would notice in some minutes."""
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def stop(self) -> None:
        """End every daemon and whatever still runs in a job."""
        if "slurmctld" in self.daemons:
            with contextlib.suppress(AssertionError, subprocess.SubprocessError):
                self.cancel_all()
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
        wait_for(lambda: not kill(set(self.processes())), within_s=10)

    def run(self, *argv: str, timeout_s: float = 60) -> str:
        """Run a client of Slurm's and return what it prints."""
        done = subprocess.run(
            argv, env=self.environ, cwd=self.path, stdin=subprocess.DEVNULL, text=True,
            capture_output=True, timeout=timeout_s,
        )  # fmt: skip
        assert done.returncode == 0, f"{argv}: {done.stderr or done.stdout}"
        return done.stdout

    def batch(self, script: str, *flags: str) -> str:
        """Submit a script (a `#!` line is added where it has none); return the job's id.

        Its output is in `output(job)`.
        """
        text = script if script.startswith("#!") else f"#!/bin/bash\n{script}"
        file = self.path / "script.sh"
        file.write_text(text)
        out = self.run(
            "sbatch", "--parsable", f"--output={self.path}/job-%j.out", *flags, str(file)
        )
        return out.strip().partition(";")[0]

    def output(self, job: str) -> str:
        """Return what a job has printed so far."""
        try:
            return (self.path / f"job-{job}.out").read_text()
        except FileNotFoundError:
            return ""

    def state(self, job: str) -> str:
        """Return the state that Slurm tells for a job."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """Return one field of what `scontrol show job` tells."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait(self, job: str, *, within_s: float = 60) -> str:
        """Wait until a job is over; return the state it ended in."""
        wait_for(lambda: self.state(job) in OVER, within_s=within_s)
        return self.state(job)

    def cancel_all(self) -> None:
        """Cancel every job; return when none is left."""
        for job in self.jobs():
            subprocess.run(["scancel", job], env=self.environ, check=False, capture_output=True)
        wait_for(lambda: not self.jobs(), within_s=30)

    def jobs(self) -> list[str]:
        """Return the jobs that are not over yet."""
        return self.run("squeue", "-h", "-o", "%A").split()

    def wait_until_idle(self) -> None:
        """Return when all four nodes wait for work."""
        wait_for(self._is_idle, within_s=40)

    def _is_idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "debug", "-o", "%T"], env=self.environ, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        return done.stdout.split() == ["idle"] * len(NODES)

    def processes(self) -> Iterator[int]:
        """Find everything that was started by or in this cluster, but the daemons."""
        mine = {f"SLURM_CONF={self.path}/{name}" for name in ("slurm.conf", DAEMONS_CONF)}
        others = {os.getpid(), *(daemon.pid for daemon in self.daemons.values())}
        pids = {int(entry) for entry in os.listdir("/proc") if entry.isdigit()}
        yield from (pid for pid in pids - others if mine.intersection(environ_of(pid)))


def free_ports(count: int) -> list[int]:
    """Return port numbers that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition: Callable[[], object], *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.05)


def depth(pid: int, among: set[int]) -> int:
    """Return how many of these are above a process."""
    count = 0
    while (pid := parent_of(pid)) in among:
        count += 1
    return count


def kill(pids: Collection[int], number: int = signal.SIGKILL) -> bool:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return bool(pids)


def environ_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def parent_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def is_step_daemon(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"slurmstepd:")
    except OSError:
        return False


def play() -> int:
    """Open a shell in a cluster of one's own."""
    if missing := find_missing():
        print(f"no {missing} here: apt-get install slurm-wlm", file=sys.stderr)
        return 1
    print("Starting a private Slurm of four nodes ...")
    cluster = Slurm.start((Path(__file__).parent.parent / "data" / "slurm.conf.in").read_text())
    try:
        print("sinfo, sbatch, srun and the others are yours; leave with exit or Ctrl-D.")
        print(cluster.run("sinfo"))
        beside = f"{Path(sys.executable).parent}{os.pathsep}{cluster.environ['PATH']}"
        shell = os.environ.get("SHELL") or "/bin/bash"
        return subprocess.run(
            [shell], env=cluster.environ | {"PATH": beside}, check=False
        ).returncode
    finally:
        cluster.stop()
        shutil.rmtree(cluster.path, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(play())
