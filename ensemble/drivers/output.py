"""A task's output: the file it goes to, its end, and what of it is fit to be shown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
from pathlib import Path

#: How much of an output is kept where its end is kept.
TAIL_BYTES = 16384
#: Reads in one go: a program that prints without end must not hold the event loop.
_READS = 16


class Tail:
    """Keeps the end of an output that goes to no file."""

    def __init__(self) -> None:
        """Make a pipe, and read it on the running event loop.

        Raises:
            OSError: There is no descriptor left.
        """
        self._loop = asyncio.get_running_loop()
        self._fd, self._write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        self._kept = bytearray()
        #: Whether there was more than is kept.
        self.has_more = False
        self._loop.add_reader(self._fd, self._read)

    def open(self) -> int:
        """Hand over the descriptor to write to, once; any thread may ask."""
        write_fd, self._write_fd = self._write_fd, -1
        return write_fd

    def close(self) -> str:
        """Read what is left and return the end of it, fit to be stored."""
        if self._write_fd >= 0:  # no program was ever given it
            os.close(self.open())
        if self._fd >= 0:
            self._read()
        self._stop()
        data = bytes(self._kept)
        if self.has_more:
            data = data.partition(b"\n")[2] or data
        return printable(data.decode(errors="replace"))

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_READS):
                data = os.read(self._fd, 1 << 16)
                if not data:
                    self._stop()
                    return
                self._kept += data
                if len(self._kept) > TAIL_BYTES:
                    self.has_more = True
                    del self._kept[:-TAIL_BYTES]

    def _stop(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


def tail(path: Path, lines: int, max_bytes: int = TAIL_BYTES) -> str:
    """Return the last lines of an output file, as `read_end` does."""
    return last_lines(read_end(path, max_bytes)[0], lines)


def read_end(path: Path, max_bytes: int = TAIL_BYTES) -> tuple[str, bool]:
    """Return the end of an output file, safe to store and to show, and whether that is all of it.

    "" when it cannot be read. Terminal sequences and control characters are left out, and bytes that are no UTF-8 are replaced. A program may
    have put anything in the file's place: what is no regular file is not read, as that could take for ever.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return "", False
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            data = file.read(max_bytes)
    except OSError:
        return "", False
    if size > max_bytes:
        data = data.partition(b"\n")[2] or data
    return printable(data.decode(errors="replace")), size <= max_bytes


def last_lines(text: str, lines: int) -> str:
    """Return the last lines of a text, without what ends the last one."""
    return "\n".join(text.rstrip("\n").split("\n")[-lines:] if lines else [])


def printable(text: str) -> str:
    """Return what a program printed without terminal sequences and control characters, which no text may hold."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def open_output(path: Path | str) -> int:
    """Make a new file for appending; one of that name is moved to the first free number after it."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except FileExistsError:
        number = 1
        while os.path.lexists(f"{path}.{number}"):
            number += 1
        os.rename(path, f"{path}.{number}")
    return os.open(path, flags, 0o666)
