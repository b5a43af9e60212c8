"""Batch jobs in the store: limits, who may take one, what a look may write, and who holds the service's lock."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import replace

import asyncpg
import pytest

from ensemble.core.batchjob import ACTIVE, OVER, JobState, NewBatchJob, Observation
from ensemble.core.jobs import Jobs, ServiceLock
from ensemble.core.leases import Reaping
from ensemble.core.model import JobMode
from ensemble.core.store import Store
from ensemble.errors import AllocationError, NotFoundError, StoreUnavailableError, TakenError
from ensemble.site import TASK, USER
from tests.integration.storing import Desk

NEW = NewBatchJob(
    scheduler="slurm",
    num_nodes=2,
    wall_time_minutes=60,
    job_mode=JobMode.SERIAL,
    wf_filter="x",
    project="chem",
    queue="long",
    policy="p",
    why="12 tasks",
    flags=("--qos=a b", "-v"),
    slots_per_node=4,
)
BY_HAND = replace(NEW, policy=None)


@pytest.fixture
def jobs(desk):
    return Jobs(desk.store.pool)


async def opened(jobs, **more):
    job = await jobs.open(replace(NEW, **more), site="s")
    assert job is not None
    return job


async def put(desk, job, state, scheduler_id=None):
    """Bring a batch job into a state, as if it had got there."""
    await desk.sql(
        "UPDATE batch_job SET state = $2, scheduler_id = $3, reason = 'so it is' WHERE id = $1",
        job.id,
        state,
        scheduler_id,
    )


async def take(desk, job, scheduler_id, **more):
    """Register a launcher as the batch job's script would."""
    values = {"scheduler": "slurm", "nodes": ("n1",), **more}
    return await desk.register(job=scheduler_id, batch_job_id=job.id, **values)


async def is_one_waiting(desk):
    """Asked in a session without a transaction: inside one, the view does not change."""
    return await desk.sql(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )


# ---------------------------------------------------------------------------- opening


async def test_a_batch_job_is_on_record_as_it_was_asked_for(jobs):
    job = await opened(jobs)
    assert replace(await jobs.get(job.id), age_s=job.age_s) == job
    assert (job.state, job.scheduler_id, job.is_active) == (JobState.NEW, None, True)
    asked = {
        name: getattr(job, name) for name in ("project", "queue", "policy", "why", "wf_filter")
    }
    assert asked == {name: getattr(NEW, name) for name in asked}
    assert (job.scheduler, job.num_nodes, job.wall_time_minutes) == ("slurm", 2, 60)
    assert job.job_mode is JobMode.SERIAL
    assert job.spec == {"flags": ["--qos=a b", "-v"], "slots_per_node": 4}
    assert (job.launcher_id, job.has_live_launcher, job.missing_s) == (None, False, None)
    with pytest.raises(NotFoundError, match="no batch job 999"):
        await jobs.get(999)


async def test_names_are_unique_and_carry_site_and_token(jobs, desk):
    token = await desk.sql("SELECT token FROM service")
    assert re.fullmatch(r"[0-9a-f]{6}", token)
    names = {(await jobs.open(BY_HAND, site=site)).name for site in ("a", "b", "a")}
    assert names == {f"ens-a-{token}-1", f"ens-b-{token}-2", f"ens-a-{token}-3"}


async def test_many_at_once_never_exceed_a_limit(jobs):
    limits = {"p": 3, "q": 5, "r": 1, "none": 0, "free": None}
    async with asyncio.TaskGroup() as group:
        runs = [
            group.create_task(jobs.open(replace(NEW, policy=policy), site="s", limit=limit))
            for _ in range(8)
            for policy, limit in limits.items()
        ]
        runs += [group.create_task(jobs.open(BY_HAND, site="s")) for _ in range(8)]
    found = Counter(run.result().policy for run in runs if run.result() is not None)
    assert found == {"p": 3, "q": 5, "r": 1, "free": 8, None: 8}
    assert Counter(job.policy for job in await jobs.active()) == found
    assert [job.id for job in await jobs.active()] == sorted(
        (run.result().id for run in runs if run.result()), reverse=True
    )


