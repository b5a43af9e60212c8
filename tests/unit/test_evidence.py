from __future__ import annotations

import os
from dataclasses import replace

import pytest

from ensemble.drivers import process
from ensemble.service.reaper import find_evidence

ME = process.identity()
GONE = replace(ME, pid=2**22 + 1, start_ticks=1)


def test_a_launcher_that_lives_is_left_alone():
    assert find_evidence(ME, ME) is None


def test_a_process_that_is_gone_is_evidence():
    assert find_evidence(GONE, ME) == "its process is gone"


def test_the_same_pid_that_started_at_another_time_is_another_process():
    assert find_evidence(replace(ME, start_ticks=ME.start_ticks + 1), ME) == "its process is gone"


def test_another_boot_of_the_same_host_is_evidence():
    assert find_evidence(replace(ME, boot_id="another"), ME) == "its host has been booted again"


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"pid_namespace": "pid:[1]"}])
def test_what_cannot_be_looked_up_from_here_is_no_evidence(change):
    assert find_evidence(replace(GONE, **change), ME) is None


def test_a_guard_that_lives_is_still_cleaning_up():
    guard = {"guard_pid": os.getpid(), "guard_start_ticks": ME.start_ticks}
    assert find_evidence(replace(GONE, **guard), ME) is None
    guard["guard_start_ticks"] += 1
    assert find_evidence(replace(GONE, **guard), ME) == "its process is gone"
