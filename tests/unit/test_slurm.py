from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import example, given, strategies as st

from ensemble.core.batchjob import OVER, JobState
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, fail
from ensemble.drivers.slurm import SLURM, STATES
from ensemble.errors import SchedulerError, Trouble

DATA = Path(__file__).parent.parent / "data" / "slurm"
HEADING = "JOBID|STATE|REASON|START_TIME|END_TIME|NODES|PARTITION|NAME\n"


def recorded(name: str, number: int = 0) -> Completed:
    """Return what a recorded command printed."""
    text = (DATA / f"{name}.txt").read_text()
    found = re.findall(r"^\$ .*\n((?:.*\n)*?)\[exit (\d+)\]\n", text, re.MULTILINE)
    body, code = found[number]
    stdout, _, stderr = body.partition("--- stderr\n")
    return Completed(code=int(code), stdout=stdout, stderr=stderr)


def answer(stdout: str = "", *, stderr: str = "", code: int = 0) -> Completed:
    return Completed(code=code, stdout=stdout, stderr=stderr)


def listed(name: str):
    return {seen.name: seen for seen in SLURM.parse_status(recorded(name))}


def trouble_of(text: str) -> Trouble:
    return fail("Slurm", SLURM.troubles, "submit", answer(stderr=text, code=1)).trouble


def request(*flags: str, output: str = "/site/log/7.out") -> Request:
    return Request(
        script=Path("/site/qsubmit/7.sh"), name="ens-site-7", output=Path(output), flags=flags
    )


# Submission


def test_flags_of_the_user_come_last():
    argv = SLURM.submit_argv(request("-p", "debug", "--requeue"))
    assert argv == [
        "sbatch", "--parsable", "--job-name=ens-site-7", "--output=/site/log/7.out",
        "--open-mode=append", "--no-requeue", "-p", "debug", "--requeue", "/site/qsubmit/7.sh",
    ]  # fmt: skip


def test_a_percent_in_the_output_is_no_pattern():
    assert "--output=/100%%j/7.out" in SLURM.submit_argv(request(output="/100%j/7.out"))


@pytest.mark.parametrize(
    ("text", "id"),
    [
        ("8\n", "8"),
        ("8;other\n", "8;other"),
        ("Submitted batch job 9\n", "9"),
        ("Submitted batch job 9 on cluster other\n", "9;other"),
        ("Checking your balance ... ok\n12\n\n", "12"),
        ("12\nHave a nice day\n", "12"),
    ],
)
def test_parse_submit(text, id):
    assert SLURM.parse_submit(answer(text)) == id


@pytest.mark.parametrize(("name", "id"), [("sbatch-ok", "8"), ("sbatch-ok-plain", "9")])
def test_recorded_submissions(name, id):
    assert SLURM.parse_submit(recorded(name)) == id


@pytest.mark.parametrize(
    "text", ["", "\n", "ok\n", "job 12\n", "12_3\n", "12;\n", "-1\n", "12 13\n"]
)
def test_no_id_is_an_error(text):
    with pytest.raises(SchedulerError):
        SLURM.parse_submit(answer(text))


# Listing


def test_every_state_that_squeue_knows_is_in_the_table():
    known = (
        "BOOT_FAIL CANCELLED COMPLETED CONFIGURING COMPLETING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING "
        "PREEMPTED RUNNING RESV_DEL_HOLD REQUEUE_FED REQUEUE_HOLD REQUEUED RESIZING REVOKED SIGNALING "
        "SPECIAL_EXIT STAGE_OUT STOPPED SUSPENDED TIMEOUT"
    )
    assert set(known.split()) <= set(STATES)


def test_recorded_listing():
    jobs = listed("squeue-all")
    states = {name: seen.state for name, seen in jobs.items()}
    assert states["running"] is JobState.RUNNING
    assert states["suspended"] is JobState.RUNNING
    assert states["completing"] is JobState.RUNNING
    assert states["finished | with bar"] is JobState.FINISHED
    assert states["failed é"] is JobState.FAILED
    assert states["cancelled running"] is JobState.CANCELLED
    assert states["resources"] is JobState.QUEUED
    assert states["n" * 300] is JobState.FINISHED
    assert jobs["completing"].reason == "ending"
    assert jobs["running"].id == "10"
    assert jobs["running"].started_at == 1795382897
    assert jobs["running"].ends_at == 1795383497
    assert jobs["cancelled running"].ended_at == 1795382898
    assert jobs["resources"].started_at is None, "squeue only guesses when it will start"
    assert jobs["resources"].ends_at is None


