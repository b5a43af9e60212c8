"""What a launcher tells its pilots before they connect: where it listens, and the key that both ends must hold.

One certificate for a launch, made anew each time and used by both ends; each end trusts it and nothing else. Whoever
can read the file can join as a pilot, so only its owner may. It never expires: it ends with the launcher, and
neither end has to trust the other's clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import ssl
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import msgspec

from ensemble.core.wire import PROTOCOL
from ensemble.drivers import wholefile
from ensemble.errors import LaunchError

_SIOCGIFADDR = 0x8915
#: RFC 5280, 4.1.2.5: no well-defined end.
_NEVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFile:
    """Where a launcher waits for its pilots, and what they prove themselves with."""

    protocol: int
    launcher_id: int
    #: Names and numbers by which pilots may reach the launcher, to be tried in this order.
    addresses: tuple[str, ...]
    port: int
    #: How many pilots there should be.
    expected: int
    #: Both PEM.
    certificate: str
    key: str = field(repr=False)

    def to_bytes(self) -> bytes:
        """Return it as the file holds it; `parse` reads it."""
        return msgspec.json.encode(self) + b"\n"

    def write(self, path: Path) -> None:
        """Put it there at once and whole, for the owner's eyes only.

        Raises:
            LaunchError: It cannot be written; nothing is left of it.
        """
        try:
            with wholefile.create(path) as file:
                file.write(self.to_bytes())
        except OSError as error:
            raise LaunchError(f"cannot write {path}: {error.strerror or error}") from error

    def server_context(self) -> ssl.SSLContext:
        """Return the launcher's TLS: only those who hold the key get in."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # nobody resumes: a pilot connects once
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return a pilot's TLS: only the launcher that wrote this file is spoken to, by whatever name."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, side: int) -> ssl.SSLContext:
        context = ssl.SSLContext(side)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_verify_locations(cadata=self.certificate)
            with _nameless_file() as file:
                file.write(f"{self.certificate}\n{self.key}".encode())
                file.flush()
                context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise LaunchError(
                f"the certificate in the launcher's link file is no good: {error}"
            ) from error
        return context


def make(addresses: Iterable[str], port: int, expected: int, *, launcher_id: int) -> LinkFile:
    """Return a link file with a new certificate and key.

    The first call takes about 0.1 s, for the import of `cryptography`; then it is below 1 ms.

    Args:
        addresses: Where pilots may reach the launcher: `addresses_of_this_host`, or 127.0.0.1 where all are here.
        expected: How many pilots there should be.
    """
    certificate, key = _self_signed()
    return LinkFile(
        protocol=PROTOCOL,
        launcher_id=launcher_id,
        addresses=tuple(addresses),
        port=port,
        expected=expected,
        certificate=certificate,
        key=key,
    )


def read(path: Path) -> LinkFile:
    """Read a link file.

    Raises:
        LaunchError: It is not there, cannot be read, or is none that this version understands.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LaunchError(
            f"cannot read {path}: {error.strerror or error}: pilots need the launcher's run directory, "
            "or an MPI that hands on the file"
        ) from error
    return parse(data, str(path))


def parse(data: bytes, name: str = "the link file") -> LinkFile:
    """Read a link file's content.

    Raises:
        LaunchError: It is none that this version understands; *name* tells whose it was.
    """
    try:
        found = msgspec.json.decode(data, type=_Head).protocol
        if found == PROTOCOL:
            return msgspec.json.decode(data, type=LinkFile)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LaunchError(f"{name} is no link file: {error}") from error
    raise LaunchError(
        f"{name} speaks version {found} of the pilots' protocol, this program version {PROTOCOL}: "
        "run launcher and pilots from one installation"
    )


class _Head(msgspec.Struct, frozen=True):
    protocol: int


def addresses_of_this_host() -> tuple[str, ...]:
    """Return the addresses of this host's interfaces and its name, without those that lead back to itself.

    Linux only: the first IPv4 address of each interface (netdevice(7)), all global IPv6 ones, then the host name.
    """
    found = [each for each in (*_ipv4_addresses(), *_ipv6_addresses()) if _is_reachable(each)]
    name = socket.gethostname()
    return tuple(dict.fromkeys([*found, *([] if name == "localhost" else [name])]))


def _ipv4_addresses() -> Iterator[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asker:
        for _, interface in socket.if_nameindex():
            request = struct.pack("256s", interface.encode()[:15])
            with contextlib.suppress(OSError):  # it has no such address
                answer = fcntl.ioctl(asker, _SIOCGIFADDR, request)
                yield socket.inet_ntoa(answer[20:24])


def _ipv6_addresses() -> Iterator[str]:
    with contextlib.suppress(OSError):  # IPv6 is switched off
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            yield str(ipaddress.IPv6Address(bytes.fromhex(line.split()[0])))


def _is_reachable(address: str) -> bool:
    known = ipaddress.ip_address(address)
    # A link-local one means nothing without the other end's name of the interface.
    return not (known.is_loopback or known.is_link_local or known.is_unspecified)


def _nameless_file() -> IO[bytes]:
    # In memory where Python was built for that, so that the key never reaches a disk.
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("ensemble-link"), "w+b")
    return tempfile.TemporaryFile()


def _self_signed() -> tuple[str, str]:
    # Slow to import, and a pilot never needs it.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Ensemble pilots' link")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2000, 1, 1, tzinfo=UTC))
        .not_valid_after(_NEVER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()
