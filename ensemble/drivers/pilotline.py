"""The one command line that starts a pilot on every node, and what its environment must hold.

Nothing here reads a clock or a file. A rank is the guard of a pilot, and exits 0 whatever happens; so with every
launcher the loss of a pilot takes no other one with it. The flags below are for the loss of the guard itself, by
SIGKILL or with its node. What was seen, with ranks that had met over MPI:

    launcher            a pilot is killed     a guard is killed
    Open MPI 4.1.4      all others live on    all others live on; mpirun exits 0
    Open MPI 5.0.11     all others live on    all others live on; mpirun exits 0
    MPICH 5.0.2         all others live on    all others are killed at once; mpiexec exits 9
    srun 22.05          all others live on    all others live on; srun exits 137

Hydra's -disable-auto-cleanup does not help: with it, too, all are killed; and in a world that has met over MPI it
sends SIGUSR1 to all ranks when one of them ends, even with 0. PALS, aprun and jsrun follow their manuals, which know
of no such flag, and flux's shell goes on by itself.

A lost node: Slurm ends the whole job, whatever srun is told, unless the job itself was submitted with --no-kill.
One that does not answer from the start makes srun give up after MessageTimeout, and end the pilots that it did start;
the launcher then starts the others again without that node. An srun that is killed takes its pilots along (a process
beside it sees to that), and they are started again, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemble.core.model import Node
from ensemble.drivers import mpienv
from ensemble.drivers.mpi import Flavor, MpiLauncher
from ensemble.errors import LaunchError

#: The name of the pilots' step, where the launcher makes steps; `mpi.parse_step` finds it.
STEP_NAME = "ens-pilots"
#: More names than this go into a host file: srun is known to lose part of a long list.
HOSTS_INLINE = 40
#: What remote daemons do not inherit by themselves where Open MPI starts them by ssh or srun.
_EXPORTED = re.compile(
    r"MPI4PY_\w+|PYTHON\w+|LD_LIBRARY_PATH|(OMPI|PMIX|PRTE)_MCA_\w+|ENSEMBLE_\w+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotLaunch:
    """The nodes and words that every launcher wants, each in its own spelling."""

    names: tuple[str, ...]
    is_virtual: bool
    hostfile: str | None = None
    exports: tuple[str, ...] = ()

    @property
    def count(self) -> str:
        """How many pilots, one for each node."""
        return str(len(self.names))

    @property
    def hosts(self) -> str:
        """The nodes' names, with commas."""
        return ",".join(self.names)


def pilot_launch_argv(
    launcher: MpiLauncher,
    nodes: Sequence[Node],
    program: Sequence[str],
    *,
    hostfile: Path | None = None,
    exports: Sequence[str] = (),
) -> list[str]:
    """Return the command line that runs *program* once on every node, bound to nothing.

    Virtual nodes are this machine: no host list, as many ranks as there are nodes.

    Args:
        nodes: All real or all virtual.
        program: What each rank runs: `guard_argv` of a pilot with `is_exit_zero`.
        hostfile: An absolute path with `hostfile_text` in it; needed where `needs_hostfile` says so.
        exports: Variables that all ranks must have: `exported` of the command's environment.

    Raises:
        LaunchError: The program has an argument ":", which launchers read as the start of a further program.
    """
    if ":" in program:
        raise LaunchError("a pilot's command line cannot have the argument ':'")
    launch = PilotLaunch(
        names=tuple(node.name for node in nodes),
        is_virtual=any(node.is_virtual for node in nodes),
        hostfile=str(hostfile) if hostfile else None,
        exports=tuple(exports),
    )
    return [*launcher.command, *_OPTIONS[launcher.flavor](launch), *launcher.flags, *program]


def needs_hostfile(launcher: MpiLauncher, nodes: Sequence[Node]) -> bool:
    """Tell whether the nodes are too many for the command line, and the launcher can read them from a file."""
    is_long = len(nodes) > HOSTS_INLINE and not any(node.is_virtual for node in nodes)
    return is_long and launcher.flavor in _HOSTFILE_LINE


def hostfile_text(launcher: MpiLauncher, nodes: Sequence[Node]) -> str:
    """Return what the host file must hold for this launcher: a line for each node."""
    line = _HOSTFILE_LINE.get(launcher.flavor, "{}\n")
    return "".join(line.format(node.name) for node in nodes)


_HOSTFILE_LINE: Mapping[Flavor, str] = {
    Flavor.OPENMPI4: "{} slots=1\n",
    Flavor.OPENMPI5: "{} slots=1\n",
    Flavor.MPICH: "{}:1\n",
    Flavor.INTEL: "{}:1\n",
    Flavor.SRUN: "{}\n",
    Flavor.PALS: "{}\n",
}


def _openmpi4(launch: PilotLaunch) -> list[str]:
    survive = ["--enable-recovery", "--mca", "orte_abort_on_non_zero_status", "0"]
    options = [*survive, "--oversubscribe", "--bind-to", "none", *_exports(launch)]
    if not launch.is_virtual:
        options += [*_openmpi_hosts(launch), "--map-by", "ppr:1:node"]
    return [*options, "-np", launch.count]


def _openmpi5(launch: PilotLaunch) -> list[str]:
    survive = ["--runtime-options", "recoverable,error-nonzero-status=0"]
    place = "slot:OVERSUBSCRIBE" if launch.is_virtual else "ppr:1:node:OVERSUBSCRIBE"
    options = [*survive, "--map-by", place, "--bind-to", "none", *_exports(launch)]
    if not launch.is_virtual:
        options += _openmpi_hosts(launch)
    return [*options, "-np", launch.count]


