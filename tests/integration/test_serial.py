"""Serial mode when nothing interferes: what runs where, with what, how often, and what is on record of it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ensemble.core.model import Cause, NewApp, NewTask, Outcome, Output, Selector, TaskDetail
from ensemble.core.states import FINAL, State, is_legal_history
from tests.integration.launching import BOTH_MPI, WHEEL, Ensemble, Launched, path_of, sh

pytestmark = WHEEL

CORES = len(os.sched_getaffinity(0))
#: Tells, with nothing but the shell itself: where, from when to when, on what.
STAMPS = """
from=$EPOCHREALTIME
while read -r key value; do [ "$key" != Cpus_allowed_list: ] || cpus=$value; done </proc/$$/status
work=0; while [ $((work += 1)) -lt $1 ]; do :; done
echo "$ENSEMBLE_NODES $from $EPOCHREALTIME cpus=$cpus gpus=$CUDA_VISIBLE_DEVICES"
exit $2
"""


def stamps(packing: int, *, work: int = 1, status: int = 0, **fields: object) -> NewTask:
    command = ["bash", "-c", STAMPS, "stamps", str(work), str(status)]
    return NewTask(command=command, node_packing_count=packing, **{"name": "stamps", **fields})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stay:
    """What a task told of its run."""

    id: int
    share: Fraction
    node: str
    begin: float
    end: float
    cpus: frozenset[int]
    gpus: tuple[str, ...]


def numbers(text: str) -> frozenset[int]:
    """Read a list like 0-3,8."""
    ends = [part.split("-") for part in text.split(",")]
    return frozenset(n for each in ends for n in range(int(each[0]), int(each[-1]) + 1))


async def stays(ens: Ensemble) -> list[Stay]:
    found = []
    for task in await ens.tasks():
        if told := ens.output(task).split():
            node, begin, end, cpus, gpus = told
            found.append(
                Stay(
                    id=task.id,
                    share=Fraction(1, task.node_packing_count),
                    node=node,
                    begin=float(begin),
                    end=float(end),
                    cpus=numbers(cpus.removeprefix("cpus=")),
                    gpus=tuple(filter(None, gpus.removeprefix("gpus=").split(","))),
                )
            )
    return found


def companies(found: Iterable[Stay]) -> Iterable[list[Stay]]:
    """Yield, for each task that began, all that ran on its node at that moment, itself included."""
    found = list(found)
    for stay in found:
        yield [
            each for each in found if each.node == stay.node and each.begin <= stay.begin < each.end
        ]


def check_times(detail: TaskDetail) -> None:
    """What is on record of a task hangs together."""
    task = detail.task
    assert is_legal_history([(event.from_state, event.to_state) for event in detail.events])
    assert [attempt.attempt for attempt in detail.attempts] == [
        *range(1, len(detail.attempts) + 1)
    ], "an attempt's number was left out or used again"
    assert detail.attempts[-1].attempt == task.attempt
    for attempt in detail.attempts:
        assert attempt.outcome is not None
        assert attempt.ended_at is not None
        if attempt.started_at is not None:
            assert attempt.claimed_at <= attempt.started_at <= attempt.ended_at, attempt
            assert len(attempt.nodes) == 1


async def left(ens: Ensemble, launched: Launched) -> None:
    """It has left in good order: nothing of it is there, not even the key."""
    assert await ens.leave(launched, within_s=60) == 0, launched.log
    assert not (launched.run_directory / "link.json").exists()
    assert ens.processes() == []


@pytest.mark.parametrize("mpi", BOTH_MPI)
async def test_hundreds_of_mixed_tasks_run_once_each_and_never_more_than_fit(
    ens: Ensemble, mpi: str
) -> None:
    packings = [1, 2, 3, 4, 7, 16]
    tasks = [
        stamps(packings[n % 6], work=(n % 5) * 1500, status=0 if n % 10 else 1 + n % 7)
        for n in range(200)
    ]
    ids = await ens.store.add(tasks)
    launched = ens.launch("--idle-timeout=0", nodes=3, mode="serial", MPI_COMMAND=mpi)
    await left(ens, launched)
    nodes = set(launched.pilots())
    assert len(nodes) == 3
    for n, task_id in enumerate(ids):
        detail = await ens.store.detail(task_id)
        task, (*before, attempt) = detail.task, detail.attempts
        assert {each.outcome for each in before} <= {Outcome.GIVEN_BACK}
        status = 0 if n % 10 else 1 + n % 7
        assert task.state is (State.FAILED if status else State.JOB_FINISHED)
        assert (task.exit_code, attempt.exit_code) == (status, status)
        assert attempt.outcome is (Outcome.ERROR if status else Outcome.DONE)
        if status:
            assert (task.cause, task.reason) == (Cause.EXIT_CODE, str(status))
            assert task.error == ens.output(task).rstrip("\n")
        assert set(attempt.nodes) <= nodes
        assert attempt.nodes[0] == ens.output(task).split()[0]
        check_times(detail)
        assert not ens.output(task, ".1"), "it ran twice"
    found = await stays(ens)
    assert len(found) == 200
    assert {stay.node for stay in found} == nodes
    for company in companies(found):
        assert sum(stay.share for stay in company) <= 1, company
    assert "done=180" in launched.summary
    assert "error=20" in launched.summary


async def test_what_an_open_transaction_has_locked_stalls_no_task_of_another_shape(
    ens: Ensemble, psql: asyncpg.Connection[Any]
) -> None:
    locked = await ens.store.add([sh("true", node_packing_count=2, priority=1)] * 2)
    await ens.store.add([sh("true", node_packing_count=3)] * 6)
    await psql.execute("SET idle_in_transaction_session_timeout = 0")
    transaction = psql.transaction()
    await transaction.start()
    await psql.execute("SELECT FROM task WHERE id = ANY ($1) FOR SHARE", locked)
    await left(ens, ens.launch("--idle-timeout=0", nodes=1, mode="serial"))
    assert await ens.states() == [State.PREPROCESSED] * 2 + [State.JOB_FINISHED] * 6
    await transaction.rollback()


@pytest.mark.parametrize("is_pinned", [True, False])
async def test_tasks_that_run_at_once_share_no_core_and_no_gpu(
    ens: Ensemble, is_pinned: bool
) -> None:
    work = {"work": 20_000}
    await ens.store.add(
        [stamps(2, gpus_per_rank=1, **work) for _ in range(12)]
        + [stamps(2, **work, threads_per_rank=1, name="narrow") for _ in range(6)]
        + [stamps(1, gpus_per_rank=2, name="both"), stamps(2, gpus_per_rank=3, name="many")]
        + [stamps(2, cpu_affinity="none", **work, name="loose")]
        + [sh("true", ranks_per_node=2), sh("true", num_nodes=2)]
    )
    launched = ens.launch(
        "--idle-timeout=0",
        nodes=1,
        mode="serial",
        variables={"CUDA_VISIBLE_DEVICES": "2,3"},
        LAUNCHER_PIN_CPUS=str(is_pinned).lower(),
    )
    await left(ens, launched)
    tasks = {task.id: task for task in await ens.tasks()}
    left_alone = {task.name for task in tasks.values() if task.state is not State.JOB_FINISHED}
    assert left_alone == {"many", "sh"}
    assert {
        tasks[id].attempt for id in (tasks.keys() - {stay.id for stay in await stays(ens)})
    } == {0}
    told = {each["why"]: each["tasks"] for each in launched.events("tasks.left_alone")}
    assert [tasks for why, tasks in told.items() if "ranks" in why] == ["2"], launched.log
    assert [tasks for why, tasks in told.items() if "GPUs" in why] == ["1"], launched.log

    found = await stays(ens)
    wanted = {"stamps": 1, "both": 2}
    everything = frozenset(os.sched_getaffinity(0))
    for stay in found:
        name = tasks[stay.id].name
        if name in wanted:
            assert len(stay.gpus) == wanted[name]
            assert set(stay.gpus) <= {"2", "3"}
        if not is_pinned or name in ("loose", "both"):
            assert stay.cpus == everything
    for company in companies(found):
        gpus = [gpu for stay in company if tasks[stay.id].name in wanted for gpu in stay.gpus]
        assert len(gpus) == len(set(gpus)), company
        cpus = [cpu for stay in company if tasks[stay.id].name != "loose" for cpu in stay.cpus]
        if is_pinned and CORES > 1:
            assert len(cpus) == len(set(cpus)), company
    if is_pinned and CORES > 1:
        assert all(stay.cpus < everything for stay in found if tasks[stay.id].name == "stamps")


async def test_what_cannot_start_or_fails_says_why_and_is_retried(
    ens: Ensemble, tmp_path: Path
) -> None:
    ghost = tmp_path / "ghost"
    ghost.write_text("#!/no/such/interpreter\n")
    ghost.chmod(0o755)
    scripts = {
        "good": "echo noise; export FROM_SCRIPT='a b\nc'; mine=1; test -f ensemble.toml || exit 8",
        "bad": "echo no module >&2; exit 4",
        "hanging": "sleep 600",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"echo x >> {tmp_path}/{name}.runs\n{text}\n")
        app = NewApp(
            name=name, command="sh -c 'echo \"$FROM_SCRIPT$mine\"'", env_script=str(tmp_path / name)
        )
        await ens.store.add_app(app)  # fmt: skip
    shared = {"node_packing_count": 8}
    environ = {"X Y": " 'q\" \n", "HOME": "/nowhere", "ENSEMBLE_TASK_ID": "77"}
    many = {
        "missing": NewTask(command=["./missing"], name="missing", max_retries=1, **shared),
        "unknown": NewTask(command=["no-such-program-here"], name="unknown", **shared),
        "ghost": NewTask(command=[str(ghost)], name="ghost", **shared),
        "no-program": NewTask(command=["/etc/passwd"], name="no-program", **shared),
        "blocked": sh("true", name="blocked", **shared),
        "good": NewTask(app="good", name="good", **shared),
        "good too": NewTask(app="good", name="good", **shared),
        "bad": NewTask(app="bad", name="bad", **shared),
        "hanging": NewTask(app="hanging", name="hanging", priority=9, **shared),
        "environ": NewTask(command=["env", "-0"], name="environ", environ=environ, threads_per_rank=1, **shared),
        "plain": sh("exec env -0", name="plain", workflow="wf ü", **shared),
        "third time": sh("echo try $ENSEMBLE_ATTEMPT; exit $((ENSEMBLE_ATTEMPT < 3))", max_retries=5, **shared),
        "slow": sh("sleep 600", time_limit_minutes=0.01, **shared),
        "stubborn": sh("trap '' TERM; sleep 600; sleep 600", time_limit_minutes=0.01, **shared),
        "crash": sh("kill -SEGV $$", **shared),
        "tail": sh("yes | head -c 100000; printf '\\377end'", output=Output.TAIL, **shared),
        "bad tail": sh("seq 50; exit 3", output=Output.TAIL, **shared),
        "none": sh("echo something; exit 3", output=Output.NONE, **shared),
    }  # fmt: skip
    ids = dict(zip(many, await ens.store.add(many.values()), strict=True))
    blocked = ens.workdir(await ens.task(ids["blocked"]))
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    launched = ens.launch("--idle-timeout=0", nodes=1, mode="serial", LAUNCHER_POLL_S=0.5)
    finished = [id for name, id in ids.items() if name != "hanging"]

    async def others_are_done() -> bool:
        states = await ens.store.task_states(Selector(ids=tuple(finished)))
        return set(states.values()) <= FINAL

    await ens.eventually(others_are_done, within_s=60)
    await ens.store.kill([ids["hanging"]])
    await left(ens, launched)
    tasks = {name: await ens.task(id) for name, id in ids.items()}
    details = {name: await ens.store.detail(id) for name, id in ids.items()}
    for detail in details.values():
        check_times(detail)

    for name, reason in {
        "missing": "cannot run ./missing: No such file or directory",
        "unknown": "cannot run no-such-program-here: No such file or directory",
        "ghost": "the interpreter that its first line names does not exist",
        "no-program": "cannot run /etc/passwd: Permission denied",
        "blocked": "blocked",
        "bad": f"environment script {tmp_path}/bad failed with 4: no module",
    }.items():
        assert tasks[name].state is State.FAILED
        assert tasks[name].cause is Cause.COULD_NOT_START
        assert reason in (tasks[name].reason or ""), tasks[name]
        assert tasks[name].exit_code is None
    assert tasks["missing"].attempt == 2
    assert ens.output(tasks["good"]) == "a b\nc\n"
    assert {tasks["good"].state, tasks["good too"].state} == {State.JOB_FINISHED}
    assert (tmp_path / "good.runs").read_text() == "x\n", "it is run once per node"
    assert tasks["hanging"].state is State.USER_KILLED
    assert [a.outcome for a in details["hanging"].attempts] == [Outcome.GIVEN_BACK]

    env = _environ(ens.output(tasks["environ"]))
    assert env["X Y"] == " 'q\" \n"
    assert (env["HOME"], env["OMP_NUM_THREADS"]) == ("/nowhere", "1")
    assert env["ENSEMBLE_TASK_ID"] == str(ids["environ"]), "nobody gives himself out for another"
    env = _environ(ens.output(tasks["plain"]))
    assert "OMP_NUM_THREADS" not in env
    assert env["ENSEMBLE_WORKFLOW"] == "wf ü"
    assert (env["ENSEMBLE_SITE"], env["ENSEMBLE_ATTEMPT"]) == (str(ens.site.path), "1")
    assert env["PWD"] == str(ens.workdir(tasks["plain"]))

    third = tasks["third time"]
    assert (third.state, third.attempt, third.failures) == (State.JOB_FINISHED, 3, 2)
    assert [ens.output(third, suffix) for suffix in (".1", ".2", "")] == [
        "try 1\n",
        "try 2\n",
        "try 3\n",
    ]
    for name in ("slow", "stubborn"):
        assert tasks[name].state is State.FAILED
        assert tasks[name].cause is Cause.TIME_LIMIT
        assert details[name].attempts[0].reason == "0.01 minutes"
        assert State.RUN_TIMEOUT in path_of(details[name])
    assert (tasks["crash"].exit_code, tasks["crash"].reason) == (139, "SIGSEGV")
    kept = details["tail"].attempts[0].output
    assert kept is not None
    assert kept.endswith("y\n\N{REPLACEMENT CHARACTER}end")
    assert 10_000 < len(kept) <= 16384
    assert tasks["bad tail"].error == "\n".join(map(str, range(31, 51)))
    assert tasks["none"].error is None
    assert not (ens.workdir(tasks["none"]) / "sh.out").exists()


def _environ(text: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in text.rstrip("\0").split("\0"))


async def test_thousands_of_tasks_leave_no_descriptor_and_no_memory_behind(ens: Ensemble) -> None:
    launched = ens.launch("--persistent", nodes=1, mode="serial")
    (pilot,) = (await ens.joined(launched, 1)).values()
    kinds = [
        NewTask(command=["true"], name="t", node_packing_count=4),
        NewTask(command=["echo", "x"], name="t", node_packing_count=4, output=Output.TAIL),
        NewTask(command=["false"], name="t", node_packing_count=3, output=Output.NONE),
        NewTask(command=["./missing"], name="t", node_packing_count=2, output=Output.TAIL),
    ]

    async def run(count: int) -> None:
        await ens.store.add([kinds[0 if n % 8 else n // 8 % 4] for n in range(count)])

        async def all_done() -> bool:
            counts = (await ens.store.counts()).by_state
            return not (counts.keys() - FINAL)

        await ens.eventually(all_done, within_s=120)

    def footprint() -> tuple[int, int]:
        status = Path(f"/proc/{pilot}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return len(os.listdir(f"/proc/{pilot}/fd")), int(found[1])

    await run(200)
    files, memory_kb = footprint()
    await run(2000)
    assert footprint()[0] <= files
    assert footprint()[1] < memory_kb + 8 * 1024
    counts = (await ens.store.counts()).by_state
    assert sum(counts.values()) == 2200
    launched.signal(signal.SIGTERM)
    await left(ens, launched)


async def test_it_leaves_when_idle_and_stays_when_persistent(ens: Ensemble) -> None:
    persistent = ens.launch("--persistent", "--wf-filter=b", nodes=1, mode="serial")
    await ens.joined(persistent, 1)
    idle = ens.launch("--idle-timeout=1", "--wf-filter=a", nodes=2, mode="serial")
    await ens.joined(idle)
    (late,) = await ens.store.add([sh("sleep 0.1", workflow="a")])
    await ens.reach(State.JOB_FINISHED, late)
    await left(ens, idle)
    assert "no work is left" in idle.log
    assert persistent.guard.poll() is None
    (later,) = await ens.store.add([sh("sleep 0.1", workflow="b")])
    await ens.reach(State.JOB_FINISHED, later)
    persistent.signal(signal.SIGTERM)
    await left(ens, persistent)


async def test_slots_per_node_let_tasks_share_that_do_not_ask_to(ens: Ensemble) -> None:
    await ens.store.add([NewTask(command=["sleep", "600"]) for _ in range(7)])
    launched = ens.launch("--persistent", "--slots-per-node=3", nodes=2, mode="serial")
    await ens.eventually(lambda: len(ens.processes()) == 6, within_s=60)
    running = [task for task in await ens.tasks() if task.state is State.RUNNING]
    launched.signal(signal.SIGTERM)
    await left(ens, launched)
    assert len(running) <= 6
    assert sorted(await ens.states()) == [State.PREPROCESSED] + [State.RESTART_READY] * 6


async def test_children_run_after_their_parents_though_they_are_sent_ahead(ens: Ensemble) -> None:
    chain = [
        sh(
            'echo $1 >> "$ENSEMBLE_SITE/log/order"',
            str(n),
            name=f"link-{n}",
            parents=[f"link-{n - 1}"] if n else [],
        )
        for n in range(30)
    ]
    failing = [sh("exit 1", name="fails"), sh("true", name="never", parents=["fails"])]
    order = ens.site.path / "log" / "order"
    order.unlink(missing_ok=True)
    ids = await ens.run(*chain, *failing, mode="serial")
    assert order.read_text().split() == [str(n) for n in range(30)]
    order.unlink()
    never = await ens.task(ids[-1])
    assert (never.state, never.cause, never.attempt) == (State.FAILED, Cause.PARENT, 0)
