"""What a launcher does with its tasks when nothing interferes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from ensemble.core.model import Cause, NewApp, NewTask, Outcome
from ensemble.core.states import State
from tests.integration.launching import BOTH_MPI, WHEEL, Ensemble, mpi_environ, path_of, python, sh

pytestmark = WHEEL

HELLO = [sys.executable, "-m", "mpi4py.bench", "helloworld"]
HOSTILE = [
    "",
    " ",
    "a b",
    "'",
    '"',
    "a\nb",
    "\t",
    "ünï ☃ 日本",
    "-n",
    "--",
    "--help",
    "$HOME",
    "`id`",
    "*",
    "\\",
    "a;b",
    "%s{}",
]
TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"


def told(ens: Ensemble, task) -> tuple[list[str], dict[str, str]]:
    argv, environ = json.loads(ens.output(task))
    return argv, environ


@pytest.mark.parametrize("mpi", BOTH_MPI)
async def test_a_mixed_ensemble_runs_each_task_once(ens: Ensemble, mpi: str) -> None:
    good = [sh('echo "$1"; sleep 0.0$1', str(n), name=f"good-{n}") for n in range(8)]
    world = [
        NewTask(command=HELLO, name="pair", ranks_per_node=2, environ=mpi_environ(mpi)),
        NewTask(command=HELLO, name="wide", num_nodes=2, environ=mpi_environ(mpi)),
    ]
    bad = [sh(f"echo line; echo last words >&2; exit {n}", name=f"bad-{n}") for n in (1, 2, 77)]
    bad += [sh("kill -SEGV $$", name="crash"), NewTask(command=["./missing", "x"], name="missing")]
    bad += [
        NewTask(command=["./missing"], name="missing-ranks", ranks_per_node=2),
        NewTask(command=["false"], name="false-ranks", ranks_per_node=2),
        NewTask(command=["/etc/passwd"], name="not-a-program"),
    ]
    tasks = [*good[:4], *world, *bad, *world, *good[4:]]
    await ens.run(*tasks, nodes=4, MPI_COMMAND=mpi)

    found = {task.id: task for task in await ens.tasks()}
    for task in found.values():
        wanted = State.FAILED if task.name in {b.name for b in bad} else State.JOB_FINISHED
        assert task.state is wanted, task
        assert (task.attempt, task.failures) == (1, int(wanted is State.FAILED))
        detail = await ens.store.detail(task.id)
        assert [a.outcome for a in detail.attempts].count(Outcome.DONE) == int(
            wanted is State.JOB_FINISHED
        )
        assert path_of(detail)[0] is State.PREPROCESSED
        assert path_of(detail)[-1] is wanted
        assert len(detail.attempts[0].nodes) == task.num_nodes
        assert detail.attempts[0].ended_at >= (
            detail.attempts[0].started_at or detail.attempts[0].claimed_at
        )
    by_name = {task.name: task for task in found.values()}
    for n in range(8):
        assert ens.output(by_name[f"good-{n}"]) == f"{n}\n"
    for name in ("pair", "wide"):
        lines = ens.output(by_name[name]).splitlines()
        assert sorted(line.split("process ")[1].split(" on")[0] for line in lines) == [
            "0 of 2",
            "1 of 2",
        ]
    for n in (1, 2, 77):
        bad_one = by_name[f"bad-{n}"]
        assert (bad_one.exit_code, bad_one.cause, bad_one.reason) == (n, Cause.EXIT_CODE, str(n))
        assert bad_one.error == "line\nlast words"
    crash = by_name["crash"]
    assert (crash.exit_code, crash.cause, crash.reason) == (139, Cause.SIGNAL, "SIGSEGV")
    for name, what in (
        ("missing", "cannot run ./missing: No such file or directory"),
        ("not-a-program", "cannot run /etc/passwd: Permission denied"),
    ):
        task = by_name[name]
        assert (task.cause, task.reason, task.exit_code) == (Cause.COULD_NOT_START, what, None)
    assert by_name["missing-ranks"].cause is Cause.COULD_NOT_START
    assert by_name["missing-ranks"].reason == f"{mpi} could not start ./missing"
    assert (by_name["false-ranks"].cause, by_name["false-ranks"].exit_code) == (Cause.EXIT_CODE, 1)
    assert "done=12" in ens.launchers[0].summary
    assert "error=8" in ens.launchers[0].summary


async def test_arguments_and_environment_arrive_unchanged(
    ens: Ensemble, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUTER", "kept")
    monkeypatch.setenv("PMI_RANK", "7")
    script = tmp_path / "it's an env.sh"
    script.write_text("echo noise; export FROM_SCRIPT='a b\nc' OUTER=changed; cd /\n")
    bad_script = tmp_path / "bad.sh"
    bad_script.write_text("printf 'no\\0 module\\n' >&2; exit 4\n")
    await ens.store.add_app(
        NewApp(name="scripted", command=f"{sys.executable} -c '{TELL}'", env_script=str(script))
    )
    await ens.store.add_app(NewApp(name="broken", command="true", env_script=str(bad_script)))
    parent = python(TELL, *HOSTILE, name="plain", workflow="wf ü")
    # A file for each rank: MPI launchers may join the lines of two.
    apart = 'import os, sys; sys.stdout = open(f"told.{os.getpid()}", "w"); '
    child = python(apart + TELL, *HOSTILE, name="ranks", ranks_per_node=2, environ={"X Y": " 'q\" \n"},
                   parents=["plain"], threads_per_rank=3)  # fmt: skip
    scripted = NewTask(app="scripted", environ={"MINE": "1"}, name="scripted")
    await ens.run(parent, child, scripted, NewTask(app="broken"))
    tasks = {task.name: task for task in await ens.tasks()}

    argv, env = told(ens, tasks["plain"])
    assert argv == HOSTILE
    assert env["OUTER"] == "kept"
    assert not [name for name in env if name.startswith(("ENSEMBLE_GUARD_", "PMI_"))]
    assert "OMP_NUM_THREADS" not in env
    assert env["ENSEMBLE_SITE"] == str(ens.site.path)
    assert env["ENSEMBLE_TASK_ID"] == str(tasks["plain"].id)
    assert env["ENSEMBLE_ATTEMPT"] == "1"
    assert env["ENSEMBLE_WORKFLOW"] == "wf ü"
    assert env["ENSEMBLE_PARENT_IDS"] == ""
    assert env["ENSEMBLE_NODES"] == tasks["plain"].nodes[0]

    files = list(ens.workdir(tasks["ranks"]).glob("told.*"))
    assert len(files) == 2
    for file in files:
        argv, env = json.loads(file.read_text())
        assert argv == HOSTILE
        assert env["X Y"] == " 'q\" \n"
        assert env["OMP_NUM_THREADS"] == "3"
        assert env["ENSEMBLE_PARENT_IDS"] == str(tasks["plain"].id)

    _, env = told(ens, tasks["scripted"])
    assert (env["FROM_SCRIPT"], env["OUTER"], env["MINE"]) == ("a b\nc", "changed", "1")

    assert tasks["broken"].state is State.FAILED
    assert tasks["broken"].cause is Cause.COULD_NOT_START
    assert "failed with 4: no module" in tasks["broken"].reason


async def test_stated_threads_win_over_the_launchers_own(ens: Ensemble, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ids = await ens.run(
        sh("echo $OMP_NUM_THREADS", threads_per_rank=2),
        sh("echo $OMP_NUM_THREADS", threads_per_rank=2, environ={"OMP_NUM_THREADS": "5"}),
    )
    assert [ens.output(await ens.task(id)) for id in ids] == ["2\n", "5\n"]


async def test_a_task_has_a_session_an_empty_input_and_no_foreign_descriptor(ens: Ensemble) -> None:
    script = (
        "import os, sys, json; print(json.dumps([os.getsid(0) == os.getpid(), sys.stdin.read(), "
        "sorted(os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd') "
        "if os.path.lexists(f'/proc/self/fd/{fd}')), os.getcwd(), "
        "open('/proc/self/status').read().split('SigBlk:')[1].split()[0]]))"
    )
    (task_id,) = await ens.run(python(script))
    task = await ens.task(task_id)
    is_leader, text, descriptors, cwd, blocked = json.loads(ens.output(task))
    output = str(ens.workdir(task) / "python.out")
    assert (is_leader, text, cwd, int(blocked, 16)) == (True, "", str(ens.workdir(task)), 0)
    assert descriptors == ["/dev/null", output, output]


async def test_larger_then_longer_first_and_priority_before_both(ens: Ensemble) -> None:
    short, wide, long_wide, long_one = ids = await ens.run(
        sh("sleep 0.1"),
        sh("sleep 0.1", num_nodes=2, wall_time_minutes=1),
        sh("sleep 0.1", num_nodes=2, wall_time_minutes=5),
        sh("sleep 0.1", wall_time_minutes=9),
    )
    started = await ens.starts()
    assert started[:2] == [long_wide, wide]
    assert set(started[2:]) == {short, long_one}
    await ens.store.remove(ids)
    urgent = [
        sh("sleep 0.02", wall_time_minutes=n, priority=p)
        for n, p in [(9, 0), (1, 0), (5, 0), (0, 7), (3, -1)]
    ]
    nine, one, five, first, last = await ens.run(*urgent, nodes=1)
    assert await ens.starts() == [first, nine, five, one, last]


async def test_a_task_that_does_not_fit_the_time_left_is_not_started(ens: Ensemble) -> None:
    ids = await ens.store.add(
        [sh("true", wall_time_minutes=n) for n in (5, 1, 0)] + [sh("true", num_nodes=3)]
    )
    launched = ens.launch("--idle-timeout=0", "--time-limit-minutes=1.5")
    assert await ens.leave(launched) == 0
    done, new = State.JOB_FINISHED, State.PREPROCESSED
    assert await ens.states() == [new, done, done, new]
    assert [(await ens.task(id)).attempt for id in ids] == [0, 1, 1, 0]


async def test_with_no_useful_time_left_it_leaves_at_once(ens: Ensemble) -> None:
    await ens.store.add([sh("true")])
    launched = ens.launch("--persistent", "--time-limit-minutes=0.5", LAUNCHER_MIN_USEFUL_S=60)
    assert await ens.leave(launched) == 0
    assert await ens.states() == [State.PREPROCESSED]


async def test_limits_and_retries(ens: Ensemble) -> None:
    count = "echo x >> n; n=$(wc -l < n); echo attempt $n; "
    ids = await ens.run(
        sh("echo so far; exec sleep 60", time_limit_minutes=0.005, max_retries=1, name="limited"),
        sh(count + "test $n = 3", max_retries=2, name="third-time"),
        sh(count + "exit 5", max_retries=1, name="never"),
        sh("true", parents=["third-time"]),
        sh("true", parents=["never"], name="orphan"),
        nodes=4,
    )
    limited, third, never, child, orphan = [await ens.store.detail(id) for id in ids]
    assert limited.task.state is State.FAILED
    assert limited.task.cause is Cause.TIME_LIMIT
    assert limited.task.error == "so far"
    assert [a.outcome for a in limited.attempts] == [Outcome.TIMEOUT] * 2
    run = [State.RUNNING, State.RUN_TIMEOUT]
    assert path_of(limited) == [State.PREPROCESSED, *run, State.RESTART_READY, *run, State.FAILED]
    assert third.task.state is State.JOB_FINISHED
    assert [a.exit_code for a in third.attempts] == [1, 1, 0]
    assert [ens.output(third.task, s) for s in ("", ".1", ".2", ".3")] == [
        "attempt 3\n", "attempt 1\n", "attempt 2\n", "",
    ]  # fmt: skip
    assert (never.task.state, never.task.attempt, never.task.exit_code) == (State.FAILED, 2, 5)
    assert child.task.state is State.JOB_FINISHED
    assert child.attempts[0].claimed_at >= third.attempts[-1].ended_at
    assert (orphan.task.state, orphan.task.cause) == (State.FAILED, Cause.PARENT)
    assert orphan.attempts == ()


async def test_chains_run_in_order_and_without_waiting_for_a_poll(ens: Ensemble) -> None:
    log = ens.site.path / "log" / "chain"
    log.unlink(missing_ok=True)
    tasks = [
        sh(f'echo {n} >> "$1"', str(log), name=f"t{n}", parents=[f"t{n - 1}"] if n else [])
        for n in range(12)
    ]
    # Twelve links before the first poll.
    await ens.run(*tasks, LAUNCHER_POLL_S=60)
    assert log.read_text().split() == [str(n) for n in range(12)]


async def test_a_wide_task_starts_as_soon_as_enough_nodes_are_free(ens: Ensemble) -> None:
    # Both nodes become free at the same moment: the question for the first must not hide the second.
    await ens.store.add([sh("sleep 0.3"), sh("sleep 0.3"), sh("true", num_nodes=2, parents=[])] * 3)
    launched = ens.launch("--persistent", LAUNCHER_POLL_S=600)
    await ens.reach(State.JOB_FINISHED, within_s=60)
    launched.signal(15)
    assert await ens.leave(launched) == 0


async def test_a_persistent_launcher_hears_of_new_work_at_once(ens: Ensemble) -> None:
    launched = ens.launch(
        "--persistent", "--idle-timeout=0", "--wf-filter=al%ha", LAUNCHER_POLL_S=600
    )
    await ens.leased(launched)
    await ens.eventually(lambda: len(launched.log) > 0)
    await asyncio.sleep(0)  # the listener may not be there yet: that must not matter
    (first,) = await ens.store.add([sh("true", workflow="x-al%ha-1")])
    await ens.reach(State.JOB_FINISHED, first, within_s=30)
    for n in range(3):  # also a workflow that did not exist when it started
        (later, other) = await ens.store.add(
            [sh("true", workflow=f"al%ha-{n}"), sh("true", workflow="alpha")]
        )
        await ens.reach(State.JOB_FINISHED, later, within_s=30)
        assert (await ens.task(other)).state is State.PREPROCESSED
    assert launched.guard.poll() is None
    launched.signal(15)
    assert await ens.leave(launched) == 0


async def test_it_leaves_after_its_idle_time_but_not_while_children_may_come(ens: Ensemble) -> None:
    parent, child = await ens.store.add(
        [
            sh("until test -e go; do sleep 0.02; done", name="p", workflow="a"),
            sh("true", parents=["p"], workflow="b"),
        ]
    )
    other = ens.launch("--idle-timeout=0.3", "--wf-filter=a")
    await ens.reach(State.RUNNING, parent)
    waiting = ens.launch("--idle-timeout=0.3", "--wf-filter=b")
    await ens.leased(waiting)
    await asyncio.sleep(1)  # more than its idle time
    assert waiting.guard.poll() is None, waiting.log
    (ens.workdir(await ens.task(parent)) / "go").touch()
    assert await ens.leave(other) == 0
    assert await ens.leave(waiting) == 0
    assert (await ens.task(child)).state is State.JOB_FINISHED
    assert (await ens.task(child)).nodes[0]
    assert "done=1" in waiting.summary


async def test_what_the_file_system_refuses_fails_the_task_only(ens: Ensemble) -> None:
    ids = await ens.store.add(
        [sh("true", name="blocked"), sh("echo fine", name="fine"), sh("rm -rf ../gone_*", name="gone"),
         sh("cat no/such/file || kill -9 $$", name="a b'c")]
    )  # fmt: skip
    blocked, fine, gone, odd = [await ens.task(id) for id in ids]
    ens.workdir(blocked).parent.mkdir(parents=True)
    ens.workdir(blocked).write_text("a file where a directory should be")
    launched = ens.launch("--idle-timeout=0")
    assert await ens.leave(launched) == 0
    blocked, fine, gone, odd = [await ens.task(id) for id in ids]
    assert (blocked.state, blocked.cause) == (State.FAILED, Cause.COULD_NOT_START)
    assert str(ens.workdir(blocked)) in blocked.reason
    assert (fine.state, gone.state) == (State.JOB_FINISHED, State.JOB_FINISHED)
    assert (odd.state, odd.cause, odd.reason) == (State.FAILED, Cause.SIGNAL, "SIGKILL")
    assert "no/such/file" in odd.error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_work_directory_that_may_not_be_written(ens: Ensemble) -> None:
    (task_id,) = await ens.store.add([sh("true")])
    folder = ens.workdir(await ens.task(task_id))
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    launched = ens.launch("--idle-timeout=0")
    assert await ens.leave(launched) == 0
    task = await ens.task(task_id)
    assert (task.state, task.cause) == (State.FAILED, Cause.COULD_NOT_START)
    assert "Permission denied" in task.reason


async def test_a_flood_of_output_and_what_is_no_text(ens: Ensemble) -> None:
    flood = "import sys\nfor n in range(50): sys.stdout.write('x' * 1023 + '\\n')\n" * 1
    big = python(
        "import sys; sys.stdout.buffer.write(b'\\x00\\xff\\x1b[31m' * 10)\n"
        "for n in range(50): sys.stdout.write(('x' * 1023 + '\\n') * 1024)\n"
        "print('the end', flush=True); sys.exit(9)",
        name="big",
    )
    binary = sh("printf 'a\\000b\\377\\033[1mc\\n'; exit 1", name="binary")
    ids = await ens.run(big, binary, python(flood))
    big_task, binary_task, _ = [await ens.task(id) for id in ids]
    assert (ens.workdir(big_task) / "big.out").stat().st_size > 50 * 2**20
    assert big_task.error.endswith("the end")
    assert len(big_task.error) < 20_000
    assert "\x00" not in binary_task.error
    assert binary_task.error.startswith("ab")


async def test_what_a_task_leaves_behind_is_ended_before_its_end_is_reported(ens: Ensemble) -> None:
    ids = await ens.run(
        sh("setsid sleep 601 & echo $! > pid; sleep 0.2", name="daemon"),
        sh("(trap '' TERM; sleep 602; sleep 602) & sleep 0.2; exit 3", name="stubborn"),
        python(
            "import os, time\nif os.fork() == 0: os.setsid(); os.fork() and os._exit(0); time.sleep(603)"
        ),
    )
    daemon, stubborn, forked = [await ens.task(id) for id in ids]
    assert [daemon.state, stubborn.state, forked.state] == [
        State.JOB_FINISHED, State.FAILED, State.JOB_FINISHED,
    ]  # fmt: skip
    assert not Path("/proc", (ens.workdir(daemon) / "pid").read_text().strip()).exists()
    assert ens.processes() == []
