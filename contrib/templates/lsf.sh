#!/bin/bash
#BSUB -nnodes {{ nodes }}
#BSUB -W {{ minutes|hm }}
{% if project %}
#BSUB -P {{ project }}
{% endif %}
{% if queue %}
#BSUB -q {{ queue }}
{% endif %}
#BSUB -wa USR1
#BSUB -wt 2
#BSUB -rn
# LSF on machines of whole nodes. On others there is no -nnodes: for nodes of 32 cores, write
#   -n {{ nodes * 32 }} -R "span[ptile=32]" -x
# -wa, -wt: a word two minutes before the end, upon which the launcher leaves in good order.
# -rn: a job that is started anew would find its launcher gone and its tasks taken over.

umask 077
cd {{ site }} || exit 97

# Yours: what your tasks need. They start in the environment that this script leaves behind.
# module load ...
# source /path/to/environment/bin/activate

# At the end of PATH it hides nothing: tasks find `ensemble`.
export PATH="$PATH":{{ path }}

exec {{ launch }}
