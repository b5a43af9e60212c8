from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvloop

from ensemble.drivers import output, process, proctree, spawn, sweep, tasktree
from ensemble.drivers.process import Exit, Process
from ensemble.errors import LaunchError

pytestmark = pytest.mark.filterwarnings('ignore:Overriding the "event_loop_policy" fixture')

#: Of this test run alone: several may go on at once on one host.
LEASE = f"7{os.getpid()}"
TOKEN = f"{LEASE}.41.1"
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    if request.param == "uvloop":
        return uvloop.EventLoopPolicy()
    return asyncio.DefaultEventLoopPolicy()


@pytest.fixture(autouse=True)
def subreaper() -> Iterator[None]:
    process.become_subreaper()
    before = set(proctree.list_children(os.getpid()))
    yield
    end = time.monotonic() + 1
    # Whatever is looked for next reaps adopted zombies; only the living would stay.
    while left := {stat.pid for stat in tasktree.list_strays()} - before:
        if time.monotonic() > end:
            break
    left |= set(proctree.list_children(os.getpid())) - before
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    tasktree.roots.clear()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert not left, "processes were left behind"


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.002)


def start(work: Path, *argv: str, token: str = TOKEN, **env: str) -> Process:
    environ = {"PATH": os.environ["PATH"], "ENSEMBLE_TASK_TOKEN": token, **env}
    return spawn.start(argv, env=environ, cwd=work, output=work / "x.out")


def shell(work: Path, script: str, **env: str) -> Process:
    return start(work, "/bin/sh", "-c", script, **env)


def python(work: Path, script: str, *args: str) -> Process:
    return start(work, sys.executable, "-I", "-S", "-c", script, *args)


def read_pid(path: Path) -> int:
    return int(path.read_text()) if path.exists() and path.read_text().endswith("\n") else 0


def is_gone(pid: int) -> bool:
    return proctree.read_stat(pid) is None


def marked() -> list[int]:
    found = (pid for pid in proctree.scan() if pid != os.getpid())
    return [pid for pid in found if proctree.parse_token(proctree.read_environ(pid)) == TOKEN]


#: Detaches the rest of its command line as a daemon that nobody waits for, and writes its pid.
DAEMON = """
import os, sys, signal
path, is_cleared, *argv = sys.argv[1:]
if os.fork():
    sys.exit(0)
os.setsid()
if os.fork():
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(path, "w") as file:
    print(os.getpid(), file=file)
os.execve(argv[0], argv, {} if is_cleared == "yes" else os.environ)
"""


@pytest.mark.parametrize("code", [0, 1, 2, 126, 127, 255])
async def test_the_exit_code_is_told(tmp_path: Path, code: int) -> None:
    task = shell(tmp_path, f"exit {code}")
    result = await task.wait()
    assert (result.code, result.signal, result.status) == (code, None, code)
    assert result.max_rss_kb > 0
    assert await task.wait() == result


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
async def test_the_signal_is_told(tmp_path: Path, number: int) -> None:
    result = await shell(tmp_path, f"kill -{number} $$").wait()
    assert (result.code, result.signal, result.status) == (None, number, 128 + number)