@pytest.mark.parametrize("state", list(JobState))
async def test_what_is_not_over_counts_against_the_limit(jobs, desk, state):
    await put(desk, await opened(jobs), state)
    again = await jobs.open(NEW, site="s", limit=1)
    assert (again is None) == (state in ACTIVE)
    assert [job.state for job in await jobs.active()] == [
        state if state in ACTIVE else JobState.NEW
    ]
    assert len(await jobs.recent(10)) == (1 if state in ACTIVE else 2)
    assert len(await jobs.recent(1)) == 1


async def test_another_services_epoch_opens_nothing(jobs, site):
    first = await lock(site)
    assert await jobs.open(NEW, site="s", epoch=first.epoch) is not None
    await first.release()
    second = await lock(site)
    assert second.epoch == first.epoch + 1
    for stale in (first.epoch, second.epoch + 1, 0):
        assert await jobs.open(NEW, site="s", epoch=stale) is None
    assert await jobs.open(NEW, site="s", epoch=second.epoch) is not None
    assert await jobs.open(NEW, site="s") is not None  # a user has none
    await second.release()


async def test_who_takes_over_sees_all_that_the_one_before_has_opened(
    jobs, site, psql, desk, eventually
):
    before = await lock(site)
    before.drop()  # it hangs in the middle of a submission, and its lock is lost
    transaction = psql.transaction()
    await transaction.start()
    late = await psql.fetchval(
        "SELECT open_batch_job('s', 'slurm', 1, 1, 'mpi', NULL, NULL, NULL, 'p', '', '{}', 9, $1)",
        before.epoch,
    )
    async with asyncio.TaskGroup() as group:
        taking = group.create_task(lock(site))
        await eventually(lambda: is_one_waiting(desk))
        assert not taking.done()
        await transaction.commit()
    assert [job.id for job in await jobs.active()] == [late]
    assert await jobs.open(NEW, site="s", epoch=before.epoch) is None
    await taking.result().release()


# ---------------------------------------------------------------------------- taking


@pytest.mark.parametrize("state", list(JobState))
async def test_only_what_was_not_given_up_is_taken(jobs, desk, state):
    job = await opened(jobs)
    await put(desk, job, state, "12")
    if state not in ACTIVE:
        with pytest.raises(AllocationError, match=rf"given up \({state}: so it is\)"):
            await take(desk, job, "12")
        assert (await jobs.get(job.id)).state is state
        assert await desk.store.launchers(only_live=False) == []
        return
    await desk.sql("UPDATE batch_job SET missing = 2, first_missing_at = now(), record = '{}'")
    lease = await take(desk, job, "12", left_s=600)
    taken = await jobs.get(job.id)
    assert (taken.state, taken.scheduler_id) == (JobState.RUNNING, "12")
    assert (taken.launcher_id, taken.has_live_launcher) == (lease.launcher_id, True)
    assert (taken.missing, taken.missing_s, taken.record, taken.reason) == (0, None, None, None)
    assert taken.started_at is not None
    assert taken.submitted_at is not None
    assert 590 < (taken.ends_at - taken.started_at).total_seconds() < 610
    await lease.close("done")
    assert not (await jobs.get(job.id)).has_live_launcher


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("12", "12"),
        ("12;cluster", "12"),
        ("12", "12;cluster"),
        ("12.server", "12.server.site.org"),
        ("12.server.site.org", "12"),
        ("ƒ2abCD", "f2abCD"),
        (None, "12"),
        (None, "12.server"),
    ],
)
async def test_spellings_of_one_id_are_one_job(jobs, desk, ours, theirs):
    job = await opened(jobs)
    await put(desk, job, "NEW" if ours is None else "QUEUED", ours)
    await take(desk, job, theirs)
    assert (await jobs.get(job.id)).scheduler_id == (ours or theirs)


@pytest.mark.parametrize(
    ("state", "ours", "theirs", "scheduler"),
    [
        ("NEW", "12", "13", "slurm"),
        ("SUBMITTED", "12", "13", "slurm"),
        ("RUNNING", "12", "13.server", "slurm"),
        ("RUNNING", "12", "123", "slurm"),
        ("QUEUED", "12", "12", "pbs"),
        ("NEW", None, "12", "pbs"),
        ("NEW", None, None, "local"),
        ("NEW", None, None, "slurm"),
        ("QUEUED", "12", None, "local"),
    ],
)
async def test_another_submission_of_the_row_is_refused(jobs, desk, state, ours, theirs, scheduler):
    job = await opened(jobs)
    await put(desk, job, state, ours)
    with pytest.raises(AllocationError, match=f"batch job {job.id} is slurm job") as caught:
        await take(desk, job, theirs, scheduler=scheduler)
    assert f"{scheduler} job {theirs}" in str(caught.value) or theirs is None
    assert (await jobs.get(job.id)).scheduler_id == ours


