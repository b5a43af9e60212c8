"""Which nodes this launcher has, and until when: from a scheduler's environment, else this machine.

Each scheduler's part is pure (environment and texts in); commands and files are touched in the last
section only. Sources: the manual pages of sbatch and squeue (22.05), pbs_environment(7) and qstat(1B)
of OpenPBS 23.06, qsub of Cobalt, IBM's reference of LSF, submit(1) of Grid Engine, flux-job(1).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import aiofiles

from ensemble.core.model import Node
from ensemble.drivers import batch, hostlist, walltime
from ensemble.drivers.hardware import GPU_VARIABLES, node_name as node_name, parse_devices
from ensemble.errors import AllocationError

_JOB_ID = {"slurm": "SLURM_JOB_ID", "cobalt": "COBALT_JOBID", "pbs": "PBS_JOBID"}
#: A batch job of the local scheduler, localbatch.py: its id, and into how many nodes it divides this machine.
_LOCAL_ID, _LOCAL_NODES = "ENSEMBLE_LOCAL_JOB_ID", "ENSEMBLE_LOCAL_JOB_NODES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The nodes that a launcher may use, and until when."""

    #: `slurm`, `pbs`, `cobalt`, `lsf`, `sge`, `flux` or `local`.
    scheduler: str
    job_id: str | None
    nodes: tuple[Node, ...]
    #: Epoch seconds on the wall clock; None when it does not end, or nobody can tell.
    ends_at: float | None
    #: How often the scheduler has started this job again under the same id.
    restart_count: int = 0
    #: Whether the launcher itself runs on one of the nodes.
    head_is_compute: bool = True


async def find_allocation(
    environ: Mapping[str, str], *, virtual_nodes: int | None, now: float
) -> Allocation:
    """Return what the environment says this process was given.

    Args:
        environ: This process's environment.
        virtual_nodes: On a plain machine, into how many nodes to divide it (one when None); in a
            batch job, how many of its nodes to use (all when None).
        now: Epoch seconds, for schedulers that tell the time left and not the end.

    Raises:
        AllocationError: The scheduler's node list is missing, empty or malformed, or has fewer nodes
            than asked for.
    """
    if virtual_nodes is not None and virtual_nodes < 1:
        raise AllocationError(f"cannot run on {virtual_nodes} nodes: give --nodes 1 or more")
    scheduler = find_scheduler(environ)
    if scheduler == "local" and environ.get(_LOCAL_ID):
        return await _local_job(environ, virtual_nodes, now)
    if scheduler == "local":
        return _local_allocation(environ, virtual_nodes or 1)
    job_id = find_job_id(scheduler, environ)
    hosts = await _find_hosts(scheduler, environ, job_id)
    _check_number(virtual_nodes, len(hosts), f"{scheduler} job {job_id}")
    here = node_name(environ)
    return Allocation(
        scheduler=scheduler,
        job_id=job_id,
        nodes=_to_nodes(hosts, environ, scheduler)[:virtual_nodes],
        ends_at=await walltime.find_end(scheduler, environ, job_id, now),
        restart_count=find_restart_count(scheduler, environ),
        head_is_compute=any(_short(host) == _short(here) for host in hosts),
    )


async def _local_job(
    environ: Mapping[str, str], virtual_nodes: int | None, now: float
) -> Allocation:
    """Return the virtual nodes of a job of the local scheduler; fewer, where that is asked for, are as large."""
    job_id = environ[_LOCAL_ID]
    text = environ.get(_LOCAL_NODES, "")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise AllocationError(
            f"${_LOCAL_NODES} is {text!r} in local job {job_id}: expected a number of nodes "
            f"(unset {_LOCAL_ID} if this is no such job)"
        )
    _check_number(virtual_nodes, int(text), f"local job {job_id}")
    whole = _local_allocation(environ, int(text))
    return replace(
        whole,
        job_id=job_id,
        nodes=whole.nodes[:virtual_nodes],
        ends_at=await walltime.find_end("local", environ, job_id, now),
    )


def _check_number(asked: int | None, number: int, job: str) -> None:
    if asked is not None and asked > number:
        raise AllocationError(
            f"--nodes {asked}, but {job} has {number}: "
            "give fewer, or leave the option out to use them all"
        )


# The environment


