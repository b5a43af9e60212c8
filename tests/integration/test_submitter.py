"""Submitting batch jobs, on a Slurm that refuses, lies, hangs and forgets: never two of one, never one lost."""

from __future__ import annotations

import asyncio
import dataclasses
import resource
import signal
import stat
import subprocess

import pytest

from ensemble.batch import cancel
from ensemble.core.batchjob import JobState
from ensemble.errors import EnsembleError, SchedulerError, TemplateError, Trouble, UsageError
from tests.integration.launching import WHEEL
from tests.integration.serving import Serving, new

pytestmark = WHEEL


@pytest.fixture(autouse=True)
def _settings(serving: Serving) -> None:
    serving.write()


async def doubt(serving: Serving, mode: str = "lost", **options) -> SchedulerError:
    """Submit a batch job of which nobody knows whether the scheduler took it."""
    serving.fake.be(sbatch=mode)
    with pytest.raises(SchedulerError) as caught:
        await serving.submit(**options)
    serving.fake.be(sbatch="ok")
    assert caught.value.trouble is Trouble.UNSURE
    return caught.value


async def grow_old(serving: Serving, seconds: float = 60.0) -> None:
    """Let the batch jobs be older than any submission takes."""
    await serving.store.pool.execute(
        "UPDATE batch_job SET created_at = created_at - make_interval(secs => $1)", seconds
    )


async def give_up(serving: Serving) -> None:
    """Look often and long enough at a listing without the jobs."""
    await grow_old(serving)
    lookout = serving.lookout()
    await lookout.look()
    await serving.store.pool.execute(
        "UPDATE batch_job SET first_missing_at = first_missing_at - interval '1 minute'"
    )
    await lookout.look()


# ---------------------------------------------------------------------------- as it should be


async def test_a_submission_is_on_record_with_its_script_and_its_id(serving: Serving):
    job = await serving.submit(flags=("--constraint", "gpu&hbm", "-lx=1"))
    assert job is not None
    assert (job.state, job.scheduler, job.scheduler_id) == (JobState.SUBMITTED, "slurm", "101")
    script = serving.path / "qsubmit" / f"qlaunch{job.id}.sh"
    text = script.read_text()
    assert f"--batch-job={job.id} " in text
    assert stat.S_IMODE(script.stat().st_mode) == 0o700
    assert job.spec["output"] == str(script.with_suffix(".out"))
    argv = serving.fake.lines("argv")
    assert argv[-4:] == ["--constraint", "gpu&hbm", "-lx=1", str(script)]
    assert f"--job-name={job.name}" in argv
    assert list(script.parent.glob(".qlaunch*")) == []


async def test_of_many_at_the_same_moment_no_more_than_the_limit_are_submitted(serving: Serving):
    made = await asyncio.gather(*(serving.submit(policy="debug", limit=2) for _ in range(8)))
    assert sum(job is not None for job in made) == 2
    assert serving.fake.count("accepted") == 2


async def test_a_service_that_was_taken_over_submits_nothing(serving: Serving):
    epoch = await serving.store.pool.fetchval(
        "UPDATE service SET epoch = epoch + 2 RETURNING epoch"
    )
    assert await serving.submit(epoch=epoch - 1) is None
    assert serving.fake.count("calls") == 0
    assert await serving.submit(epoch=epoch) is not None


# ---------------------------------------------------------------------------- refusals and doubts


@pytest.mark.parametrize(
    ("mode", "trouble", "state", "words"),
    [
        ("down", Trouble.RETRY, "REJECTED", "Unable to contact slurm controller"),
        ("full", Trouble.CAPACITY, "REJECTED", "QOSMaxSubmitJobPerUserLimit"),
        ("invalid", Trouble.PERMANENT, "REJECTED", "Invalid partition name"),
        ("timeout", Trouble.UNSURE, "NEW", "Socket timed out"),
        ("lost", Trouble.UNSURE, "NEW", "Socket timed out"),
        ("nonsense", Trouble.UNSURE, "NEW", "Welcome to the machine"),
        ("silent", Trouble.UNSURE, "NEW", "printed nothing"),
        ("hang", Trouble.UNSURE, "NEW", "did not end"),
    ],
)
async def test_a_refusal_ends_the_row_and_a_doubt_keeps_it(serving, mode, trouble, state, words):
    serving.fake.be(sbatch=mode)
    with pytest.raises(SchedulerError) as caught:
        await serving.submit(policy="debug", limit=1)
    assert caught.value.trouble is trouble
    (job,) = await serving.reach(state)
    assert words in (job.reason or "")
    serving.fake.be(sbatch="ok")
    again = await serving.submit(policy="debug", limit=1)
    assert (again is None) == (state == "NEW"), "what is in doubt counts, what was refused does not"


