"""`ensemble serve` as users start it: what it submits, what it outlives, and how it leaves."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from ensemble.core.batchjob import JobState
from ensemble.core.jobs import Jobs, ServiceLock
from ensemble.core.model import Selector
from ensemble.core.states import State
from ensemble.drivers import proctree
from ensemble.drivers.pg.layout import Layout
from ensemble.errors import TakenError
from ensemble.service.filler import Decider
from ensemble.service.serve import Service
from tests.integration.launching import WHEEL, sh
from tests.integration.serving import DYING, Serving, json_lines

pytestmark = WHEEL

ONE = "[queue.debug]\n"
THREE = "[queue.debug]\nmax_queued = 3\n"


async def add(serving: Serving, count: int = 1, **fields) -> list[int]:
    return await serving.store.add([sh("true", **fields) for _ in range(count)])


async def rounds(serving: Serving, count: int = 4, *, of: str = "looks") -> None:
    """Wait until the scheduler was asked so many times more."""
    enough = serving.fake.count(of) + count
    await serving.eventually(lambda: serving.fake.count(of) >= enough, within_s=30)


# ---------------------------------------------------------------------------- filling and emptying


async def test_it_empties_a_backlog_within_the_limits_and_says_why(serving: Serving):
    serving.write(
        "[queue.debug]\nmax_queued = 2\nmax_nodes = 2\n[queue.small]\nwf_filter = 'small'\n",
        kind="local",
    )
    await serving.store.add(
        [sh("sleep 0.2", num_nodes=1 + n % 2) for n in range(12)]
        + [sh("true", workflow="a small one", num_nodes=1) for _ in range(3)]
    )
    most: dict[str | None, int] = {}

    async def is_empty() -> bool:
        jobs = await serving.active()
        for policy in {job.policy for job in jobs}:
            count = sum(job.policy == policy for job in jobs)
            most[policy] = max(count, most.get(policy, 0))
        states = await serving.store.task_states(Selector())
        return not jobs and set(states.values()) == {State.JOB_FINISHED}

    served = await serving.started()
    await serving.eventually(is_empty, within_s=60)
    await serving.stop(served)
    assert most["debug"] in (1, 2)
    assert most.get("small", 1) == 1
    jobs = await serving.jobs.recent(100)
    assert {job.state for job in jobs} == {JobState.FINISHED}, jobs
    assert sum(job.tasks or 0 for job in jobs) == 15
    assert all(job.started_at and job.ended_at and job.scheduler_id and job.why for job in jobs)
    notes = await serving.jobs.decisions(100)
    assert {note.batch_job_id for note in notes} >= {job.id for job in jobs}
    assert any("nothing is runnable" in note.reason for note in notes), notes


async def test_a_task_that_is_claimed_during_the_decision_is_not_counted_twice(
    serving: Serving, desk
):
    """As work that waits, and as time that its launcher is busy: that asked for a second batch job."""
    serving.write(ONE)
    await add(serving)
    lease = await desk.register(left_s=700.0)
    claimed = []

    class Racing(Jobs):
        async def backlog(self, *args, **options):
            return await claim(await super().backlog(*args, **options))

        async def capacity(self, *args, **options):
            return await claim(await super().capacity(*args, **options))

    async def claim(found):
        if not claimed:
            claimed.extend(await desk.claim(lease))
        return found

    picture = await Decider(
        serving.store, Racing(serving.store.pool), serving.site.settings
    ).decide()
    assert len(claimed) == 1
    assert [decision.submission for decision in picture.decisions] == [None], picture


async def test_a_new_task_is_submitted_for_long_before_the_next_look(serving: Serving):
    serving.write(ONE)
    text = (serving.path / "ensemble.toml").read_text().replace("period_s = 0.2", "period_s = 600")
    (serving.path / "ensemble.toml").write_text(text)
    served = await serving.started()
    await add(serving)
    await serving.reach("SUBMITTED", within_s=60)
    await serving.stop(served)


async def test_once_does_one_round_and_leaves(serving: Serving):
    serving.write(ONE)
    await add(serving)
    await serving.run_beside("serve", "--once")
    await serving.reach("SUBMITTED")
    await serving.run_beside("serve", "--once")
    await serving.reach("QUEUED")
    assert not (await serving.jobs.service()).is_running


async def test_a_dry_run_tells_all_and_changes_nothing(serving: Serving):
    serving.write(ONE + "[queue.off]\nenabled = false\n")
    await add(serving, 3)
    await serving.jobs.pause("debug", by="service", reason="\x1b[31mred\nalert")
    text = await serving.run_beside("serve", "--dry-run")
    assert "\x1b" not in text
    assert "paused by service" in text
    await serving.jobs.resume("debug")
    text = await serving.run_beside("serve", "--dry-run")
    assert "debug: submit for " in text
    assert "off: switched off" in text
    assert await serving.states() == []
    assert await serving.jobs.decisions(10) == []
    assert (await serving.jobs.service()).host is None
    assert serving.fake.count("looks") == 0


# ---------------------------------------------------------------------------- one, and how it leaves


async def test_a_second_service_says_who_runs(serving: Serving):
    serving.write(ONE)
    served = await serving.started()
    for flags in ((), ("--once",), ("--daemon",)):
        text = await serving.run_beside("serve", *flags, status=1)
        assert f"pid {served.process.pid}" in text
        assert text.count("\n") == 1
    await serving.stop(served)
    await serving.run_beside("serve", "--once")


async def test_the_daemon_logs_json_lines_and_is_stopped_by_a_command(serving: Serving):
    serving.write(ONE)
    await add(serving)
    assert "no service runs" in await serving.run_beside("serve", "--stop", status=3)
    text = await serving.run_beside("serve", "--daemon")
    pid = (await serving.jobs.service()).pid
    assert pid is not None
    try:
        assert f"pid {pid} " in text
        await serving.reach("QUEUED")
    finally:
        text = await serving.run_beside("serve", "--stop")
    assert f"pid {pid}, has stopped" in text
    await serving.eventually(lambda: proctree.read_stat(pid) is None)
    events = json_lines(serving.path / "log" / "serve.log")
    assert [line["event"] for line in events if line["event"].startswith("service.")] == [
        "service.started", "service.stopping", "service.stopped",
    ]  # fmt: skip
    assert any(line["event"] == "job.submitted" and line["queue"] == "debug" for line in events)


async def test_a_service_of_the_installed_command_is_stopped_too(serving: Serving):
    """Its command line has no word `ensemble`, only a path that ends so."""
    serving.write(ONE)
    python = os.path.realpath(serving.argv()[0])
    command = os.path.join(os.path.dirname(serving.argv()[0]), "ensemble")
    if not os.path.exists(command):
        pytest.skip(f"NOT TESTED: {command} is not installed beside {python}")
    serving.argv = lambda *words: [command, "--site", str(serving.path), *words]  # type: ignore[method-assign]
    served = await serving.started()
    assert "has stopped" in await serving.run_beside("serve", "--stop")
    assert await serving.leave(served) == 0


async def test_a_daemon_that_cannot_start_says_why_and_logs_it(serving: Serving):
    serving.write(ONE, kind="auto")
    for name in ("sbatch", "squeue", "scancel"):
        (serving.fake.folder / name).unlink()
    text = await asyncio.to_thread(
        lambda: serving.run("serve", "--daemon", status=2, PATH=str(serving.fake.folder))
    )
    assert 'kind = "local"' in text
    (serving.path / "log" / "serve.log").mkdir()
    try:
        text = await asyncio.to_thread(
            lambda: serving.run("serve", "--daemon", status=1, ENSEMBLE_SCHEDULER_KIND="local")
        )
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        assert "serve.log" in text
        assert "unexpected" not in text
    finally:
        (serving.path / "log" / "serve.log").rmdir()


@pytest.mark.parametrize(
    ("number", "mode", "state"),
    [
        (signal.SIGTERM, "slow", "SUBMITTED"),
        (signal.SIGINT, "hang", "NEW"),
        (signal.SIGHUP, "down", "REJECTED"),
    ],
)
async def test_a_signal_lets_it_end_what_it_does_and_begin_nothing_more(
    serving: Serving, number: int, mode: str, state: str
):
    serving.write(THREE + "max_minutes = 15\n", timeout_s=3)
    serving.fake.be(sbatch=mode)
    await add(serving, 9, wall_time_minutes=10)
    served = await serving.started()
    await rounds(serving, 1, of="calls")
    await serving.stop(served, number)
    jobs = await serving.jobs.recent(10)
    assert {str(job.state) for job in jobs} == {state}
    assert serving.fake.count("calls") == len(jobs), (
        "each submission has a row, and an end on record"
    )
    assert len(jobs) == 1 or mode == "down"
    assert all(job.reason for job in jobs) or mode == "slow"
    assert (await serving.jobs.service()).stopped_at is not None


async def test_a_signal_that_was_ignored_from_the_start_means_nothing(serving: Serving):
    """As `nohup` does, for a terminal that is closed."""
    serving.write(ONE)
    argv = serving.argv
    serving.argv = lambda *words: ["nohup", *argv(*words)]  # type: ignore[method-assign]
    served = await serving.started()
    served.process.send_signal(signal.SIGHUP)
    await add(serving)
    await serving.reach("QUEUED")
    assert "service.stopping" not in served.log
    await serving.stop(served)


async def test_a_signal_during_a_look_submits_nothing(serving: Serving):
    serving.write(ONE, timeout_s=2)
    await serving.submit(policy="other")
    serving.fake.be(squeue="hang")
    await add(serving)
    served = await serving.started()
    await rounds(serving, 1)
    await serving.stop(served)
    assert serving.fake.count("accepted") == 1


async def test_a_second_signal_does_not_wait_for_the_scheduler(serving: Serving):
    serving.write(ONE, timeout_s=50)
    serving.fake.be(sbatch="hang")
    await add(serving)
    served = await serving.started()
    await rounds(serving, 1, of="calls")
    served.process.send_signal(signal.SIGINT)
    await serving.says(served, "service.stopping")
    served.process.send_signal(signal.SIGINT)
    assert await serving.leave(served, within_s=30) == 0  # sbatch takes a minute
    (job,) = await serving.reach("NEW")
    assert job.reason == "its submission was interrupted"


# ---------------------------------------------------------------------------- killed in the middle


@pytest.mark.parametrize(
    ("mode", "states"), [("kill", ["QUEUED"]), ("kill-before", ["LOST", "QUEUED"])]
)
async def test_a_submission_that_was_cut_off_is_looked_up_before_another_is_made(
    serving, mode, states
):
    serving.write(ONE, timeout_s=2)
    serving.fake.be(sbatch=mode)
    await add(serving)
    killed = serving.serve()
    assert await serving.leave(killed) == -signal.SIGKILL
    serving.fake.be(sbatch="ok")
    await serving.reach("NEW")
    served = await serving.started()  # the lock is free at once
    await serving.reach(*states)
    assert len(serving.fake.live()) == 1
    await serving.stop(served)


async def test_sigkill_frees_the_lock_and_what_is_submitted_stays(serving: Serving):
    serving.write(ONE)
    await add(serving)
    served = await serving.started()
    await serving.reach("QUEUED")
    served.kill()
    again = await serving.started()
    await rounds(serving)
    await serving.reach("QUEUED")
    assert serving.fake.count("accepted") == 1
    await serving.stop(again)


async def test_one_that_was_given_up_and_comes_back_is_cancelled_and_the_limit_holds(
    serving: Serving,
):
    serving.write(ONE)
    await add(serving)
    served = await serving.started()
    await serving.reach("QUEUED")
    serving.fake.be(squeue="no-jobs")
    await serving.eventually(lambda: serving.fake.count("accepted") == 2)
    serving.fake.be(squeue="ok")
    await serving.eventually(lambda: len(serving.fake.live()) == 1)
    await rounds(serving)
    assert len(serving.fake.live()) == 1
    states = await serving.states()
    assert states.count("QUEUED") == 1
    assert set(states) == {"LOST", "QUEUED"}
    await serving.stop(served)


# ---------------------------------------------------------------------------- bad weather


async def test_nothing_is_given_up_while_the_scheduler_does_not_tell(serving: Serving):
    serving.write(THREE.replace("3", "2"))
    await add(serving, 50, wall_time_minutes=40)
    served = await serving.started()
    await serving.reach("QUEUED", "QUEUED")
    for weather in ("down", "nothing", "garbage", "half"):
        serving.fake.be(squeue=weather)
        await rounds(serving, 4)
        assert await serving.states() == ["QUEUED", "QUEUED"]
    assert serving.fake.count("accepted") == 2
    assert "scheduler.silent" in served.log
    serving.fake.be(squeue="ok")
    serving.fake.move("COMPLETED")
    await serving.eventually(lambda: serving.fake.count("accepted") > 2)
    await serving.stop(served)


async def test_submissions_that_fail_are_tried_later_each_time_until_they_work(serving: Serving):
    serving.write(THREE)
    serving.fake.be(sbatch="down")
    await add(serving)
    served = await serving.started()
    await serving.says(served, "failures=4", within_s=30)
    waits = [
        line.split("retry_s=")[1].split()[0]
        for line in served.log.splitlines()
        if "retry_s=" in line
    ]
    assert [float(wait) for wait in waits[:4]] == [0.2, 0.4, 0.8, 1.6]
    state = (await serving.jobs.queue_states())["debug"]
    assert (state.paused_by, state.kind) == (None, "submit")
    text = await serving.run_beside("queue")
    assert "waits after a failure" in text
    assert "Unable to contact slurm controller" in text
    assert set(await serving.states()) == {"REJECTED"}
    serving.fake.be(sbatch="ok")
    await serving.eventually(lambda: serving.fake.count("accepted") == 1)
    await serving.says(served, "job.submitted")
    await serving.eventually(lambda: not_failing(serving))
    await serving.stop(served)


async def not_failing(serving: Serving) -> bool:
    state = (await serving.jobs.queue_states())["debug"]
    return (state.failures, state.retry_at, state.reason) == (0, None, None)


async def test_a_scheduler_that_takes_and_says_it_did_not_gets_no_second_one(serving: Serving):
    serving.write(THREE.replace("3", "2"))
    serving.fake.be(sbatch="lost", squeue="down")
    await add(serving, 50, wall_time_minutes=40)
    served = await serving.started()
    await serving.eventually(lambda: serving.fake.count("accepted") == 2, within_s=30)
    await rounds(serving, 8)
    assert serving.fake.count("calls") == 2, "those in doubt count"
    serving.fake.be(squeue="ok", sbatch="ok")
    jobs = await serving.reach("QUEUED", "QUEUED")
    assert [job.scheduler_id for job in jobs] == ["101", "102"]
    await serving.stop(served)


async def test_a_refusal_for_good_pauses_the_queue_until_somebody_resumes_it(serving: Serving):
    serving.write(ONE)
    await serving.submit()  # something to look at
    serving.fake.be(sbatch="invalid")
    await add(serving, wall_time_minutes=40)
    served = await serving.started()
    assert "Invalid partition name specified" in await serving.paused("debug")
    await serving.says(served, "queue.paused")
    assert "\x1b" not in served.log
    serving.fake.be(sbatch="ok")
    await rounds(serving)
    assert serving.fake.count("calls") == 2
    text = await serving.run_beside("queue")
    assert "paused by service" in text
    assert "ensemble queue resume debug" in text
    assert "\x1b" not in text
    await serving.run_beside("queue", "resume", "debug")
    await serving.eventually(lambda: serving.fake.count("accepted") == 2)
    await serving.stop(served)


async def test_no_more_admitted_now_is_waited_for(serving: Serving):
    serving.write(ONE)
    serving.fake.be(sbatch="full")
    await add(serving)
    served = await serving.started()
    await rounds(serving, 3, of="calls")
    state = (await serving.jobs.queue_states())["debug"]
    assert (state.paused_by, state.kind) == (None, "capacity")
    waits = {
        line.split("retry_s=")[1].split()[0]
        for line in served.log.splitlines()
        if "retry_s=" in line
    }
    assert waits == {"0.3"}
    serving.fake.be(sbatch="ok")
    await serving.eventually(lambda: serving.fake.count("accepted") == 1)
    await serving.stop(served)


async def test_three_jobs_that_die_before_their_launcher_pause_the_queue_with_their_last_words(
    serving,
):
    serving.write(ONE, kind="local")
    serving.template.write_text(DYING.format(words=r"module: \033[31mnot found"))
    await add(serving)
    served = await serving.started()
    reason = await serving.paused("debug")
    assert "3 in a row" in reason
    assert "not found" in reason
    assert "before its launcher had registered" in reason
    await serving.stop(served)
    jobs = await serving.reach("FAILED", "FAILED", "FAILED")
    assert [job.exit_code for job in jobs] == [7, 7, 7]
    assert "not found" in (jobs[0].error or "")
    text = await serving.run_beside("queue")
    assert "\x1b" not in text
    assert "batch job 3 last printed" in text


async def test_three_launchers_that_fail_with_nothing_done_pause_the_queue_and_say_why(
    serving: Serving,
):
    serving.write("[queue.debug]\njob_mode = 'serial'\n", kind="local")
    settings = serving.path / "ensemble.toml"
    broken = f'launcher = "mpich"\ncommand = "{shutil.which("false")}"\n'
    settings.write_text(re.sub(r"command = .*\n", broken, settings.read_text()))
    await add(serving)
    served = await serving.started()
    reason = await serving.paused("debug")
    assert "3 in a row" in reason
    assert "no pilot joined" in reason
    await serving.stop(served)
    jobs = await serving.reach("FAILED", "FAILED", "FAILED")
    assert all(job.launcher_id is not None and job.tasks == 0 for job in jobs)
    text = await serving.run_beside("queue")
    assert text.count("no pilot joined") > 3
    assert "exit status 1" not in text


@pytest.mark.parametrize(
    ("state", "has_failed"), [("FAILED", True), ("TIMEOUT", False), ("CANCELLED", False)]
)
async def test_a_batch_job_that_time_or_a_user_ended_is_no_failure(
    serving: Serving, desk, state: str, has_failed: bool
):
    serving.write(ONE)
    await add(serving)
    served = await serving.started()
    [job] = await serving.reach("QUEUED")
    lease = await desk.register(
        job=job.scheduler_id, scheduler="slurm", batch_job_id=job.id, left_s=600.0
    )
    await lease.close("no pilot joined")
    record = {"exit_code": 1, "reason": "no pilot joined", "tasks": 0}
    await serving.jobs.set_record(job.id, lease.launcher_id, record)
    serving.fake.move(state)

    async def has_ended() -> bool:
        return (await serving.jobs.get(job.id)).state == state

    await serving.eventually(has_ended, within_s=30)
    await rounds(serving)
    await serving.stop(served)
    kinds = {found.kind for found in (await serving.jobs.queue_states()).values()}
    assert ("died early" in kinds) is has_failed, served.log


async def test_a_launcher_that_can_run_nothing_makes_its_queue_wait_longer_each_time(
    serving: Serving,
):
    serving.write("[queue.debug]\njob_mode = 'serial'\n", kind="local")
    await add(serving, gpus_per_rank=1)
    served = await serving.started()
    await serving.says(served, "failures=2", within_s=60)
    await serving.stop(served)
    assert "could run nothing: 1 tasks" in served.log
    jobs = await serving.jobs.recent(100)
    assert {job.state for job in jobs if not job.is_active} == {JobState.FINISHED}
    waits = [
        line.split("retry_s=")[1].split()[0]
        for line in served.log.splitlines()
        if "retry_s=" in line
    ]
    assert waits[:2] == ["0.2", "0.4"]


async def test_a_template_with_a_fault_pauses_its_queue_with_file_and_line(serving: Serving):
    serving.write(ONE)
    serving.template.write_text("#!/bin/sh\n{{ porject }}\nexec {{ launch }}\n")
    await add(serving)
    served = await serving.started()
    assert "job.sh:2: there is no variable 'porject'" in await serving.paused("debug")
    assert (await serving.states(), serving.fake.count("calls")) == ([], 0)
    await serving.stop(served)


async def test_a_template_that_cannot_be_read_is_tried_again_later(serving: Serving):
    serving.write(ONE)
    text = serving.template.read_bytes()
    serving.template.unlink()
    serving.template.symlink_to(serving.template)  # ELOOP stands for a file system in trouble
    await add(serving)
    served = await serving.started()
    await serving.says(served, "failures=2")
    assert f"cannot read {serving.template}" in served.log
    serving.template.unlink()
    serving.template.write_bytes(text)
    await serving.reach("QUEUED")
    await serving.stop(served)


async def test_a_script_that_cannot_be_written_is_tried_again_later(serving: Serving):
    serving.write(ONE)
    (serving.path / "qsubmit" / "qlaunch1.sh").mkdir()
    await add(serving)
    served = await serving.started()
    await serving.reach("REJECTED", "QUEUED")
    assert "cannot write the script of batch job 1" in served.log
    await serving.stop(served)


async def test_no_threads_to_be_had_do_not_end_it(serving: Serving, monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        if not thread.name.startswith("worker"):
            return start(thread)  # of asyncio, for each process: a service has uvloop
        refused.append(thread)
        raise RuntimeError("can't start new thread")

    start = threading.Thread.start
    refused: list[threading.Thread] = []
    monkeypatch.setenv("PATH", serving.fake.path)
    serving.write(ONE)
    await add(serving)
    lock = await ServiceLock.acquire(serving.site.address(), host="test", pid=1, period_s=1)
    service = Service(site=serving.site, store=serving.store, lock=lock)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4, "worker"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        filling = asyncio.create_task(service._fill())
        await serving.reach("QUEUED")
        serving.fake.move("FAILED")  # the end of its output is read in a thread
        await serving.reach("FAILED", "QUEUED")
        enough = len(refused) + 2
        await serving.eventually(lambda: len(refused) > enough or filling.done())
    serving.write("[queue.debug]\nmax_queued = 2\n")
    await serving.eventually(
        lambda: service._site.settings.queue["debug"].max_queued == 2 or filling.done()
    )
    service._leave()
    await filling
    await lock.release()


# ---------------------------------------------------------------------------- the database


@pytest.mark.parametrize("how", ["fast", "immediate"])
async def test_it_outlives_a_restart_of_the_database(serving: Serving, how: str):
    serving.write(ONE)
    await add(serving)
    served = await serving.started()
    await serving.reach("QUEUED")
    assert serving.cluster is not None
    await serving.cluster.stop(how)
    try:
        await serving.says(served, "store.lost")
    finally:
        await serving.cluster.start()
    await serving.says(served, "service.lock_regained", within_s=30)
    serving.fake.move("COMPLETED")
    await serving.reach("FINISHED", "QUEUED")
    assert served.process.poll() is None
    await serving.stop(served)


async def test_it_waits_for_a_database_that_listens_nowhere_near(serving: Serving):
    """Which is what it finds after `db start --takeover` on another host, without store.listen."""
    serving.write(ONE)
    served = await serving.started()
    assert serving.cluster is not None
    await serving.cluster.stop()
    layout = Layout.load(serving.cluster.folder)
    owner = layout.owner()
    assert owner is not None
    layout.set_owner(msgspec.structs.replace(owner, host="login9", boot_id="b9", addresses=[]))
    try:
        await serving.says(served, "listens only on login9 itself")
    finally:
        layout.set_owner(owner)
        await serving.cluster.start()
    await serving.says(served, "service.lock_regained", within_s=60)
    await add(serving)
    await serving.reach("QUEUED")
    await serving.stop(served)


async def test_one_whose_lock_was_taken_leaves_and_says_so(serving: Serving):
    serving.write(ONE)
    served = await serving.started()
    os.kill(served.process.pid, signal.SIGSTOP)  # as if the network were away
    assert await serving.store.pool.fetchval(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'ensemble service lock'"
    )
    await serving.eventually(lambda: takes(serving))
    other = await serving.started()
    await add(serving)
    os.kill(served.process.pid, signal.SIGCONT)
    assert await serving.leave(served, within_s=30) == 1
    assert f"pid {other.process.pid}" in served.log
    await serving.reach("QUEUED")
    assert "job.submitted" not in served.log
    await serving.stop(other)


async def takes(serving: Serving) -> bool:
    """Tell whether the lock is free."""
    try:
        lock = await ServiceLock.acquire(serving.site.address(), host="test", pid=1, period_s=1)
    except TakenError:
        return False
    await lock.release()
    return True


# ---------------------------------------------------------------------------- settings


async def test_settings_that_change_take_effect_and_a_broken_file_does_not(serving: Serving):
    serving.write("[queue.debug]\nenabled = false\n")
    await add(serving)
    served = await serving.started()
    await serving.eventually(lambda: has_noted(serving, "switched off"))
    serving.write("[queue.debug]\nmax_quued = 3\n")
    await serving.says(served, "settings.refused")
    assert "did you mean max_queued?" in served.log
    (serving.path / "ensemble.toml").unlink()
    await serving.says(served, "No such file")
    serving.write("[queue.debug]\nmax_nodes = 3\n[queue.other]\nwf_filter = 'nothing'\n")
    await serving.says(served, "settings.read")
    (job,) = await serving.reach("QUEUED")
    assert job.policy == "debug"
    serving.write(
        "[queue.debug]\nmax_nodes = 3\n[queue.other]\nwf_filter = 'nothing'\n", kind="local"
    )
    await serving.eventually(lambda: served.log.count("settings.read") == 2)
    await serving.run_beside("queue")  # long enough for some rounds
    assert served.log.count("settings.refused") == 2, "each fault is told once"
    assert await serving.states() == ["QUEUED"], "what another scheduler has, is left alone"
    await serving.stop(served)


async def has_noted(serving: Serving, words: str) -> bool:
    return any(words in note.reason for note in await serving.jobs.decisions(100))
