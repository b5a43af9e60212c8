"""Every table and every JSON document of the command line."""

from __future__ import annotations
