"""Cobalt, LSF, Grid Engine and Flux: what the drivers make of texts. No recordings: by the manuals' examples."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from ensemble.core.batchjob import JobState
from ensemble.drivers import batch, cobalt, flux, lsf, sge
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, Scheduler, fail
from ensemble.errors import SchedulerError, Trouble

ALL = (cobalt.COBALT, lsf.LSF, sge.SGE, flux.FLUX)
REQUEST = Request(
    script=Path("/site/qsubmit/qlaunch7.sh"),
    name="ens-site-7f3a-7",
    output=Path("/site/log/qlaunch7.out"),
    flags=("-q", "debug", "--odd=a b"),
)


def said(stdout: str = "", stderr: str = "", code: int = 0) -> Completed:
    return Completed(code=code, stdout=stdout, stderr=stderr)


def refused(parse: Any, answer: Completed) -> SchedulerError:
    with pytest.raises(SchedulerError) as caught:
        parse(answer)
    assert "\n" not in str(caught.value)
    return caught.value


each = pytest.mark.parametrize("scheduler", ALL, ids=lambda scheduler: scheduler.name)


# All four


@each
def test_flags_come_last_of_the_options(scheduler: Scheduler) -> None:
    argv = scheduler.submit_argv(REQUEST)
    end = argv if scheduler.is_script_piped else argv[:-1]
    assert tuple(end[-3:]) == REQUEST.flags
    assert any(REQUEST.name in word for word in argv)
    assert any(str(REQUEST.output) in word for word in argv)
    assert (argv[-1] == str(REQUEST.script)) != scheduler.is_script_piped


@each
def test_they_are_found_by_name(scheduler: Scheduler) -> None:
    assert batch.get(scheduler.name, directory=Path(), max_running=1) is scheduler
    # The first one is how it is recognised: no two may share it.
    assert sum(scheduler.programs[0] in other.programs for other in ALL) == 1


texts = st.one_of(
    st.text(),
    st.text(alphabet="[]{}<>\"':,0123456789\n \\=-EINACTVRUjobs_infolist/x.NAe"),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(
            st.sampled_from(["jobs", "RECORDS", "id", "state", "name", "JOBID", "STAT", "ERROR", "result", "exception"]), inner
        ),
    ).map(json.dumps),
    st.fixed_dictionaries({
        "jobs": st.lists(st.dictionaries(
            st.sampled_from(["id", "state", "name", "result", "returncode", "exception", "annotations", "t_run", "urgency"]),
            st.none() | st.integers() | st.floats() | st.sampled_from(["INACTIVE", "RUN", "SCHED", {}, {"sched": 3}, {"occurred": 1, "type": 2}, [1]]),
        )),
    }).map(json.dumps),
    st.fixed_dictionaries({
        "RECORDS": st.lists(st.dictionaries(
            st.sampled_from(["JOBID", "STAT", "EXIT_CODE", "EXIT_REASON", "KILL_REASON", "JOB_NAME"]),
            st.none() | st.integers() | st.sampled_from(["7", "EXIT", "TERM_", "²", "PEND", [], {}]),
        )),
    }).map(json.dumps),
    st.text().map(lambda text: f"<job_info>{text}</job_info>"),
    st.text().map(lambda text: f"JobID  State  WallTime  StartTime  JobName  \n=======\n{text}\n"),
    st.text().map(lambda text: f"=====\njobnumber 3\nexit_status {text}\nfailed {text}\n"),
)  # fmt: skip


@each
@given(
    text=texts,
    error=st.sampled_from(["", "warning"]) | st.text(),
    code=st.sampled_from([0, 1, 255]),
)
@example(text="[" * 100_000, error="", code=0)
@example(text='{"jobs":' * 50_000, error="", code=0)
@example(text="{" * 100_000, error="", code=0)
@example(text="<a>" * 100_000, error="", code=0)
@example(text='{"jobs": [{"id": 1e999, "state": "RUN"}]}', error="", code=0)
@example(text='{"jobs": [{"id": ' + "9" * 5000 + ', "state": "RUN"}]}', error="", code=0)
@example(text="٣", error="", code=0)
def test_no_text_raises_anything_else(
    scheduler: Scheduler, text: str, error: str, code: int
) -> None:
    answer = said(text, error, code)
    parsers = (scheduler.parse_status, scheduler.parse_submit, scheduler.parse_history)
    for parse in filter(None, parsers):
        with contextlib.suppress(SchedulerError):
            parse(answer)


@each
@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "hello",
        "{}",
        "[]",
        "null",
        '{"jobs": {}}',
        '{"RECORDS": ""}',
        "<job_info",
        "<html/>",
        "JobID",
    ],
)
def test_nonsense_is_no_listing_and_no_id(scheduler: Scheduler, text: str) -> None:
    assert refused(scheduler.parse_status, said(text)).trouble is Trouble.RETRY
    assert refused(scheduler.parse_submit, said(text)).trouble is Trouble.UNSURE


LISTINGS = {
    "cobalt": (
        "JobID   State    WallTime  StartTime                             JobName          \n"
        "==================================================================================\n"
        "199     running  01:30:00  Sun Nov 22 13:02:21 2026 +0000 (UTC)  ens-site-7f3a-1  \n"
        " 20     queued   00:30:00  N/A                                   two words        \n"
    ),
    "lsf": json.dumps({
        "COMMAND": "bjobs",
        "JOBS": 2,
        "RECORDS": [
            {"JOBID": "199", "STAT": "RUN", "JOB_NAME": "ens-site-7f3a-1", "EXIT_CODE": "", "EXIT_REASON": "", "KILL_REASON": ""},
            {"JOBID": "20", "STAT": "PEND", "JOB_NAME": "two words", "EXIT_CODE": "", "EXIT_REASON": "", "KILL_REASON": ""},
            {"JOBID": "21", "ERROR": "Job <21> is not found"},
        ],
    }, indent=2),
    "sge": """<?xml version='1.0'?>
