"""The tiny parent of every launcher and pilot: it outlives its child, and leaves nothing behind.

    python -I -S guard.py [--exit-zero] [--on-loss COUNT WORD...] -- PROGRAM [ARGUMENT...]

A plain script: it imports nothing of Ensemble and little of Python, so that it stays small and nothing can break
it. `guardlink.py` builds its command line and is the child's end of the pipe.

The guard is a child subreaper (prctl(2)): whatever the child's tasks fork, detach and orphan comes back to it. So
"kill every child, reap, until there is none" ends all of it, also daemons that no marker would find; and since
nobody else reaps them, no number can have passed to a stranger.

The child writes lines: `deadline SECONDS` (CLOCK_BOOTTIME, which also counts while the machine sleeps): until then
it may be trusted to hold its lease; `lease ID`; `bye`: it has put its books in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import sys
import time

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ON_LOSS_TIMEOUT_S = 30.0
#: How long to wait for killed processes to be gone; one that sits in a hung file system does not die.
KILL_TIMEOUT_S = 30.0
#: poll(2) does not count the time the machine sleeps, so the deadline is looked at this often.
LOOK_S = 1.0
PR_SET_CHILD_SUBREAPER = 36
LINE_LIMIT = 4096


class Guard:
    """One child, and all that comes of it."""

    def __init__(self, argv: list[str], on_loss: list[str]) -> None:
        """Prepare; nothing is started yet."""
        self.argv = argv
        self.on_loss = on_loss
        self.child = 0
        self.teller = 0
        self.status: int | None = None
        self.deadline: float | None = None
        self.lease = ""
        self.said_bye = False
        self.is_late = False
        self.killed = 0
        self.stuck: list[int] = []
        self.wakeups, self.wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.lines, self.lines_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.lines, False)
        self.buffer = b""

    def run(self) -> int:
        """Start the child, stay until it and everything below it is gone; return its exit status."""
        self.catch_signals()
        try:
            self.start()
        except OSError as error:
            say(f"cannot run {self.argv[0]}: {error.strerror}")
            return 127 if error.errno == errno.ENOENT else 126
        self.watch()
        self.end_all()
        self.report()
        # While something may still run, nobody may be told that nothing does.
        if self.on_loss and self.lease and not self.said_bye and not self.stuck:
            self.tell_loss()
        return self.status if self.status is not None else 128 + signal.SIGKILL

    def catch_signals(self) -> None:
        """Turn signals into bytes on a pipe; what was ignored from the start (nohup) stays ignored."""
        signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

    def start(self) -> None:
        """Start the child in its own process group, so that a terminal's Ctrl-C reaches it once, from here."""
        environ = {
            **os.environ,
            "ENSEMBLE_GUARD_FD": str(self.lines_end),
            "ENSEMBLE_GUARD_PID": str(os.getpid()),
        }
        os.set_inheritable(self.lines_end, True)
        self.child = spawn(self.argv, environ)
        os.close(self.lines_end)

    def watch(self) -> None:
        """Forward signals and read lines until the child has died or its deadline has passed."""
        poll = select.poll()
        poll.register(self.wakeups, select.POLLIN)
        poll.register(self.lines, select.POLLIN)
        while self.status is None:
            left = self.seconds_left()
            if left is not None and left <= 0:
                self.take_lines()  # it may be this process that stood still
                left = self.seconds_left()
            if left is not None and left <= 0:
                self.is_late = True
                os.kill(self.child, signal.SIGKILL)
                return
            for fd, _ in poll.poll(None if left is None else 1000 * min(left, LOOK_S) + 1):
                if fd == self.wakeups:
                    self.take_signals()
                elif not self.take_lines():
                    poll.unregister(self.lines)
        self.take_lines()

    def seconds_left(self) -> float | None:
        """Return the seconds to the deadline, if there is one, by what the child said last."""
        if self.deadline is None:
            return None
        return self.deadline - time.clock_gettime(time.CLOCK_BOOTTIME)

    def take_signals(self) -> None:
        """Reap, and pass on to the child what it should know."""
        numbers = read(self.wakeups) or b""
        for number in numbers:
            if number != signal.SIGCHLD and self.status is None:
                os.kill(self.child, number)
        self.reap()

    def take_lines(self) -> bool:
        """Take in what the child wrote; False at its end."""
        while data := read(self.lines):
            *lines, self.buffer = (self.buffer + data).split(b"\n")
            self.buffer = self.buffer[-LINE_LIMIT:]
            for line in lines:
                self.take_line(line.decode(errors="replace"))
        return data is None

    def take_line(self, line: str) -> None:
        """Take in one line; one that cannot be understood is not worth dying for."""
        word, _, value = line.partition(" ")
        if word == "deadline":
            with contextlib.suppress(ValueError):
                told = float(value)
                self.deadline = self.deadline if told != told else told  # NaN is no time
        elif word == "lease":
            self.lease = value
        elif word == "bye":
            self.said_bye = True

    def reap(self) -> bool:
        """Reap what has ended; False when there is no child left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.teller:
                self.teller = 0
            if pid == self.child and self.status is None:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code

    def end_all(self) -> None:
        """Kill everything below this process until nothing is left."""
        end = time.monotonic() + KILL_TIMEOUT_S
        seen: set[int] = set()
        poll = select.poll()
        poll.register(self.wakeups, select.POLLIN)
        while self.reap():
            if time.monotonic() > end:
                self.stuck = sorted(pid for pid, _ in list_below())
                break
            # Stopped first: srun has a companion that has Slurm kill the whole step, guards and all, when srun is missed.
            below = list_below()
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid, parent in below:
                    kill(pid, parent, number)
            seen.update(pid for pid, _ in below)
            poll.poll(50)
            read(self.wakeups)
        self.killed = len(seen - {self.child})

    def report(self) -> None:
        """Say in one line what had to be killed; nothing when nothing had."""
        parts = ["its deadline passed, so it was killed"] if self.is_late else []
        if self.killed:
            parts.append(f"killed {self.killed} processes that it left")
        if self.stuck:
            parts.append(
                f"still there after {KILL_TIMEOUT_S:g} s: {' '.join(map(str, self.stuck))}"
            )
        if parts:
            say(f"process {self.child} exited with {self.status}: {'; '.join(parts)}")

    def tell_loss(self) -> None:
        """Run the command that tells the store of the loss, for a bounded time."""
        argv = [word.replace("{lease}", self.lease) for word in self.on_loss]
        end = time.monotonic() + ON_LOSS_TIMEOUT_S
        try:
            self.teller = spawn(argv, dict(os.environ))
        except OSError as error:
            say(f"cannot run {argv[0]}: {error.strerror}")
            return
        poll = select.poll()
        poll.register(self.wakeups, select.POLLIN)
        while self.reap() and self.teller and time.monotonic() < end:
            poll.poll(1000)
            read(self.wakeups)
        if not self.stuck:
            self.end_all()


def spawn(argv: list[str], environ: dict[str, str]) -> int:
    """Start a program in a process group of its own, with signals as they should be; return its number."""
    restored = [signal.SIGPIPE, signal.SIGXFSZ]
    return os.posix_spawnp(argv[0], argv, environ, setpgroup=0, setsigmask=[], setsigdef=restored)


def become_subreaper() -> None:
    """Make the kernel give orphaned descendants to this process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def list_below() -> list[tuple[int, int]]:
    """Return everything below this process as (process, parent), parents first."""
    by_parent: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        parent = parent_of(int(name)) if name.isdigit() else 0
        if parent:
            by_parent.setdefault(parent, []).append(int(name))
    below = [(pid, os.getpid()) for pid in by_parent.get(os.getpid(), [])]
    for pid, _ in below:
        below.extend((child, pid) for child in by_parent.get(pid, []))
    return below


