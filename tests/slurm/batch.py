"""`ensemble launch` as a batch job of a real Slurm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensemble.core.batchjob import BatchJob, JobState
from ensemble.core.jobs import Jobs
from ensemble.core.states import State
from ensemble.core.store import Store
from ensemble.drivers import proctree, template
from ensemble.site import Site, program
from tests.integration.launching import SETTINGS, Ensemble
from tests.slurm.cluster import OVER, Slurm, environ_of

#: Where this Python's programs are, as an activated virtual environment has them.
BESIDE = os.path.dirname(sys.executable)

#: The flags of a job that has the whole cluster to itself.
FOUR_NODES = ("-N4", "--exclusive")
#: A task that does not end when it is asked to.
STUBBORN = "trap '' TERM; while :; do sleep 0.1; done"


class Batch:
    """One batch job that ends in a launcher."""

    def __init__(self, slurm: Slurm, ens: Ensemble, id: str) -> None:
        self.slurm = slurm
        self.ens = ens
        self.id = id

    @property
    def log(self) -> str:
        """What its script and its launcher have printed."""
        return self.slurm.output(self.id)

    async def until(self, text: str, *, count: int = 1, within_s: float = 30) -> None:
        """Wait until its log has a text, so many times."""
        try:
            await self.ens.eventually(lambda: self.log.count(text) >= count, within_s=within_s)
        except AssertionError:
            raise AssertionError(f"not {count} x {text!r}:\n{self.log}") from None

    async def end(self, *, within_s: float = 60) -> str:
        """Wait until the job is over and nothing of it is left; return its state and exit code."""
        try:
            await self.ens.eventually(lambda: self.slurm.state(self.id) in OVER, within_s=within_s)
            await self.ens.eventually(lambda: not self.left(), within_s=15)
        except AssertionError:
            raise AssertionError(
                f"{self.slurm.state(self.id)}; {self.left()}\n{self.log}"
            ) from None
        return f"{self.slurm.state(self.id)} {self.slurm.field(self.id, 'ExitCode')}"

    def processes(self, *names: str) -> dict[int, str]:
        """Return the job's processes whose command line has one of some words: number and command line."""
        found = processes_of_jobs(self.slurm, f"SLURM_JOB_ID={self.id}")
        return {pid: line for pid, line in found.items() if not names or line_has(line, names)}

    def left(self) -> dict[int, str]:
        """Return whatever of the job or of a task is still there."""
        return self.processes() | {pid: command_line(pid) for pid in self.ens.processes()}

    def launcher(self) -> int:
        """Return the launcher itself, without its guard."""
        found = self.processes(" launch --job-mode ")
        (pid,) = [pid for pid, line in found.items() if "guard.py" not in line]
        return pid

    def pilots(self, node: str) -> list[int]:
        """Return the pilot on a node, without its guard."""
        return [
            pid
            for pid, line in self.processes("ensemble.drivers.pilot").items()
            if f"SLURMD_NODENAME={node}" in environ_of(pid) and "guard.py" not in line
        ]

    def guards(self, node: str) -> list[int]:
        """Return the guard of the pilot on a node."""
        return [
            pid
            for pid, line in self.processes("guard.py").items()
            if f"SLURMD_NODENAME={node}" in environ_of(pid) and "--exit-zero" in line
        ]


def processes_of_jobs(slurm: Slurm, of: str = "SLURM_JOB_ID=") -> dict[int, str]:
    """Return what runs in jobs, daemons aside: number and command line."""
    found = {}
    for pid in slurm.processes():
        stat = proctree.read_stat(pid)
        is_alive = stat is not None and not stat.is_zombie
        if is_alive and any(item.startswith(of) for item in environ_of(pid)):
            found[pid] = command_line(pid)
    return found


def line_has(line: str, names: Sequence[str]) -> bool:
    return any(name in line for name in names)


