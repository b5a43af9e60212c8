"""Tasks that do their worst to what runs them: each end has its cause, the node goes on, nothing is left."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from ensemble.core.model import Cause, NewTask, Output, Task
from ensemble.core.states import State
from ensemble.drivers import proctree
from tests.faults import witness
from tests.faults.witness import witnessed
from tests.integration.launching import WHEEL, Ensemble, python as plain_python, sh as plain_sh

pytestmark = [WHEEL, pytest.mark.parametrize("mode", ["mpi", "serial"])]

#: What comes of a task: its state, the cause, and the reason or the exit code.
End = tuple[State, Cause | None, object]
DONE: End = (State.JOB_FINISHED, None, 0)
TOO_LONG: End = (State.FAILED, Cause.TIME_LIMIT, None)
LIMIT = {"time_limit_minutes": 0.005}

Trial = Callable[..., Awaitable[list[Task]]]

#: Whatever a task starts has this lock, unless it closes it; who comes next on the node finds it free.
_NODE = '"$ENSEMBLE_SITE/log/node.lock"'
_TAKE = f"exec 7>>{_NODE}; flock -n 7 || exit 99\n"
_TAKE_IN_PYTHON = """
import fcntl, os
taken = os.open(os.environ["ENSEMBLE_SITE"] + "/log/node.lock", os.O_CREAT | os.O_RDWR)
os.set_inheritable(taken, True)
fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


def sh(script: str, **fields: Any) -> NewTask:
    return plain_sh(_TAKE + script, **fields)


def python(script: str, **fields: Any) -> NewTask:
    return plain_python(_TAKE_IN_PYTHON + script, **fields)


def code(number: int) -> End:
    return (State.FAILED, Cause.EXIT_CODE, number)


def signalled(name: str) -> End:
    return (State.FAILED, Cause.SIGNAL, name)


@pytest.fixture
def trial(ens: Ensemble, mode: str) -> Trial:
    """Runs tasks on one node, one at a time, and a good one after each; their ends must be as told."""

    async def run(*trials: tuple[NewTask, End], **options: object) -> list[Task]:
        ids = []
        for priority, (task, _) in enumerate(reversed(trials)):
            bad = msgspec.structs.replace(task, priority=2 * priority + 1)
            good = witnessed(_TAKE, name="after", priority=2 * priority)
            ids[:0] = (await ens.store.add([bad, good]))[:1]
        launched = ens.launch(
            "--idle-timeout=0", nodes=1, mode=mode, LAUNCHER_GRACE_S=0.3, **options
        )  # type: ignore[arg-type]
        status = await ens.leave(launched, within_s=60)
        tasks = [await ens.task(task_id) for task_id in ids]
        ends = [(task.name, task.state, task.cause, _detail(task)) for task in tasks]
        assert ends == [(task.name, *end) for task, end in trials], launched.log
        assert status == 0, launched.log
        assert "Traceback" not in launched.log, launched.log
        after = {task.state for task in await ens.tasks() if task.name == "after"}
        assert after == {State.JOB_FINISHED}, launched.log
        assert {task.losses for task in await ens.tasks()} == {0}
        (ens.site.path / "log" / "node.lock").unlink()
        return tasks

    return run


def _detail(task: Task) -> object:
    if task.cause is Cause.TIME_LIMIT:
        return None  # it may have died of TERM or of KILL
    return task.reason if task.cause is Cause.SIGNAL else task.exit_code


def is_gone(pid: int) -> bool:
    stat = proctree.read_stat(pid)
    return stat is None or stat.is_zombie


# ---------------------------------------------------------------------------- processes

DAEMON = """
import os, signal, sys, time
for number in range(1, 65):
    if number not in (9, 19, 32, 33):
        signal.signal(number, signal.SIG_IGN)
reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open("daemon", "w") as file:
            file.write(str(os.getpid()))
        os.closerange(0, 100)  # also what the other end of the pipe waits for
        os.execve("/bin/sleep", ["sleep", "600"], {})
    os._exit(0)
os.close(writer)
os.read(reader, 1)
"""
#: One process at a time, and a new one each moment, for which TERM is nothing.
COMET = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end = time.monotonic() + 60
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
    os.setsid()
"""
SWARM = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for number in range(200):
    if os.fork() == 0:
        os.setsid()
        if number % 2:
            os.fork()
        time.sleep(600)
"""
ZOMBIES = """
import os, time
for number in range(100):
    if os.fork() == 0:
        os._exit(number)
time.sleep(0.2)
"""
HEADLESS = """
import ctypes, os, signal, threading, time
def other():
    time.sleep(0.3)
    if %r:
        signal.signal  # only the first thread may change what TERM does
        time.sleep(600)
    os._exit(7)
threading.Thread(target=other).start()
ctypes.CDLL(None).syscall(60, 0)
"""


async def test_processes_that_do_not_want_to_end(ens: Ensemble, trial: Trial) -> None:
    daemon, *_ = await trial(
        (python(DAEMON, name="daemon"), DONE),
        *[(python(COMET, name=f"comet-{n}"), DONE) for n in range(4)],
        (python(SWARM, name="swarm"), DONE),
        (python(ZOMBIES, name="zombies"), DONE),
        (python(HEADLESS % False, name="headless"), code(7)),
        (python(HEADLESS % True, name="limited-headless", **LIMIT), TOO_LONG),
        (sh("kill -STOP $$", name="stopped", **LIMIT), TOO_LONG),
        (sh("(trap '' TERM; kill -STOP $(exec sh -c 'echo $PPID')) & sleep 0.1", name="left"), DONE),
        (sh("(trap '' TERM; sleep 600; sleep 600) & exit 3", name="child"), code(3)),
        (sh("sh -c 'kill -9 $PPID'; sleep 600", name="parricide"), signalled("SIGKILL")),
        (sh("renice -n 19 $$ >/dev/null; exit 4", name="nice"), code(4)),
    )  # fmt: skip
    assert is_gone(int((ens.workdir(daemon) / "daemon").read_text()))
    await witness.check(ens)


