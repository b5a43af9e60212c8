"""Batch systems: small programs in the place of the schedulers' own, and a real Slurm."""

from __future__ import annotations

import asyncio
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import uvloop

from ensemble.core.batchjob import OVER, JobState
from ensemble.drivers import batch, proctree
from ensemble.drivers.batch import BatchSystem
from ensemble.drivers.pbs import PBS
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Request, Scheduler, Seen
from ensemble.drivers.slurm import SLURM
from ensemble.errors import SchedulerError, Trouble
from tests.slurm.cluster import Slurm, find_missing

pytestmark = pytest.mark.filterwarnings('ignore:Overriding the "event_loop_policy" fixture')
HEADING = "JOBID|STATE|REASON|START_TIME|END_TIME|NODES|PARTITION|NAME"
ROW = "7|RUNNING|None|1795383318|1795386918|1|debug|ens-7"


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    if request.param == "uvloop":
        return uvloop.EventLoopPolicy()
    return asyncio.DefaultEventLoopPolicy()


class Programs:
    """Scripts in the place of a scheduler's commands, in the only directory on PATH."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # No other, as this machine may have a scheduler.
        self.environ = {"PATH": str(path), "HOME": str(path)}
        for name in ("cat", "env", "mkdir", "rmdir", "sh", "sleep", "wc"):
            (path / name).symlink_to(shutil.which(name) or name)

    def write(self, name: str, body: str) -> None:
        file = self.path / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)

    def system(
        self, scheduler: Scheduler = SLURM, *, timeout_s: float = 20, **environ: str
    ) -> BatchSystem:
        return BatchSystem(
            scheduler, environ=self.environ | environ, cwd=self.path, timeout_s=timeout_s
        )

    def request(self, *flags: str) -> Request:
        script = self.path / "7.sh"
        script.write_text("#!/bin/sh\necho hello\n")
        return Request(script=script, name="ens-7", output=self.path / "7.out", flags=flags)

    def read(self, name: str) -> str:
        return (self.path / name).read_text()


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


def scheduler(**changes: object) -> Scheduler:
    """Return a scheduler of one's own, whose commands are `give`, `show` and `stop`."""
    fields: dict[str, object] = {
        "name": "slurm",
        "programs": ("give",),
        "submit_argv": lambda request: ["give", str(request.script)],
        "parse_submit": lambda answer: answer.stdout.strip(),
        "status_argv": lambda ids: ["show", *ids],
        "parse_status": parse_words,
        "cancel_argv": lambda id: ["stop", id],
    }
    return Scheduler(**(fields | changes))  # type: ignore[arg-type]


def parse_words(answer: Completed) -> list[Seen]:
    return [Seen(id=word, state=JobState.RUNNING) for word in answer.stdout.split()]


async def trouble_of(call: object) -> SchedulerError:
    with pytest.raises(SchedulerError) as caught:
        await call  # type: ignore[misc]
    assert "\n" not in str(caught.value)
    return caught.value


# Submission


async def test_submits_from_its_directory_with_nothing_to_read(programs):
    programs.write("sbatch", 'printf "%s\\n" "$@" > argv; pwd > cwd; wc -c > read; echo 8')
    system = programs.system()
    assert await system.submit(programs.request("-p", "debug")) == "8"
    assert programs.read("argv").split("\n")[-4:] == [
        "-p", "debug", str(programs.path / "7.sh"), "",
    ]  # fmt: skip
    assert programs.read("cwd").strip() == str(programs.path)
    assert programs.read("read").strip() == "0"


async def test_a_piped_script_is_read(programs):
    programs.write("give", "cat > script; echo 8")
    system = programs.system(scheduler(is_script_piped=True))
    assert await system.submit(programs.request()) == "8"
    assert programs.read("script") == "#!/bin/sh\necho hello\n"


async def test_a_piped_script_that_is_missing_is_not_submitted(programs):
    programs.write("give", "touch called; echo 8")
    system = programs.system(scheduler(is_script_piped=True))
    request = programs.request()
    request.script.unlink()
    error = await trouble_of(system.submit(request))
    assert error.trouble is Trouble.PERMANENT
    assert "7.sh: No such file" in str(error)
    assert not (programs.path / "called").exists()


