#!/bin/bash
#COBALT -n {{ nodes }}
#COBALT -t {{ minutes }}
{% if project %}
#COBALT -A {{ project }}
{% endif %}
{% if queue %}
#COBALT -q {{ queue }}
{% endif %}
# Any Cobalt; it wants an executable script, and minutes.

umask 077
cd {{ site }} || exit 97

# Yours: what your tasks need. They start in the environment that this script leaves behind.
# module load ...
# source /path/to/environment/bin/activate

# At the end of PATH it hides nothing: tasks find `ensemble`.
export PATH="$PATH":{{ path }}

exec {{ launch }}