async def test_a_row_that_is_not_there_is_refused(jobs, desk):
    with pytest.raises(AllocationError, match="batch job 77 is not on record here"):
        await take(desk, replace(await opened(jobs), id=77), "12")


async def test_what_is_being_cancelled_is_not_taken(jobs, desk):
    job = await opened(jobs)
    await jobs.set_cancelled(job.id, "no longer wanted")
    with pytest.raises(AllocationError, match=r"being cancelled \(no longer wanted\)"):
        await take(desk, job, "12")


async def test_of_two_submissions_of_one_row_one_is_taken(jobs, desk):
    job = await opened(jobs)
    async with asyncio.TaskGroup() as group:
        runs = [
            group.create_task(attempt(take(desk, job, name, nodes=(name,)))) for name in "abcdef"
        ]
    [winner] = [run.result() for run in runs if not isinstance(run.result(), Exception)]
    found = await jobs.get(job.id)
    assert found.launcher_id == winner.launcher_id
    assert len(await desk.store.launchers(only_live=False)) == 1


async def attempt(call):
    try:
        return await call
    except AllocationError as error:
        return error


async def test_a_requeued_job_takes_its_row_again_when_the_lease_of_its_last_run_has_ended(
    jobs, desk
):
    job = await opened(jobs)
    first = await take(desk, job, "12")
    for nodes in (("n1",), ("elsewhere",)):
        with pytest.raises(AllocationError, match=f"launcher {first.launcher_id} "):
            await take(desk, job, "12", nodes=nodes, restart_count=1)
    await Reaping(desk.store.pool).bury(first.id, state="EXPIRED", evidence="its node is gone")
    await jobs.set_record(job.id, first.launcher_id, {"tasks": 1})
    second = await take(desk, job, "12", nodes=("elsewhere",), restart_count=1)
    found = await jobs.get(job.id)
    assert (found.launcher_id, found.has_live_launcher) == (second.launcher_id, True)
    assert found.record is None


async def test_only_the_last_launcher_writes_the_last_word(jobs, desk):
    job, other = await opened(jobs), await opened(jobs)
    first = await take(desk, job, "12")
    await first.close("lost its node")
    second = await take(desk, job, "12")
    await jobs.set_record(job.id, first.launcher_id, {"tasks": 1})
    await jobs.set_record(other.id, second.launcher_id, {"tasks": 2})
    await jobs.set_record(job.id, 999, {"tasks": 3})
    assert (await jobs.get(job.id)).tasks is None
    await second.close("no work")
    await jobs.set_record(job.id, second.launcher_id, {"tasks": 4, "exit_code": 0})
    assert (await jobs.get(job.id)).tasks == 4
    assert (await jobs.get(other.id)).record is None


# ---------------------------------------------------------------------------- submitting


async def test_a_submission_goes_on_record_step_by_step(jobs):
    job = await opened(jobs)
    await jobs.set_script(job.id, "/s/q.sh", "/s/q.out")
    await jobs.set_doubtful(job.id, "timed out")
    doubtful = await jobs.get(job.id)
    assert (doubtful.state, doubtful.reason) == (JobState.NEW, "timed out")
    assert doubtful.spec["output"] == "/s/q.out"
    assert doubtful.spec["slots_per_node"] == 4
    await jobs.set_submitted(job.id, "12")
    found = await jobs.get(job.id)
    assert (found.state, found.scheduler_id, found.reason) == (JobState.SUBMITTED, "12", None)
    assert found.submitted_at is not None
    await jobs.set_rejected(job.id, "too late")
    await jobs.set_doubtful(job.id, "too late")
    assert (await jobs.get(job.id)).reason is None


