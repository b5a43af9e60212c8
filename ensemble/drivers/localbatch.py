"""The local batch scheduler: it queues scripts and runs them as processes of this machine, a few at a time.

    python -I -S localbatch.py submit --dir DIR --max-running N --output FILE [--name NAME]
                               [--nodes N] [--time MINUTES] [--grace SECONDS] [--] SCRIPT
    python -I -S localbatch.py status --dir DIR
    python -I -S localbatch.py cancel --dir DIR ID

A plain script like guard.py: it imports nothing of Ensemble, so that jobs outlive upgrades. `local.py` builds its
command lines and reads what it prints. Exit status: 0 done, 1 it could not be done, 2 the request is wrong.

There is no daemon. Each job has a supervisor, a process of its own that `submit` detaches: it waits for the job's
turn (first come first served; at most N run, N being what the job was submitted with), starts `bash SCRIPT`,
ends it at its time limit or when it was cancelled (TERM to every process of the job, KILL after the grace) and
writes down how it ended. It is a child subreaper, so whatever the script detaches comes back to it, and a job has
ended only when nothing of it is left.

DIR holds `active/ID.json` and `ended/ID.json`, one record for each job, replaced whole and only under the lock
`DIR/lock`. A state is believed only with evidence: whoever looks at an active job (status, cancel, and
the supervisor of any job that waits) checks that its supervisor lives: process number, start time and boot. Where it does not,
the job is FAILED, or, if any process of it lives, gets a new supervisor there and then. That one is no parent of
the job: it knows its processes by their session, by ENSEMBLE_LOCAL_JOB_TOKEN in their environment, and by descent.
What cleared its environment and left the session is out of its reach, and nobody can tell the exit status.

A process number means nothing on another machine or in another container: there a job is left as it is, and not
counted. A cancellation reaches it through its record, which its supervisor reads now and then. Where that one does
not obey in a minute, who cancels the job once more ends its record.

A job may submit others: they survive it. Any other daemon that it starts, a database too, is killed when the script
ends. And nothing survives an outer subreaper that ends what is below it, as an Ensemble launcher's guard does: jobs
that a task submitted end with its launcher.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import re
import select
import shlex
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple, NoReturn

#: Records of ended jobs that are kept.
KEPT = 1000
GRACE_S = 10.0
#: The first in the queue looks again this often, if nothing wakes it; the others less often.
TURN_S = 1.0
TURN_MOST_S = 60.0
#: poll(2) does not count the time that the machine sleeps, so the time limit is looked at this often.
LOOK_S = 1.0
#: How often to look whether the processes of a job that is being ended have gone.
END_S = 0.05
#: Who cancels a job from another container cannot wake its supervisor, which reads its record this often.
READ_S = 5.0
#: How long after its grace a job that was cancelled from there may still be ending.
OBEY_S = 60.0
#: How soon to try again to write a record when the disk is full.
WRITE_AGAIN_S = 1.0
#: How long killed processes may take before the record names those that hang.
KILL_TIMEOUT_S = 30.0
SCRIPT_LIMIT = 4 << 20
PR_SET_CHILD_SUBREAPER = 36
READY_FD = 3
#: Held back in a new supervisor until it can take them: their default would end it.
EARLY = (signal.SIGUSR1, signal.SIGTERM)

#: Not for a job's environment: what says that a process is part of a task, or of another job.
FOREIGN = re.compile(
    r"ENSEMBLE_(LOCAL_\w*|GUARD_\w+|TASK_ID|TASK_TOKEN|ATTEMPT|WORKFLOW|PARENT_IDS|NODES)"
    r"|SLURM_(?!CONF$)\w+|PBS_(JOBID|NODEFILE)|COBALT_\w+|LSB_\w+|SGE_TASK_ID"
    r"|FLUX_(JOB|ENCLOSING)_ID"
)


class Life(NamedTuple):
    """A process, for good: its number, and its start in clock ticks after boot."""

    pid: int
    ticks: int


class Entry(NamedTuple):
    """A process as /proc/PID/stat shows it."""

    life: Life
    parent: int
    session: int
    is_over: bool


class Refused(Exception):
    """What cannot be done, in one line for the user, with the exit status."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Job:
    """The record of one job."""

    id: int
    name: str
    script: str
    output: str
    cwd: str
    nodes: int
    minutes: float | None
    grace_s: float
    max_running: int
    token: str
    machine: str
    boot: str
    #: Until the supervisor has taken over, the submitter.
    supervisor: Life
    submitted_at: float
    state: str = "QUEUED"
    #: The script's process, once there is one.
    process: Life | None = None
    is_cancelled: bool = False
    reason: str = ""
    exit_code: int | None = None
    #: These three in epoch seconds.
    started_at: float | None = None
    ended_at: float | None = None
    ends_at: float | None = None
    #: The same end in seconds of CLOCK_BOOTTIME, which nobody sets and which counts while the machine sleeps.
    deadline_s: float | None = None
    #: Where process numbers are its own, besides machine and boot; not in records of older versions.
    host: str = ""
    pid_namespace: str = ""
    #: When it was first cancelled, in epoch seconds.
    cancelled_at: float | None = None

    @classmethod
    def parse(cls, text: bytes) -> Job:
        """Read a record; what a newer version added is passed over.

        Raises:
            ValueError: This is no record.
        """
        try:
            data = json.loads(text)
            known = {each.name for each in fields(cls)}
            job = cls(**{name: value for name, value in data.items() if name in known})
            job.supervisor = Life(*job.supervisor)
            job.process = Life(*job.process) if job.process else None
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from error
        return job

    def end(self, state: str, reason: str) -> None:
        """Note how it ended, now."""
        self.state, self.reason, self.ended_at = state, reason, time.time()


