"""Launchers as users start them: `ensemble launch` under its guard, on a site with real tasks."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ensemble.core.model import NewTask, Outcome, Selector, Task, TaskDetail
from ensemble.core.states import State
from ensemble.core.store import Store
from ensemble.drivers import proctree
from ensemble.site import Site

#: One PostgreSQL is enough here: test_store.py compares the versions.
WHEEL = pytest.mark.parametrize("site", ["wheel"], indirect=True)
#: Fast ends, and nothing that waits for a default of minutes.
SETTINGS = {"LAUNCHER_GRACE_S": "1", "LAUNCHER_MIN_USEFUL_S": "0"}
MPICH = Path(sys.executable).parent / "mpiexec"
OPENMPI = shutil.which("mpirun.openmpi")

BOTH_MPI = [
    pytest.param(
        str(MPICH),
        id="mpich",
        marks=[
            pytest.mark.mpi,
            pytest.mark.skipif(
                not MPICH.exists(), reason="NOT TESTED with MPICH: no mpiexec of it"
            ),
        ],
    ),
    pytest.param(
        str(OPENMPI),
        id="openmpi",
        marks=[
            pytest.mark.openmpi,
            pytest.mark.skipif(OPENMPI is None, reason="NOT TESTED with Open MPI: no mpirun of it"),
        ],
    ),
]

#: Where distributions put Open MPI's library.
OPENMPI_LIBRARIES = [
    "/usr/lib/x86_64-linux-gnu/libmpi.so.40",
    "/usr/lib64/openmpi/lib/libmpi.so.40",
    "/usr/lib/aarch64-linux-gnu/libmpi.so.40",
]


def mpi_environ(mpi: str) -> dict[str, str]:
    """Return what mpi4py's wheel must be told: it finds the MPICH wheel's library by itself."""
    if mpi == str(MPICH):
        return {}
    library = next((path for path in OPENMPI_LIBRARIES if os.path.exists(path)), None)
    if library is None:
        pytest.skip("NOT TESTED with mpi4py on Open MPI: no libmpi.so.40 at a place known here")
    told = {"MPI4PY_LIBMPI": library, "MPI4PY_MPIABI": "openmpi"}
    return told | {"OMPI_MCA_btl": "self,vader,tcp"}


def sh(script: str, *args: str, **fields: Any) -> NewTask:
    """Make a task that runs a shell script."""
    return NewTask(command=["sh", "-c", script, "sh", *args], **{"name": "sh", **fields})


def python(script: str, *args: str, **fields: Any) -> NewTask:
    """Make a task that runs a Python script."""
    return NewTask(command=[sys.executable, "-c", script, *args], **{"name": "python", **fields})


class Launched:
    """One `ensemble launch`: the guard is the process that was started, the launcher its child."""

    def __init__(
        self, site: Site, log: Path, flags: Sequence[str], environ: dict[str, str]
    ) -> None:
        self.log_path = log
        self.site = site
        self.is_serial = "--job-mode=serial" in flags
        with log.open("wb") as file:
            self.guard = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "ensemble",
                    "--site",
                    str(site.path),
                    "launch",
                    *flags,
                ],
                cwd=site.path,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The launcher itself, below the guard."""
        found = [
            pid
            for pid in proctree.list_children(self.guard.pid)
            if b"\0launch\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(found) == 1, f"{found} below the guard; log:\n{self.log}"
        return found[0]

    def signal(self, number: int) -> None:
        """Signal it as a batch scheduler or a terminal does."""
        self.guard.send_signal(number)

    @property
    def summary(self) -> str:
        """The line in which it sums up."""
        return next(line for line in self.log.splitlines() if "launcher.ended" in line)

    @property
    def run_directory(self) -> Path:
        """Where a launcher in serial mode keeps its pilots' papers; known once it has started."""
        found = re.search(r"launcher=(\d+)", self.log)
        assert found, self.log
        return self.site.path / "log" / f"launcher-{found[1]}"

    def events(self, name: str) -> list[dict[str, str]]:
        """Return what was logged under a name: the keys of each line."""
        lines = [line for line in self.log.splitlines() if f" {name} " in f"{line} "]
        return [dict(re.findall(r"(\w+)=('[^']*'|\"[^\"]*\"|\S+)", line)) for line in lines]

    def pilots(self) -> dict[str, int]:
        """Return the pilots by node, those that joined last."""
        return {joined["node"]: int(joined["pid"]) for joined in self.events("pilot.joined")}

    def machinery(self) -> dict[int, list[str]]:
        """Find mpirun, pilots and their guards: they have a path of the run directory as an argument."""
        run_directory = os.fsencode(self.run_directory)
        found = {}
        for stat in proctree.scan().values():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{stat.pid}/cmdline").read_bytes()
                if run_directory + b"/" in words and not stat.is_zombie:
                    found[stat.pid] = os.fsdecode(words).split("\0")
        return found

    def mpiruns(self) -> list[int]:
        """Return the running mpiruns of pilots."""
        return [pid for pid in proctree.list_children(self.pid) if pid in self.machinery()]

    def kill(self) -> None:
        """End it without ceremony; nothing when it has ended."""
        if self.guard.poll() is None:
            with contextlib.suppress(OSError):
                for pid in proctree.list_children(self.guard.pid):
                    os.kill(pid, signal.SIGCONT)
            self.guard.kill()
            self.guard.wait()

    def clear(self) -> None:
        """End it where a test left it running, and wait until it is gone: the next test has the same store."""
        below = proctree.list_children(self.guard.pid) if self.guard.poll() is None else []
        self.kill()
        deadline = time.monotonic() + 20
        for pid in below:
            while (stat := proctree.read_stat(pid)) is not None and not stat.is_zombie:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)


