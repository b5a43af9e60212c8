#!/bin/bash
#SBATCH --nodes={{ nodes }}
#SBATCH --time={{ minutes|hms }}
#SBATCH --partition={{ queue or "batch" }}
#SBATCH --gpus-per-node=8
{% if project %}
#SBATCH --account={{ project }}
{% endif %}
#SBATCH --no-requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
# Frontier at OLCF. A project is required. Nodes are never shared. For tasks on the nodes' own disks:
# #SBATCH --constraint=nvme. For many short MPI launches, where Slurm is new enough: #SBATCH --stepmgr.
# --no-requeue: a job that is started anew would find its launcher gone and its tasks taken over.
# --no-kill: a node that fails must not end the job on the others.

umask 077
cd {{ site }} || exit 97

# Yours: what your tasks need. They start in the environment that this script leaves behind.
# module load ...
# source /path/to/environment/bin/activate

# At the end of PATH it hides nothing: tasks find `ensemble`.
export PATH="$PATH":{{ path }}

exec {{ launch }}