class Book:
    """The records of all jobs of a directory."""

    def __init__(self, path: str, *, is_made: bool = False) -> None:
        """Open a directory's book; made with its parents, or only itself."""
        self.path = os.path.abspath(path)
        try:
            if is_made:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
            for folder in (self.path, f"{self.path}/active", f"{self.path}/ended"):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, 0o700)
            found = os.stat(self.path)
        except OSError as error:
            raise Refused(f"cannot use {self.path} for batch jobs: {error.strerror}", 1) from error
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise Refused(
                f"{self.path} must be yours and writable by nobody else (chmod 700), as it says what to run",
                1,
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep everybody else from writing."""
        fd = os.open(f"{self.path}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            # Closing is not enough: a child that was forked meanwhile has it open, too.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def list(self, folder: str) -> list[int]:
        """Return the ids of all records, `active` or `ended` ones, in order."""
        names = os.listdir(f"{self.path}/{folder}")
        return sorted(int(name[:-5]) for name in names if re.fullmatch(r"[0-9]+\.json", name))

    def read(self, folder: str, id: int) -> Job | None:
        """Return a record; None when there is none.

        Raises:
            ValueError: It is damaged.
        """
        try:
            with open(f"{self.path}/{folder}/{id}.json", "rb") as file:
                return Job.parse(file.read())
        except FileNotFoundError:
            return None

    def write(self, job: Job, folder: str = "active") -> None:
        """Replace a record whole; where that fails, the one that was there stays."""
        new = f"{self.path}/new.json"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with open(os.open(new, flags, 0o600), "w", encoding="ascii") as file:
                json.dump(asdict(job), file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, f"{self.path}/{folder}/{job.id}.json")
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise

    def close(self, job: Job) -> None:
        """Move the record of a job that has ended."""
        self.write(job, "ended")
        self.drop("active", job.id)

    def drop(self, folder: str, id: int) -> None:
        """Remove a record."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.path}/{folder}/{id}.json")

    def next_id(self) -> int:
        """Return an id above all others: the records with the highest ones are always kept."""
        return max([0, *self.list("active"), *self.list("ended")]) + 1

    def prune(self) -> None:
        """Remove the oldest records of ended jobs."""
        for id in self.list("ended")[:-KEPT]:
            self.drop("ended", id)

    def judge(self, id: int) -> Job | None:
        """Return an active job as the evidence shows it, under the lock; None when it is none.

        Raises:
            ValueError: Its record is damaged.
        """
        if os.path.exists(f"{self.path}/ended/{id}.json"):
            self.drop("active", id)  # its supervisor died between the two
            return None
        job = self.read("active", id)
        if job is None or is_elsewhere(job):
            return job
        if job.boot != boot():
            job.end("FAILED", "the machine was booted again")
        elif not is_alive(job.supervisor):
            if find_known(job, {job.process} if job.process else set(), self.supervisors()):
                with contextlib.suppress(OSError):  # one that is not in the record leaves
                    job.supervisor = spawn("attend", self.path, job.id)
                    self.write(job)
                return job
            if job.is_cancelled:
                job.end("CANCELLED", "cancelled; its supervisor was killed")
            else:
                job.end("FAILED", "its supervisor was killed")
        else:
            return job
        # With a full disk nothing is written, and the next one who looks comes to the same end.
        with contextlib.suppress(OSError):
            self.close(job)
        return job

    def supervisors(self) -> set[Life]:
        """Return the supervisors of all active jobs; none where the directory is gone."""
        found: set[Life] = set()
        with contextlib.suppress(OSError):
            for id in self.list("active"):
                with contextlib.suppress(ValueError):
                    job = self.read("active", id)
                    found |= {job.supervisor} if job else set()
        return found


