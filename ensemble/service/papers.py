"""What a launcher keeps for its pilots, beside the spools: removed by whoever closes its lease when it is gone."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ensemble.drivers import roll


def folder(spools: Path, launcher_id: int) -> Path:
    """Return where a launcher of the site with these spools has its papers."""
    return spools.parent / f"launcher-{launcher_id}"


def remove_link(papers: Path) -> None:
    """Remove what pilots join by, a key among it: nobody will answer there any more."""
    with contextlib.suppress(OSError):
        (papers / "link.json").unlink()


def remove(papers: Path) -> None:
    """Remove the link and the roll, which nobody needs once the lease is closed."""
    remove_link(papers)
    roll.remove(papers)
