#!/bin/bash
# flux: --nodes={{ nodes }}
# flux: --exclusive
# flux: --time-limit={{ minutes }}m
{% if project %}
# flux: --bank={{ project }}
{% endif %}
{% if queue %}
# flux: --queue={{ queue }}
{% endif %}
# Any Flux instance, also a user's own.

umask 077
cd {{ site }} || exit 97

# Yours: what your tasks need. They start in the environment that this script leaves behind.
# module load ...
# source /path/to/environment/bin/activate

# At the end of PATH it hides nothing: tasks find `ensemble`.
export PATH="$PATH":{{ path }}

exec {{ launch }}