class Supervisor:
    """The one process that answers for a job."""

    def __init__(self, book: Book, id: int, *, is_parent: bool) -> None:
        """Be ready for signals; nothing is started yet.

        Args:
            is_parent: Whether it starts the script itself; else it takes over a job whose supervisor was killed.
        """
        self.book = book
        self.id = id
        self.is_parent = is_parent
        self.me = life_of(os.getpid())
        #: The script's process, if it is a child of this one, and how it ended.
        self.child = 0
        self.status: int | None = None
        self.how = ""
        #: How it ends, once it is being ended.
        self.ending = self.reason = ""
        self.kill_at = 0.0
        self.met: set[Life] = set()
        self.is_poked = True
        self.read_at = 0.0
        self.is_told_to_end = False
        self.why_not = -1
        self.wakeups, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, *EARLY):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def register(self) -> bool:
        """Take over from the submitter; False when the job was cancelled meanwhile."""
        with self.book.locked():
            job = self.book.read("active", self.id)
            if job is None or job.state != "QUEUED":
                return False
            job.supervisor = self.me
            self.book.write(job)
            return True

    # Waiting for the turn

    def wait_for_turn(self) -> Job | None:
        """Start the script once it is its turn; None when it was cancelled while it waited."""
        while True:
            ahead: list[Life] = []
            wait_s = WRITE_AGAIN_S
            with contextlib.suppress(OSError), self.book.locked():
                job = self.book.read("active", self.id)
                if job is None or job.state != "QUEUED":
                    return None
                if self.is_told_to_end:
                    job.end("CANCELLED", "its supervisor was told to end (SIGTERM)")
                    self.book.close(job)
                    return None
                ahead, place = self.find_ahead(job)
                if not ahead:
                    self.start(job)
                    self.poke_next()
                    return job
                wait_s = min(TURN_MOST_S, TURN_S * place)
            self.wait(wait_s, ahead)

    def find_ahead(self, job: Job) -> tuple[list[Life], int]:
        """Return whose end, or word, to wait for, and the place in the queue; nobody when it is its turn."""
        running: list[Life] = []
        ids = [id for id in self.book.list("active") if id < self.id]
        for id in reversed(ids):
            with contextlib.suppress(ValueError):
                other = self.book.judge(id)
                if other is None or is_elsewhere(other):
                    continue
                if other.state == "QUEUED":
                    return [other.supervisor], len(ids)
                if other.state == "RUNNING":
                    running.append(other.supervisor)
        return (running, 1) if len(running) >= job.max_running else ([], 0)

    def poke_next(self) -> None:
        """Let the next in the queue look: it has become the first."""
        for id in self.book.list("active"):
            with contextlib.suppress(ValueError):
                job = self.book.read("active", id) if id > self.id else None
                if job is not None and job.state == "QUEUED" and not is_elsewhere(job):
                    send(job.supervisor, signal.SIGUSR1)
                    return

    def start(self, job: Job) -> None:
        """Start the script, and say so in its record before its first instruction.

        Raises:
            OSError: The record could not be written, or there is no room for a process: nothing was started.
        """
        now = time.time()
        limit_s = None if job.minutes is None else 60 * job.minutes
        job.started_at = now
        job.ends_at = None if limit_s is None else now + limit_s
        job.deadline_s = None if limit_s is None else boot_seconds() + limit_s
        go, going = os.pipe()
        self.why_not, saying = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        pid = 0
        try:
            pid = os.fork()
            if pid == 0:
                os.close(going)
                become(job, go, saying)
            job.process = life_of(pid)
            job.state = "RUNNING"
            self.book.write(job)
            os.write(going, b"!")
            self.child = pid
        except OSError:
            if pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            os.close(self.why_not)
            raise
        finally:
            for fd in (go, going, saying):
                os.close(fd)

    # Watching it run

    def attend(self, job: Job) -> None:
        """Stay until the script has ended and nothing of it is left, then write down how it ended."""
        assert job.process is not None
        self.met = {job.process}
        while True:
            self.look(job)
            if self.ending:
                if boot_seconds() >= self.kill_at or not self.is_left(job):
                    break
                self.wait(END_S)
            elif self.has_ended(job.process):
                break
            else:
                left_s = LOOK_S if job.deadline_s is None else job.deadline_s - boot_seconds()
                self.wait(min(LOOK_S, left_s), [job.process])
        self.kill_rest(job)
        self.note(job)
        self.close(job)

    def look(self, job: Job) -> None:
        """Begin to end the job, if it is time."""
        if self.ending:
            return
        if self.is_poked or boot_seconds() >= self.read_at:
            self.is_poked = False
            self.read_at = boot_seconds() + READ_S
            with contextlib.suppress(OSError, ValueError):
                found = self.book.read("active", self.id)
                ended = f"{self.book.path}/ended/{self.id}.json"
                job.is_cancelled = found.is_cancelled if found else os.path.exists(ended)
        if self.is_told_to_end:
            self.begin_end(job, "CANCELLED", "its supervisor was told to end (SIGTERM)")
        elif job.is_cancelled:
            self.begin_end(job, "CANCELLED", "cancelled")
        elif job.deadline_s is not None and boot_seconds() >= job.deadline_s:
            self.begin_end(job, "TIMEOUT", f"its time limit of {job.minutes:g} minutes was over")

    def has_ended(self, process: Life) -> bool:
        """Tell whether the script's process has."""
        self.reap()
        return self.status is not None if self.is_parent else not is_alive(process)

    def begin_end(self, job: Job, state: str, reason: str) -> None:
        """Ask all processes to end, the script's own first, stopped ones too; unless it ended by itself."""
        assert job.process is not None
        if self.has_ended(job.process):
            return
        self.ending, self.reason = state, reason
        self.kill_at = boot_seconds() + job.grace_s
        for life in sorted(self.find(job), key=lambda life: life != job.process):
            send(life, signal.SIGTERM)
            send(life, signal.SIGCONT)

    def find(self, job: Job) -> list[Life]:
        """Return the living processes of the job."""
        spared = self.book.supervisors() | {self.me}
        if self.is_parent:
            table = read_table()
            tops = [each.life for each in table.values() if each.parent == self.me.pid]
            return walk(table, tops, spared)
        found = find_known(job, self.met, spared)
        self.met |= set(found)
        return found

    def is_left(self, job: Job) -> list[Life]:
        """Return what is left. One look may miss a process that is passed on to another parent just then."""
        self.reap()
        return self.find(job) or self.find(job)

    def kill_rest(self, job: Job) -> None:
        """Kill what is left until nothing is; the job runs as long as something of it cannot be killed."""
        name_at = time.monotonic() + KILL_TIMEOUT_S
        wait_s = 0.001
        while left := self.is_left(job):
            for life in left:
                send(life, signal.SIGKILL)
            if time.monotonic() > name_at:
                name_at = float("inf")
                pids = " ".join(str(life.pid) for life in left[:10])
                job.reason = f"being ended: processes that cannot be killed: {pids}"
                with contextlib.suppress(OSError), self.book.locked():
                    self.book.write(job)
            wait_s = min(LOOK_S, 2 * wait_s)
            self.wait(wait_s)

    def reap(self) -> None:
        """Reap what has ended, and note how the script did."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    self.status = code if code >= 0 else 128 - code
                    self.how = f"exit status {code}" if code >= 0 else f"killed by signal {-code}"

    def note(self, job: Job) -> None:
        """Write into the record how the job ended."""
        self.reap()  # the script may have ended after the last time
        job.exit_code = self.status
        if self.ending:
            job.end(self.ending, self.reason)
        elif not self.is_parent:
            job.end("FAILED", "its supervisor was killed")
        elif self.status == 0:
            job.end("FINISHED", "")
        else:
            job.end("FAILED", read(self.why_not).decode(errors="replace") or self.how)

    def close(self, job: Job) -> None:
        """Keep the record, as soon as the disk takes it; unless the whole directory is gone."""
        while os.path.isdir(f"{self.book.path}/ended"):
            with contextlib.suppress(OSError), self.book.locked():
                self.book.close(job)
                return
            self.wait(WRITE_AGAIN_S)

    # Signals

    def wait(self, seconds: float, lives: Sequence[Life] = ()) -> None:
        """Wait for a signal, for the end of any of these processes, or for this long."""
        poll = select.poll()
        poll.register(self.wakeups, select.POLLIN)
        pidfds = [fd for life in lives if (fd := open_pidfd(life)) is not None]
        if len(pidfds) < len(lives):
            seconds = min(seconds, END_S)  # one of them ended just now
        for fd in pidfds:
            poll.register(fd, select.POLLIN)
        poll.poll(1000 * max(0.0, seconds) + 1)
        for fd in pidfds:
            os.close(fd)
        numbers = read(self.wakeups)
        self.is_poked |= signal.SIGUSR1 in numbers
        self.is_told_to_end |= signal.SIGTERM in numbers
        self.reap()  # it may have started supervisors for other jobs


def become(job: Job, go: int, saying: int) -> NoReturn:
    """Turn this new process into the script, on a word of the supervisor; if that dies before, into nothing."""
    doing = "cannot be started"
    try:
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        if os.read(go, 1) == b"":
            os._exit(1)
        doing = f"cannot write {job.output}"
        output = os.open(job.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        doing = f"cannot go to {job.cwd}"
        os.chdir(job.cwd)
        doing = "cannot run bash"
        os.execvpe("bash", ["bash", job.script], job_environ(job))  # noqa: S606, S607
    except OSError as error:
        with contextlib.suppress(OSError):
            os.write(saying, f"{doing}: {error.strerror}".encode(errors="replace"))
    finally:
        os._exit(126)


def job_environ(job: Job) -> dict[str, str]:
    """Return the environment of a job's script."""
    environ = clean_environ()
    environ["ENSEMBLE_LOCAL_JOB_ID"] = str(job.id)
    environ["ENSEMBLE_LOCAL_JOB_NODES"] = str(job.nodes)
    environ["ENSEMBLE_LOCAL_JOB_TOKEN"] = job.token
    if job.ends_at is not None:
        environ["ENSEMBLE_LOCAL_JOB_END"] = str(int(job.ends_at))
    return environ


