"""A machine of each scheduler: the fake one's commands, or the local scheduler's own; nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ensemble.core.batchjob import ACTIVE
from ensemble.drivers import batch
from ensemble.drivers.batch import BatchSystem
from ensemble.drivers.scheduler import Request, Scheduler, Seen

FAKE = Path(__file__).with_name("fakebatch.py")


@dataclass(kw_only=True)
class Machine:
    """A batch system and the directory of whoever pretends to be it."""

    kind: str
    path: Path
    scheduler: Scheduler
    environ: dict[str, str]
    eventually: Callable[..., Any]
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def state_path(self) -> Path:
        return self.path / "fake"

    def system(self, *, timeout_s: float = 30.0) -> BatchSystem:
        """A batch system that remembers nothing of an earlier one."""
        return BatchSystem(self.scheduler, environ=self.environ, cwd=self.path, timeout_s=timeout_s)

    def turn(self, **knobs: Any) -> None:
        """Set knobs of the fake; the others keep their default."""
        new = self.state_path / "knobs.new"
        new.write_text(json.dumps(knobs))
        new.replace(self.state_path / "knobs.json")

    def request(self, body: str, *flags: str, name: str = "") -> Request:
        number = next(self._numbers)
        script = self.path / f"qlaunch{number}.sh"
        script.write_text(f"#!/bin/bash\n{body}\n")
        script.chmod(0o700)
        return Request(
            script=script,
            name=name or f"ens-site-7f3a-{number}",
            output=self.path / f"qlaunch{number}.out",
            flags=flags,
        )

    async def look(self, job_id: str) -> Seen | None:
        """What the listing shows of a job, else what the scheduler remembers of it."""
        system = self.system()
        listed = {seen.id: seen for seen in await system.listing([job_id])}
        return listed.get(job_id) or await system.history(job_id)

    async def wait_for(self, job_id: str, *states: Any) -> Seen | None:
        """Wait until a job is in one of these states; None is one that nobody knows any more."""
        found: list[Seen | None] = []

        async def is_there() -> bool:
            if found:
                await asyncio.sleep(0.05)  # each look is a process or two
            found[:] = [await self.look(job_id)]
            return (found[0].state if found[0] else None) in states

        await self.eventually(is_there, within_s=30)
        return found[0]

    async def wait_for_text(self, path: Path, text: str) -> None:
        await self.eventually(lambda: path.exists() and text in path.read_text(), within_s=30)

    async def stop(self) -> None:
        """End everything that runs; fail if something does not heed that."""
        if self.kind == "local":
            system = self.system()
            for seen in await system.listing([]):
                if seen.state in ACTIVE:
                    await system.cancel(seen.id)
        told: set[int] = set()
        deadline = time.monotonic() + 15
        while left := self._processes():
            # Again and again: one that has only just been started is not in the books yet.
            for pid in set(self._supervisors(left)) - told:
                told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            if time.monotonic() > deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"processes were left: {left}")
            await asyncio.sleep(0.02)

    def _supervisors(self, living: list[int]) -> list[int]:
        try:
            jobs = json.loads((self.state_path / "state.json").read_text())["jobs"].values()
        except FileNotFoundError:
            return []
        return [job["supervisor"] for job in jobs if job["supervisor"] in living]

    def _processes(self) -> list[int]:
        """All processes of this machine, told by a variable of their environment."""
        mark = f"FAKEBATCH_DIR={self.state_path}\0".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return found


@pytest.fixture
async def machine(kind: str, tmp_path: Path, eventually: Any) -> AsyncIterator[Machine]:
    """A machine on which two jobs run at once, and the others wait."""
    made = make_machine(kind, tmp_path, eventually)
    try:
        yield made
    finally:
        await made.stop()


def make_machine(kind: str, path: Path, eventually: Any) -> Machine:
    scheduler = batch.get(kind, directory=path / "local", max_running=2)
    bin_path = path / "bin" / kind
    bin_path.mkdir(parents=True)
    (path / "fake").mkdir()
    # The interpreter that runs the tests, wherever python3 leads to; and compiled once, not for each command.
    program = path / "fakebatch"
    program.write_text(
        f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(FAKE.parent)!r})\n"
        "import fakebatch\nsys.exit(fakebatch.main())\n"
    )
    program.chmod(0o755)
    history = {"slurm": ["sacct"], "lsf": ["bacct"], "sge": ["qacct"]}.get(kind, [])
    for command in {*scheduler.programs, *history}:
        (bin_path / command).symlink_to(program)
    environ = {
        "PATH": f"{bin_path}:/usr/bin:/bin",
        "HOME": str(path),
        "LANG": "C.UTF-8",
        "FAKEBATCH_DIR": str(path / "fake"),
    }
    made = Machine(
        kind=kind, path=path, scheduler=scheduler, environ=environ, eventually=eventually
    )
    made.turn(room=2)
    return made
