"""The only spawner and killer of processes.

How a task's processes are told from all others. They are, first, everything below the process that `start` made.
What a task detaches (a daemon, the ranks of a killed mpiexec) comes back to this process, once that has called
`become_subreaper`, and is then recognised by the marker `ENSEMBLE_TASK_TOKEN` in the environment it was started
with, or by its session. A program that clears its environment, forks twice *and* calls setsid(2) is recognised only
while it hangs on its task; once it has detached, it is the guard that ends it, when the launcher ends.

No signal can hit a stranger that got the number of a process that has gone: signals go through pidfds, opened
first and then compared with what was looked at. `tasktree.py` does the finding and the ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ensemble.core.model import LauncherIdentity
from ensemble.drivers import proctree, tasktree
from ensemble.drivers.proctree import Stat
from ensemble.errors import LaunchError

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A command that ran to its end."""

    code: int
    stdout: str
    stderr: str


async def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdin: bytes | None = None,
    timeout_s: float = 60.0,
) -> Completed:
    """Run a command to its end and return what it printed.

    Args:
        env: The whole environment; this process's own when None.
        stdin: What it reads; /dev/null when None.
        timeout_s: Seconds after which it is killed.

    Raises:
        LaunchError: It could not be started, or did not end in time (it is dead by then).
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=env,
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise LaunchError(f"cannot run {argv[0]}: {error.strerror or error}") from error
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(stdin)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):  # it has ended; what it left holds its output
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise LaunchError(
                f"{argv[0]} did not end and close its output within {timeout_s:g} s"
            ) from error
        raise
    return Completed(
        code=process.returncode if process.returncode is not None else -1,
        stdout=out.decode(errors="replace"),
        stderr=err.decode(errors="replace"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a process ended: by a code or by a signal; both None if somebody else reaped it."""

    code: int | None = None
    signal: int | None = None
    #: The largest resident set of it, or of any child it waited for. Its floor is this process's own size.
    max_rss_kb: int = 0
    #: User and system time of it and of all children it waited for.
    cpu_s: float = 0.0

    @property
    def status(self) -> int | None:
        """The exit status as a shell shows it: 128 + N after signal N."""
        return self.code if self.signal is None else 128 + self.signal


class Process:
    """A process started by `start`, the root of a task's tree."""

    def __init__(self, pid: int, pidfd: int, marker: str | None) -> None:
        """Hold a child of this process; only `start` makes these."""
        self.pid = pid
        self.pidfd = pidfd
        self.marker = marker
        #: Every session seen in the tree; what was orphaned is recognised by them.
        self.sessions = {pid}
        self.exit: Exit | None = None
        self._exited: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Process {self.pid} {self.marker or ''} {self.exit or 'running'}>"

    async def wait(self) -> Exit:
        """Return how it ended. Any number may wait, and a cancelled one disturbs no other."""
        if self.exit is None and self._exited is None:
            loop = asyncio.get_running_loop()
            self._exited = loop.create_future()
            loop.add_reader(self.pidfd, self.collect)
        while self.exit is None and self._exited is not None:
            await asyncio.shield(self._exited)
        assert self.exit is not None
        return self.exit

    def signal(self, number: int) -> None:
        """Send a signal to this one process, not to what is below it; nothing when it has ended."""
        if self.exit is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def collect(self) -> None:
        """Reap it if it has ended: on the event loop only, so that its number stays taken while one looks."""
        if self.exit is not None:
            return
        try:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        except ChildProcessError:
            self._close(Exit())
            return
        if pid:
            code = os.waitstatus_to_exitcode(status)
            cpu_s = usage.ru_utime + usage.ru_stime
            self._close(
                Exit(
                    code=code if code >= 0 else None,
                    signal=-code if code < 0 else None,
                    max_rss_kb=usage.ru_maxrss,
                    cpu_s=cpu_s,
                )
            )

    def _close(self, result: Exit) -> None:
        self.exit = result
        tasktree.roots.discard(self.pid)
        if self._exited is not None:
            loop = self._exited.get_loop()
            loop.remove_reader(self.pidfd)
            self._exited.set_result(None)
        os.close(self.pidfd)