def find_scheduler(environ: Mapping[str, str]) -> str:
    """Name the scheduler whose job this process is part of; `local` when there is none, or it is a local job.

    A local job does not have the variables of a job that it was submitted from, so others are inside it.
    The innermost comes first: a Flux instance is often started inside a Slurm job. FLUX_URI alone is
    no sign of a job, and neither is JOB_ID, which many programs use.
    """
    signs: tuple[tuple[str, bool], ...] = (
        ("flux", bool(environ.get("FLUX_ENCLOSING_ID") or environ.get("FLUX_JOB_ID"))),
        ("slurm", bool(environ.get("SLURM_JOB_ID"))),
        ("cobalt", bool(environ.get("COBALT_JOBID"))),
        ("pbs", bool(environ.get("PBS_JOBID"))),
        ("lsf", bool(environ.get("LSB_JOBID"))),
        ("sge", bool(environ.get("JOB_ID") and environ.get("SGE_TASK_ID"))),
    )
    return next((name for name, is_seen in signs if is_seen), "local")


def find_job_id(scheduler: str, environ: Mapping[str, str]) -> str:
    """Return the job's id as the scheduler's own commands take it."""
    match scheduler:
        case "flux":
            return environ.get("FLUX_ENCLOSING_ID") or environ["FLUX_JOB_ID"]
        case "lsf":
            index = environ.get("LSB_JOBINDEX") or "0"
            return environ["LSB_JOBID"] + (f"[{index}]" if index != "0" else "")
        case "sge":
            # Grid Engine says "undefined" where the job is no array.
            task = environ["SGE_TASK_ID"]
            return environ["JOB_ID"] + (f".{task}" if task != "undefined" else "")
        case _:
            return environ[_JOB_ID[scheduler]]


def find_restart_count(scheduler: str, environ: Mapping[str, str]) -> int:
    """Return how often the job was started before; 0 where the scheduler does not tell."""
    name = {"slurm": "SLURM_RESTART_COUNT", "sge": "RESTARTED"}.get(scheduler, "")
    text = environ.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def count_gpus(environ: Mapping[str, str]) -> int:
    """Return how many GPUs of a node the scheduler has given, 0 when nothing says so."""
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    if re.fullmatch(r"[0-9]{1,4}", on_node):
        return int(on_node)
    for name in GPU_VARIABLES:
        text = environ.get(name, "").strip()
        if text:
            return len(list(parse_devices(text)))
    return 0


def _local_allocation(environ: Mapping[str, str], number: int) -> Allocation:
    name = node_name(environ)
    gpus = count_gpus(environ)
    cores, more = divmod(_usable_cores(), number)
    return Allocation(
        scheduler="local",
        job_id=None,
        nodes=tuple(
            Node(
                name=f"{name}:{index}",
                cores=max(1, cores + (index < more)),
                gpus=gpus // number,
                is_virtual=True,
            )
            for index in range(number)
        ),
        ends_at=None,
    )


def _to_nodes(hosts: list[str], environ: Mapping[str, str], scheduler: str) -> tuple[Node, ...]:
    gpus = count_gpus(environ)
    node = Node(name="", cores=_usable_cores(), gpus=gpus)
    cores = _slurm_cores(environ, len(hosts)) if scheduler == "slurm" else None
    return tuple(
        replace(node, name=host, cores=cores[place] if cores else node.cores)
        for place, host in enumerate(hosts)
    )


def _slurm_cores(environ: Mapping[str, str], number: int) -> list[int] | None:
    """Return each node's hardware threads; None when Slurm does not tell."""
    found = hostlist.counts(environ.get("SLURM_JOB_CPUS_PER_NODE") or "0")
    if len(found) == number and min(found) > 0:
        return found
    here = environ.get("SLURM_CPUS_ON_NODE", "")
    return [int(here)] * number if re.fullmatch(r"[1-9][0-9]{0,5}", here) else None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _short(name: str) -> str:
    return name.partition(".")[0].lower()


# Node lists: text in, hosts out


def parse_node_file(text: str) -> list[str]:
    """Return the hosts of a PBS_NODEFILE or COBALT_NODEFILE: in order, once each.

    PBS writes a line for each MPI process; Cobalt separates by newlines or by commas.
    """
    return _once(re.split(r"[\s,]+", text))


def parse_partition(text: str) -> list[str]:
    """Return the hosts of COBALT_PARTNAME: `1001-1005,1030` are nid01001 to nid01005 and nid01030."""
    return _once(f"nid{int(number):05d}" for number in hostlist.expand(f"[{text.strip()}]"))


