"""The soak's launchers: each is followed by another when it ends, until the fleet is told to rest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ensemble.site import program
from tests.faults.soaking.ground import Ground, Process


@dataclass
class Berth:
    """A place that always has a launcher, or another command."""

    name: str
    words: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)
    #: No signal hits what runs here, but the database may fail: what it needs over time is measured.
    is_steady: bool = False
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    starts_at: float = 0.0


def berths(proxied: Mapping[str, str]) -> list[Berth]:
    """Return the fleet: both modes, beside the database and through a proxy, and the service.

    Args:
        proxied: The variables that lead a launcher through the proxy.
    """
    serial, mpi = ("launch", "--job-mode=serial"), ("launch", "--job-mode=mpi")
    stays = "--persistent"
    return [
        Berth("steady", (*serial, "--nodes=1", "--slots-per-node=4", stays), is_steady=True),
        Berth("serial", (*serial, "--nodes=2", "--slots-per-node=4", stays)),
        Berth("serial-proxied", (*serial, "--nodes=1", "--slots-per-node=4", stays), proxied),
        Berth("mpi", (*mpi, "--nodes=3", stays)),
        Berth("mpi-proxied", (*mpi, "--nodes=2", stays), proxied),
        Berth("service", ("serve",)),
    ]


class Fleet:
    """All launchers, and the service."""

    def __init__(self, ground: Ground, fleet: Sequence[Berth], rng: random.Random) -> None:
        self.ground = ground
        self.berths = fleet
        self._rng = rng
        self._rests = False

    async def keep(self) -> None:
        """Start what is not there, and start it again when it has ended, for ever."""
        while not self._rests:
            for berth in self.berths:
                self._look(berth)
            await asyncio.sleep(0.1)

    def _look(self, berth: Berth) -> None:
        if berth.process is not None and berth.process.poll() is not None:
            berth.process = None
            berth.starts_at = time.monotonic() + self._rng.uniform(0, 1.5)
        if berth.process is None and time.monotonic() >= berth.starts_at:
            berth.starts += 1
            log = self.ground.path / "log" / f"{berth.name}-{berth.starts}.log"
            berth.process = self._start(berth, log)

    def _start(self, berth: Berth, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return subprocess.Popen(
                program(str(self.ground.path), *berth.words),
                cwd=self.ground.path,
                env={**os.environ, **berth.environ},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def targets(self) -> list[Process]:
        """Return what faults may hit: everything but the database and the steady launcher's machinery."""
        found = self.ground.processes()
        spared = {berth.process.pid for berth in self.berths if berth.is_steady and berth.process}
        for _ in range(8):  # as deep as mpirun's proxies and the pilots below them
            spared |= {each.pid for each in found if each.ppid in spared}
        return [
            each
            for each in found
            if each.role != "postgres" and (each.pid not in spared or each.role == "task")
        ]

    async def rest(self, *, within_s: float) -> list[Process]:
        """Have all leave in good order; return what has not ended by then."""
        self._rests = True
        end = time.monotonic() + within_s
        for berth in sorted(self.berths, key=lambda berth: berth.name != "service"):
            if berth.process is not None:
                with contextlib.suppress(OSError):
                    berth.process.send_signal(signal.SIGTERM)
        asked: set[int] = set()
        while time.monotonic() < end:
            left = self.ground.workers()
            ended = [berth.process.poll() for berth in self.berths if berth.process]
            if not left and None not in ended:
                return []
            # Those of batch jobs, of which some start only now.
            for each in left:
                if each.role == "guard of launcher" and each.pid not in asked:
                    asked.add(each.pid)
                    each.send(signal.SIGTERM)
            await asyncio.sleep(0.2)
        return self.ground.workers()

    def end(self) -> None:
        """End without ceremony what was started here and has not ended."""
        self._rests = True
        for berth in self.berths:
            if berth.process is not None:
                berth.process.kill()
                berth.process.wait()