<job_info  xmlns:xsd="http://arc.liv.ac.uk/repos/darcs/sge/source/dist/util/resources/schemas/qstat/qstat.xsd">
  <queue_info>
    <job_list state="running">
      <JB_job_number>199</JB_job_number><JAT_prio>0.55500</JAT_prio><JB_name>ens-site-7f3a-1</JB_name>
      <JB_owner>hpc</JB_owner><state>r</state><JAT_start_time>2026-11-22T13:02:21.123</JAT_start_time><slots>4</slots>
    </job_list>
  </queue_info>
  <job_info>
    <job_list state="pending">
      <JB_job_number>20</JB_job_number><JB_name>two words</JB_name><state>qw</state>
      <JB_submission_time>2026-11-22T13:02:21</JB_submission_time>
    </job_list>
  </job_info>
</job_info>
""",
    "flux": json.dumps({
        "jobs": [
            {"id": 6731191091817518, "state": "RUN", "name": "ens-site-7f3a-1", "t_run": 1795352541.5, "expiration": 1795357941.5, "urgency": 16},
            {"id": 58, "state": "SCHED", "name": "two words", "urgency": 16, "expiration": 0.0},
        ]
    }),
}  # fmt: skip


@each
def test_a_listing(scheduler: Scheduler) -> None:
    running, queued = scheduler.parse_status(said(LISTINGS[scheduler.name]))
    ids = ("fuZZybuNNy", "f21") if scheduler.name == "flux" else ("199", "20")
    assert (running.id, queued.id) == ids
    assert (running.name, queued.name) == ("ens-site-7f3a-1", "two words")
    assert (running.state, queued.state) == (JobState.RUNNING, JobState.QUEUED)
    assert not running.is_stuck
    assert not queued.is_stuck
    assert (running.started_at, queued.started_at) == (
        {"lsf": None, "flux": 1795352541.5}.get(scheduler.name, 1795352541.0),
        None,
    )
    assert running.exit_code is queued.exit_code is None


@each
def test_no_cut_of_a_listing_is_taken_for_all_of_it(scheduler: Scheduler) -> None:
    whole = LISTINGS[scheduler.name]
    # Whole lines of Cobalt's table may be missing without a trace; of the others, not a character.
    for end in range(len(whole.rstrip())):
        if (
            scheduler.name == "cobalt"
            and whole[:end].endswith("\n")
            and whole[:end].count("\n") > 1
        ):
            continue
        refused(scheduler.parse_status, said(whole[:end]))


@each
@pytest.mark.parametrize("words", ["a warning\n", "warning: { [ <\n"])
def test_a_listing_with_a_warning_before_it(scheduler: Scheduler, words: str) -> None:
    answer = said(words + LISTINGS[scheduler.name])
    if "{" in words and scheduler.name in ("lsf", "flux"):
        refused(scheduler.parse_status, answer)  # careful: no guess which brace it is
    else:
        assert len(scheduler.parse_status(answer)) == 2


def trouble_of(scheduler: Scheduler, text: str) -> Trouble:
    return fail(scheduler.name, scheduler.troubles, "submit", said(stderr=text, code=1)).trouble


@pytest.mark.parametrize(
    ("scheduler", "text", "trouble"),
    [
        (cobalt.COBALT, "Failed to connect to queue manager", Trouble.RETRY),
        (cobalt.COBALT, "The limit of 20 jobs per user in the 'default' queue has been reached", Trouble.CAPACITY),
        (cobalt.COBALT, "You are not allowed to submit to the 'debug' queue", Trouble.PERMANENT),
        (lsf.LSF, "LSF is down. Please wait ...", Trouble.RETRY),
        (lsf.LSF, "Failed in an LSF library call: Slave LIM configuration is not ready yet", Trouble.RETRY),
        (lsf.LSF, "Failed in an LSF library call: Communication time out", Trouble.UNSURE),
        (lsf.LSF, "User <joe>: Pending job threshold reached. Retrying in 60 seconds...", Trouble.CAPACITY),
        (lsf.LSF, "night: The destination queue has reached its job limit. Job not submitted.", Trouble.CAPACITY),
        (lsf.LSF, "RUNLIMIT: Cannot exceed queue's hard limit(s). Job not submitted.", Trouble.PERMANENT),
        (lsf.LSF, "nope: No such queue. Job not submitted.", Trouble.PERMANENT),
        (sge.SGE, "error: commlib error: got select error (Connection refused)", Trouble.RETRY),
        (sge.SGE, "error: commlib error: got read error (closing \"head/qmaster/1\")", Trouble.UNSURE),
        (sge.SGE, "ERROR: failed receiving gdi request response for mid=1 (got syncron message receive timeout error)", Trouble.UNSURE),
        (sge.SGE, "Unable to run job: job rejected: Only 100 jobs are allowed per user (current job count: 100)", Trouble.CAPACITY),
        (sge.SGE, 'Unable to run job: job rejected: the requested parallel environment "x" does not exist', Trouble.PERMANENT),
        (flux.FLUX, "flux-batch: ERROR: Unable to connect to Flux: broker socket", Trouble.RETRY),
        (flux.FLUX, "flux-job: user has max active jobs", Trouble.CAPACITY),
        (flux.FLUX, "flux-batch: ERROR: requested duration (2h) exceeds policy limit of 1h", Trouble.PERMANENT),
    ],
)  # fmt: skip
def test_what_is_to_be_done_about_words(scheduler: Scheduler, text: str, trouble: Trouble) -> None:
    assert trouble_of(scheduler, text) is trouble


# Cobalt


def test_cobalt_ids_are_the_last_line_that_is_a_number() -> None:
    text = 'Job routed to queue "default".\nMemory mode set to cache quad\n 2024\n512345\n'
    assert cobalt.parse_submit(said(text)) == "512345"
    assert cobalt.status_argv([])[:2] == ["qstat", "--header"]


def test_cobalt_states() -> None:
    top = "JobID  State       WallTime  StartTime  JobName  \n===========\n"
    words = [
        "starting",
        "exiting",
        "killing",
        "user_hold",
        "dep_fail",
        "dep_hold",
        "Maxrun_Hold",
        "whatever",
    ]
    rows = "".join(
        f"{n:<5}  {word:<10}  00:30:00  N/A        x        \n" for n, word in enumerate(words)
    )
    seen = cobalt.parse_status(said(top + rows))
    assert [each.state.value for each in seen] == ["RUNNING"] * 3 + ["QUEUED"] * 4 + ["RUNNING"]
    assert [each.is_stuck for each in seen] == [False] * 3 + [True, True] + [False] * 3
    assert seen[3].reason == "user_hold"
    assert cobalt.parse_status(said(top)) == []


def test_cobalt_tells_the_end_of_a_running_job() -> None:
    assert cobalt.parse_status(said(LISTINGS["cobalt"]))[0].ends_at == 1795352541 + 5400


# LSF


@pytest.mark.parametrize(
    ("record", "state", "code"),
    [
        ({"STAT": "DONE", "EXIT_CODE": ""}, "FINISHED", 0),
        ({"STAT": "EXIT", "EXIT_CODE": "3"}, "FAILED", 3),
        ({"STAT": "EXIT", "EXIT_CODE": "130", "EXIT_REASON": "TERM_OWNER: job killed by owner"}, "CANCELLED", 130),
        ({"STAT": "EXIT", "EXIT_CODE": "140", "EXIT_REASON": "TERM_RUNLIMIT: job killed after reaching LSF run time limit"}, "TIMEOUT", 140),
        ({"STAT": "EXIT", "EXIT_CODE": "139", "EXIT_REASON": "TERM_MEMLIMIT: job killed after reaching LSF memory usage limit"}, "FAILED", 139),
        ({"STAT": "EXIT", "EXIT_CODE": "", "EXIT_REASON": "-", "KILL_REASON": "TERM_ADMIN: job killed by root"}, "CANCELLED", None),
        ({"STAT": "EXIT", "EXIT_CODE": "130", "EXIT_REASON": "TERM_FORCE_OWNER: job killed by owner without time for cleanup"}, "LOST", 130),
        ({"STAT": "EXIT", "EXIT_CODE": "", "KILL_REASON": "TERM_FORCE_ADMIN: job killed by root or LSF administrator without time for cleanup"}, "LOST", None),
        ({"STAT": "ZOMBI"}, "LOST", None),
        ({"STAT": "UNKWN"}, "RUNNING", None),
        ({"STAT": "SSUSP"}, "RUNNING", None),
        ({"STAT": "NEW_WORD"}, "RUNNING", None),
        ({"STAT": "PROV"}, "QUEUED", None),
    ],
)  # fmt: skip
def test_lsf_states(record: dict[str, str], state: str, code: int | None) -> None:
    [seen] = lsf.parse_status(
        said(json.dumps({"RECORDS": [{"JOBID": "1", "JOB_NAME": "x", **record}]}))
    )
    assert (seen.state.value, seen.exit_code) == (state, code)


def test_lsf_says_in_words_that_there_is_no_job() -> None:
    for words in ("No job found\n", "No unfinished job found\n"):
        assert lsf.parse_status(said(stderr=words)) == []
        assert lsf.parse_status(said(stderr=words, code=255)) == []
    refused(lsf.parse_status, said(stderr="LSF is down. Please wait ...", code=255))
    # A job that was asked for is unknown, which is not the same as nothing printed.
    assert lsf.parse_status(said('{"COMMAND":"bjobs","JOBS":0,"RECORDS":[]}')) == []


def test_lsf_ids() -> None:
    assert lsf.parse_submit(said("Job <930> is submitted to default queue <normal>.\n")) == "930"
    refused(lsf.parse_submit, said("Request aborted by esub. Job not submitted.\n"))


HISTORY = """
Accounting information about jobs that are:
  - submitted by all users.
