"""What runs on each node in serial mode: takes tasks from the launcher and runs them, isolated.

    python -m ensemble.drivers.pilot LINK LAUNCH EXPECTED
    python -m ensemble.drivers.pilot --gone LINK MARKER LAUNCH RANK

A pilot is the child of a guard, which is the rank that mpirun started. It never initialises MPI itself
(drivers/rendezvous.py does, in a process of its own, and is gone before the first task). It decides
nothing but what fits on its node next, by the book that the launcher mirrors (core/packing.py); it
reports what happened; and without the launcher it ends everything and leaves.

Where a message of the launcher's would be late, it acts by itself: no beat for too long, and the guard
ends it; no connection, and it ends its tasks at once, for nobody would hear of them any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never, cast

import uvloop

from ensemble.core import wire
from ensemble.core.model import Output
from ensemble.core.packing import NodeQueue, Slot, SlotBook
from ensemble.core.wire import (
    Beat,
    Bye,
    Done,
    Failed,
    FromLauncher,
    FromPilot,
    Gone,
    Hello,
    Kill,
    Note,
    Pulse,
    Ran,
    Recall,
    Report,
    Run,
    Welcome,
    Work,
)
from ensemble.drivers import hardware, linkfile, process, roll, spawn
from ensemble.drivers.guardlink import PID_VARIABLE, GuardLink
from ensemble.drivers.linkfile import LinkFile
from ensemble.drivers.output import Tail, last_lines, tail
from ensemble.drivers.process import Process
from ensemble.drivers.taskenv import Environs
from ensemble.drivers.world import World, meet
from ensemble.errors import EnsembleError, LaunchError, WireError

#: Reports that come closer together than this are one.
_REPORT_S = 0.03
#: Ends in one report: each may carry an output's end twice, of 48 kB where it is no text, and must fit a frame.
_ENDS_AT_ONCE = 128
#: What is told of why a task could not start: a program's name may be as long as memory is.
_REASON_CHARACTERS = 4096
#: A beat is answered when so long nothing was, or sooner where the launcher has less patience.
_PULSE_S = 5.0
_CONNECT_S = 30.0
#: How long the pilots may take to find each other over MPI.
_MEET_S = 30.0
#: So many connections a second are asked of the launcher.
_JOINS_PER_S = 500
#: What the kernel sends when the guard dies; nothing else sends it.
_GUARD_DIED = signal.SIGRTMIN + 1
#: What a scheduler sends to everything in a job that ends: the launcher says what is to be done.
_NOT_FOR_US = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(slots=True)
class _Running:
    """A task with a process."""

    work: Work
    process: Process
    started_at: float
    tail: Tail | None
    was_signalled: bool = False
    is_forced: bool = False
    #: Whether somebody is ending its tree, and will report.
    is_ending: bool = False


class Pilot(asyncio.Protocol):
    """One node's tasks, and the stream to the launcher."""

    def __init__(self, hello: Hello, guard: GuardLink | None, group: asyncio.TaskGroup) -> None:
        """Prepare; `connection_made` says hello."""
        self._hello = hello
        self._guard = guard
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._decoder = wire.Decoder[FromLauncher](FromLauncher)
        self._welcome: Welcome | None = None
        self._site = ""
        self._environs: Environs | None = None
        self._exits = process.Exits()
        self._queue = NodeQueue(SlotBook(()))
        self._waiting: dict[int, Work] = {}
        self._running: dict[int, _Running] = {}
        self._preparing: dict[int, Work] = {}
        self._report = Report(now=0.0, ran=[], done=[], failed=[], dropped=[])
        self._report_timer: asyncio.TimerHandle | None = None
        self._last_report = 0.0
        #: The smallest difference seen between our clock and the launcher's.
        self._clock_offset: float | None = None
        #: After this moment others may run our tasks.
        self._deadline = math.inf
        self._last_pulse = 0.0
        self._workers: set[asyncio.Task[None]] = set()
        self._is_leaving = False
        #: Whether what ends from now on was ended by us: it is lost, and no report may call it failed.
        self._is_abandoned = False
        self.is_over = asyncio.Event()

    # ------------------------------------------------------------------ the stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello: from now on the launcher counts on us, and on hearing that nothing of us is left."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by name
        if self._guard is not None:
            self._guard.lease(self._hello.rank)
        self._send(self._hello)

    def data_received(self, data: bytes) -> None:
        """Do what the launcher says."""
        try:
            for message in self._decoder.feed(data):
                self._take(message)
        except WireError as error:
            self._send(Note("pilot.confused", str(error)))
            self.abandon()

    def connection_lost(self, error: Exception | None) -> None:
        """End everything: nobody can be told of it any more."""
        self._transport = None
        self.abandon()

    def _send(self, message: FromPilot) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.encode(message))

    def _take(self, message: FromLauncher) -> None:
        match message:
            case Run():
                self._run(message)
            case Kill():
                self._kill(message)
            case Recall():
                for task_id, attempt in message.pairs:
                    self._drop(task_id, attempt)
            case Beat():
                self._beat(message)
            case Welcome():
                self._start_work(message)
            case Bye():
                self._spawn(self._leave())
            case _:
                assert_never(message)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        worker = self._group.create_task(work)
        self._workers.add(worker)
        worker.add_done_callback(self._workers.discard)

    def close(self) -> None:
        """Wait for nothing any more: an environment script may hang."""
        for worker in self._workers:
            worker.cancel()

    def _start_work(self, welcome: Welcome) -> None:
        self._welcome = welcome
        self._site = os.fsdecode(welcome.site)
        # srun hands on the name of the host that it runs on.
        own = {name: socket.gethostname() for name in ("HOSTNAME",) if name in os.environ}
        self._environs = Environs(welcome, {**os.environ, **own})
        cores = welcome.cores if welcome.is_pinned else []
        book = SlotBook(cores, welcome.gpus, welcome.memory_mb)
        self._queue = NodeQueue(book)

    def _beat(self, beat: Beat) -> None:
        """Let the guard know until when we may live, by the launcher's word, and say that we do.

        A beat may have lain in a buffer while this node stood still: so it counts from when it was sent,
        by the two clocks' smallest difference so far.
        """
        now = _now()
        offset = now - beat.at
        self._clock_offset = min(offset, self._clock_offset or offset)
        self._deadline = beat.at + self._clock_offset + beat.lives_s
        if self._guard is not None:
            self._guard.deadline(self._deadline)
        if now - self._last_pulse >= min(_PULSE_S, beat.lives_s / 4):
            self._last_pulse = now
            self._send(Pulse(now))
        self._fill()  # what came after the last deadline and before this one

    # ------------------------------------------------------------------ starting

    def _run(self, run: Run) -> None:
        for work in run.tasks:
            self._waiting[work.id] = work
            self._queue.add(work.id, work.need)
        self._fill()

    def _fill(self) -> None:
        """Start what fits; nothing when we, and our guard, stood still for so long that we are given up."""
        if self._is_leaving or _now() > self._deadline:
            return
        while self._queue.waiting:
            found = self._queue.pop()
            if found is None:
                return
            task_id, slot = found
            self._start(self._waiting.pop(task_id), slot)

    def _start(self, work: Work, slot: Slot) -> None:
        assert self._environs is not None
        if self._environs.is_ready(work.env_script):
            self._make(work, slot)
        else:
            self._preparing[work.id] = work
            self._spawn(self._prepare(work, slot))

    async def _prepare(self, work: Work, slot: Slot) -> None:
        """Run the app's environment script, which others of it may be waiting for, too."""
        assert self._environs is not None
        problem = None
        try:
            await self._environs.prepare(work.env_script)
        except LaunchError as error:
            problem = str(error)
        if self._preparing.get(work.id) is not work:
            return  # it was dropped meanwhile
        del self._preparing[work.id]
        if problem is None and not self._is_leaving:
            self._make(work, slot)
        else:
            self._could_not_start(work, problem or "the launcher is leaving")

    def _make(self, work: Work, slot: Slot) -> None:
        """Make a task's process."""
        assert self._welcome is not None
        assert self._environs is not None
        kept = None
        try:
            env = self._environs.of(work, slot)
            cwd = f"{self._site}/{work.workdir}"
            kept = Tail() if work.output is Output.TAIL else None
            output = kept if work.output is not Output.FILE else f"{cwd}/{work.name}.out"
            cpus = slot.cpus if work.is_bound else ()
            started_at = _now()
            child = spawn.start_here(work.argv, env=env, cwd=cwd, output=output, cpus=cpus)
        except (LaunchError, OSError) as error:  # descriptors run out, too
            if kept is not None:
                kept.close()
            self._could_not_start(work, str(error))
            return
        running = _Running(work=work, process=child, started_at=started_at, tail=kept)
        self._running[work.id] = running
        self._report.ran.append(Ran(work.id, work.attempt, started_at))
        self._tell()
        self._exits.watch(child, lambda: self._exited(running))

    def _could_not_start(self, work: Work, reason: str) -> None:
        self._queue.book.release(work.id)
        reason = reason[:_REASON_CHARACTERS]
        self._report.failed.append(Failed(work.id, work.attempt, _now(), reason))
        self._tell()
        self._loop.call_soon(self._fill)

    # ------------------------------------------------------------------ ending

    def _exited(self, running: _Running) -> None:
        """A task's first process has ended; what it left behind is ended, too."""
        if running.is_ending:
            return
        if process.has_strays():
            running.is_ending = True
            self._spawn(self._sweep(running, _now()))
        else:
            self._ended(running, _now())

    async def _sweep(self, running: _Running, at: float) -> None:
        assert self._welcome is not None
        grace_s = 0.0 if running.is_forced else self._welcome.grace_s
        await process.sweep(running.process, grace_s=grace_s)
        self._ended(running, at)

    def _ended(self, running: _Running, at: float) -> None:
        """Nothing of a task is left: report it, and start what fits now."""
        assert self._welcome is not None
        work = running.work
        del self._running[work.id]
        self._queue.book.release(work.id)
        self._fill()  # first: a place is free
        exit_ = running.process.exit
        # A status that somebody else reaped is unknown: a failure, as it cannot be called a success.
        status = 255 if exit_ is None or exit_.status is None else exit_.status
        kept = running.tail.close() if running.tail is not None else None
        error = None
        if status != 0:
            error = self._last_lines(work, kept)
        self._report.done.append(
            Done(
                id=work.id,
                attempt=work.attempt,
                started_at=running.started_at,
                at=at,
                status=status,
                was_signalled=running.was_signalled,
                error=error,
                output=kept,
            )
        )
        self._tell()

    def _last_lines(self, work: Work, kept: str | None) -> str | None:
        assert self._welcome is not None
        lines = self._welcome.error_tail_lines
        if kept is not None:
            return last_lines(kept, lines)
        if work.output is Output.NONE:
            return None
        return tail(Path(self._site, work.workdir, f"{work.name}.out"), lines)

    def _kill(self, kill: Kill) -> None:
        for task_id, attempt in kill.pairs:
            running = self._running.get(task_id)
            if running is None or running.work.attempt != attempt:
                self._drop(task_id, attempt)
            else:
                self._spawn(self._end(running, is_forced=kill.is_forced))

    async def _end(self, running: _Running, *, is_forced: bool) -> None:
        """End a task's whole tree."""
        assert self._welcome is not None
        was_ending, running.is_ending = running.is_ending, True
        running.is_forced = running.is_forced or is_forced
        running.process.collect()  # it may have ended just now
        running.was_signalled = running.was_signalled or running.process.exit is None
        grace_s = 0.0 if running.is_forced else self._welcome.grace_s
        await process.end_tree(running.process, grace_s=grace_s)
        if not was_ending and running.work.id in self._running:
            self._ended(running, _now())

    def _drop(self, task_id: int, attempt: int) -> None:
        """Forget a task that has no process yet."""
        work = self._waiting.get(task_id) or self._preparing.get(task_id)
        if work is None or work.attempt != attempt:
            return
        if self._waiting.pop(task_id, None) is not None:
            self._queue.drop(task_id)
        else:
            del self._preparing[task_id]
            self._queue.book.release(task_id)
        self._loop.call_soon(self._fill)  # others may have waited for it
        self._report.dropped.append((task_id, attempt))
        self._tell()

    # ------------------------------------------------------------------ reporting

    def _tell(self) -> None:
        """Report now, or soon when there was a report just before."""
        if self._report_timer is None and not self._is_abandoned:
            wait_s = self._last_report + _REPORT_S - _now()
            self._report_timer = self._loop.call_later(max(wait_s, 0.0), self._send_report)

    def _send_report(self) -> None:
        self._report_timer = None
        self._last_report = _now()
        report, self._report = (
            self._report,
            Report(now=0.0, ran=[], done=[], failed=[], dropped=[]),
        )
        ended = {done.id for done in report.done}
        # The end tells the start, too.
        ran = [each for each in report.ran if each.id not in ended]
        dropped = report.dropped
        for start in range(0, max(len(report.done), len(report.failed), 1), _ENDS_AT_ONCE):
            part = slice(start, start + _ENDS_AT_ONCE)
            done, failed = report.done[part], report.failed[part]
            self._send(Report(now=_now(), ran=ran, done=done, failed=failed, dropped=dropped))
            ran, dropped = [], []

    # ------------------------------------------------------------------ leaving

    async def _leave(self) -> None:
        """The launcher has no more work: end what may still run, and go in good order."""
        self._is_leaving = True
        await self._end_all(is_forced=False)
        if self._guard is not None:
            self._guard.bye()
        self.is_over.set()

    def abandon(self, *, says_gone: bool = False) -> None:
        """End everything at once, and go: the launcher cannot be reached, or the guard is dead.

        Args:
            says_gone: There is no guard to tell the launcher when nothing is left.
        """
        if not self._is_leaving:
            self._is_leaving = True
            self._spawn(self._abandon(says_gone=says_gone))

    async def _abandon(self, *, says_gone: bool) -> None:
        if self._report_timer is not None:
            self._report_timer.cancel()
        self._send_report()  # what had ended before
        self._is_abandoned = True
        await self._end_all(is_forced=True)
        if says_gone:
            self._send(Gone(launch=self._hello.launch, rank=self._hello.rank))
            if self._transport is not None:
                self._transport.close()
                await asyncio.sleep(0.1)
        self.is_over.set()

    async def _end_all(self, *, is_forced: bool) -> None:
        async with asyncio.TaskGroup() as group:
            for running in list(self._running.values()):
                group.create_task(self._end(running, is_forced=is_forced))


