"""Spools: what a launcher could not report before it had to leave, for whoever reaps its lease.

One file a lease, `SITE/log/spool/lease-ID.jsonl`: a JSON line that says whose it is and how much follows, then a line
for each start, then one for each end. It appears whole or not at all. It stands for all that a launcher has left to
say, whose tasks have all ended: replayed by anybody, it reports them, closes the lease, and is removed. All of that
may happen twice, or stop anywhere in the middle: the store tells what it knows already (`Verdict.DUPLICATE`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from ensemble.core.database import storable
from ensemble.core.leases import Lease, Reaping, Verdicts
from ensemble.core.model import End, Outcome, Start, Verdict
from ensemble.core.store import Store
from ensemble.drivers import wholefile
from ensemble.errors import EnsembleError, StoreUnavailableError
from ensemble.log import get_logger
from ensemble.service import papers

if TYPE_CHECKING:
    from ensemble.log import Logger

VERSION = 1
#: What all texts of a spool may take together, and one of them, in characters.
_TEXTS = 64 << 20
_TEXT = 16384
#: A larger file is none of ours.
_LARGEST = 512 << 20
_LAST_YEAR = 9999
_BATCH = 1000
#: Rows that somebody's open transaction has locked are tried again so often, so long after.
_TRIES = 3
#: For how long to wait for an answer: the end of a task with millions of children takes minutes.
_PATIENCE_S = 3600.0
_BUSY_S = 0.5

_NAME = re.compile(r"lease-([1-9]\d{0,17})\.jsonl")
Report = TypeVar("Report", Start, End)


class SpoolError(EnsembleError):
    """A file is no spool that this program can read, or is not of this site."""


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """Whose spool it is: the first line."""

    #: Tells its lease from others with the same number (`Lease.mark`).
    mark: str
    lease_id: int
    launcher_id: int
    #: Why the launcher left.
    reason: str
    starts: int = 0
    ends: int = 0
    version: int = VERSION


class Spool(msgspec.Struct, frozen=True, kw_only=True):
    """A spool's content."""

    head: Head
    starts: list[Start]
    ends: list[End]


class _Version(msgspec.Struct, frozen=True):
    version: int


def folder(site: Path) -> Path:
    """Return where a site keeps its spools."""
    return site / "log" / "spool"


# ---------------------------------------------------------------------------- the file


def write(
    directory: Path, head: Head, starts: Sequence[Start], ends: Sequence[End], *, now: datetime
) -> Path:
    """Write a spool, or nothing; return where it is. Long texts lose their beginning.

    Args:
        now: When ended what does not say.

    Raises:
        OSError: It cannot be written; the disk is full, for one.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / f"lease-{head.lease_id}.jsonl"
    head = msgspec.structs.replace(
        head, starts=len(starts), ends=len(ends), reason=storable(head.reason[:_TEXT])
    )
    limit = min(_TEXT, max(_TEXTS // max(3 * len(ends), 1), 1))
    with wholefile.create(path, is_durable=True) as file:
        for line in (head, *starts, *(_shorten(end, limit, now) for end in ends)):
            file.write(msgspec.json.encode(line) + b"\n")
    return path


def _shorten(end: End, limit: int, now: datetime) -> End:
    reason, error, output = (
        None if text is None else storable(text[-limit:])
        for text in (end.reason, end.error, end.output)
    )
    return msgspec.structs.replace(end, at=end.at or now, reason=reason, error=error, output=output)


def find(directory: Path) -> dict[int, Path]:
    """Return the spools that are there, by lease; none where the directory is out of sight.

    By listing: over NFS, a name that was not there a moment ago may go on being missed, but whoever opens a
    directory sees what is in it (nfs(5), close-to-open consistency).

    Raises:
        OSError: Nobody can tell which are there; not for now, at least.
    """
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {int(match[1]): directory / match[0] for match in map(_NAME.fullmatch, names) if match}


def read(path: Path) -> Spool:
    """Read a spool.

    Raises:
        SpoolError: It is torn, of another version, or none at all.
        OSError: It cannot be read.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise SpoolError("it is no regular file")
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise SpoolError("it is too large")
    return parse(data)


def parse(data: bytes) -> Spool:
    """Read a spool's content.

    Raises:
        SpoolError: It is torn, of another version, or none at all.
    """
    lines = data.split(b"\n")
    try:
        version = msgspec.json.decode(lines[0], type=_Version).version
        if version != VERSION:
            raise SpoolError(f"it has version {version}; this program reads version {VERSION}")
        head = msgspec.json.decode(lines[0], type=Head)
        if (
            lines.pop()
            or len(lines) != 1 + head.starts + head.ends
            or min(head.starts, head.ends) < 0
        ):
            raise SpoolError("it is not complete")
        if "\0" in head.reason or len(head.reason) > _TEXT:
            raise SpoolError("its reason is no text that it could have")
        split = 1 + head.starts
        starts = [_checked(msgspec.json.decode(line, type=Start)) for line in lines[1:split]]
        ends = [_checked(msgspec.json.decode(line, type=End)) for line in lines[split:]]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SpoolError(f"it is no spool: {error}") from error
    return Spool(head=head, starts=starts, ends=ends)