async def test_a_command_that_is_not_there_is_told_and_ends_the_row(serving: Serving):
    (serving.fake.folder / "sbatch").write_text("#!/no/such/interpreter\n")
    with pytest.raises(SchedulerError, match="sbatch"):
        await serving.submit()
    (job,) = await serving.reach("REJECTED")
    assert "sbatch" in job.reason


@pytest.mark.parametrize("mode", ["lost", "nonsense", "hang"])
async def test_a_doubtful_one_is_found_by_its_name(serving: Serving, mode: str):
    await doubt(serving, mode)
    (change,) = await serving.lookout().look()
    assert (change.before.state, change.after.state) == (JobState.NEW, JobState.QUEUED)
    assert (change.after.scheduler_id, change.after.reason) == ("101", "Priority")


async def test_a_doubtful_one_is_given_up_only_after_so_many_looks_and_so_long(serving: Serving):
    await doubt(serving, "timeout")
    lookout = serving.lookout()
    for _ in range(5):
        await lookout.look()  # too young: it may still be on its way
    (job,) = await serving.reach("NEW")
    assert job.missing == 0
    await grow_old(serving)
    for _ in range(5):
        await lookout.look()  # often enough, and not long enough
    (job,) = await serving.reach("NEW")
    assert job.missing == 5
    await serving.store.pool.execute(
        "UPDATE batch_job SET missing = 0, first_missing_at = first_missing_at - interval '1 minute'"
    )
    await lookout.look()  # long enough, and not often enough
    await serving.reach("NEW")
    await lookout.look()
    (job,) = await serving.reach("LOST")
    assert "never seen" in job.reason
    assert "Socket timed out" in job.reason


async def test_an_interrupted_submission_says_which_batch_job_may_be_there(serving: Serving):
    serving.write(timeout_s=50)
    serving.fake.be(sbatch="hang")
    submitting = subprocess.Popen(
        serving.argv("submit-launch", "-n1", "-t5"), env=serving.environ, stderr=subprocess.PIPE
    )
    await serving.eventually(lambda: serving.fake.count("accepted") == 1)
    submitting.send_signal(signal.SIGINT)
    _, said = await asyncio.to_thread(submitting.communicate)
    doubt = "warning: batch job 1 may be there all the same: ensemble queue finds out, by its name"
    assert (submitting.returncode, said.decode()) == (130, f"{doubt}\ninterrupted\n")
    (job,) = await serving.reach("NEW")
    assert job.reason == "its submission was interrupted"
    await serving.lookout().look()
    await serving.reach("QUEUED")


async def test_an_interruption_does_not_wait_for_a_database_that_hangs(serving: Serving, owner):
    serving.write(timeout_s=50)
    serving.fake.be(sbatch="hang")
    submitting = asyncio.create_task(serving.submit())
    await serving.eventually(lambda: serving.fake.count("accepted") == 1)
    async with owner.transaction():
        await owner.execute("LOCK TABLE batch_job")
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError, match="batch job 1 may be there"):
            async with asyncio.timeout(8):  # of the ten seconds that a lock is waited for
                await submitting
    await serving.reach("NEW")


@pytest.mark.parametrize("mode", ["down", "nothing", "garbage", "half", "hang"])
async def test_a_listing_that_is_none_changes_nothing(serving: Serving, mode: str):
    await serving.submit()
    await doubt(serving)
    await grow_old(serving)
    before = await serving.active()
    serving.fake.be(squeue=mode)
    for _ in range(1 if mode == "hang" else 4):
        with pytest.raises(SchedulerError) as caught:
            await serving.lookout().look()
        assert caught.value.trouble is Trouble.RETRY
    after = await serving.active()
    assert [(j.state, j.missing, j.reason) for j in after] == [
        (j.state, j.missing, j.reason) for j in before
    ]


async def test_one_that_was_given_up_is_cancelled_when_it_comes_back(serving: Serving):
    await serving.submit()
    serving.fake.be(squeue="no-jobs")
    await give_up(serving)
    await serving.reach("LOST")
    serving.fake.be(squeue="ok")
    await serving.lookout().look()  # no other batch job is left to ask for
    assert serving.fake.lines("cancels") == ["101"]
    assert serving.fake.live() == []
    await serving.lookout().look()
    assert serving.fake.count("cancels") == 1


async def test_jobs_of_others_are_left_alone(serving: Serving):
    await serving.submit()
    job = (await serving.active())[0]
    prefix = job.name.rpartition("-")[0]
    names = [
        f"{prefix}-99",
        f"{prefix}-²",
        f"{prefix}-{'9' * 40}",
        "ens-my-site-other-1",
        "",
        "-",
        "1",
    ]
    with (serving.fake.state / "jobs").open("a") as file:
        file.writelines(f"{900 + n}|RUNNING|None|{name}\n" for n, name in enumerate(names))
    await serving.lookout().look()
    assert serving.fake.count("cancels") == 0