def command_line(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class SlurmEnsemble(Ensemble):
    """A site with an empty store, and launchers in batch jobs."""

    def __init__(
        self, site: Site, store: Store, eventually: Callable[..., Any], slurm: Slurm
    ) -> None:
        super().__init__(site, store, eventually)
        self.slurm = slurm

    def batch(
        self,
        *flags: str,
        job_mode: str = "serial",
        sbatch: Sequence[str] = FOUR_NODES,
        settings: Mapping[str, object] | None = None,
        before: str = "",
    ) -> Batch:
        """Submit a script that ends in `exec ensemble launch`.

        Args:
            before: What the script does first.
            settings: ENSEMBLE_… variables without that prefix.
        """
        chosen = {**SETTINGS, **(settings or {})}
        lines = [
            before,
            *(f"export ENSEMBLE_{key}={shlex.quote(str(v))}" for key, v in chosen.items()),
        ]
        # As in a user's script: the environment's programs are on PATH.
        lines.append(f"export PATH={shlex.quote(BESIDE)}:$PATH")
        words = ["--site", str(self.site.path), "launch", "--job-mode", job_mode, *flags]
        lines.append(shlex.join(["exec", sys.executable, "-P", "-m", "ensemble", *words]))
        return Batch(self.slurm, self, self.slurm.batch("\n".join(lines), *sbatch))

    def left(self) -> dict[int, str]:
        """Return whatever of any job or task is still there."""
        return processes_of_jobs(self.slurm) | {pid: command_line(pid) for pid in self.processes()}

    async def settle(self, batch: Batch, state: State, *, within_s: float = 30) -> None:
        """Wait until all tasks are in a state."""
        try:
            await self.reach(state, within_s=within_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{batch.log}") from None

    async def nodes_of(self) -> dict[int, str]:
        """Return the node of each task's last attempt that started, as recorded."""
        rows = await self.store.pool.fetch(
            "SELECT DISTINCT ON (task_id) task_id, nodes FROM attempt "
            "WHERE started_at IS NOT NULL ORDER BY task_id, attempt DESC"
        )
        return {row["task_id"]: ",".join(row["nodes"]) for row in rows}


#: For a site whose batch jobs and service are quick about everything.
QUICK = """
[scheduler]
kind = "slurm"
timeout_s = {timeout_s}

[launcher]
idle_timeout_s = {idle_timeout_s}
grace_s = 1
min_useful_s = 0
signal_hold_s = 1

[service]
period_s = 1
submissions_per_minute = 1000
lost_looks = 3
lost_s = 3
retry_s = {retry_s}
capacity_retry_s = 1
"""
USUAL = {"timeout_s": 30, "idle_timeout_s": 0, "retry_s": 1}


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a command of Ensemble's answered."""

    code: int
    out: str
    err: str


class BatchSite:
    """A site whose batch jobs go to the private Slurm, used through the command line."""

    def __init__(self, ens: SlurmEnsemble) -> None:
        self.ens = ens
        self.site = ens.site
        self.slurm = ens.slurm
        self.store = ens.store
        self.eventually = ens.eventually
        self.jobs = Jobs(ens.store.pool)
        self.services: list[subprocess.Popen[bytes]] = []
        self._settings_file = ens.site.path / "ensemble.toml"
        self._settings_before = self._settings_file.read_text()
        self._programs = ens.slurm.path / "programs"
        shutil.rmtree(ens.site.path / "qsubmit", ignore_errors=True)
        (ens.site.path / "qsubmit").mkdir()
        job = ens.site.path / "templates" / "job.sh"
        job.write_text(template.builtin()["slurm"].read_text())
        self.configure()

    def configure(self, queues: str = "", **values: object) -> None:
        """Write the site's settings: queue policies, and what differs from `USUAL`."""
        store = self._settings_before.partition("[scheduler]")[0]
        text = store + QUICK.format(**{**USUAL, **values}) + queues
        temporary = self._settings_file.with_name(".ensemble.toml.new")
        temporary.write_text(text)
        temporary.rename(self._settings_file)

    def put_before(self, name: str, script: str) -> None:
        """Put a script before one of Slurm's programs; `$REAL` is the real one."""
        real = shutil.which(name, path=self.slurm.environ["PATH"])
        self._programs.mkdir(exist_ok=True)
        file = self._programs / name
        file.write_text(f"#!/bin/sh\nREAL={real}\n{script}\n")
        file.chmod(0o755)

    def take_away(self, name: str) -> None:
        """Remove such a script."""
        (self._programs / name).unlink()

    def _environ(self) -> dict[str, str]:
        path = os.pathsep.join([str(self._programs), self.slurm.environ["PATH"]])
        return self.slurm.environ | {"PATH": path}

    async def say(self, *words: str) -> Said:
        """Run a command of Ensemble's."""
        done = await asyncio.to_thread(
            subprocess.run, program(str(self.site.path), *words), cwd=self.site.path,
            env=self._environ(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=90, check=False,
        )  # fmt: skip
        return Said(code=done.returncode, out=done.stdout, err=done.stderr)

    async def do(self, *words: str) -> str:
        """Run a command that must succeed; return what it prints."""
        said = await self.say(*words)
        assert said.code == 0, f"{words}: {said}"
        return said.out

    async def submit(self, *words: str) -> BatchJob:
        """Submit a batch job by hand; return it."""
        return await self.job(json.loads(await self.do("submit-launch", "--json", *words))["id"])

    async def job(self, job_id: int) -> BatchJob:
        """Return what is on record of a batch job."""
        return await self.jobs.get(job_id)

    async def queue(self) -> dict[str, Any]:
        """Return what `ensemble queue` tells."""
        found: dict[str, Any] = json.loads(await self.do("queue", "--json"))
        return found

    async def shown(self, job_id: int) -> dict[str, Any]:
        """Return what `ensemble queue` tells of a batch job."""
        jobs = (await self.queue())["batch_jobs"]
        found: dict[str, Any] = next(job for job in jobs if job["id"] == job_id)
        return found

    async def reach(
        self,
        job_id: int,
        *states: JobState,
        within_s: float = 40,
        reason: str = "",
        is_served: bool = False,
    ) -> BatchJob:
        """Wait until a batch job is shown in one of some states, with a reason that has a text.

        Args:
            is_served: Whether somebody serves meanwhile, one round at a time.
        """
        last: dict[str, Any] = {}

        async def reached() -> bool:
            nonlocal last
            if is_served:
                await self.do("serve", "--once")
            last = await self.shown(job_id)
            return last["state"] in states and reason in str(last["reason"])

        try:
            await self.eventually(reached, within_s=within_s)
        except AssertionError:
            raise AssertionError(f"not {states}: {last}\n{self.output(job_id)}") from None
        return await self.job(job_id)

    def output(self, job_id: int) -> str:
        """Return what a batch job has printed."""
        file = self.site.path / "qsubmit" / f"qlaunch{job_id}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    async def printed(
        self, job_id: int, text: str, *, count: int = 1, within_s: float = 40
    ) -> None:
        """Wait until a batch job has printed a text, so many times."""
        try:
            await self.eventually(
                lambda: self.output(job_id).count(text) >= count, within_s=within_s
            )
        except AssertionError:
            raise AssertionError(f"not {count} x {text!r}:\n{self.output(job_id)}") from None

    async def gone(self) -> None:
        """Wait until nothing of any batch job or task runs."""
        try:
            await self.eventually(lambda: not self.ens.left(), within_s=20)
        except AssertionError:
            raise AssertionError(f"left: {self.ens.left()}") from None

    # ------------------------------------------------------------------ the service

    def serve(self) -> subprocess.Popen[bytes]:
        """Start the service."""
        with (self.site.path / "log" / "served.log").open("ab") as log:
            service = subprocess.Popen(
                program(str(self.site.path), "serve"), cwd=self.site.path, env=self._environ(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.services.append(service)
        return service

    async def serving(self) -> subprocess.Popen[bytes]:
        """Start the service; return it when it serves."""
        service = self.serve()
        await self.eventually(self._is_serving, within_s=30)
        assert service.poll() is None, self.served
        return service

    async def _is_serving(self) -> bool:
        return (await self.jobs.service()).is_running

    @property
    def served(self) -> str:
        """What services have logged."""
        return "".join(
            file.read_text(errors="replace")
            for name in ("served.log", "serve.log")
            if (file := self.site.path / "log" / name).exists()
        )

    async def logged(self, text: str, *, count: int = 1, within_s: float = 30) -> None:
        """Wait until the service has logged a text, so many times."""
        try:
            await self.eventually(lambda: self.served.count(text) >= count, within_s=within_s)
        except AssertionError:
            raise AssertionError(f"not {count} x {text!r}:\n{self.served}") from None

    async def stop(self, service: subprocess.Popen[bytes]) -> None:
        """Stop the service as a user does."""
        service.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(service.wait, 60) == 0, self.served

    async def finished(self, *, within_s: float = 60) -> list[BatchJob]:
        """Wait until no batch job is left; return all there were, by id."""

        async def is_empty() -> bool:
            return not await self.jobs.active()

        try:
            await self.eventually(is_empty, within_s=within_s)
        except AssertionError:
            raise AssertionError(f"{await self.jobs.active()}\n{self.served}") from None
        return list(reversed(await self.jobs.recent(10_000)))

    def close(self) -> None:
        """End services, and leave the site as it was."""
        for service in self.services:
            with contextlib.suppress(ProcessLookupError):
                service.kill()
            service.wait()
        self._settings_file.write_text(self._settings_before)
        for name in ("served.log", "serve.log"):
            (self.site.path / "log" / name).unlink(missing_ok=True)
        shutil.rmtree(self.site.path / "qsubmit", ignore_errors=True)
        (self.site.path / "qsubmit").mkdir()
        shutil.rmtree(self._programs, ignore_errors=True)


def squeue(slurm: Slurm) -> dict[str, tuple[str, str]]:
    """Return all jobs of the cluster: state and name by id."""
    done = slurm.run("squeue", "-h", "-t", "all", "-o", "%A %T %j")
    rows = [line.split(" ", 2) for line in done.splitlines()]
    return {id: (state, name) for id, state, name in rows}
