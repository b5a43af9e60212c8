"""The parts of a private PostgreSQL cluster; `drivers/postgres.py` puts them together."""

from __future__ import annotations
