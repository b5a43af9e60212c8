"""The command lines of MPI launchers: one small pure function for each.

Tried with Open MPI 4.1.4 and 5.0.11, MPICH 5.0.2 and srun 22.05; the others follow their manuals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ensemble.core.model import Claim, Placement


class Flavor(StrEnum):
    """A family of MPI launchers that take the same options."""

    #: Open MPI up to 4, and IBM Spectrum MPI.
    OPENMPI4 = "openmpi4"
    #: Open MPI from 5 on (PRRTE).
    OPENMPI5 = "openmpi5"
    #: Hydra: MPICH and MVAPICH.
    MPICH = "mpich"
    #: Intel MPI: Hydra with its own way of binding.
    INTEL = "intel"
    SRUN = "srun"
    #: Cray PALS' mpiexec.
    PALS = "pals"
    APRUN = "aprun"
    JSRUN = "jsrun"
    #: `flux run`.
    FLUX = "flux"


def step_name(task_id: int) -> str:
    """Name the step of a task, to be found again with `parse_step`."""
    return f"ens-{task_id}"


@dataclass(frozen=True, slots=True)
class Launch:
    """The numbers and words that every launcher wants, each in its own spelling."""

    claim: Claim
    placement: Placement
    env: Mapping[str, str]

    @property
    def is_virtual(self) -> bool:
        """Whether the nodes are shares of this machine."""
        return any(node.is_virtual for node in self.placement.nodes)

    @property
    def nodes(self) -> int:
        """How many nodes."""
        return len(self.placement.nodes)

    @property
    def per_node(self) -> int:
        """Ranks on each node."""
        return self.claim.ranks_per_node

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.nodes * self.per_node

    @property
    def hosts(self) -> str:
        """The nodes' names, with commas."""
        return ",".join(self.placement.names)

    @property
    def room(self) -> int:
        """Hardware threads of the smallest node."""
        return min(node.cores for node in self.placement.nodes)

    @property
    def is_crowded(self) -> bool:
        """Whether there are more ranks or threads than a node has hardware threads."""
        return self.per_node * (self.claim.threads_per_rank or 1) > self.room

    @property
    def threads(self) -> int:
        """Threads of a rank: as stated, else its share of the node."""
        return self.claim.threads_per_rank or max(1, self.room // self.per_node)

    @property
    def cores(self) -> int | None:
        """Whole cores of a rank; None when nothing is stated.

        Open MPI and Hydra count cores, and refuse more than there are: on nodes that share cores
        between hardware threads, a task that uses all of these has to state threads_per_core.
        """
        if self.claim.threads_per_rank is None:
            return None
        return -(-self.claim.threads_per_rank // (self.claim.threads_per_core or 1))

    def bind(self, usual: str) -> str:
        """Return the task's own word for binding, else *usual* where cores are to be bound, else none."""
        if self.is_virtual:
            return "none"
        if self.claim.cpu_affinity:
            return self.claim.cpu_affinity
        return "none" if self.cores is None or self.is_crowded else usual


def _openmpi4(launch: Launch) -> list[str]:
    count = ["-np", str(launch.ranks)]
    # A batch job often names fewer slots than a node has cores: the nodes are ours, so ignore them.
    if launch.is_virtual:
        return ["--oversubscribe", "--bind-to", "none", *count]
    bind = launch.bind("core:overload-allowed")
    cores = f":PE={launch.cores}" if bind.startswith("core") and launch.cores else ""
    place = ["--map-by", f"ppr:{launch.per_node}:node{cores}", "--oversubscribe"]
    return [*_openmpi_hosts(launch), *place, "--bind-to", bind, *_openmpi_exports(launch), *count]


def _openmpi5(launch: Launch) -> list[str]:
    count = ["-np", str(launch.ranks)]
    if launch.is_virtual:
        return ["--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none", *count]
    bind = launch.bind("core:overload-allowed")
    cores = f":PE={launch.cores}" if bind.startswith("core") and launch.cores else ""
    place = ["--map-by", f"ppr:{launch.per_node}:node{cores}:OVERSUBSCRIBE"]
    return [*_openmpi_hosts(launch), *place, "--bind-to", bind, *_openmpi_exports(launch), *count]


def _openmpi_hosts(launch: Launch) -> list[str]:
    return ["--host", ",".join(f"{name}:{launch.per_node}" for name in launch.placement.names)]


def _openmpi_exports(launch: Launch) -> list[str]:
    # Names only: the values come from mpirun's own environment, quotes and semicolons untouched.
    return [word for name in launch.env for word in ("-x", name)]


def _mpich(launch: Launch) -> list[str]:
    count = ["-n", str(launch.ranks)]
    if launch.is_virtual:
        # Otherwise Hydra starts its proxies with the scheduler that it finds in the environment.
        return ["-launcher", "fork", "-rmk", "user", *count]
    bind = launch.bind(f"core:{launch.cores}")
    place = ["-hosts", launch.hosts, "-ppn", str(launch.per_node)]
    return [*place, *(["-bind-to", bind] if bind != "none" else []), *count]


def _intel(launch: Launch) -> list[str]:
    count = ["-n", str(launch.ranks)]
    bind = launch.bind(str(launch.threads))
    pin = ["I_MPI_PIN", "off"] if bind == "none" else ["I_MPI_PIN_DOMAIN", bind]
    if launch.is_virtual:
        return ["-launcher", "fork", "-genv", *pin, *count]
    return ["-hosts", launch.hosts, "-ppn", str(launch.per_node), "-genv", *pin, *count]


def _srun(launch: Launch) -> list[str]:
    # -N, -n and -w must agree, else srun adds or drops nodes; without --exact and --mem a step takes
    # all of the job; without --input=none it reads the launcher's own input. --overlap: the nodes are this task's
    # by our own books, and Slurm's are wrong once a job has lost a node (22.05: steps would wait for ever).
    options = ["-n", str(launch.ranks), f"--cpu-bind={launch.bind('cores')}"]
    if not launch.is_virtual:
        options += ["-N", str(launch.nodes), f"--ntasks-per-node={launch.per_node}"]
        options += ["-w", launch.hosts, "--exact", "--overlap", "--mem=0"]
        options += ["--overcommit"] if launch.is_crowded else ["-c", str(launch.threads)]
        if launch.claim.threads_per_core:
            options.append(f"--threads-per-core={launch.claim.threads_per_core}")
    if launch.claim.gpus_per_rank:
        options.append(f"--gpus-per-node={launch.claim.gpus_per_rank * launch.per_node}")
    return [*options, "--input=none", "--export=ALL", "-K1", "-J", step_name(launch.claim.id)]


def _pals(launch: Launch) -> list[str]:
    options = ["-n", str(launch.ranks)]
    if not launch.is_virtual:
        options += ["--ppn", str(launch.per_node), "--hosts", launch.hosts]
    bind = launch.bind("depth")
    options += ["--depth", str(launch.threads)] if bind == "depth" else []
    exports = [word for item in launch.env.items() for word in ("--env", "=".join(item))]
    return [*options, "--cpu-bind", bind, *exports]


def _aprun(launch: Launch) -> list[str]:
    options = ["-n", str(launch.ranks)]
    if not launch.is_virtual:
        # Node numbers: nid00012 is 12.
        numbers = (re.sub(r"^nid0*(?=[0-9])", "", name) for name in launch.placement.names)
        options += ["-N", str(launch.per_node), "-L", ",".join(numbers)]
    if launch.cores is not None:
        options += ["-d", str(launch.threads), "-j", str(launch.claim.threads_per_core or 1)]
    exports = [word for item in launch.env.items() for word in ("-e", "=".join(item))]
    return [*options, "-cc", launch.bind("depth"), *exports]


def _jsrun(launch: Launch) -> list[str]:
    # A resource set for each rank; jsrun takes no host list and places by what is free.
    cores = launch.cores or launch.threads
    sets = ["-n", str(launch.ranks), "-a", "1", "-c", str(cores), "-r", str(launch.per_node)]
    gpus = ["-g", str(launch.claim.gpus_per_rank)]
    return [*sets, *gpus, "-b", launch.bind(f"packed:{cores}")]


def _flux(launch: Launch) -> list[str]:
    options = ["-n", str(launch.ranks)]
    if not launch.is_virtual:
        options += ["-N", str(launch.nodes), "--exclusive", f"--requires=hosts:{launch.hosts}"]
        options += ["-c", str(launch.cores)] if launch.cores and not launch.is_crowded else []
    if launch.claim.gpus_per_rank:
        options += ["-g", str(launch.claim.gpus_per_rank), "-o", "gpu-affinity=per-task"]
    bind = launch.bind("per-task")
    return [*options, "-o", f"cpu-affinity={'off' if bind == 'none' else bind}"]


#: Each launcher's options for one launch.
OPTIONS: Mapping[Flavor, Callable[[Launch], list[str]]] = {
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
