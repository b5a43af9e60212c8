"""Keeps it running: the launcher and what daemons share."""

from __future__ import annotations
