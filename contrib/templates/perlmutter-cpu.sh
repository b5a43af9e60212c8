#!/bin/bash
#SBATCH --nodes={{ nodes }}
#SBATCH --time={{ minutes|hms }}
#SBATCH --constraint=cpu
{% if project %}
#SBATCH --account={{ project }}
{% endif %}
{% if queue %}
#SBATCH --qos={{ queue }}
{% endif %}
#SBATCH --exclusive
#SBATCH --no-requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
# Perlmutter at NERSC, CPU nodes. A queue is a quality of service there; without one, jobs go to `debug`.
# Where your tasks read a file system that may be down: #SBATCH --licenses=scratch,cfs
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
