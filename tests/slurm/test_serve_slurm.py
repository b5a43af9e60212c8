"""`ensemble serve` with a real Slurm: it keeps the queue filled, whatever happens to it and to Slurm."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from ensemble.core.batchjob import ACTIVE, JobState
from ensemble.core.model import NewTask, Outcome
from ensemble.core.states import State
from tests.integration.launching import WHEEL, sh
from tests.slurm.batch import BatchSite, squeue
from tests.slurm.cluster import DAEMONS_CONF

pytestmark = WHEEL

#: One batch job of two nodes at a time.
ONE = """
[queue.debug]
max_queued = 1
max_nodes = 2
max_minutes = 30
"""
#: Runs until the file `go` is beside the tasks' directories; on its second attempt it does not wait.
WAITING = "test $ENSEMBLE_ATTEMPT -gt 1 || until test -e ../go; do sleep 0.1; done"
#: A job of ours in one of these takes a place in Slurm.
THERE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED"}


async def let_go(batches: BatchSite, task_id: int) -> None:
    ens = batches.ens
    (ens.workdir(await ens.task(task_id)).parent / "go").touch()


async def reach(batches: BatchSite, state: State, *tasks: int, within_s: float = 40) -> None:
    try:
        await batches.ens.reach(state, *tasks, within_s=within_s)
    except AssertionError as error:
        jobs = [
            f"{job.id} {job.state} {job.reason}\n{batches.output(job.id)}"
            for job in await batches.jobs.recent(9)
        ]
        said = [
            f"task {task.id} {task.state}: {batches.ens.output(task)}"
            for task in await batches.ens.tasks()
            if task.state is not state
        ]
        left = [f"{pid} {line}" for pid, line in batches.ens.left().items()]
        raise AssertionError("\n".join([str(error), batches.served, *jobs, *said, *left])) from None


async def known(batches: BatchSite) -> list[str]:
    """Return the names of all batch jobs of this test that Slurm has or had."""
    token = await batches.store.pool.fetchval("SELECT token FROM service")
    names = [name for _, name in squeue(batches.slurm).values()]
    return sorted(name for name in names if f"-{token}-" in name)


async def test_it_submits_for_what_is_added_and_stops_when_nothing_is_left(
    batches: BatchSite,
) -> None:
    batches.configure(ONE)
    service = await batches.serving()
    tasks = await batches.store.add([sh("true") for _ in range(3)])
    await reach(batches, State.JOB_FINISHED)
    (job,) = await batches.finished()
    assert (job.state, job.policy, job.tasks) == (JobState.FINISHED, "debug", len(tasks))
    assert "3 tasks" in job.why
    told = await batches.queue()
    assert told["queues"][0]["next"] == "nothing is runnable"
    assert told["service"]["is_running"]
    assert any(note["batch_job_id"] == job.id for note in told["decisions"])
    await batches.stop(service)
    assert await known(batches) == [job.name]


async def test_slurmctld_may_be_away_for_many_looks(batches: BatchSite) -> None:
    # In serial mode: once the pilots are there, nobody needs slurmctld to start or to end a task.
    batches.configure(ONE + 'job_mode = "serial"\n')
    tasks = await batches.store.add([sh(WAITING, wall_time_minutes=20) for _ in range(2)])
    service = await batches.serving()
    await reach(batches, State.RUNNING)
    (before,) = await batches.jobs.active()
    with batches.slurm.without_controller():
        # squeue needs nine seconds to give up: longer than lost_s.
        await batches.logged("scheduler.silent", count=2, within_s=40)
        (now,) = await batches.jobs.active()
        assert (now.id, now.state, now.missing) == (before.id, JobState.RUNNING, 0)
        await let_go(batches, tasks[0])
        tasks += await batches.store.add([sh("true") for _ in range(3)])
        await reach(batches, State.JOB_FINISHED)
    jobs = await batches.finished()
    first = jobs[0]
    assert (first.id, first.state, first.tasks) == (before.id, JobState.FINISHED, 5)
    assert {job.state for job in jobs[1:]} <= {JobState.REJECTED, JobState.FINISHED}
    assert [len(await batches.ens.outcomes(task)) for task in tasks] == [1] * 5
    await batches.stop(service)
    assert await known(batches) == sorted(job.name for job in jobs if job.scheduler_id)


async def test_an_unknown_partition_pauses_the_queue_until_it_is_corrected(
    batches: BatchSite,
) -> None:
    batches.configure(ONE.replace("[queue.debug]", "[queue.debug]\nqueue = 'night'"))
    await batches.store.add([sh("true")])
    service = await batches.serving()
    await batches.logged("queue.paused")
    told = await batches.queue()
    assert "invalid partition specified: night" in told["queues"][0]["next"]
    assert "ensemble queue resume debug" in told["queues"][0]["next"]
    (refused,) = told["batch_jobs"]
    assert refused["state"] == "REJECTED"
    assert await known(batches) == []
    await batches.stop(service)
    batches.configure(ONE)
    service = await batches.serving()
    await batches.eventually(lambda: batches.served.count("service.started") == 2)
    assert len(await batches.jobs.recent(9)) == 1  # still paused
    assert await batches.do("queue", "resume", "debug") == "debug: resumed\n"
    await reach(batches, State.JOB_FINISHED)
    await batches.finished()
    await batches.stop(service)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('flags = ["--nonsense"]', "unrecognized option '--nonsense'"),
        ('flags = ["-J", "mine"]', "-J cannot be passed to slurm"),
        ("queue = 'short'", "Requested time limit is invalid"),
    ],
)
async def test_what_can_never_be_submitted_pauses_the_queue(
    batches: BatchSite, line: str, told: str
) -> None:
    batches.configure(ONE.replace("max_queued = 1", f"max_queued = 1\nmin_minutes = 30\n{line}"))
    await batches.store.add([sh("true")])
    with limits_are_enforced(batches):
        service = await batches.serving()
        await batches.logged("queue.paused")
    assert told in (await batches.queue())["queues"][0]["next"]
    assert await batches.jobs.active() == []
    assert {job.state for job in await batches.jobs.recent(9)} <= {JobState.REJECTED}
    await batches.stop(service)
    assert await known(batches) == []


@contextlib.contextmanager
def limits_are_enforced(batches: BatchSite):
    """Let Slurm refuse at once what its partitions do not allow, as most centres do."""
    file = batches.slurm.path / DAEMONS_CONF
    before = file.read_text()
    file.write_text(before + "EnforcePartLimits=ALL\n")
    batches.slurm.run("scontrol", "reconfigure")
    try:
        yield
    finally:
        file.write_text(before)
        batches.slurm.run("scontrol", "reconfigure")


async def test_a_service_killed_between_sbatch_and_the_record_submits_nothing_twice(
    batches: BatchSite,
) -> None:
    batches.configure(ONE)
    marks = batches.slurm.path / "killed"
    batches.put_before(
        "sbatch",
        f'answer=$("$REAL" "$@"); status=$?\n'
        f"test -e {marks} || {{ touch {marks}; kill -KILL $PPID; }}\n"
        "echo $answer; exit $status",
    )
    # It stays in the queue: the next service must find it there.
    other = batches.slurm.batch("sleep 600", "-N4", "--exclusive")
    await batches.eventually(lambda: batches.slurm.state(other) == "RUNNING")
    await batches.store.add([sh("true") for _ in range(3)])
    first = batches.serve()
    assert await asyncio.to_thread(first.wait, 30) == -signal.SIGKILL
    (doubtful,) = await batches.jobs.active()
    assert (doubtful.state, doubtful.scheduler_id) == (JobState.NEW, None)
    second = await batches.serving()
    await batches.eventually(lambda: is_known(batches, doubtful.id))
    batches.slurm.run("scancel", other)
    await reach(batches, State.JOB_FINISHED)
    (job,) = await batches.finished()
    assert (job.id, job.state, job.tasks) == (doubtful.id, JobState.FINISHED, 3)
    await batches.stop(second)
    assert await known(batches) == [job.name]
    marks.unlink()


async def is_known(batches: BatchSite, job_id: int) -> bool:
    return (await batches.job(job_id)).scheduler_id is not None


async def test_an_sbatch_that_hangs_after_it_was_heard_submits_nothing_twice(
    batches: BatchSite,
) -> None:
    batches.configure(ONE, timeout_s=4)
    batches.put_before("sbatch", '"$REAL" "$@" > /dev/null; exec sleep 60')
    await batches.store.add([sh("true") for _ in range(3)])
    service = await batches.serving()
    await batches.logged("sbatch did not end")
    batches.take_away("sbatch")
    await reach(batches, State.JOB_FINISHED)
    (job,) = await batches.finished()
    assert (job.state, job.tasks) == (JobState.FINISHED, 3)
    await batches.stop(service)
    assert await known(batches) == [job.name]


async def test_a_lost_first_node_loses_the_job_and_the_service_submits_again(
    batches: BatchSite,
) -> None:
    batches.configure(ONE + 'flags = ["--no-kill=off"]\n')
    tasks = await batches.store.add([sh(WAITING, num_nodes=2)])
    service = await batches.serving()
    await reach(batches, State.RUNNING)
    (job,) = await batches.jobs.active()
    assert job.scheduler_id is not None
    head = batches.slurm.field(job.scheduler_id, "BatchHost")
    with batches.slurm.without(head):
        batches.slurm.declare_down(head)
        await reach(batches, State.JOB_FINISHED, within_s=60)
        first, *_, last = await batches.finished()
    assert (first.id, first.state, first.reason) == (
        job.id,
        JobState.LOST,
        "a node failed / NodeDown",
    )
    assert (last.state, last.tasks) == (JobState.FINISHED, 1)
    assert await batches.ens.outcomes(tasks[0]) == [Outcome.LOST, Outcome.DONE]
    await batches.stop(service)


async def test_a_given_up_job_is_cancelled_and_another_takes_its_place(batches: BatchSite) -> None:
    batches.configure(ONE)
    other = batches.slurm.batch("sleep 600", "-N4", "--exclusive")
    await batches.store.add([sh("true")])
    service = await batches.serving()
    await batches.eventually(lambda: is_submitted(batches))
    (given_up,) = await batches.jobs.active()
    await batches.store.pool.execute(
        "UPDATE batch_job SET state = 'LOST', reason = 'test', ended_at = now() WHERE id = $1",
        given_up.id,
    )
    assert given_up.scheduler_id is not None
    assert batches.slurm.wait(given_up.scheduler_id) == "CANCELLED"
    batches.slurm.run("scancel", other)
    await reach(batches, State.JOB_FINISHED)
    first, second = await batches.finished()
    assert (first.state, second.state) == (JobState.LOST, JobState.FINISHED)
    await batches.stop(service)


async def is_submitted(batches: BatchSite) -> bool:
    return any(job.scheduler_id for job in await batches.jobs.active())


# ---------------------------------------------------------------------- everything at once

TWO = """
[mpi]
launcher = "srun"

