from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from ensemble.core.batchjob import OVER, JobState
from ensemble.drivers.pbs import PBS, parse_jobs
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, Seen, fail
from ensemble.errors import SchedulerError, Trouble

DATA = Path(__file__).parent.parent / "data" / "pbs"
EMPTY = '{\n\t"timestamp":\t1,\n\t"pbs_version":\t"23.06.06",\n\t"pbs_server":\t"pbshead"\n}\n'


def answer(stdout: str = "", *, stderr: str = "", code: int = 0) -> Completed:
    return Completed(code=code, stdout=stdout, stderr=stderr)


def recorded(name: str, number: int = 0) -> Completed:
    """Return what a recorded command printed."""
    text = (DATA / f"{name}.txt").read_text()
    body, code = re.findall(r"^\$ .*\n((?:.*\n)*?)\[exit (\d+)\]\n", text, re.MULTILINE)[number]
    errors, brace, stdout = body.partition("{") if "{" in body else (body, "", "")
    if int(code) == 0 and not brace:
        errors, stdout = "", body
    return Completed(code=int(code), stdout=brace + stdout, stderr=errors)


def qstat(name: str) -> str:
    return (DATA / f"{name}.json").read_text()


def listed(name: str) -> dict[str, Seen]:
    return {seen.id: seen for seen in parse_jobs(answer(qstat(name)), "hpc")}


def job_with(**changes: Any) -> Seen:
    """Return what becomes of the recorded job that exited with 3, changed."""
    found = json.loads(qstat("qstat-finished-exit3"))
    job = found["Jobs"]["11.pbshead"] | changes
    found["Jobs"]["11.pbshead"] = {key: value for key, value in job.items() if value is not None}
    return parse_jobs(answer(json.dumps(found)), "hpc")[0]


# Submission


def test_submit_argv():
    request = Request(
        script=Path("/site/7.sh"), name="ens-7", output=Path("/site/7.out"), flags=("-q", "debug")
    )
    assert PBS.submit_argv(request) == [
        "qsub", "-f", "-N", "ens-7", "-o", "/site/7.out", "-j", "oe", "-r", "n", "-q", "debug", "/site/7.sh",
    ]  # fmt: skip


def test_a_colon_in_the_output_is_no_host():
    request = Request(script=Path("/7.sh"), name="ens-7", output=Path("/12:30/7.out"))
    assert f"{os.uname().nodename}:/12:30/7.out" in PBS.submit_argv(request)


def test_recorded_submission():
    assert PBS.parse_submit(recorded("qsub-ok")) == "0.pbshead"


@pytest.mark.parametrize(
    ("text", "id"),
    [
        ("123.polaris-pbs-01.hsn.cm.example\n", "123.polaris-pbs-01.hsn.cm.example"),
        ("Job classified as small\n123.srv\n", "123.srv"),
        ("123.srv\nSee https://site.example\n", "123.srv"),
        ("123\n", "123"),
    ],
)
def test_parse_submit(text, id):
    assert PBS.parse_submit(answer(text)) == id


@pytest.mark.parametrize(
    "text", ["", "\n", "ok\n", "job 12\n", ".srv\n", "12.\n", "12 13\n", "١٢.srv\n"]
)
def test_no_id_is_an_error(text):
    with pytest.raises(SchedulerError):
        PBS.parse_submit(answer(text))


# Listing


def test_recorded_listing():
    jobs = listed("qstat-all")
    assert {id: (seen.name, seen.state) for id, seen in jobs.items()} == {
        "0.pbshead": ("ensemble-1", JobState.RUNNING),
        "1.pbshead": ("ensemble-2", JobState.QUEUED),
        "2.pbshead": ("ensemble-3", JobState.QUEUED),
    }
    running, queued, held = jobs.values()
    assert running.started_at == 1795352541, "times are UTC"
    assert running.ends_at == 1795352541 + 300
    assert running.ended_at is None
    assert queued.reason == "Not Running: Insufficient amount of resource: ncpus (R: 4 A: 3 T: 4)"
    assert (queued.started_at, queued.ends_at) == (None, None)
    assert held.reason == "held"
    assert not any(seen.is_stuck for seen in jobs.values())