# ---------------------------------------------------------------------------- the program


async def _fly(link_path: Path, launch: int, expected: int, guard: GuardLink | None) -> None:
    """Find the others, join the launcher, and work until it is over."""
    world = await meet(link_path, expected, timeout_s=_MEET_S, environ=os.environ)
    hello = _introduce(world, launch)
    await asyncio.sleep(random.uniform(0, world.size / _JOINS_PER_S) if world.size > 1 else 0)  # noqa: S311 - jitter
    async with asyncio.TaskGroup() as group:
        pilot = Pilot(hello, guard, group)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(_GUARD_DIED, lambda: pilot.abandon(says_gone=True))
        for number in _NOT_FOR_US:
            loop.add_signal_handler(number, lambda: None)
        process.become_subreaper()
        spawn.keep_descriptors()
        if guard is not None:
            process.die_with_parent(_GUARD_DIED, guard.guard_pid)
        await _connect(world.link, pilot)
        await pilot.is_over.wait()
        pilot.close()


def _introduce(world: World, launch: int) -> Hello:
    found = hardware.look(os.environ)
    return Hello(
        protocol=wire.PROTOCOL,
        rank=world.rank,
        size=world.size,
        launch=launch,
        host=hardware.node_name(os.environ),
        pid=os.getpid(),
        cores=found.cores,
        gpus=found.gpus,
        memory_mb=found.memory_mb,
        note=world.note,
    )


