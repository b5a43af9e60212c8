#!/bin/bash
#PBS -S /bin/bash
#PBS -l select={{ nodes }}
#PBS -l place=scatter:excl
#PBS -l walltime={{ minutes|hms }}
{% if project %}
#PBS -A {{ project }}
{% endif %}
{% if queue %}
#PBS -q {{ queue }}
{% endif %}
#PBS -r n
#PBS -j oe
# Any OpenPBS or PBS Professional. Keep directives together, above all else. Where jobs are confined to what
# they ask for, ask for all that a node has: select=...:ncpus=64:ngpus=4.
# -r n: a job that is started anew would find its launcher gone and its tasks taken over.

# PBS sets it to the cores that were asked for; each task is to have its own number.
unset OMP_NUM_THREADS

umask 077
cd {{ site }} || exit 97

# Yours: what your tasks need. They start in the environment that this script leaves behind.
# module load ...
# source /path/to/environment/bin/activate

# At the end of PATH it hides nothing: tasks find `ensemble`.
export PATH="$PATH":{{ path }}

exec {{ launch }}