------------------------------------------------------------------------------

Job <12>, Job Name <ens-site-7f3a-7>, User <joe>, Project <default>, Status <EXIT>, Que
                     ue <normal>, Command <#!/bin/bash>
Mon May  6 21:58:03: Submitted from host <login>, CWD <$HOME>;
Mon May  6 22:58:03: Completed <exit>; TERM_RUNLIMIT: job killed after reaching LSF run t
                     ime limit.
"""


def test_lsf_history_unfolds_its_lines() -> None:
    [seen] = lsf.parse_history(said(HISTORY))
    assert (seen.id, seen.name, seen.state) == ("12", "ens-site-7f3a-7", JobState.TIMEOUT)
    assert seen.reason == "TERM_RUNLIMIT: job killed after reaching LSF run time limit"
    assert lsf.parse_history(said(stderr="No matching job found\n", code=255)) == []
    refused(lsf.parse_history, said(stderr="LSF is down. Please wait ...\n", code=255))


# Grid Engine


@pytest.mark.parametrize(
    ("letters", "state", "is_stuck"),
    [
        ("qw", "QUEUED", False), ("hqw", "QUEUED", False), ("hRwq", "QUEUED", False), ("Eqw", "QUEUED", True),
        ("t", "RUNNING", False), ("r", "RUNNING", False), ("Rr", "RUNNING", False), ("hr", "RUNNING", False),
        ("s", "RUNNING", False), ("S", "RUNNING", False), ("dr", "RUNNING", False), ("dT", "RUNNING", False),
    ],
)  # fmt: skip
def test_sge_letters(letters: str, state: str, is_stuck: bool) -> None:
    found, _, stuck = sge.judge(letters)
    assert (found.value, stuck) == (state, is_stuck)


BOMB = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>
<job_info><queue_info/><job_info>&b;</job_info></job_info>"""


