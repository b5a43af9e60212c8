"""`ensemble submit-launch` and `ensemble queue` with a real Slurm: what becomes of batch jobs, and what is told of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ensemble.core.batchjob import BatchJob, JobState
from ensemble.core.model import Outcome
from ensemble.core.states import State
from tests.integration.launching import WHEEL, sh
from tests.slurm.batch import FOUR_NODES, BatchSite, squeue

pytestmark = WHEEL

#: Runs until the file `go` is beside the tasks' directories; on its second attempt it does not wait.
WAITING = "test $ENSEMBLE_ATTEMPT -gt 1 || until test -e ../go; do sleep 0.1; done"


async def let_go(batches: BatchSite, task_id: int) -> None:
    ens = batches.ens
    (ens.workdir(await ens.task(task_id)).parent / "go").touch()


async def add(batches: BatchSite, script: str, count: int, **fields: object) -> list[int]:
    return await batches.store.add([sh(script, **fields) for _ in range(count)])


async def running(batches: BatchSite, job: BatchJob, *tasks: int) -> None:
    """Wait until a batch job's launcher runs tasks."""
    try:
        await batches.ens.reach(State.RUNNING, *tasks, within_s=40)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{batches.output(job.id)}") from None


def assert_in_order(job: BatchJob) -> None:
    times = [job.created_at, job.submitted_at, job.started_at, job.ended_at]
    assert None not in times
    # Slurm tells whole seconds.
    rounded = [int(time.timestamp()) for time in times if time is not None]
    assert rounded == sorted(rounded), times


@pytest.mark.parametrize("job_mode", ["mpi", "serial"])
async def test_a_batch_job_runs_tasks_on_its_nodes_and_all_is_on_record(
    batches: BatchSite, job_mode: str
) -> None:
    tasks = await add(batches, WAITING, 3)
    job = await batches.submit("-n", "3", "-t", "1:00:00", f"--job-mode={job_mode}")
    assert job.state is JobState.SUBMITTED
    assert (job.policy, job.why, job.num_nodes, job.wall_time_minutes) == (
        None, "submitted by hand", 3, 60,
    )  # fmt: skip
    assert job.scheduler_id is not None
    folder = batches.site.path / "qsubmit"
    fields = {
        "JobName": job.name,
        "Command": str(folder / f"qlaunch{job.id}.sh"),
        "StdOut": str(folder / f"qlaunch{job.id}.out"),
        "TimeLimit": "01:00:00",
        "Requeue": "0",
    }
    assert {name: batches.slurm.field(job.scheduler_id, name) for name in fields} == fields
    await running(batches, job, *tasks)
    seen = await batches.reach(job.id, JobState.RUNNING)
    assert seen.has_live_launcher
    assert seen.ends_at is not None
    assert seen.started_at is not None
    assert abs((seen.ends_at - seen.started_at).total_seconds() - 3600) < 10
    await let_go(batches, tasks[0])
    ended = await batches.reach(job.id, JobState.FINISHED)
    assert await batches.ens.states() == [State.JOB_FINISHED] * 3
    assert set((await batches.ens.nodes_of()).values()) == {"n0", "n1", "n2"}
    assert ended.record is not None
    assert ended.record["exit_code"] == 0
    assert (ended.tasks, ended.record["done"]) == (3, 3)
    assert ended.scheduler_id == job.scheduler_id
    assert_in_order(ended)
    assert "launcher.ended" in Path(ended.spec["output"]).read_text()
    shown = await batches.shown(job.id)
    assert shown["tasks"] == 3
    assert shown["output"] == ended.spec["output"]
    assert not shown["is_active"]
    assert " finished " in await batches.do("queue")