class Ensemble:
    """A site with an empty store, and everything that is run in it."""

    def __init__(self, site: Site, store: Store, eventually: Callable[..., Any]) -> None:
        self.site = site
        self.store = store
        self.eventually = eventually
        self.launchers: list[Launched] = []
        for folder in site.path.glob("log/launcher-*/"):
            shutil.rmtree(folder)  # each test counts its launchers from 1

    def launch(
        self,
        *flags: str,
        nodes: int = 2,
        mode: str = "mpi",
        variables: Mapping[str, str] | None = None,
        **settings: object,
    ) -> Launched:
        """Start a launcher.

        Args:
            flags: Of the command.
            nodes: How many virtual nodes.
            mode: The job mode.
            variables: What else its environment has.
            settings: ENSEMBLE_… variables without that prefix.
        """
        chosen = {**SETTINGS, **{key: str(value) for key, value in settings.items()}}
        environ = {**os.environ, **{f"ENSEMBLE_{key}": value for key, value in chosen.items()}}
        environ |= variables or {}
        environ.setdefault("ENSEMBLE_MPI_COMMAND", str(MPICH))
        log = self.site.path / "log" / f"launcher-{time.monotonic_ns()}.log"
        flags = (f"--nodes={nodes}", f"--job-mode={mode}", *flags)
        launched = Launched(self.site, log, flags, environ)
        self.launchers.append(launched)
        return launched

    async def leave(self, launched: Launched, *, within_s: float = 60.0) -> int:
        """Wait until a launcher has ended; return its exit status."""
        with contextlib.suppress(AssertionError):
            await self.eventually(lambda: launched.guard.poll() is not None, within_s=within_s)
        status = launched.guard.poll()
        assert status is not None, f"it did not leave:\n{launched.log}"
        if launched.is_serial and "launcher.started" in launched.log:
            await self.eventually(lambda: not launched.machinery())
        return status

    async def joined(self, launched: Launched, pilots: int = 2) -> dict[str, int]:
        """Wait until as many pilots have joined, in serial mode; return them by node."""
        with contextlib.suppress(AssertionError):
            await self.eventually(
                lambda: len(launched.events("pilot.joined")) >= pilots, within_s=60
            )
        assert len(launched.events("pilot.joined")) >= pilots, launched.log
        return launched.pilots()

    async def run(self, *tasks: NewTask, nodes: int = 2, **options: Any) -> list[int]:
        """Add tasks and run them all with one launcher, which must end well; return their ids."""
        ids = await self.store.add(tasks)
        launched = self.launch("--idle-timeout=0", nodes=nodes, **options)
        assert await self.leave(launched) == 0, launched.log
        return ids

    async def task(self, task_id: int) -> Task:
        """Return a task."""
        return (await self.store.tasks(Selector(ids=(task_id,)), limit=1))[0]

    async def tasks(self) -> list[Task]:
        """Return all tasks by id."""
        return await self.store.tasks(Selector(), limit=10_000)

    async def states(self) -> list[State]:
        """Return the states of all tasks by id."""
        return list((await self.store.task_states(Selector())).values())

    async def reach(self, state: State, *ids: int, within_s: float = 60.0) -> None:
        """Wait until tasks, all of them when none is named, are in a state."""

        async def reached() -> bool:
            states = await self.store.task_states(Selector(ids=ids or None))
            return set(states.values()) == {state}

        try:
            await self.eventually(reached, within_s=within_s)
        except AssertionError:
            logs = "\n".join(launched.log for launched in self.launchers)
            raise AssertionError(f"{await self.states()} and not {state}:\n{logs}") from None

    async def leased(self, launched: Launched) -> int:
        """Wait until a launcher is ready; return its lease."""
        await self.eventually(lambda: "launcher.started" in launched.log, within_s=60)
        found = re.search(r"lease=(\d+)", launched.log)
        assert found, launched.log
        return int(found[1])

    def workdir(self, task: Task) -> Path:
        """Return where a task runs."""
        return self.site.path / task.workdir

    def output(self, task: Task, suffix: str = "") -> str:
        """Return what a task has written; of an earlier attempt with *suffix* `.1` and so on."""
        path = self.workdir(task) / f"{task.name}.out{suffix}"
        return path.read_text(errors="replace") if path.exists() else ""

    def processes(self, task_id: int | None = None) -> list[int]:
        """Find the living processes of tasks of this site, or of one task."""
        found = []
        for stat in proctree.scan().values():
            if stat.is_zombie:
                continue
            environ = dict(
                item.split(b"=", 1)
                for item in proctree.read_environ(stat.pid).split(b"\0")
                if b"=" in item
            )
            if environ.get(b"ENSEMBLE_SITE") == os.fsencode(self.site.path) and (
                task_id in (None, int(environ.get(b"ENSEMBLE_TASK_ID", b"-1")))
            ):
                found.append(stat.pid)
        return found

    async def gone(self, task_id: int | None = None, *, within_s: float = 60.0) -> None:
        """Wait until no process of a task, or of any task of this site, is left."""
        await self.eventually(lambda: not self.processes(task_id), within_s=within_s)

    async def starts(self) -> list[int]:
        """Return task ids in the order in which their attempts were started."""
        rows = await self.store.pool.fetch(
            "SELECT task_id FROM attempt WHERE started_at IS NOT NULL ORDER BY started_at, task_id"
        )
        return [row["task_id"] for row in rows]

    async def runs(self, task_id: int) -> list[Outcome | None]:
        """Return how a task's attempts ended, without what was claimed by who was about to leave, and given back."""
        return [each for each in await self.outcomes(task_id) if each is not Outcome.GIVEN_BACK]

    async def outcomes(self, task_id: int) -> list[Outcome | None]:
        """Return how a task's attempts ended."""
        return [attempt.outcome for attempt in (await self.store.detail(task_id)).attempts]


def path_of(detail: TaskDetail) -> list[State]:
    """Return the states that a task went through."""
    return [event.to_state for event in detail.events]
