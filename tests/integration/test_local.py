"""The local scheduler: real scripts, real supervisors, and every way for them to die."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ensemble.core.batchjob import JobState
from ensemble.drivers import batch, local, nodes, proctree
from ensemble.drivers.batch import BatchSystem
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, Seen
from ensemble.errors import SchedulerError, Trouble

OVER = {JobState.FINISHED, JobState.FAILED, JobState.TIMEOUT, JobState.CANCELLED}
#: Ignores TERM, as do a child, and a daemon with its own session and, if told so, no environment.
STUBBORN = """
trap '' TERM
sleep 1234 &
{daemon} sh -c 'trap "" TERM; setsid sh -c "echo \\$\\$ >> pids; exec sleep 1234" & setsid sleep 1234 & exit' &
echo $$ >> pids
while :; do sleep 1234; done
"""
TIME_NAMESPACE = ["unshare", "--time", "--boottime", "1000000"]
AS_ROOT = [] if os.geteuid() == 0 else ["--map-root-user"]
CONTAINER = ["unshare", *AS_ROOT, "--pid", "--fork", "--mount-proc"]
#: One that has a name of its own, too.
NAMED = ["unshare", *AS_ROOT, "--uts", "sh", "-c", 'hostname elsewhere; exec "$@"', "sh"]


class Machine:
    """A directory of the local scheduler, and hands for it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.path = work / "jobs"
        self.output = work / "output"
        self.scripts = 0
        self.prefix: list[str] = []

    def run(self, argv: list[str], **options: Any) -> Completed:
        done = subprocess.run(
            [*self.prefix, *argv],
            cwd=options.pop("cwd", self.work),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            **options,
        )
        return Completed(
            code=done.returncode,
            stdout=done.stdout.decode(errors="replace"),
            stderr=done.stderr.decode(errors="replace"),
        )

    def script(self, text: str) -> Path:
        self.scripts += 1
        path = self.work / f"script{self.scripts}.sh"
        path.write_text(f"#!/bin/bash\n{text}\n")
        return path

    def argv(self, script: Path, *flags: str, at_most: int = 1, name: str = "test") -> list[str]:
        request = Request(script=script, name=name, output=self.output, flags=flags)
        return local.make(self.path, at_most).submit_argv(request)

    def submit(
        self, text: str, *flags: str, at_most: int = 1, name: str = "test", **options: Any
    ) -> str:
        argv = self.argv(self.script(text), *flags, at_most=at_most, name=name)
        answer = self.run(argv, **options)
        assert (answer.code, answer.stderr) == (0, "")
        return local.parse_submit(answer)

    def refuse(self, text: str, *flags: str) -> str:
        answer = self.run(self.argv(self.script(text), *flags))
        assert answer.code == 2
        assert answer.stderr.count("\n") == 1
        assert answer.stdout == ""
        assert self.listing() == {}
        return answer.stderr

    def listing(self) -> dict[str, Seen]:
        scheduler = local.make(self.path, 1)
        return {
            seen.id: seen for seen in scheduler.parse_status(self.run(scheduler.status_argv([])))
        }

    @contextlib.contextmanager
    def inside(self, prefix: list[str]) -> Iterator[None]:
        """Run all commands below another one."""
        self.prefix = prefix
        yield
        self.prefix = []

    def cancel(self, id: str) -> Completed:
        return self.run(local.make(self.path, 1).cancel_argv(id))

    def until(self, condition: Callable[[], Any], within_s: float = 30.0) -> Any:
        end = time.monotonic() + within_s
        while not (found := condition()):
            assert time.monotonic() < end, f"not in time; {self.listing()}"
            time.sleep(0.01)
        return found

    def await_state(self, id: str, *states: JobState, within_s: float = 30.0) -> Seen:
        self.until(lambda: self.listing()[id].state in states, within_s)
        return self.listing()[id]

    def await_end(self, id: str) -> Seen:
        return self.await_state(id, *OVER)

    def hear(self, name: str) -> str:
        """Return what a script wrote into a file, once its line is whole."""
        path = self.work / name
        self.until(lambda: path.exists() and path.read_text().endswith("\n"))
        return path.read_text().strip()

    def record(self, id: str) -> dict[str, Any]:
        return json.loads((self.path / "active" / f"{id}.json").read_text())

    def change(self, id: str, **fields: Any) -> None:
        path = self.path / "active" / f"{id}.json"
        with open(self.path / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path.write_text(json.dumps(self.record(id) | fields))

    def supervisor(self, id: str) -> int:
        return self.record(id)["supervisor"][0]

    def kill_supervisor(self, id: str) -> None:
        pid = self.supervisor(id)
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: not lives(pid))

    def processes(self) -> list[int]:
        """Return every process that works in this directory, or for it."""
        here, found = os.fsencode(self.work), []
        for pid in proctree.scan():
            with contextlib.suppress(OSError):
                cwd = os.fsencode(os.readlink(f"/proc/{pid}/cwd"))
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if (cwd.startswith(here) or here in command) and pid != os.getpid() and lives(pid):
                    found.append(pid)
        return found


