#!/bin/bash -l
#PBS -l select={{ nodes }}
#PBS -l place=scatter
#PBS -l walltime={{ minutes|hms }}
#PBS -l filesystems=home:flare
#PBS -k doe
#PBS -r n
#PBS -j oe
{% if project %}
#PBS -A {{ project }}
{% endif %}
{% if queue %}
#PBS -q {{ queue }}
{% endif %}
# Aurora at ALCF. Yours: in `filesystems`, those that your tasks use, all of them (DAOS is daos_user). A
# project is required. Submit from a project's directory, not from your home.

# PBS sets it to the cores that were asked for; each task is to have its own number.
unset OMP_NUM_THREADS

umask 077
cd {{ site }} || exit 97

# Yours: what your tasks need. They start in the environment that this script leaves behind.
# module use /soft/modulefiles; module load ...
# export http_proxy=http://proxy.alcf.anl.gov:3128 https_proxy=http://proxy.alcf.anl.gov:3128
# source /path/to/environment/bin/activate

# At the end of PATH it hides nothing: tasks find `ensemble`.
export PATH="$PATH":{{ path }}

exec {{ launch }}
