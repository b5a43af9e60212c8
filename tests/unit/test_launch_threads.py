from __future__ import annotations

import threading

import pytest

from ensemble.errors import LaunchError
from ensemble.service import launch


def working() -> int:
    return sum(thread.name.startswith("start_") for thread in threading.enumerate())


def test_no_thread_is_started_once_tasks_may_have_used_up_the_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with launch._threads("start", 16) as executor:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        gate = threading.Event()
        futures = [executor.submit(gate.wait) for _ in range(100)]
        gate.set()
        assert all(future.result(timeout=10) for future in futures)


def test_a_launcher_that_gets_no_threads_says_so_and_hangs_on_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = working()
    start, started = threading.Thread.start, []

    def refuse_the_fourth(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_fourth)
    with pytest.raises(LaunchError, match="ulimit -u"), launch._threads("start", 16):
        raise AssertionError("unreachable")
    for thread in started:
        thread.join(timeout=10)
    assert working() <= before
