"""Other ways to run many programs on one machine, measured beside Ensemble's serial mode.

python -m bench.peers                     everything (some minutes); installs the peers it can
python -m bench.peers --only xargs parsl  some of them
"""

from __future__ import annotations
