"""Each contender runs COUNT times the same program, two at a time, and says how long that took.

What is timed is each one at its best: its servers, workers or pilots are up before the clock starts. xargs and
GNU parallel have none; theirs is the time of the whole command.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bench import serial
from bench.floor import Floor
from bench.scratch import BenchError
from ensemble.drivers.guardlink import guard_argv

WIDTH = serial.SLOTS
TIMEOUT_S = 300.0
INSTALL_TIMEOUT_S = 900.0


class Contender(Protocol):
    """Something that runs programs."""

    name: str
    #: What it writes for every task, besides its own books.
    writes: str

    async def prepare(self) -> str:
        """Make it ready to run and return its version; BenchError says why it is missing."""
        ...

    async def seconds(self, argv: Sequence[str], count: int) -> float:
        """Run *count* times *argv*; return how long it took, or raise BenchError if not all ran."""
        ...


class Ensemble:
    """This project, serial mode: from the first start to the last commit."""

    name = "Ensemble"
    writes = "output file, work directory, history"

    async def prepare(self) -> str:
        from ensemble import __version__

        return __version__

    async def seconds(self, argv: Sequence[str], count: int) -> float:
        return (await serial.run_round(argv, count, timeout_s=TIMEOUT_S)).committed_s


class CLoop:
    """posix_spawn and wait."""

    name = "loop in C"
    writes = "nothing"

    def __init__(self, floor: Floor) -> None:
        self._floor = floor

    async def prepare(self) -> str:
        return ""

    async def seconds(self, argv: Sequence[str], count: int) -> float:
        return self._floor.seconds(argv, count, WIDTH)


class Xargs:
    """`seq COUNT | xargs -P2`."""

    name = "xargs -P2"
    writes = "nothing"

    async def prepare(self) -> str:
        return version_of("xargs")

    async def seconds(self, argv: Sequence[str], count: int) -> float:
        # -I: one task a line, and the line itself is not added to its arguments.
        command = ["xargs", "-P", str(WIDTH), "-I", "{none}", *argv]
        with scratch() as folder:
            began = time.perf_counter()
            run_guarded(command, folder, stdin="".join(f"{i}\n" for i in range(count)))
            return time.perf_counter() - began


class Parallel:
    """GNU parallel, with its log of what ran."""

    name = "GNU parallel"
    writes = "log line; output gathered"

    async def prepare(self) -> str:
        text = version_of("parallel")
        if "GNU" not in text:
            raise BenchError("`parallel` on PATH is another program of that name")
        return text

    async def seconds(self, argv: Sequence[str], count: int) -> float:
        with scratch() as folder:
            log = folder / "joblog"
            command = ["parallel", "--will-cite", f"-j{WIDTH}", "-N0", "--joblog", str(log)]
            began = time.perf_counter()
            run_guarded(
                [*command, shlex.join(argv)],
                folder,
                stdin="".join(f"{i}\n" for i in range(count)),
                environ={"PARALLEL_HOME": str(folder / "home")},
            )
            took = time.perf_counter() - began
            rows = [line.split("\t") for line in log.read_text().splitlines()[1:]]
            check_ran(sum(row[6:8] == ["0", "0"] for row in rows), count)
            return took


class PythonPeer:
    """A package that gets a virtual environment of its own, and a program beside this file."""

    def __init__(self, name: str, package: str, writes: str, cache: Path) -> None:
        self.name = name
        self.writes = writes
        self._package = package
        self._venv = cache / package

    @property
    def _python(self) -> Path:
        return self._venv / "bin" / "python"

    async def prepare(self) -> str:
        stamp = self._venv / ".installed"
        if not stamp.exists():
            print(f"installing {self._package} into {self._venv} …", flush=True)
            self._install()
            stamp.touch()
        ask = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
        return run_guarded([str(self._python), "-c", ask, self._package], Path("/")).strip()

    def _install(self) -> None:
        if importlib.util.find_spec("ensurepip") is None:
            raise BenchError("this Python cannot make virtual environments (no ensurepip)")
        self._venv.parent.mkdir(parents=True, exist_ok=True)
        for argv in (
            [sys.executable, "-m", "venv", "--clear", str(self._venv)],
            [str(self._python), "-m", "pip", "install", "--quiet", self._package],
        ):
            run_guarded(argv, self._venv.parent, timeout_s=INSTALL_TIMEOUT_S)

    async def seconds(self, argv: Sequence[str], count: int) -> float:
        program = Path(__file__).with_name(f"with_{self._package}.py")
        with scratch() as folder:
            # Its own scripts (Parsl's workers) are found on PATH.
            path = f"{self._python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
            out = run_guarded(
                [str(self._python), "-P", str(program), str(count), str(WIDTH), *argv],
                folder,
                environ={"PATH": path, "RUST_BACKTRACE": "0"},
            )
        try:
            result = json.loads(out.splitlines()[-1])
            took, ran = float(result["seconds"]), int(result["ran"])
        except (ValueError, LookupError, TypeError) as error:
            raise BenchError(f"{program.name} printed no result but {out[-200:]!r}") from error
        check_ran(ran, count)
        return took


# ---------------------------------------------------------------------------- running them


def check_ran(ran: int, count: int) -> None:
    """Raise unless a contender's own books say that everything ran and ended well."""
    if ran != count:
        raise BenchError(f"by its own books {ran} of {count} tasks ran")


def forks() -> int:
    """Return how many processes and threads this machine has started since it booted (proc(5))."""
    found = re.search(r"^processes (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def scratch() -> _Scratch:
    return _Scratch(prefix="ensemble-bench-", ignore_cleanup_errors=True)


class _Scratch(tempfile.TemporaryDirectory[str]):
    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__())


def version_of(program: str) -> str:
    """Return the first line of what a program says of its version."""
    if shutil.which(program) is None:
        raise BenchError(f"`{program}` is not on PATH")
    return run_guarded([program, "--version"], Path("/")).partition("\n")[0]


def run_guarded(
    argv: Sequence[str],
    folder: Path,
    *,
    stdin: str = "",
    environ: dict[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> str:
    """Run a command in *folder* under Ensemble's guard, which leaves nothing of it running.

    Returns:
        What it printed to its standard output.

    Raises:
        BenchError: It failed, or did not end in time.
    """
    with subprocess.Popen(
        guard_argv(argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=os.environ | (environ or {}),
        text=True,
        errors="replace",
    ) as process:
        try:
            out, error = process.communicate(stdin, timeout=timeout_s)
        except BaseException as problem:
            process.send_signal(signal.SIGTERM)  # the guard passes it on, and ends what is left
            if isinstance(problem, subprocess.TimeoutExpired):
                raise BenchError(f"{Path(argv[0]).name} took longer than {timeout_s:g} s") from None
            raise
    if process.returncode != 0:
        raise BenchError(f"{Path(argv[0]).name} ended with {process.returncode}: {gist(error)}")
    return out


def gist(error: str) -> str:
    """Return the line of an error output that says most: that of an exception, else the last."""
    lines = error.strip().splitlines() or ["it said nothing"]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (named or lines)[-1]
