"""Measurements: ratios within one run, printed as a table and kept as JSON. Nothing is asserted.

python -m bench            everything
python -m bench kill add   some of it
python -m bench.peers      serial mode beside other programs that run programs; by hand
"""

from __future__ import annotations