async def test_other_options_go_to_sbatch_and_win(batches: BatchSite) -> None:
    words = ["--hold", "--nice=7", "--comment", "a b; $(c)", "--no-kill=off", "-w", "n1"]
    job = await batches.submit("-n", "2", "-t", "5", "-p", "short", *words, "--", "--time=7")
    assert job.scheduler_id is not None
    fields = {
        "Partition": "short",
        "TimeLimit": "00:07:00",
        "JobName": job.name,
        "ReqNodeList": "n1",
    }
    assert {name: batches.slurm.field(job.scheduler_id, name) for name in fields} == fields
    told = batches.slurm.run("scontrol", "show", "job", job.scheduler_id)
    assert "Comment=a b; $(c)" in told
    seen = await batches.reach(job.id, JobState.QUEUED)
    assert seen.reason == "JobHeldUser"
    assert job.spec["flags"] == [*words, "--time=7"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-J", "mine"], "-J"),
        (["-Jmine"], "-J"),
        (["--job-name=mine"], "--job-name"),
        (["--job-na", "mine"], "--job-name"),
        (["-a", "1-3"], "-a"),
        (["--array=1-3"], "--array"),
        (["--wait"], "--wait"),
        (["-W"], "-W"),
        (["--test-only"], "--test-only"),
        (["-o", "elsewhere"], "-o"),
        (["--", "--output=elsewhere"], "--output"),
        (["--wrap=true"], "--wrap"),
    ],
)
async def test_what_would_take_a_batch_job_out_of_sight_is_refused(
    batches: BatchSite, words: list[str], named: str
) -> None:
    said = await batches.say("submit-launch", "-n", "1", "-t", "5", *words)
    assert said.code == 2, said
    (line,) = said.err.splitlines()
    assert f" {named}" in line
    assert await batches.jobs.recent(9) == []
    assert not batches.slurm.jobs()


async def test_what_waits_is_shown_with_slurm_s_reason_and_what_is_stuck_as_stuck(
    batches: BatchSite,
) -> None:
    batches.slurm.batch("sleep 600", *FOUR_NODES)
    behind = await batches.submit("-n", "4", "-t", "30")
    stuck = await batches.submit("-n", "1", "-t", "30", "-p", "short")
    seen = await batches.reach(behind.id, JobState.QUEUED, reason="Resources")
    assert (seen.started_at, seen.ends_at) == (None, None)
    seen = await batches.reach(stuck.id, JobState.QUEUED, reason="PartitionTimeLimit")
    assert seen.reason == "stuck: PartitionTimeLimit"
    assert "stuck: PartitionTimeLimit" in await batches.do("queue")


async def test_cancelled_jobs_end_cancelled_and_their_tasks_may_run_again(
    batches: BatchSite,
) -> None:
    tasks = await add(batches, WAITING, 2)
    ran = await batches.submit("-n", "2", "-t", "30", "--job-mode=serial")
    await running(batches, ran, *tasks)
    waits = await batches.submit("-n", "4", "-t", "30")
    assert ran.scheduler_id is not None
    assert waits.scheduler_id is not None
    batches.slurm.run("scancel", waits.scheduler_id)
    batches.slurm.run("scancel", ran.scheduler_id)
    assert (await batches.reach(waits.id, JobState.CANCELLED)).record is None
    ended = await batches.reach(ran.id, JobState.CANCELLED)
    await batches.gone()
    assert not ended.has_live_launcher
    assert await batches.ens.states() == [State.RESTART_READY] * 2
    for task in tasks:
        assert await batches.ens.runs(task) == [Outcome.TIMEOUT]


async def test_queue_cancel_ends_what_waits_and_what_runs(batches: BatchSite) -> None:
    tasks = await add(batches, WAITING, 2)
    ran = await batches.submit("-n", "2", "-t", "30")
    await running(batches, ran, *tasks)
    waits = await batches.submit("-n", "4", "-t", "30")
    said = await batches.do("queue", "cancel", "--reason=too wide", str(waits.id), str(ran.id))
    assert said.splitlines() == [
        f"batch job {job.id}: cancelled (slurm job {job.scheduler_id})" for job in (waits, ran)
    ]
    for job in (waits, ran):
        ended = await batches.reach(job.id, JobState.CANCELLED)
        assert ended.reason == "cancelled by the user: too wide"
    await batches.gone()
    assert await batches.ens.states() == [State.RESTART_READY] * 2
    again = await batches.do("queue", "cancel", str(ran.id))
    assert again == f"batch job {ran.id}: has ended already (CANCELLED)\n"


async def test_a_signal_to_the_script_drains_the_launcher(batches: BatchSite) -> None:
    tasks = await add(batches, WAITING, 2)
    job = await batches.submit("-n", "2", "-t", "30", "--job-mode=serial")
    await running(batches, job, *tasks)
    assert job.scheduler_id is not None
    batches.slurm.run("scancel", "--batch", "--signal=TERM", job.scheduler_id)
    ended = await batches.reach(job.id, JobState.FINISHED)
    assert ended.record is not None
    assert (ended.record["exit_code"], ended.record["reason"]) == (0, "received SIGTERM")
    assert ended.tasks == 2
    assert await batches.ens.states() == [State.RESTART_READY] * 2


