"""The service in the background: starting it, and stopping it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from ensemble import batch
from ensemble.core.batchjob import Service
from ensemble.core.jobs import Jobs
from ensemble.core.store import Store
from ensemble.drivers import output, process
from ensemble.errors import EnsembleError, NotFoundError
from ensemble.service import runtime
from ensemble.site import Site, program

_START_S = 30.0
_STOP_S = 120.0
_LOOK_S = 0.1


async def start(site: Site, *, is_debug: bool) -> str:
    """Start the service of a site in the background; return a line that says where it is.

    Raises:
        EnsembleError: It ended at once; says why.
    """
    batch.find_system(site)  # what is wrong here, is better said here
    log_path = site.path / "log" / "serve.log"
    try:
        log_path.parent.mkdir(exist_ok=True)
        log_path.open("a").close()
    except OSError as error:
        raise EnsembleError(f"cannot write {log_path}: {error.strerror}") from error
    words = ["serve", f"--log-file={log_path}", *(["--debug"] if is_debug else [])]
    async with _connected(site) as jobs:
        pid = process.start_daemon(program(str(site.path), *words), log_path)
        deadline = runtime.boottime_s() + _START_S
        while runtime.boottime_s() < deadline:
            found = await jobs.service()
            if found.pid == pid and found.host == os.uname().nodename and found.stopped_at is None:
                return f"the service runs: pid {pid} on {found.host}, log {log_path} (ensemble serve --stop)"
            if not process.is_child_running(pid):
                last = output.tail(log_path, 1)
                raise EnsembleError(f"the service did not start: {_message(last)}")
            await asyncio.sleep(_LOOK_S)
        os.kill(pid, signal.SIGKILL)  # our child: the number is its own
        raise EnsembleError(f"the service did not start within {_START_S:g} s: see {log_path}")


async def stop(site: Site) -> str:
    """Stop the service of a site.

    Raises:
        NotFoundError: None runs.
        EnsembleError: It runs on another host, or does not end.
    """
    async with _connected(site) as jobs:
        found = await jobs.service()
        if not found.is_running or found.pid is None:
            raise NotFoundError("no service runs here (ensemble serve)")
        here = os.uname().nodename
        if found.host != here:
            raise EnsembleError(
                f"the service runs on {found.host}, this is {here}: ssh {found.host} kill {found.pid}"
            )
        if not _is_service(found):
            raise NotFoundError(
                f"the service is gone: no process {found.pid} of it (ensemble serve)"
            )
        os.kill(found.pid, signal.SIGTERM)
        deadline = runtime.boottime_s() + _STOP_S
        while runtime.boottime_s() < deadline:
            if (await jobs.service()).stopped_at is not None or not _is_service(found):
                return f"the service, pid {found.pid}, has stopped"
            await asyncio.sleep(_LOOK_S)
        raise EnsembleError(f"the service, pid {found.pid}, has not ended after {_STOP_S:g} s")


def _is_service(found: Service) -> bool:
    """Tell whether the process of its number is it: the number may have passed to another."""
    try:
        words = Path(f"/proc/{found.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"serve" in words and any(os.path.basename(word) == b"ensemble" for word in words)


def _message(line: str) -> str:
    """Return what a line of the log says."""
    try:
        return str(msgspec.json.decode(line)["error"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return line.removeprefix("error: ") or "it left no word"


@asynccontextmanager
async def _connected(site: Site) -> AsyncIterator[Jobs]:
    store = await Store.open(site.address(), name="ensemble serve", max_size=1)
    try:
        yield Jobs(store.pool)
    finally:
        await store.close()
