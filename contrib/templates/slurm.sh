#!/bin/bash
#SBATCH --nodes={{ nodes }}
#SBATCH --time={{ minutes|hms }}
{% if project %}
#SBATCH --account={{ project }}
{% endif %}
{% if queue %}
#SBATCH --partition={{ queue }}
{% endif %}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --no-requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
# Any Slurm. Whole nodes with all of their memory; where `queue` is to be a quality of service, write
# --qos= for --partition=. Nodes with GPUs often want #SBATCH --gpus-per-node=N too.
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