def start(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, output: Path) -> Process:
    """Start a program in a session of its own, stdin from /dev/null, stdout and stderr to a file.

    This blocks for as long as the file system does: call it in a worker thread. (subprocess lets other threads run
    while the child is on its way to execve.)

    Args:
        argv: Passed on as it is; a program without a slash is looked up on the PATH of *env*.
        env: The whole environment; its `ENSEMBLE_TASK_TOKEN` marks the task's processes, and no others: two
            processes started with one marker would be ended as one.
        cwd: The work directory; made if it is missing.
        output: Where the output goes. A file that is there is kept, as `.1`, `.2`, …

    Raises:
        LaunchError: It could not be started; nothing of it runs.
    """
    thread = threading.get_ident()
    tasktree.starting[thread] = tasktree.now_ticks()
    try:
        return _start(argv, env, cwd, output)
    except (OSError, ValueError) as error:
        raise LaunchError(_explain(error, argv)) from error
    finally:
        del tasktree.starting[thread]


async def end_tree(process: Process, *, grace_s: float) -> int:
    """End a task's processes: TERM to all, KILL to those that are left after the grace.

    Returns when nothing of the task is left; one that hangs in a file system cannot be killed, so this may wait as
    long. Cancelling it is safe: what it has signalled stays signalled, and it may be called again.

    Args:
        grace_s: Seconds between TERM and KILL; 0 kills at once.

    Returns:
        How many processes there were.
    """
    with tasktree.Tree(process) as tree:
        await tree.end(grace_s)
        return tree.count


async def sweep(process: Process, *, grace_s: float) -> int:
    """End what a task left behind, after its root has ended; cheap when that is nothing.

    Returns:
        How many processes were left.
    """
    with contextlib.suppress(OSError):  # file descriptors ran out: the tree waits for some
        if not tasktree.list_strays():
            return 0
    with tasktree.Tree(process) as tree:
        await tree.end(grace_s)
        return tree.count


class Swept(NamedTuple):
    """What `sweep_token` did."""

    ended: int
    #: Processes that were killed and have not gone, as they hang in a file system.
    left: tuple[int, ...]


def sweep_token(prefix: str, *, timeout_s: float = 10.0) -> Swept:
    """Kill whatever this user runs on this host for tasks whose marker starts with *prefix*, and what is below it.

    For those who are not its parent: the tasks of a launcher that was lost. It looks at every process and waits, so
    call it in a worker thread.

    Args:
        prefix: What `marker_prefix` returns; its end matters, as 4 is a prefix of 41.
    """
    if not prefix:
        raise ValueError("an empty prefix would match every task")
    end = time.monotonic() + timeout_s
    killed: set[tuple[int, int]] = set()
    while targets := _find_marked(prefix):
        killed |= {(stat.pid, stat.start_ticks) for stat in targets}
        _kill_and_wait(targets, min(0.25, timeout_s))
        if time.monotonic() > end:
            left = tuple(sorted(stat.pid for stat in _find_marked(prefix)))
            return Swept(len(killed) - len(left), left)
    return Swept(len(killed), ())


def marker_prefix(lease_id: int, launcher: LauncherIdentity) -> str:
    """Return how the markers of a launcher's tasks begin: every site counts its leases from 1."""
    return f"{lease_id}-{launcher.pid}-{launcher.start_ticks}."