def test_a_name_with_a_line_break_hides_no_other_job():
    found = {seen.id: seen for seen in SLURM.parse_status(recorded("squeue-all"))}
    assert found["15"].name == "new"
    rows = re.findall(r"^\d+\S*\|[A-Z]+\|", recorded("squeue-all").stdout, re.MULTILINE)
    assert len(found) == len(rows)


def test_stuck_or_only_waiting():
    jobs = listed("squeue-all")
    stuck = {name for name, seen in jobs.items() if seen.is_stuck}
    assert stuck == {"over time limit", "over node limit", "never dep", "admin held"}
    assert jobs["over time limit"].reason == "PartitionTimeLimit"
    waits = listed("squeue-later")
    assert waits["node not available"].reason == "ReqNodeNotAvail, UnavailableNodes:n3"
    assert not waits["node not available"].is_stuck


@pytest.mark.parametrize(
    ("reason", "is_stuck"),
    [
        ("Priority", False),
        ("Resources", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("AssocGrpNodeLimit", False),
        ("JobHeldUser", False),
        ("PartitionDown", False),
        ("Reservation", False),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("AssocMaxWallDurationPerJobLimit", True),
        ("QOSMaxNodePerUserLimit", True),
        ("AssocMaxNodePerJobLimit", True),
        ("InvalidQOS", True),
        ("BadConstraints", True),
    ],
)
def test_reasons(reason, is_stuck):
    row = f"7|PENDING|{reason}|N/A|N/A|1|debug|x\n"
    assert SLURM.parse_status(answer(HEADING + row))[0].is_stuck is is_stuck


def test_a_lost_node_is_no_proof_of_an_end():
    seen = listed("squeue-nodefail")["node fail"]
    assert seen.state is JobState.LOST
    assert seen.state not in OVER
    assert seen.reason == "a node failed / NodeDown"
    assert seen.ended_at == 1795383322


def test_time_limit():
    seen = listed("squeue-later")["time limit"]
    assert (seen.state, seen.ended_at, seen.ends_at) == (JobState.TIMEOUT, 1795382985, None)


def test_a_submission_that_timed_out_has_left_a_job():
    error = fail("Slurm", SLURM.troubles, "submit", recorded("sbatch-stopped"))
    assert error.trouble is Trouble.UNSURE
    assert "39" in {seen.id for seen in SLURM.parse_status(recorded("squeue-later"))}


def test_a_new_state_concludes_nothing():
    row = "7|EXPEDITING|None|1795383318|N/A|1|debug|x\n"
    (seen,) = SLURM.parse_status(answer(HEADING + row))
    assert (seen.state, seen.reason) == (JobState.RUNNING, "state EXPEDITING")


def test_no_jobs():
    assert SLURM.parse_status(recorded("squeue-empty")) == []


def test_warnings_do_not_matter():
    row = "7|RUNNING|None|1795383318|N/A|1|debug|x\n"
    told = answer("Welcome to the cluster\n" + HEADING + row, stderr="squeue: error: odd\n")
    assert [seen.id for seen in SLURM.parse_status(told)] == ["7"]


@pytest.mark.parametrize(
    "end", ["N/A", "NONE", "Unknown", "4294967295", "4294967294", "0", "x" * 9]
)
def test_no_end(end):
    row = f"7|RUNNING|None|1795383318|{end}|1|debug|x\n"
    assert SLURM.parse_status(answer(HEADING + row))[0].ends_at is None


def test_clusters_by_name():
    assert SLURM.status_argv(["8", "9"]) == [
        "squeue", "--me", "-t", "all", "-o", "%i|%T|%r|%S|%e|%D|%P|%j",
    ]  # fmt: skip
    assert SLURM.status_argv(["8;b", "9;a", "7;b"])[:3] == ["squeue", "-M", "a,b"]
    row = "8|RUNNING|None|N/A|N/A|1|debug|x\n"
    text = f"CLUSTER: a\n{HEADING}CLUSTER: b\n{HEADING}{row}"
    assert [seen.id for seen in SLURM.parse_status(answer(text))] == ["8;b"]
    assert SLURM.cancel_argv("8;b") == ["scancel", "-v", "-M", "b", "8"]
    assert SLURM.history_argv("8;b")[:3] == ["sacct", "-M", "b"]


@pytest.mark.parametrize(
    "name", ["squeue-down", "squeue-stopped", "squeue-cluster", "squeue-unknown"]
)
def test_a_failed_query_is_no_empty_queue(name):
    with pytest.raises(SchedulerError, match=r"^Slurm cannot list batch jobs: s"):
        SLURM.parse_status(recorded(name))


def test_printing_nothing_is_no_empty_queue():
    with pytest.raises(SchedulerError, match="its table is missing"):
        SLURM.parse_status(answer())


@given(st.data())
def test_a_truncated_listing_is_an_error_or_ends_with_a_whole_row(data):
    whole = recorded("squeue-all").stdout
    end = data.draw(st.integers(0, len(whole) - 1))
    text = whole[:end]
    if end and text.endswith("\n") and len(text) >= len(HEADING):
        assert SLURM.parse_status(answer(text)) or text == HEADING
    else:
        with pytest.raises(SchedulerError):
            SLURM.parse_status(answer(text))


ODD = st.text(st.one_of(st.sampled_from("\n|0159;:A_\0\r\x0c\x85"), st.characters()))


@given(text=ODD, code=st.integers(-9, 255), has_heading=st.booleans())
@example(text="1|A|||||\n", code=0, has_heading=True)
@example(text="\x85", code=0, has_heading=True)
def test_no_text_breaks_a_parser(text, code, has_heading):
    told = answer(HEADING * has_heading + text, code=code)
    for parse in (SLURM.parse_status, SLURM.parse_submit, SLURM.parse_history):
        with contextlib.suppress(SchedulerError):
            parse(told)


@given(st.text(st.characters(exclude_characters="\n")))
@example("a|b|c")
@example("\x0b\x0c\x1c\x85\u2028")
def test_a_name_is_read_as_it_was_given(name):
    row = f"7|RUNNING|None|N/A|N/A|1|debug|{name}\n"
    assert SLURM.parse_status(answer(HEADING + row))[0].name == name


# Errors


@pytest.mark.parametrize(
    "name",
    [
        "sbatch-bad-constraint", "sbatch-bad-gres", "sbatch-bad-option", "sbatch-bad-partition", "sbatch-bad-reservation",
        "sbatch-bad-time", "sbatch-dos", "sbatch-memory", "sbatch-missing", "sbatch-no-interpreter",
        "sbatch-zero-nodes",
    ],
)  # fmt: skip
def test_rejected_for_good(name):
    error = fail("Slurm", SLURM.troubles, "submit", recorded(name))
    assert error.trouble is Trouble.PERMANENT
    assert recorded(name).stderr.split("\n")[0] in str(error)


@pytest.mark.parametrize(
    ("name", "trouble"),
    [
        ("sbatch-down", Trouble.RETRY),
        ("sbatch-cluster", Trouble.RETRY),
        ("scancel-down", Trouble.RETRY),
        ("sbatch-stopped", Trouble.UNSURE),
        ("sbatch-partition-drained", Trouble.CAPACITY),
        ("sbatch-partition-inactive", Trouble.CAPACITY),
    ],
)
def test_recorded_troubles(name, trouble):
    assert fail("Slurm", SLURM.troubles, "submit", recorded(name)).trouble is trouble


POLICY = (
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
    "(job submit limit, user's size and/or time limits)"
)


@pytest.mark.parametrize(
    ("first", "trouble"),
    [
        ("QOSMaxSubmitJobPerUserLimit", Trouble.CAPACITY),
        ("AssocMaxSubmitJobLimit", Trouble.CAPACITY),
        ("AssocGrpSubmitJobsLimit", Trouble.CAPACITY),
        ("QOSGrpSubmitJobsLimit", Trouble.CAPACITY),
        ("QOSMaxWallDurationPerJobLimit", Trouble.PERMANENT),
        ("QOSMaxNodePerJobLimit", Trouble.PERMANENT),
        ("AssocMaxWallDurationPerJobLimit", Trouble.PERMANENT),
    ],
)
def test_the_first_line_names_the_limit(first, trouble):
    assert trouble_of(f"sbatch: error: {first}\n{POLICY}\n") is trouble


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("Unable to contact slurm controller (send failure)", Trouble.RETRY),
        ("Unable to contact slurm controller (receive failure)", Trouble.UNSURE),
        ("Zero Bytes were transmitted or received", Trouble.UNSURE),
        ("Slurm backup controller in standby mode", Trouble.RETRY),
        ("Slurm temporarily unable to accept job, sleeping and retrying", Trouble.RETRY),
        ("Slurm job queue full, sleeping and retrying", Trouble.CAPACITY),
        ("Unable to create job record, try again", Trouble.RETRY),
        ("Protocol authentication error", Trouble.RETRY),
        ("fatal: Could not establish a configuration source", Trouble.RETRY),
        ("Invalid authentication credential", Trouble.RETRY),
        ("Invalid qos specification", Trouble.PERMANENT),
        ("Access/permission denied", Trouble.PERMANENT),
        ("Your project has no hours left (see https://site.example)", Trouble.PERMANENT),
        ("", Trouble.PERMANENT),
    ],
)
def test_texts(text, trouble):
    assert trouble_of(f"sbatch: error: {text}\n") is trouble


