from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ensemble.drivers import proctree
from ensemble.drivers.guardlink import GuardLink, guard_argv

#: What the guarded programs begin with: `link` to the guard, and `say` to the test.
PRELUDE = """
import os, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
from ensemble.drivers.guardlink import GuardLink
from ensemble.drivers import process
link = GuardLink.from_environ(os.environ)
def say(name, text=""):
    with open(name + ".part", "w") as file:
        file.write(str(text))
    os.rename(name + ".part", name)
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.execve("/bin/sleep", ["sleep", "1234.5"], {{}})
"""
ROOT = str(Path(__file__).parents[2])
WAIT = "\nwhile True: signal.pause()\n"


class Guarded:
    """A program under a guard, and everything that came of it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.pids: set[int] = set()

    def start(self, script: str, **options: object) -> None:
        on_loss = ["/bin/sh", "-c", 'echo "$1" >> lost', "sh", "lease {lease}"]
        child = [sys.executable, "-c", PRELUDE.format(root=ROOT) + script]
        self.guard = subprocess.Popen(
            guard_argv(child, options.pop("on_loss", on_loss), **options),
            cwd=self.work,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def until(self, condition: Callable[[], bool], within_s: float = 15.0) -> None:
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, "it did not come true in time"
            time.sleep(0.002)

    def hear(self, name: str) -> str:
        path = self.work / name
        self.until(path.exists)
        return path.read_text()

    def remember(self) -> None:
        """Note everything that runs below the guard now."""
        stat = proctree.read_stat(self.guard.pid)
        below = proctree.walk([stat] if stat else [], proctree.list_children)
        self.pids |= {each.pid for each in below} - {self.guard.pid}

    def remember_at_least(self, count: int) -> None:
        self.until(lambda: self.remember() or len(self.pids) >= count)

    def end(self) -> tuple[int, str]:
        _, errors = self.guard.communicate(timeout=40)
        return self.guard.returncode, errors

    def living(self) -> list[int]:
        return [pid for pid in self.pids if proctree.read_stat(pid) is not None]

    @property
    def lost(self) -> str:
        path = self.work / "lost"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    guarded = Guarded(tmp_path)
    yield guarded
    if guarded.guard.poll() is None:
        guarded.remember()
        guarded.guard.kill()
    for pid in guarded.living():
        os.kill(pid, signal.SIGKILL)
    guarded.guard.communicate()


TREE = """
link.lease(41)
daemon()
daemon()
subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 1234 & setsid sleep 1234 & wait"])
say("ready")
"""


def test_a_killed_child_takes_everything_with_it(guarded: Guarded) -> None:
    guarded.start(TREE + WAIT)
    guarded.hear("ready")
    guarded.remember_at_least(6)
    child = proctree.list_children(guarded.guard.pid)
    first = min(child, key=lambda pid: proctree.read_stat(pid).start_ticks)
    os.kill(first, signal.SIGKILL)
    status, errors = guarded.end()
    assert status == 128 + signal.SIGKILL
    assert guarded.living() == []
    assert guarded.lost == "lease 41\n"
    assert errors.count("\n") == 1
    killed = re.search("killed ([0-9]+) processes", errors)
    assert killed is not None
    assert int(killed[1]) >= 5


def test_a_stopped_child_is_ended_at_its_deadline(guarded: Guarded) -> None:
    wait = 'while not os.path.exists("go"): time.sleep(0.005)\n'
    stop = "end = time.clock_gettime(time.CLOCK_BOOTTIME) + 0.7\nlink.deadline(end)\n"
    halt = 'say("set", end)\nos.kill(os.getpid(), signal.SIGSTOP)'
    guarded.start(TREE + wait + stop + halt + WAIT)
    guarded.remember_at_least(6)
    (guarded.work / "go").touch()
    status, errors = guarded.end()
    assert time.clock_gettime(time.CLOCK_BOOTTIME) >= float(guarded.hear("set"))
    assert status == 128 + signal.SIGKILL
    assert guarded.living() == []
    assert guarded.lost == "lease 41\n"
    assert "deadline" in errors
    assert errors.count("\n") == 1


def test_each_new_deadline_replaces_the_last(guarded: Guarded) -> None:
    script = """
for n in range(20):
    link.deadline(time.clock_gettime(time.CLOCK_BOOTTIME) + 2)
link.deadline(time.clock_gettime(time.CLOCK_BOOTTIME) + 1000)
time.sleep(2.2)
link.bye()
sys.exit(7)
"""
    guarded.start(script)
    assert guarded.end() == (7, "")


def test_after_bye_nothing_is_lost_but_what_is_left_is_swept(guarded: Guarded) -> None:
    wait = 'while not os.path.exists("go"): time.sleep(0.005)\n'
    guarded.start(TREE + wait + 'link.bye()\nsay("bye")\nos._exit(0)')
    guarded.remember_at_least(6)
    (guarded.work / "go").touch()
    guarded.hear("bye")
    status, errors = guarded.end()
    assert status == 0
    assert guarded.living() == []
    assert guarded.lost == ""
    assert "killed" in errors


@pytest.mark.parametrize(("script", "status"), [("sys.exit(3)", 3), ("os.abort()", 134), ("", 0)])
def test_the_childs_exit_status_is_the_guards(guarded: Guarded, script: str, status: int) -> None:
    guarded.start(script)
    assert guarded.end() == (status, "")
    assert guarded.lost == ""


def test_a_rank_of_an_mpi_launch_exits_0_whatever_happened(guarded: Guarded) -> None:
    guarded.start("link.lease(5)\nos.abort()", is_exit_zero=True)
    assert guarded.end()[0] == 0
    assert guarded.lost == "lease 5\n"


def test_signals_reach_the_child_once_and_do_not_end_the_guard(guarded: Guarded) -> None:
    script = """