async def test_a_rejected_one_says_why_and_frees_its_place(jobs):
    job = await opened(jobs)
    await jobs.set_rejected(job.id, "sbatch: error: invalid partition\0 \udcff\n")
    found = await jobs.get(job.id)
    assert found.state is JobState.REJECTED
    assert found.reason.startswith("sbatch: error: invalid partition\N{REPLACEMENT CHARACTER}")
    assert found.ended_at is not None
    assert await jobs.open(NEW, site="s", limit=1) is not None


@pytest.mark.parametrize(
    ("taken_as", "answered", "kept"),
    [("12", "12;here", "12;here"), ("12.pbs", "12.pbs.org", "12.pbs.org"), ("12", "13", "12")],
)
async def test_a_launcher_may_be_quicker_than_the_answer_of_the_submission(
    jobs, desk, taken_as, answered, kept
):
    job = await opened(jobs)
    await take(desk, job, taken_as)
    await jobs.set_submitted(job.id, answered)
    await jobs.set_rejected(job.id, "it had timed out")
    found = await jobs.get(job.id)
    assert (found.state, found.scheduler_id) == (JobState.RUNNING, kept)


async def test_a_scheduler_may_count_from_one_again(jobs, desk):
    for _ in range(2):
        job = await opened(jobs)
        await jobs.set_submitted(job.id, "1")
        lease = await take(desk, job, "1")
        await lease.close("done")
        assert await jobs.observe(seen(job, JobState.RUNNING, JobState.FINISHED))
    assert [found.scheduler_id for found in await jobs.recent(9)] == ["1", "1"]


# ---------------------------------------------------------------------------- looking


def seen(job, was, state, **more):
    return Observation(**{"id": job.id, "was": was, "state": state, "scheduler_id": "1", **more})


async def test_a_look_is_written_while_the_row_is_as_it_was_judged_by(jobs, desk):
    job = await opened(jobs)
    await jobs.set_submitted(job.id, "12;here")
    queued = seen(job, JobState.SUBMITTED, JobState.QUEUED, reason="Priority", ends_at=desk.soon)
    async with asyncio.TaskGroup() as group:  # the service and a user's `ensemble queue`
        runs = [group.create_task(jobs.observe(queued)) for _ in range(4)]
    assert sorted(run.result() for run in runs) == [False, False, False, True]
    found = await jobs.get(job.id)
    assert (found.state, found.reason, found.ended_at) == (JobState.QUEUED, "Priority", None)
    assert found.scheduler_id == "12;here"
    await take(desk, job, "12")
    assert not await jobs.observe(seen(job, JobState.QUEUED, JobState.QUEUED))  # an old listing
    ended = desk.soon
    assert await jobs.observe(
        seen(job, JobState.RUNNING, JobState.FAILED, exit_code=3, ended_at=ended, reason="3")
    )
    found = await jobs.get(job.id)
    assert (found.state, found.exit_code, found.ended_at) == (JobState.FAILED, 3, ended)
    assert not await jobs.observe(seen(job, JobState.RUNNING, JobState.LOST))


async def test_a_doubtful_one_that_is_found_by_its_name_has_its_id(jobs):
    job = await opened(jobs)
    await jobs.set_doubtful(job.id, "timed out")
    assert await jobs.observe(seen(job, JobState.NEW, JobState.QUEUED, scheduler_id="12"))
    found = await jobs.get(job.id)
    assert (found.state, found.scheduler_id) == (JobState.QUEUED, "12")
    assert found.submitted_at is not None


async def test_looks_that_miss_a_job_are_counted_until_one_shows_it(jobs):
    job = await opened(jobs)
    lost = seen(job, JobState.NEW, JobState.LOST, scheduler_id=None)
    assert not await jobs.observe(lost)  # nobody has missed it
    for count in (1, 2):
        await jobs.set_missing(job.id)
        found = await jobs.get(job.id)
        assert found.missing == count
        assert found.missing_s >= 0
    assert await jobs.observe(seen(job, JobState.NEW, JobState.QUEUED))
    found = await jobs.get(job.id)
    assert (found.missing, found.missing_s) == (0, None)
    await jobs.set_missing(job.id)
    assert await jobs.observe(replace(lost, was=JobState.QUEUED))
    found = await jobs.get(job.id)
    assert (found.state, found.missing) == (JobState.LOST, 0)
    assert found.ended_at is not None
    await jobs.set_missing(job.id)
    assert (await jobs.get(job.id)).missing == 0  # it is over


