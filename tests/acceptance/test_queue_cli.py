"""`ensemble submit-launch`, `serve` and `queue` as users type them, with batch jobs on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.test_cli import ROOT, Command, Done, init, run

HEAD = "[launcher]\nidle_timeout_s = 0\nmin_useful_s = 0\nmargin_s = 1\n[service]\nperiod_s = 0.3\nretry_s = 0.2\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("queue") / "a site"
    done = init(path, "--scheduler", "local", cwd=path.parent)
    try:
        assert done.status == 0, done
        yield path
    finally:
        run("--site", str(path), "db", "stop", cwd=path.parent)
        shutil.rmtree(path, ignore_errors=True)


class Queue(Command):
    """`ensemble` in one site, and whether there is something to be tidied up."""

    has_tasks = False

    def __call__(self, *words: str, text: str | bytes | None = None) -> str:
        self.has_tasks |= words[0] == "add"
        return super().__call__(*words, text=text)


@pytest.fixture
def ens(place: Path) -> Iterator[Queue]:
    """The site, with its settings and its template as they were made; afterwards no batch job is left."""
    command = Queue(place)
    kept = {
        path: path.read_bytes()
        for path in (place / "ensemble.toml", place / "templates" / "job.sh")
    }
    scripts = set(place.glob("qsubmit/*.sh"))
    write(command)
    yield command
    for path, data in kept.items():
        path.write_bytes(data)
    if set(place.glob("qsubmit/*.sh")) != scripts:
        command("queue", "cancel", "--all")
        until(lambda: not active(command))
        # One that still leaves would be counted on to take the next test's tasks.
        until(lambda: not command.json("status")["launchers"])
    if command.has_tasks:
        command("rm", "--workflow", "", "--yes")


def write(ens: Command, text: str = "") -> None:
    path = ens.site / "ensemble.toml"
    base = path.read_text().split("[launcher]")[0]
    path.write_text(base + HEAD + text)


def until(condition: Callable[[], object], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, condition


def active(ens: Command) -> list[dict[str, object]]:
    return [job for job in ens.json("queue")["batch_jobs"] if job["is_active"]]


def job(ens: Command, job_id: int) -> dict[str, object]:
    return next(job for job in ens.json("queue")["batch_jobs"] if job["id"] == job_id)


def submit(ens: Command, *words: str) -> int:
    return ens.json("submit-launch", "-n", "1", "-t", "5", *words)["id"]


def screen(ens: Command, *words: str, columns: int) -> str:
    """Return what a command prints on a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "ensemble", *words],
        cwd=ens.site,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    parts = []
    try:
        while data := os.read(ours, 65536):
            parts.append(data)
    except OSError:
        pass  # the other end is closed
    finally:
        os.close(ours)
    assert process.wait(30) == 0
    return b"".join(parts).decode()


# ---------------------------------------------------------------------------- by hand


def test_a_batch_job_by_hand_runs_the_tasks_and_is_told_of(ens):
    task = ens.add("--", "echo", "hello")
    text = ens("submit-launch", "-n", "1", "-t", "0:05:00", "--wf-filter", "")
    job_id = int(re.search(r"batch job (\d+): local job \d+", text)[1])
    script, output = (re.search(rf"^{name} +(.+)$", text, re.M)[1] for name in ("script", "output"))
    assert Path(script) == ens.site / "qsubmit" / f"qlaunch{job_id}.sh"
    assert Path(script).exists()
    ens("wait", str(task))
    until(lambda: job(ens, job_id)["state"] == "FINISHED")
    found = job(ens, job_id)
    assert (found["tasks"], found["exit_code"], found["output"]) == (1, 0, output)
    assert found["started_at"] <= found["ended_at"]
    assert "launcher.ended" in Path(output).read_text()
    assert "finished" in ens("queue")
    assert ens.json("status")["batch_jobs"] == []


def test_a_dry_run_prints_the_script_and_leaves_no_trace(ens):
    before = len(ens.json("queue")["batch_jobs"])
    script = ens(
        "submit-launch", "-n", "3", "-t", "90", "--dry-run", "--wf-filter=a b", "--job-mode=serial"
    )
    assert script.startswith("#!/bin/bash\n")
    assert re.search(r"^exec .* '--wf-filter=a b'$", script, re.M)
    assert ens.json("submit-launch", "-n", "3", "-t", "90", "--dry-run")["script"].startswith("#!")
    assert len(ens.json("queue")["batch_jobs"]) == before
    assert not list((ens.site / "qsubmit").glob("qlaunch0*"))