def lives(pid: int) -> bool:
    stat = proctree.read_stat(pid)
    return stat is not None and not stat.is_zombie


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    log = made.path / "log"
    words = log.read_text() if log.exists() else ""
    end = time.monotonic() + 10
    left: list[int] = []
    while (found := made.processes()) and time.monotonic() < end:
        # A test that has failed, else supervisors on their way out.
        if time.monotonic() > end - 7:
            left = left or found
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    assert words == ""
    assert left == []


# A job's life


def test_exit_status_and_output(machine: Machine) -> None:
    good = machine.submit("echo out; echo err >&2")
    bad = machine.submit("echo more; exit 3")
    killed = machine.submit("kill -9 $$")
    assert (good, bad, killed) == ("1", "2", "3")
    assert machine.await_end(killed).exit_code == 137
    seen = machine.listing()
    assert [(each.state, each.exit_code, each.reason) for each in seen.values()] == [
        (JobState.FINISHED, 0, ""),
        (JobState.FAILED, 3, "exit status 3"),
        (JobState.FAILED, 137, "killed by signal 9"),
    ]
    assert machine.output.read_text() == "out\nerr\nmore\n"
    for each in seen.values():
        assert each.started_at is not None
        assert each.ended_at is not None
        assert 0 <= time.time() - each.started_at < 60
        assert each.started_at <= each.ended_at
        assert each.ends_at is None


async def test_what_a_job_is_told(machine: Machine) -> None:
    stale = {
        "ENSEMBLE_LOCAL_JOB_ID": "99",
        "ENSEMBLE_LOCAL_JOB_END": "1",
        "ENSEMBLE_TASK_TOKEN": "1-2-3.4.5",
        "SLURM_JOB_ID": "55",
        "SLURM_CONF": "/kept",
        "COLOUR": "grün \udcff",
    }
    folder = machine.work / "a folder"
    folder.mkdir()
    id = machine.submit(
        "#ENSEMBLE --nodes 3 --time=90.5  # both\nenv -0 > environ; pwd; umask",
        cwd=folder,
        env=os.environ | stale,
        umask=0o027,
    )
    seen = machine.await_end(id)
    assert machine.output.read_text() == f"{folder}\n0027\n"
    text = os.fsdecode((folder / "environ").read_bytes())
    environ = dict(item.split("=", 1) for item in text.split("\0") if item)
    assert environ["COLOUR"] == stale["COLOUR"]
    assert environ["SLURM_CONF"] == "/kept"
    assert environ["ENSEMBLE_LOCAL_JOB_ID"] == id
    assert "ENSEMBLE_TASK_TOKEN" not in environ
    assert seen.started_at is not None
    assert seen.ends_at == pytest.approx(seen.started_at + 90.5 * 60)
    allocation = await nodes.find_allocation(environ, virtual_nodes=None, now=0.0)
    assert (allocation.scheduler, allocation.job_id, len(allocation.nodes)) == ("local", id, 3)
    assert allocation.ends_at == int(seen.ends_at)


def test_flags_win_over_directives(machine: Machine) -> None:
    text = "#ENSEMBLE --nodes 3\n\n# said again\n#ENSEMBLE --nodes 4\necho $ENSEMBLE_LOCAL_JOB_NODES\n#ENSEMBLE --nodes x"
    machine.await_end(machine.submit(text))
    machine.await_end(machine.submit(text, "--nodes", "5"))
    assert machine.output.read_text() == "4\n5\n"


def test_first_come_first_served_and_no_more_than_allowed_at_once(machine: Machine) -> None:
    text = "echo +; while [ ! -e go ]; do sleep 0.02; done; sleep 0.1; echo -"
    ids = [machine.submit(text, at_most=2) for _ in range(8)]
    for id in ids[:2]:
        machine.await_state(id, JobState.RUNNING)
    assert [machine.listing()[id].state for id in ids[2:]] == [JobState.QUEUED] * 6
    (machine.work / "go").touch()
    for id in ids:
        assert machine.await_end(id).state is JobState.FINISHED
    lines = machine.output.read_text().split("\n")[:-1]
    running = most = 0
    for line in lines:
        running += 1 if line == "+" else -1
        most = max(most, running)
    assert most == 2
    seen = machine.listing()
    begun = [seen[id].started_at or 0.0 for id in ids]
    assert begun == sorted(begun)


def test_the_next_begins_at_once(machine: Machine) -> None:
    ids = [machine.submit("true") for _ in range(7)]
    machine.await_end(ids[-1])
    seen = [machine.listing()[id] for id in ids]
    gaps = [
        (late.started_at or 0.0) - (early.ended_at or 0.0)
        for early, late in itertools.pairwise(seen)
    ]
    assert min(gaps) >= 0


def test_several_turns_that_come_free_at_once_are_taken_at_once(machine: Machine) -> None:
    for _ in range(4):
        machine.submit("while [ ! -e go ]; do sleep 0.02; done", at_most=4)
    ids = [machine.submit("sleep 60", at_most=4) for _ in range(4)]
    (machine.work / "go").touch()
    for id in ids:  # one after the other, this would take minutes
        assert machine.await_state(id, JobState.RUNNING, *OVER).state is JobState.RUNNING
    for id in ids:
        machine.cancel(id)