async def test_one_that_was_never_seen_was_never_submitted(jobs):
    job = await opened(jobs)
    await jobs.set_missing(job.id)
    assert await jobs.observe(seen(job, JobState.NEW, JobState.LOST, scheduler_id=None))
    assert (await jobs.get(job.id)).submitted_at is None


async def test_a_job_that_is_just_being_taken_is_not_given_up(jobs, desk, psql, eventually):
    job = await opened(jobs)
    await put(desk, job, "RUNNING", "12")  # listed once, then missed; its launcher comes late
    for _ in range(3):
        await jobs.set_missing(job.id)
    transaction = psql.transaction()
    await transaction.start()
    await psql.execute("SELECT take_batch_job($1, 'slurm', '12', NULL)", job.id)
    lost = seen(job, JobState.RUNNING, JobState.LOST, scheduler_id=None)
    async with asyncio.TaskGroup() as group:
        giving_up = group.create_task(jobs.observe(lost))
        await eventually(lambda: is_one_waiting(desk))
        await transaction.commit()
    assert not giving_up.result()
    assert (await jobs.get(job.id)).state is JobState.RUNNING


async def test_a_job_that_is_just_being_given_up_is_not_taken(jobs, desk, psql, eventually):
    job = await opened(jobs)
    transaction = psql.transaction()
    await transaction.start()
    await psql.execute("UPDATE batch_job SET state = 'LOST' WHERE id = $1", job.id)
    async with asyncio.TaskGroup() as group:
        taking = group.create_task(attempt(take(desk, job, "12")))
        await eventually(lambda: is_one_waiting(desk))
        await transaction.commit()
    assert "given up (LOST" in str(taking.result())


async def test_what_a_job_printed_is_kept_where_its_launcher_left_no_word(jobs, desk):
    silent, told = await opened(jobs), await opened(jobs)
    lease = await take(desk, told, "12")
    await jobs.set_record(told.id, lease.launcher_id, {})
    for job in (silent, told):
        await jobs.set_error(job.id, "module: not found\0")
    assert (await jobs.get(silent.id)).error == "module: not found\N{REPLACEMENT CHARACTER}"
    assert (await jobs.get(told.id)).error is None


async def test_cancelling_is_on_record_until_the_scheduler_says_so(jobs):
    job = await opened(jobs)
    await jobs.set_cancelled(job.id, "not needed")
    found = await jobs.get(job.id)
    assert (found.state, found.spec["cancelled"]) == (JobState.NEW, "not needed")
    assert found.spec["slots_per_node"] == 4
    await jobs.observe(seen(job, JobState.NEW, JobState.FINISHED))
    await jobs.set_cancelled(job.id, "again")
    assert (await jobs.get(job.id)).spec["cancelled"] == "not needed"


@pytest.mark.parametrize("state", [state for state in JobState if state not in ACTIVE])
async def test_a_lease_ends_with_its_batch_job_and_not_with_the_sight_of_it(jobs, desk, state):
    reaping = Reaping(desk.store.pool)
    job = await opened(jobs)
    lease, other = await take(desk, job, "12"), await desk.register()
    assert await reaping.expire() == []
    assert await jobs.observe(seen(job, JobState.RUNNING, state))
    assert await reaping.expire() == ([lease.id] if state in OVER else [])
    assert (await jobs.get(job.id)).has_live_launcher == (state not in OVER)
    await other.renew()


# ---------------------------------------------------------------------------- pausing and notes


async def test_a_users_pause_wins(jobs):
    await jobs.pause("p", by="service", reason="too many failures")
    await jobs.pause("p", by="user", reason="holidays")
    await jobs.pause("p", by="service", reason="too many failures")
    assert await jobs.note_failure("p", kind="submit", reason="refused", retry_s=60) == 1
    [state] = (await jobs.queue_states()).values()
    assert (state.name, state.paused_by, state.reason) == ("p", "user", "holidays")
    assert state.paused_at is not None
    await jobs.pause("p", by="user", reason="long holidays")
    assert (await jobs.queue_states())["p"].reason == "long holidays"


