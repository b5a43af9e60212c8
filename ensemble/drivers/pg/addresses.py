"""Where a database listens: addresses, networks, ports."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Sequence

from ensemble.errors import ClusterError

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915
#: The first message of a client that would like TLS; the server answers with one letter.
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)


def resolve_addresses(listen: Sequence[str]) -> list[str]:
    """Return the addresses that *listen* means: addresses as they are, interfaces by their IPv4 one.

    Raises:
        ClusterError: One is neither, or means every interface.
    """
    return list(dict.fromkeys(_resolve(each) for each in listen))


def check_networks(allow: Sequence[str]) -> list[str]:
    """Return *allow* as PostgreSQL writes networks.

    Raises:
        ClusterError: One is not a network in CIDR notation.
    """
    try:
        return [str(ipaddress.ip_network(each, strict=False)) for each in allow]
    except ValueError as error:
        raise ClusterError(f"store.allow: {error}; write networks like 10.1.0.0/16") from error


def free_port(addresses: Sequence[str], wanted: int | None = None) -> int:
    """Return *wanted* when it is free on all *addresses*, else any port that is."""
    for port in (wanted, *[None] * 20):
        try:
            return _try_port(addresses, port or 0)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ClusterError(
                    f"not all of {', '.join(addresses)} are addresses of this host (store.listen)"
                ) from error
    raise ClusterError(f"no port is free on {', '.join(addresses)}")


async def answers(host: str, port: int, *, timeout_s: float = 3.0) -> bool:
    """Return whether a PostgreSQL server accepts connections there."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(_SSL_REQUEST)
                return await reader.read(1) in (b"S", b"N")
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError):
        return False


def _resolve(name: str) -> str:
    interfaces = [interface for _, interface in socket.if_nameindex()]
    if name in interfaces:
        return _interface_address(name)
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        raise ClusterError(
            f"store.listen: {name} is neither an address nor an interface of this host "
            f"({', '.join(interfaces)})"
        ) from None
    if address.is_unspecified:
        raise ClusterError(
            f"store.listen: {name} is every interface; name the one that compute nodes reach"
        )
    return str(address)


def _interface_address(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(
                probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode())
            )
        except OSError as error:
            raise ClusterError(
                f"store.listen: interface {name} has no IPv4 address ({error.strerror})"
            ) from error
    return socket.inet_ntoa(answer[20:24])


def _try_port(addresses: Sequence[str], port: int) -> int:
    with contextlib.ExitStack() as stack:
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            probe = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            # As PostgreSQL does; else connections of a server that just stopped are in the way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            port = probe.getsockname()[1]
    return port
