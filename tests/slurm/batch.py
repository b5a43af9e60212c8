"""`ensemble launch` as a batch job of a real Slurm."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ensemble.core.states import State
from ensemble.core.store import Store
from ensemble.drivers import proctree
from ensemble.site import Site
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
