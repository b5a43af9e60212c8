"""A network that holds back, swallows or cuts what a launcher and its pilots say to each other."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shlex
import signal
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.core.model import Outcome
from ensemble.core.states import State
from tests.faults import witness
from tests.faults.proxy import Proxy
from tests.faults.witness import witnessed
from tests.integration.launching import MPICH, WHEEL, Ensemble, Launched

pytestmark = WHEEL

#: The first attempt ends when the test says so, and not before; the next ones end at once.
WAIT = "test $ENSEMBLE_ATTEMPT != 1 || until [ -e go ]; do sleep 0.02; done"
DIRECTIONS = {
    "to the launcher": {"requests"},
    "to the pilots": {"replies"},
    "both ways": {"requests", "replies"},
}
#: Longer than a busy machine keeps a pilot from being heard.
PATIENCE_S = 5
EACH_DIRECTION = pytest.mark.parametrize("way", DIRECTIONS)

#: An mpiexec whose pilots read another port than the launcher wrote.
MPIEXEC = """
import os, sys
mpiexec, theirs, told = sys.argv[1:4]
words = sys.argv[4:]
for path in {word for word in words if word.endswith("/link.json")}:
    text = open(path).read()
    before, name, rest = text.partition('"port":')
    port, comma, rest = rest.partition(",")
    if port != theirs:
        with open(told, "w") as file:
            file.write(port)
        with open(path + ".new", "w", opener=lambda *a: os.open(*a, 0o600)) as file:
            file.write(before + name + theirs + comma + rest)
        os.replace(path + ".new", path)