def parent_of(pid: int) -> int:
    """Return the parent of a process; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def kill(pid: int, parent: int, number: int) -> None:
    """Signal a process found below; a grandchild through a handle, as its number may have passed to another."""
    with contextlib.suppress(OSError, AttributeError):
        if parent == os.getpid():
            os.kill(pid, number)
            return
        fd = os.pidfd_open(pid)
        try:
            if parent_of(pid) in (parent, os.getpid()):
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)


def read(fd: int) -> bytes | None:
    """Read what is there: None when nothing is there yet, empty at the end."""
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return None


def say(text: str) -> None:
    """Write one line to standard error, if there is anybody to read it."""
    with contextlib.suppress(OSError):
        os.write(2, f"ensemble guard: {text}\n".encode(errors="replace"))


def parse_argv(words: list[str]) -> tuple[list[str], list[str], bool]:
    """Split the command line into the child's argv, the on-loss argv, and whether to exit 0 always."""
    on_loss: list[str] = []
    is_always_zero = False
    while words and words[0] != "--":
        if words[0] == "--exit-zero":
            is_always_zero, words = True, words[1:]
        elif words[0] == "--on-loss" and len(words) > 1 and words[1].isdigit():
            count = 2 + int(words[1])
            on_loss, words = words[2:count], words[count:]
        else:
            words = []
    if len(words) < 2:
        raise SystemExit(
            "usage: guard.py [--exit-zero] [--on-loss COUNT WORD...] -- PROGRAM [ARGUMENT...]"
        )
    return words[1:], on_loss, is_always_zero


def main() -> int:
    """Guard the program given on the command line."""
    argv, on_loss, is_always_zero = parse_argv(sys.argv[1:])
    become_subreaper()
    status = Guard(argv, on_loss).run()
    return 0 if is_always_zero else status


if __name__ == "__main__":
    sys.exit(main())