def clean_environ() -> dict[str, str]:
    """Return this process's environment without what says whose part it is."""
    return {name: value for name, value in os.environ.items() if not FOREIGN.fullmatch(name)}


# Processes


def read_entry(pid: int) -> Entry | None:
    """Look at one process; None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    # A program whose first thread has ended shows Z, too, but counts its other threads.
    is_over = words[0] in b"ZXx" and int(words[17]) <= 1
    return Entry(Life(pid, int(words[19])), int(words[1]), int(words[3]), is_over)


def read_table() -> dict[int, Entry]:
    """Look at all processes."""
    entries = (read_entry(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {entry.life.pid: entry for entry in entries if entry is not None}


def life_of(pid: int) -> Life:
    """Return the identity of a process that is there: this one, or a child."""
    entry = read_entry(pid)
    if entry is None:
        raise ProcessLookupError(f"process {pid} is not in /proc")
    return entry.life


def is_alive(life: Life) -> bool:
    """Tell whether a process runs."""
    entry = read_entry(life.pid)
    return entry is not None and entry.life == life and not entry.is_over


def walk(table: dict[int, Entry], tops: list[Life], spared: set[Life]) -> list[Life]:
    """Return these processes and all below them that live; not those to be spared, nor what is below those."""
    below: dict[int, list[Life]] = {}
    for entry in table.values():
        below.setdefault(entry.parent, []).append(entry.life)
    found = [life for life in dict.fromkeys(tops) if life not in spared]
    met = set(found)
    for life in found:
        fresh = [each for each in below.get(life.pid, []) if each not in spared | met]
        met.update(fresh)
        found.extend(fresh)
    return [life for life in found if not table[life.pid].is_over]


def find_known(job: Job, met: set[Life], spared: set[Life]) -> list[Life]:
    """Return the living processes of a job, for who is not its parent."""
    table = read_table()
    leader = table.get(job.process.pid) if job.process else None
    session = leader.session if leader and leader.life == job.process else None
    mark = f"\0ENSEMBLE_LOCAL_JOB_TOKEN={job.token}\0".encode()
    tops = [
        entry.life
        for entry in table.values()
        if entry.life in met or entry.session == session or mark in read_environ(entry.life.pid)
    ]
    return walk(table, tops, spared)


def read_environ(pid: int) -> bytes:
    """Return a process's environment with a zero byte before it; nothing where that may not be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return b"\0" + file.read()
    except OSError:
        return b""