async def test_several_may_wait_and_one_may_give_up(tmp_path: Path) -> None:
    task = start(tmp_path, "sleep", "100")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(task.wait(), 0.01)
    async with asyncio.TaskGroup() as group:
        waiters = [group.create_task(task.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        task.signal(signal.SIGUSR1)
    assert {waiter.result().signal for waiter in waiters} == {signal.SIGUSR1}
    task.signal(signal.SIGTERM)


async def test_a_child_that_somebody_else_reaped_has_an_unknown_end(tmp_path: Path) -> None:
    task = start(tmp_path, "true")
    os.waitpid(task.pid, 0)
    assert await task.wait() == Exit()


async def test_the_loops_own_children_are_left_to_it(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        runs = [group.create_task(process.run(["sh", "-c", f"exit {n}"])) for n in range(5)]
        for _ in range(20):
            task = shell(tmp_path, "true")
            await task.wait()
            assert await process.sweep(task, grace_s=0) == 0
    assert [run.result().code for run in runs] == list(range(5))


#: Lets itself be traced by anybody, and exits with 0 when it is told to.
TRACEABLE = """
import ctypes, os, time
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, for all
open("ready", "w").close()
while not os.path.exists("go"):
    time.sleep(0.005)
"""
#: Traces a process, and lets go of it, dead or alive, at the end of its input.
TRACER = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
print(libc.ptrace(0x4206, int(sys.argv[1]), None, None), flush=True)  # PTRACE_SEIZE
sys.stdin.read()
"""


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    """Trace a process for a while."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", TRACER, str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as tracer:
        assert tracer.stdout is not None
        if tracer.stdout.readline() != b"0\n":
            tracer.communicate()
            pytest.skip("NOT TESTED with a tracer: ptrace(2) is not allowed here")
        yield


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes that it was tried to reap, in order."""
    found: list[int] = []
    wait4, waitid = os.wait4, os.waitid

    def noted_wait4(pid: int, options: int) -> object:
        found.append(pid)
        return wait4(pid, options)

    def noted_waitid(kind: int, pid: int, options: int) -> object:
        found.append(pid)
        return waitid(kind, pid, options)

    monkeypatch.setattr(os, "wait4", noted_wait4)
    monkeypatch.setattr(os, "waitid", noted_waitid)
    return found


@pytest.mark.parametrize("way", ["wait", "watch"])
async def test_what_is_traced_when_it_exits_has_its_own_status_and_is_looked_at_in_peace(
    tmp_path: Path, way: str, looks: list[int]
) -> None:
    task = python(tmp_path, TRACEABLE)
    await eventually((tmp_path / "ready").exists)
    told = asyncio.Event()
    with traced(task.pid):
        if way == "watch":
            process.Exits().watch(task, told.set)
        waiting = asyncio.create_task(task.wait() if way == "wait" else told.wait())
        begun = time.monotonic()
        (tmp_path / "go").touch()
        await eventually(lambda: looks.count(task.pid) >= 5)
        assert time.monotonic() - begun > 3 * process._TRACED_S
        assert task.exit is None
        assert not waiting.done()
        # Nor does whoever ends its tree wait for it, or chase it.
        before = len(looks)
        assert await process.end_tree(task, grace_s=0) == 0
        assert len(looks) - before < 10
    await asyncio.wait_for(waiting, 10)
    assert task.exit is not None
    assert task.exit.code == 0


async def test_a_traced_daemon_that_ends_holds_nobody_up(tmp_path: Path, looks: list[int]) -> None:
    daemon = [sys.executable, "-I", "-S", "-c", DAEMON, "pid", "no"]
    task = start(tmp_path, *daemon, sys.executable, "-I", "-S", "-c", TRACEABLE)
    await task.wait()
    await eventually((tmp_path / "ready").exists)
    pid = read_pid(tmp_path / "pid")
    with traced(pid):
        (tmp_path / "go").touch()
        await eventually(lambda: proctree.read_stat(pid).is_zombie)
        assert not process.has_strays()
        assert await process.sweep(task, grace_s=0) == 0
        assert looks.count(pid) < 10
    assert not process.has_strays()
    assert is_gone(pid)


async def test_what_runs_is_not_called_unstarted_when_its_output_cannot_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = spawn._fork

    def fork_and_close(
        argv: Sequence[str], env: Mapping[str, str], cwd: Path | str, output_fd: int
    ) -> int:
        pid = fork(argv, env, cwd, output_fd)
        os.close(output_fd)  # a full network file system fails the next one in another way
        return pid

    monkeypatch.setattr(spawn, "_fork", fork_and_close)
    assert (await shell(tmp_path, "exit 3").wait()).code == 3


async def test_output_goes_to_the_file_and_earlier_output_is_kept(tmp_path: Path) -> None:
    work = tmp_path / "not" / "there yet"
    for n in range(3):
        await shell(work, f"echo out {n}; echo err {n} >&2; cat").wait()
    assert (work / "x.out").read_text() == "out 2\nerr 2\n"
    assert (work / "x.out.1").read_text() == "out 0\nerr 0\n"
    assert (work / "x.out.2").read_text() == "out 1\nerr 1\n"


async def test_a_link_in_the_place_of_the_output_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x.out").symlink_to(tmp_path / "precious")
    await shell(tmp_path, "echo hello").wait()
    assert (tmp_path / "x.out").read_text() == "hello\n"
    assert not (tmp_path / "precious").exists()


ARGUMENTS = [
    "a b",
    "",
    "'",
    '"',
    "\\",
    "new\nline",
    "$HOME",
    "*",
    "-rf",
    "--",
    "ünïcødé ☃",
    "\udcff",
    "`id`",
]


async def test_arguments_pass_unchanged(tmp_path: Path) -> None:
    script = "import sys, os; print([os.fsencode(word) for word in sys.argv[1:]])"
    await python(tmp_path, script, *ARGUMENTS).wait()
    expected = [os.fsencode(word) for word in ARGUMENTS]
    assert (tmp_path / "x.out").read_text().strip() == str(expected)


async def test_the_task_has_its_own_session_directory_and_environment(tmp_path: Path) -> None:
    script = "import os; print(os.getsid(0) == os.getpid(), os.getcwd(), sorted(os.environ))"
    await python(tmp_path, script).wait()
    names = (tmp_path / "x.out").read_text().split(" ", 2)
    assert names[:2] == ["True", str(tmp_path)]
    assert "'ENSEMBLE_TASK_TOKEN'" in names[2]
    assert "'HOME'" not in names[2]


def test_what_cannot_be_started_is_explained_in_one_line(tmp_path: Path) -> None:
    def explain(*argv: str, cwd: Path = tmp_path, env: dict[str, str] | None = None) -> str:
        environ = {"PATH": os.environ["PATH"], **(env or {})}
        with pytest.raises(LaunchError) as caught:
            spawn.start(argv, env=environ, cwd=cwd, output=tmp_path / "x.out")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "data").write_text("no program")
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    (tmp_path / "plain").write_text("echo\n")
    (tmp_path / "plain").chmod(0o755)
    fds = os.listdir("/proc/self/fd")
    assert explain("no-such-program") == "cannot run no-such-program: No such file or directory"
    assert explain("no\nsuch") == r"cannot run no\nsuch: No such file or directory"
    assert "Permission denied" in explain(str(tmp_path / "data"))
    assert "interpreter" in explain(str(tmp_path / "script"))
    assert "Exec format error" in explain(str(tmp_path / "plain"))
    assert "Argument list too long" in explain("true", "x" * 3_000_000)
    assert "null byte" in explain("true", "a\0b")
    assert "environment" in explain("true", env={"A=B": "c"})
    assert f"{tmp_path / 'data'}: " in explain("true", cwd=tmp_path / "data")
    assert f"{tmp_path / 'data'}" in explain("true", cwd=tmp_path / "data" / "below")
    assert explain() == "cannot run a task: the command is empty"
    assert explain("") == "cannot run a task: the command is empty"
    assert os.listdir("/proc/self/fd") == fds
    assert proctree.list_children(os.getpid()) == []


async def test_a_program_on_a_hung_file_system_does_not_stop_the_loop(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None)
    fan_class_content, fan_open_exec_perm, fan_mark_add, at_fdcwd, fan_allow = (
        4,
        0x40000,
        1,
        -100,
        1,
    )
    hang = libc.fanotify_init(fan_class_content, os.O_RDONLY)
    program = tmp_path / "program"
    shutil.copy("/bin/true", program)
    mask = ctypes.c_uint64(fan_open_exec_perm)
    path = os.fsencode(program)
    if hang < 0 or libc.fanotify_mark(hang, fan_mark_add, mask, at_fdcwd, path) != 0:
        pytest.skip("only root can make an exec hang (fanotify)")

    def let_go() -> None:
        event = os.read(hang, 4096)
        fd = struct.unpack_from("IBBHQii", event)[5]
        assert released.wait(20)
        os.write(hang, struct.pack("iI", fd, fan_allow))
        os.close(fd)

    released = threading.Event()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(2) as threads:
        holder = loop.run_in_executor(threads, let_go)
        starting = loop.run_in_executor(threads, start, tmp_path, str(program))
        await eventually(lambda: len(proctree.list_children(os.getpid())) == 1)
        other = shell(tmp_path / "other", "exit 3")
        assert (await other.wait()).code == 3
        assert await process.sweep(other, grace_s=0) == 0
        assert not starting.done()
        released.set()
        await holder
        assert (await (await starting).wait()).code == 0
    os.close(hang)


async def test_ending_a_tree_ends_shells_children_and_sessions(tmp_path: Path) -> None:
    task = shell(
        tmp_path, "sleep 100 & setsid sleep 100 & (sleep 100; true) & echo x > ready; wait"
    )
    await eventually(lambda: len(marked()) == 5)
    assert await process.end_tree(task, grace_s=5) == 5
    assert task.exit is not None
    assert task.exit.signal == signal.SIGTERM
    assert marked() == []


async def test_a_child_that_ignores_term_is_killed_after_the_grace(tmp_path: Path) -> None:
    task = shell(tmp_path, "trap '' TERM; echo > ready; sleep 100; sleep 100")
    await eventually((tmp_path / "ready").exists)
    begun = time.monotonic()
    await process.end_tree(task, grace_s=0.2)
    assert time.monotonic() - begun >= 0.2
    assert (await task.wait()).signal == signal.SIGKILL
    assert marked() == []


async def test_the_grace_is_for_cleaning_up(tmp_path: Path) -> None:
    script = (
        "trap 'sleep 0.2; echo cleaned; exit 4' TERM; echo > ready; while :; do sleep 0.01; done"
    )
    task = shell(tmp_path, script)
    await eventually((tmp_path / "ready").exists)
    await process.end_tree(task, grace_s=10)
    assert (await task.wait()).code == 4
    assert (tmp_path / "x.out").read_text().endswith("cleaned\n")


async def test_without_grace_all_is_killed_at_once(tmp_path: Path) -> None:
    task = shell(tmp_path, "trap 'echo no' TERM; sleep 100 & echo > ready; wait")
    await eventually((tmp_path / "ready").exists)
    await process.end_tree(task, grace_s=0)
    assert (await task.wait()).signal == signal.SIGKILL
    assert "no" not in (tmp_path / "x.out").read_text()


async def test_a_stopped_task_ends_by_term(tmp_path: Path) -> None:
    task = shell(tmp_path, "trap 'exit 5' TERM; sleep 100 & echo > ready; wait")
    await eventually((tmp_path / "ready").exists)
    await eventually(lambda: len(proctree.list_children(task.pid)) == 1)
    (child,) = proctree.list_children(task.pid)
    await eventually(lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n")
    os.killpg(task.pid, signal.SIGSTOP)
    await eventually(lambda: all(proctree.read_stat(pid).is_stopped for pid in (task.pid, child)))
    await process.end_tree(task, grace_s=300)  # pytest's own limit is less
    assert (await task.wait()).code == 5
    assert marked() == []


async def test_a_daemon_of_a_living_task_is_ended_with_it(tmp_path: Path) -> None:
    daemon = [sys.executable, "-I", "-S", "-c", DAEMON, "pid", "no", "/bin/sleep", "100"]
    task = start(tmp_path, "/bin/sh", "-c", '"$@"; sleep 100', "sh", *daemon)
    await eventually(lambda: read_pid(tmp_path / "pid") > 0)
    pid = read_pid(tmp_path / "pid")
    await eventually(lambda: proctree.read_stat(pid).ppid == os.getpid())
    await process.end_tree(task, grace_s=0.05)
    assert is_gone(pid)


async def test_a_daemon_left_behind_is_swept(tmp_path: Path) -> None:
    task = python(tmp_path, DAEMON, "pid", "no", "/bin/sleep", "100")
    assert (await task.wait()).code == 0
    other = shell(tmp_path / "other", "true", ENSEMBLE_TASK_TOKEN=f"{LEASE}.42.1")
    await other.wait()
    await eventually(lambda: read_pid(tmp_path / "pid") > 0)
    assert await process.sweep(other, grace_s=0) == 0
    assert not is_gone(read_pid(tmp_path / "pid"))
    assert await process.sweep(task, grace_s=0.05) >= 1
    assert is_gone(read_pid(tmp_path / "pid"))


async def test_what_clears_its_environment_is_swept_by_its_session(tmp_path: Path) -> None:
    task = shell(tmp_path, "env -i sleep 100 & echo $! > pid")
    await task.wait()
    pid = read_pid(tmp_path / "pid")
    await eventually(lambda: proctree.parse_token(proctree.read_environ(pid)) is None)
    assert await process.sweep(task, grace_s=5) == 1
    assert is_gone(pid)


async def test_a_daemon_that_is_just_being_started_is_swept(tmp_path: Path) -> None:
    for _ in range(50):
        task = shell(tmp_path, "setsid sleep 100 & echo $! > pid")
        await task.wait()
        assert await process.sweep(task, grace_s=5) == 1
        assert is_gone(read_pid(tmp_path / "pid"))


async def test_adopted_zombies_are_reaped_and_nothing_else(tmp_path: Path) -> None:
    task = shell(tmp_path, "for i in 1 2 3; do (setsid true &); done; sleep 0.05")
    await task.wait()

    def zombies() -> list[int]:
        stats = map(proctree.read_stat, proctree.list_children(os.getpid()))
        return [stat.pid for stat in stats if stat is not None and stat.is_zombie]

    waiting = start(tmp_path, "true")
    await eventually(lambda: waiting.pid in zombies())
    await eventually(lambda: zombies() == [waiting.pid] or not tasktree.list_strays())
    assert zombies() == [waiting.pid]
    assert (await waiting.wait()).code == 0


async def test_a_command_in_a_session_of_its_own_is_nobody_s_stray() -> None:
    """What looks for strays reaps them: whoever waited for one of those would wait for ever."""

    async def look() -> None:
        while True:
            time.sleep(0.05)
            tasktree.list_strays()
            await asyncio.sleep(0.01)

    looking = asyncio.create_task(look())
    for _ in range(10):
        done = await process.run(["sleep", "0.02"], timeout_s=20, own_session=True)
        assert done.code == 0
    looking.cancel()


async def test_a_stray_is_found_among_more_children_than_the_kernel_tells_at_once(
    tmp_path: Path,
) -> None:
    many = [start(tmp_path, "sleep", "100") for _ in range(850)]
    task = shell(tmp_path, "setsid sleep 100 & echo $! > pid")
    await task.wait()
    stray = read_pid(tmp_path / "pid")
    assert stray in proctree.list_adopted()
    assert await process.sweep(task, grace_s=5) == 1
    assert is_gone(stray)
    for each in many:
        each.signal(signal.SIGKILL)
        await each.wait()


async def test_a_kill_that_is_cancelled_can_be_repeated(tmp_path: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    task = shell(tmp_path, "trap '' TERM; echo > ready; sleep 100; sleep 100")
    await eventually((tmp_path / "ready").exists)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process.end_tree(task, grace_s=100), 0.05)
    await process.end_tree(task, grace_s=0)
    assert marked() == []
    assert len(os.listdir("/proc/self/fd")) == fds


async def test_ending_what_has_ended_does_nothing(tmp_path: Path) -> None:
    task = start(tmp_path, "true")
    await task.wait()
    assert await process.end_tree(task, grace_s=5) == 0
    assert await process.sweep(task, grace_s=5) == 0


async def test_a_tree_that_keeps_forking_is_ended(tmp_path: Path) -> None:
    script = "while :; do (setsid sh -c 'sleep 0.02; sleep 100' &); sleep 0.005; done"
    task = shell(tmp_path, script)
    await eventually(lambda: len(marked()) > 20)
    await process.end_tree(task, grace_s=0.5)
    assert marked() == []


async def test_without_the_kernels_lists_of_children_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proctree, "_has_children_files", lambda: False)
    task = shell(tmp_path, "setsid sleep 100 & sleep 100 & echo $! > pid; wait $!")
    await eventually(lambda: read_pid(tmp_path / "pid") > 0)
    await eventually(lambda: len(marked()) == 3)
    assert await process.end_tree(task, grace_s=5) == 3
    assert marked() == []


async def test_fifty_at_once(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()

    async def one(n: int) -> int | None:
        task = await loop.run_in_executor(
            None,
            lambda: shell(
                tmp_path / str(n), f"sleep 0.05; exit {n}", ENSEMBLE_TASK_TOKEN=f"{LEASE}.{n}.1"
            ),
        )
        result = await task.wait()
        assert await process.sweep(task, grace_s=0) == 0
        return result.code

    async with asyncio.TaskGroup() as group:
        workers = [group.create_task(one(n)) for n in range(50)]
    assert [worker.result() for worker in workers] == list(range(50))


async def test_two_hundred_starts_leave_no_file_open(tmp_path: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        task = start(tmp_path, "true")
        await task.wait()
        (tmp_path / "x.out").unlink()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert tasktree.roots == set()


async def test_a_lost_launchers_tasks_are_found_by_their_marker(tmp_path: Path) -> None:
    mine = shell(tmp_path, "setsid sleep 100 & env -i sleep 100 & wait", ENSEMBLE_TASK_TOKEN=TOKEN)
    other = start(tmp_path, "sleep", "100", token=f"{LEASE}1.1.1")
    await eventually(lambda: len(proctree.list_children(mine.pid)) == 2)
    swept = await asyncio.to_thread(sweep.sweep_token, f"{LEASE}.")
    assert swept == (3, ())
    assert (await mine.wait()).signal == signal.SIGKILL
    assert other.exit is None
    await process.end_tree(other, grace_s=5)
    with pytest.raises(ValueError, match="empty prefix"):
        sweep.sweep_token("")


async def test_who_is_alive(tmp_path: Path) -> None:
    me = process.identity(guard_pid=os.getppid())
    assert (me.pid, me.guard_pid) == (os.getpid(), os.getppid())
    assert len(me.boot_id) == 36
    assert me.pid_namespace.startswith("pid:[")
    assert process.is_alive(me.pid, me.start_ticks)
    assert not process.is_alive(me.pid, me.start_ticks + 1)
    task = start(tmp_path, "sleep", "0.1")
    stat = proctree.read_stat(task.pid)
    assert stat is not None
    assert process.is_alive(task.pid, stat.start_ticks)
    await eventually(lambda: not process.is_alive(task.pid, stat.start_ticks))
    await task.wait()
    assert not process.is_alive(task.pid, stat.start_ticks)


def test_the_tail_is_safe_to_store_and_to_show(tmp_path: Path) -> None:
    path = tmp_path / "x.out"
    assert output.tail(path, 5) == ""
    path.write_bytes(b"one\ntwo\x00\x07\x1b[31m red\x1b[0m\xff\r\n\tthree\x9b\n10%\r20%\n\n")
    assert output.tail(path, 2) == "10%\n20%"
    assert output.tail(path, 100) == "one\ntwo red\ufffd\n\tthree\ufffd\n10%\n20%"
    path.write_text("x" * 50_000 + "\n" + "line\n" * 10)
    assert output.tail(path, 3) == "line\nline\nline"
    assert output.tail(path, 1000, max_bytes=52) == "\n".join(["line"] * 10)
    path.write_text("é" * 50_000)
    assert len(output.tail(path, 3, max_bytes=1001)) <= 502


def mpi_argv(name: str) -> list[str]:
    if name == "mpich":
        program = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
        words: list[str] = []
    else:
        program = shutil.which("mpirun.openmpi")
        words = ["--oversubscribe", "--bind-to", "none"]
    if program is None:
        pytest.skip(f"{name} is not here")
    return [program, *words, "-n", "2", "sleep", "100"]


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["mpich", "openmpi"])
@pytest.mark.parametrize("how", ["kill", "end", "kill mpiexec, then sweep"])
async def test_no_rank_survives(tmp_path: Path, name: str, how: str) -> None:
    allow = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    task = start(tmp_path, *mpi_argv(name), **allow, HOME=str(tmp_path))

    def ranks() -> int:
        lines = [Path(f"/proc/{pid}/cmdline") for pid in marked()]
        return sum(line.read_bytes() == b"sleep\000100\0" for line in lines if line.exists())

    await eventually(lambda: ranks() == 2)
    if how == "kill mpiexec, then sweep":
        task.signal(signal.SIGKILL)
        assert (await task.wait()).signal == signal.SIGKILL
        await process.sweep(task, grace_s=2)
    else:
        await process.end_tree(task, grace_s=5 if how == "end" else 0)
    assert marked() == []


async def test_a_program_that_leaves_its_output_open_is_an_error_not_a_crash() -> None:
    with pytest.raises(LaunchError, match="close its output"):
        await process.run(["sh", "-c", "sleep 1 & exit 0"], timeout_s=0.2)
    await eventually(lambda: not reap_any())


def reap_any() -> bool:
    """Reap a child that was adopted, if one has ended; tell whether any is left."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    return bool(proctree.list_children(os.getpid()))


@contextlib.contextmanager
def no_file_descriptors() -> Iterator[list[int]]:
    """Use up all file descriptors; the block gets those that it may close."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield taken
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_without_file_descriptors_a_daemon_is_not_taken_for_gone(tmp_path: Path) -> None:
    task = shell(tmp_path, "setsid sleep 100 & sleep 0.1")
    assert (await task.wait()).code == 0
    with no_file_descriptors() as taken:
        sweeping = asyncio.create_task(process.sweep(task, grace_s=0))
        await asyncio.sleep(0.1)
        assert not sweeping.done()
        for _ in range(8):
            os.close(taken.pop())
        assert await asyncio.wait_for(sweeping, 5) == 1
    assert marked() == []


async def test_without_file_descriptors_nobody_is_declared_dead() -> None:
    me = proctree.read_stat(os.getpid())
    assert me is not None
    with no_file_descriptors(), pytest.raises(OSError, match="Too many open files"):
        process.is_alive(me.pid, me.start_ticks)
