"""Measurements: ratios within one run, printed as a table and kept as JSON. Nothing is asserted.

python -m bench            everything
python -m bench kill adds  some of it
"""

from __future__ import annotations