def test_a_wide_job_waits_although_its_successor_could_run(machine: Machine) -> None:
    os.mkfifo(machine.work / "gate")
    first = machine.submit("read < gate", at_most=1)
    machine.await_state(first, JobState.RUNNING, *OVER)
    second = machine.submit("true", at_most=1)
    third = machine.submit("true", at_most=9)
    seen = machine.listing()
    assert seen[second].state is seen[third].state is JobState.QUEUED
    assert "at most 9" in seen[third].reason
    machine.until(
        lambda: _open_gate(machine.work / "gate") or machine.listing()[first].state in OVER
    )
    assert machine.await_end(third).state is JobState.FINISHED
    assert machine.await_end(second).state is JobState.FINISHED


def _open_gate(path: Path) -> bool:
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    return False


def test_the_submitters_pipes_close_at_once(machine: Machine) -> None:
    ours, theirs = os.pipe()
    argv = machine.argv(machine.script("echo $$ > pid; exec sleep 1234"))
    # capture_output reads to the end of both pipes, so it would hang as well.
    answer = machine.run(argv, pass_fds=[theirs])
    os.close(theirs)
    machine.hear("pid")
    with open(ours, "rb") as file:
        assert file.read() == b""
    descriptors = os.listdir(f"/proc/{machine.hear('pid')}/fd")
    assert sorted(descriptors) == ["0", "1", "2"]
    machine.cancel(local.parse_submit(answer))


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_submitter_without_standard_streams(machine: Machine, closed: str) -> None:
    argv = machine.argv(machine.script("echo ran"))
    answer = machine.run(["sh", "-c", f'"$@" {closed}', "sh", *argv])
    assert answer.code == 0
    machine.await_end("1")
    assert machine.output.read_text() == "ran\n"


def test_a_job_survives_its_submitters_session(machine: Machine) -> None:
    argv = machine.argv(machine.script("echo $$ > pid; read < gate; echo over"))
    os.mkfifo(machine.work / "gate")
    shell = subprocess.Popen(["sh", "-c", '"$@"; sleep 1234', "sh", *argv], cwd=machine.work, start_new_session=True, stdout=subprocess.DEVNULL)  # fmt: skip
    machine.hear("pid")
    os.killpg(shell.pid, signal.SIGHUP)
    os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()
    machine.until(lambda: _open_gate(machine.work / "gate") or machine.output.read_text())
    assert machine.await_end("1").state is JobState.FINISHED


def test_a_job_may_submit_its_successor(machine: Machine) -> None:
    inner = machine.script(
        "while [ -e running ]; do sleep 0.02; done; echo inner $ENSEMBLE_LOCAL_JOB_ID; pwd"
    )
    words = " ".join(f"'{word}'" for word in machine.argv(inner, at_most=2))
    outer = machine.submit(f"touch running; {words}; echo outer $ENSEMBLE_LOCAL_JOB_ID", at_most=2)
    assert machine.await_end(outer).state is JobState.FINISHED
    (machine.work / "running").unlink()
    assert machine.await_end("2").state is JobState.FINISHED
    assert machine.output.read_text() == f"2\nouter 1\ninner 2\n{machine.work}\n"


# Ending


@pytest.mark.parametrize("daemon", ["", "env -i PATH=/usr/bin:/bin"])
def test_nothing_is_left_of_a_stubborn_job_at_its_time_limit(machine: Machine, daemon: str) -> None:
    id = machine.submit(STUBBORN.format(daemon=daemon), "--time", "0.02", "--grace", "0.3")
    seen = machine.await_end(id)
    assert (seen.state, seen.exit_code) == (JobState.TIMEOUT, 137)
    assert seen.reason == "its time limit of 0.02 minutes was over"
    assert seen.started_at is not None
    assert seen.ended_at is not None
    assert seen.ended_at - seen.started_at >= 1.5
    assert len((machine.work / "pids").read_text().split()) == 2
    assert machine.processes() == []


def test_what_a_script_leaves_behind_ends_with_it(machine: Machine) -> None:
    id = machine.submit(
        "setsid sh -c 'trap \"\" TERM; echo $$ > pid; exec sleep 1234' & sleep 0.1; exit 0"
    )
    assert machine.await_end(id).state is JobState.FINISHED
    assert machine.processes() == []


def test_every_process_is_asked_to_end_and_has_its_grace(machine: Machine) -> None:
    asked = "trap 'sleep 0.3; echo {0} >> asked; exit 7' TERM; echo >> ready; while :; do sleep 0.01; done"
    inner = machine.script(asked.format("child"))
    id = machine.submit(f"setsid bash {inner} & {asked.format('script')}")
    machine.until(
        lambda: (machine.work / "ready").exists() and (machine.work / "ready").read_text() == "\n\n"
    )
    assert machine.cancel(id).code == 0
    seen = machine.await_end(id)
    assert (seen.state, seen.exit_code, seen.reason) == (JobState.CANCELLED, 7, "cancelled")
    assert sorted((machine.work / "asked").read_text().split()) == ["child", "script"]


def test_a_stopped_job_is_cancelled(machine: Machine) -> None:
    id = machine.submit("trap 'exit 5' TERM; echo $$ > pid; while :; do kill -STOP $$; done")
    pid = int(machine.hear("pid"))
    machine.until(lambda: (stat := proctree.read_stat(pid)) and stat.is_stopped)
    machine.cancel(id)
    assert machine.await_end(id).exit_code == 5


