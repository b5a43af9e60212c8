from __future__ import annotations

from ensemble.drivers import mpienv
from ensemble.drivers.mpiline import Flavor

RANK = {
    "PATH": "/bin", "OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_ess": "pmi", "PMIX_RANK": "0", "OPAL_PREFIX": "/x",
    "PMI_FD": "5", "HYDI_CONTROL_FD": "4", "MPI_LOCALRANKID": "0", "SLURM_PROCID": "0", "SLURM_STEP_ID": "1",
    "SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "PALS_RANKID": "1", "FLUX_JOB_ID": "1", "FLUX_URI": "u",
}  # fmt: skip


def test_what_a_launcher_injected_is_removed():
    assert mpienv.clean_environ(RANK) == {
        "PATH": "/bin", "SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "FLUX_URI": "u",
    }  # fmt: skip


def test_settings_stay_where_nothing_was_injected():
    module = {"OMPI_MCA_btl": "tcp", "OPAL_PREFIX": "/opt/x", "I_MPI_HYDRA_BOOTSTRAP": "ssh"}
    assert mpienv.clean_environ(module) == module
    assert mpienv.clean_environ(module | {"PMI_RANK": "0"}) == {}
    assert mpienv.clean_environ({"OMPI_COMM_WORLD_SIZE": "2", "PMI_SIZE": "2"}) == {}


def test_srun_gets_only_what_names_the_job():
    batch = {
        "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "h[1-2]", "SLURM_CONF": "/etc/s", "SLURM_MEM_PER_NODE": "1",
        "SLURM_NTASKS": "4", "SLURM_CPU_BIND": "none", "SRUN_CPUS_PER_TASK": "2", "HOME": "/h",
    }  # fmt: skip
    assert set(mpienv.clean_environ(batch, Flavor.SRUN)) == {
        "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_CONF", "HOME",
    }  # fmt: skip


def test_environ_for():
    assert mpienv.environ_for(Flavor.OPENMPI4, is_root=False) == {"SLURM_OVERLAP": "1"}
    assert set(mpienv.environ_for(Flavor.OPENMPI4, is_root=True)) == {
        "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "SLURM_OVERLAP",
    }  # fmt: skip
    assert "PRTE_ALLOW_RUN_AS_ROOT" in mpienv.environ_for(Flavor.OPENMPI5, is_root=True)
    assert mpienv.environ_for(Flavor.SRUN, is_root=True) == {"SLURM_OVERLAP": "1"}
