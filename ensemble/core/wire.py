"""What a launcher and its pilots say to each other: frames of msgpack over one TLS stream each.

A frame is its length (4 bytes, big-endian) and one message. The launcher says Welcome, then Run, Kill,
Recall, Beat and Bye; the pilot says Hello, then Report, Pulse and Note. Whatever cannot be read ends the
connection with a WireError: a pilot whose words are not understood is a lost pilot.

Times are seconds of the sender's CLOCK_BOOTTIME: no two hosts need to agree on the time of day.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from ensemble.core.model import Need, Output
from ensemble.errors import WireError

#: Raised with every change: both ends come from one installation, unless a site mixes two.
PROTOCOL = 1
#: The longest message; a batch of tasks is cut well below it.
FRAME_LIMIT = 16 * 2**20
_LENGTH = struct.Struct(">I")
#: Finite and not negative: a NaN would be found only where it is reckoned with.
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e10)]
Status = Annotated[int, msgspec.Meta(ge=0, le=255)]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One message; its first element on the wire is its name."""


# ---------------------------------------------------------------------------- pilot to launcher


class Hello(Message, frozen=True):
    """Who a pilot is and what its node has: its first word."""

    protocol: int
    #: Which connection of a launch: the rank in the world, and the world's size.
    rank: int
    size: int
    #: Which launch of pilots this is; the launcher put it on the command line.
    launch: int
    #: What the scheduler calls the node, or its host name.
    host: str
    pid: int
    #: Hardware threads that may be used, by core.
    cores: list[list[int]]
    #: Devices as the pilot's own environment names them, and the variable that does.
    gpus: list[str]
    memory_mb: int | None
    #: How it found its rank, and what went wrong there.
    note: str | None = None


class Gone(Message, frozen=True):
    """The pilot's guard: nothing is left below it. The only word of its connection."""

    launch: int
    rank: int


class Ran(msgspec.Struct, frozen=True, array_like=True):
    """A task's process runs."""

    id: int
    attempt: int
    at: Seconds


class Done(msgspec.Struct, frozen=True, array_like=True):
    """A task's whole process tree is gone."""

    id: int
    attempt: int
    started_at: Seconds
    at: Seconds
    #: As a shell shows it: 128 + N after signal N.
    status: Status
    was_signalled: bool = False
    #: The last lines of its output, when it did not end well.
    error: str | None = None
    #: The last 16 kB of its output, when that is kept in the store.
    output: str | None = None


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """A task's process could not be made."""

    id: int
    attempt: int
    at: Seconds
    reason: str


class Report(Message, frozen=True):
    """What happened since the last one; in this order: `dropped` never ran."""

    #: The pilot's clock now, to turn the other times into the launcher's.
    now: Seconds
    ran: list[Ran]
    done: list[Done]
    failed: list[Failed]
    dropped: list[tuple[int, int]]


class Pulse(Message, frozen=True):
    """The pilot lives."""

    now: Seconds


class Note(Message, frozen=True):
    """A line for the launcher's log."""

    what: str
    text: str


# ---------------------------------------------------------------------------- launcher to pilot


class Welcome(Message, frozen=True):
    """Which node the pilot has, and what all its tasks run on."""

    node: str
    cores: list[list[int]]
    gpus: list[str]
    memory_mb: int | None
    slots_per_node: int
    #: A path, and below an environment: bytes, as they may be no UTF-8.
    site: bytes
    #: What begins the markers of its tasks' processes.
    marker_prefix: str
    #: The launcher's own environment: what tasks start from, but for what is local to the node.
    environ: dict[bytes, bytes]
    grace_s: float
    error_tail_lines: int
    is_pinned: bool


class Work(msgspec.Struct, frozen=True, array_like=True):
    """One task to run."""

    id: int
    attempt: int
    name: str
    workflow: str
    argv: tuple[str, ...]
    #: Relative to the site.
    workdir: str
    output: Output
    environ: Mapping[str, str]
    env_script: str | None
    parent_ids: tuple[int, ...]
    need: Need
    #: Whether it is bound to its cores; else they are only kept free of others.
    is_bound: bool = True


class Run(Message, frozen=True):
    """Run these, in this order, as they fit."""

    tasks: list[Work]


class Kill(Message, frozen=True):
    """End these: what runs with TERM and, after the grace, KILL; what does not run yet is dropped."""

    pairs: list[tuple[int, int]]
    is_forced: bool = False


class Recall(Message, frozen=True):
    """Drop those of these that do not run yet."""

    pairs: list[tuple[int, int]]


class Beat(Message, frozen=True):
    """The launcher lives: the pilot may go on for so long after `at`."""

    at: Seconds
    lives_s: Seconds


class Bye(Message, frozen=True):
    """Nothing more will come: end what runs, and exit."""


FromPilot = Hello | Gone | Report | Pulse | Note
FromLauncher = Welcome | Run | Kill | Recall | Beat | Bye
T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()


def encode(message: FromPilot | FromLauncher) -> bytes:
    """Return a message as a frame.

    Raises:
        WireError: It is longer than a frame may be, or holds text that is none.
    """
    try:
        body = _encoder.encode(message)
    except UnicodeEncodeError as error:  # bytes of a foreign encoding, as Python shows them
        raise WireError(f"a {type(message).__name__} with text that is not UTF-8") from error
    if len(body) > FRAME_LIMIT:
        raise WireError(f"a {type(message).__name__} of {len(body)} bytes does not fit a frame")
    return _LENGTH.pack(len(body)) + body


@functools.cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Make the decoder of one direction, for all connections."""
    return msgspec.msgpack.Decoder(kind)


class Decoder(Generic[T]):
    """Turns what comes in, cut anywhere, into messages."""

    def __init__(self, kind: Any, *, limit: int = FRAME_LIMIT) -> None:
        """Decode one direction: `FromPilot` or `FromLauncher`.

        Args:
            kind: Which.
            limit: The longest frame that is waited for, in bytes.
        """
        self._decoder: msgspec.msgpack.Decoder[T] = _decoder(kind)
        #: The longest frame that is waited for; may be raised once the other end is known.
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Take in bytes and yield the messages that are complete.

        Raises:
            WireError: They are no messages, or one that is too long; nothing after it is read.
        """
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if length > self.limit:
                    raise WireError(f"a frame of {length} bytes is longer than {self.limit}")
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                body = bytes(memoryview(self._buffer)[start + _LENGTH.size : end])
                start = end
                try:
                    message = self._decoder.decode(body)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise WireError(f"a frame that is no message: {error}") from error
                yield message
        finally:
            del self._buffer[:start]