def test_it_warns_where_nothing_would_be_run_and_submits_all_the_same(ens):
    def warning(*words: str) -> str:
        done = ens.full("submit-launch", "--dry-run", *words)
        assert done.status == 0, done
        return done.err

    assert "no task is runnable now" in warning("-n1", "-t5")
    ens("add", "--name", "wide", "--num-nodes", "4", "--", "true")
    ens("add", "--name", "long", "--wall-time-minutes", "60", "--", "true")
    assert "no workflow's name contains 'no such'" in warning("-n1", "-t5", "--wf-filter=no such")
    text = warning("-n", "2", "-t", "30")
    assert "none of the 2 runnable tasks" in text
    assert "wider than" in text
    assert "longer than" in text
    assert warning("-n", "4", "-t", "30") == ""
    done = ens.full("submit-launch", "-n1", "-t5", "--json")
    assert done.status == 0
    assert "warning: none of the 2" in done.err
    assert done.json["is_active"]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["-n", "0", "-t", "5"], 2, "--nodes"),
        (["-n", "1", "-t", "0"], 2, "expected a minute or more"),
        (["-n", "99999999999", "-t", "5"], 2, "--nodes"),
        (["-n", "1"], 2, "--time"),
        (["-n", "1", "-t", "5", "--node=3"], 2, "did you mean --nodes?"),
        (["-n", "1", "-t", "5", "--slots-per-node=3"], 2, "--job-mode serial"),
        (["-n", "1", "-t", "5", "--template", "none.sh"], 2, "none.sh"),
        (["-n", "1", "-t", "5", "--template", "../job.sh"], 2, "job.sh"),
        (["-n", "1", "-t", "5", "-A", "a\nb"], 2, "character"),
        (["-n", "1", "-t", "5", "--wf-filter=\x1b"], 2, "wf_filter has the character '\\x1b'"),
        (["-n", "1", "-t", "5", "--no-such-flag"], 1, "--no-such-flag"),
        (["-n", "1", "-t", "5", "--\x1b[31m"], 1, "\\x1b[31m"),
    ],
)
def test_a_refusal_is_one_line(ens, words, status, says):
    ens.fails(status, says, "submit-launch", *words)
    assert active(ens) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "#!/bin/sh\n#X {{ porject }}\nexec {{ launch }}\n",
            "job.sh:2: there is no variable 'porject'",
        ),
        ("#!/bin/sh\n{% if %}\nexec {{ launch }}\n", "job.sh:2: "),
        (None, "there is no template 'job.sh'"),
    ],
)
def test_a_template_with_a_fault_is_one_line_and_no_batch_job(ens, text, says):
    before = len(ens.json("queue")["batch_jobs"])
    template = ens.site / "templates" / "job.sh"
    template.unlink()
    if text is not None:
        template.write_text(text)
    for more in ([], ["--dry-run"]):
        ens.fails(2, says, "submit-launch", "-n1", "-t5", *more)
    assert len(ens.json("queue")["batch_jobs"]) == before


def test_without_a_scheduler_it_says_how_to_do_without(ens):
    environ = {"ENSEMBLE_SCHEDULER_KIND": "auto", "PATH": "/nonexistent"}
    for words in (
        ("submit-launch", "-n1", "-t5"),
        ("submit-launch", "-n1", "-t5", "--dry-run"),
        ("serve", "--once"),
    ):
        done = run(*words, cwd=ens.site, **environ)
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1), done
        assert 'kind = "local"' in done.err


def test_a_submission_in_doubt_says_that_it_is_on_record(ens, tmp_path):
    for name, text in (
        ("sbatch", "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1"),
        (
            "squeue",
            "echo 'slurm_load_jobs error: Unable to contact slurm controller\033[2J' >&2; exit 1",
        ),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"ENSEMBLE_SCHEDULER_KIND": "slurm", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = run("submit-launch", "-n1", "-t5", cwd=ens.site, **environ)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1), done
    assert re.search(
        r"Socket timed out .*; batch job \d+ may be there all the same: ensemble queue", done.err
    )
    shown = run("queue", cwd=ens.site, **environ)
    assert shown.status == 0
    assert "warning: what follows may be out of date" in shown.err
    assert "\x1b" not in shown.err + shown.out
    assert " new " in shown.out
    (doubtful,) = active(ens)
    ens.fails(
        2, "is one of slurm, and this site now uses local", "queue", "cancel", str(doubtful["id"])
    )
    # Nothing of it is anywhere: take it off the list, as a Slurm would that does not know it.
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\necho 'JOBID|STATE|REASON|START_TIME|END_TIME|NODES|PARTITION|NAME'\n"
    )
    assert run("queue", "cancel", str(doubtful["id"]), cwd=ens.site, **environ).status == 0
    environ |= {"ENSEMBLE_SCHEDULER_TIMEOUT_S": "0.5"}
    until(lambda: run("queue", cwd=ens.site, **environ).status == 0 and active(ens) == [])


