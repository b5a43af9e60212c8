"""MPI launchers: which one there is, its command line for a task, and how to end what it started.

Everything is pure but `detect`. What is said of Open MPI 4.1.4 and 5.0.11 and of MPICH 5.0.2 was tried;
srun was tried with Slurm 22.05; the others follow their manuals. What they say when they fail is in mpiwords.py,
what they need in their environment in mpienv.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ensemble.config import MpiSettings
from ensemble.core.model import Claim, Placement
from ensemble.drivers import mpienv, process
from ensemble.drivers.mpiline import OPTIONS, Flavor as Flavor, Launch
from ensemble.errors import LaunchError

#: Seconds that `mpiexec --version` may take.
VERSION_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EndPlan:
    """How to end a launch so that its ranks can say good-bye, and what the launcher does by itself."""

    #: `signal`: TERM to the launcher's command. `step`: `scancel_argv` with TERM, because TERM to the
    #: command kills its ranks at once.
    term: Literal["signal", "step"]
    #: Whether the command kills ranks that survive a TERM. Where it does not, the caller must: KILL to
    #: the command after the grace, then to what is left of the tree. Harmless where it does.
    escalates: bool
    #: Seconds that ranks have between TERM and KILL, where the command escalates and it is known.
    rank_grace_s: float | None = None
    #: Whether KILL to the command leaves ranks of this host alive, as children of the subreaper.
    leaves_orphans: bool = True


#: Tried with the versions above (TERM and KILL to the command, ranks with and without MPI_Init); where
#: nothing is known the plan is the careful one.
END_PLANS: Mapping[Flavor, EndPlan] = {
    # Ranks get CONT, a second later TERM, a second later KILL; mpirun ends with 1.
    Flavor.OPENMPI4: EndPlan(term="signal", escalates=True, rank_grace_s=1.0),
    # The same with quarters of a second; after KILL even ranks in MPI live on.
    Flavor.OPENMPI5: EndPlan(term="signal", escalates=True, rank_grace_s=0.25),
    # TERM is handed on and then waited for, for ever; after KILL the proxies kill their ranks.
    Flavor.MPICH: EndPlan(term="signal", escalates=False, leaves_orphans=False),
    Flavor.INTEL: EndPlan(term="signal", escalates=False),
    # TERM to srun is "forcing job termination": KILL to the ranks, which never see the TERM.
    Flavor.SRUN: EndPlan(term="step", escalates=False, leaves_orphans=False),
    Flavor.PALS: EndPlan(term="signal", escalates=False),
    Flavor.APRUN: EndPlan(term="signal", escalates=False),
    Flavor.JSRUN: EndPlan(term="signal", escalates=False),
    Flavor.FLUX: EndPlan(term="signal", escalates=False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MpiLauncher:
    """An MPI launcher that was found, with the site's flags."""

    flavor: Flavor
    #: The words before the options: an absolute path, and `run` for Flux.
    command: tuple[str, ...]
    flags: tuple[str, ...] = ()

    @property
    def end_plan(self) -> EndPlan:
        """How to end what was started with `argv`."""
        return END_PLANS[self.flavor]

    def argv(
        self, claim: Claim, placement: Placement, env: Mapping[str, str] | None = None
    ) -> list[str]:
        """Return the command line that runs *claim* with its ranks on each node of *placement*.

        Ranks are bound to cores only where the task has real nodes to itself and states its threads.
        Virtual nodes are this machine: no host list, nothing bound, as many ranks as it takes.

        Args:
            claim: The task.
            placement: Its nodes: all real or all virtual.
            env: The variables to export to the ranks; the command must be started with them too.

        Raises:
            LaunchError: The task has an argument ":", which launchers read as the start of a further
                program.
        """
        if ":" in claim.argv:
            raise LaunchError(
                f"task {claim.id} has the argument ':', where MPI launchers begin another program: "
                "put the command into a script"
            )
        options = OPTIONS[self.flavor](Launch(claim, placement, env or {}))
        return [*self.command, *options, *self.flags, *claim.mpi_flags, *claim.argv]