def become_subreaper() -> None:
    """Make orphaned descendants children of this process, so that it finds and reaps them (prctl(2))."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int, parent_pid: int | None = None) -> None:
    """Have the kernel send this process a signal when its parent ends.

    The kernel means the parent's *thread* that started this process; a guard has only one.

    Args:
        number: The signal.
        parent_pid: Who the parent should be. If it has gone already, the signal is sent at once.
    """
    expected = os.getppid() if parent_pid is None else parent_pid
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != expected:
        os.kill(os.getpid(), number)


def identity(guard_pid: int | None = None) -> LauncherIdentity:
    """Return who this process is, for others on this host to tell whether it still lives."""
    own = proctree.read_stat(os.getpid())
    guard = proctree.read_stat(guard_pid) if guard_pid else None
    return LauncherIdentity(
        host=os.uname().nodename,
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        machine_id=_machine_id(),
        pid_namespace=os.readlink("/proc/self/ns/pid"),
        pid=os.getpid(),
        start_ticks=own.start_ticks if own else 0,
        guard_pid=guard.pid if guard else None,
        guard_start_ticks=guard.start_ticks if guard else None,
    )


def _machine_id() -> str:
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""


def is_alive(pid: int, start_ticks: int) -> bool:
    """Tell whether this very process runs: not a zombie, and not another one with its number."""
    stat = proctree.read_stat(pid)
    return stat is not None and stat.start_ticks == start_ticks and not stat.is_zombie


def tail(path: Path, lines: int, max_bytes: int = 16384) -> str:
    """Return the last lines of an output file, safe to store and to show; "" when it cannot be read.

    Terminal sequences and control characters are left out, and bytes that are no UTF-8 are replaced.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            data = file.read(max_bytes)
    except OSError:
        return ""
    if size > max_bytes:
        data = data.partition(b"\n")[2] or data
    text = printable(data.decode(errors="replace"))
    return "\n".join(text.rstrip("\n").split("\n")[-lines:] if lines else [])


def printable(text: str) -> str:
    """Return what a program printed without terminal sequences and control characters, which no text may hold."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def _start(argv: Sequence[str], env: Mapping[str, str], cwd: Path, output: Path) -> Process:
    if not argv or not argv[0]:
        raise ValueError("the command is empty")
    cwd.mkdir(parents=True, exist_ok=True)
    output_fd = _open_output(output)
    try:
        child = subprocess.Popen(
            list(argv),
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output_fd,
            stderr=output_fd,
            start_new_session=True,
        )
    finally:
        os.close(output_fd)
    # Popen must neither reap it nor warn that nobody did.
    child.returncode = 0
    try:
        pidfd = os.pidfd_open(child.pid)
    except OSError:
        os.killpg(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        raise
    process = Process(child.pid, pidfd, env.get(proctree.TOKEN_VARIABLE))
    tasktree.roots.add(child.pid)
    return process


def _open_output(path: Path) -> int:
    """Make a new file for appending; one of that name is moved to the first free number after it."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        number = 1
        while os.path.lexists(f"{path}.{number}"):
            number += 1
        path.rename(f"{path}.{number}")
    return os.open(path, flags, 0o666)


def _explain(error: OSError | ValueError, argv: Sequence[str]) -> str:
    program = argv[0] if argv else ""
    reason = str(error)
    if isinstance(error, OSError):
        reason = error.strerror or reason
        if error.filename is not None and str(error.filename) != program:
            reason = f"{error.filename}: {reason}"
        elif isinstance(error, FileNotFoundError) and os.path.exists(program):
            reason = "the interpreter that its first line names does not exist"
    text = f"cannot run {program}: {reason}" if program else f"cannot run a task: {reason}"
    return text if text.isprintable() else ascii(text)[1:-1]


def _find_marked(prefix: str) -> list[Stat]:
    """Find this user's living processes with such a marker, and what is below them."""
    marked = [stat for stat in proctree.scan().values() if _is_marked(stat.pid, prefix)]
    found = proctree.walk(marked, proctree.children_reader())
    return [stat for stat in found if not stat.is_zombie and stat.pid != os.getpid()]


def _is_marked(pid: int, prefix: str) -> bool:
    token = proctree.parse_token(proctree.read_environ(pid))
    if token is None or not token.startswith(prefix):
        return False
    return proctree.read_owner(pid) == os.geteuid()


def _kill_and_wait(targets: Sequence[Stat], timeout_s: float) -> None:
    """Kill processes; return when all are gone, or after a while."""
    end = time.monotonic() + timeout_s
    poll = select.poll()
    pidfds: set[int] = set()
    try:
        for stat in targets:
            pidfd = tasktree.open_pidfd(stat)
            if pidfd is None:
                continue
            pidfds.add(pidfd)
            poll.register(pidfd, select.POLLIN)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        waiting = set(pidfds)
        while waiting and (left := end - time.monotonic()) > 0:
            for pidfd, _ in poll.poll(1000 * left):
                poll.unregister(pidfd)
                waiting.discard(pidfd)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        raise LaunchError(f"prctl({option}, {value}) failed: {os.strerror(ctypes.get_errno())}")