# ---------------------------------------------------------------------------- cancelling


async def test_a_doubtful_one_that_was_cancelled_is_cancelled_when_it_is_seen(serving: Serving):
    await doubt(serving)
    serving.fake.be(squeue="no-jobs")
    (job,) = await serving.active()
    assert await cancel(serving.jobs, serving.system(), job.id, "by hand")
    assert serving.fake.count("cancels") == 0  # nobody knows its id yet
    serving.fake.be(squeue="ok")
    await serving.lookout().look()
    assert serving.fake.live() == []
    await serving.lookout().look()
    (job,) = await serving.reach("CANCELLED")
    assert job.reason == "by hand"


async def test_one_that_was_cancelled_before_it_was_known_is_cancelled_however_late_it_comes(
    serving,
):
    await doubt(serving)
    serving.fake.be(squeue="no-jobs")
    (job,) = await serving.active()
    await cancel(serving.jobs, serving.system(), job.id, "by hand")
    await give_up(serving)
    await serving.reach("CANCELLED")
    serving.fake.be(squeue="ok")
    await serving.lookout().look()
    assert serving.fake.live() == []


async def test_a_cancellation_that_failed_is_made_up_for(serving: Serving):
    job = await serving.submit()
    assert job is not None
    serving.fake.be(scancel="down")
    with pytest.raises(SchedulerError, match="Unable to contact"):
        await cancel(serving.jobs, serving.system(), job.id, "by hand")
    (
        change,
    ) = await serving.lookout().look()  # fails once more, and what was seen is told all the same
    assert change.after.state is JobState.QUEUED
    serving.fake.be(scancel="ok")
    await serving.lookout().look()
    await serving.lookout().look()
    await serving.reach("CANCELLED")


async def test_a_running_one_that_is_being_cancelled_is_not_cancelled_at_each_look(
    serving: Serving,
):
    job = await serving.submit()
    assert job is not None
    serving.fake.move("RUNNING")
    await serving.lookout().look()
    await cancel(serving.jobs, serving.system(), job.id, "by hand")
    serving.fake.move("COMPLETING")
    for _ in range(3):
        await serving.lookout().look()
    assert serving.fake.count("cancels") == 1
    serving.fake.move("CANCELLED")
    await serving.lookout().look()
    await serving.reach("CANCELLED")
    assert not await cancel(serving.jobs, serving.system(), job.id, "again")


# ---------------------------------------------------------------------------- templates and disks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "#!/bin/sh\n#SBATCH -A {{ porject }}\nexec {{ launch }}\n",
            "job.sh:2: there is no variable 'porject'",
        ),
        ("#!/bin/sh\n\n{% if queue %}\nexec {{ launch }}\n", "job.sh:"),
        ("#!/bin/sh\n{{ launch }}\n", "exec"),
        ("", "job.sh"),
        (None, "there is no template 'job.sh'"),
    ],
)
async def test_what_is_wrong_with_a_template_is_found_before_there_is_a_row(serving, text, words):
    if text is None:
        serving.template.unlink()
    else:
        serving.template.write_text(text)
    with pytest.raises(TemplateError) as caught:
        await serving.submit()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (await serving.states(), serving.fake.count("calls")) == ([], 0)


async def test_a_value_that_no_script_can_hold_is_refused_before_there_is_a_row(serving: Serving):
    submitter = serving.submitter()
    for value in ("a\nb", "a\x1b[31m", "\0"):
        with pytest.raises(UsageError):
            await submitter.submit(
                dataclasses.replace(new("slurm"), project=value), template_name="job.sh"
            )
    assert await serving.states() == []


async def refused_for_its_script(serving: Serving, words: str) -> None:
    with pytest.raises(EnsembleError) as caught:
        await serving.submit()
    assert "cannot write the script of batch job 1" in str(caught.value)
    assert words in str(caught.value)
    assert "None" not in str(caught.value)
    (job,) = await serving.reach("REJECTED")
    assert words in (job.reason or "")
    assert serving.fake.count("calls") == 0


async def test_a_full_disk_ends_the_row_and_submits_nothing(serving: Serving):
    # EFBIG: as a full disk, write() fails, and does not know which file.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        await refused_for_its_script(serving, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((serving.path / "qsubmit").iterdir()) == []


async def test_a_directory_in_the_scripts_place_ends_the_row(serving: Serving):
    (serving.path / "qsubmit" / "qlaunch1.sh").mkdir()
    await refused_for_its_script(serving, "Is a directory")


async def test_a_file_in_the_folders_place_ends_the_row(serving: Serving):
    (serving.path / "qsubmit").rmdir()
    (serving.path / "qsubmit").write_text("")
    await refused_for_its_script(serving, "File exists")