def parse_version(text: str) -> Flavor | None:
    """Tell a launcher from what it prints for `--version`; None when it is not known."""
    for pattern, flavor in _VERSIONS:
        if re.search(pattern, text):
            return flavor
    match = re.search(r"\((?:Open MPI|OpenRTE)\)\s+([0-9]+)\.", text)
    if match is None:
        return None
    return Flavor.OPENMPI4 if int(match[1]) < 5 else Flavor.OPENMPI5


_VERSIONS = (
    (r"Intel\(R\) MPI Library", Flavor.INTEL),
    (r"\bPALS\b", Flavor.PALS),
    (r"HYDRA build details|(?i:mvapich)", Flavor.MPICH),
    (r"IBM Spectrum MPI", Flavor.OPENMPI4),
    (r"\(PRRTE\)", Flavor.OPENMPI5),
    (r"(?m)^slurm(-wlm)? [0-9]", Flavor.SRUN),
    (r"flux-core", Flavor.FLUX),
    (r"\bALPS\b", Flavor.APRUN),
    (r"\b(jsrun|JSM)\b", Flavor.JSRUN),
)


# Slurm's nodes and steps


def nodes_argv(job_id: str) -> list[str]:
    """List the nodes that a job has now: fewer than it had, when it has lost some and goes on."""
    return ["squeue", "-h", "-j", job_id, "-t", "running", "-o", "%N"]


def step_lookup_argv(job_id: str) -> list[str]:
    """List a job's steps; the name comes last because it may contain the separator."""
    return ["squeue", "-h", "-s", "-j", job_id, "-o", "%i|%j"]


def parse_step(text: str, name: str) -> str | None:
    """Return the number of the newest step called *name*; None while there is none."""
    found = []
    for line in text.splitlines():
        step_id, _, step = line.strip().partition("|")
        number = step_id.rpartition(".")[2]
        if step == name and re.fullmatch(r"[0-9]+", number):
            found.append(int(number))
    return str(max(found)) if found else None


def scancel_argv(job_id: str, step: str, signal: str | None = "TERM") -> list[str]:
    """Send a signal to the ranks of a step; None cancels the step, which ends in KILL."""
    return ["scancel", *([f"--signal={signal}"] if signal else []), f"{job_id}.{step}"]


# Finding one

_MPIEXEC = ("mpiexec", "mpirun", "mpiexec.hydra", "mpirun.openmpi")
#: Launchers that are known by their name.
_BY_NAME = {"srun": Flavor.SRUN, "aprun": Flavor.APRUN, "jsrun": Flavor.JSRUN, "flux": Flavor.FLUX}
#: The scheduler's own launcher, where it comes before any mpiexec.
_NATIVE = {"flux": "flux", "lsf": "jsrun", "cobalt": "aprun"}
#: The same, where only pilots are to be started.
_PILOTS_NATIVE = {"slurm": "srun"}