async def test_a_submit_command_that_does_not_read_the_script_is_heard(programs):
    programs.write("give", "exec <&-; echo no such queue >&2; exit 1")
    request = programs.request()
    request.script.write_bytes(b"x" * 10_000_000)
    error = await trouble_of(programs.system(scheduler(is_script_piped=True)).submit(request))
    assert "no such queue" in str(error)


async def test_the_environment_of_the_commands(programs):
    for name in ("sbatch", "squeue"):
        programs.write(name, f"env > {name}.env; echo 8; false")
    system = programs.system(
        SLURM_CONF="/etc/slurm.conf", SLURM_JOB_ID="5", SBATCH_TIMELIMIT="1", SQUEUE_STATES="CA",
        LC_ALL="de_DE.UTF-8", TZ="Europe/Berlin", SLURM_TIME_FORMAT="relative", MINE="x",
    )  # fmt: skip
    for call in (system.submit(programs.request()), system.listing([])):
        await trouble_of(call)
    submitted = set(programs.read("sbatch.env").splitlines())
    asked = set(programs.read("squeue.env").splitlines())
    for seen in (submitted, asked):
        assert {"SLURM_CONF=/etc/slurm.conf", "MINE=x"} <= seen
        names = {line.partition("=")[0] for line in seen}
        assert not names & {"SLURM_JOB_ID", "SBATCH_TIMELIMIT", "SQUEUE_STATES"}
    assert {"LC_ALL=C", "TZ=UTC", "SLURM_TIME_FORMAT=%s"} <= asked
    # Slurm gives it to the job, which is the user's.
    assert {"LC_ALL=de_DE.UTF-8", "TZ=Europe/Berlin"} <= submitted
    assert not any(line.startswith("SLURM_TIME_FORMAT") for line in submitted)


@pytest.mark.parametrize(
    ("body", "trouble", "words"),
    [
        ("echo sbatch: error: Invalid qos specification >&2; exit 1", Trouble.PERMANENT, "Slurm cannot submit: sbatch: e"),
        ("echo sbatch: error: AssocMaxSubmitJobLimit >&2; exit 1", Trouble.CAPACITY, "AssocMaxSubmitJobLimit"),
        ("echo Unable to contact slurm controller; exit 1", Trouble.RETRY, "Unable to contact"),
        ("echo Socket timed out on send/recv operation >&2; exit 1", Trouble.UNSURE, "timed out"),
        ("exit 7", Trouble.PERMANENT, "exit status 7, no message"),
        ("kill -9 $$", Trouble.UNSURE, "exit status -9"),
        ("echo 8; echo cannot log it >&2; exit 1", Trouble.UNSURE, "cannot log it"),
        ("echo nonsense; echo more >&2", Trouble.UNSURE, "gave no id: nonsense / more"),
        ("exit 0", Trouble.UNSURE, "it printed nothing"),
        ("printf '\\377\\376\\000 8\\n'", Trouble.UNSURE, "gave no id"),
    ],
)  # fmt: skip
async def test_troubles_of_a_submission(programs, body, trouble, words):
    programs.write("sbatch", body)
    error = await trouble_of(programs.system().submit(programs.request()))
    assert error.trouble is trouble
    assert words in str(error)


def refuse(_: Completed) -> str:
    raise SchedulerError("no", trouble=Trouble.PERMANENT)


@pytest.mark.parametrize(
    "parse", [refuse, lambda _: [][0], lambda _: str(int("x")), lambda _: "", lambda _: "1\t2"]
)
async def test_an_id_that_cannot_be_read_is_never_a_refusal(programs, parse):
    programs.write("give", "echo taken")
    error = await trouble_of(
        programs.system(scheduler(parse_submit=parse)).submit(programs.request())
    )
    assert error.trouble is Trouble.UNSURE
    assert "ens-7" in str(error)
    assert "taken" in str(error)


