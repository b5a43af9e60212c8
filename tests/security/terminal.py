"""A real terminal (pty) around a command, and what a command must not do to it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

#: What tables are drawn with: styles, and a line that is written again.
_OURS = re.compile(r"\x1b\[[0-9;]*m|\r\x1b\[K")


def run(
    *words: str, cwd: Path, environ: Mapping[str, str] | None = None, is_debug: bool = False
) -> tuple[int, str]:
    """Run `ensemble` on a wide terminal; return the exit status and everything it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 400, 0, 0))
    argv = [sys.executable, "-P", "-m", "ensemble", *(["--debug"] if is_debug else []), *words]
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env={**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **(environ or {})},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    data = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # EIO: nobody has it open any more
            break
        if not more:
            break
        data += more
    os.close(ours)
    return process.wait(timeout=60), data.decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def acts(text: str) -> list[str]:
    """Return the characters that would act on a terminal, or hide, without those that tables are drawn with."""
    rest = _OURS.sub("", text)
    return sorted({c for c in rest if c not in "\n\t" and not c.isprintable()})
