#!/bin/bash
#SBATCH --nodes={{ nodes }}
#SBATCH --time={{ minutes|hms }}
#SBATCH --partition={{ queue or "standard-g" }}
{% if project %}
#SBATCH --account={{ project }}
{% endif %}
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --no-requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
# LUMI-G at CSC: a GPU is half a card. A project is required (project_465...). Whole nodes, also in partitions
# that share them.
# --no-requeue: a job that is started anew would find its launcher gone and its tasks taken over.
# --no-kill: a node that fails must not end the job on the others.

umask 077
cd {{ site }} || exit 97

# Yours: what your tasks need. They start in the environment that this script leaves behind.
# module load LUMI partition/G ...
# source /path/to/environment/bin/activate

# At the end of PATH it hides nothing: tasks find `ensemble`.
export PATH="$PATH":{{ path }}

exec {{ launch }}
