"""The LISTEN connection: a doorbell that survives restarts of the server.

A ring is a hint, never the message: after every ring, and after every (re)connection, the owner
reads the store again. So a lost notification costs a delay, not correctness.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ensemble.core.database import DRIVER_ERRORS, Address, connect
from ensemble.errors import StoreUnavailableError
from ensemble.log import get_logger

#: A held task was killed: re-read the kill set.
KILL = "ensemble_kill"
#: There is new work: idle launchers claim.
WORK = "ensemble_work"
#: Something happened: watchers read the new events.
EVENT = "ensemble_event"
#: Not a channel: the connection is new, so anything may have been missed.
RESYNC = "resync"


class Listener:
    """Calls *on_ring* with the channels that rang, until it is cancelled.

    *on_ring* is called in the event loop and must return at once; what it raises is logged.
    """

    def __init__(
        self,
        address: Address,
        channels: Sequence[str],
        on_ring: Callable[[str], None],
        *,
        ping_s: float = 15.0,
        ping_timeout_s: float = 5.0,
    ) -> None:
        self._address = address
        self._channels = tuple(channels)
        self._on_ring = on_ring
        self._ping_s = ping_s
        self._ping_timeout_s = ping_timeout_s
        self._log = get_logger()
        self.is_connected = False
        self._was_connected = False

    async def run(self) -> None:
        """Listen for ever; a lost server is waited for with growing, jittered delays."""
        delay = 0.2
        while True:
            try:
                await self._listen()
            except (StoreUnavailableError, *DRIVER_ERRORS) as error:
                delay = 0.2 if self._was_connected else delay
                why = str(error) or type(error).__name__
                self._log.warning("listener.lost", error=why, retry_s=round(delay, 1))
            else:
                delay = 0.2
            self._was_connected = False
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            delay = min(delay * 2, 10.0)

    async def _listen(self) -> None:
        connection = await connect(self._address, name="ensemble listener")
        lost = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _connection: lost.set())
            for channel in self._channels:
                await connection.add_listener(channel, self._rang)
            self.is_connected = self._was_connected = True
            self._tell(RESYNC)  # LISTEN first, read second: nothing falls between
            while not lost.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._ping_s):
                        await lost.wait()
                if not lost.is_set():
                    # Finds connections whose other end is gone without a word.
                    await connection.execute("SELECT 1", timeout=self._ping_timeout_s)
            self._log.warning("listener.lost", error="the server closed the connection")
        finally:
            self.is_connected = False
            connection.terminate()  # never close(): that waits for the peer

    def _rang(self, _connection: Any, _pid: int, channel: str, _payload: object) -> None:
        self._tell(channel)

    def _tell(self, channel: str) -> None:
        try:
            self._on_ring(channel)
        except Exception:
            self._log.exception("listener.callback_failed", channel=channel)