# Cancellation


def test_an_ended_or_unknown_job_is_gone():
    def is_gone(told: Completed) -> bool:
        return re.search(SLURM.is_gone, told.stderr) is not None

    assert not is_gone(recorded("scancel-ok-then-ended"))
    assert is_gone(recorded("scancel-ok-then-ended", 1))
    assert is_gone(recorded("scancel-unknown"))
    assert not is_gone(recorded("scancel-down"))


# History


def history(text: str):
    return SLURM.parse_history(answer(text))


@pytest.mark.parametrize(
    ("row", "state", "code"),
    [
        ("7|COMPLETED|0:0|1795382897|1795382997|None", JobState.FINISHED, 0),
        ("7|FAILED|3:0|1795382897|1795382997|NonZeroExitCode", JobState.FAILED, 3),
        ("7|CANCELLED by 1000|0:15|1795382897|1795382997|None", JobState.CANCELLED, 143),
        ("7|TIMEOUT|0:0|1795382897|1795382997|None", JobState.TIMEOUT, 0),
        ("7|NODE_FAIL|1:0|1795382897|1795382997|None", JobState.LOST, 1),
        ("7|OUT_OF_MEMORY|0:125|1795382897|1795382997|None", JobState.FAILED, 253),
    ],
)
def test_history(row, state, code):
    (seen,) = history(row + "\n")
    assert (seen.id, seen.state, seen.exit_code) == ("7", state, code)
    assert (seen.started_at, seen.ended_at) == (1795382897, 1795382997)


def test_history_of_a_running_job():
    (seen,) = history("7|RUNNING|0:0|1795382897|Unknown|None\n")
    assert (seen.state, seen.exit_code, seen.ended_at) == (JobState.RUNNING, None, None)


def test_who_cancelled_it():
    assert (
        history("7|CANCELLED by 1000|0:0|Unknown|1795382997|None\n")[0].reason
        == "CANCELLED by 1000"
    )


def test_no_accounting_and_no_such_job():
    assert SLURM.parse_history(recorded("sacct-disabled")) == []
    assert history("") == []


def test_an_accounting_that_is_away_is_an_error():
    told = answer(
        stderr="sacct: error: Problem talking to the database: Connection refused", code=1
    )
    with pytest.raises(SchedulerError):
        SLURM.parse_history(told)