# ---------------------------------------------------------------------------- the queue


def test_what_waits_and_no_service_is_there(ens):
    assert "warning" not in ens.full("status").err
    write(ens, "[queue.debug]\nmax_queued = 2\n")
    assert "warning" not in ens.full("status").err
    ens("add", "--", "true")
    assert "1 runnable tasks wait, and the service" in ens.full("status").err
    assert ens.json("status")["service"]["is_running"] is False
    text = ens("queue")
    assert "ensemble serve" in text
    assert "debug  submit for " in text
    text = ens("serve", "--daemon")
    assert "the service runs: pid" in text
    try:
        assert re.search(r"service +runs on \S+, pid \d+", ens("queue"))
        assert "warning" not in ens.full("status").err
        until(lambda: ens.json("ls")[0]["state"] == "JOB_FINISHED")
        found = ens.json("queue")
        assert found["service"]["is_running"]
        assert found["queues"][0]["name"] == "debug"
        assert found["queues"][0]["max_queued"] == 2
    finally:
        assert "has stopped" in ens("serve", "--stop")
    until(lambda: not active(ens))
    found = ens.json("queue")
    assert found["queues"][0]["active"] == 0
    assert found["decisions"][0]["policy"] == "debug"
    made = next(note for note in found["decisions"] if note["batch_job_id"])
    assert job(ens, made["batch_job_id"])["why"] == made["reason"]


def test_pause_and_resume(ens):
    write(ens, "[queue.debug]\n[queue.prod]\n")
    ens("add", "--", "sleep", "60")
    assert ens("queue", "pause", "debug", "--reason", "Friday\x1b[31m\n") == (
        "debug: paused (ensemble queue resume debug)\n"
    )
    text = ens("queue")
    assert "paused by user: Friday\\x1b[31m (ensemble queue resume debug)" in text
    assert "\x1b" not in text + ens("serve", "--dry-run")
    ens("serve", "--once")
    assert [found["policy"] for found in active(ens)] == ["prod"]
    assert ens("queue", "resume", "--all").splitlines() == [
        "debug: resumed",
        "prod: nothing had kept it from submitting",
    ]
    ens.fails(3, "there is no queue policy 'nope'; known: debug, prod", "queue", "pause", "nope")
    ens.fails(2, "--all", "queue", "pause")
    ens.fails(2, "--all", "queue", "resume", "debug", "--all")
    ens("queue", "cancel", "--all")
    until(lambda: not active(ens))


def test_cancel(ens):
    ens("add", "--", "sleep", "60")
    running, waiting = submit(ens), submit(ens)
    until(
        lambda: job(ens, running)["state"] == "RUNNING" and ens.json("ls")[0]["state"] == "RUNNING"
    )
    assert job(ens, waiting)["state"] == "QUEUED"
    text = ens("queue", "cancel", str(waiting), str(running), "--reason", "a\x1b[31mb")
    assert text.count("cancelled (local job") == 2
    until(lambda: not active(ens))
    for job_id in (running, waiting):
        found = job(ens, job_id)
        assert (found["state"], found["reason"]) == (
            "CANCELLED",
            "cancelled by the user: a\x1b[31mb",
        )
    assert "a\\x1b[31mb" in ens("queue")
    assert ens.json("ls")[0]["state"] == "RESTART_READY"
    assert "has ended already (CANCELLED)" in ens("queue", "cancel", str(running))
    ens.fails(3, "there is no batch job 99999", "queue", "cancel", "99999")
    ens.fails(2, "--all", "queue", "cancel")


def test_a_name_that_is_not_there_changes_none(ens):
    write(ens, "[queue.debug]\n")
    ens.fails(3, "'nope'; known: debug; nothing was changed", "queue", "pause", "debug", "nope")
    assert "nothing had kept it" in ens("queue", "resume", "debug")


def test_one_that_cannot_be_cancelled_keeps_no_other_from_it(ens):
    job_id = submit(ens)
    done = ens.full("queue", "cancel", "99999", str(job_id))
    assert (done.status, done.err.count("\n")) == (3, 1), done
    assert done.err.startswith("error: there is no batch job 99999")
    assert done.out.startswith(f"batch job {job_id}: ")


