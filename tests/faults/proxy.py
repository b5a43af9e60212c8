"""A network that fails: a TCP proxy that swallows what it should carry, delays it, or cuts it off.

Each direction can be made a black hole (bytes are taken and never come out; no error, no end), for all
connections or for one, and every connection can be reset. It runs in the test's own event loop, on the loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from ensemble.site import Site


class Proxy:
    """Carries connections to one port, as well as a test wants."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        """Prepare to carry connections to a port; `open` opens one's own."""
        self.target = (host, port)
        self.port = 0
        #: Bytes in this direction vanish while this is set.
        self.swallows_requests = False
        self.swallows_replies = False
        #: New connections are accepted, and reset at once.
        self.refuses = False
        #: What is carried takes so long, each way.
        self.delay_s = 0.0
        #: How many connections there have been.
        self.accepted = 0
        self._server: asyncio.Server | None = None
        self._lines: set[_Line] = set()

    async def open(self) -> None:
        """Listen on a free port, `port`."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def ports(self) -> set[int]:
        """The open connections, as their target sees them: `client_port` of pg_stat_activity."""
        return {line.port for line in self._lines}

    def hole(self, port: int | None = None) -> None:
        """Swallow everything, in both directions; or what is on one connection, for good."""
        if port is None:
            self.swallows_requests = self.swallows_replies = True
            return
        (line,) = (line for line in self._lines if line.port == port)
        line.is_holed = True

    def heal(self) -> None:
        """Carry what comes from now on; what was swallowed stays swallowed."""
        self.swallows_requests = self.swallows_replies = self.refuses = False

    def reset(self) -> int:
        """Cut all connections off with a reset at both ends; return how many there were."""
        lines = list(self._lines)
        for line in lines:
            line.reset()
        return len(lines)

    async def close(self) -> None:
        """Cut everything off and stop listening."""
        if self._server is not None:
            self._server.close()
        self.reset()
        for line in list(self._lines):
            await line.done.wait()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        line = _Line(writer)
        self._lines.add(line)
        try:
            if self.refuses:
                line.reset()
                return
            back, forth = await asyncio.open_connection(*self.target)
            line.add(forth)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, forth, "swallows_requests", line))
                group.create_task(self._pump(back, writer, "swallows_replies", line))
        except* OSError:
            pass
        finally:
            line.close()
            self._lines.discard(line)
            line.done.set()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, hole: str, line: _Line
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if not self._swallows(hole, line):
                    sink.write(data)
                    await sink.drain()
        # An end travels as far as bytes do: into a hole, and no further.
        while self._swallows(hole, line) and not line.is_cut:
            await asyncio.sleep(0.01)
        line.close()

    def _swallows(self, hole: str, line: _Line) -> bool:
        return line.is_holed or getattr(self, hole)


class _Line:
    """One connection that is carried: its two ends."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.ends = [writer]
        self.port = 0
        self.is_cut = False
        self.is_holed = False
        self.done = asyncio.Event()

    def add(self, forth: asyncio.StreamWriter) -> None:
        self.ends.append(forth)
        self.port = forth.get_extra_info("sockname")[1]
        if self.is_cut:
            self.reset()  # while the other end was being reached

    def reset(self) -> None:
        self.is_cut = True
        for end in self.ends:
            found = end.get_extra_info("socket")
            if found is not None:
                with contextlib.suppress(OSError):
                    no_linger = struct.pack("ii", 1, 0)
                    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
            end.transport.abort()

    def close(self) -> None:
        self.is_cut = True
        for end in self.ends:
            end.close()


@contextlib.asynccontextmanager
async def proxied_store(site: Site, folder: Path) -> AsyncIterator[tuple[Proxy, dict[str, str]]]:
    """A proxy to a site's database, and the variables that make a launcher go through it.

    Args:
        folder: Takes the password file.
    """
    address = site.address()
    proxy = Proxy(address.port or 0)
    await proxy.open()
    passfile = folder / f"pgpass-{proxy.port}"
    passfile.touch(0o600)
    passfile.write_text(
        f"127.0.0.1:{proxy.port}:{address.database}:{address.user}:{address.password}\n"
    )
    dsn = f"postgresql://{address.user}@127.0.0.1:{proxy.port}/{address.database}?sslmode=require"
    try:
        yield proxy, {"ENSEMBLE_STORE_DSN": dsn, "PGPASSFILE": os.fspath(passfile)}
    finally:
        await proxy.close()
        passfile.unlink()