[queue.wide]
queue = "debug"
job_mode = "mpi"
wf_filter = "wide"
max_queued = 2
max_nodes = 4
max_minutes = 30

[queue.small]
queue = "short"
job_mode = "serial"
wf_filter = "small"
max_queued = 3
max_nodes = 2
max_minutes = 10
"""
LIMITS = {"wide": 2, "small": 3}


def mixed(chance: random.Random) -> list[NewTask]:
    """Return 200 tasks: wide ones, packed ones, some that fail."""
    wide = [
        sh(
            chance.choice(["true", "sleep 0.1", "sleep 0.5", "exit 3"]),
            num_nodes=chance.choice([1, 1, 2, 3, 4]),
            workflow="a wide one",
        )
        for _ in range(44)
    ]
    small = [
        sh(
            chance.choice(["true", "sleep 0.2", "sleep 1", "exit 3"]),
            node_packing_count=chance.choice([1, 2, 4]),
            workflow="many small",
        )
        for _ in range(140)
    ]
    return wide + small


async def chain(batches: BatchSite, length: int, workflow: str) -> list[int]:
    """Add tasks of which each waits for the one before."""
    ids: list[int] = []
    for _ in range(length):
        parents = ids[-1:]
        ids += await batches.store.add([sh("sleep 0.1", workflow=workflow, parents=parents)])
    return ids


class Watch:
    """Looks, several times a second, whether any limit is exceeded."""

    def __init__(self, batches: BatchSite) -> None:
        self.batches = batches
        self.samples = 0
        self.most: Counter[str] = Counter()
        self.excesses: list[str] = []

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(0.2)

    async def look(self) -> None:
        # Rows first made are not yet in Slurm, and rows are ended after Slurm has ended the job: never the other way.
        there = set()
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            there = {
                name
                for state, name in (await asyncio.to_thread(squeue, self.batches.slurm)).values()
                if state in THERE
            }
        rows = await self.batches.jobs.recent(10_000)
        self.samples += 1
        for name, limit in LIMITS.items():
            mine = [job for job in rows if job.policy == name]
            counts = {
                "rows": sum(job.state in ACTIVE for job in mine),
                "Slurm": sum(job.name in there for job in mine),
            }
            for what, count in counts.items():
                self.most[f"{what} {name}"] = max(self.most[f"{what} {name}"], count)
                if count > limit:
                    self.excesses.append(f"{count} {what} of {name}")


@contextlib.asynccontextmanager
async def watched(batches: BatchSite) -> AsyncIterator[Watch]:
    watch = Watch(batches)
    async with asyncio.TaskGroup() as group:
        loop = group.create_task(watch.run())
        try:
            yield watch
        finally:
            loop.cancel()


async def kill_service(batches: BatchSite) -> None:
    found = await batches.jobs.service()
    assert found.pid is not None
    os.kill(found.pid, signal.SIGKILL)


async def disturb(batches: BatchSite, chance: random.Random) -> None:
    """Let everything go wrong, one after the other."""
    await until_some_run(batches)
    await kill_service(batches)
    await cancel_one(batches, chance)
    await batches.do("serve", "--daemon")
    await until_some_run(batches)
    with batches.slurm.without_controller():
        await batches.logged("scheduler.silent")
        await kill_service(batches)
        await batches.do("serve", "--daemon")
    await until_some_run(batches)
    await cancel_one(batches, chance)


async def until_some_run(batches: BatchSite) -> None:
    """Wait until a launcher runs, or all is done."""

    async def some() -> bool:
        jobs = await batches.jobs.active()
        return any(job.has_live_launcher for job in jobs) or await are_ended(batches)

    try:
        # A job that ends while slurmctld is away keeps its nodes for up to a minute.
        await batches.eventually(some, within_s=100)
    except AssertionError:
        raise AssertionError(batches.served) from None


async def are_ended(batches: BatchSite) -> bool:
    return set(await batches.ens.states()) <= {State.JOB_FINISHED, State.FAILED}


async def cancel_one(batches: BatchSite, chance: random.Random) -> None:
    ids = [id for id, (state, name) in squeue(batches.slurm).items() if state in THERE]
    if ids:
        batches.slurm.run("scancel", chance.choice(sorted(ids)))


@pytest.mark.timeout(240)
async def test_two_queues_while_everything_goes_wrong(batches: BatchSite) -> None:
    chance = random.Random(5)
    batches.configure(TWO, idle_timeout_s=1)
    tasks = await batches.store.add(mixed(chance))
    tasks += await chain(batches, 8, "a wide one")
    tasks += await chain(batches, 8, "many small")
    async with watched(batches) as watch:
        assert "the service runs" in await batches.do("serve", "--daemon")
        await disturb(batches, chance)
        await end(batches, within_s=90)
        jobs = await batches.finished()
        assert "has stopped" in await batches.do("serve", "--stop")
    assert watch.excesses == []
    assert watch.samples > 50
    assert watch.most["Slurm wide"] >= 1
    assert watch.most["Slurm small"] >= 1
    states = Counter(await batches.ens.states())
    assert set(states) == {State.JOB_FINISHED, State.FAILED}, states
    assert sum(states.values()) == 200
    for task in tasks:
        assert (await batches.ens.outcomes(task)).count(Outcome.DONE) <= 1
    assert not [name for state, name in squeue(batches.slurm).values() if state in THERE]
    assert {job.state for job in jobs} <= {
        JobState.FINISHED, JobState.CANCELLED, JobState.FAILED, JobState.REJECTED,
    }  # fmt: skip
    assert await batches.store.check() == []


async def end(batches: BatchSite, *, within_s: float) -> None:
    """Wait until all tasks have ended."""
    try:
        await batches.eventually(lambda: are_ended(batches), within_s=within_s)
    except AssertionError:
        counts = Counter(await batches.ens.states())
        jobs = [f"{job.id} {job}" for job in await batches.jobs.active()]
        jobs += [batches.output(job.id) for job in await batches.jobs.active()]
        left = [f"{pid} {line}" for pid, line in batches.ens.left().items()]
        raise AssertionError("\n".join([str(counts), batches.served, *jobs, *left])) from None
