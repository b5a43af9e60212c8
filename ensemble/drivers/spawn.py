"""The only starter of tasks' processes: each in a session of its own, with its output to one place."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from ensemble.drivers import proctree, tasktree
from ensemble.drivers.output import Tail, open_output
from ensemble.drivers.process import Process
from ensemble.errors import LaunchError

#: Makes a process of argv, environment, work directory and output; returns its number.
Make = Callable[[Sequence[str], Mapping[str, str], Path | str, int], int]
#: Python ignores SIGPIPE and SIGXFSZ, and Hydra's ranks SIGTTIN; programs expect all defaults.
_RESTORED = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
#: Where programs were found, by name and PATH.
_found: dict[tuple[str, str], str] = {}


def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | str,
    output: Path | str | Tail | None,
) -> Process:
    """Start a program in a session of its own, stdin from /dev/null, stdout and stderr to one place.

    This blocks for as long as the file system does: call it in a worker thread. (subprocess lets other threads run
    while the child is on its way to execve.)

    Args:
        argv: Passed on as it is; a program without a slash is looked up on the PATH of *env*.
        env: The whole environment; its `ENSEMBLE_TASK_TOKEN` marks the task's processes, and no others: two
            processes started with one marker would be ended as one.
        cwd: The work directory; made if it is missing.
        output: Where the output goes: a file (one that is there is kept, as `.1`, `.2`, …), what keeps only the end
            of it, or nowhere.

    Raises:
        LaunchError: It could not be started; nothing of it runs.
    """
    with _starting(argv):
        return _start(argv, env, cwd, output, _fork)


def start_here(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | str,
    output: Path | str | Tail | None,
    cpus: Collection[int] = (),
) -> Process:
    """Start a program as `start` does, at half the cost, from the only thread of this process.

    It goes through the task's work directory and hardware threads on its way, as the child takes both over from its
    parent: posix_spawn(3) cannot set them. Nothing else may rely on this process's current directory. Descriptors
    are inherited unless they are closed on exec, as all of Python's own are; `keep_descriptors` takes care of others.

    Args:
        argv: As for `start`, and so are env, cwd and output.
        cpus: The hardware threads to bind it to; none is those of this thread.

    Raises:
        LaunchError: It could not be started; nothing of it runs.
    """
    with _starting(argv):
        if not cpus:
            return _start(argv, env, cwd, output, _spawn)
        own = _own_cpus()
        os.sched_setaffinity(0, cpus)
        try:
            return _start(argv, env, cwd, output, _spawn)
        finally:
            with contextlib.suppress(OSError):  # they were taken away: no reason to lose what runs
                os.sched_setaffinity(0, own)


@functools.cache
def _own_cpus() -> set[int]:
    """Return the hardware threads of this process, as they were when it first started a program."""
    return os.sched_getaffinity(0)


def keep_descriptors() -> None:
    """Let no child inherit what this process itself has inherited beyond 0, 1 and 2."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the one that listed them
                os.set_inheritable(int(name), False)


@contextlib.contextmanager
def _starting(argv: Sequence[str]) -> Iterator[None]:
    try:
        with tasktree.start():
            yield
    except (OSError, ValueError) as error:
        raise LaunchError(_explain(error, argv)) from error


def _refuse_without(site: str | None) -> None:
    """Make nothing where a site was: it was moved, or its file system is not there, and would hide what is made."""
    if site is not None and not os.path.isdir(site):
        raise FileNotFoundError(errno.ENOENT, "the site's directory is not there", site)


def _start(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | str,
    output: Path | str | Tail | None,
    make: Make,
) -> Process:
    if not argv or not argv[0]:
        raise ValueError("the command is empty")
    try:
        os.mkdir(cwd)
    except FileExistsError:
        pass
    except FileNotFoundError:
        _refuse_without(env.get("ENSEMBLE_SITE"))
        os.makedirs(cwd, exist_ok=True)
    output_fd = _open(output)
    try:
        pid = make(argv, env, cwd, output_fd)
    finally:
        with contextlib.suppress(OSError):  # a network file system may be full: it runs
            os.close(output_fd)
    try:
        process = Process(pid, os.pidfd_open(pid), env.get(proctree.TOKEN_VARIABLE))
        tasktree.roots.add(pid)
    except BaseException:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return process


def _open(output: Path | str | Tail | None) -> int:
    match output:
        case None:
            return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        case Tail():
            return output.open()
        case _:
            return open_output(output)


def _fork(argv: Sequence[str], env: Mapping[str, str], cwd: Path | str, output_fd: int) -> int:
    """Start a program from any thread."""
    child = subprocess.Popen(
        list(argv),
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output_fd,
        stderr=output_fd,
        start_new_session=True,
    )
    # Popen must neither reap it nor warn that nobody did.
    child.returncode = 0
    return child.pid


def _spawn(argv: Sequence[str], env: Mapping[str, str], cwd: Path | str, output_fd: int) -> int:
    """Start a program the fast way, from a directory and on hardware threads that it takes over from this thread."""
    os.chdir(cwd)
    return os.posix_spawn(
        _find(argv[0], env),
        list(argv),
        env,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output_fd, 1),
            (os.POSIX_SPAWN_DUP2, output_fd, 2),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=_RESTORED,
    )


def _find(program: str, env: Mapping[str, str]) -> str:
    """Look a program up on the PATH of *env*, as execvp(3) does."""
    if "/" in program:
        return program
    path = env.get("PATH", os.defpath)
    found = _found.get((program, path))
    if found is None or not os.access(found, os.X_OK):
        found = shutil.which(program, path=path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)
        if os.path.isabs(found):
            _found[program, path] = found
    return found


def _explain(error: OSError | ValueError, argv: Sequence[str]) -> str:
    program = argv[0] if argv else ""
    reason = str(error)
    if isinstance(error, OSError):
        reason = error.strerror or reason
        if error.filename is not None and str(error.filename) != program:
            reason = f"{error.filename}: {reason}"
        elif isinstance(error, FileNotFoundError) and os.path.exists(program):
            reason = "the interpreter that its first line names does not exist"
    text = f"cannot run {program}: {reason}" if program else f"cannot run a task: {reason}"
    return text if text.isprintable() else ascii(text)[1:-1]
