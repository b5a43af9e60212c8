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
import functools
import os
import select
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ensemble.core.model import LauncherIdentity
from ensemble.drivers import proctree, tasktree
from ensemble.errors import LaunchError

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
#: How soon to look again at what has ended: while it is traced (gdb, strace), it can be reaped only by who does that.
_TRACED_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A command that ran to its end."""

    code: int
    stdout: str
    stderr: str


async def run(  # noqa: PLR0913
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdin: bytes | None = None,
    timeout_s: float = 60.0,
    pass_fds: Sequence[int] = (),
    max_bytes: int | None = None,
    own_session: bool = False,
) -> Completed:
    """Run a command to its end and return what it printed.

    Args:
        env: The whole environment; this process's own when None.
        stdin: What it reads; /dev/null when None.
        timeout_s: Seconds after which it is killed.
        pass_fds: Descriptors that it inherits, besides those three.
        max_bytes: How much it may print to each of its outputs before it is killed.
        own_session: Whether it gets a session of its own; then what it has started is killed with it.

    Raises:
        LaunchError: It could not be started, did not end in time or printed too much (it is dead by then).
    """
    try:
        with tasktree.start(), _file_of(stdin) as input_file:
            process = await asyncio.create_subprocess_exec(
                *argv,
                env=env,
                cwd=cwd,
                stdin=input_file,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=tuple(pass_fds),
                start_new_session=own_session,
            )
            tasktree.roots.add(process.pid)
    except OSError as error:
        raise LaunchError(f"cannot run {argv[0]}: {error.strerror or error}") from error
    kill = functools.partial(_kill, process, is_leader=own_session)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
            out = group.create_task(_read(process.stdout, max_bytes, kill))
            err = group.create_task(_read(process.stderr, max_bytes, kill))
            group.create_task(process.wait())
    except BaseException as error:
        kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise LaunchError(
                f"{argv[0]} did not end and close its output within {timeout_s:g} s"
            ) from error
        raise
    finally:
        tasktree.roots.discard(process.pid)
    if out.result() is None or err.result() is None:
        raise LaunchError(f"{argv[0]} printed more than {max_bytes} bytes, and was killed")
    return Completed(
        code=process.returncode if process.returncode is not None else -1,
        stdout=(out.result() or b"").decode(errors="replace"),
        stderr=(err.result() or b"").decode(errors="replace"),
    )


def _file_of(data: bytes | None) -> BinaryIO:
    """Return a file to read from: no pipe, as who does not read one is no error of ours."""
    if data is None:
        return open(os.devnull, "rb")
    found = open(os.memfd_create("stdin"), "w+b")  # noqa: SIM115 - the caller closes it
    found.write(data)
    found.seek(0)
    return found


async def _read(
    stream: asyncio.StreamReader, max_bytes: int | None, kill: Callable[[], None]
) -> bytes | None:
    """Return a whole output; None if it was too much, which *kill* has ended then."""
    parts: list[bytes] = []
    size = 0
    while part := await stream.read(1 << 16):
        size += len(part)
        if max_bytes is None or size <= max_bytes:
            parts.append(part)
        else:
            parts.clear()
            kill()
    return b"".join(parts) if max_bytes is None or size <= max_bytes else None


def _kill(process: asyncio.subprocess.Process, *, is_leader: bool) -> None:
    """Kill a command, and with it what it has started as long as it has not ended itself."""
    with contextlib.suppress(ProcessLookupError):  # it has ended; what it left holds its output
        if is_leader and process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


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
        #: Who wants to hear of its end, besides those who wait.
        self.watch: Exits | None = None

    def __repr__(self) -> str:
        return f"<Process {self.pid} {self.marker or ''} {self.exit or 'running'}>"

    async def wait(self) -> Exit:
        """Return how it ended. Any number may wait, and a cancelled one disturbs no other."""
        if self.exit is None and self._exited is None:
            loop = asyncio.get_running_loop()
            self._exited = loop.create_future()
            loop.add_reader(self.pidfd, self._on_end)
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

    def _on_end(self) -> None:
        self.collect()
        if self.exit is None:  # it is traced
            loop = asyncio.get_running_loop()
            loop.remove_reader(self.pidfd)
            loop.call_later(_TRACED_S, self._on_end)

    def _close(self, result: Exit) -> None:
        self.exit = result
        tasktree.roots.discard(self.pid)
        if self._exited is not None:
            loop = self._exited.get_loop()
            loop.remove_reader(self.pidfd)
            self._exited.set_result(None)
        if self.watch is not None:
            self.watch.forget(self)
        os.close(self.pidfd)


class Exits:
    """Tells of the ends of processes, for thousands of short ones: what `Process.wait` does, at a tenth of the cost.

    Their pidfds are in an epoll(7) set of its own, so that the event loop has but one to look at.
    """

    def __init__(self) -> None:
        """Watch nothing yet, on the running event loop."""
        self._epoll = select.epoll()
        self._reactions: dict[int, tuple[Process, Callable[[], None]]] = {}
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look)

    def watch(self, process: Process, react: Callable[[], None]) -> None:
        """Call *react* once a process has ended and is reaped."""
        self._reactions[process.pidfd] = (process, react)
        process.watch = self
        self._epoll.register(process.pidfd, select.EPOLLIN)

    def forget(self, process: Process) -> None:
        """Look no more at a process: it was reaped, here or elsewhere."""
        found = self._reactions.pop(process.pidfd, None)
        if found is not None:
            self._epoll.unregister(process.pidfd)
            asyncio.get_running_loop().call_soon(found[1])

    def _look(self) -> None:
        for pidfd, _ in self._epoll.poll(0):
            found = self._reactions.pop(pidfd, None)  # an earlier reaction may have ended it
            if found is not None:
                self._epoll.unregister(pidfd)
                self._react(*found)

    def _react(self, process: Process, react: Callable[[], None]) -> None:
        process.collect()
        if process.exit is None:  # it is traced
            asyncio.get_running_loop().call_later(_TRACED_S, self._react, process, react)
        else:
            react()


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


def has_strays() -> bool:
    """Tell whether anything adopted is there that some ended task may have left; True when one cannot look."""
    try:
        return bool(tasktree.list_strays())
    except OSError:  # file descriptors ran out
        return True


def start_daemon(argv: Sequence[str], log_path: Path) -> int:
    """Start a program that outlives this one: a session of its own, no input, its output appended to a file.

    Returns:
        Its process id; `is_child_running` tells whether it has ended.

    Raises:
        LaunchError: It could not be started.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    try:
        return os.posix_spawn(
            argv[0],
            list(argv),
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log_path), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
    except OSError as error:
        raise LaunchError(f"cannot run {argv[0]}: {error.strerror or error}") from error


def is_child_running(pid: int) -> bool:
    """Tell whether a child that nothing else waits for still runs; reap it if not."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


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


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        raise LaunchError(f"prctl({option}, {value}) failed: {os.strerror(ctypes.get_errno())}")