@pytest.mark.parametrize(
    ("call", "trouble"),
    [
        (lambda system, request: system.submit(request), Trouble.UNSURE),
        (lambda system, _: system.listing([]), Trouble.RETRY),
        (lambda system, _: system.cancel("7"), Trouble.RETRY),
        (lambda system, _: system.history("7"), Trouble.RETRY),
    ],
    ids=["submit", "listing", "cancel", "history"],
)
async def test_a_command_that_takes_too_long(programs, eventually, call, trouble):
    for name in ("sbatch", "squeue", "scancel", "sacct"):
        programs.write(name, "echo $$ > pid; echo 8; exec sleep 600")
    error = await trouble_of(call(programs.system(timeout_s=1), programs.request()))
    assert error.trouble is trouble
    assert "within 1 s" in str(error)
    pid = int(programs.read("pid"))
    await eventually(lambda: not Path(f"/proc/{pid}").exists())


async def test_what_a_command_has_started_ends_with_it(programs, eventually):
    # As sites wrap theirs: the real one is a child, and has the output.
    programs.write("squeue", "sh -c 'echo $$ > pid; exec sleep 600'; echo done")
    await trouble_of(programs.system(timeout_s=1).listing([]))
    pid = int(programs.read("pid"))
    await eventually(lambda: not proctree.read_stat(pid) or proctree.read_stat(pid).is_zombie)


