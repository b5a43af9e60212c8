"""The floor: how fast this machine runs programs when nothing is done besides. A loop in C."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.scratch import BenchError

SOURCE = Path(__file__).with_name("floor.c")
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Floor:
    """The compiled loop."""

    program: Path

    def seconds(self, argv: Sequence[str], count: int, width: int) -> float:
        """Run *count* times *argv*, *width* of them at a time; return how long it took."""
        done = subprocess.run(
            [str(self.program), str(count), str(width), *argv],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise BenchError(f"the C floor failed: {done.stderr.strip()}")
        return float(done.stdout)


@contextlib.contextmanager
def compiled() -> Iterator[Floor]:
    """Compile the loop into a scratch directory, which goes with it."""
    with tempfile.TemporaryDirectory(prefix="ensemble-bench-") as folder:
        program = Path(folder) / "floor"
        argv = [*compiler(), "-O2", "-o", str(program), str(SOURCE)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"`{shlex.join(argv)}` failed:\n{done.stderr.strip()}")
        yield Floor(program)


def compiler() -> list[str]:
    """Return the C compiler: $CC, else cc, gcc or clang."""
    named = shlex.split(os.environ.get("CC", ""))
    for words in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(words[0]):
            return words
    if named:
        raise BenchError(f"CC={shlex.join(named)} is not on PATH; the floor is a C program")
    raise BenchError(
        "no C compiler (cc, gcc, clang) is on PATH; the floor is a C program: "
        "install one (Debian: apt-get install gcc), or name it in CC"
    )
