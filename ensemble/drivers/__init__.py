"""Touches the machine: processes, nodes, MPI launchers, PostgreSQL clusters."""

from __future__ import annotations