async def _connect(link: LinkFile, pilot: Pilot) -> None:
    """Connect to the first address that answers.

    Raises:
        LaunchError: None does.
    """
    loop = asyncio.get_running_loop()
    context = link.client_context()
    errors = []
    end = _now() + _CONNECT_S
    while True:
        for address in link.addresses:
            try:
                async with asyncio.timeout(max(end - _now(), 1.0)):
                    await loop.create_connection(lambda: pilot, address, link.port, ssl=context)
            except (OSError, TimeoutError) as error:
                errors.append(f"{address}: {str(error) or 'no answer'}")
            else:
                return
        if _now() > end:
            raise LaunchError(
                f"the launcher cannot be reached at port {link.port} ({'; '.join(errors[-3:])}): "
                "it must listen on an address that compute nodes reach"
            )
        await asyncio.sleep(random.uniform(0.2, 1.0))  # noqa: S311 - jitter


def _say_gone(link_path: Path, marker_prefix: str, launch: int, rank: int) -> None:
    """Tell the launcher that nothing is left of a pilot, and whoever finds it gone; the guard's last act."""
    # First, as an address where nobody answers takes seconds.
    with contextlib.suppress(OSError):  # without it the launcher's lease lingers
        roll.leave_gone(link_path.parent, marker_prefix, launch, rank)
    link = linkfile.read(link_path)
    context = link.client_context()
    for address in link.addresses:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((address, link.port), timeout=5.0) as plain,
            context.wrap_socket(plain) as stream,
        ):
            stream.sendall(wire.encode(Gone(launch=launch, rank=rank)))
            with contextlib.suppress(OSError):
                stream.unwrap()
            return


