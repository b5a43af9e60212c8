"""What every scheduler must do, driver by driver: against the fake batch system, and `local` by itself.

Where schedulers differ in what they can tell, a table here says so.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from ensemble.core.batchjob import JobState
from ensemble.drivers import batch
from ensemble.drivers.batch import SCHEDULERS
from ensemble.drivers.nodes import find_allocation
from ensemble.drivers.scheduler import Request
from ensemble.errors import SchedulerError, Trouble
from tests.conformance.conftest import Machine

#: Those whose commands are the fake's, and can go wrong.
FAKED = tuple(name for name in SCHEDULERS if name != "local")

QUEUED, RUNNING = JobState.QUEUED, JobState.RUNNING
FINISHED, FAILED = JobState.FINISHED, JobState.FAILED
TIMEOUT, CANCELLED = JobState.TIMEOUT, JobState.CANCELLED

#: How an end looks, None: the scheduler forgets a job that has ended. Cobalt always does; Grid Engine knows
#: that a job was killed, and not by whom, and has no account of one that never ran.
WELL = dict.fromkeys(SCHEDULERS, FINISHED) | {"cobalt": None}
BADLY = dict.fromkeys(SCHEDULERS, FAILED) | {"cobalt": None}
OUT_OF_TIME = dict.fromkeys(SCHEDULERS, TIMEOUT) | {"cobalt": None, "sge": FAILED}
CANCELLED_RUNNING = dict.fromkeys(SCHEDULERS, CANCELLED) | {"cobalt": None, "sge": FAILED}
CANCELLED_QUEUED = dict.fromkeys(SCHEDULERS, CANCELLED) | {"cobalt": None, "sge": None}

#: How a job asks for a minute, for more than the machine allows, for two nodes, for a queue.
MINUTE = {
    "slurm": ("-t", "1"),
    "pbs": ("-l", "walltime=00:01:00"),
    "cobalt": ("-t", "1"),
    "lsf": ("-W", "00:01"),
    "sge": ("-l", "h_rt=00:01:00"),
    "flux": ("-t", "1m"),
    "local": ("--time", "0.005"),
}
TWO_HOURS = {
    "slurm": ("--time=02:00:00",),
    "pbs": ("-l", "walltime=02:00:00"),
    "cobalt": ("-t", "120"),
    "lsf": ("-W", "120"),
    "sge": ("-l", "h_rt=7200"),
    "flux": ("-t", "2h"),
}
TWO_NODES = {
    "slurm": ("-N", "2"),
    "pbs": ("-l", "select=2:ncpus=4"),
    "cobalt": ("-n", "2"),
    "lsf": ("-nnodes", "2"),
    "sge": ("-pe", "mpi", "2"),
    "flux": ("-N", "2"),
    "local": ("--nodes", "2"),
}
QUEUE = dict.fromkeys(SCHEDULERS, "-q") | {"slurm": "-p"}
#: The words for a queue that there is not.
UNKNOWN_QUEUE = {
    "slurm": "invalid partition specified: nope",
    "pbs": "Unknown queue",
    "cobalt": "Queue 'nope' does not exist",
    "lsf": "nope: No such queue",
    "sge": 'unknown queue "nope"',
    "flux": "Invalid queue 'nope'",
}
DIRECTIVE = {
    "slurm": "#SBATCH -p nope",
    "pbs": "#PBS -q nope",
    "cobalt": "#COBALT -q nope",
    "lsf": "#BSUB -q nope",
    "sge": "#$ -q nope",
    "flux": "# flux: -q nope",
}
#: What a job hears when it is cancelled, and seconds of the test for a second of the scheduler's: graces differ
#: from 5 s to 10 minutes.
HEARD = {
    "slurm": (["TERM"], 0.05),
    "pbs": (["TERM"], 0.1),
    "cobalt": (["TERM"], 0.005),
    "lsf": (["INT", "TERM"], 0.1),
    "sge": (["USR2"], 0.02),
    "flux": (["TERM"], 0.2),
    "local": (["TERM"], 0),
}
#: Whether the end of the allocation can be told inside of it.
HAS_END = dict.fromkeys(SCHEDULERS, True) | {"sge": False}

SLEEP = "echo started; exec sleep 60"
STUBBORN = """
for each in HUP INT TERM USR1 USR2; do trap "echo heard $each" $each; done
echo started
while :; do sleep 0.02; done
"""


every = pytest.mark.parametrize("kind", SCHEDULERS)
faked = pytest.mark.parametrize("kind", FAKED)


async def end_of(machine: Machine, job_id: str, ends: dict[str, Any]) -> Any:
    """Wait for the end that a table promises for this scheduler, and return what is told of it."""
    return await machine.wait_for(job_id, ends[machine.kind])


async def trouble_of(awaited: Any) -> SchedulerError:
    with pytest.raises(SchedulerError) as caught:
        await awaited
    assert "\n" not in str(caught.value)
    return caught.value


# The life of a job


@every
async def test_a_job_runs_to_its_end(machine: Machine) -> None:
    request = machine.request("echo hello; echo oops >&2; read -r line; exit 0")
    job_id = await machine.system().submit(request)
    assert job_id.strip() == job_id != ""
    seen = await end_of(machine, job_id, WELL)
    assert seen is None or seen.exit_code in (0, None)
    await machine.wait_for_text(request.output, "oops")
    assert "hello" in request.output.read_text()


@every
async def test_an_exit_status_is_a_failure(machine: Machine) -> None:
    system = machine.system()
    job_id = await system.submit(machine.request("exit 3"))
    seen = await end_of(machine, job_id, BADLY)
    if seen is not None:
        told = seen if seen.exit_code is not None else await system.history(job_id)
        assert told is not None
        assert told.exit_code == 3


@every
async def test_jobs_are_listed_by_their_names(machine: Machine) -> None:
    system = machine.system()
    requests = [machine.request(SLEEP) for _ in range(3)]
    ids = [await system.submit(request) for request in requests]
    assert len(set(ids)) == 3
    await machine.wait_for(ids[0], RUNNING)
    await machine.wait_for(ids[1], RUNNING)
    listed = {seen.id: seen for seen in await system.listing(ids)}
    assert [listed[job_id].name for job_id in ids] == [request.name for request in requests]
    assert [listed[job_id].state for job_id in ids] == [RUNNING, RUNNING, QUEUED]
    assert not any(seen.is_stuck for seen in listed.values())
    begun = listed[ids[0]].started_at
    assert begun is None or abs(time.time() - begun) < 60


@every
async def test_names_are_found_unchanged(machine: Machine) -> None:
    names = ["ens-my.site_1-7f3a-12", "e" + "n" * 62, "ens-0-DEADbeef-1"]
    system = machine.system()
    ids = [await system.submit(machine.request(SLEEP, name=name)) for name in names]
    listed = {seen.id: seen.name for seen in await system.listing([])}
    assert [listed[job_id] for job_id in ids] == names


@every
async def test_many_at_once_get_ids_of_their_own(machine: Machine) -> None:
    system = machine.system()
    async with asyncio.TaskGroup() as group:
        workers = [
            group.create_task(system.submit(machine.request("exec sleep 60"))) for _ in range(8)
        ]
    ids = {worker.result() for worker in workers}
    assert len(ids) == 8
    assert ids <= {seen.id for seen in await system.listing([])}


@every
async def test_an_empty_queue_is_empty(machine: Machine) -> None:
    assert await machine.system().listing([]) == []


# Ends from outside


@every
async def test_cancel_a_queued_job(machine: Machine) -> None:
    system = machine.system()
    ids = [await system.submit(machine.request(SLEEP)) for _ in range(3)]
    await machine.wait_for(ids[1], RUNNING)
    assert await system.cancel(ids[2])
    await end_of(machine, ids[2], CANCELLED_QUEUED)
    assert not await system.cancel(ids[2])


@every
async def test_cancel_a_running_job(machine: Machine) -> None:
    system = machine.system()
    request = machine.request(SLEEP)
    job_id = await system.submit(request)
    await machine.wait_for_text(request.output, "started")
    assert await system.cancel(job_id)
    await end_of(machine, job_id, CANCELLED_RUNNING)
    assert not await system.cancel(job_id)


@every
async def test_cancel_a_job_that_has_ended(machine: Machine) -> None:
    system = machine.system()
    job_id = await system.submit(machine.request("exit 0"))
    await end_of(machine, job_id, WELL)
    assert not await system.cancel(job_id)


@every
async def test_the_time_limit_ends_a_job(machine: Machine) -> None:
    machine.turn(second=0.005)
    job_id = await machine.system().submit(machine.request(SLEEP, *MINUTE[machine.kind]))
    await end_of(machine, job_id, OUT_OF_TIME)


@every
async def test_a_cancelled_job_hears_its_schedulers_signals(machine: Machine) -> None:
    expected, second = HEARD[machine.kind]
    machine.turn(room=2, second=second)
    request = machine.request(STUBBORN, *(("--grace", "1") if machine.kind == "local" else ()))
    system = machine.system()
    job_id = await system.submit(request)
    await machine.wait_for_text(request.output, "started")
    assert await system.cancel(job_id)
    await end_of(machine, job_id, CANCELLED_RUNNING)
    assert heard_in(request) == expected


@pytest.mark.parametrize("kind", ["lsf"])
async def test_at_the_limit_lsf_sends_usr2_and_waits(machine: Machine) -> None:
    machine.turn(second=0.01)
    request = machine.request(STUBBORN, *MINUTE["lsf"])
    await machine.system().submit(request)
    await machine.wait_for_text(request.output, "heard USR2")
    assert heard_in(request) == ["USR2"]


def heard_in(request: Request) -> list[str]:
    return [
        line.removeprefix("heard ")
        for line in request.output.read_text().splitlines()
        if "heard" in line
    ]


# What a job finds


@every
async def test_a_job_finds_its_allocation(machine: Machine) -> None:
    request = machine.request(
        "env -0 > env.new; mv env.new env; exec sleep 60", *TWO_NODES[machine.kind]
    )
    job_id = await machine.system().submit(request)
    path = machine.path / "env"
    await machine.eventually(path.exists, within_s=30)
    environ = dict(word.split("=", 1) for word in path.read_text().split("\0") if word)
    found = await find_allocation(environ, virtual_nodes=None, now=time.time())
    assert (found.scheduler, found.job_id) == (machine.kind, job_id)
    assert len(found.nodes) == 2
    assert len({node.name for node in found.nodes}) == 2
    if machine.kind != "local":
        assert [node.name for node in found.nodes] == ["nid001", "nid002"]
        assert (found.ends_at is not None) == HAS_END[machine.kind]


# What is refused


@faked
@pytest.mark.parametrize("where", ["flags", "script"])
async def test_an_unknown_queue_is_refused_for_good(machine: Machine, where: str) -> None:
    flags = (QUEUE[machine.kind], "nope") if where == "flags" else ()
    request = machine.request(
        f"{DIRECTIVE[machine.kind] if where == 'script' else ''}\nexit 0", *flags
    )
    error = await trouble_of(machine.system().submit(request))
    assert error.trouble is Trouble.PERMANENT
    assert UNKNOWN_QUEUE[machine.kind] in str(error)


@faked
async def test_flags_win_over_directives(machine: Machine) -> None:
    request = machine.request(f"{DIRECTIVE[machine.kind]}\nexit 0", QUEUE[machine.kind], "debug")
    assert await machine.system().submit(request)


@faked
async def test_too_long_a_job_is_refused_for_good(machine: Machine) -> None:
    request = machine.request("exit 0", *TWO_HOURS[machine.kind])
    assert (await trouble_of(machine.system().submit(request))).trouble is Trouble.PERMANENT


@every
async def test_a_missing_script_is_refused_for_good(machine: Machine) -> None:
    request = machine.request("exit 0")
    request.script.unlink()
    assert (await trouble_of(machine.system().submit(request))).trouble is Trouble.PERMANENT


@faked
async def test_too_many_jobs_wait_for_capacity(machine: Machine) -> None:
    machine.turn(room=2, most=1)
    system = machine.system()
    await system.submit(machine.request(SLEEP))
    error = await trouble_of(system.submit(machine.request(SLEEP)))
    assert error.trouble is Trouble.CAPACITY
    assert len(await system.listing([])) == 1


@faked
async def test_a_server_that_is_away_is_tried_again(machine: Machine) -> None:
    system = machine.system()
    job_id = await system.submit(machine.request(SLEEP))
    machine.turn(is_down=True)
    assert (await trouble_of(system.submit(machine.request(SLEEP)))).trouble is Trouble.RETRY
    assert (await trouble_of(system.listing([job_id]))).trouble is Trouble.RETRY
    assert (await trouble_of(system.cancel(job_id))).trouble is Trouble.RETRY
    machine.turn()
    assert [seen.id for seen in await system.listing([])] == [job_id]


@faked
async def test_without_its_commands_one_line_says_so(machine: Machine) -> None:
    machine.environ["PATH"] = str(machine.path)
    error = await trouble_of(machine.system().submit(machine.request("exit 0")))
    assert error.trouble is Trouble.PERMANENT
    assert "on PATH" in str(error)


# What is uncertain


@faked
async def test_a_submission_that_hangs_is_looked_up_by_name(machine: Machine) -> None:
    machine.turn(hangs_after_accept=True)
    request = machine.request(SLEEP)
    error = await trouble_of(machine.system(timeout_s=1).submit(request))
    assert error.trouble is Trouble.UNSURE
    found = [seen for seen in await machine.system().listing([]) if seen.name == request.name]
    assert [seen.state in (QUEUED, RUNNING) for seen in found] == [True]
    assert await machine.system().cancel(found[0].id)
    await machine.wait_for(
        found[0].id, CANCELLED_RUNNING[machine.kind], CANCELLED_QUEUED[machine.kind]
    )


@faked
async def test_a_silent_submission_is_looked_up_by_name(machine: Machine) -> None:
    machine.turn(is_silent=True)
    request = machine.request(SLEEP)
    assert (await trouble_of(machine.system().submit(request))).trouble is Trouble.UNSURE
    assert [seen.name for seen in await machine.system().listing([])] == [request.name]


NONSENSE = [
    "",
    "\n",
    "hello\n",
    "{}\n",
    "[]\n",
    "<html><body>maintenance</body></html>\n",
    "\x00\x01",
    "{" * 500,
]


@faked
async def test_a_nonsense_answer_is_no_id(machine: Machine) -> None:
    for text in NONSENSE:
        machine.turn(nonsense={"submit": text})
        error = await trouble_of(machine.system().submit(machine.request("true")))
        assert error.trouble is Trouble.UNSURE


@faked
async def test_a_nonsense_listing_is_never_an_empty_one(machine: Machine) -> None:
    for text in NONSENSE:
        machine.turn(nonsense={"status": text})
        assert (await trouble_of(machine.system().listing([]))).trouble is Trouble.RETRY


@faked
async def test_a_truncated_listing_is_never_an_empty_one(machine: Machine) -> None:
    system = machine.system()
    await system.submit(machine.request(SLEEP))
    # Where a line of text ends there may be no telling, but within one there is.
    for cut in (1, 2, 7, 12):
        if machine.kind not in ("slurm", "cobalt") and cut == 1:
            continue  # JSON and XML are whole without their last line feed
        machine.turn(cut=cut)
        assert (await trouble_of(system.listing([]))).trouble is Trouble.RETRY
    machine.turn(cut=100_000)
    assert (await trouble_of(system.listing([]))).trouble is Trouble.RETRY


@faked
async def test_a_job_may_vanish_from_the_listing(machine: Machine) -> None:
    system = machine.system()
    gone, other = machine.request(SLEEP), machine.request(SLEEP)
    gone_id, other_id = await system.submit(gone), await system.submit(other)
    machine.turn(vanished=[gone.name])
    assert [seen.id for seen in await system.listing([gone_id, other_id])] == [other_id]
    assert await system.history(gone_id) is None
    machine.turn()
    assert {seen.id for seen in await system.listing([gone_id, other_id])} == {gone_id, other_id}


@faked
async def test_noise_on_standard_error_does_not_matter(machine: Machine) -> None:
    machine.turn(
        noise="Warning: the file system /home is 97 % full {[<\nerror: locale: C.UTF-8?", room=2
    )
    system = machine.system()
    request = machine.request(SLEEP)
    job_id = await system.submit(request)
    await machine.wait_for(job_id, RUNNING)
    assert [(seen.id, seen.name) for seen in await system.listing([])] == [(job_id, request.name)]
    assert await system.cancel(job_id)
    await end_of(machine, job_id, CANCELLED_RUNNING)
    assert not await system.cancel(job_id)


@faked
async def test_a_listing_that_takes_too_long_is_tried_again(machine: Machine) -> None:
    machine.turn(latency_s={"status": 30})
    assert (await trouble_of(machine.system(timeout_s=0.3).listing([]))).trouble is Trouble.RETRY


@faked
async def test_a_scheduler_is_recognised_by_its_programs(machine: Machine) -> None:
    assert batch.find_scheduler_names({"PATH": machine.environ["PATH"].partition(":")[0]}) == [
        machine.kind
    ]
