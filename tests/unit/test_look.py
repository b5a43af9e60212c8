"""What a look at the scheduler's listing means for a batch job."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import product

import pytest
from hypothesis import given, strategies as st

from ensemble.config import ServiceSettings
from ensemble.core.batchjob import ACTIVE, BatchJob, JobState
from ensemble.core.model import JobMode
from ensemble.drivers.scheduler import Seen
from ensemble.service.look import find, is_deserted, judge_missing, judge_seen, number

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SETTINGS = ServiceSettings(lost_looks=3, lost_s=120)
JOB = BatchJob(
    id=7, name="ens-site-abc-7", scheduler="slurm", scheduler_id="12", state=JobState.QUEUED,
    num_nodes=1, wall_time_minutes=10, job_mode=JobMode.MPI, wf_filter=None, project=None, queue=None,
    policy="debug", why="", reason="Priority", exit_code=None, error=None, record=None, missing=0,
    created_at=NOW, submitted_at=NOW, started_at=None, ended_at=None, ends_at=None,
)  # fmt: skip
FINAL = [JobState.FINISHED, JobState.FAILED, JobState.TIMEOUT, JobState.CANCELLED]


def seen(state=JobState.QUEUED, **fields):
    return Seen(**{"id": "12", "state": state, "name": JOB.name, "reason": "Priority", **fields})


# ---------------------------------------------------------------------------- finding it


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("12", "12"), ("12", "12;cluster"), ("12;cluster", "12"), ("12.server", "12.server.site.org"),
        ("ƒAbC", "fAbC"),
    ],
)  # fmt: skip
def test_one_id_in_all_its_spellings(ours, theirs):
    assert number(ours) == number(theirs)
    assert find(replace(JOB, scheduler_id=ours), [seen(id="1"), seen(id=theirs)]).id == theirs


def test_a_job_whose_id_is_known_is_not_taken_for_another_of_its_name():
    assert find(JOB, [seen(id="13")]) is None
    assert find(JOB, [seen(id="121"), seen(id="1")]) is None


def test_a_job_whose_id_nobody_knows_is_found_by_its_whole_name():
    job = replace(JOB, scheduler_id=None)
    others = [seen(id="1", name=""), seen(id="2", name="ens-site-abc-77"), seen(id="3", name="x")]
    assert find(job, others) is None
    assert find(job, [*others, seen(id="4")]).id == "4"
    assert find(job, []) is None


# ---------------------------------------------------------------------------- what is listed


def test_the_same_again_is_no_news():
    assert judge_seen(JOB, seen()) is None


@pytest.mark.parametrize(
    ("job", "what"),
    [
        (JOB, seen(JobState.RUNNING)),
        (JOB, seen(reason="Resources")),
        (JOB, seen(is_stuck=True)),
        (replace(JOB, scheduler_id=None), seen()),
        (replace(JOB, missing=2), seen()),
        (replace(JOB, state=JobState.RUNNING), seen(JobState.RUNNING, ends_at=1.8e9)),
        (replace(JOB, state=JobState.SUBMITTED, reason=None), seen(reason="")),
    ],
)
def test_whatever_differs_is_news(job, what):
    found = judge_seen(job, what)
    assert (found.id, found.was, found.state, found.scheduler_id) == (
        7,
        job.state,
        what.state,
        "12",
    )


def test_a_job_that_waits_for_ever_is_told_to_be_stuck():
    assert (
        judge_seen(JOB, seen(reason="PartitionTimeLimit", is_stuck=True)).reason
        == "stuck: PartitionTimeLimit"
    )


def test_a_launcher_that_lives_knows_better_than_a_listing_that_is_late():
    job = replace(JOB, state=JobState.RUNNING, has_live_launcher=True, reason=None)
    for state in (JobState.QUEUED, JobState.SUBMITTED, JobState.LOST):
        assert judge_seen(job, seen(state)) is None
    for state in FINAL:
        assert judge_seen(job, seen(state)).state is state, "the scheduler's word that it is over"


def test_an_end_that_is_but_rounded_is_no_news():
    running = replace(JOB, state=JobState.RUNNING, ends_at=NOW)
    end_s = NOW.timestamp()
    for apart_s, is_news in (
        (0.0, False),
        (59.0, False),
        (-59.0, False),
        (61.0, True),
        (-61.0, True),
    ):
        found = judge_seen(running, seen(JobState.RUNNING, ends_at=end_s + apart_s))
        assert (found is not None) == is_news
    assert judge_seen(running, seen(JobState.RUNNING)) is None


@pytest.mark.parametrize("state", FINAL)
def test_however_a_cancelled_one_ends_it_was_cancelled(state):
    job = replace(JOB, state=JobState.RUNNING, spec={"cancelled": "by hand"})
    found = judge_seen(job, seen(state, exit_code=15, ended_at=1.7e9))
    assert (found.state, found.reason, found.exit_code) == (JobState.CANCELLED, "by hand", 15)
    assert found.ended_at == datetime.fromtimestamp(1.7e9, UTC)


def test_one_that_is_being_cancelled_is_still_there():
    job = replace(JOB, spec={"cancelled": "by hand"})
    assert judge_seen(job, seen(JobState.RUNNING)).state is JobState.RUNNING


# ---------------------------------------------------------------------------- what is not listed


def test_it_is_given_up_only_after_so_many_looks_and_so_long():
    for missing, missing_s in product(range(6), (None, 0.0, 119.9, 120.0, 1e6)):
        job = replace(JOB, missing=missing, missing_s=missing_s)
        found = judge_missing(job, SETTINGS)
        if missing >= 2 and (missing_s or 0) >= 120:
            assert (found.state, found.scheduler_id) == (JobState.LOST, None)
        else:
            assert found is None


def test_it_is_told_whether_it_was_ever_there():
    gone = replace(JOB, missing=9, missing_s=999.0)
    assert "does not know it any more" in judge_missing(gone, SETTINGS).reason
    never = replace(gone, scheduler_id=None, reason="the answer did not come")
    assert (
        judge_missing(never, SETTINGS).reason
        == "it was never seen in slurm: the answer did not come"
    )


@pytest.mark.parametrize(
    ("record", "state", "code"),
    [
        ({"exit_code": 0, "reason": "no work left", "tasks": 3}, JobState.FINISHED, 0),
        ({"exit_code": 4, "reason": "no store"}, JobState.FAILED, 4),
        ({"reason": "?"}, JobState.FAILED, None),
        ({"exit_code": "0"}, JobState.FAILED, None),
        ({}, JobState.FAILED, None),
    ],
)
def test_a_launchers_last_word_counts_at_once(record, state, code):
    found = judge_missing(replace(JOB, record=record), SETTINGS)
    assert (found.state, found.exit_code, found.reason) == (state, code, record.get("reason"))


def test_the_last_word_of_an_earlier_launcher_ends_nothing_while_the_next_one_lives():
    job = replace(JOB, record={"exit_code": 0}, has_live_launcher=True)
    assert judge_missing(job, SETTINGS) is None


def test_a_cancelled_one_that_is_gone_was_cancelled():
    found = judge_missing(replace(JOB, spec={"cancelled": "by hand"}), SETTINGS)
    assert (found.state, found.reason) == (JobState.CANCELLED, "by hand")


@given(
    state=st.sampled_from(sorted(ACTIVE)),
    what=st.sampled_from(JobState),
    is_live=st.booleans(),
    cancelled=st.booleans(),
    reason=st.text(),
    missing=st.integers(0, 5),
)
def test_nothing_but_a_final_word_ends_a_job_that_is_listed(
    state, what, is_live, cancelled, reason, missing
):
    job = replace(
        JOB,
        state=state,
        has_live_launcher=is_live,
        missing=missing,
        spec={"cancelled": "x"} if cancelled else {},
    )
    found = judge_seen(job, seen(what, reason=reason))
    if found is None:
        return
    if found.state not in ACTIVE:
        assert what not in ACTIVE
    assert found.was is state


# ---------------------------------------------------------------------------- what runs and does nothing


@pytest.mark.parametrize(
    ("changed", "is_so"),
    [
        ({}, True),
        ({"launcher_id": None}, False),
        ({"has_live_launcher": True}, False),
        ({"record": {"exit_code": 0}}, False),
        ({"state": JobState.QUEUED}, False),
    ],
)
def test_a_job_is_deserted_whose_launcher_was_lost_without_a_word(changed, is_so):
    job = replace(JOB, **{"state": JobState.RUNNING, "launcher_id": 3, **changed})
    assert is_deserted(job, seen(JobState.RUNNING)) == is_so
    assert not is_deserted(job, seen(JobState.FINISHED))
