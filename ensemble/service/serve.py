"""`ensemble serve`: the daemon of the login node. It keeps the batch queue filled and does the housekeeping.

It is never in the data path: while it is away, launchers go on claiming, finishing and killing.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ensemble import batch, config, log
from ensemble.core import listener
from ensemble.core.backoff import Backoff
from ensemble.core.jobs import Jobs, ServiceLock
from ensemble.core.listener import Listener
from ensemble.core.store import Store
from ensemble.errors import ClusterError, EnsembleError, StoreUnavailableError, TakenError
from ensemble.service import runtime, spool
from ensemble.service.filler import Decider, Filler, Picture
from ensemble.service.look import Lookout
from ensemble.service.reaper import reap
from ensemble.site import Site

#: Lost launchers are looked for this often.
_REAP_S = 30.0
#: The lock's session is used this often, so that the service learns that it has lost it.
_BEAT_S = 5.0
#: Rounds that a ring asks for come no closer together than this part of a period.
_RING_PART = 12

#: What changes whenever a file does; None of one that cannot be looked at.
_Stamp = tuple[int, int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The flags of `ensemble serve`."""

    #: One round, then leave.
    is_once: bool = False
    debug: bool = False
    #: Write JSON lines here instead of console lines to standard error.
    log_file: Path | None = None


def main(site: Site, options: ServeOptions) -> int:
    """Run the service until it is told to stop; return its exit status."""
    stream = None
    if options.log_file is not None:
        options.log_file.parent.mkdir(exist_ok=True)
        stream = options.log_file.open("a", buffering=1)
    log.configure(as_json=stream is not None, debug=options.debug, stream=stream)
    try:
        return runtime.run(_serve(site, options))
    except EnsembleError as error:
        if stream is None:
            raise
        log.get_logger().error("service.failed", error=str(error))
        return error.exit_code
    finally:
        if stream is not None:
            stream.close()


async def preview(site: Site) -> Picture:
    """Return what the service would do now, and why; nothing is changed."""
    store = await Store.open(site.address(), name="ensemble serve --dry-run", max_size=2)
    try:
        return await Decider(store, Jobs(store.pool), site.settings).decide()
    finally:
        await store.close()


async def _serve(site: Site, options: ServeOptions) -> int:
    batch.find_system(site)  # what is wrong here, is better said before anything is done
    store = await Store.open(site.address(), name="ensemble service", max_size=4)
    try:
        service = Service(site=site, store=store, lock=await _lock(site))
        if options.is_once:
            await service.once()
            return 0
        return await service.run()
    finally:
        await store.close()


def _make_filler(site: Site, store: Store) -> Filler:
    jobs, system = Jobs(store.pool), batch.find_system(site)
    return Filler(
        decider=Decider(store, jobs, site.settings),
        jobs=jobs,
        lookout=Lookout(jobs, system, site.settings.service),
        submitter=batch.Submitter(site, jobs, system),
        settings=site.settings,
    )


async def _lock(site: Site) -> ServiceLock:
    return await ServiceLock.acquire(
        site.address(),
        host=os.uname().nodename,
        pid=os.getpid(),
        period_s=site.settings.service.period_s,
    )


