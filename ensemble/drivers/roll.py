"""Which of a launcher's pilots may still run something: for whoever finds the launcher gone.

Two kinds of files beside link.json, in a directory that all nodes of the launcher share. `roll` is the launcher's: a
line for each pilot that it is about to give work, and one for each that it knows to have ended. `gone-…` are empty,
one for each pilot whose guard has ended everything on its node. Who is on the roll, and not known to be gone, may
still run something. The roll alone proves nothing to other hosts, whose view of a shared file system may be old: it is
to be read where it was written, and before that host is booted again.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

_ROLL = "roll"
_GONE = "gone-"
_LINE = re.compile(r"(joined|gone) (\d+-\d+)")
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Roll:
    """The launcher's own file: what is written counts from that moment, also when the launcher is killed then."""

    def __init__(self, directory: Path, marker_prefix: str) -> None:
        """Begin a roll in place of an older one.

        Args:
            directory: Made when it is not there; nobody else may write there from now on.
            marker_prefix: Tells this launcher from all others (`sweep.marker_prefix`).

        Raises:
            OSError: It cannot be written.
        """
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        mode = stat.S_IMODE(directory.stat().st_mode)
        if mode & _OTHERS_MAY_WRITE:
            with contextlib.suppress(OSError):  # somebody else's: then nobody will go by this roll
                directory.chmod(mode & ~_OTHERS_MAY_WRITE)
        remove(directory)
        fd = os.open(
            directory / _ROLL,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC,
            0o600,
        )
        os.fchmod(fd, 0o600)  # a umask may also take the owner's rights
        self._fd = fd  # for as long as the launcher lives
        self.write([marker_prefix])

    def write(self, lines: Sequence[str]) -> None:
        """Add lines. Where that fails, the roll is emptied: then it says nothing, and nobody goes by it.

        Raises:
            OSError: Not even that could be done.
        """
        data = "".join(f"{line}\n" for line in lines).encode()
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:  # the disk is full
            os.ftruncate(self._fd, 0)


def joined(launch: int, rank: int) -> str:
    """Return the line that says of a pilot that it may run something from now on."""
    return f"joined {launch}-{rank}"


def gone(launch: int, rank: int) -> str:
    """Return the line that says of a pilot that nothing of it runs any more."""
    return f"gone {launch}-{rank}"


def leave_gone(directory: Path, marker_prefix: str, launch: int, rank: int) -> None:
    """Leave word that nothing of a pilot runs any more, if the launcher has not left in good order.

    Raises:
        OSError: It cannot be written.
    """
    if (directory / _ROLL).exists():
        with contextlib.suppress(FileExistsError):
            name = f"{_GONE}{marker_prefix}{launch}-{rank}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(directory / name, flags, 0o600))


def count_left(directory: Path, marker_prefix: str) -> int | None:
    """Return how many pilots of a launcher may still run something; None where that cannot be told.

    Nothing is believed that another user may have written.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not _is_private(os.fstat(fd), _OTHERS_MAY_WRITE):
                return None
            text = _read(fd)
            # By listing: a name that was not there a moment ago may go on being missed over NFS.
            names = os.listdir(fd)
        finally:
            os.close(fd)
    except OSError:
        return None
    head, *lines = text.split("\n")
    if head != marker_prefix or not lines or lines.pop():
        return None  # emptied, torn, or another launcher's
    said = [_LINE.fullmatch(line) for line in lines]
    if not all(said):
        return None
    left = {each[2] for each in said if each and each[1] == "joined"}
    left -= {each[2] for each in said if each and each[1] == "gone"}
    own = f"{_GONE}{marker_prefix}"
    return len(left - {name.removeprefix(own) for name in names if name.startswith(own)})


def _read(directory: int) -> str:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(_ROLL, flags, dir_fd=directory)
    with os.fdopen(fd, encoding="ascii", errors="replace", newline="") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or not _is_private(found, 0o077):
            return ""
        return file.read()


def _is_private(found: os.stat_result, forbidden: int) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & forbidden


def remove(directory: Path) -> None:
    """Remove all of these files, as far as there are any."""
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            if name == _ROLL or name.startswith(_GONE):
                with contextlib.suppress(OSError):
                    (directory / name).unlink()