async def test_failures_of_one_kind_are_counted_until_one_is_of_another(jobs):
    counts = [
        await jobs.note_failure("p", kind=kind, reason=f"{kind}\0", retry_s=90.0)
        for kind in ("submit", "submit", "died early", "died early", "died early", "submit")
    ]
    assert counts == [1, 2, 1, 2, 3, 1]
    state = (await jobs.queue_states())["p"]
    assert (state.kind, state.reason) == ("submit", "submit\N{REPLACEMENT CHARACTER}")
    assert 80 < state.retry_s <= 90
    await jobs.note_success("p", ["died early", "idle"])
    await jobs.note_success("q", ["submit"])
    assert (await jobs.queue_states())["p"].failures == 1
    await jobs.note_success("p", ["idle", "submit"])
    state = (await jobs.queue_states())["p"]
    assert (state.failures, state.kind, state.retry_s, state.reason) == (0, None, None, None)
    assert await jobs.note_failure("p", kind="submit", reason="refused", retry_s=1) == 1


async def test_failures_at_once_are_all_counted(jobs):
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(jobs.note_failure("p", kind="submit", reason="x", retry_s=1))
    assert (await jobs.queue_states())["p"].failures == 20


async def test_resuming_forgets_everything(jobs):
    assert not await jobs.resume("p")
    await jobs.note_failure("p", kind="submit", reason="refused", retry_s=60)
    await jobs.pause("p", by="service", reason="refused")
    await jobs.pause("q", by="user", reason="mine")
    await jobs.note_success("p", ["submit"])
    assert (await jobs.queue_states())["p"].reason == "refused"  # still why it is paused
    assert await jobs.resume("p")
    assert list(await jobs.queue_states()) == ["q"]
    assert not await jobs.resume("p")


async def test_only_new_decisions_are_noted(jobs):
    job = await opened(jobs)
    for policy, reason, job_id in [
        ("p", "nothing is runnable", None),
        ("q", "paused", None),
        ("p", "nothing is runnable", None),
        ("p", "3 tasks", job.id),
        ("p", "3 tasks", job.id),
        ("q", "paused", None),
        ("p", "nothing is\0 runnable", None),
    ]:
        await jobs.note_decision(policy, reason, job_id)
    noted = [(note.policy, note.reason, note.batch_job_id) for note in await jobs.decisions(10)]
    assert noted[::-1] == [
        ("p", "nothing is runnable", None),
        ("q", "paused", None),
        ("p", "3 tasks", job.id),
        ("p", "3 tasks", job.id),
        ("p", "nothing is\N{REPLACEMENT CHARACTER} runnable", None),
    ]
    assert len(await jobs.decisions(2)) == 2


async def test_old_decisions_are_forgotten(jobs, desk):
    await desk.sql(
        "INSERT INTO decision (policy, reason) SELECT 'p', n::text FROM generate_series(1, 2500) n"
    )
    await jobs.note_decision("p", "the last")
    notes = await jobs.decisions(10_000)
    assert len(notes) == 1000
    assert (notes[0].reason, notes[-1].reason) == ("the last", "1502")


# ---------------------------------------------------------------------------- the service's lock


HELD: list[ServiceLock] = []


@pytest.fixture(autouse=True)
async def _no_lock_is_left():
    yield
    while HELD:
        HELD.pop().drop()


async def lock(site, host="login1"):
    HELD.append(await ServiceLock.acquire(site.address(), host=host, pid=4711, period_s=60.0))
    return HELD[-1]


async def test_a_second_service_is_told_who_the_first_is(site, jobs):
    assert not (await jobs.service()).is_running
    first = await lock(site)
    with pytest.raises(TakenError, match=r"on login1, pid 4711, since 20\d\d-\d\d-\d\d") as caught:
        await lock(site, "login2")
    assert (caught.value.host, caught.value.pid) == ("login1", 4711)
    known = await jobs.service()
    assert (known.host, known.pid, known.period_s) == ("login1", 4711, 60.0)
    assert known.is_running
    assert await first.beat()
    await first.release()
    known = await jobs.service()
    assert known.stopped_at is not None
    assert not known.is_running
    second = await lock(site, "login2")  # at once
    assert (await jobs.service()).stopped_at is None
    await second.release()


async def test_one_of_many_becomes_the_service(site):
    async def one():
        try:
            return await lock(site)
        except TakenError as error:
            return error

    async with asyncio.TaskGroup() as group:
        runs = [group.create_task(one()) for _ in range(8)]
    [winner] = [run.result() for run in runs if isinstance(run.result(), ServiceLock)]
    assert await winner.beat()
    await winner.release()