def test_only_the_users_own_jobs_are_told():
    assert parse_jobs(answer(qstat("qstat-all")), "somebody") == []
    assert len(parse_jobs(answer(qstat("qstat-all")), None)) == 3
    own = qstat("qstat-all").replace('"hpc@', f'"{pwd.getpwuid(os.geteuid()).pw_name}@')
    assert len(PBS.parse_status(answer(own))) == 3


@pytest.mark.parametrize(
    "comment",
    ["job held, too many failed attempts to run", "Can Never Run: Insufficient amount of resource"],
)
def test_stuck(comment):
    for letter in "HQ":
        seen = job_with(job_state=letter, comment=comment)
        assert (seen.is_stuck, seen.state) == (True, JobState.QUEUED)


@pytest.mark.parametrize(
    ("letter", "state", "reason"),
    [
        ("E", JobState.RUNNING, "ending"),
        ("S", JobState.RUNNING, "suspended"),
        ("T", JobState.QUEUED, ""),
        (
            "W",
            JobState.QUEUED,
            "waiting for its start time, or for files that could not be staged in",
        ),
        ("M", JobState.QUEUED, "moved to another server"),
        ("B", JobState.RUNNING, ""),
        ("?", JobState.RUNNING, ""),
    ],
)
def test_letters(letter, state, reason):
    seen = job_with(job_state=letter, comment=None)
    assert (seen.state, seen.reason, seen.exit_code) == (state, reason, None)


def test_recorded_ends():
    jobs = listed("qstat-finished-all")
    killed, queued, held, *_ = jobs.values()
    assert (killed.state, killed.exit_code) == (JobState.CANCELLED, 137)
    assert killed.reason.endswith("terminated by hpc@pbshead")
    assert killed.ended_at == 1795352549
    assert (queued.state, queued.exit_code, queued.started_at) == (JobState.CANCELLED, None, None)
    assert queued.ended_at == 1795352549, "of a job that never ran, only the history has a time"
    assert held.state is JobState.CANCELLED
    (failed,) = listed("qstat-finished-exit3").values()
    assert (failed.state, failed.exit_code) == (JobState.FAILED, 3)


@pytest.mark.parametrize(
    ("status", "state", "code"),
    [
        (0, JobState.FINISHED, 0),
        (1, JobState.FAILED, 1),
        (143, JobState.FAILED, 143),
        (255, JobState.FAILED, 255),
        (256 + 11, JobState.FAILED, 139),
        (271, JobState.FAILED, 143),
        (-1, JobState.FAILED, None),
        (-29, JobState.TIMEOUT, None),
        (-28, JobState.FAILED, None),
        (-20, JobState.LOST, None),
        (-4, JobState.LOST, None),
        (-99, JobState.FAILED, None),
        ("271", JobState.FAILED, 143),
    ],
)
def test_exit_statuses(status, state, code):
    seen = job_with(Exit_status=status, comment="Job run at Sun Nov 22 at 13:02 on (x:ncpus=1)")
    assert (seen.state, seen.exit_code) == (state, code)


def test_term_after_qdel_is_cancelled_and_after_the_time_limit_is_not():
    run = "Job run at Sun Nov 22 at 13:02 on (x:ncpus=1)"
    cancelled = job_with(Exit_status=271, comment=f"{run} and terminated by hpc@pbshead")
    assert (cancelled.state, cancelled.exit_code) == (JobState.CANCELLED, 143)
    over = job_with(Exit_status=271, comment=f"{run} and exceeded resource walltime")
    assert over.state is JobState.TIMEOUT
    # Its launcher heeded the signal and left in good order.
    assert job_with(Exit_status=0, substate=91, comment=None).state is JobState.CANCELLED