def pilot_argv(link_path: Path, launch: int, expected: int) -> list[str]:
    """Return the command line of a pilot."""
    return [*_program(), str(link_path), str(launch), str(expected)]


def gone_argv(link_path: Path, marker_prefix: str, launch: int) -> list[str]:
    """Return what a pilot's guard runs when nothing is left of it; `{lease}` stands for its rank."""
    return [*_program(), "--gone", str(link_path), marker_prefix, str(launch), "{lease}"]


def _program() -> list[str]:
    # -P: a file of the current directory must not stand in for a module.
    return [sys.executable, "-P", "-m", "ensemble.drivers.pilot"]


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    """Run a pilot; return its exit status, which its guard keeps from mpirun."""
    status = 0
    try:
        if argv[0] == "--gone":
            _say_gone(Path(argv[1]), argv[2], int(argv[3]), int(argv[4]))
            return status
        link_path, launch, expected = Path(argv[0]), int(argv[1]), int(argv[2])
        guard = GuardLink.from_environ(environ)
        if guard is None and PID_VARIABLE in environ:
            raise LaunchError("the pilot's guard was killed before the pilot had started")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_fly(link_path, launch, expected, guard))
    except* EnsembleError as errors:
        for error in errors.exceptions:
            print(f"ensemble pilot: {error}", file=sys.stderr)  # noqa: T201 - mpirun shows it
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