def open_pidfd(life: Life) -> int | None:
    """Return a handle on a process, which cannot pass to another; None when it is gone."""
    try:
        fd = os.pidfd_open(life.pid)
    except OSError:
        return None
    if is_alive(life):
        return fd
    os.close(fd)
    return None


def send(life: Life, number: int) -> None:
    """Send a signal to a process, and to no other that has its number by now."""
    fd = open_pidfd(life)
    if fd is not None:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(fd, number)
        os.close(fd)


def spawn(verb: str, path: str, id: int, ready: int | None = None) -> Life:
    """Start a supervisor that has nothing in common with this process but the directory it is in."""
    null, log = os.devnull, f"{path}/log"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, null, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, null, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, log, flags, 0o600),
    ]
    if ready is not None:
        actions.append((os.POSIX_SPAWN_DUP2, ready, READY_FD))
    argv = [sys.executable, "-I", "-S", os.path.abspath(__file__), verb, path, str(id)]
    pid = os.posix_spawn(
        argv[0],
        argv,
        clean_environ(),
        file_actions=actions,
        setsid=True,
        setsigmask=EARLY,
        setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
    )
    return life_of(pid)


def machine() -> str:
    """Return what tells this machine from others that may share the directory."""
    with contextlib.suppress(OSError), open("/etc/machine-id", encoding="ascii") as file:
        if text := file.read().strip():
            return text
    return host()