def test_a_job_deleted_by_force_may_live():
    seen = job_with(Exit_status=None, substate=91)
    assert seen.state is JobState.LOST
    assert seen.state not in OVER


def test_no_jobs():
    assert parse_jobs(answer(EMPTY), "hpc") == []


def test_an_unknown_id_hides_no_other_job():
    text = "qstat: Unknown Job Id 9999.pbshead\n"
    assert len(parse_jobs(answer(qstat("qstat-all"), stderr=text, code=153), "hpc")) == 3
    assert parse_jobs(recorded("after-end", 2), "hpc") == []
    assert [seen.id for seen in parse_jobs(recorded("after-end", 3), "hpc")] == ["0.pbshead"]


@pytest.mark.parametrize("code", [255, 1, 0])
def test_a_server_that_is_away_is_no_empty_queue(code):
    told = recorded("qstat-server-down")
    if code:
        with pytest.raises(SchedulerError, match="cannot connect to server") as caught:
            parse_jobs(answer(told.stdout, stderr=told.stderr, code=code), "hpc")
        assert caught.value.trouble is Trouble.RETRY
    with pytest.raises(SchedulerError):
        parse_jobs(answer("", stderr=told.stderr, code=code), "hpc")


def test_words_around_the_json_do_not_matter():
    text = f"Welcome {{user}}\n{{note}}\n{qstat('qstat-all')}\nBye {{}}\n"
    assert len(parse_jobs(answer(text, stderr="warning: {}\n"), "hpc")) == 3


def bad_json() -> str:
    """Return the recorded listing as versions that quote nothing print it."""
    text = qstat("qstat-all")
    text = text.replace('"-h -N ensemble-3 job.sh"', '"-v A="1",B -N ensemble-3 job.sh"')
    text = text.replace('"Priority":\t0,', '"Priority":\t007,')
    body = '\n}"quotes" \\x and\ttabs\n{\n"'
    return text.replace('"/usr/local/bin:/usr/bin:/bin"', f'"() {{ {body}')


def test_the_bad_json_of_older_versions_is_read():
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(bad_json(), strict=False)
    good = parse_jobs(answer(qstat("qstat-all")), "hpc")
    assert parse_jobs(answer(bad_json()), "hpc") == good


@pytest.mark.parametrize(
    "whole", [qstat("qstat-all"), bad_json(), EMPTY], ids=["good", "bad", "empty"]
)
@given(data=st.data())
def test_a_truncated_listing_is_an_error(whole, data):
    end = data.draw(st.integers(0, len(whole.rstrip()) - 1))
    with pytest.raises(SchedulerError):
        parse_jobs(answer(whole[:end]), "hpc")


ODD = st.text(st.one_of(st.sampled_from('{}[]":,\n\t019-.\\'), st.characters()))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ODD, st.lists(ODD))
KEYS = st.sampled_from(
    ["Job_Name", "Job_Owner", "job_state", "Exit_status", "substate", "stime", "obittime", "comment",
     "Resource_List", "history_timestamp"]
)  # fmt: skip


@given(text=ODD, code=st.sampled_from([0, 153, 255]))
@example(text="[" * 100_000, code=0)
@example(text='{"pbs_server":' + "[" * 100_000, code=0)
@example(text='{"pbs_server":1,"Jobs":{"1":' + "9" * 5000 + "}}", code=0)
@example(text='{"pbs_server":1,"Jobs":[]}', code=0)
def test_no_text_breaks_a_parser(text, code):
    for parse in (PBS.parse_status, PBS.parse_submit, PBS.parse_history):
        with contextlib.suppress(SchedulerError):
            parse(answer(text, stderr="qstat: Unknown Job Id 1", code=code))