class Service:
    """The service while it holds its lock, and while it tries to get it back."""

    def __init__(self, *, site: Site, store: Store, lock: ServiceLock) -> None:
        self._site = site
        self._store = store
        self._lock: ServiceLock | None = lock
        self._filler = _make_filler(site, store)
        self._stamp: _Stamp = None
        self._log = log.get_logger()
        self._stop = asyncio.Event()
        self._rang = asyncio.Event()
        self._is_in_doubt = asyncio.Event()
        self._failure: EnsembleError | None = None
        self._filling: asyncio.Task[None] | None = None

    async def once(self) -> None:
        """Do one round and leave."""
        assert self._lock is not None
        try:
            await reap(self._store, spool.folder(self._site.path))
            await self._filler.look()
            await self._filler.fill(self._lock.epoch)
        finally:
            await self._release()

    async def run(self) -> int:
        """Serve until a signal; return the exit status."""
        runtime.on_signals(self._on_signal)
        self._log.info(
            "service.started", site=str(self._site.path), queues=list(self._site.settings.queue)
        )
        if not self._site.settings.queue:
            self._log.warning(
                "service.no_queues", hint="nothing is submitted: add [queue.NAME] to ensemble.toml"
            )
        bell = Listener(self._store.address, [listener.WORK], self._on_ring)
        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(loop) for loop in (bell.run(), self._beat(), self._reap())]
            # To the end of what it does: a submission that is cut off is in doubt.
            self._filling = group.create_task(self._fill())
            await asyncio.wait([self._filling])
            for loop in loops:
                loop.cancel()
        await self._release()
        self._log.info("service.stopped")
        if self._failure is not None:
            raise self._failure
        return 0

    def _on_signal(self, name: str) -> None:
        self._log.info("service.stopping", signal=name)
        if self._stop.is_set() and self._filling is not None:
            self._filling.cancel()  # asked twice: not even the command that runs is waited for
        self._leave()

    def _leave(self) -> None:
        self._stop.set()
        self._rang.set()

    def _on_ring(self, _channel: str) -> None:
        self._rang.set()

    async def _release(self) -> None:
        if self._lock is None:
            return
        try:
            async with asyncio.timeout(5.0):
                await self._lock.release()
        except (StoreUnavailableError, TimeoutError):
            self._lock.drop()

    # ------------------------------------------------------------------ loops

    async def _fill(self) -> None:
        """Look every period; decide then, and soon after a ring; return when told to stop."""
        looked = -math.inf
        while not self._stop.is_set():
            await self._read_settings()
            period_s = self._site.settings.service.period_s
            is_due = runtime.boottime_s() - looked >= period_s
            if is_due:
                looked = runtime.boottime_s()
            await self._round(is_due=is_due)
            await runtime.until(self._stop, min(period_s / _RING_PART, 5.0))
            await runtime.until(self._rang, looked + period_s - runtime.boottime_s())
            self._rang.clear()

    async def _round(self, *, is_due: bool) -> None:
        if self._lock is None:
            return
        epoch = self._lock.epoch  # now: it may be lost during the look
        try:
            if is_due:
                await self._filler.look()
            if not self._stop.is_set():
                await self._filler.fill(epoch, stop=self._stop)
        except StoreUnavailableError as error:
            self._log.warning("store.lost", error=str(error))
            self._is_in_doubt.set()  # the lock may be lost, too
        except (EnsembleError, *runtime.SHORTAGE) as error:
            # What nobody has thought of must not end the service.
            self._log.error("round.failed", error=str(error))

    async def _read_settings(self) -> None:
        """Take over what was changed in ensemble.toml, but for [store]; what is wrong there is told once."""
        path = self._site.path
        try:
            stamp = await asyncio.to_thread(_stamp, path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            read = await asyncio.to_thread(config.load, path)
            settings = msgspec.structs.replace(read, store=self._site.settings.store)
            if settings == self._site.settings:
                return
            site = replace(self._site, settings=settings)
            self._filler = _make_filler(site, self._store)
        except EnsembleError as error:
            self._log.error(
                "settings.refused", error=str(error), hint="what was read before stays in force"
            )
            return
        except runtime.SHORTAGE as error:
            self._stamp = None  # it was not read: again in the next round
            self._log.warning("settings.not_read", error=str(error))
            return
        self._site = site
        self._log.info("settings.read", queues=list(settings.queue))

    async def _beat(self) -> None:
        """Keep the lock's session in use; get the lock back when the session is lost."""
        while True:
            await runtime.until(self._is_in_doubt, _BEAT_S)
            self._is_in_doubt.clear()
            try:
                if self._lock is not None and await self._lock.beat():
                    continue
                reason = "another service has taken over"
            except StoreUnavailableError as error:
                reason = str(error)
            self._log.warning("service.lock_lost", reason=reason)
            if self._lock is not None:
                self._lock.drop()
                self._lock = None
            await self._lock_again()

    async def _lock_again(self) -> None:
        backoff = Backoff(base_s=0.5, cap_s=10.0)
        while self._lock is None:
            try:
                self._lock = await _lock(self._site)
                self._log.info("service.lock_regained")
            except (StoreUnavailableError, ClusterError) as error:
                delay_s = backoff.fail()
                self._log.warning("store.lost", error=str(error), retry_s=delay_s)
                await asyncio.sleep(delay_s)
            except TakenError as error:
                if (error.host, error.pid) != (os.uname().nodename, os.getpid()):
                    self._failure = error
                    self._leave()
                    return
                await asyncio.sleep(1.0)  # our own lost session, which the server still keeps

    async def _reap(self) -> None:
        while True:
            try:
                await runtime.detached(reap(self._store, spool.folder(self._site.path)))
            except (StoreUnavailableError, *runtime.SHORTAGE) as error:
                self._log.warning("reap.failed", error=str(error))
            period_s = min(_REAP_S, self._site.settings.service.period_s)
            await asyncio.sleep(period_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter


def _stamp(site: Path) -> _Stamp:
    try:
        found = (site / config.SITE_FILE).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
