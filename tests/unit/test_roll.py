"""The roll of a launcher's pilots: it tells how many may still run something, or nothing at all."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ensemble.drivers import roll
from ensemble.drivers.roll import Roll, count_left, gone, joined, leave_gone

MARKER = "7-100-2000."


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "log" / "launcher-3"


def write_all(directory: Path, *lines: str) -> Roll:
    made = Roll(directory, MARKER)
    made.write(lines)
    return made


def test_who_has_joined_is_there_until_one_of_two_says_that_it_is_gone(directory: Path) -> None:
    made = write_all(directory)
    assert count_left(directory, MARKER) == 0
    made.write([joined(0, 1), joined(0, 12)])
    made.write([joined(1, 2)])
    assert count_left(directory, MARKER) == 3
    leave_gone(directory, MARKER, 0, 12)
    leave_gone(directory, MARKER, 0, 12)
    leave_gone(directory, MARKER, 5, 5)  # it never joined
    assert count_left(directory, MARKER) == 2
    made.write([gone(0, 1), gone(0, 12)])
    assert count_left(directory, MARKER) == 1
    leave_gone(directory, MARKER, 1, 2)
    assert count_left(directory, MARKER) == 0


def test_what_an_earlier_launcher_left_does_not_count(directory: Path) -> None:
    for marker in ("6-100-2000.", "7-100-200.", "7-100-2000.1."):
        Roll(directory, marker).write([joined(0, 0)])
        leave_gone(directory, marker, 0, 0)
        assert count_left(directory, marker) == 0
        assert count_left(directory, MARKER) is None
    stale = sorted(directory.iterdir())
    write_all(directory, joined(0, 0))
    assert [path for path in stale if path.exists()] == [directory / "roll"]
    for marker in ("6-100-2000.", "7-100-200.", "7-100-2000.0-"):
        leave_gone(directory, marker, 0, 0)  # an old pilot's guard, that comes late
    assert count_left(directory, MARKER) == 1


def test_all_files_are_the_owner_s_alone_under_any_umask(directory: Path) -> None:
    for umask in (0, 0o777):
        before = os.umask(0)
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o777)
        os.umask(umask)
        try:
            write_all(directory, joined(0, 0))
            if umask == 0:
                leave_gone(directory, MARKER, 0, 0)
        finally:
            os.umask(before)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o755
        for path in directory.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nobody_comes_back_to_a_launcher_that_left_in_good_order(directory: Path) -> None:
    write_all(directory, joined(0, 0))
    leave_gone(directory, MARKER, 0, 0)
    (directory / "pilots-0.log").touch()
    roll.remove(directory)
    leave_gone(directory, MARKER, 0, 1)
    assert [path.name for path in directory.iterdir()] == ["pilots-0.log"]
    roll.remove(directory / "not there")
    leave_gone(directory / "not there", MARKER, 0, 1)


def edit(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda directory: (directory / "roll").write_text(
        change((directory / "roll").read_text())
    )


def swap(directory: Path) -> None:
    directory.rename(directory.with_name("elsewhere"))
    directory.symlink_to("elsewhere")


def link(directory: Path) -> None:
    (directory / "roll").rename(directory / "other")
    (directory / "roll").symlink_to("other")


def pipe(directory: Path) -> None:
    (directory / "roll").unlink()
    os.mkfifo(directory / "roll", 0o600)


@pytest.mark.parametrize(
    "spoil",
    [
        edit(lambda text: ""),
        edit(lambda text: text[:-1]),
        edit(lambda text: text[:-4]),
        edit(lambda text: text.partition("\n")[2]),
        edit(lambda text: text + "joined 0\n"),
        edit(lambda text: text + "joined 0-1joined 0-2\n"),
        edit(lambda text: text + "\n"),
        edit(lambda text: text + "\0" * 512),
        edit(lambda text: text.replace("\n", "\r\n")),
        edit(lambda text: text + "goné 0-1\n"),
        lambda directory: (directory / "roll").unlink(),
        lambda directory: (directory / "roll").chmod(0o640),
        lambda directory: directory.chmod(0o775),
        lambda directory: directory.chmod(0o757),
        lambda directory: directory.rename(directory.with_name("elsewhere")),
        swap,
        link,
        pipe,
    ],
)
def test_a_roll_that_cannot_be_trusted_says_nothing(
    directory: Path, spoil: Callable[[Path], object]
) -> None:
    write_all(directory, joined(0, 0), gone(0, 0))
    assert count_left(directory, MARKER) == 0
    spoil(directory)
    assert count_left(directory, MARKER) is None


def test_another_user_s_roll_says_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(directory)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert count_left(directory, MARKER) is None


def test_a_roll_that_cannot_be_written_says_nothing_ever_after(directory: Path) -> None:
    made = write_all(directory, joined(0, 0), gone(0, 0))
    size = (directory / "roll").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
    try:
        made.write([joined(0, 1)])  # a part of it is written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert count_left(directory, MARKER) is None
    made.write([gone(0, 1)])
    assert count_left(directory, MARKER) is None


def test_a_file_system_that_takes_nothing_at_all_is_an_error(directory: Path) -> None:
    made = write_all(directory)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        os.dup2(full, made._fd, inheritable=False)
    finally:
        os.close(full)
    with pytest.raises(OSError, match="nvalid"):
        made.write([joined(0, 1)])