async def test_every_exit_status_is_what_it_was(ens: Ensemble, trial: Trial) -> None:
    codes = [0, 1, 2, 125, 126, 127, 128, 193, 254, 255]
    shown = {129: "SIGHUP", 137: "SIGKILL", 143: "SIGTERM", 192: "SIGRTMAX"}
    killed = ["HUP", "SEGV", "XCPU", "PIPE", "USR1", "XFSZ"]
    await trial(
        *[(sh(f"exit {n}", name=f"exit-{n}"), DONE if n == 0 else code(n)) for n in codes],
        *[(sh(f"exit {n}", name=f"exit-{n}"), signalled(name)) for n, name in shown.items()],
        *[(sh(f"kill -{name} $$", name=name), signalled(f"SIG{name}")) for name in killed],
        (NewTask(command=["bash", "-c", "kill -RTMIN+1 $$"], name="RTMIN"), code(163)),
    )
    await witness.check(ens)


# ---------------------------------------------------------------------------- output and files

FLOOD = "dd if=/dev/zero bs=1M count=%s status=none; echo the end; exit 9"
NOISE = r"printf 'a\000b\377\033[1mc\033]0;title\007\233d\r\n\033[2J\036e\n'; exit 1"


async def test_output_of_all_kinds(ens: Ensemble, trial: Trial) -> None:
    plain = [Output.FILE, Output.TAIL, Output.NONE]
    tasks = await trial(
        *[
            (sh(FLOOD % (100 if kind is Output.FILE else 1000), name=f"flood-{kind}", output=kind), code(9))
            for kind in plain
        ],
        *[(sh(NOISE, name=f"noise-{kind}", output=kind), code(1)) for kind in plain],
        *[
            (sh("exec >&- 2>&-; sleep 0.1; exit 2", name=f"closed-{kind}", output=kind), code(2))
            for kind in plain
        ],
        (sh("ulimit -f 8; exec dd if=/dev/zero bs=64k count=9", name="limit"), signalled("SIGXFSZ")),
        (sh("setsid sh -c 'trap \"\" TERM; while :; do echo x; done' & exit 5", name="left", output=Output.TAIL),
         code(5)),
    )  # fmt: skip
    for task in tasks:
        text = task.error or ""
        assert len(text) < 20_000
        assert not {c for c in text if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"}
    flood_file, flood_tail, flood_none, noise_file, noise_tail, noise_none, *_ = tasks
    assert [flood_file.error[-7:], flood_tail.error[-7:], flood_none.error] == ["the end"] * 2 + [
        None
    ]
    assert noise_file.error == noise_tail.error
    assert noise_none.error is None
    (ens.workdir(flood_file) / f"{flood_file.name}.out").unlink()
    await witness.check(ens)


async def test_files_that_are_not_what_they_were(ens: Ensemble, trial: Trial, mode: str) -> None:
    ids_before = {"max_retries": 1}
    again = "test $ENSEMBLE_ATTEMPT = 1 || exit 0; "
    tasks = await trial(
        (sh(again + "rm fifo.out; mkfifo fifo.out; exit 3", name="fifo", **ids_before), DONE),
        (sh(again + "ln -sf /dev/zero zero.out; exit 3", name="zero", **ids_before), DONE),
        (sh(again + "ln -sf nowhere dangling.out; exit 3", name="dangling", **ids_before), DONE),
        (sh(again + "rm dir.out; mkdir dir.out; exit 3", name="dir", **ids_before), DONE),
        (sh(again + "ln -sf loop.out loop.out; exit 3", name="loop", **ids_before), DONE),
        (sh(again + 'd=$PWD; cd /; rm -rf "$d"; exit 3', name="removed", **ids_before), DONE),
        (sh(again + 'd=$PWD; cd /; rm -rf "$d"; mkfifo "$d"; exit 3', name="replaced", **ids_before),
         (State.FAILED, Cause.COULD_NOT_START, None)),
        (sh(again + 'd=$PWD; cd /; mv "$d" "$d-x"; ln -s "$d-x" "$d"; exit 3', name="moved", **ids_before), DONE),
        (sh('rm -rf "$ENSEMBLE_SITE"/log/launcher-*/', name="papers"), DONE),
        (python("import os\nfds = [os.open('/dev/null', 0) for _ in range(1000)]", name="files"), DONE),
    )  # fmt: skip
    removed = next(task for task in tasks if task.name == "replaced")
    ens.workdir(removed).unlink()
    await witness.check(ens)


async def test_a_work_directory_that_nobody_may_read(ens: Ensemble, trial: Trial) -> None:
    """Root may all the same."""
    is_root = os.geteuid() == 0
    end = DONE if is_root else (State.FAILED, Cause.COULD_NOT_START, None)
    script = "test $ENSEMBLE_ATTEMPT = 1 || exit 0; chmod 000 .; exit 3"
    (task,) = await trial((sh(script, name="closed", max_retries=1), end))
    ens.workdir(task).chmod(0o700)
    await witness.check(ens)