os.execv(mpiexec, [mpiexec, *words])
"""


class Link(Proxy):
    """The way from pilots to their launcher. What is held back is not lost: it comes late, as with TCP."""

    def __init__(self, ens: Ensemble, folder: Path) -> None:
        super().__init__(0)
        self._ens = ens
        self._folder = folder
        #: In these directions nothing comes through, on the first connection or on all.
        self.held: set[str] = set()
        self.holds_first = False
        #: So many readings come through all the same. A pilot's first is TLS's; after its second it has joined.
        self.spared = 0
        #: What a connection has to say, and may not.
        self.waiting: set[Any] = set()
        self._numbers: dict[Any, int] = {}

    @property
    def target(self) -> tuple[str, int]:
        return ("127.0.0.1", int((self._folder / "port").read_text()))

    @target.setter
    def target(self, value: object) -> None:
        pass

    def launch(self, *flags: str, **options: Any) -> Launched:
        script = self._folder / "mpiexec"
        words = [sys.executable, str(self._folder / "mpiexec.py"), str(MPICH), str(self.port)]
        (self._folder / "mpiexec.py").write_text(MPIEXEC)
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} {self._folder}/port "$@"\n')
        script.chmod(0o755)
        settings = {"LAUNCHER_PILOT_PATIENCE_S": PATIENCE_S, "MPI_COMMAND": script} | options
        return self._ens.launch(*flags, mode="serial", **settings)

    async def _pump(self, source: StreamReader, sink: StreamWriter, hole: str, line: Any) -> None:
        way = hole.removeprefix("swallows_")
        self._numbers.setdefault(line, len(self._numbers))
        spared = self.spared
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                while spared <= 0 and self._is_held(way, line) and not line.is_cut:
                    self.waiting.add(line)
                    await asyncio.sleep(0.01)
                spared -= 1
                if not self._swallows(hole, line):
                    sink.write(data)
                    await sink.drain()
        while (self._is_held(way, line) or self._swallows(hole, line)) and not line.is_cut:
            await asyncio.sleep(0.01)
        line.close()

    def _is_held(self, way: str, line: Any) -> bool:
        return way in self.held and not (self.holds_first and self._numbers[line] != 0)

    def release(self) -> None:
        self.held = set()
        self.heal()


@pytest.fixture
async def link(ens: Ensemble, tmp_path: Path) -> AsyncIterator[Link]:
    made = Link(ens, tmp_path)
    await made.open()
    yield made
    for launched in ens.launchers:
        launched.clear()
    await made.close()


async def begin(ens: Ensemble, link: Link, **options: Any) -> tuple[Launched, list[int]]:
    """Start a launcher of two nodes with a task on each."""
    ids = await ens.store.add([witnessed(WAIT) for _ in range(2)])
    launched = link.launch("--persistent", **options)
    await ens.reach(State.RUNNING, *ids, within_s=60)
    await ens.eventually(lambda: all(ens.processes(task_id) for task_id in ids))
    return launched, ids


async def let_go(ens: Ensemble, *ids: int) -> None:
    for task_id in ids:
        (ens.workdir(await ens.task(task_id)) / "go").touch()


async def end(ens: Ensemble, launched: Launched) -> None:
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched, within_s=60) == 0, launched.log
    assert "Traceback" not in launched.log
    await witness.check(ens)


@EACH_DIRECTION
async def test_what_comes_late_but_within_the_pilots_patience_costs_nothing(
    ens: Ensemble, link: Link, way: str
) -> None:
    launched, ids = await begin(ens, link, LAUNCHER_PILOT_PATIENCE_S=20)
    link.held = DIRECTIONS[way]
    await let_go(ens, *ids)
    more = await ens.store.add([witnessed() for _ in range(20)])
    await ens.gone()
    # One that was told to the pilots, and one that was not.
    await ens.store.kill([more[0], more[-1]])
    await asyncio.sleep(1)
    link.release()
    await ens.reach(State.JOB_FINISHED, *ids, *more[1:-1])
    assert not launched.events("pilot.silent"), launched.log
    assert {tuple(await ens.outcomes(task_id)) for task_id in ids} == {(Outcome.DONE,)}
    await end(ens, launched)


@EACH_DIRECTION
async def test_a_pilot_that_is_cut_off_is_ended_before_its_task_runs_elsewhere(
    ens: Ensemble, link: Link, way: str
) -> None:
    launched, ids = await begin(ens, link)
    on = {(await ens.task(task_id)).nodes[0]: task_id for task_id in ids}
    link.held, link.holds_first = DIRECTIONS[way], True
    # Its guard may tell that nothing is left of it before the launcher has noticed its silence.
    await ens.eventually(lambda: launched.events("pilot.silent") or launched.events("node.lost"))
    (node,) = {
        each["node"] for what in ("pilot.silent", "node.lost") for each in launched.events(what)
    }
    lost = on[node]
    (other,) = set(ids) - {lost}
    # A word that comes late is nobody's: its connection is given up.
    await ens.reach(State.JOB_FINISHED, lost, within_s=30)
    link.release()
    assert (await ens.task(other)).state is State.RUNNING
    # The node came back.
    (again,) = await ens.store.add([witnessed()])
    await ens.reach(State.JOB_FINISHED, again)
    await let_go(ens, other)
    await ens.reach(State.JOB_FINISHED)
    assert await ens.outcomes(lost) == [Outcome.LOST, Outcome.DONE]
    assert await ens.outcomes(other) == [Outcome.DONE]
    await end(ens, launched)


async def test_a_launcher_that_reaches_no_pilot_leaves_all_the_same(
    ens: Ensemble, link: Link
) -> None:
    launched, ids = await begin(ens, link)
    link.held = DIRECTIONS["both ways"]
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0, launched.log
    assert await ens.states() == [State.RESTART_READY] * 2
    assert [await ens.outcomes(task_id) for task_id in ids] == [[Outcome.TIMEOUT]] * 2
    assert (await ens.task(ids[0])).losses == 0
    await witness.check(ens, is_over=False)


@EACH_DIRECTION
async def test_pilots_that_are_not_heard_at_all_are_one_clear_error(
    ens: Ensemble, link: Link, way: str
) -> None:
    await ens.store.add([witnessed()])
    link.held = DIRECTIONS[way]
    launched = link.launch("--persistent", LAUNCHER_PILOT_JOIN_S=3)
    assert await ens.leave(launched) == 1, launched.log
    assert "no pilot joined: did not join within 3 s" in launched.log
    assert "Traceback" not in launched.log
    assert [task.attempt for task in await ens.tasks()] == [0]
    await witness.check(ens, is_over=False)


async def test_a_pilot_that_is_cut_off_while_it_joins_is_started_again(
    ens: Ensemble, link: Link
) -> None:
    ids = await ens.store.add([witnessed() for _ in range(20)])
    # The first to come believes that it has said hello; the second has, and both are cut off.
    link.held, link.holds_first, link.spared = {"requests"}, True, 1
    launched = link.launch("--persistent")
    await ens.eventually(lambda: launched.events("pilot.joined") and link.waiting)
    link.release()
    link.reset()
    await ens.eventually(lambda: len(launched.pilots()) == 2)
    await ens.reach(State.JOB_FINISHED, *ids)
    await end(ens, launched)


async def test_resets_at_random_moments_lose_and_repeat_nothing(ens: Ensemble, link: Link) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    fields = {"node_packing_count": 4, "max_losses": 99}
    await ens.store.add(
        [witnessed(f"sleep 0.{dice.randrange(40):02}", **fields) for _ in range(80)]
    )
    first = link.launch("--idle-timeout=0")
    # The first one hits a pilot while it joins; after the last one no pilot comes back.
    for joined in (1, 3, 5, 7):
        await ens.eventually(
            lambda n=joined: (
                len(first.events("pilot.joined")) >= n or first.guard.poll() is not None
            ),
            within_s=60,
        )
        await asyncio.sleep(dice.uniform(0, 0.3) if joined > 1 else 0)
        if dice.random() < 0.5:  # a hole in the middle of the stream: what comes next is no TLS
            link.hole()
            await asyncio.sleep(0.05)
            link.heal()
            await asyncio.sleep(0.05)
        link.reset()
    status = await ens.leave(first, within_s=60)
    assert "Traceback" not in first.log
    assert status == (1 if "no pilot is left" in first.log else 0), first.log
    if status:
        second = ens.launch("--idle-timeout=0", mode="serial")
        assert await ens.leave(second, within_s=60) == 0, second.log
    assert set(await ens.states()) == {State.JOB_FINISHED}
    await witness.check(ens)
