"""The spool's file: whole or not at all, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, strategies as st

from ensemble.core.model import Cause, End, Outcome, Start
from ensemble.service import spool
from ensemble.service.spool import Head, SpoolError

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
HEAD = Head(mark="abc123 boot 1 1", lease_id=5, launcher_id=3, reason="received SIGTERM")
START = Start(id=7, attempt=2, at=NOW, nodes=("n1", "n2"))
LOST = End(id=7, attempt=2, outcome=Outcome.LOST, at=NOW, cause=Cause.NODE_LOST)
FAILED = End(
    id=8, attempt=1, outcome=Outcome.ERROR, at=NOW, started_at=NOW, nodes=("n1",), exit_code=7,
    cause=Cause.EXIT_CODE, reason="exit 7", error="line one\nünd zwei", output="",
)  # fmt: skip
DONE = End(id=2**63 - 1, attempt=2**31 - 1, outcome=Outcome.DONE, at=NOW, exit_code=0)


def written(directory: Path) -> bytes:
    return spool.write(directory, HEAD, [START], [LOST, FAILED, DONE], now=NOW).read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    directory = tmp_path / "log" / "spool"
    written(directory)
    assert spool.find(directory) == {5: directory / "lease-5.jsonl"}
    found = spool.read(directory / "lease-5.jsonl")
    assert found.head == msgspec.structs.replace(HEAD, starts=1, ends=3)
    assert (found.starts, found.ends) == ([START], [LOST, FAILED, DONE])
    assert [path.name for path in directory.iterdir()] == ["lease-5.jsonl"]
    assert stat.S_IMODE((directory / "lease-5.jsonl").stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_spool_may_say_no_more_than_that_the_launcher_has_left(tmp_path: Path) -> None:
    found = spool.read(spool.write(tmp_path, HEAD, [], [], now=NOW))
    assert (found.head, found.starts, found.ends) == (HEAD, [], [])


def test_an_end_without_a_time_was_at_the_latest_now(tmp_path: Path) -> None:
    back = End(id=1, attempt=1, outcome=Outcome.GIVEN_BACK)
    assert spool.read(spool.write(tmp_path, HEAD, [], [back], now=NOW)).ends[0].at == NOW


def test_any_text_can_be_kept_and_a_long_one_keeps_its_end(tmp_path: Path) -> None:
    odd = msgspec.structs.replace(
        FAILED, reason="\0\ud800", error="x" * 10**6 + "\r\n\x1b\u2028end"
    )
    head = msgspec.structs.replace(HEAD, reason="\0" * 10**6)
    (found,) = spool.read(spool.write(tmp_path, head, [], [odd], now=NOW)).ends
    assert found.reason == "\N{REPLACEMENT CHARACTER}?"
    assert found.error is not None
    assert (len(found.error), found.error[-5:]) == (16384, "\x1b\u2028end")
    many = [msgspec.structs.replace(odd, id=n) for n in range(1, 20_001)]
    path = spool.write(tmp_path, HEAD, [], many, now=NOW)
    assert path.stat().st_size < 64 << 20
    assert len(spool.read(path).ends) == len(many)


def test_one_that_is_cut_off_anywhere_is_none(tmp_path: Path) -> None:
    whole = written(tmp_path)
    for length in range(len(whole)):
        with pytest.raises(SpoolError):
            spool.parse(whole[:length])
    with pytest.raises(SpoolError):
        spool.parse(whole + whole.splitlines(keepends=True)[-1])


@pytest.mark.parametrize("version", ["2", "0", "null", '"1"', "true", "1e99"])
def test_one_of_another_version_is_not_guessed_at(tmp_path: Path, version: str) -> None:
    data = written(tmp_path).replace(b'"version":1', f'"version":{version}'.encode())
    with pytest.raises(SpoolError, match=r"version"):
        spool.parse(data)


@pytest.mark.parametrize(
    "changed",
    [
        {"id": 0}, {"id": 2**63}, {"id": -1}, {"attempt": 0}, {"attempt": 2**31}, {"exit_code": 2**31},
        {"exit_code": 0.5}, {"outcome": "fine"}, {"outcome": None}, {"cause": "bad luck"},
        {"at": "2026-07-01T12:00:00"}, {"at": "0001-01-01T00:00:00+14:00"}, {"at": "9999-12-31T23:59:59-14:00"},
        {"nodes": ["a\0b"]}, {"nodes": "n1"}, {"error": "x" * 20_000}, {"reason": 7},
    ],
)  # fmt: skip
def test_what_the_store_could_not_hold_is_refused(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    head, report = spool.write(tmp_path, HEAD, [], [FAILED], now=NOW).read_bytes().splitlines()
    report = msgspec.json.encode({**msgspec.json.decode(report), **changed})
    with pytest.raises(SpoolError):
        spool.parse(b"\n".join([head, report, b""]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("whole"))


@given(
    edits=st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=8)), min_size=1, max_size=4)
)
def test_damage_is_found_or_harmless(whole: bytes, edits: list[tuple[int, bytes]]) -> None:
    data = whole
    for place, new in edits:
        at = place % len(data)
        data = data[:at] + new + data[at + len(new) :]
    with contextlib.suppress(SpoolError):
        found = spool.parse(data)
        assert (
            (found.head.starts, found.head.ends) == (len(found.starts), len(found.ends)) == (1, 3)
        )
        for report in (*found.starts, *found.ends):
            assert 0 < report.id < 2**63
            assert report.at is None or report.at.astimezone(UTC)


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"{}\n", b"[" * 200_000, b"\xff\xfe\n", b'{"version":1}\n', b"null\n"]
)
def test_anything_else_is_none(data: bytes) -> None:
    with pytest.raises(SpoolError):
        spool.parse(data)


def test_only_files_with_the_name_of_one_are_looked_at(tmp_path: Path) -> None:
    for name in ("lease-5.draft", "lease-5.jsonl.bad", "lease-05.jsonl", "lease-0.jsonl", "lease-x.jsonl",
                 f"lease-{10**19}.jsonl", "lease-\N{ARABIC-INDIC DIGIT FIVE}.jsonl"):  # fmt: skip
        (tmp_path / name).touch()
    assert spool.find(tmp_path) == {}
    assert spool.find(tmp_path / "nowhere") == {}
    assert spool.find(tmp_path / "lease-5.draft") == {}


def test_a_link_a_folder_or_a_fifo_is_none(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "lease-5.jsonl")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "folder", "fifo"):
        with pytest.raises(SpoolError, match=r"regular file"):
            spool.read(tmp_path / name)


def test_where_it_does_not_fit_nothing_is_left_and_an_earlier_one_stays(tmp_path: Path) -> None:
    earlier = spool.write(tmp_path, HEAD, [], [], now=NOW).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match=r"too large"):
            written(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["lease-5.jsonl"]
    assert (tmp_path / "lease-5.jsonl").read_bytes() == earlier


def test_a_half_written_draft_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "lease-5.draft").write_text("half")
    written(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lease-5.jsonl"]