def test_what_was_cancelled_before_the_database_was_lost_is_said(ens, tmp_path):
    stop = f"{sys.executable} -m ensemble --site '{ens.site}' db stop"
    header = "JOBID|STATE|REASON|START_TIME|END_TIME|NODES|PARTITION|NAME"
    for name, text in (
        ("sbatch", f"echo x >> {tmp_path}/jobs; wc -l < {tmp_path}/jobs"),
        ("squeue", f"echo '{header}'"),
        (
            "scancel",
            f"echo $2 >> {tmp_path}/asked; [ $2 != 2 ] || ! mkdir {tmp_path}/once || {stop} >&2",
        ),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"ENSEMBLE_SCHEDULER_KIND": "slurm", "PATH": f"{tmp_path}:/usr/bin:/bin"}

    def slurm(*words: str) -> Done:
        return run(*words, cwd=ens.site, **environ)

    jobs = [slurm("submit-launch", "-n1", "-t5", "--json").json["id"] for _ in range(3)]
    done = slurm("queue", "cancel", *map(str, jobs))
    ens("db", "start")
    assert (done.status, done.out) == (4, f"batch job {jobs[0]}: cancelled (slurm job 1)\n"), done
    assert (done.err.startswith("error: "), done.err.count("\n")) == (True, 1), done
    assert (tmp_path / "asked").read_text() == "1\n2\n"
    assert slurm("queue", "cancel", "--all").status == 0
    environ["ENSEMBLE_SCHEDULER_TIMEOUT_S"] = "0.5"
    until(lambda: slurm("queue").status == 0 and active(ens) == [])


def test_the_last_words_of_a_job_that_died_are_shown_as_text(ens):
    template = ens.site / "templates" / "job.sh"
    template.write_text(
        "#!/bin/bash\nprintf '\\033[2J\\033]0;owned\\007red\\rover\\u202e\\377\\n'\nexit 9\nexec {{ launch }}\n"
    )
    job_id = submit(ens)
    until(lambda: job(ens, job_id)["state"] == "FAILED")
    assert job(ens, job_id)["exit_code"] == 9
    text = ens("queue")
    assert f"batch job {job_id} last printed" in text
    assert re.search(r"red\n +over", text)
    assert not set(text) & set("\x1b\x07\r\u202e")


def test_counts_do_not_depend_on_how_many_are_shown(ens):
    write(ens, "[queue.debug]\n")
    ens("add", "--", "sleep", "60")
    ens("serve", "--once")
    assert ens.json("queue", "--limit", "0")["queues"][0]["active"] == 1
    assert ens.json("queue", "--limit", "0")["batch_jobs"] == []
    assert re.search(r"^debug +debug .* 1 +1 ", ens("queue", "--limit", "0"), re.M)


def test_terminals_narrow_and_wide(ens):
    write(ens, f"[queue.{'d' * 40}]\nqueue = 'q'\n")
    ens("add", "--", "true")
    ens("queue", "pause", "d" * 40, "--reason", "long " * 50 + "\x1b]0;owned\x07")
    submit(ens, "--wf-filter=\u20ac" + "x" * 60)
    for columns in (30, 80, 300):
        for word in ("queue", "status"):
            text = screen(ens, word, columns=columns)
            # Only styles, which end as they begin.
            assert set(re.findall("\x1b(.)", text)) <= {"["}
            assert set(re.findall(r"\x1b\[[\d;]*(.)", text)) <= {"m"}
            assert "\x07" not in text
            tables = [
                line for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines() if "  q  " in line
            ]
            assert all(len(line) <= columns for line in tables)


def test_a_broken_setting_is_one_line_for_all_of_them(ens):
    write(ens, "[queue.debug]\nmax_quued = 3\n")
    for words in (
        ("queue",),
        ("serve",),
        ("serve", "--daemon"),
        ("submit-launch", "-n1", "-t1"),
        ("status",),
    ):
        ens.fails(2, "[queue.debug] unknown setting max_quued; did you mean max_queued?", *words)


def test_without_a_database_all_of_them_say_so(ens):
    ens("db", "stop")
    try:
        for words in (
            ("queue",),
            ("serve",),
            ("serve", "--daemon"),
            ("serve", "--stop"),
            ("submit-launch", "-n1", "-t1"),
        ):
            ens.fails(4, "db start", *words)
    finally:
        ens("db", "start")


def test_json_is_one_document(ens):
    write(ens, "[queue.debug]\nflags = ['--x']\n")
    found = json.loads(ens("queue", "--json"))
    assert set(found) == {"service", "queues", "batch_jobs", "decisions"}
    assert found["queues"][0]["flags"] == ["--x"]
    assert found["queues"][0]["next"]