def test_sge_refuses_a_document_type() -> None:
    refused(sge.parse_status, said(BOMB))
    refused(
        sge.parse_status,
        said(
            BOMB.replace(' lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]', "").replace(
                "&b;", ""
            )
            + "<!DOCTYPE x>"
        ),
    )
    assert sge.parse_status(said("<job_info><queue_info/><job_info/></job_info>")) == []


def test_sge_a_job_without_a_number_is_no_job() -> None:
    text = "<job_info><job_list><JB_name>x</JB_name><state>r</state></job_list></job_info>"
    refused(sge.parse_status, said(text))


def test_sge_a_path_with_a_colon_is_not_a_host() -> None:
    request = Request(script=Path("s"), name="n", output=Path("/a:b/c"))
    assert ":/a:b/c" in sge.submit_argv(request)


def account(**values: str) -> str:
    record = {
        "jobname": "ens-x",
        "jobnumber": "21",
        "start_time": "Mon May 16 05:09:02 2011",
        "end_time": "Mon May 16 05:09:41 2011",
    }
    return (
        "=" * 62
        + "\n"
        + "".join(f"{key:<13}{value:<20}\n" for key, value in (record | values).items())
    )


@pytest.mark.parametrize(
    ("failed", "status", "state", "code"),
    [
        ("0", "0", "FINISHED", 0),
        ("0", "3", "FAILED", 3),
        ("100 : assumedly after job", "137                  (Killed)", "FAILED", 137),
        ("37  : qmaster enforced h_rt limit", "137", "TIMEOUT", 137),
        ("1   : assumedly before job", "0", "FAILED", None),
    ],
)
def test_sge_history(failed: str, status: str, state: str, code: int | None) -> None:
    first = account(failed="1", exit_status="9")
    [seen] = sge.parse_history(said(first + account(failed=failed, exit_status=status)))
    assert (seen.id, seen.state.value, seen.exit_code) == ("21", state, code)
    assert (seen.started_at, seen.ended_at) == (1305522542.0, 1305522581.0)


