"""A task's environment: what it starts from, and what tells it who it is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

from ensemble.core.packing import Slot
from ensemble.core.wire import Welcome, Work
from ensemble.drivers import hardware, process
from ensemble.drivers.output import printable
from ensemble.errors import LaunchError

#: What belongs to a node and not to a launcher: taken from the pilot's own environment.
_LOCAL = ("HOSTNAME", "TMPDIR", "SLURMD_NODENAME", "XDG_RUNTIME_DIR", *hardware.GPU_VARIABLES)


class Named(Protocol):
    """A claim, or the work that a pilot was sent."""

    @property
    def id(self) -> int:
        """The task."""

    @property
    def attempt(self) -> int:
        """Which try at it."""

    @property
    def workflow(self) -> str:
        """Its workflow's name."""

    @property
    def parent_ids(self) -> tuple[int, ...]:
        """What it waited for."""


def identity(task: Named, *, site: str, nodes: Sequence[str], marker_prefix: str) -> dict[str, str]:
    """Return the variables that tell a task who it is."""
    return {
        "ENSEMBLE_SITE": site,
        "ENSEMBLE_TASK_ID": str(task.id),
        "ENSEMBLE_ATTEMPT": str(task.attempt),
        "ENSEMBLE_WORKFLOW": task.workflow,
        "ENSEMBLE_PARENT_IDS": ",".join(map(str, task.parent_ids)),
        "ENSEMBLE_NODES": ",".join(nodes),
        "ENSEMBLE_TASK_TOKEN": f"{marker_prefix}{task.id}.{task.attempt}",
    }


class Environs:
    """The environments of a pilot's tasks.

    They start from the launcher's own, as it was before mpirun, and never from the pilot's: a task that
    finds the variables of the pilots' MPI launch would take itself for one of its ranks.
    """

    def __init__(self, welcome: Welcome, environ: Mapping[str, str] | None = None) -> None:
        """Put together what all tasks of this node start from.

        Args:
            welcome: What the launcher told.
            environ: The pilot's own environment; of it, only what is local to the node is taken.
        """
        own = os.environ if environ is None else environ
        self._welcome = welcome
        base = {os.fsdecode(name): os.fsdecode(value) for name, value in welcome.environ.items()}
        self._base = base | {name: own[name] for name in _LOCAL if name in own}
        self._site = os.fsdecode(welcome.site)
        self._gpu_variables = [name for name in hardware.GPU_VARIABLES if name in own]
        self._scripts: dict[str, dict[str, str]] = {}

    def is_ready(self, script: str | None) -> bool:
        """Tell whether the environment that a script leaves is known."""
        return script is None or script in self._scripts

    async def prepare(self, script: str | None) -> None:
        """Run an environment script, once.

        Raises:
            LaunchError: It failed.
        """
        if script is not None:
            self._scripts[script] = await source(script, self._base, cwd=self._site)

    def of(self, work: Work, slot: Slot) -> dict[str, str]:
        """Return a task's whole environment."""
        base = self._base if work.env_script is None else self._scripts[work.env_script]
        env = {**base, **work.environ}
        if work.need.threads is not None and "OMP_NUM_THREADS" not in work.environ:
            env["OMP_NUM_THREADS"] = str(work.need.threads)
        if slot.gpus:
            devices = ",".join(slot.gpus)
            # Where nothing tells whose they are, each kind reads its own variable.
            for name in self._gpu_variables or hardware.GPU_VARIABLES:
                env[name] = devices
        env.update(
            identity(
                work,
                site=self._site,
                nodes=(self._welcome.node,),
                marker_prefix=self._welcome.marker_prefix,
            )
        )
        return env


#: What scripts left, or will have left: the first task that needs one runs it, the others wait.
_sourced: dict[tuple[str, frozenset[tuple[str, str]]], asyncio.Future[dict[str, str]]] = {}


async def source(script: str, env: Mapping[str, str], *, cwd: str | None = None) -> dict[str, str]:
    """Return the environment that a bash script leaves when it is sourced; run once and remembered.

    Args:
        script: Its path.
        env: What it starts from.
        cwd: Where it runs; this process's own directory when None, which in a pilot is that of any task.

    Raises:
        LaunchError: It failed; its last words are in the message. The next task tries again.
    """
    key = (script, frozenset(env.items()))
    while (known := _sourced.get(key)) is not None:
        if not known.done():
            await asyncio.wait([known])
        if not known.cancelled():  # else the task that ran it was killed
            return dict(known.result())
    _sourced[key] = answer = asyncio.get_running_loop().create_future()
    try:
        answer.set_result(await _source(script, env, cwd))
    except BaseException as error:
        del _sourced[key]
        if isinstance(error, LaunchError):
            answer.set_exception(error)
            answer.exception()  # there may be nobody else who waits for it
        else:
            answer.cancel()
        raise
    return dict(answer.result())


async def _source(script: str, env: Mapping[str, str], cwd: str | None) -> dict[str, str]:
    done = await process.run(
        ["bash", "-c", '. "$0" >&2 && exec env -0', script], env=env, cwd=cwd, timeout_s=300
    )
    if done.code != 0:
        last = (printable(done.stderr).strip().splitlines() or ["no output"])[-1]
        raise LaunchError(f"environment script {script} failed with {done.code}: {last[:300]}")
    return dict(item.split("=", 1) for item in done.stdout.split("\0") if "=" in item)