@pytest.mark.parametrize("where", ["", ">&2"])
async def test_a_flood_is_an_error(programs, where, monkeypatch):
    monkeypatch.setattr(batch, "MAX_BYTES", 1 << 20)
    for name in ("sbatch", "squeue"):
        programs.write(name, f"exec cat /dev/zero {where}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = await trouble_of(programs.system().listing([]))
    assert "squeue printed more than 1048576 bytes" in str(error)
    assert error.trouble is Trouble.RETRY
    assert (
        await trouble_of(programs.system().submit(programs.request()))
    ).trouble is Trouble.UNSURE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


async def test_an_unsure_answer_to_a_question_is_asked_again(programs):
    for name in ("squeue", "scancel", "sacct"):
        programs.write(name, "echo Socket timed out on send/recv operation >&2; exit 1")
    system = programs.system()
    for call in (system.listing([]), system.cancel("7"), system.history("7")):
        assert (await trouble_of(call)).trouble is Trouble.RETRY


async def test_a_missing_program(programs):
    system = programs.system()
    for call, name in [
        (system.submit(programs.request()), "sbatch"),
        (system.listing([]), "squeue"),
    ]:
        error = await trouble_of(call)
        assert error.trouble is Trouble.PERMANENT
        assert str(error) == (
            f"no {name} on PATH: is this a Slurm machine? "
            "([scheduler] kind in ensemble.toml; `local` runs batch jobs on this machine)"
        )


async def test_a_program_that_cannot_be_run_has_submitted_nothing(programs):
    (programs.path / "sbatch").write_text("#!/nonexistent/sh\n")
    (programs.path / "sbatch").chmod(0o755)
    error = await trouble_of(programs.system().submit(programs.request()))
    assert error.trouble is Trouble.RETRY
    assert "cannot run sbatch" in str(error)


async def test_a_word_with_a_null_byte(programs):
    programs.write("sbatch", "echo 8")
    error = await trouble_of(programs.system().submit(programs.request("--comment=a\0b")))
    assert error.trouble is Trouble.PERMANENT


# Listing


async def test_lists_whatever_is_on_stderr(programs):
    programs.write("squeue", f"echo '{{\"x|y' >&2; echo '{HEADING}'; echo '{ROW}'")
    (seen,) = await programs.system().listing(["7"])
    assert (seen.id, seen.state, seen.name) == ("7", JobState.RUNNING, "ens-7")


@pytest.mark.parametrize(
    "body",
    ["", "echo ok", f"echo '{HEADING}'; echo oops", f"printf '{HEADING}\\n7|RUNN'", f"echo '{HEADING}'; exit 1"],
)  # fmt: skip
async def test_what_is_no_listing_is_an_error(programs, body):
    programs.write("squeue", body)
    error = await trouble_of(programs.system().listing([]))
    assert "Slurm cannot list batch jobs" in str(error)


#: A listing that tells its number and whether another one was under way, and waits until it may go on.
COUNTING = """
mkdir busy 2>/dev/null || echo overlap >> overlaps
echo x >> runs
number=$(wc -l < runs)
while [ ! -e go ]; do sleep 0.02; done
rmdir busy
echo $number
"""


async def test_one_listing_at_a_time_and_those_who_wait_share_the_next(programs, eventually):
    programs.write("show", COUNTING)
    system = programs.system(scheduler())
    async with asyncio.TaskGroup() as group:
        first = group.create_task(system.listing(["a"]))
        await eventually((programs.path / "runs").exists)
        rest = [group.create_task(system.listing(["a"])) for _ in range(5)]
        await asyncio.sleep(0)  # all of them have asked by now
        (programs.path / "go").touch()
    assert [seen.id for seen in first.result()] == ["1"]
    assert {seen.id for each in rest for seen in each.result()} == {"2"}, (
        "what was under way may be older than what they have submitted"
    )
    assert programs.read("runs").count("x") == 2
    assert not (programs.path / "overlaps").exists()
    assert [seen.id for seen in await system.listing(["a"])] == ["3"], "nothing is kept"


async def test_a_listing_of_other_ids_is_not_shared(programs, eventually):
    programs.write("show", COUNTING.replace("echo $number", "echo $*"))
    system = programs.system(scheduler())
    async with asyncio.TaskGroup() as group:
        group.create_task(system.listing(["a"]))
        await eventually((programs.path / "runs").exists)
        rest = [group.create_task(system.listing(ids)) for ids in (["a", "b"], ["b"], ["c"])]
        await asyncio.sleep(0)
        (programs.path / "go").touch()
    found = [{seen.id for seen in each.result()} for each in rest]
    assert found == [{"a", "b"}, {"a", "b"}, {"c"}]


async def test_a_failed_listing_is_shared_too(programs, eventually):
    programs.write("show", COUNTING + "echo Unable to contact >&2; exit 1")

    def parse(answer: Completed) -> list[Seen]:
        raise SchedulerError(answer.stderr.strip(), trouble=Trouble.RETRY)

    system = programs.system(scheduler(parse_status=parse))
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(trouble_of(system.listing([])))]
        await eventually((programs.path / "runs").exists)
        calls += [group.create_task(trouble_of(system.listing([]))) for _ in range(4)]
        await asyncio.sleep(0)
        (programs.path / "go").touch()
    errors = [call.result() for call in calls]
    assert {str(error) for error in errors} == {"Unable to contact"}
    assert len({id(error) for error in errors}) == 5
    assert programs.read("runs").count("x") == 2


async def test_who_gives_up_disturbs_no_other(programs, eventually):
    programs.write("show", COUNTING)
    system = programs.system(scheduler())
    async with asyncio.TaskGroup() as group:
        impatient = group.create_task(system.listing([]))
        await eventually((programs.path / "runs").exists)
        patient = group.create_task(system.listing([]))
        await asyncio.sleep(0)
        impatient.cancel()
        await eventually(lambda: programs.read("runs").count("x") == 2)
        (programs.path / "go").touch()
    assert [seen.id for seen in patient.result()] == ["2"]


# Cancellation and history


@pytest.mark.parametrize(
    ("body", "is_cancelled"),
    [
        ("echo scancel: Terminating job 7 >&2", True),
        ("echo Kill job error on job id 7: Job/step already completing or completed >&2", False),
        ("echo Kill job error on job id 7: Invalid job id specified >&2; exit 1", False),
    ],
)
async def test_cancel(programs, body, is_cancelled):
    programs.write("scancel", body)
    assert await programs.system().cancel("7") is is_cancelled


async def test_a_cancellation_that_is_refused(programs):
    programs.write("scancel", "echo Access/permission denied >&2; exit 1")
    error = await trouble_of(programs.system().cancel("7"))
    assert (error.trouble, str(error)) == (
        Trouble.PERMANENT,
        "Slurm cannot cancel 7: Access/permission denied",
    )


