"""Files that are there whole, under their name, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def create(path: Path, *, mode: int = 0o600, is_durable: bool = False) -> Iterator[BinaryIO]:
    """Yield what becomes *path* when the block has ended well; after an error nothing of it is left.

    For one writer at a time: the draft beside it is `NAME.draft`, and one that was left there goes.

    Args:
        mode: Whatever the umask; it may also take the owner's rights.
        is_durable: Whether it must survive a crash of the machine from then on.

    Raises:
        OSError: It cannot be written; what had that name before is untouched.
    """
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            yield file
            if is_durable:
                file.flush()
                os.fsync(fd)
        draft.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    if is_durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let the names in a directory, too, survive a crash; not every file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
