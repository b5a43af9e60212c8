"""What Ensemble's own processes below one process hold in memory."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """In MB of 10^6 bytes: what is there now, without and with its share of common pages, and the peak."""

    pss_mb: float
    rss_mb: float
    peak_rss_mb: float


def memory_of_tree(root: int) -> dict[str, Memory]:
    """Return memory by role; of several with one role, the largest."""
    largest: dict[str, Memory] = {}
    for pid in tree(root):
        role = role_of(pid)
        with contextlib.suppress(OSError, KeyError):  # it has just ended
            if role is not None:
                memory = memory_of(pid)
                if role not in largest or memory.pss_mb > largest[role].pss_mb:
                    largest[role] = memory
    return largest


def tree(root: int) -> list[int]:
    """Return *root* and everything below it."""
    children = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            children[int(fields[1])].append(int(folder.name))
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def role_of(pid: int) -> str | None:
    """Tell launcher, pilot and their guards from tasks and MPI's own processes; None for those."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    names = [Path(word).name for word in words if word]
    if not names or not names[0].startswith(("python", "ensemble")):
        return None
    parts = {
        name.removesuffix(".py").rpartition(".")[2] for name in names
    }  # of a module: its own name
    of = next((name for name in ("pilot", "launch") if name in parts), None)
    if of is None:
        return None
    role = "launcher" if of == "launch" else of
    return f"guard of {role}" if "guard.py" in names else role


def memory_of(pid: int) -> Memory:
    """Read a process's memory, as proc(5) has it."""
    status = _kilobytes(Path(f"/proc/{pid}/status"))
    rollup = _kilobytes(Path(f"/proc/{pid}/smaps_rollup"))
    return Memory(
        pss_mb=1024 * rollup["Pss"] / 1e6,
        rss_mb=1024 * rollup["Rss"] / 1e6,
        peak_rss_mb=1024 * status["VmHWM"] / 1e6,
    )


def _kilobytes(file: Path) -> dict[str, int]:
    values = {}
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if value.endswith("kB"):
            values[key] = int(value.split()[0])
    return values