def test_cancel(machine: Machine) -> None:
    running = machine.submit("echo $$ > pid; exec sleep 1234")
    queued = [machine.submit("echo never") for _ in range(3)]
    machine.hear("pid")
    assert machine.cancel(queued[1]).code == 0
    seen = machine.listing()[queued[1]]
    assert (seen.state, seen.reason) == (JobState.CANCELLED, "cancelled before it began")
    for id in (queued[0], queued[2], running):
        assert machine.cancel(id).code == 0
    assert machine.await_end(running).state is JobState.CANCELLED
    for id in (running, *queued):
        answer = machine.cancel(id)
        assert (answer.code, answer.stderr) == (1, f"ensemble local: job {id} has ended\n")
    assert "there is no job 77" in machine.cancel("77").stderr
    for word in ("", "-1", "x", "1 2", "../1", "\N{ARABIC-INDIC DIGIT ONE}"):
        assert machine.cancel(word).code == 2
    assert "never" not in machine.output.read_text()


def test_cancelling_returns_before_a_stubborn_job_has_ended(machine: Machine) -> None:
    id = machine.submit("trap '' TERM; echo $$ > pid; while :; do sleep 1234; done", "--grace", "3")
    machine.hear("pid")
    for _ in range(2):
        assert machine.cancel(id).code == 0
    assert machine.listing()[id].state is JobState.RUNNING
    assert machine.await_end(id).state is JobState.CANCELLED


