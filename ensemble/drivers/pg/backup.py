"""The file of a backup: compressed, private, there when it is whole and not before."""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from ensemble.drivers import wholefile
from ensemble.errors import EnsembleError, NotFoundError, UsageError

T = TypeVar("T")

#: Fast: rows compress well at any level, and the database waits meanwhile.
_LEVEL = 3
#: PostgreSQL can allocate no more than this for a row (MaxAllocSize); what is longer is no backup, but would fill
#: the memory.
LONGEST_ROW = 1 << 30


@contextmanager
def create(path: Path, *, force: bool = False) -> Iterator[Callable[[bytes], object]]:
    """Yield what to write a backup with; it is there under its name when the block has ended well.

    Mode 0600 whatever the umask. After an error there is nothing that was not there before.

    Args:
        path: Where; a symbolic link is followed.
        force: Replace the file that has this name.

    Raises:
        UsageError: There is such a file, or something that is no file.
        EnsembleError: It cannot be written.
    """
    place = Path(os.path.realpath(path))
    _refuse_existing(place, path, force=force)
    with _ours(f"cannot write {path}"):
        descriptor, partial = tempfile.mkstemp(prefix=f".{place.name[:200]}.", dir=place.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            packed = gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=_LEVEL)

            def write(data: bytes) -> None:
                # Here: to the connection that feeds it, an OSError would be one of its own.
                with _ours(f"cannot write {path}"):
                    packed.write(data)

            yield write
            with _ours(f"cannot write {path}"):
                packed.close()
                file.flush()
                os.fsync(file.fileno())
        with _ours(f"cannot write {path}"):
            _publish(Path(partial), place, path, force=force)
    finally:
        Path(partial).unlink(missing_ok=True)


@contextmanager
def read(path: Path) -> Iterator[Reader]:
    """Yield the lines of a backup.

    Raises:
        NotFoundError: There is no such file.
        EnsembleError: It cannot be read.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise EnsembleError(f"cannot read {path}: {error.strerror or error}") from error
    with file:
        yield Reader(file, str(path))


class Reader:
    """A compressed file, line by line; whatever is wrong with it is one clear error."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self._file = gzip.GzipFile(fileobj=file, mode="rb")
        self._has_begun = False

    def readline(self, limit: int, /) -> bytes:
        """Return the next line, or its first *limit* bytes; nothing at the end."""
        return self._read(lambda: self._file.readline(limit))

    def readlines(self, hint: int, /) -> list[bytes]:
        """Return the next lines, of about *hint* bytes together."""
        return self._read(lambda: self._lines(hint))

    def _lines(self, hint: int) -> list[bytes]:
        lines, size = [], 0
        while size < hint and (line := self._file.readline(LONGEST_ROW)):
            if len(line) == LONGEST_ROW:
                raise EnsembleError(
                    f"{self.name} is damaged (a row without an end): use another backup"
                )
            lines.append(line)
            size += len(line)
        return lines

    def _read(self, step: Callable[[], T]) -> T:
        try:
            found = step()
        except EOFError:
            raise EnsembleError(f"{self.name} is cut off: use another backup") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            if not self._has_begun:
                raise EnsembleError(
                    f"{self.name} is not a backup of Ensemble (ensemble db backup makes them)"
                ) from error
            raise EnsembleError(f"{self.name} is damaged ({error}): use another backup") from error
        except OSError as error:
            raise EnsembleError(f"cannot read {self.name}: {error.strerror or error}") from error
        self._has_begun = True
        return found


def _refuse_existing(place: Path, named: Path, *, force: bool) -> None:
    if not os.path.lexists(place):
        return
    if not place.is_file():
        raise UsageError(f"{named} is not a file: name one that is to be made")
    if not force:
        raise UsageError(f"{named} exists: name another file, or replace it with --force")


def _publish(partial: Path, place: Path, named: Path, *, force: bool) -> None:
    if force:
        partial.replace(place)
    else:
        try:
            os.link(partial, place)  # unlike a renaming, it replaces nothing
        except FileExistsError:
            _refuse_existing(place, named, force=False)
            raise
        except OSError:  # a file system without hard links
            _refuse_existing(place, named, force=False)
            partial.replace(place)
    wholefile.sync_folder(place.parent)


@contextmanager
def _ours(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnsembleError(
            f"{what}: {error.strerror or error}; nothing of it was left behind"
        ) from error
