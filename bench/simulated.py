"""Stands in for mpirun: one process that is all the pilots of a launch, and whose tasks are timers.

    simulated.py ... LINK LAUNCH EXPECTED

The launcher takes it for its MPI launcher and gives it the command line of a pilot; the last three words are all
that is needed. Every pilot has a stream of its own, says hello, runs tasks in the order they come, SLOTS at a
time, and reports as real ones do. At the end it prints one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import cast

import uvloop

from ensemble.core import wire
from ensemble.core.wire import (
    Bye,
    Done,
    FromLauncher,
    FromPilot,
    Hello,
    Kill,
    Pulse,
    Ran,
    Recall,
    Report,
    Run,
    Work,
)
from ensemble.drivers import linkfile

#: How a launcher under measurement tells what it wants: slots, and seconds of the shortest and longest run.
SLOTS, SHORTEST_S, LONGEST_S = (
    float(word) for word in os.environ.get("ENSEMBLE_BENCH_PILOTS", "64 5 15").split()
)
JOINS_PER_S = 200
#: As the real pilot.
REPORT_S = 0.02
PULSE_S = 5.0


class Everybody:
    """What all pilots have in common."""

    def __init__(self, expected: int) -> None:
        self.running = 0
        self.most = 0
        self.seen: Counter[str] = Counter()
        self.left = expected
        self.are_over = asyncio.Event()

    def start(self) -> None:
        self.running += 1
        self.most = max(self.most, self.running)

    def leave(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.are_over.set()


class SimulatedPilot(asyncio.Protocol):
    """One node."""

    def __init__(self, hello: Hello, everybody: Everybody) -> None:
        self._hello = hello
        self._all = everybody
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._decoder = wire.Decoder[FromLauncher](wire.FromLauncher)
        self._waiting: deque[Work] = deque()
        self._running: dict[int, tuple[Work, float, asyncio.TimerHandle]] = {}
        self._report = Report(now=0.0, ran=[], done=[], failed=[], dropped=[])
        self._timer: asyncio.TimerHandle | None = None
        self._last_report = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's TLS streams are transports without being of the class.
        self._transport = cast(asyncio.Transport, transport)
        self._send(self._hello)
        self._loop.call_later(PULSE_S * random.random(), self._pulse)

    def data_received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            self._all.seen[type(message).__name__] += 1
            match message:
                case Run():
                    self._waiting.extend(message.tasks)
                    self._fill()
                case Recall() | Kill():
                    for task_id, attempt in message.pairs:
                        self._drop(task_id, attempt, is_kill=isinstance(message, Kill))
                case Bye():
                    if self._transport is not None:
                        self._transport.close()
                case _:
                    pass

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        for _, _, timer in self._running.values():
            timer.cancel()
        self._all.running -= len(self._running)
        self._running.clear()
        self._all.leave()

    def _send(self, message: FromPilot) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.encode(message))

    def _pulse(self) -> None:
        if self._transport is not None:
            self._send(Pulse(now()))
            self._loop.call_later(PULSE_S, self._pulse)

    # ------------------------------------------------------------------ tasks

    def _fill(self) -> None:
        while self._waiting and len(self._running) < SLOTS:
            work = self._waiting.popleft()
            started = now()
            timer = self._loop.call_later(
                random.uniform(SHORTEST_S, LONGEST_S), self._end, work.id, 0
            )
            self._running[work.id] = (work, started, timer)
            self._all.start()
            self._report.ran.append(Ran(work.id, work.attempt, started))
            self._tell()

    def _end(self, task_id: int, status: int) -> None:
        work, started, timer = self._running.pop(task_id)
        timer.cancel()
        self._all.running -= 1
        self._report.done.append(
            Done(work.id, work.attempt, started, now(), status, was_signalled=status > 128)
        )
        self._tell()
        self._fill()

    def _drop(self, task_id: int, attempt: int, *, is_kill: bool) -> None:
        waiting = [work for work in self._waiting if work.id == task_id]
        if waiting:
            self._waiting.remove(waiting[0])
            self._report.dropped.append((task_id, attempt))
            self._tell()
        elif is_kill and task_id in self._running:
            self._end(task_id, 143)

    # ------------------------------------------------------------------ reports

    def _tell(self) -> None:
        if self._timer is None:
            wait_s = max(self._last_report + REPORT_S - now(), 0.0)
            self._timer = self._loop.call_later(wait_s, self._send_report)

    def _send_report(self) -> None:
        self._timer = None
        self._last_report = now()
        report = self._report
        self._report = Report(now=0.0, ran=[], done=[], failed=[], dropped=[])
        ended = {done.id for done in report.done}
        self._send(
            Report(
                now=now(),
                ran=[ran for ran in report.ran if ran.id not in ended],
                done=report.done,
                failed=[],
                dropped=report.dropped,
            )
        )


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def fly(path: Path, launch: int, expected: int) -> None:
    link = linkfile.read(path)
    context = link.client_context()
    everybody = Everybody(expected)
    loop = asyncio.get_running_loop()

    async def join(rank: int) -> None:
        await asyncio.sleep(rank / JOINS_PER_S)
        hello = Hello(
            protocol=wire.PROTOCOL,
            rank=rank,
            size=expected,
            launch=launch,
            host=os.uname().nodename,
            pid=os.getpid(),
            cores=[[cpu] for cpu in range(int(SLOTS))],
            gpus=[],
            memory_mb=None,
        )
        await loop.create_connection(
            lambda: SimulatedPilot(hello, everybody), link.addresses[0], link.port, ssl=context
        )

    began = now()
    async with asyncio.TaskGroup() as group:
        for rank in range(expected):
            group.create_task(join(rank))
    joined_s = now() - began
    await everybody.are_over.wait()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "most_at_once": everybody.most,
        "joined_s": joined_s,
        "messages": dict(everybody.seen),
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }
    print("\n" + json.dumps(result), flush=True)


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    link, launch, expected = sys.argv[-3:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(fly(Path(link), int(launch), int(expected)))


if __name__ == "__main__":
    main()