def test_sge_history_of_a_job_that_has_none() -> None:
    assert sge.parse_history(said(stderr="error: job id 21 not found\n", code=1)) == []
    refused(sge.parse_history, said(stderr="error: commlib error\n", code=1))
    refused(sge.parse_history, said(account(failed="0")))
    refused(sge.parse_history, said())


# Flux


def test_flux_ids_compare_equal_however_they_are_spelled() -> None:
    # The example of RFC 19.
    for text in ("fuZZybuNNy\n", "ƒuZZybuNNy\n", "6731191091817518\n", "a warning\nfuZZybuNNy\n"):
        assert flux.parse_submit(said(text)) == "fuZZybuNNy"
    assert flux.to_f58(0) == "f1"
    assert flux.FLUX.environ["FLUX_F58_FORCE_ASCII"] == "1"


@pytest.mark.parametrize(
    ("job", "state", "code", "reason"),
    [
        ({"state": "INACTIVE", "result": "COMPLETED", "returncode": 0}, "FINISHED", 0, ""),
        ({"state": "INACTIVE", "result": "FAILED", "returncode": 3}, "FAILED", 3, ""),
        ({"state": "INACTIVE", "result": "FAILED", "returncode": -9}, "FAILED", 137, ""),
        ({"state": "INACTIVE", "result": "CANCELED", "returncode": -128, "exception": {"occurred": True, "type": "cancel", "note": "enough"}}, "CANCELLED", None, "cancel: enough"),
        ({"state": "INACTIVE", "result": "TIMEOUT", "exception": {"occurred": True, "type": "timeout", "note": ""}}, "TIMEOUT", None, "timeout"),
        ({"state": "INACTIVE", "result": "SOMETHING"}, "FAILED", None, ""),
        ({"state": "CLEANUP"}, "RUNNING", None, ""),
        ({"state": "DEPEND"}, "QUEUED", None, ""),
        ({"state": "SCHED", "annotations": {"sched": {"reason_pending": "insufficient resources"}}}, "QUEUED", None, "insufficient resources"),
        ({"state": "WHATEVER"}, "RUNNING", None, ""),
    ],
)  # fmt: skip
def test_flux_states(job: dict[str, Any], state: str, code: int | None, reason: str) -> None:
    [seen] = flux.parse_status(said(json.dumps({"jobs": [{"id": 1, "name": "x", **job}]})))
    assert (seen.state.value, seen.exit_code, seen.reason) == (state, code, reason)


def test_flux_a_held_job_is_stuck() -> None:
    [seen] = flux.parse_status(said('{"jobs": [{"id": 1, "state": "PRIORITY", "urgency": 0}]}'))
    assert seen.is_stuck


def test_flux_a_failed_listing_is_not_believed() -> None:
    refused(flux.parse_status, said('{"jobs": []}', "flux-jobs: ERROR: lost", 1))
    assert flux.parse_status(said('{"jobs": []}')) == []