def host() -> str:
    """Return what tells this machine from a copy of it."""
    return os.uname().nodename


def pid_namespace() -> str:
    """Return what tells this container's process numbers from those of others."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def is_elsewhere(job: Job) -> bool:
    """Tell whether it cannot be found out here if a job's processes live."""
    if job.machine != machine() or job.host not in ("", host()):
        return True
    return job.boot == boot() and job.pid_namespace not in ("", pid_namespace())


def boot() -> str:
    """Return what tells this run of the machine from others."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def boot_seconds() -> float:
    """Read the clock that time limits are measured by."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read(fd: int) -> bytes:
    """Read what is there by now."""
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return b""


# The command line


def parse_options(words: list[str], known: str, where: str) -> tuple[dict[str, str], list[str]]:
    """Split words into options, each with its value, and the others; the last one of an option counts."""
    options: dict[str, str] = {}
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            return options, rest + left
        if not word.startswith("-"):
            rest.append(word)
            continue
        name, has_value, value = word.partition("=")
        if name[2:] not in known.split() or not name.startswith("--"):
            raise Refused(f"{where}: unknown option {word!r}; known: --{known.replace(' ', ' --')}")
        if not has_value and not left:
            raise Refused(f"{where}: {name} needs a value")
        options[name[2:]] = value if has_value else left.pop(0)
    return options, rest


def parse_directives(text: str, where: str) -> dict[str, str]:
    """Return the options of the lines `#ENSEMBLE --nodes 2 --time 90` before a script's first command."""
    options: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            break
        if re.match(r"#ENSEMBLE(\s|$)", line):
            place = f"{where}, line {number}"
            try:
                words = shlex.split(line[9:], comments=True)
            except ValueError as error:
                raise Refused(f"{place}: {error}: {line!r}") from error
            found, rest = parse_options(words, "nodes time grace", place)
            if rest:
                raise Refused(f"{place}: expected options, found {rest[0]!r}")
            options |= check_options(found, place)
    return options


def check_options(options: dict[str, str], where: str) -> dict[str, str]:
    """Return the options; those that are numbers must be."""
    rules = {
        "nodes": (r"[1-9][0-9]{0,5}", "a number of nodes, such as 2"),
        "max-running": (r"[1-9][0-9]{0,5}", "a number of jobs, such as 2"),
        "time": (r"(?!0*\.?0*$)[0-9]{1,8}(\.[0-9]{1,9})?", "minutes, such as 90 or 1.5"),
        "grace": (r"[0-9]{1,5}(\.[0-9]{1,9})?", "seconds, such as 10"),
    }
    for name, value in options.items():
        pattern, wanted = rules.get(name, (r"(?s).*", ""))
        if not re.fullmatch(pattern, value, re.ASCII):
            raise Refused(f"{where}: --{name} {value!r}: expected {wanted}")
    return options