async def test_a_service_that_has_just_begun_is_not_told_by_the_name_of_the_last(site, psql):
    await (await lock(site, "old")).release()
    await psql.fetchval("SELECT pg_advisory_lock(hashtext('ensemble.service'))")
    with pytest.raises(TakenError, match="is starting: try again in a moment"):
        await lock(site)


async def test_a_killed_session_frees_the_lock_and_its_holder_learns_of_it(
    site, psql, jobs, eventually
):
    first = await lock(site)
    ended = await psql.fetchval(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE application_name = 'ensemble service lock'"
    )
    assert ended == 1
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            await first.beat()
    second = await eventually(lambda: lock_or_none(site))
    assert await jobs.open(NEW, site="s", epoch=first.epoch) is None
    with pytest.raises(StoreUnavailableError):
        await first.release()
    assert await second.beat()
    await second.release()


async def lock_or_none(site):
    try:
        return await lock(site)
    except TakenError:
        return None


async def test_a_service_whose_connection_drops_is_succeeded(site, jobs, eventually):
    first = await lock(site)
    first.drop()
    second = await eventually(lambda: lock_or_none(site))
    assert second.epoch == first.epoch + 1
    await second.release()


async def test_who_was_overtaken_learns_it_from_the_epoch(site, jobs, desk):
    first = await lock(site)
    await desk.sql("UPDATE service SET epoch = epoch + 1, host = 'other'")
    assert not await first.beat()
    await first.release()
    known = await jobs.service()
    assert (known.host, known.stopped_at) == ("other", None)


@pytest.mark.parametrize("how", ["fast", "immediate"])
async def test_a_restart_of_the_database_loses_the_lock_and_no_record(
    site, desk, jobs, how, eventually
):
    first = await lock(site)
    job = await jobs.open(NEW, site="s", limit=1, epoch=first.epoch)
    await jobs.set_submitted(job.id, "12")
    await site.cluster.stop(how)
    with pytest.raises(StoreUnavailableError):
        await first.beat()
    with pytest.raises(StoreUnavailableError):
        await jobs.active()
    await site.cluster.start()
    second = await lock(site)

    async def answers():
        try:
            return await jobs.active()
        except StoreUnavailableError:
            return None

    [found] = await eventually(answers)
    assert (found.id, found.state, found.scheduler_id) == (job.id, JobState.SUBMITTED, "12")
    for epoch in (first.epoch, second.epoch):
        assert await jobs.open(NEW, site="s", limit=1, epoch=epoch) is None
    assert await jobs.open(NEW, site="s", limit=2, epoch=first.epoch) is None
    assert await jobs.open(NEW, site="s", limit=2, epoch=second.epoch) is not None
    await second.release()


# ---------------------------------------------------------------------------- rights


@pytest.mark.parametrize("role", [USER, TASK])
async def test_every_role_may_do_all_this_and_not_unmake_the_service(site, address, role):
    store = await Store.open(site.address(role), name="test role", max_size=1)
    try:
        desk, jobs = Desk(store), Jobs(store.pool)
        holder = await ServiceLock.acquire(site.address(role), host="h", pid=1, period_s=1.0)
        job = await jobs.open(NEW, site="s", limit=1, epoch=holder.epoch)
        await jobs.set_script(job.id, "a", "b")
        await jobs.set_submitted(job.id, "12")
        lease = await take(desk, job, "12")
        await jobs.backlog(None), await jobs.typical_minutes(), await jobs.capacity(10.0)
        await jobs.set_record(job.id, lease.launcher_id, {"tasks": 0})
        await jobs.set_cancelled(job.id, "x")
        await jobs.observe(seen(job, JobState.RUNNING, JobState.FINISHED))
        assert await Reaping(store.pool).expire() == [lease.id]
        await jobs.note_failure("p", kind="submit", reason="x", retry_s=1.0)
        await jobs.note_success("p", ["submit"])
        await jobs.pause("p", by="user", reason="x")
        assert await jobs.resume("p")
        await jobs.note_decision("p", "x", job.id)
        assert await holder.beat()
        await holder.release()
        for statement in ("DELETE FROM service", "INSERT INTO service DEFAULT VALUES"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await store.pool.execute(statement)
    finally:
        await store.close()
