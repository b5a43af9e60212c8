from __future__ import annotations

import os

import pytest

from ensemble.drivers import proctree

LINE = (
    b"4242 (%s) S 17 4242 4240 0 -1 4194304 97 0 0 0 0 0 0 0 20 0 3 0 123456789 2596864 221 "
    b"18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0\n"
)


@pytest.mark.parametrize("name", [b"sleep", b"a b", b"a) R 1 2 3 (b", b"new\nline", b"", b"\xff"])
def test_a_programs_name_cannot_disturb_the_rest(name: bytes) -> None:
    stat = proctree.parse_stat(LINE % name)
    assert stat == proctree.Stat(
        pid=4242, state="S", ppid=17, pgid=4242, sid=4240, threads=3, start_ticks=123456789
    )


@pytest.mark.parametrize("data", [b"", b"1 (x) S", b"nonsense"])
def test_what_is_no_stat_line_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a line"):
        proctree.parse_stat(data)


@pytest.mark.parametrize(
    ("state", "threads", "is_zombie"),
    [("Z", 1, True), ("Z", 0, True), ("X", 0, True), ("Z", 2, False), ("S", 1, False)],
)
def test_a_program_whose_first_thread_has_ended_is_no_zombie(
    state: str, threads: int, is_zombie: bool
) -> None:
    stat = proctree.Stat(1, state, 0, 1, 1, threads, 5)
    assert stat.is_zombie is is_zombie


@pytest.mark.parametrize(
    ("environ", "token"),
    [
        (b"", None),
        (b"PATH=/bin\0", None),
        (b"ENSEMBLE_TASK_TOKEN=7.41.1\0PATH=/bin\0", "7.41.1"),
        (b"PATH=/bin\0ENSEMBLE_TASK_TOKEN=7.41.1\0", "7.41.1"),
        (b"PATH=/bin\0ENSEMBLE_TASK_TOKEN=7.41.1", "7.41.1"),
        (b"X=ENSEMBLE_TASK_TOKEN=no\0", None),
        (b"MY_ENSEMBLE_TASK_TOKEN=no\0", None),
        (b"ENSEMBLE_TASK_TOKEN=\0", ""),
        (b"\xff\xfe=\xff\0ENSEMBLE_TASK_TOKEN=a\xffb\0", "a\N{REPLACEMENT CHARACTER}b"),
    ],
)
def test_the_marker_is_found_only_as_a_variable_of_its_own(
    environ: bytes, token: str | None
) -> None:
    assert proctree.parse_token(environ) == token


def test_a_process_that_is_gone_is_nothing_and_no_error() -> None:
    gone = 2**22 + 1
    assert proctree.read_stat(gone) is None
    assert proctree.read_environ(gone) == b""
    assert proctree.read_owner(gone) is None
    assert proctree.list_children(gone) == []


def test_this_process_is_seen() -> None:
    own = proctree.scan()[os.getpid()]
    assert (own.ppid, own.pgid, own.sid) == (os.getppid(), os.getpgid(0), os.getsid(0))
    assert proctree.read_owner(os.getpid()) == os.geteuid()


def test_a_walk_goes_from_parents_to_children_and_meets_nobody_twice() -> None:
    parent, own = proctree.read_stat(os.getppid()), proctree.read_stat(os.getpid())
    assert parent is not None
    assert own is not None
    tree = {parent.pid: [own.pid], own.pid: [own.pid]}
    met = list(proctree.walk([parent], lambda pid: tree.get(pid, [])))
    assert [stat.pid for stat in met] == [parent.pid, own.pid]


def test_a_walk_leaves_out_what_has_another_parent_by_now() -> None:
    own = proctree.read_stat(os.getpid())
    assert own is not None
    met = list(proctree.walk([own], lambda pid: [1, 2**22 + 1] if pid == own.pid else []))
    assert [stat.pid for stat in met] == [own.pid]


def test_without_the_kernels_lists_a_scan_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proctree, "_has_children_files", lambda: False)
    assert os.getpid() in proctree.children_reader()(os.getppid())
