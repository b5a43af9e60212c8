"""What pilots need of their launcher, and the mpirun that starts them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.core.model import Node
from ensemble.core.wire import Hello, Welcome
from ensemble.drivers import mpienv, pilot, pilotline, process, spawn
from ensemble.drivers.guardlink import guard_argv
from ensemble.drivers.mpi import MpiLauncher
from ensemble.errors import LaunchError


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What pilots need to know of their launcher."""

    site: Path
    #: Where the link file, the roll and the output of mpirun go.
    run_directory: Path
    marker_prefix: str
    #: The launcher's own environment, without what an outer MPI launch put there.
    environ: Mapping[str, str]
    mpi: MpiLauncher
    launcher_id: int
    grace_s: float
    error_tail_lines: int
    slots_per_node: int
    is_pinned: bool
    #: How long pilots may take to join, and how long a silent one is waited for.
    join_s: float
    patience_s: float

    @property
    def link_path(self) -> Path:
        """Where the link file is."""
        return self.run_directory / "link.json"


def welcome(
    base: Base, node: Node, hello: Hello, place: tuple[int, int], marker_prefix: str
) -> Welcome:
    """Give a pilot its node: all of its host, or a virtual node's part of it.

    Args:
        place: Which of how many nodes this is.
        marker_prefix: What begins the markers of its tasks' processes.
    """
    cores, gpus, memory_mb = hello.cores, hello.gpus, hello.memory_mb
    environ = dict(base.environ)
    if node.is_virtual:
        index, number = place
        cores = _part(cores, index, number)
        gpus = _part(gpus, index, number)
        memory_mb = None if memory_mb is None else memory_mb // number
    else:
        environ = mpienv.environ_on_node(environ, node)
    return Welcome(
        node=node.name,
        cores=cores,
        gpus=gpus,
        memory_mb=memory_mb,
        slots_per_node=base.slots_per_node,
        site=os.fsencode(base.site),
        marker_prefix=marker_prefix,
        environ={os.fsencode(k): os.fsencode(v) for k, v in environ.items()},
        grace_s=base.grace_s,
        error_tail_lines=base.error_tail_lines,
        is_pinned=base.is_pinned,
    )


def _part(items: list[Any], index: int, number: int) -> list[Any]:
    """Divide a list into parts of about one length; return one of them, empty when there are too few."""
    if len(items) < number:
        return []
    return items[
        math.ceil(index * len(items) / number) : math.ceil((index + 1) * len(items) / number)
    ]


def start_mpirun(base: Base, number: int, nodes: Sequence[Node], log: Path) -> process.Process:
    """Start one mpirun with a guard and a pilot on each of these nodes; call it in a worker thread.

    Args:
        number: Which launch of pilots this is.
        log: What takes the output of mpirun.

    Raises:
        LaunchError: It could not be started.
    """
    if not base.run_directory.is_dir():  # nothing is made where a site was that has been moved
        raise LaunchError(f"{base.run_directory} is not there")
    program = guard_argv(
        pilot.pilot_argv(base.link_path, number, len(nodes)),
        on_loss=pilot.gone_argv(base.link_path, base.marker_prefix, number),
        is_exit_zero=True,
    )
    hostfile = None
    if pilotline.needs_hostfile(base.mpi, nodes):
        hostfile = base.run_directory / f"hosts-{number}"
        try:
            hostfile.write_text(pilotline.hostfile_text(base.mpi, nodes))
        except OSError as error:
            raise LaunchError(f"cannot write {hostfile}: {error.strerror}") from error
    environ = pilotline.pilot_environ(base.mpi, os.environ)
    argv = pilotline.pilot_launch_argv(
        base.mpi,
        nodes,
        program,
        hostfile=hostfile,
        exports=pilotline.exported(environ),
    )
    return spawn.start(argv, env=environ, cwd=base.run_directory, output=log)