async def detect(
    settings: MpiSettings,
    *,
    scheduler: str,
    environ: Mapping[str, str],
    is_for_pilots: bool = False,
) -> MpiLauncher:
    """Find the MPI launcher to use: what the settings say, else the first that answers.

    That is the launcher of Flux, jsrun or aprun within their schedulers; the mpiexec beside this Python
    (the `mpich` wheel); mpiexec or mpirun on PATH; srun within Slurm.

    Within Slurm srun comes last for tasks and first for pilots. Tasks need the launcher that goes with their
    MPI library: with an srun that speaks another PMI than the library each rank would find itself alone, while
    every mpiexec knows how to reach the job's nodes. Pilots go by their environment where MPI does not tell
    them of each other, and srun is always there, needs no ssh, and lets the others live on when a rank or a node
    is lost.

    Args:
        scheduler: The allocation's.
        environ: This process's environment.
        is_for_pilots: Whether it is to start pilots, and not tasks.

    Raises:
        LaunchError: There is none, or it is not what the settings say; says what to install or to set.
    """
    wanted = None if settings.launcher == "auto" else Flavor(settings.launcher)
    flags = tuple(settings.flags)
    if settings.command is not None:
        command = _resolve(settings.command, environ)
        flavor = wanted or await _ask(command, environ)
        if flavor is None:
            raise LaunchError(
                f"{settings.command!r} is no MPI launcher that is known here: "
                "set launcher = … in [mpi] to the one whose options it takes"
            )
        return MpiLauncher(flavor=flavor, command=_complete(flavor, command), flags=flags)
    unknown: str | None = None
    native = _NATIVE.get(scheduler) or (_PILOTS_NATIVE.get(scheduler) if is_for_pilots else None)
    for path in _candidates(wanted, native, scheduler, environ):
        flavor = await _ask((path,), environ)
        if flavor is not None and wanted in {None, flavor}:
            return MpiLauncher(flavor=flavor, command=_complete(flavor, (path,)), flags=flags)
        unknown = unknown or (path if flavor is None else None)
    if wanted is not None and unknown is not None:
        return MpiLauncher(flavor=wanted, command=_complete(wanted, (unknown,)), flags=flags)
    raise LaunchError(
        f"no {wanted or 'MPI'} launcher found beside {sys.executable} or on PATH: "
        "pip install 'ensemble-hpc[mpi]', load an MPI module, or set command = … in [mpi]"
    )


def _candidates(
    wanted: Flavor | None, native: str | None, scheduler: str, environ: Mapping[str, str]
) -> Iterator[str]:
    """Yield the paths of possible launchers, the preferred ones first."""
    on_path = environ.get("PATH", os.defpath)
    beside = str(Path(sys.executable).parent)
    places: list[tuple[str, str]]
    if wanted is not None and wanted.value in _BY_NAME:
        places = [(wanted.value, on_path)]
    else:
        places = [(name, where) for where in (beside, on_path) for name in _MPIEXEC]
    if wanted is None:
        places = [*([(native, on_path)] if native else []), *places]
        places += [("srun", on_path)] if scheduler == "slurm" else []
    found = (shutil.which(name, path=where) for name, where in places)
    yield from dict.fromkeys(path for path in found if path is not None)


async def _ask(command: tuple[str, ...], environ: Mapping[str, str]) -> Flavor | None:
    """Tell a launcher by its name, its place or its answer to --version; None when that is no help."""
    if known := _known_by_place(Path(command[0])):
        return known
    env = mpienv.clean_environ(environ) | {"LC_ALL": "C"}
    env |= mpienv.environ_for(Flavor.OPENMPI5, is_root=os.geteuid() == 0)
    try:
        done = await process.run([*command, "--version"], env=env, timeout_s=VERSION_TIMEOUT_S)
    except LaunchError:
        return None
    return parse_version(done.stdout + "\n" + done.stderr) if done.code == 0 else None


def _known_by_place(path: Path) -> Flavor | None:
    return _BY_NAME.get(path.name) or (Flavor.PALS if "pals" in path.resolve().parts else None)


def _resolve(command: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Split the setting into words, the first one made absolute: tasks may have another PATH."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise LaunchError(f"command = {command!r} in [mpi] is malformed: {error}") from error
    path = shutil.which(words[0], path=environ.get("PATH", os.defpath)) if words else None
    if path is None:
        raise LaunchError(f"command = {command!r} in [mpi] is not an executable, nor one on PATH")
    return (os.path.abspath(path), *words[1:])


def _complete(flavor: Flavor, command: tuple[str, ...]) -> tuple[str, ...]:
    is_bare_flux = flavor is Flavor.FLUX and command[1:] == ()
    return (*command, "run") if is_bare_flux else command