async def test_an_early_warning_drains_the_launcher(batches: BatchSite) -> None:
    tasks = await add(batches, WAITING, 1)
    job = await batches.submit("-n", "1", "-t", "60", "--signal=B:USR1@100")
    await running(batches, job, *tasks)
    assert job.scheduler_id is not None
    batches.slurm.run("scontrol", "update", f"jobid={job.scheduler_id}", "timelimit=2")
    ended = await batches.reach(job.id, JobState.FINISHED, within_s=60)
    assert ended.record is not None
    assert (ended.record["exit_code"], ended.record["reason"]) == (0, "received SIGUSR1")
    assert await batches.ens.states() == [State.RESTART_READY]


async def test_a_launcher_drains_before_slurm_ends_the_job_and_the_next_one_goes_on(
    batches: BatchSite,
) -> None:
    tasks = await add(batches, WAITING, 4)
    first = await batches.submit("-n", "1", "-t", "1", "--job-mode=serial", "--slots-per-node=4")
    await running(batches, first, *tasks)
    ended = await batches.reach(first.id, JobState.FINISHED, within_s=90)
    assert ended.record is not None
    assert ended.record["reason"] == "the time of the allocation is over"
    assert await batches.ens.states() == [State.RESTART_READY] * 4
    second = await batches.submit("-n", "1", "-t", "1", "--job-mode=serial")
    await batches.reach(second.id, JobState.FINISHED)
    assert await batches.ens.states() == [State.JOB_FINISHED] * 4
    for task in tasks:
        assert await batches.ens.runs(task) == [Outcome.TIMEOUT, Outcome.DONE]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-p", "night"], "invalid partition specified: night"),
        (["--nonsense=1"], "unrecognized option '--nonsense=1'"),
        (["--mem=999G"], "Memory specification can not be satisfied"),
        (["--constraint=gpu"], "Invalid feature specification"),
    ],
)
async def test_what_slurm_refuses_is_told_in_its_words(
    batches: BatchSite, words: list[str], told: str
) -> None:
    said = await batches.say("submit-launch", "-n", "1", "-t", "5", *words)
    assert said.code == 1, said
    lines = [line for line in said.err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1
    assert told.lower() in lines[0].lower()
    (job,) = await batches.jobs.recent(9)
    assert job.state is JobState.REJECTED
    assert told.lower() in str(job.reason).lower()
    assert not batches.slurm.jobs()


async def test_a_user_s_requeue_starts_the_same_job_again(batches: BatchSite) -> None:
    tasks = await add(batches, WAITING, 2)
    job = await batches.submit("-n", "2", "-t", "30", "--job-mode=serial", "--requeue")
    await running(batches, job, *tasks)
    assert job.scheduler_id is not None
    batches.slurm.run("scontrol", "requeue", job.scheduler_id)
    await batches.gone()

    async def waits() -> bool:
        between = await batches.reach(job.id, JobState.QUEUED, JobState.RUNNING)
        assert between.scheduler_id == job.scheduler_id
        return between.reason == "BeginTime"  # Slurm lets a requeued job wait for two minutes

    await batches.ens.eventually(waits)
    batches.slurm.wait_until_idle()  # where its first run still ends, the second one would fail at once
    batches.slurm.run("scontrol", "update", f"jobid={job.scheduler_id}", "starttime=now")
    ended = await batches.reach(job.id, JobState.FINISHED)
    assert ended.tasks == 2
    assert await batches.ens.states() == [State.JOB_FINISHED] * 2
    for task in tasks:
        assert await batches.ens.runs(task) == [Outcome.TIMEOUT, Outcome.DONE]
    rows = await batches.store.pool.fetch(
        "SELECT restart_count FROM launcher WHERE batch_job_id = $1 ORDER BY id", job.id
    )
    assert [row["restart_count"] for row in rows] == [0, 1]


async def test_without_being_asked_a_job_is_not_requeued(batches: BatchSite) -> None:
    tasks = await add(batches, WAITING, 1)
    job = await batches.submit("-n", "1", "-t", "30")
    await running(batches, job, *tasks)
    assert job.scheduler_id is not None
    with pytest.raises(AssertionError, match="disabled"):
        batches.slurm.run("scontrol", "requeue", job.scheduler_id)


async def test_a_launcher_whose_row_was_given_up_leaves_at_once(batches: BatchSite) -> None:
    tasks = await add(batches, "true", 2)
    job = await batches.submit("-n", "1", "-t", "30", "--hold")
    assert job.scheduler_id is not None
    await batches.store.pool.execute(
        "UPDATE batch_job SET state = 'LOST', reason = 'test', ended_at = now() WHERE id = $1",
        job.id,
    )
    batches.slurm.run("scontrol", "release", job.scheduler_id)
    assert batches.slurm.wait(job.scheduler_id) == "FAILED"
    assert f"batch job {job.id} was given up (LOST: test)" in batches.output(job.id)
    assert "Traceback" not in batches.output(job.id)
    assert await batches.ens.outcomes(tasks[0]) == []
    assert (await batches.job(job.id)).state is JobState.LOST


async def test_a_given_up_job_that_still_waits_is_cancelled(batches: BatchSite) -> None:
    job = await batches.submit("-n", "1", "-t", "30", "--hold")
    assert job.scheduler_id is not None
    await batches.store.pool.execute(
        "UPDATE batch_job SET state = 'LOST', reason = 'test', ended_at = now() WHERE id = $1",
        job.id,
    )
    await batches.queue()
    assert batches.slurm.wait(job.scheduler_id) == "CANCELLED"
    assert (await batches.job(job.id)).state is JobState.LOST


async def test_an_sbatch_that_hangs_after_it_was_heard_is_looked_up_by_name(
    batches: BatchSite,
) -> None:
    batches.configure(timeout_s=5)
    tasks = await add(batches, "true", 2)
    batches.put_before("sbatch", '"$REAL" "$@" > /dev/null; exec sleep 60')
    said = await batches.say("submit-launch", "-n", "1", "-t", "5")
    assert said.code == 1
    assert "sbatch did not end" in said.err
    (job,) = await batches.jobs.recent(9)
    assert (job.state, job.scheduler_id is None) in [
        (JobState.NEW, True), (JobState.RUNNING, False),
    ]  # fmt: skip
    ended = await batches.reach(job.id, JobState.FINISHED)
    assert [ended.scheduler_id] == [
        id for id, (_, name) in squeue(batches.slurm).items() if name == job.name
    ]
    assert await batches.ens.states() == [State.JOB_FINISHED] * len(tasks)


async def test_without_a_controller_nothing_is_given_up_or_submitted(batches: BatchSite) -> None:
    tasks = await add(batches, WAITING, 2)
    job = await batches.submit("-n", "2", "-t", "30")
    await running(batches, job, *tasks)
    with batches.slurm.without_controller():
        async with asyncio.TaskGroup() as group:  # each of them needs nine seconds to see it
            submitting = group.create_task(batches.say("submit-launch", "-n", "1", "-t", "5"))
            looking = group.create_task(batches.say("queue"))
        refused, shown = submitting.result(), looking.result()
        assert refused.code == 1
        assert "Unable to contact slurm controller" in refused.err
        assert shown.code == 0
        assert "out of date" in shown.err
        assert (await batches.job(job.id)).state is JobState.RUNNING
        await let_go(batches, tasks[0])
        await batches.ens.reach(State.JOB_FINISHED, *tasks)
    (rejected,) = await batches.jobs.recent(1)
    assert rejected.state is JobState.REJECTED
    assert (await batches.reach(job.id, JobState.FINISHED)).tasks == 2
    assert not batches.slurm.jobs()


async def test_a_job_that_outlives_its_first_node_is_cancelled(batches: BatchSite) -> None:
    # With --no-kill, as the template has it, Slurm keeps it running, with neither script nor launcher in it.
    tasks = await add(batches, WAITING, 2)
    job = await batches.submit("-n", "2", "-t", "30", "-w", "n0,n1")
    await running(batches, job, *tasks)
    assert job.scheduler_id is not None
    with batches.slurm.without("n0"):
        batches.slurm.declare_down("n0")
        assert batches.slurm.state(job.scheduler_id) == "RUNNING"
        ended = await batches.reach(job.id, JobState.CANCELLED, is_served=True)
        assert ended.reason == "its launcher was lost: its node, most likely"
    await batches.gone()
    assert await batches.ens.states() == [State.RESTART_READY] * 2