@pytest.mark.skipif(
    subprocess.run([*TIME_NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="no time namespace can be made here",
)
def test_time_limits_are_measured_by_a_clock_that_counts_sleep(machine: Machine) -> None:
    # There only CLOCK_BOOTTIME is a million seconds ahead: a mix with any other clock ends it at once, or never.
    machine.prefix = TIME_NAMESPACE
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    id = machine.submit("echo $$ > pid; exec sleep 1234", "--time", "0.02")
    machine.hear("pid")
    deadline = machine.record(id)["deadline_s"] - 1e6
    assert before + 1.2 <= deadline <= time.clock_gettime(time.CLOCK_BOOTTIME) + 1.2
    seen = machine.await_end(id)
    assert seen.state is JobState.TIMEOUT
    assert (seen.ended_at or 0.0) - (seen.started_at or 0.0) >= 1.19


# Supervisors that are killed


def test_a_job_that_lost_supervisor_and_script_has_failed(machine: Machine) -> None:
    id = machine.submit("echo $$ > pid; exec sleep 1234")
    after = machine.submit("true")
    script = int(machine.hear("pid"))
    machine.kill_supervisor(id)
    os.kill(script, signal.SIGKILL)
    seen = machine.await_end(id)
    assert (seen.state, seen.reason) == (JobState.FAILED, "its supervisor was killed")
    assert seen.exit_code is None
    assert machine.await_end(after).state is JobState.FINISHED
    assert machine.listing()[id] == seen


def test_a_queued_job_that_lost_its_supervisor_has_failed(machine: Machine) -> None:
    first = machine.submit("echo $$ > pid; exec sleep 1234")
    second, third = machine.submit("echo never"), machine.submit("echo third")
    machine.hear("pid")
    machine.kill_supervisor(second)
    machine.cancel(first)
    assert machine.await_end(third).state is JobState.FINISHED
    assert machine.listing()[second].state is JobState.FAILED
    assert machine.output.read_text() == "third\n"


ORPHANED = """
trap 'echo asked >> asked; exit 4' TERM
setsid sh -c 'trap "" TERM; exec sleep 1234' &
echo $$ > pid
while [ ! -e finish ]; do sleep 0.02; done
"""


def test_a_job_whose_supervisor_was_killed_runs_on_and_keeps_its_turn(machine: Machine) -> None:
    id = machine.submit(ORPHANED)
    after = machine.submit("echo after")
    machine.hear("pid")
    old = machine.supervisor(id)
    machine.kill_supervisor(id)
    # The one that waits for its turn has seen it, or this look does.
    assert machine.listing()[id].state is JobState.RUNNING
    assert machine.listing()[after].state is JobState.QUEUED
    assert machine.supervisor(id) != old
    (machine.work / "finish").touch()
    seen = machine.await_end(id)
    assert (seen.state, seen.reason, seen.exit_code) == (
        JobState.FAILED,
        "its supervisor was killed",
        None,
    )
    assert machine.await_end(after).state is JobState.FINISHED
    assert machine.processes() == []


def test_a_job_whose_supervisors_were_killed_can_be_cancelled(machine: Machine) -> None:
    id = machine.submit(ORPHANED, "--grace", "0.3")
    machine.hear("pid")
    for _ in range(3):
        machine.kill_supervisor(id)
        assert machine.listing()[id].state is JobState.RUNNING
    machine.kill_supervisor(id)
    assert machine.cancel(id).code == 0
    assert machine.await_end(id).state is JobState.CANCELLED
    assert machine.hear("asked") == "asked"
    assert machine.processes() == []


def test_a_job_whose_supervisor_was_killed_has_its_time_limit(machine: Machine) -> None:
    id = machine.submit(ORPHANED, "--time", "0.03", "--grace", "0.2")
    machine.hear("pid")
    machine.kill_supervisor(id)
    assert machine.await_end(id).state is JobState.TIMEOUT
    assert machine.processes() == []


def test_a_daemon_alone_keeps_a_job_running_until_it_is_killed(machine: Machine) -> None:
    id = machine.submit(ORPHANED)
    script = int(machine.hear("pid"))
    machine.kill_supervisor(id)
    os.kill(script, signal.SIGKILL)
    assert machine.await_end(id).state is JobState.FAILED
    assert machine.processes() == []


def test_a_supervisor_that_is_told_to_end_ends_its_job(machine: Machine) -> None:
    running = machine.submit("echo $$ > pid; exec sleep 1234")
    queued = machine.submit("echo never")
    machine.hear("pid")
    for id in (queued, running):
        os.kill(machine.supervisor(id), signal.SIGTERM)
        seen = machine.await_end(id)
        assert (seen.state, seen.reason) == (
            JobState.CANCELLED,
            "its supervisor was told to end (SIGTERM)",
        )


def test_killing_a_supervisor_at_any_moment_leaves_no_script_without_one(machine: Machine) -> None:
    choose = random.Random(7)
    script = machine.script("echo $$ >> pids; exec sleep 1234")
    for _ in range(12):
        done = machine.run(machine.argv(script, at_most=99))
        id = local.parse_submit(done)
        pid = machine.supervisor(id)
        time.sleep(choose.uniform(0, 0.03))  # a moment of its start; not to wait for anything
        os.kill(pid, signal.SIGKILL)
    for id, seen in machine.listing().items():
        assert seen.state in (JobState.RUNNING, JobState.FAILED)
        if seen.state is JobState.RUNNING:
            machine.cancel(id)
    for id in machine.listing():
        machine.await_end(id)
    assert machine.processes() == []


def test_killing_submitters_at_any_moment(machine: Machine) -> None:
    choose = random.Random(11)
    script = machine.script("true")
    for _ in range(25):
        child = subprocess.Popen(
            machine.argv(script), cwd=machine.work, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        time.sleep(choose.uniform(0, 0.09))  # a moment of its life; not to wait for anything
        child.kill()
        child.communicate()
    last = machine.submit("true")
    assert machine.await_end(last).state is JobState.FINISHED
    for id in machine.listing():
        assert machine.await_end(id).state in (JobState.FINISHED, JobState.FAILED)


# After a reboot, elsewhere, and with little room


def _give_up_on(machine: Machine) -> str:
    """Return a job on record as running of which nothing runs."""
    id = machine.submit("echo $$ > pid; exec sleep 1234")
    script = int(machine.hear("pid"))
    machine.kill_supervisor(id)
    os.kill(script, signal.SIGKILL)
    machine.until(lambda: not lives(script))
    return id


def test_a_reboot_ends_jobs(machine: Machine) -> None:
    id = _give_up_on(machine)
    # The numbers may well belong to others by then.
    life = list(_life_of(os.getpid()))
    machine.change(id, boot="before", supervisor=life, process=life)
    seen = machine.listing()[id]
    assert (seen.state, seen.reason) == (JobState.FAILED, "the machine was booted again")
    assert lives(os.getpid())


def test_a_number_that_has_passed_to_another_process_is_no_evidence(machine: Machine) -> None:
    id = _give_up_on(machine)
    pid, ticks = _life_of(os.getpid())
    machine.change(id, supervisor=[pid, ticks - 1], process=[pid, ticks - 1])
    assert machine.cancel(id).code == 1
    assert machine.listing()[id].state is JobState.FAILED


def test_another_machines_jobs_are_not_judged(machine: Machine) -> None:
    id = _give_up_on(machine)
    machine.change(id, machine="another", boot="its own")
    assert machine.listing()[id].state is JobState.RUNNING
    assert machine.await_end(machine.submit("true")).state is JobState.FINISHED
    assert machine.listing()[id].state is JobState.RUNNING


def test_a_copied_machine_is_another_machine(machine: Machine) -> None:
    id = _give_up_on(machine)
    machine.change(id, host="another", boot="its own")
    assert machine.listing()[id].state is JobState.RUNNING


needs_containers = pytest.mark.skipif(
    any(
        subprocess.run([*prefix, "true"], capture_output=True).returncode != 0
        for prefix in (CONTAINER, NAMED)
    ),
    reason="unshare --pid is not allowed here",
)


@needs_containers
@pytest.mark.parametrize("prefix", [CONTAINER, NAMED], ids=["pids", "name"])
def test_another_containers_jobs_are_not_judged(machine: Machine, prefix: list[str]) -> None:
    id = machine.submit("echo $$ > pid; exec sleep 1234")
    queued = machine.submit("echo second")
    machine.hear("pid")
    before = machine.record(id)
    with machine.inside(prefix):
        assert machine.listing()[id].state is JobState.RUNNING
        assert machine.listing()[queued].state is JobState.QUEUED
    assert machine.record(id) == before
    machine.cancel(id)
    assert machine.await_end(queued).state is JobState.FINISHED


@needs_containers
@pytest.mark.parametrize("prefix", [CONTAINER, NAMED], ids=["pids", "name"])
def test_another_containers_jobs_can_be_cancelled(machine: Machine, prefix: list[str]) -> None:
    id = machine.submit(
        "trap 'echo $$ asked >> asked; exit 7' TERM; echo $$ > pid; while :; do sleep 0.05; done"
    )
    queued = machine.submit("echo never")
    pid = machine.hear("pid")
    with machine.inside(prefix):
        assert machine.cancel(queued).code == 0
        assert machine.cancel(id).code == 0
        assert machine.cancel(id).code == 0
        assert machine.listing()[queued].state is JobState.CANCELLED
    seen = machine.await_end(id)
    assert (seen.state, seen.exit_code, seen.reason) == (JobState.CANCELLED, 7, "cancelled")
    assert machine.hear("asked") == f"{pid} asked"
    assert not machine.output.exists() or "never" not in machine.output.read_text()


def test_a_job_whose_container_is_gone_can_be_cancelled(machine: Machine) -> None:
    id = _give_up_on(machine)
    machine.change(id, pid_namespace="pid:[1]")
    assert machine.cancel(id).code == 0
    assert machine.listing()[id].state is JobState.RUNNING
    machine.change(id, cancelled_at=time.time() - 120)
    assert machine.cancel(id).code == 0
    seen = machine.listing()[id]
    assert seen.state is JobState.CANCELLED
    assert "did not answer" in seen.reason
    assert machine.cancel(id).code == 1


def test_records_of_an_older_version_are_judged(machine: Machine) -> None:
    id = _give_up_on(machine)
    old = machine.record(id)
    for name in ("host", "pid_namespace", "cancelled_at"):
        del old[name]
    path = machine.path / "active" / f"{id}.json"
    path.write_text(json.dumps(old | {"machine": "another"}))
    assert machine.listing()[id].state is JobState.RUNNING
    assert "on another machine (another): cancel it there" in machine.cancel(id).stderr
    path.write_text(json.dumps(old))
    assert machine.listing()[id].state is JobState.FAILED


def _life_of(pid: int) -> tuple[int, int]:
    stat = proctree.read_stat(pid)
    assert stat is not None
    return pid, stat.start_ticks


def test_a_damaged_record_is_shown_and_holds_nobody_up(machine: Machine) -> None:
    machine.await_end(machine.submit("true"))
    for name, text in (
        ("active/2", ""),
        ("active/3", "[1]"),
        ("active/4", "{}"),
        ("ended/5", '{"id"'),
    ):
        (machine.path / f"{name}.json").write_text(text)
    (machine.path / "active" / "notes.txt").write_text("of no concern")
    assert machine.submit("true") == "6"
    assert machine.await_end("6").state is JobState.FINISHED
    seen = machine.listing()
    assert [seen[id].state for id in "2345"] == [JobState.LOST] * 4
    assert all(seen[id].is_stuck for id in "2345")
    assert "is damaged" in machine.cancel("3").stderr
    assert (machine.path / "active" / "3.json").read_text() == "[1]"


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))


def test_no_room_loses_no_record(machine: Machine) -> None:
    id = machine.submit("echo $$ > pid; exec sleep 1234")
    machine.hear("pid")
    before = machine.record(id)
    full = machine.run(machine.argv(machine.script("true")), preexec_fn=_limit_files)
    assert full.code == 1
    assert full.stderr.count("\n") == 1
    assert "File too large" in full.stderr
    cancelled = machine.run(local.make(machine.path, 1).cancel_argv(id), preexec_fn=_limit_files)
    assert cancelled.code == 1
    assert machine.record(id) == before
    assert list(machine.listing()) == [id]
    machine.cancel(id)
    machine.await_end(id)


def test_an_end_that_cannot_be_written_is_written_when_there_is_room(machine: Machine) -> None:
    id = machine.submit("echo $$ > pid; read < gate; exit 6")
    os.mkfifo(machine.work / "gate")
    machine.await_state(id, JobState.RUNNING, JobState.FAILED)
    if machine.listing()[id].state is JobState.FAILED:  # it came before the gate was there
        id = machine.submit("read < gate; exit 6")
        machine.await_state(id, JobState.RUNNING)
    pid, script = machine.supervisor(id), machine.record(id)["process"][0]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    machine.until(lambda: _open_gate(machine.work / "gate") or not lives(script))
    assert machine.listing()[id].state is JobState.RUNNING
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert machine.await_end(id).exit_code == 6


def test_old_records_go_and_numbers_do_not_come_back(machine: Machine) -> None:
    machine.await_end(machine.submit("true", name="old"))
    record = json.loads((machine.path / "ended" / "1.json").read_text())
    for id in range(2, 1003):
        text = json.dumps(record | {"id": id})
        (machine.path / "ended" / f"{id}.json").write_text(text)
    id = machine.submit("true")
    assert id == "1003"
    machine.await_end(id)
    assert list(machine.listing()) == [str(number) for number in range(3, 1004)]
    assert "there is no job 1" in machine.cancel("1").stderr


def test_everything_is_for_the_user_alone(machine: Machine) -> None:
    machine.await_end(machine.submit("true", umask=0))
    assert machine.path.stat().st_mode & 0o777 == 0o700
    for path in machine.path.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


# Many at once


def test_many_submissions_at_once_get_numbers_of_their_own(machine: Machine) -> None:
    argv = machine.argv(machine.script("echo $ENSEMBLE_LOCAL_JOB_ID"), at_most=3)
    children = [
        subprocess.Popen(argv, cwd=machine.work, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(60)
    ]
    ends = [child.communicate(timeout=100) for child in children]
    assert {errors for _, errors in ends} == {b""}
    assert sorted(int(out) for out, _ in ends) == list(range(1, 61))
    machine.until(
        lambda: {seen.state for seen in machine.listing().values()} == {JobState.FINISHED}, 90
    )
    assert sorted(map(int, machine.output.read_text().split())) == list(range(1, 61))


def test_a_storm_of_commands(machine: Machine) -> None:
    script = machine.script("echo + >> count; sleep 0.05; echo - >> count")

    def do(number: int) -> None:
        choose = random.Random(number)
        id = local.parse_submit(machine.run(machine.argv(script, at_most=2)))
        assert id in machine.listing()
        match choose.randrange(3):
            case 0:
                assert machine.cancel(id).code in (0, 1)
            case 1:
                with contextlib.suppress(OSError, ValueError):
                    os.kill(machine.supervisor(id), signal.SIGKILL)
        assert id in machine.listing()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(do, range(24)))
    for id in machine.listing():
        machine.await_end(id)
    seen = machine.listing()
    assert len(seen) == 24
    # One that was cancelled does not say that it leaves.
    silent = sum(each.state is not JobState.FINISHED for each in seen.values())
    running = 0
    for line in (machine.work / "count").read_text().split():
        running += 1 if line == "+" else -1
        assert running <= 2 + silent


def test_never_more_than_one_runs_though_supervisors_are_killed(machine: Machine) -> None:
    # Only one can have the directory at a time, and whoever finds it taken says so.
    script = machine.script("mkdir alone || echo crowded\nsleep 0.1\nrmdir alone")
    ids = [local.parse_submit(machine.run(machine.argv(script))) for _ in range(8)]
    choose = random.Random(3)
    for id in ids[:-1]:
        machine.until(lambda id=id: machine.listing()[id].state is not JobState.QUEUED)
        if choose.random() < 0.7:
            with contextlib.suppress(OSError, ValueError):
                os.kill(machine.supervisor(id), signal.SIGKILL)
    assert machine.await_end(ids[-1]).state is JobState.FINISHED
    assert machine.output.read_text() == ""


# Odd requests


@pytest.mark.parametrize(
    "name",
    ["plain", "", " ", "-x", "--time", "a|b;c'd\"e`f$g", "new\nline\r\t\x01\x1b[31m\x7f", "grün ☃ 🐍", '{"listed": 0}',
     "\u2028\x85", "\udcff\udc80", "n" * 5000],
)  # fmt: skip
def test_hostile_names(machine: Machine, name: str) -> None:
    id = machine.submit("true", name=name)
    assert machine.await_end(id).name == name


@pytest.mark.parametrize("folder", ["a b", "-x", "new\nline", "grün", "quo'te\"", "$(touch x)"])
def test_hostile_directories(tmp_path: Path, machine: Machine, folder: str) -> None:
    machine.work = tmp_path / folder
    machine.work.mkdir()
    machine.path = machine.work / "deeper" / "jobs"
    machine.output = machine.work / "output"
    assert machine.await_end(machine.submit("pwd")).state is JobState.FINISHED
    assert machine.output.read_text() == f"{machine.work}\n"


@pytest.mark.parametrize(
    ("directive", "words"),
    [
        ("--nodes", "--nodes needs a value"),
        ("--nodes 0", "expected a number of nodes"),
        ("--nodes two", "expected a number of nodes"),
        ("--nodes ٣", "expected a number of nodes"),
        ("--time 0", "expected minutes, such as 90"),
        ("--time 0.0", "expected minutes, such as 90"),
        ("--time 1:30:00", "expected minutes, such as 90"),
        ("--time -5", "expected minutes, such as 90"),
        ("--time inf", "expected minutes, such as 90"),
        ("--time 1e3", "expected minutes, such as 90"),
        ("--tiem 5", "unknown option '--tiem'; known: --nodes --time --grace"),
        ("-t 5", "unknown option '-t'"),
        ("--dir /tmp", "unknown option '--dir'"),
        ("5", "expected options, found '5'"),
        ("--nodes '2", "No closing quotation"),
        ("--nodes \x1b[31m", "\\x1b[31m"),
    ],
)
def test_malformed_directives(machine: Machine, directive: str, words: str) -> None:
    error = machine.refuse(f"# first\n#ENSEMBLE {directive}\necho ran")
    assert words in error
    assert ", line 3" in error


def test_malformed_requests(machine: Machine) -> None:
    assert "unknown option '--queue'" in machine.refuse("true", "--queue", "long")
    assert "--time '1:30'" in machine.refuse("true", "--time", "1:30")
    assert "expected one script, got 2" in machine.refuse("true", "another.sh")
    assert "Windows line ends" in machine.refuse("echo one\r\necho two\r")
    for script, words in (
        (machine.work / "missing.sh", "No such file"),
        (machine.work, "Is a directory"),
        (Path("/dev/null"), "no regular file"),
    ):
        answer = machine.run(machine.argv(script))
        assert answer.code == 2
        assert words in answer.stderr
    for output in (machine.work, machine.work / "missing" / "output", Path("/proc/output")):
        machine.output = output
        assert f"cannot write output '{output}'" in machine.refuse("true")
    script = [sys.executable, local.__file__.replace("local.py", "localbatch.py")]
    for words in ([], ["sumbit"], ["status"], ["cancel", "1"], ["submit"]):
        answer = machine.run([*script, *words])
        assert answer.code == 2
        assert answer.stderr.count("\n") == 1


def test_directories_that_cannot_be_used(machine: Machine) -> None:
    (machine.work / "file").write_text("")
    script = machine.script("true")
    for path in (machine.work / "file" / "jobs", machine.work / "file", Path("/proc/jobs")):
        machine.path = path
        for argv in (machine.argv(script), local.make(path, 1).status_argv([])):
            answer = machine.run(argv)
            assert answer.code == 1
            assert answer.stderr.count("\n") == 1
            assert str(path) in answer.stderr
    machine.path = machine.work / "open"
    machine.path.mkdir()
    machine.path.chmod(0o777)
    assert "writable by nobody else" in machine.run(machine.argv(script)).stderr


def test_a_directory_whose_parent_is_missing_is_no_empty_queue(machine: Machine) -> None:
    machine.path = machine.work / "unmounted" / "jobs"
    with pytest.raises(SchedulerError, match="No such file or directory"):
        machine.listing()


def test_what_goes_wrong_between_submission_and_start(machine: Machine) -> None:
    first = machine.submit("while [ ! -e go ]; do sleep 0.02; done")
    folder = machine.work / "folder"
    folder.mkdir()
    no_folder = machine.submit("true", cwd=folder)
    no_script = machine.submit("true")
    machine.output = machine.work / "other"
    no_output = machine.submit("true")
    folder.rmdir()
    (machine.work / f"script{machine.scripts - 1}.sh").unlink()
    machine.output.unlink()
    machine.output.mkdir()
    (machine.work / "go").touch()
    assert machine.await_end(first).state is JobState.FINISHED
    assert (
        machine.await_end(no_folder).reason == f"cannot go to {folder}: No such file or directory"
    )
    assert machine.await_end(no_script).exit_code == 127
    assert "cannot write" in machine.await_end(no_output).reason
    assert all(
        machine.listing()[id].state is JobState.FAILED for id in (no_folder, no_script, no_output)
    )


def test_a_directory_that_is_removed_takes_no_supervisor_with_it(machine: Machine) -> None:
    id = machine.submit(
        "trap '' TERM; sleep 1234 & echo $$ > pid; wait", "--time", "0.02", "--grace", "0.1"
    )
    machine.hear("pid")
    assert machine.listing()[id].state is JobState.RUNNING
    machine.path.rename(machine.work / "gone")
    machine.until(lambda: machine.processes() == [])
    assert not machine.path.exists()


# The driver


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "[]",
        "\n",
        '{"listed": 1}',
        '{"listed": "0"}',
        '{"id": "1", "state": "RUNNING", "reason": ""}',
        '{"id": 1, "state": "RUNNING", "reason": ""}\n{"listed": 1}',
        '{"id": "1", "state": "ODD", "reason": ""}\n{"listed": 1}',
        '{"id": "1", "state": "RUNNING", "reason": "", "ends_at": "x"}\n{"listed": 1}',
        "warning: odd\n" + '{"listed": 0}',
        "[" * 5000 + '\n{"listed": 0}',
    ],
)
def test_what_is_no_listing_is_not_taken_for_one(text: str) -> None:
    with pytest.raises(SchedulerError) as caught:
        local.parse_status(Completed(code=0, stdout=text, stderr=""))
    assert caught.value.trouble is Trouble.RETRY
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "x", "7 8", "7\n8", "-7", "\N{ARABIC-INDIC DIGIT SEVEN}"])
def test_what_is_no_id_is_not_taken_for_one(text: str) -> None:
    with pytest.raises(SchedulerError) as caught:
        local.parse_submit(Completed(code=0, stdout=text, stderr=""))
    assert caught.value.trouble is Trouble.UNSURE


async def test_through_the_batch_system(machine: Machine) -> None:
    scheduler = batch.get("local", directory=machine.path, max_running=1)
    system = BatchSystem(scheduler, environ=os.environ, cwd=machine.work)
    assert await system.listing([]) == []
    script = machine.script("#ENSEMBLE --time 5\necho $$ > pid; exec sleep 1234")
    request = Request(script=script, name="ens-site-1", output=machine.output)
    first, second = await system.submit(request), await system.submit(request)
    machine.hear("pid")
    seen = {each.id: each for each in await system.listing([first, second])}
    assert [seen[id].state for id in (first, second)] == [JobState.RUNNING, JobState.QUEUED]
    assert {each.name for each in seen.values()} == {"ens-site-1"}
    assert await system.cancel(second)
    assert await system.cancel(first)
    machine.await_end(first)
    assert not await system.cancel(first)
    assert not await system.cancel("99")
    script.write_text("#ENSEMBLE --queue long\n")
    with pytest.raises(SchedulerError, match="unknown option '--queue'") as caught:
        await system.submit(request)
    assert caught.value.trouble is Trouble.PERMANENT
