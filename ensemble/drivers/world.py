"""How a pilot learns its rank, the world's size and the launcher's link file.

Over MPI, by `rendezvous.py` in a process of its own; where that does not work, by what the MPI launcher wrote into
the environment. Open MPI and Hydra take any descendant of a rank for that rank, so it does not matter that a guard
and the pilot stand between; Hydra and Slurm's pmi2 need the descriptor PMI_FD, which is handed down.

A rank whose helper fails does so alone: the others wait for it in MPI_Init until their time is over, and then go by
the environment too. No launcher minds that helpers are killed there (Open MPI 4.1.4 and 5.0.11, MPICH 5.0.2).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from ensemble.drivers import linkfile, process
from ensemble.drivers.linkfile import LinkFile
from ensemble.drivers.output import printable
from ensemble.errors import LaunchError

#: Descriptors that a rank inherits from Hydra, Slurm's pmi2 or Flux: PMI_FD, HYDI_CONTROL_FD, …
_DESCRIPTOR = re.compile(r"(PMI|PMIX|HYDI|PALS|ALPS|I_MPI)_(\w+_)?FD")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Which pilot this is."""

    rank: int
    size: int
    #: Which one of those on its host, from 0.
    place: int
    link: LinkFile
    how: Literal["mpi", "environ"]
    #: What went wrong on the way, to be told.
    note: str | None = None
    #: The host of each rank; empty when MPI did not tell.
    hosts: tuple[str, ...] = ()


class Rank(NamedTuple):
    """What a rank's environment says."""

    rank: int
    #: None where the launcher does not tell.
    size: int | None
    local_rank: int


class Met(msgspec.Struct, frozen=True):
    """What `rendezvous.py` prints."""

    link: str | None
    problem: str | None
    rank: int
    size: int
    place: int
    hosts: tuple[str, ...]


#: Variables for rank, size and place on the host. The launcher's own come before the batch scheduler's, which a
#: launcher inside of a job inherits. PMIx and ALPS do not tell the size.
_VARIABLES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    ("PALS_RANKID", ("PMI_SIZE",), ("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK")),
    ("PMI_RANK", ("PMI_SIZE",), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID")),
    ("PMIX_RANK", ("SLURM_STEP_NUM_TASKS", "FLUX_JOB_SIZE"), ("SLURM_LOCALID",)),
    ("ALPS_APP_PE", (), ()),
    ("FLUX_TASK_RANK", ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",)),
    ("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",)),
)


def rank_from_environ(environ: Mapping[str, str]) -> Rank | None:
    """Return the rank that an MPI launcher wrote into the environment; None when this is no rank."""
    for name, sizes, places in _VARIABLES:
        rank = _number(environ, (name,))
        if rank is not None:
            return Rank(rank, _number(environ, sizes), _number(environ, places) or 0)
    return None


def _number(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        text = environ.get(name, "")
        if text.isascii() and text.isdecimal():
            return int(text)
    return None


async def meet(
    link_path: Path, expected: int, timeout_s: float, environ: Mapping[str, str]
) -> World:
    """Find out which pilot this is, and where the launcher waits.

    Where one pilot is expected, MPI is not touched. Otherwise the ranks meet over MPI; if they cannot, each goes by
    its environment and reads the file itself, and the world's `note` says why.

    Args:
        expected: How many pilots there should be.
        timeout_s: Seconds that MPI may take.
        environ: The pilot's environment.

    Raises:
        LaunchError: Neither MPI nor the environment tells a world of this size, or the file cannot be read.
    """
    if expected == 1:
        return World(rank=0, size=1, place=0, link=linkfile.read(link_path), how="environ")
    met = await _ask_mpi(link_path, expected, timeout_s, environ)
    if isinstance(met, str):
        return _from_environ(link_path, expected, environ, met)
    if met.link is None:
        link = linkfile.read(link_path)
        note = f"rank 0 could not read the link file, this rank could: {met.problem}"
    else:
        link, note = linkfile.parse(met.link.encode()), None
    return World(
        rank=met.rank,
        size=met.size,
        place=met.place,
        link=link,
        how="mpi",
        note=note,
        hosts=met.hosts,
    )


async def _ask_mpi(
    link_path: Path, expected: int, timeout_s: float, environ: Mapping[str, str]
) -> Met | str:
    """Return what the ranks told each other, or in a few words why they did not."""
    argv = [sys.executable, "-P", "-m", "ensemble.drivers.rendezvous"]
    try:
        done = await process.run(
            [*argv, str(link_path), str(expected)],
            env=dict(environ),  # uvloop takes nothing else
            timeout_s=timeout_s,
            pass_fds=_inherited(environ),
        )
    except LaunchError as error:
        return f"MPI was given up: {error}"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    try:
        met = msgspec.json.decode(lines[-1], type=Met) if done.code == 0 and lines else None
    except msgspec.MsgspecError as error:
        return f"MPI told what cannot be understood: {error}"
    if met is None:
        return f"MPI ended with status {done.code}: {_last_words(done.stderr)}"
    if met.size != expected:
        return f"MPI made a world of {met.size}, not of {expected}"
    return met


def _from_environ(link_path: Path, expected: int, environ: Mapping[str, str], why: str) -> World:
    found = rank_from_environ(environ)
    if found is None or found.size not in (None, expected) or found.rank >= expected:
        told = "tells no rank" if found is None else f"tells rank {found.rank} of {found.size}"
        raise LaunchError(
            f"this pilot cannot find its {expected - 1} companions: {why}, and its environment {told}; "
            "mpirun and the MPI library of mpi4py do not belong together: "
            "set MPI4PY_LIBMPI to the library of this mpirun, or command = … in [mpi] to its mpirun"
        )
    return World(
        rank=found.rank,
        size=expected,
        place=found.local_rank,
        link=linkfile.read(link_path),
        how="environ",
        note=f"{why}; rank {found.rank} is by the environment",
    )


def _inherited(environ: Mapping[str, str]) -> tuple[int, ...]:
    """Return the launcher's descriptors that are open: MPI has no other way to the launcher."""
    found = []
    for name in filter(_DESCRIPTOR.fullmatch, environ):
        fd = _number(environ, (name,))
        with contextlib.suppress(OSError, OverflowError):
            if fd is not None and fd > 2:
                os.fstat(fd)
                found.append(fd)
    return tuple(found)


def _last_words(text: str) -> str:
    lines = [line.strip() for line in printable(text).splitlines()]
    return next((line[:300] for line in reversed(lines) if line.strip(" -=")), "it said nothing")
