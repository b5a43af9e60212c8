"""A launcher's or pilot's end of the pipe to its guard, and the guard's command line."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FD_VARIABLE = "ENSEMBLE_GUARD_FD"
PID_VARIABLE = "ENSEMBLE_GUARD_PID"


def guard_argv(
    child_argv: Sequence[str], on_loss: Sequence[str] = (), *, is_exit_zero: bool = False
) -> list[str]:
    """Build the command line that runs a program under a guard.

    Args:
        child_argv: The program; looked up on PATH.
        on_loss: What the guard runs when the program ends without `bye`; `{lease}` in a word becomes the lease's id.
        is_exit_zero: Whether the guard exits 0 whatever happened, as ranks of an MPI launch must.
    """
    guard = Path(__file__).with_name("guard.py")
    argv = [sys.executable, "-I", "-S", str(guard)]
    if is_exit_zero:
        argv.append("--exit-zero")
    if on_loss:
        argv += ["--on-loss", str(len(on_loss)), *on_loss]
    return [*argv, "--", *child_argv]


class GuardLink:
    """Tells the guard what it must know. Writing never blocks, and never fails: a guard may be gone."""

    def __init__(self, fd: int, guard_pid: int) -> None:
        """Take over the pipe's writing end: tasks do not inherit it."""
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)
        self._fd = fd
        self.guard_pid = guard_pid

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> GuardLink | None:
        """Return the link to the guard that started this process; None when it has no guard.

        A task inherits the variables of the launcher's guard, so they count only when that guard is the parent.
        """
        try:
            fd, guard_pid = int(environ[FD_VARIABLE]), int(environ[PID_VARIABLE])
            if os.getppid() != guard_pid or not stat.S_ISFIFO(os.fstat(fd).st_mode):
                return None
        except (KeyError, ValueError, OSError):
            return None
        return cls(fd, guard_pid)

    def deadline(self, boottime_s: float) -> None:
        """Let the guard kill everything at this moment, unless a later one is told before.

        Args:
            boottime_s: Seconds of CLOCK_BOOTTIME, which also counts while the machine sleeps.
        """
        self._write(f"deadline {boottime_s:.3f}")

    def lease(self, id: int) -> None:
        """Tell whose loss the guard must report."""
        self._write(f"lease {id}")

    def bye(self) -> None:
        """Tell that the books are in order: the end that follows is no loss."""
        self._write("bye")

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._fd, f"{line}\n".encode())
