"""How a launcher runs tasks: a runner for each job mode, over the dispatcher's plan for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from ensemble.core.events import Event, Launch, Pair, Skipped
from ensemble.core.model import Claim, Node
from ensemble.core.plan import Plan
from ensemble.core.wholenodes import WholeNodes
from ensemble.errors import LaunchError
from ensemble.service import runtime, taskrun
from ensemble.service.taskrun import Ground, Handle

Post = Callable[[Event], None]
Spawn = Callable[[Coroutine[Any, Any, None]], None]


class Runner(Protocol):
    """Does what the dispatcher decides about tasks; what comes of it is posted as events."""

    def plan(self) -> Plan:
        """Return the plan that the dispatcher goes by."""

    def launch(self, effect: Launch) -> None:
        """Start a task."""

    def terminate(self, task_id: int, *, is_forced: bool) -> None:
        """End a task's whole process tree; at once when forced, else after TERM and a grace."""

    def recall(self, pairs: Sequence[Pair]) -> None:
        """Take back what has not started."""

    async def run(self) -> None:
        """Do what has to be done all the time."""

    async def failed(self) -> LaunchError:
        """Wait until nothing can be run any more; return why."""

    async def close(self) -> None:
        """Nothing of any task runs any more: end what tasks were run with."""


class MpiRunner:
    """mpi mode: one MPI launch for each task, from this process."""

    def __init__(
        self,
        nodes: Sequence[Node],
        ground: Ground,
        *,
        max_launches: int,
        post: Post,
        spawn: Spawn,
    ) -> None:
        """Prepare."""
        self._nodes = nodes
        self._ground = ground
        self._post = post
        self._spawn = spawn
        self._handles: dict[int, tuple[Claim, Handle]] = {}
        self._places = asyncio.Semaphore(max_launches)

    def plan(self) -> WholeNodes:
        """Return the plan that the dispatcher goes by."""
        return WholeNodes(self._nodes)

    def launch(self, effect: Launch) -> None:
        """Start a task."""
        handle = Handle()
        self._handles[effect.claim.id] = (effect.claim, handle)
        self._spawn(self._run_task(effect, handle))

    async def _run_task(self, launch: Launch, handle: Handle) -> None:
        claim = launch.claim
        if await taskrun.unless_ending(handle, self._places.acquire):
            try:
                await taskrun.run_task(claim, launch.placement, handle, self._ground, self._post)
            finally:
                self._places.release()
        else:
            self._post(Skipped(id=claim.id, attempt=claim.attempt, at=runtime.utc_now()))
        del self._handles[claim.id]

    def terminate(self, task_id: int, *, is_forced: bool) -> None:
        """End a task's whole process tree; at once when forced, else after TERM and a grace."""
        if task_id in self._handles:  # else it has ended, and its event is on its way
            claim, handle = self._handles[task_id]
            self._spawn(taskrun.terminate(claim, handle, self._ground, is_forced=is_forced))

    def recall(self, pairs: Sequence[Pair]) -> None:
        """Nothing is sent ahead in this mode."""

    async def run(self) -> None:
        """Nothing has to be done all the time."""

    async def failed(self) -> LaunchError:
        """Wait for ever: each task's launch fails for itself."""
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Nothing is left: tasks were run with nothing else."""
