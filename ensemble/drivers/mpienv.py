"""The environment in which an MPI launcher, or a task that calls one, can be started.

This process may be a rank itself, or in a batch job: both leave variables that a launcher below would go by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ensemble.core.model import Node
from ensemble.drivers.mpiline import Flavor

#: What mpirun, mpiexec or srun adds for a rank. A child that finds it joins the rank's world or aborts.
_INJECTED = re.compile(
    r"OMPI_|PMIX_|PMI_|PRTE_|OPAL_|ORTE_|HYDRA_|HYDI_|MPIEXEC_|MPI_LOCAL|PALS_|ALPS_|PSM2_"
    r"|MPIR_CVAR_CH3_INTERFACE_HOSTNAME$|I_MPI_PMI_LIBRARY$|I_MPI_HYDRA_|FLUX_(JOB|TASK|PMI|KVS)_"
    r"|SLURM_(PROCID|LOCALID|NODEID|STEP(?!MGR).*|SRUN.*|TASK_PID|GTIDS|CPU_BIND.*|MPI_TYPE"
    r"|LAUNCH_NODE_IPADDR|UMASK)$"
)
#: The same prefixes, but a module's or a user's settings, unless we are a rank ourselves.
_TUNING = re.compile(
    r"OMPI_MCA_|PMIX_MCA_|PRTE_MCA_|(OPAL|PMIX|PRTE)_PREFIX$|(OMPI|PRTE)_ALLOW_RUN_AS_ROOT"
    r"|PMI_NO_FORK$|HYDRA_(BOOTSTRAP|IFACE|ENV|LAUNCHER|RMK|TOPOLIB)|I_MPI_HYDRA_|PSM2_"
)
_RANK = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID", "ALPS_APP_PE")
#: All that a new srun needs to know; the rest of a batch job's SLURM_… are defaults for its options.
_SRUN_KEEPS = re.compile(
    r"SLURM_(JOB_ID|CONF|JOB_NODELIST|NODELIST|NNODES|JOB_NUM_NODES|JOB_CPUS_PER_NODE"
    r"|TASKS_PER_NODE|CLUSTER_NAME|WORKING_CLUSTER|STEPMGR)$"
)


def clean_environ(environ: Mapping[str, str], flavor: Flavor | None = None) -> dict[str, str]:
    """Return *environ* without what an outer mpirun or srun put there, fit to start a task or a launcher.

    Args:
        environ: An environment, possibly a rank's.
        flavor: The launcher to be started; of srun's, only the names are kept that it needs.
    """
    is_rank = any(name in environ for name in _RANK)

    def stays(name: str) -> bool:
        if flavor is Flavor.SRUN and name.startswith(("SLURM_", "SRUN_")):
            return _SRUN_KEEPS.match(name) is not None
        return not _INJECTED.match(name) or (not is_rank and _TUNING.match(name) is not None)

    return {name: value for name, value in environ.items() if stays(name)}


def environ_on_node(environ: Mapping[str, str], node: Node) -> dict[str, str]:
    """Return a Slurm job's environment as a task should see it that has a share of one node.

    An mpirun within the task reads it and starts its ranks there, and not on the job's first nodes; Hydra would
    still ask srun for any node, so it is told to fork. srun itself cannot be told: it needs `-w $SLURMD_NODENAME`.
    It takes nothing away from other tasks' srun, nor waits for them.

    Args:
        environ: As the launcher's tasks start from it; returned as it is outside of Slurm.
        node: A real one.
    """
    if "SLURM_JOB_ID" not in environ:
        return dict(environ)
    names = dict.fromkeys(("SLURM_JOB_NODELIST", "SLURM_NODELIST"), node.name)
    counts = dict.fromkeys(("SLURM_JOB_NUM_NODES", "SLURM_NNODES"), "1")
    sizes = dict.fromkeys(("SLURM_JOB_CPUS_PER_NODE", "SLURM_TASKS_PER_NODE"), str(node.cores))
    hydra = dict.fromkeys(("HYDRA_LAUNCHER", "I_MPI_HYDRA_BOOTSTRAP"), "fork")
    return {**hydra, **environ, **names, **counts, **sizes, "SLURM_OVERLAP": "1"}


def environ_for(flavor: Flavor, *, is_root: bool) -> dict[str, str]:
    """Return what a launcher's command needs in its environment, besides the task's."""
    # As for srun itself: those that reach other nodes through it.
    return {"SLURM_OVERLAP": "1"} | _own_environ(flavor, is_root=is_root)


def _own_environ(flavor: Flavor, *, is_root: bool) -> dict[str, str]:
    match flavor:
        case Flavor.OPENMPI4 if is_root:
            return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        case Flavor.OPENMPI5 if is_root:
            return _own_environ(Flavor.OPENMPI4, is_root=True) | {
                "PRTE_ALLOW_RUN_AS_ROOT": "1",
                "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            }
        case Flavor.INTEL:
            # Otherwise a batch job's own layout wins over -ppn.
            return {"I_MPI_JOB_RESPECT_PROCESS_PLACEMENT": "off"}
        case _:
            return {}
