"""What /proc says about processes: pure parsers, and readers that bear with processes that vanish.

Sources: proc(5) and its parts proc_pid_stat(5), proc_pid_environ(5), proc_tid_children(5).
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

#: The environment variable that marks every process of a task, as `<lease>-<pid>-<ticks>.<task>.<attempt>`:
#: the lease, the launcher (its number and when it started), the task and which try it is.
TOKEN_VARIABLE = "ENSEMBLE_TASK_TOKEN"  # noqa: S105 - not a secret

#: Tells the children of a process.
Children = Callable[[int], list[int]]

_CHUNK = 1 << 16
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Stat:
    """One process, at one moment."""

    pid: int
    state: str
    ppid: int
    pgid: int
    sid: int
    threads: int
    #: Clock ticks after boot; with the pid, it names a process for good.
    start_ticks: int

    @property
    def is_zombie(self) -> bool:
        """Whether it has ended and waits to be reaped.

        A program whose first thread has ended while others run shows the same letter, but counts them.
        """
        return self.state in "ZXx" and self.threads <= 1

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it (SIGSTOP, SIGTSTP, …)."""
        return self.state == "T"


def parse_stat(data: bytes) -> Stat:
    """Parse /proc/PID/stat; the program's name in it may hold spaces, parentheses and newlines.

    Raises:
        ValueError: This is not such a line.
    """
    pid, _, rest = data.partition(b" (")
    words = rest.rpartition(b")")[2].split()
    if len(words) < 20:
        raise ValueError(f"not a line of /proc/PID/stat: {data[:80]!r}")
    return Stat(
        pid=int(pid),
        state=words[0].decode("ascii"),
        ppid=int(words[1]),
        pgid=int(words[2]),
        sid=int(words[3]),
        threads=int(words[17]),
        start_ticks=int(words[19]),
    )


def parse_token(environ: bytes) -> str | None:
    """Find the task's marker in the contents of /proc/PID/environ; None where it has none."""
    name = f"\0{TOKEN_VARIABLE}=".encode()
    _, found, rest = (b"\0" + environ).partition(name)
    return rest.partition(b"\0")[0].decode(errors="replace") if found else None


def read_stat(pid: int) -> Stat | None:
    """Look at one process; None when there is no such process."""
    data = _read(f"/proc/{pid}/stat")
    return parse_stat(data) if data else None


def read_environ(pid: int) -> bytes:
    """Return the environment a process was started with.

    Empty when it is gone, may not be read, has none, or is just replacing itself (execve(2)).
    """
    return _read(f"/proc/{pid}/environ")


def read_owner(pid: int) -> int | None:
    """Return the user that a process runs as (its effective uid); None when it is gone."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def scan() -> dict[int, Stat]:
    """Look at every process that can be seen; slow where there are thousands (about 10 µs each)."""
    stats = (read_stat(pid) for pid in _list_numbers("/proc"))
    return {stat.pid: stat for stat in stats if stat is not None}


def children_reader() -> Children:
    """Return the cheapest way to tell children from parents here.

    Where the kernel lists children by itself (CONFIG_PROC_CHILDREN), each call reads that list; elsewhere all
    calls answer from one scan made now, so take a new reader for each look.
    """
    if _has_children_files():
        return list_children
    by_parent: dict[int, list[int]] = {}
    for stat in scan().values():
        by_parent.setdefault(stat.ppid, []).append(stat.pid)
    return lambda pid: by_parent.get(pid, [])


def list_children(pid: int) -> list[int]:
    """Read the children of all threads of a process from /proc/PID/task/*/children."""
    tids = _list_numbers(f"/proc/{pid}/task")
    return [int(word) for tid in tids for word in _read(f"/proc/{pid}/task/{tid}/children").split()]


def list_adopted() -> list[int]:
    """Read what this process may have adopted as a subreaper, with what its first thread started.

    The kernel gives orphans to the first thread of the reaper (find_new_reaper in kernel/exit.c), so one
    file tells; it would be one for each thread otherwise.
    """
    me = os.getpid()
    if not _has_children_files():
        return children_reader()(me)
    data = b""
    # To the end: what is read at once stops short of a page, as no number is cut in two.
    while chunk := os.pread(_own_children(me), _PAGE, len(data)):
        data += chunk
    return [int(word) for word in data.split()]


@functools.cache
def _own_children(me: int) -> int:
    """Keep that file open: it is read after each task."""
    return os.open(f"/proc/{me}/task/{me}/children", os.O_RDONLY | os.O_CLOEXEC)


def walk(tops: list[Stat], children: Children) -> Iterator[Stat]:
    """Yield processes and everything below them, parents first.

    A process whose parent ends meanwhile moves to another place in the tree and may be missed: look again then.
    """
    queue = list(tops)
    met = {stat.pid for stat in tops}
    for stat in queue:
        yield stat
        for pid in children(stat.pid):
            child = read_stat(pid)
            if pid not in met and child is not None and child.ppid == stat.pid:
                met.add(pid)
                queue.append(child)


@functools.cache
def _has_children_files() -> bool:
    return os.path.exists(f"/proc/self/task/{threading.get_native_id()}/children")


def is_shortage(error: OSError) -> bool:
    """Tell whether the system was out of something, so that nothing is known of what was asked for."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def _list_numbers(path: str) -> list[int]:
    try:
        return [int(name) for name in os.listdir(path) if name.isdigit()]
    except OSError as error:
        if is_shortage(error):
            raise
        return []


def _read(path: str) -> bytes:
    """Read a file of /proc whole; nothing when the process is gone or belongs to somebody else.

    Raises:
        OSError: It could not be looked at for want of file descriptors or memory; it may be there.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if is_shortage(error):
            raise
        return b""
    try:
        data = chunk = os.read(fd, _CHUNK)
        while chunk:
            chunk = os.read(fd, _CHUNK)
            data += chunk
    except OSError as error:
        if is_shortage(error):
            raise
        return b""
    finally:
        os.close(fd)
    return data
