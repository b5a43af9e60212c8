#!/bin/bash
#$ -S /bin/bash
{% if nodes > 1 %}
#$ -pe mpi {{ nodes }}
{% endif %}
#$ -l h_rt={{ minutes|hms }}
#$ -l s_rt={{ (minutes - 2 if minutes > 4 else minutes / 2)|hms }}
{% if project %}
#$ -P {{ project }}
{% endif %}
{% if queue %}
#$ -q {{ queue }}
{% endif %}
#$ -notify
#$ -r n
#$ -j y
# Any Grid Engine. `mpi` stands for a parallel environment of one slot per host (allocation_rule 1; qconf -spl
# lists them). Where hosts are shared, ask for whole ones in the way of the site, often -l exclusive=true.
# -notify, s_rt: without them the job is killed without a word before; with them the launcher leaves in time.

umask 077
cd {{ site }} || exit 97

# Yours: what your tasks need. They start in the environment that this script leaves behind.
# module load ...
# source /path/to/environment/bin/activate

# At the end of PATH it hides nothing: tasks find `ensemble`.
export PATH="$PATH":{{ path }}

exec {{ launch }}
