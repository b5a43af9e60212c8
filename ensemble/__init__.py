"""Ensemble: run ensembles of programs from one durable queue, on laptops and supercomputers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensemble.api import Client, connect
    from ensemble.core.model import NewApp, NewTask

__version__ = "0.1.0"
__all__ = ["Client", "NewApp", "NewTask", "__version__", "connect"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import ensemble` and `ensemble --help` do not pay for the database driver.
    if name in {"Client", "connect"}:
        from ensemble import api

        return getattr(api, name)
    if name in {"NewApp", "NewTask"}:
        from ensemble.core import model

        return getattr(model, name)
    raise AttributeError(f"module 'ensemble' has no attribute {name!r}")
