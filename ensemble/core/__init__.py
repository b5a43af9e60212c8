"""Decides and remembers: pure decisions over plain values, and the store."""

from __future__ import annotations