async def test_history(programs):
    programs.write("sacct", "echo '7|FAILED|3:0|1795382897|1795382997|NonZeroExitCode'")
    seen = await programs.system().history("7;other")
    assert seen is not None
    assert (seen.id, seen.state, seen.exit_code) == ("7;other", JobState.FAILED, 3)
    programs.write("sacct", "echo Slurm accounting storage is disabled >&2; exit 1")
    assert await programs.system().history("7") is None
    assert await programs.system(scheduler()).history("7") is None


# Which


async def test_pbs_is_no_other_scheduler_with_its_commands(programs):
    for name in ("qsub", "qstat", "qdel", "pbsnodes"):
        programs.write(name, "")
    environ = {"PATH": str(programs.path)}
    assert "pbs" not in batch.find_scheduler_names(environ)
    programs.write("pbs_rstat", "")
    programs.write("sbatch", "")
    found = batch.find_scheduler_names(environ)
    assert found[:2] == ["slurm", "pbs"]
    assert "local" not in found


def test_every_scheduler_has_its_driver(tmp_path):
    found = [batch.get(name, directory=tmp_path, max_running=1) for name in batch.SCHEDULERS]
    assert [each.name for each in found] == list(batch.SCHEDULERS)
    assert found[:2] == [SLURM, PBS]


def test_an_unknown_scheduler(tmp_path):
    with pytest.raises(SchedulerError, match=r"'torque': .* one of slurm, pbs"):
        batch.get("torque", directory=tmp_path, max_running=1)


# A real Slurm


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    if missing := find_missing():
        pytest.skip(f"NOT TESTED on Slurm: no {missing} (apt-get install slurm-wlm)")
    conf = Path(__file__).parent.parent / "data" / "slurm.conf.in"
    started = Slurm.start(conf.read_text())
    yield started
    started.stop()
    shutil.rmtree(started.path, ignore_errors=True)


@pytest.mark.slurm
async def test_a_real_slurm(slurm, tmp_path, eventually):
    directory = tmp_path / "100% of %j, and é"
    directory.mkdir()
    environ = slurm.environ | {"SBATCH_PARTITION": "nope", "SQUEUE_STATES": "CA"}
    system = BatchSystem(SLURM, environ=environ, cwd=tmp_path)

    async def submit(body: str, name: str, *flags: str) -> str:
        script = directory / "job.sh"
        script.write_text(f"#!/bin/bash\n{body}\n")
        return await system.submit(
            Request(script=script, name=name, output=directory / f"{name}.out", flags=flags)
        )

    async def listed(id: str, states: Sequence[JobState]) -> Seen:
        async def look() -> Seen | None:
            found = {seen.id: seen for seen in await system.listing([id])}
            return found[id] if found[id].state in states else None

        return await eventually(look, within_s=40)

    assert await system.listing([]) == []
    failing = await submit("echo hello; exit 3", "ens | 1")
    running = await submit("exec sleep 600", "ens 2", "--time=5")
    queued = await submit("true", "-ens 3", "--nodes=4", "--exclusive")
    assert (await listed(failing, [JobState.FAILED])).name == "ens | 1"
    assert (directory / "ens | 1.out").read_text() == "hello\n"
    seen = await listed(running, [JobState.RUNNING])
    assert seen.started_at is not None
    assert seen.ends_at == seen.started_at + 300
    assert abs(seen.started_at - time.time()) < 60
    assert (await listed(queued, [JobState.QUEUED])).name == "-ens 3"
    assert await system.cancel(queued)
    assert await system.cancel(running)
    for id in (queued, running):
        assert (await listed(id, list(OVER))).state is JobState.CANCELLED
        assert not await system.cancel(id)
    assert not await system.cancel("99999")
    assert await system.history(running) is None
    error = await trouble_of(submit("true", "ens 4", "-p", "nope"))
    assert error.trouble is Trouble.PERMANENT
    assert "invalid partition specified: nope" in str(error)