def required(options: dict[str, str], name: str, where: str) -> str:
    """Return an option that must be there."""
    if not options.get(name):
        raise Refused(f"{where}: --{name} is missing")
    return options[name]


def read_script(path: str) -> str:
    """Return a script's text."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Refused(f"cannot submit {path!r}: it is no regular file")
            data = file.read(SCRIPT_LIMIT + 1)
    except OSError as error:
        raise Refused(f"cannot read script {path!r}: {error.strerror}") from error
    if len(data) > SCRIPT_LIMIT:
        raise Refused(f"script {path!r} has more than {SCRIPT_LIMIT >> 20} MB")
    if b"\r\n" in data:
        raise Refused(
            f"script {path!r} has Windows line ends, which bash does not take: remove them (sed -i 's/\\r$//' FILE)"
        )
    return data.decode(errors="replace")


def check_output(path: str) -> None:
    """Make sure that a job could write its output there: a file, or a device such as /dev/null."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path, flags, 0o666)
    except OSError as error:
        raise Refused(f"cannot write output {path!r}: {error.strerror}") from error
    mode = os.fstat(fd).st_mode
    os.close(fd)
    if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):
        raise Refused(f"cannot write output {path!r}: it is no regular file")


def parse_job(words: list[str]) -> tuple[str, Job]:
    """Return the directory, and the job that the words of `submit` describe."""
    given, rest = parse_options(words, "dir max-running name output nodes time grace", "submit")
    check_options(given, "submit")
    if len(rest) != 1:
        raise Refused(f"submit: expected one script, got {len(rest)}")
    script = os.path.abspath(rest[0])
    options = {**parse_directives(read_script(script), repr(script)), **given}
    output = os.path.abspath(required(options, "output", "submit"))
    path = required(options, "dir", "submit")
    check_output(output)
    return path, Job(
        id=0,
        name=options.get("name", os.path.basename(script)),
        script=script,
        output=output,
        cwd=os.getcwd(),
        nodes=int(options.get("nodes", "1")),
        minutes=float(options["time"]) if "time" in options else None,
        grace_s=float(options.get("grace", GRACE_S)),
        max_running=int(required(options, "max-running", "submit")),
        token=os.urandom(16).hex(),
        machine=machine(),
        boot=boot(),
        supervisor=life_of(os.getpid()),
        submitted_at=time.time(),
        host=host(),
        pid_namespace=pid_namespace(),
    )


def submit(words: list[str]) -> None:
    """Queue a job, detach its supervisor, print its id."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the supervisor that is to come
    path, job = parse_job(words)
    book = Book(path, is_made=True)
    with book.locked():
        job.id = book.next_id()
        book.write(job)
        book.prune()
    ready, telling = os.pipe()
    os.set_inheritable(telling, True)
    try:
        spawn("supervise", book.path, job.id, telling)
        os.close(telling)
        with open(ready, "rb") as file:
            answer = file.read().decode(errors="replace")
    except OSError as error:
        answer = error.strerror or str(error)
    if answer != "ok":
        with book.locked():
            found = book.read("active", job.id)
            if found is not None and found.supervisor == job.supervisor:
                book.drop("active", job.id)
                raise Refused(f"cannot start the job's supervisor: {answer or 'it was killed'}", 1)
    try:
        put(f"{job.id}\n")
    except OSError as error:
        raise Refused(
            f"job {job.id} is submitted, but nobody reads its id: {error.strerror}", 1
        ) from error


def supervise(words: list[str]) -> None:
    """Be a new job's supervisor: `supervise DIR ID`, with a pipe to the submitter."""
    path, id = words[0], int(words[1])
    close_others({READY_FD})
    os.set_inheritable(READY_FD, False)
    try:
        become_subreaper()
        book = Book(path)
        supervisor = Supervisor(book, id, is_parent=True)
        has_job = supervisor.register()
    except (OSError, ValueError, Refused) as error:
        os.write(READY_FD, str(error).encode(errors="replace"))
        return
    os.chdir("/")
    with contextlib.suppress(OSError):  # a submitter that was killed does not want to know
        os.write(READY_FD, b"ok")
    os.close(READY_FD)
    job = supervisor.wait_for_turn() if has_job else None
    if job is not None:
        supervisor.attend(job)