def _checked(report: Report) -> Report:
    """Refuse what the store's columns cannot hold."""
    times: list[datetime | None] = [report.at]
    texts, code = list(report.nodes), 0
    if isinstance(report, End):
        times.append(report.started_at)
        texts += [report.reason or "", report.error or "", report.output or ""]
        code = report.exit_code or 0
    if (
        not (0 < report.id < 2**63 and 0 < report.attempt < 2**31 and abs(code) < 2**31)
        or any(
            at is not None and (at.tzinfo is None or not 1 < at.year < _LAST_YEAR) for at in times
        )
        or any(len(text) > _TEXT for text in texts)
        or "\0" in "".join(report.nodes)
    ):
        raise ValueError(f"a report on task {report.id} holds what no report can")
    return report


# ---------------------------------------------------------------------------- replaying


async def replay(store: Store, directory: Path, *, spare: Container[int] = ()) -> set[int]:
    """Report what is in a site's spools, close their leases and remove them.

    What is no spool, or is another site's, is set aside: renamed to `….bad`.

    Args:
        spare: Leases whose spools are left alone.

    Returns:
        Leases that must not be closed yet: somebody's open transaction has locked a task of theirs, their spool could
        not be read, or the store had no answer.

    Raises:
        OSError: The spools cannot be listed: no lease may be closed yet.
    """
    found = await asyncio.to_thread(find, directory)
    return {
        lease_id
        for lease_id, path in found.items()
        if lease_id not in spare and not await _replay(store, lease_id, path)
    }


async def _replay(store: Store, lease_id: int, path: Path) -> bool:
    log = get_logger(lease=lease_id, spool=str(path))
    try:
        spool = await asyncio.to_thread(read, path)
        lease = Lease(store.pool, lease_id, await _find_launcher(store, spool.head, lease_id))
        started = await _report(lease.start, spool.starts)
        busy = {pair for pair, verdict in started.items() if verdict is Verdict.BUSY}
        ends = [end for end in spool.ends if (end.id, end.attempt) not in busy]
        verdicts = await _report(partial(lease.finish, timeout_s=_PATIENCE_S), ends)
        if busy or Verdict.BUSY in verdicts.values():
            log.warning("spool.busy", hint="an open transaction has locked tasks; tried again soon")
            return False
        await lease.close(f"{spool.head.reason}; its last reports were in its spool")
        await asyncio.to_thread(papers.remove, papers.folder(path.parent, lease.launcher_id))
    except FileNotFoundError:
        return True  # somebody else was first
    except StoreUnavailableError as error:
        log.warning("spool.not_recorded", error=str(error), hint="it is tried again soon")
        return False
    except OSError as error:
        log.warning("spool.not_read", error=str(error), hint="its lease stays open until it can")
        return False
    except EnsembleError as error:
        with contextlib.suppress(OSError):
            await asyncio.to_thread(path.rename, path.with_name(f"{path.name}.bad"))
        log.warning("spool.set_aside", why=str(error))
        return True
    with contextlib.suppress(OSError):
        await asyncio.to_thread(path.unlink)
    _tell(log, ends, verdicts)
    await store.ring()
    return True


async def _find_launcher(store: Store, head: Head, lease_id: int) -> int:
    mark, launcher_id = await Reaping(store.pool).find_launcher(lease_id)
    if launcher_id is None or (head.lease_id, head.mark, head.launcher_id) != (
        lease_id,
        mark,
        launcher_id,
    ):
        raise SpoolError(f"it is of another site's lease, or not of lease {lease_id}")
    return launcher_id


async def _report(
    report: Callable[[Sequence[Report]], Awaitable[Verdicts]], reports: Sequence[Report]
) -> Verdicts:
    verdicts: Verdicts = {}
    waiting = sorted(reports, key=lambda each: each.id)
    for tries in range(_TRIES):
        await asyncio.sleep(_BUSY_S if tries else 0)
        for first in range(0, len(waiting), _BATCH):
            verdicts |= await report(waiting[first : first + _BATCH])
        waiting = [
            each for each in waiting if verdicts.get((each.id, each.attempt)) is Verdict.BUSY
        ]
        if not waiting:
            break
    return verdicts


def _tell(log: Logger, ends: Sequence[End], verdicts: Verdicts) -> None:
    counts = Counter(verdicts.values())
    log.info("spool.read", applied=counts[Verdict.APPLIED], known=counts[Verdict.DUPLICATE])
    # An attempt that was reported lost is recorded as lost, whoever did that.
    refused = sum(
        verdicts.get((end.id, end.attempt)) in (Verdict.FENCED, Verdict.MISSING)
        for end in ends
        if end.outcome is not Outcome.LOST
    )
    if refused:
        log.warning(
            "spool.refused",
            reports=refused,
            why="their lease was closed before, or their tasks removed",
        )