got = []
def take(number, _):
    got.append(signal.Signals(number).name)
    say(f"got {len(got)}", got[-1])
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, take)
say("ready")
while len(got) < 5: signal.pause()
time.sleep(0.1)
sys.exit(len(got))
"""
    guarded.start(script)
    guarded.hear("ready")
    names = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"]
    for n, name in enumerate(names, 1):
        os.killpg(guarded.guard.pid, signal.Signals[name])
        assert guarded.hear(f"got {n}") == name
    assert guarded.end()[0] == 5


def test_a_child_whose_guard_was_killed_gets_term(guarded: Guarded) -> None:
    script = """
def take(number, _):
    link.deadline(0)
    link.bye()
    say("drained", signal.Signals(number).name)
    os._exit(0)
signal.signal(signal.SIGTERM, take)
process.die_with_parent(signal.SIGTERM, link.guard_pid)
say("ready")
"""
    guarded.start(script + WAIT)
    guarded.hear("ready")
    guarded.remember()
    guarded.guard.kill()
    assert guarded.hear("drained") == "SIGTERM"


def test_a_guard_that_died_early_is_noticed(guarded: Guarded) -> None:
    script = """
signal.signal(signal.SIGTERM, lambda *_: (say("drained"), os._exit(0)))
say("pid", os.getpid())
while os.getppid() == link.guard_pid: time.sleep(0.001)
process.die_with_parent(signal.SIGTERM, link.guard_pid)
"""
    guarded.start(script + WAIT)
    guarded.hear("pid")
    guarded.remember()
    guarded.guard.kill()
    guarded.hear("drained")


def test_a_guard_is_small(guarded: Guarded) -> None:
    guarded.start('say("ready")' + WAIT)
    guarded.hear("ready")
    status = Path(f"/proc/{guarded.guard.pid}/status").read_text()
    size_kb = next(int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line)
    print("guard VmRSS", size_kb, "kB")
    assert size_kb < 15_000
    guarded.remember()


def test_a_missing_program_is_named(guarded: Guarded) -> None:
    argv = guard_argv(["no-such-program"])
    guarded.guard = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    status, errors = guarded.end()
    assert status == 127
    assert "no-such-program" in errors


def test_a_missing_on_loss_command_is_no_disaster(guarded: Guarded) -> None:
    guarded.start("link.lease(5)\nsys.exit(2)", on_loss=["/no/such/command"])
    status, errors = guarded.end()
    assert status == 2
    assert "/no/such/command" in errors


def test_garbage_on_the_pipe_is_not_worth_dying_for(guarded: Guarded) -> None:
    script = """
os.write(link._fd, b"nonsense\\ndeadline soon\\n\\xff\\n" + b"x" * 60000 + b"\\nlease 6\\n")
sys.exit(0)
"""
    guarded.start(script)
    assert guarded.end()[0] == 0
    assert guarded.lost == "lease 6\n"


def test_arguments_pass_unchanged(guarded: Guarded) -> None:
    words = ["a b", "", "--", "--on-loss", "new\nline", "{lease}", "ünïcødé"]
    script = "import sys; open('argv', 'w').write(repr(sys.argv[1:]))"
    argv = guard_argv([sys.executable, "-c", script, *words], ["echo", "--", "x"])
    guarded.guard = subprocess.Popen(argv, cwd=guarded.work, stderr=subprocess.PIPE, text=True)
    assert guarded.end()[0] == 0
    assert guarded.hear("argv") == repr(words)


def test_without_a_guard_there_is_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    environ = {"ENSEMBLE_GUARD_FD": str(writer), "ENSEMBLE_GUARD_PID": str(os.getpid())}
    assert GuardLink.from_environ({}) is None
    assert GuardLink.from_environ(environ) is None
    environ["ENSEMBLE_GUARD_PID"] = str(os.getppid())
    assert GuardLink.from_environ({**environ, "ENSEMBLE_GUARD_FD": "999999"}) is None
    link = GuardLink.from_environ(environ)
    assert link is not None
    assert not os.get_inheritable(writer)
    link.lease(4)
    link.bye()
    assert os.read(reader, 100) == b"lease 4\nbye\n"
    for _ in range(10_000):
        link.deadline(1e9)
    os.close(reader)
    link.bye()
    os.close(writer)


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["mpich", "openmpi"])
def test_a_guard_may_be_the_rank_of_an_mpi_program(tmp_path: Path, name: str) -> None:
    path = str(Path(sys.executable).parent) if name == "mpich" else None
    program = shutil.which("mpiexec" if name == "mpich" else "mpirun.openmpi", path=path)
    if program is None:
        pytest.skip(f"{name} is not here")
    words = ["--oversubscribe"] if name == "openmpi" else []
    script = "from mpi4py import MPI; print(MPI.COMM_WORLD.allreduce(1), flush=True)"
    child = guard_argv([sys.executable, "-c", script], is_exit_zero=True)
    environ = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    if name == "openmpi":
        environ["MPI4PY_MPIABI"] = name
    done = subprocess.run(
        [program, *words, "-n", "2", *child],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "".join(done.stdout.split()) == "22", done.stderr
