"""The launcher's end of the pilots' streams: TCP with mutual TLS, frames in and out.

Who does not hold the launch's own certificate is turned away, and so is what is no message; both are
logged, and nothing else happens. What the messages mean is service/pilots.py's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast

from ensemble.core import wire
from ensemble.core.wire import FromLauncher, FromPilot
from ensemble.errors import WireError

if TYPE_CHECKING:
    from ensemble.log import Logger

#: As many connections may wait to be taken: all pilots of a large allocation come at once.
_BACKLOG = 4096
#: As many may be on their way, certificates unseen: the others wait in the backlog, as strangers must not use up our
#: descriptors. Where few are allowed (ulimit -n), a quarter of them.
_UNPROVEN = 512
#: As many are taken in one turn of the event loop.
_ACCEPTS = 64
_HANDSHAKE_S = 20.0
#: After its certificate a pilot has so long to say who it is.
_HELLO_S = 20.0
#: A stranger costs a log line; many of them do not cost many.
_REFUSALS_SHOWN = 20
#: Before it said who it is, nobody's words are longer.
_FIRST_LIMIT = 2**20

Spawn = Callable[[Coroutine[Any, Any, None]], None]


class Connection(asyncio.Protocol):
    """One pilot's stream."""

    def __init__(self, server: LinkServer, peer: str, *, is_local: bool) -> None:
        """Wait for its first word."""
        self._server = server
        self._decoder = wire.Decoder[FromPilot](FromPilot, limit=_FIRST_LIMIT)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_unproven = True
        self.peer = peer
        #: Whether it comes from this host.
        self.is_local = is_local
        #: Who it is, once it said so: whatever `on_message` attached.
        self.pilot: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It has shown its certificate: wait for it to say who it is."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by name
        self._timer = asyncio.get_running_loop().call_later(_HELLO_S, self._expire)

    def _expire(self) -> None:
        if self.pilot is None:
            self._server.refuse(self, f"it did not say who it is within {_HELLO_S:g} s")
            self.abort()

    def prove(self) -> None:
        """Note, once, that it takes no place of those who have not said who they are."""
        if self._is_unproven:
            self._is_unproven = False
            self._server.make_room()

    def identify(self, pilot: object) -> None:
        """Attach who it is: from now on its messages may be long."""
        self.prove()
        self.pilot = pilot
        self._decoder.limit = wire.FRAME_LIMIT
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Take in what it says."""
        try:
            for message in self._decoder.feed(data):
                self._server.on_message(self, message)
        except WireError as error:
            self._server.refuse(self, str(error))
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Tell the launcher, if it knew who that was."""
        if self._timer is not None:
            self._timer.cancel()
        self.prove()
        self._server.forget(self)
        self._server.on_lost(self, str(error) if error else "it closed the connection")

    def send(self, *messages: FromLauncher) -> None:
        """Send messages; they are on their way even if this end is closed next."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(map(wire.encode, messages)))

    def close(self) -> None:
        """Close once everything is sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()


class LinkServer:
    """Takes connections; hands messages and losses on."""

    def __init__(
        self,
        *,
        on_message: Callable[[Connection, FromPilot], None],
        on_lost: Callable[[Connection, str], None],
        spawn: Spawn,
        log: Logger,
    ) -> None:
        """Prepare; `open` listens."""
        #: To be set before anybody is told the port.
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.on_message = on_message
        self.on_lost = on_lost
        self.spawn = spawn
        self._log = log
        self._refused = 0
        self._listener: socket.socket | None = None
        #: How many have not shown their certificate, or not said who they are.
        self._unproven = 0
        self._most_unproven = min(_UNPROVEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._connections: set[Connection] = set()

    def open(self, host: str | None) -> int:
        """Listen on a free port; return it.

        Args:
            host: The address to listen on; all of this host when None.

        Raises:
            OSError: There is no such address.
        """
        if host is None and socket.has_dualstack_ipv6():
            listener = socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        else:
            listener = socket.create_server((host or "", 0), backlog=_BACKLOG)
        listener.setblocking(False)
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)
        port: int = listener.getsockname()[1]
        return port

    def _accept(self, listener: socket.socket) -> None:
        """Take those who wait, but not all at once: others want the event loop, too."""
        with contextlib.suppress(OSError):  # nobody is left, or gave up, or descriptors ran out
            for _ in range(_ACCEPTS):
                if self._unproven >= self._most_unproven:
                    asyncio.get_running_loop().remove_reader(listener.fileno())
                    return
                accepted, peer = listener.accept()
                self._unproven += 1
                is_local = accepted.getsockname()[0] == peer[0]
                connection = Connection(self, f"{peer[0]}:{peer[1]}", is_local=is_local)
                self.spawn(self._secure(accepted, connection))

    async def _secure(self, accepted: socket.socket, connection: Connection) -> None:
        """Ask for the certificate before anything else."""
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=self.context,
                ssl_handshake_timeout=_HANDSHAKE_S,
            )
        except (OSError, TimeoutError) as error:  # SSLError is an OSError
            accepted.close()
            connection.prove()
            self.refuse(connection, f"no TLS with the launch's certificate: {error}")
        else:
            self._connections.add(connection)

    def make_room(self) -> None:
        """Note that one has said who it is, or is gone: another may come."""
        self._unproven -= 1
        if self._listener is not None:
            loop = asyncio.get_running_loop()
            loop.add_reader(self._listener.fileno(), self._accept, self._listener)

    def refuse(self, connection: Connection, reason: str) -> None:
        """Log that somebody was turned away."""
        self.forget(connection)
        self._refused += 1
        if self._refused <= _REFUSALS_SHOWN:
            self._log.warning("link.refused", peer=connection.peer, reason=reason)

    def forget(self, connection: Connection) -> None:
        """Note that a connection has ended."""
        self._connections.discard(connection)

    def close(self) -> None:
        """Take no more connections and cut those that are left."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for connection in list(self._connections):
            connection.abort()