def parse_slots(slots: Iterable[tuple[str, int]]) -> list[str]:
    """Return the hosts of an LSF job without its launch node, which runs no tasks.

    That is what is called batch… or login…, and a first host with one slot where others have more
    (the launch node of CORAL systems); a host that would be the only one is kept.
    """
    counted: dict[str, int] = {}
    for host, count in slots:
        counted[host] = counted.get(host, 0) + count
    hosts = list(counted)
    if len(hosts) > 1 and counted[hosts[0]] == 1 and max(counted.values()) > 1:
        del hosts[0]
    return [host for host in hosts if not host.startswith(("batch", "login"))] or hosts


def parse_host_counts(text: str) -> list[tuple[str, int]]:
    """Return the pairs of LSB_MCPU_HOSTS, `hostA 4 hostB 8`."""
    words = text.split()
    if len(words) % 2 or not all(re.fullmatch(r"[0-9]{1,9}", count) for count in words[1::2]):
        raise AllocationError(f"LSB_MCPU_HOSTS is not a list of hosts and counts: {text[:80]!r}")
    return [(host, int(count)) for host, count in zip(words[::2], words[1::2], strict=True)]


def parse_pe_host_file(text: str) -> list[str]:
    """Return the hosts of Grid Engine's PE_HOSTFILE: the first column of each line."""
    return _once(line.split()[0] for line in text.splitlines() if line.strip())


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name))


# Files and commands


async def _find_hosts(scheduler: str, environ: Mapping[str, str], job_id: str) -> list[str]:
    hosts = await _hosts_of(scheduler, environ, job_id)
    if not hosts:
        raise AllocationError(f"{scheduler} job {job_id} has an empty list of nodes")
    return hosts


async def _hosts_of(scheduler: str, environ: Mapping[str, str], job_id: str) -> list[str]:
    match scheduler:
        case "flux":
            return _once(hostlist.expand(await _flux_hosts(environ, job_id)))
        case "slurm":
            return _once(
                hostlist.expand(_required(environ, "SLURM_JOB_NODELIST", "SLURM_NODELIST"))
            )
        case "cobalt":
            return await _cobalt_hosts(environ)
        case "pbs":
            return parse_node_file(await _read("PBS_NODEFILE", environ))
        case "lsf":
            return await _lsf_hosts(environ)
        case _:
            return await _sge_hosts(environ)


async def _cobalt_hosts(environ: Mapping[str, str]) -> list[str]:
    if environ.get("COBALT_NODEFILE"):
        return parse_node_file(await _read("COBALT_NODEFILE", environ))
    return parse_partition(_required(environ, "COBALT_PARTNAME"))


async def _lsf_hosts(environ: Mapping[str, str]) -> list[str]:
    if environ.get("LSB_DJOB_HOSTFILE"):
        text = await _read("LSB_DJOB_HOSTFILE", environ)
        return parse_slots((host, 1) for host in text.split())
    if environ.get("LSB_MCPU_HOSTS"):
        return parse_slots(parse_host_counts(environ["LSB_MCPU_HOSTS"]))
    return parse_slots((host, 1) for host in _required(environ, "LSB_HOSTS").split())


async def _sge_hosts(environ: Mapping[str, str]) -> list[str]:
    # A job without a parallel environment has no file: it is on this host.
    if not environ.get("PE_HOSTFILE"):
        return [node_name(environ)]
    return parse_pe_host_file(await _read("PE_HOSTFILE", environ))


async def _flux_hosts(environ: Mapping[str, str], job_id: str) -> str:
    """Return the hosts of the instance, or those of this job where it is no instance of its own."""
    is_instance = bool(environ.get("FLUX_ENCLOSING_ID"))
    jobs = ["flux", "jobs", "-n", "-o", "{nodelist}", job_id]
    text = await batch.ask(["flux", "getattr", "hostlist"] if is_instance else jobs, environ)
    if text is None:
        raise AllocationError(f"flux job {job_id}: the flux command does not tell its nodes")
    return text


async def _read(name: str, environ: Mapping[str, str]) -> str:
    path = Path(_required(environ, name))
    try:
        async with aiofiles.open(path, encoding="utf-8", errors="replace") as file:
            text = await file.read()
    except OSError as error:
        raise AllocationError(f"cannot read ${name} ({path}): {error.strerror or error}") from error
    if not text.strip():
        raise AllocationError(f"${name} ({path}) is empty: the scheduler gave this job no nodes")
    return text


def _required(environ: Mapping[str, str], *names: str) -> str:
    for name in names:
        if environ.get(name, "").strip():
            return environ[name]
    raise AllocationError(f"${names[0]} is not set: this job's nodes cannot be told")