@given(st.dictionaries(ODD, st.one_of(SCALARS, st.dictionaries(KEYS, SCALARS))))
@example({"1.x": {"job_state": "F", "Exit_status": 10**9, "stime": "Sun Feb 31 13:02:21 2026"}})
@example({"1.x": {"job_state": "R", "stime": "Sun Nov 22 13:02:21 2026", "Resource_List": [1]}})
def test_no_value_breaks_the_listing(jobs):
    text = json.dumps({"pbs_server": "x", "Jobs": jobs})
    assert len(parse_jobs(answer(text), None)) == sum(
        isinstance(job, dict) for job in jobs.values()
    )


def test_a_name_that_looks_like_a_number():
    assert job_with(Job_Name=7).name == "7"


# Errors


@pytest.mark.parametrize(
    ("name", "number", "trouble"),
    [
        ("qsub-bad-resource", 0, Trouble.PERMANENT),
        ("qsub-missing", 0, Trouble.PERMANENT),
        ("qsub-too-many-nodes", 0, Trouble.PERMANENT),
        ("qsub-unknown-queue", 0, Trouble.PERMANENT),
        ("qsub-walltime", 0, Trouble.PERMANENT),
        ("qsub-limit", 1, Trouble.CAPACITY),
        ("qstat-server-down", 0, Trouble.RETRY),
    ],
)
def test_recorded_troubles(name, number, trouble):
    error = fail("PBS", PBS.troubles, "submit", recorded(name, number))
    assert error.trouble is trouble
    assert recorded(name, number).stderr.split("\n")[0] in str(error)


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("Maximum number of jobs already in complex", Trouble.CAPACITY),
        ("Maximum number of jobs for user hpc already in queue prod", Trouble.CAPACITY),
        ("would exceed user hpc's limit on resource nodect in queue prod", Trouble.CAPACITY),
        ("would exceed complex's per-project limit of jobs in 'Q' state", Trouble.CAPACITY),
        ("Queue is not enabled", Trouble.CAPACITY),
        ("No free connections", Trouble.RETRY),
        ("Request not allowed: Server shutting down", Trouble.RETRY),
        ("Server connection table full", Trouble.RETRY),
        ("Bad UID for job execution", Trouble.RETRY),
        ("End of File", Trouble.UNSURE),
        ("Batch protocol error", Trouble.UNSURE),
        ("Resource: filesystems is required to be set.", Trouble.PERMANENT),
        ("Access to queue is denied", Trouble.PERMANENT),
        ("hook rejected request", Trouble.PERMANENT),
    ],
)
def test_texts(text, trouble):
    told = answer(stderr=f"qsub: {text}\n", code=1)
    assert fail("PBS", PBS.troubles, "submit", told).trouble is trouble


# Cancellation and history


@pytest.mark.parametrize(
    "text",
    ["Unknown Job Id 9.x", "Job has finished 9.x", "Request invalid for state of job 9.x"],
)
def test_an_ended_or_unknown_job_is_gone(text):
    assert re.search(PBS.is_gone, f"qdel: {text}")


def test_recorded_deletions():
    assert (recorded("after-end", 0).code, recorded("qdel-ok").code) == (0, 0)
    assert re.search(PBS.is_gone, recorded("after-end", 1).stderr)


def test_history():
    assert PBS.history_argv("11.pbshead") == ["qstat", "-x", "-f", "-F", "json", "11.pbshead"]
    own = qstat("qstat-finished-exit3").replace('"hpc@', f'"{pwd.getpwuid(os.geteuid()).pw_name}@')
    (seen,) = PBS.parse_history(answer(own))
    assert (seen.id, seen.state) == ("11.pbshead", JobState.FAILED)


@pytest.mark.parametrize(
    "text", ["PBS is not configured to maintain job history", "Unknown Job Id 11.pbshead"]
)
def test_no_history(text):
    assert PBS.parse_history(answer(EMPTY, stderr=f"qstat: {text}\n", code=1)) == []
    assert PBS.parse_history(answer("", stderr=f"qstat: {text}\n", code=1)) == []


def test_history_of_a_server_that_is_away():
    with pytest.raises(SchedulerError):
        PBS.parse_history(recorded("qstat-server-down"))
