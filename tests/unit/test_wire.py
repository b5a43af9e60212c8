from __future__ import annotations

import itertools
import math
import struct

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from ensemble.core import wire
from ensemble.core.model import Need, Output
from ensemble.core.wire import (
    Beat,
    Bye,
    Decoder,
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
from ensemble.errors import WireError

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
MAYBE_TEXT = st.none() | TEXT
IDS = st.integers(0, 2**63 - 1)
SMALL = st.integers(0, 2**31 - 1)
TIMES = st.floats(0, 1e10)
PAIRS = st.lists(st.tuples(IDS, SMALL), max_size=4)
CORES = st.lists(st.lists(st.integers(0, 4096), max_size=3), max_size=4)
ENVIRON = st.dictionaries(TEXT, TEXT, max_size=4)
NEEDS = st.builds(
    Need,
    packing=SMALL,
    threads=st.none() | SMALL,
    threads_per_core=st.none() | SMALL,
    gpus=SMALL,
    memory_mb=st.none() | SMALL,
)
WORKS = st.builds(
    Work,
    id=IDS,
    attempt=SMALL,
    name=TEXT,
    workflow=TEXT,
    argv=st.lists(TEXT, max_size=4).map(tuple),
    workdir=TEXT,
    output=st.sampled_from(Output),
    environ=ENVIRON,
    env_script=MAYBE_TEXT,
    parent_ids=st.lists(IDS, max_size=4).map(tuple),
    need=NEEDS,
    is_bound=st.booleans(),
)
DONES = st.builds(
    Done,
    id=IDS,
    attempt=SMALL,
    started_at=TIMES,
    at=TIMES,
    status=st.integers(0, 255),
    was_signalled=st.booleans(),
    error=MAYBE_TEXT,
    output=MAYBE_TEXT,
)
FROM_PILOT = st.one_of(
    st.builds(
        Hello,
        protocol=SMALL,
        rank=SMALL,
        size=SMALL,
        launch=SMALL,
        host=TEXT,
        pid=SMALL,
        cores=CORES,
        gpus=st.lists(TEXT, max_size=4),
        memory_mb=st.none() | SMALL,
        note=MAYBE_TEXT,
    ),
    st.builds(Gone, launch=SMALL, rank=SMALL),
    st.builds(
        Report,
        now=TIMES,
        ran=st.lists(st.builds(Ran, id=IDS, attempt=SMALL, at=TIMES), max_size=3),
        done=st.lists(DONES, max_size=3),
        failed=st.lists(
            st.builds(Failed, id=IDS, attempt=SMALL, at=TIMES, reason=TEXT), max_size=3
        ),
        dropped=PAIRS,
    ),
    st.builds(Pulse, now=TIMES),
    st.builds(Note, what=TEXT, text=TEXT),
)
FROM_LAUNCHER = st.one_of(
    st.builds(
        Welcome,
        node=TEXT,
        cores=CORES,
        gpus=st.lists(TEXT, max_size=4),
        memory_mb=st.none() | SMALL,
        slots_per_node=SMALL,
        site=st.binary(max_size=12),
        marker_prefix=TEXT,
        environ=st.dictionaries(st.binary(max_size=12), st.binary(max_size=12), max_size=4),
        grace_s=TIMES,
        error_tail_lines=SMALL,
        is_pinned=st.booleans(),
    ),
    st.builds(Run, tasks=st.lists(WORKS, max_size=3)),
    st.builds(Kill, pairs=PAIRS, is_forced=st.booleans()),
    st.builds(Recall, pairs=PAIRS),
    st.builds(Beat, at=TIMES, lives_s=TIMES),
    st.just(Bye()),
)
#: A direction, and a message that goes that way.
MESSAGES = st.one_of(
    st.tuples(st.just(FromPilot), FROM_PILOT), st.tuples(st.just(FromLauncher), FROM_LAUNCHER)
)


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def packed(*words) -> bytes:
    return frame(msgspec.msgpack.encode(words))


def read(data: bytes, kind=FromPilot):
    return list(Decoder(kind).feed(data))


def reads_or_refuses(data: bytes, kind):
    """Whatever comes: messages, or a WireError."""
    try:
        return read(data, kind)
    except WireError:
        return None


@settings(deadline=None)
@given(message=MESSAGES)
def test_every_message_arrives_as_it_was_sent(message):
    kind, sent = message
    assert read(wire.encode(sent), kind) == [sent]


@settings(deadline=None)
@given(messages=st.lists(FROM_PILOT, max_size=5), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_frames_may_be_cut_anywhere(messages, cuts):
    data = b"".join(map(wire.encode, messages))
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    decoder = Decoder(FromPilot)
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    assert [message for piece in pieces for message in decoder.feed(piece)] == messages
    assert not decoder._buffer


def test_one_byte_at_a_time():
    sent = [Pulse(1.0), Note("a", "b" * 300), Gone(1, 2)]
    decoder = Decoder(FromPilot)
    data = b"".join(map(wire.encode, sent))
    assert [m for byte in data for m in decoder.feed(bytes([byte]))] == sent


def test_a_message_is_there_as_soon_as_it_is_whole():
    decoder = Decoder(FromPilot)
    data = wire.encode(Pulse(1.0)) + wire.encode(Pulse(2.0))
    assert list(decoder.feed(data[:-1])) == [Pulse(1.0)]
    assert list(decoder.feed(data[-1:])) == [Pulse(2.0)]


def test_a_reader_that_stops_half_way_gets_the_rest_later():
    decoder = Decoder(FromPilot)
    messages = decoder.feed(b"".join(wire.encode(Pulse(float(i))) for i in range(3)))
    assert next(messages) == Pulse(0.0)
    messages.close()
    assert list(decoder.feed(b"")) == [Pulse(1.0), Pulse(2.0)]


@settings(deadline=None)
@given(data=st.binary(max_size=200), kind=st.sampled_from((FromPilot, FromLauncher)))
def test_garbage_is_refused_and_nothing_else(data, kind):
    reads_or_refuses(data, kind)
    reads_or_refuses(frame(data), kind)


@settings(deadline=None, max_examples=300)
@given(message=MESSAGES, place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_damaged_message_is_refused_and_nothing_else(message, place, value):
    kind, sent = message
    body = bytearray(wire.encode(sent)[4:])
    body[place % len(body)] = value
    reads_or_refuses(frame(bytes(body)), kind)


@settings(deadline=None)
@given(message=MESSAGES, cut=st.integers(1, 10**6))
def test_a_truncated_message_in_a_whole_frame_is_refused(message, cut):
    kind, sent = message
    body = wire.encode(sent)[4:]
    with pytest.raises(WireError):
        read(frame(body[: -(1 + cut % len(body))]), kind)


#: Anything that msgpack can say.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | TEXT
    | st.binary(max_size=8)
    | st.builds(msgspec.msgpack.Ext, st.integers(-128, 127), st.binary(max_size=8)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)
NAMES = st.sampled_from(
    ["Hello", "Gone", "Report", "Pulse", "Note", "Welcome", "Run", "Kill", "Recall", "Beat", "Bye"]
)


@settings(deadline=None, max_examples=300)
@given(name=NAMES | TEXT, words=st.lists(VALUES, max_size=12))
def test_wrong_types_are_refused_and_nothing_else(name, words):
    for kind in (FromPilot, FromLauncher):
        messages = reads_or_refuses(packed(name, *words), kind)
        if messages is not None:
            assert all(isinstance(message, kind) for message in messages)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack(">I", 2**30),
        b"\xff\xff\xff\xff",
        struct.pack(">I", wire.FRAME_LIMIT + 1),
        frame(b""),
        frame(b"\xc1"),
        packed("Nobody"),
        packed(),
        packed(1),
        packed("Pulse"),
        packed("Pulse", "now"),
        packed("Beat", 1.0, 1.0),  # the other direction
        frame(msgspec.msgpack.encode(Pulse(1.0)) + b"x"),
        frame(b"\x93\xa4Note\xa1\xff\xa1a"),
        frame(b"\xdd\xff\xff\xff\xff"),
        frame(b"\x96\xa6Report\x01\xdd\x7f\xff\xff\xff"),
        frame(b"\x91" * 10**6),
        frame(b"\x93\xa5Pulse\x01" + b"\x91" * 10**6),
        frame(b"\x93\xa5Pulse\x01" + b"\x81\xa1x" * 10**6),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_message_is_refused(data):
    with pytest.raises(WireError):
        read(data)


def test_a_frame_of_a_gigabyte_is_refused_by_its_first_four_bytes():
    decoder = Decoder(FromPilot)
    with pytest.raises(WireError, match="1073741824 bytes"):
        list(decoder.feed(struct.pack(">I", 2**30)))


def test_who_is_not_known_yet_must_be_brief():
    decoder = Decoder(FromPilot, limit=100)
    long = wire.encode(Note("a", "b" * 200))
    with pytest.raises(WireError):
        list(decoder.feed(long))
    decoder = Decoder(FromPilot, limit=100)
    assert list(decoder.feed(wire.encode(Pulse(1.0)))) == [Pulse(1.0)]
    decoder.limit = 1000
    assert list(decoder.feed(long)) == [Note("a", "b" * 200)]


@pytest.mark.parametrize("at", [math.nan, math.inf, -math.inf, -1.0, 1e300])
def test_a_time_that_is_none_is_refused(at):
    with pytest.raises(WireError):
        read(packed("Pulse", at))
    with pytest.raises(WireError):
        read(packed("Report", 1.0, [[1, 1, at]], [], [], []))


@pytest.mark.parametrize("status", [-1, 256, 2**40])
def test_an_exit_status_is_a_byte(status):
    with pytest.raises(WireError):
        read(packed("Report", 1.0, [], [[1, 1, 1.0, 2.0, status]], [], []))


def test_messages_before_the_one_that_is_refused_are_read():
    decoder = Decoder(FromPilot)
    messages = decoder.feed(wire.encode(Pulse(1.0)) + frame(b"\xc1"))
    assert next(messages) == Pulse(1.0)
    with pytest.raises(WireError):
        next(messages)


def test_what_does_not_fit_a_frame_is_not_sent():
    with pytest.raises(WireError, match="Note of"):
        wire.encode(Note("a", "b" * wire.FRAME_LIMIT))


def test_text_that_is_none_is_not_sent():
    with pytest.raises(WireError, match="UTF-8"):
        wire.encode(Note("a", b"\xff".decode("utf-8", "surrogateescape")))


def test_a_newer_pilot_may_say_more():
    assert read(packed("Pulse", 1.0, "more")) == [Pulse(1.0)]
