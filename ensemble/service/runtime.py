"""What every daemon shares: the event loop, the clocks, the signals."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")

#: What batch schedulers send before they kill (see docs/signals.md), and a terminal's Ctrl-C.
DRAIN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
#: What a process meets that has used up its file descriptors, threads or disk (`ulimit -n`, `ulimit -u`).
SHORTAGE = (OSError, RuntimeError)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run *main* on a uvloop event loop and return its result."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def on_signals(react: Callable[[str], None]) -> None:
    """Call *react* with a signal's name, in the event loop, whenever one of them arrives.

    What was ignored from the start (nohup) means nothing.
    """
    loop = asyncio.get_running_loop()
    for number in DRAIN_SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            # Caught all the same: what is ignored, programs that are started would ignore, too.
            loop.add_signal_handler(number, lambda: None)
        else:
            loop.add_signal_handler(number, react, number.name)


async def until(event: asyncio.Event, at_most_s: float) -> bool:
    """Wait for an event, or so long; tell whether it has come."""
    try:
        async with asyncio.timeout(max(at_most_s, 0.0)):
            await event.wait()
    except TimeoutError:
        pass
    return event.is_set()


async def detached(call: Coroutine[Any, Any, T]) -> T:
    """Return what comes of a call of the store; whoever is cancelled meanwhile, need not wait for its end.

    A pool lets a cancelled caller wait until the server has answered, or for the whole command time-out: one that
    hangs would hold up a launcher that has to leave.
    """
    task = asyncio.get_running_loop().create_task(call)
    _detached.add(task)
    task.add_done_callback(_forget)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        raise
    return task.result()


_detached: set[asyncio.Task[Any]] = set()


def _forget(task: asyncio.Task[Any]) -> None:
    _detached.discard(task)
    if not task.cancelled():
        task.exception()  # whoever waited for it has it; or nobody wants it any more


def hasten(wait: asyncio.Timeout | None, at_most_s: float) -> None:
    """Let a wait last no longer than so long from now; None, and one that is over, are left alone."""
    if wait is not None and not wait.expired():
        soon = asyncio.get_running_loop().time() + at_most_s
        wait.reschedule(min(soon, wait.when() or soon))


def utc_now() -> datetime:
    """Return the wall clock's time; for the record, never to decide by."""
    return datetime.now(UTC)  # noqa: TID251 - this is the one place


def epoch_s() -> float:
    """Return the wall clock in epoch seconds, to compare with a scheduler's."""
    return time.time()


def boottime_s() -> float:
    """Return the clock that decisions go by: seconds since boot.

    It never jumps, and also counts while the machine or this process sleeps.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)