def _openmpi_hosts(launch: PilotLaunch) -> list[str]:
    if launch.hostfile:
        return ["--hostfile", launch.hostfile]
    return ["--host", ",".join(f"{name}:1" for name in launch.names)]


def _exports(launch: PilotLaunch) -> list[str]:
    return [word for name in launch.exports for word in ("-x", name)]


def _mpich(launch: PilotLaunch) -> list[str]:
    if launch.is_virtual:
        return ["-launcher", "fork", "-rmk", "user", "-n", launch.count]
    return [*_hydra_hosts(launch), "-ppn", "1", "-n", launch.count]


def _intel(launch: PilotLaunch) -> list[str]:
    unbound = ["-genv", "I_MPI_PIN", "off"]
    if launch.is_virtual:
        return [*unbound, "-launcher", "fork", "-n", launch.count]
    return [*unbound, *_hydra_hosts(launch), "-ppn", "1", "-n", launch.count]


def _hydra_hosts(launch: PilotLaunch) -> list[str]:
    return ["-f", launch.hostfile] if launch.hostfile else ["-hosts", launch.hosts]


def _srun(launch: PilotLaunch) -> list[str]:
    # --overlap: the pilots hold nothing, so that a task may use srun. --no-kill: a lost node ends its own rank only.
    options = ["-n", launch.count, "--cpu-bind=none", "--mem=0", "--overlap"]
    options += ["-K0", "--no-kill", "-W0", "--input=none", "--export=ALL", "-J", STEP_NAME]
    if not launch.is_virtual:
        hosts = launch.hostfile or launch.hosts
        options += ["-N", launch.count, "--ntasks-per-node=1", "-w", hosts]
    return options


def _pals(launch: PilotLaunch) -> list[str]:
    options = ["-n", launch.count, "--cpu-bind", "none"]
    if launch.is_virtual:
        return options
    hosts = ["--hostfile", launch.hostfile] if launch.hostfile else ["--hosts", launch.hosts]
    return [*options, "--ppn", "1", *hosts]


def _aprun(launch: PilotLaunch) -> list[str]:
    options = ["-n", launch.count, "-cc", "none"]
    if launch.is_virtual:
        return options
    # Node numbers: nid00012 is 12.
    numbers = (re.sub(r"^nid0*(?=[0-9])", "", name) for name in launch.names)
    return [*options, "-N", "1", "-L", ",".join(numbers)]


def _jsrun(launch: PilotLaunch) -> list[str]:
    # One resource set for each host, with all its cores and GPUs; jsrun takes no host list.
    return [
        "-n",
        launch.count,
        "-r",
        "1",
        "-a",
        "1",
        "-c",
        "ALL_CPUS",
        "-g",
        "ALL_GPUS",
        "-b",
        "none",
    ]


def _flux(launch: PilotLaunch) -> list[str]:
    options = ["-n", launch.count, "-o", "cpu-affinity=off", "-o", "gpu-affinity=off"]
    options += ["-o", "exit-timeout=none"]
    if launch.is_virtual:
        return options
    return [*options, "-N", launch.count, "--exclusive", f"--requires=hosts:{launch.hosts}"]


_OPTIONS: Mapping[Flavor, Callable[[PilotLaunch], list[str]]] = {
    Flavor.OPENMPI4: _openmpi4,
    Flavor.OPENMPI5: _openmpi5,
    Flavor.MPICH: _mpich,
    Flavor.INTEL: _intel,
    Flavor.SRUN: _srun,
    Flavor.PALS: _pals,
    Flavor.APRUN: _aprun,
    Flavor.JSRUN: _jsrun,
    Flavor.FLUX: _flux,
}


def pilot_environ(launcher: MpiLauncher, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for the command of `pilot_launch_argv`.

    It tells mpi4py's wheel which MPI library goes with the launcher, unless the user did: by itself the wheel takes
    the one in its own virtual environment, and each rank would find itself alone. Places that are not there are
    passed over; the last one is for the loader to find.

    Args:
        environ: The launcher's own environment.
    """
    is_root = os.geteuid() == 0
    found = mpienv.clean_environ(environ, launcher.flavor)
    found |= mpienv.environ_for(launcher.flavor, is_root=is_root)
    library = _LIBRARIES.get(launcher.flavor)
    is_told = "MPI4PY_LIBMPI" in environ or "MPI4PY_MPIABI" in environ
    if library is not None and not is_told:
        prefix = Path(launcher.command[0]).parent.parent
        places = [str(prefix / folder / library) for folder in ("lib", "lib64")]
        found["MPI4PY_LIBMPI"] = ":".join([*places, library])
    return found


def exported(environ: Mapping[str, str]) -> list[str]:
    """Return the names in an environment that pilots on other nodes need too."""
    return sorted(name for name in environ if _EXPORTED.fullmatch(name))


#: By the ABI: MPICH's and its descendants', and Open MPI's from 1.10 to 5. srun and flux serve any.
_LIBRARIES: Mapping[Flavor, str] = {
    Flavor.OPENMPI4: "libmpi.so.40",
    Flavor.OPENMPI5: "libmpi.so.40",
    Flavor.MPICH: "libmpi.so.12",
    Flavor.INTEL: "libmpi.so.12",
}
