"""The pilots' link: strangers are turned away and logged, and nothing secret gets out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from ensemble.core import wire
from ensemble.core.model import NewTask, Outcome
from ensemble.core.states import State
from ensemble.core.wire import PROTOCOL, Done, Gone, Hello, Pulse, Report
from ensemble.drivers import linkfile, proctree
from ensemble.drivers.linkfile import LinkFile
from tests.integration.launching import WHEEL, Ensemble, Launched, sh

pytestmark = WHEEL


def hello(rank: int = 0, **fields: object) -> Hello:
    known = {
        "protocol": PROTOCOL,
        "rank": rank,
        "size": 2,
        "launch": 0,
        "host": "stranger",
        "pid": os.getpid(),
        "cores": [[0]],
        "gpus": [],
        "memory_mb": 1,
    }
    return Hello(**{**known, **fields})  # type: ignore[arg-type]


def frame(body: bytes, length: int | None = None) -> bytes:
    return struct.pack(">I", len(body) if length is None else length) + body


@contextlib.contextmanager
def called(link: LinkFile) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", link.port), timeout=30) as plain:
        yield plain


def speak(link: LinkFile, context: ssl.SSLContext | None, *said: bytes) -> bytes:
    """Say something and listen until the other end hangs up."""
    heard = b""
    with called(link) as plain, contextlib.suppress(ConnectionError, ssl.SSLError, BrokenPipeError):
        stream = plain if context is None else context.wrap_socket(plain)
        try:
            for words in said:
                stream.sendall(words)
            while data := stream.recv(65536):
                heard += data
        finally:
            stream.close()
    return heard


def without_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def with_another_certificate() -> ssl.SSLContext:
    other = linkfile.make(["127.0.0.1"], 1, 2, launcher_id=1)
    context = other.client_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def refused(ens: Ensemble, launched: Launched, count: int) -> str:
    await ens.eventually(lambda: len(launched.events("link.refused")) >= count)
    assert len(launched.events("link.refused")) == count, launched.log
    return [line for line in launched.log.splitlines() if "link.refused" in line][-1]


async def test_strangers_are_refused_and_nothing_else_happens(ens: Ensemble) -> None:
    await ens.store.add([sh("sleep 600"), sh("sleep 600")])
    launched = ens.launch("--persistent", mode="serial")
    pilots = await ens.joined(launched)
    await ens.reach(State.RUNNING)
    link = linkfile.read(launched.run_directory / "link.json")
    right = link.client_context()

    strangers: list[tuple[ssl.SSLContext | None, bytes, str]] = [
        (None, b"GET / HTTP/1.1\r\n\r\n", "no TLS"),
        (None, os.urandom(4096), "no TLS"),
        (without_certificate(), wire.encode(hello(1)), "no TLS"),
        (with_another_certificate(), wire.encode(hello(1)), "no TLS"),
        (right, frame(b"", length=2**30), "a frame of 1073741824 bytes"),
        (right, frame(b"\xc1garbage"), "no message"),
        (right, frame(b"\x93\xa5Pulse\x01" + b"\x91" * 100_000), "no message"),
        (right, wire.encode(hello(0)), "no pilot was expected as rank 0"),
        (right, wire.encode(hello(7)), "no pilot was expected as rank 7"),
        (right, wire.encode(hello(-1)), "no pilot was expected as rank -1"),
        (right, wire.encode(hello(0, launch=5)), "launch 5"),
        (right, wire.encode(Pulse(1.0)), "a Pulse came before its Hello"),
        (
            right,
            wire.encode(
                Report(now=1.0, ran=[], done=[Done(1, 1, 1.0, 1.0, 0)], failed=[], dropped=[])
            ),
            "a Report came before its Hello",
        ),
        # Only the first word counts.
        (right, wire.encode(hello(1)) + wire.encode(Pulse(1.0)), "no pilot was expected as rank 1"),
    ]
    for number, (context, words, reason) in enumerate(strangers, 1):
        heard = speak(link, context, words)
        assert context is None or heard == b""
        line = await refused(ens, launched, number)
        assert reason in line, line
        assert "127.0.0.1:" in line
    # Who calls and hangs up, or says that somebody is gone who never was, is not even that.
    with called(link):
        pass
    await refused(ens, launched, len(strangers) + 1)
    with called(link) as plain, right.wrap_socket(plain) as stream:
        stream.sendall(wire.encode(Gone(launch=3, rank=9)))
    with called(link) as plain, right.wrap_socket(plain):
        pass
    for _ in range(30):  # they do not fill the log
        speak(link, None, b"x" * 100)
    await ens.eventually(lambda: len(launched.events("link.refused")) == 20)

    assert launched.pilots() == pilots
    assert not launched.events("pilot.silent")
    assert "Traceback" not in launched.log
    assert await ens.states() == [State.RUNNING, State.RUNNING]
    ids = [task.id for task in await ens.tasks()]
    await ens.store.kill(ids)
    await ens.gone()
    (more,) = await ens.store.add([sh("true")])
    await ens.reach(State.JOB_FINISHED, more)
    # Nor is anybody waited for who never says a word.
    with called(link), called(link) as plain, right.wrap_socket(plain):
        launched.signal(signal.SIGTERM)
        assert await ens.leave(launched) == 0, launched.log
    assert [await ens.outcomes(id) for id in ids] == [[Outcome.KILLED]] * 2


async def test_the_key_is_its_owners_and_goes_with_the_launcher(ens: Ensemble) -> None:
    for umask in (0o077, 0o000):
        (task_id,) = await ens.store.add(
            [NewTask(command=["sh", "-c", "env -0 > environ; sleep 600"], name="t")]
        )
        before = os.umask(umask)
        try:
            launched = ens.launch("--persistent", mode="serial")
        finally:
            os.umask(before)
        await ens.joined(launched)
        path = launched.run_directory / "link.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        link = json.loads(path.read_text())
        secret = link["key"].splitlines()[2]
        assert len(secret) > 30
        await ens.reach(State.RUNNING, task_id)
        for pid in {*proctree.scan()}:
            for kind in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    assert secret.encode() not in Path(f"/proc/{pid}/{kind}").read_bytes(), pid
        await ens.store.kill([task_id])
        await ens.gone()
        launched.signal(signal.SIGTERM)
        assert await ens.leave(launched) == 0, launched.log
        assert not path.exists()
        assert not list(launched.run_directory.glob(".link*"))
        for file in [launched.log_path, *launched.run_directory.rglob("*"), *_data(ens)]:
            if file.is_file():
                assert secret.encode() not in file.read_bytes(), file


def _data(ens: Ensemble) -> list[Path]:
    return [*(ens.site.path / "data").rglob("*")]