def attend(words: list[str]) -> None:
    """Be the supervisor of a job that has lost its own: `attend DIR ID`."""
    path, id = words[0], int(words[1])
    close_others(set())
    os.chdir("/")
    book = Book(path)
    supervisor = Supervisor(book, id, is_parent=False)
    with book.locked():
        job = book.read("active", id)
    if job is not None and job.supervisor == supervisor.me:
        supervisor.attend(job)


def close_others(kept: set[int]) -> None:
    """Close what was inherited: somebody may wait for the end of a pipe."""
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - kept - {0, 1, 2}:
        with contextlib.suppress(OSError):
            os.close(fd)


def become_subreaper() -> None:
    """Make the kernel give orphaned descendants to this process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def status(words: list[str]) -> None:
    """Print all jobs, a line of JSON each, and their number, by which a reader knows that it has them all."""
    options, _ = parse_options(words, "dir", "status")
    book = Book(required(options, "dir", "status"))
    lines: dict[int, dict[str, object]] = {}
    with book.locked():
        for id in book.list("active"):
            lines[id] = describe(id, book.judge)
    for id in book.list("ended"):
        lines[id] = describe(id, functools.partial(book.read, "ended"))
    known = [line for _, line in sorted(lines.items()) if line]
    put("".join(f"{json.dumps(line)}\n" for line in [*known, {"listed": len(known)}]))


def describe(id: int, look: Callable[[int], Job | None]) -> dict[str, object]:
    """Return what `status` prints of a job; nothing when it is not there any more."""
    try:
        job = look(id)
    except ValueError:
        return {"id": str(id), "state": "LOST", "reason": "its record is damaged"}
    if job is None:
        return {}
    shown = ("name", "state", "reason", "exit_code", "started_at", "ended_at", "ends_at")
    line = {"id": str(id)} | {name: getattr(job, name) for name in shown}
    if job.state == "QUEUED":
        line["reason"] = f"waits for its turn: at most {job.max_running} run"
    return line


def cancel(words: list[str]) -> None:
    """End a job: at once if it waits, else by its supervisor, for which nobody waits here."""
    options, rest = parse_options(words, "dir", "cancel")
    if len(rest) != 1 or not re.fullmatch(r"[0-9]{1,18}", rest[0], re.ASCII):
        raise Refused(f"cancel: expected the id of one job, such as 7, got {' '.join(rest)!r}")
    id = int(rest[0])
    book = Book(required(options, "dir", "cancel"))
    with book.locked():
        try:
            job = book.judge(id)
        except ValueError as error:
            raise Refused(
                f"the record of job {id} is damaged: {book.path}/active/{id}.json", 1
            ) from error
        if job is None or job.state not in ("QUEUED", "RUNNING"):
            is_known = job is not None or id in book.list("ended")
            raise Refused(f"job {id} has ended" if is_known else f"there is no job {id}", 1)
        is_far = is_elsewhere(job)
        if is_far and not job.host:  # of an older version: its supervisor would not read its record
            raise Refused(f"job {id} is on another machine ({job.machine}): cancel it there", 1)
        job.is_cancelled = True
        job.cancelled_at = job.cancelled_at or time.time()
        if job.state == "QUEUED":
            job.end("CANCELLED", "cancelled before it began")
            book.close(job)
        elif is_far and time.time() > job.cancelled_at + job.grace_s + OBEY_S:
            job.end("CANCELLED", f"cancelled; its supervisor on {job.host} did not answer")
            book.close(job)
        else:
            book.write(job)
        if not is_far:
            send(job.supervisor, signal.SIGUSR1)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "submit": submit,
    "status": status,
    "cancel": cancel,
    "supervise": supervise,
    "attend": attend,
}


def main(words: list[str]) -> int:
    """Do what the command line says."""
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # where one of the first three was closed, a file would get its number
    verb = VERBS.get(words[0]) if words else None
    try:
        if verb is None:
            raise Refused("expected submit, status or cancel")
        verb(words[1:])
    except Refused as error:
        return say(str(error), error.status)
    except OSError as error:
        return say(f"{error.filename or 'the system'}: {error.strerror}", 1)
    return 0


def put(text: str) -> None:
    """Write to standard output."""
    data = text.encode()
    while data:
        data = data[os.write(1, data) :]


def say(text: str, code: int) -> int:
    """Write one line to standard error; return the exit status."""
    line = (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    )
    with contextlib.suppress(OSError):
        os.write(2, f"ensemble local: {line}\n".encode(errors="replace"))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
