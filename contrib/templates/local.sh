#!/bin/bash
#ENSEMBLE --nodes {{ nodes }} --time {{ minutes }}
# This machine: batch jobs are processes here, and their nodes are shares of it.

umask 077
cd {{ site }} || exit 97

# Yours: what your tasks need. They start in the environment that this script leaves behind.
# module load ...
# source /path/to/environment/bin/activate

# At the end of PATH it hides nothing: tasks find `ensemble`.
export PATH="$PATH":{{ path }}

exec {{ launch }}
