"""What this node has: cores, GPUs, memory, and its name."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemble.drivers import hostlist

#: What hides GPUs from a program: of NVIDIA's, AMD's and Intel's runtime.
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
_CPUS = Path("/sys/devices/system/cpu")
_NO_DEVICES = frozenset({"", "-1", "NoDevFiles", "none", "void"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What tasks may use of a node."""

    #: Hardware threads by core, of those that this process may use.
    cores: list[list[int]]
    #: Devices as the environment names them.
    gpus: list[str]
    memory_mb: int | None


def look(environ: Mapping[str, str]) -> Hardware:
    """Look at this node, as far as this process may use it."""
    return Hardware(
        cores=group_cores(os.sched_getaffinity(0), _read_siblings),
        gpus=find_gpus(environ),
        memory_mb=_memory_mb(),
    )


def node_name(environ: Mapping[str, str]) -> str:
    """Return what the scheduler calls this host: SLURMD_NODENAME, else the first label of its name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def find_gpus(environ: Mapping[str, str]) -> list[str]:
    """Return the devices that are visible here, by the names that tasks must be given.

    A scheduler that has hidden some has left the others' numbers in one of the variables; tasks are
    given their share of just these. Where it has hidden all, there are none.
    """
    for name in GPU_VARIABLES:
        devices = list(parse_devices(environ.get(name, "")))
        if devices:
            return devices
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    if on_node.isascii() and on_node.isdigit() and len(on_node) < 4:
        return [str(number) for number in range(int(on_node))]
    if any(name in environ for name in GPU_VARIABLES):
        return []
    return [str(number) for number, _ in enumerate(_nvidia_devices())]


def parse_devices(text: str) -> Iterator[str]:
    """Take indices or UUIDs; CUDA ignores what follows -1, and old Slurm writes NoDevFiles for none."""
    for word in text.split(","):
        if word.strip() in _NO_DEVICES:
            return
        yield word.strip()


def _nvidia_devices() -> list[str]:
    try:
        return sorted(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return []


def group_cores(cpus: Iterable[int], siblings: Callable[[int], Iterable[int]]) -> list[list[int]]:
    """Group hardware threads by core.

    Args:
        cpus: Those that may be used.
        siblings: Says which hardware threads share a core with one: a function of its number.
    """
    left = set(cpus)
    cores = []
    for cpu in sorted(left):
        if cpu in left:
            core = sorted({cpu, *siblings(cpu)} & left)
            left.difference_update(core)
            cores.append(core)
    return cores


def _read_siblings(cpu: int) -> list[int]:
    try:
        text = (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        return [int(number) for number in hostlist.expand(f"[{text}]")]
    except (OSError, ValueError):
        return [cpu]


def _memory_mb() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    except (OSError, ValueError):
        return None
