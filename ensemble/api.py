"""The async client: everything the command line does, for programs.

```python
import ensemble

async with ensemble.connect() as ens:
    await ens.apps.add("dock", "vina --config {conf}")
    ids = await ens.tasks.add([ensemble.NewTask(app="dock", params={"conf": c}) for c in confs])
    async for event in ens.watch(ids=ids):
        ...
```

Frozen values in, frozen values out. Inside a running task it uses a database role of its own and
one connection.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Literal, cast

from ensemble import batch
from ensemble.core.batchjob import BatchJob, NewBatchJob, Service
from ensemble.core.jobs import Jobs
from ensemble.core.listener import EVENT, KILL, Listener
from ensemble.core.model import (
    App,
    Changes,
    Counts,
    JobMode,
    Launcher,
    NewApp,
    NewTask,
    Output,
    Problem,
    Selector,
    Task,
    TaskDetail,
    TaskEvent,
)
from ensemble.core.states import State
from ensemble.core.store import Store
from ensemble.errors import NotFoundError, UsageError
from ensemble.site import TASK, USER, Site

#: `Output` as a plain word.
OutputName = Literal["file", "tail", "none"]
#: How long a watcher believes in silence: a lost ring costs so much, no more.
_LOOK_AGAIN_S = 2.0
#: Who waits for a million tasks looks at so many at each ring: the launchers need the database, too.
_AT_ONCE = 1000


@asynccontextmanager
async def connect(site: str | os.PathLike[str] | Site | None = None) -> AsyncIterator[Client]:
    """Open a client of a site, found as the command line finds it.

    Raises:
        NotFoundError: There is no site.
        StoreUnavailableError: Its database cannot be reached.
    """
    found = site if isinstance(site, Site) else Site.find(None if site is None else os.fspath(site))
    is_in_task = "ENSEMBLE_TASK_ID" in os.environ
    store = await Store.open(
        found.address(TASK if is_in_task else USER),
        name="ensemble task" if is_in_task else "ensemble client",
        max_size=1 if is_in_task else 4,
    )
    try:
        yield Client(found, store)
    finally:
        await store.close()


class Client:
    """A connected site."""

    def __init__(self, site: Site, store: Store) -> None:
        self.site = site
        self.store = store
        self.apps = Apps(store)
        self.tasks = Tasks(store, site)
        self.batch = BatchJobs(store, site)

    async def counts(self, workflow: str | None = None) -> Counts:
        """Count the tasks by state; of the workflows that contain *workflow* when given."""
        return await self.store.counts(workflow)

    async def workflows(self) -> dict[str, dict[State, int]]:
        """Return the number of tasks by workflow and state."""
        return await self.store.workflows()

    async def launchers(self, *, only_live: bool = True) -> list[Launcher]:
        """Return launchers, the youngest first."""
        return await self.store.launchers(only_live=only_live)

    async def check(self) -> list[Problem]:
        """Look for broken invariants of the store; a healthy one has none."""
        return await self.store.check()

    async def current_task(self) -> Task:
        """Return the task that this program runs as.

        Raises:
            NotFoundError: This program does not run as a task.
        """
        task_id = os.environ.get("ENSEMBLE_TASK_ID")
        if task_id is None:
            raise NotFoundError("this program does not run as a task: ENSEMBLE_TASK_ID is not set")
        return await self.tasks.get(int(task_id))

    async def watch(
        self, *, ids: Iterable[int] | None = None, workflow: str | None = None
    ) -> AsyncIterator[TaskEvent]:
        """Yield every move of the chosen tasks from now on, pushed as it is committed.

        Args:
            ids: Only these tasks; all when None.
            workflow: Only workflows whose name contains it.
        """
        only = None if ids is None else list(ids)
        cursor = await self.store.horizon()
        async with _bell(self.store) as rang:
            while True:
                events, cursor = await self.store.new_events(cursor, ids=only, workflow=workflow)
                for event in events:
                    yield event
                if not events:
                    await _rung(rang)


@asynccontextmanager
async def _bell(store: Store) -> AsyncIterator[asyncio.Event]:
    """Listen while the block runs; the event is set at every ring."""
    rang = asyncio.Event()
    listener = Listener(store.address, [EVENT, KILL], lambda _channel: rang.set())
    try:
        async with asyncio.TaskGroup() as group:
            worker = group.create_task(listener.run())
            try:
                yield rang
            finally:
                worker.cancel()
    except BaseExceptionGroup as errors:
        # The listener only ends by being cancelled: what is in the group came from the block.
        raise errors.exceptions[0] from None


async def _rung(rang: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(_LOOK_AGAIN_S):
            await rang.wait()
    except TimeoutError:
        return
    rang.clear()


class Apps:
    """The registered apps."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def add(  # noqa: PLR0913 - the fields of NewApp
        self,
        name: str,
        command: str,
        *,
        description: str = "",
        environ: dict[str, str] | None = None,
        env_script: str | None = None,
        preprocess: str | None = None,
        postprocess: str | None = None,
        output: Output | OutputName = Output.FILE,
        replace: bool = False,
    ) -> App:
        """Register how to run something; see `NewApp` for the fields.

        Raises:
            UsageError: It is malformed, or the name is taken and *replace* was not given.
        """
        new = NewApp(
            name=name,
            command=command,
            description=description,
            environ=environ or {},
            env_script=env_script,
            preprocess=preprocess,
            postprocess=postprocess,
            output=cast(Output, output),  # what is none, the store's check refuses
        )
        return await self._store.add_app(new, replace=replace)

    async def find(self) -> list[App]:
        """Return all apps by name."""
        return await self._store.apps()

    async def remove(self, name: str) -> None:
        """Forget an app whose tasks have all ended."""
        await self._store.remove_app(name)


class Tasks:
    """The tasks: add, look, change."""

    def __init__(self, store: Store, site: Site) -> None:
        self._store = store
        self._site = site

    async def add(self, tasks: NewTask | Sequence[NewTask], *, key: str | None = None) -> list[int]:
        """Add tasks in one transaction; return their ids in the order given.

        Args:
            tasks: What to run.
            key: The same key again adds nothing and returns the first ids.

        Raises:
            UsageError: One is malformed; nothing was added.
        """
        return await self._store.add(
            [tasks] if isinstance(tasks, NewTask) else tasks,
            key=key,
            layout=self._site.settings.workdirs,
        )

    async def get(self, task_id: int) -> Task:
        """Return one task.

        Raises:
            NotFoundError: There is none of that id.
        """
        found = await self._store.tasks(Selector(ids=(task_id,)), limit=1)
        if not found:
            raise NotFoundError(f"there is no task {task_id} (ensemble ls)")
        return found[0]

    async def find(
        self, selector: Selector | None = None, *, limit: int = 1000, after: int = 0
    ) -> list[Task]:
        """Return up to *limit* tasks by id, from the first id above *after*."""
        return await self._store.tasks(selector or Selector(), limit=limit, after=after)

    async def states(self, selector: Selector | None = None) -> dict[int, State]:
        """Return id and state of every selected task."""
        return await self._store.task_states(selector or Selector())

    async def detail(self, task_id: int) -> TaskDetail:
        """Return everything on record about a task: needs, parents, attempts, history."""
        return await self._store.detail(task_id)

    def workdir(self, task: Task) -> str:
        """Return the directory a task runs in; made when it starts."""
        return str(self._site.path / task.workdir)

    def output(self, task: Task) -> str:
        """Return the file that a task's output goes to, of a task whose output is `file`.

        Of one whose output is `tail`, the end is in its attempts: `detail(task.id)`.
        """
        return str(self._site.path / task.workdir / f"{task.name}.out")

    async def kill(self, ids: int | Sequence[int], *, reason: str | None = None) -> dict[int, bool]:
        """Kill tasks wherever they are; return those that were, and whether a process still dies."""
        return await self._store.kill([ids] if isinstance(ids, int) else ids, reason=reason)

    async def retry(self, ids: int | Sequence[int]) -> list[int]:
        """Let FAILED and USER_KILLED tasks run again, with what failed because of them; return all."""
        return await self._store.retry([ids] if isinstance(ids, int) else ids)

    async def remove(self, ids: int | Sequence[int]) -> list[int]:
        """Remove tasks from the store; what a launcher holds stays. Return the removed."""
        return await self._store.remove([ids] if isinstance(ids, int) else ids)

    async def modify(self, task_id: int, changes: Changes) -> None:
        """Change what a task needs, while no launcher holds it."""
        await self._store.modify(task_id, changes)

    async def wait(self, ids: Sequence[int], *, timeout_s: float | None = None) -> dict[int, State]:
        """Wait until tasks have ended for good and nothing of them runs; return their states.

        Raises:
            TimeoutError: They had not after *timeout_s* seconds.
            NotFoundError: One does not exist.
        """
        wanted = list(dict.fromkeys(ids))
        # One look, however short the time.
        if await self._store.unfinished(wanted):
            async with asyncio.timeout(timeout_s), _bell(self._store) as rang:
                while await self._store.unfinished(wanted):
                    await self._walk(wanted, rang)
        states = await self._store.task_states(Selector(ids=tuple(wanted)))
        for missing in sorted(set(wanted) - states.keys()):
            raise NotFoundError(f"there is no task {missing} (ensemble ls)")
        return states

    async def _walk(self, ids: Sequence[int], rang: asyncio.Event) -> None:
        """Wait until each task was seen to have ended; a ring costs a look at a few of them."""
        for start in range(0, len(ids), _AT_ONCE):
            part = ids[start : start + _AT_ONCE]
            while await self._store.unfinished(part):
                await _rung(rang)


class BatchJobs:
    """The batch jobs of this site, and the queue policies they are submitted for."""

    def __init__(self, store: Store, site: Site) -> None:
        self._store = store
        self._site = site
        self._jobs = Jobs(store.pool)

    def new(  # noqa: PLR0913 - the fields of a batch job that a user gives
        self,
        *,
        nodes: int,
        minutes: int,
        job_mode: JobMode = JobMode.MPI,
        wf_filter: str | None = None,
        project: str | None = None,
        queue: str | None = None,
        flags: Sequence[str] = (),
        slots_per_node: int = 1,
    ) -> NewBatchJob:
        """Return a batch job for this site's scheduler; nothing is submitted.

        Args:
            nodes: Nodes to ask for.
            minutes: Walltime.
            job_mode: How its launcher runs tasks.
            wf_filter: Take only workflows whose name contains it.
            project: The project or account to charge.
            queue: The scheduler's queue or partition.
            flags: More words for the scheduler's submit command.
            slots_per_node: Let so many tasks share a node at least (serial mode).

        Raises:
            ConfigError: There is no scheduler on this machine.
            UsageError: There are no nodes, or no time.
        """
        return batch.new_job(
            batch.find_scheduler(self._site, os.environ),
            nodes=nodes,
            minutes=minutes,
            job_mode=job_mode,
            wf_filter=wf_filter,
            project=project,
            queue=queue,
            flags=tuple(flags),
            slots_per_node=slots_per_node,
        )

    def render(self, new: NewBatchJob, *, template: str | None = None) -> str:
        """Return the script that `submit` would submit.

        Raises:
            TemplateError: The template, of `templates/`, is missing or malformed.
        """
        return self._submitter().render(new, template_name=self._template(template))

    async def submit(self, new: NewBatchJob, *, template: str | None = None) -> BatchJob:
        """Submit a batch job whose script runs a launcher.

        Raises:
            TemplateError: The template is missing or malformed; nothing was submitted.
            SchedulerError: It was refused; or nobody knows whether it was taken (`Trouble.UNSURE`).
        """
        job = await self._submitter().submit(new, template_name=self._template(template))
        assert job is not None  # a user has no limit
        return job

    async def doubts(self, new: NewBatchJob) -> list[str]:
        """Return what speaks against a batch job as things are now: lines for people."""
        workflows = await self._store.workflow_ids(new.wf_filter)
        if new.wf_filter is not None and not workflows:
            return [f"no workflow's name contains {new.wf_filter!r} (ensemble ls workflows)"]
        found = await self._jobs.backlog(workflows, [batch.size_of(new).widest])
        backlog = [tasks for tasks in found if not tasks.is_soon]
        return batch.doubts(new, backlog, margin_s=self._site.settings.launcher.margin_s)

    async def find(self, *, limit: int = 100) -> list[BatchJob]:
        """Return batch jobs as they are on record, the youngest first."""
        return await self._jobs.recent(limit)

    async def active(self) -> list[BatchJob]:
        """Return the batch jobs that are queued or running, the youngest first."""
        return await self._jobs.active()

    async def get(self, job_id: int) -> BatchJob:
        """Return one batch job as it is on record.

        Raises:
            NotFoundError: There is none of that id.
        """
        return await self._jobs.get(job_id)

    async def cancel(self, job_id: int, *, reason: str = "") -> bool:
        """Cancel a batch job; tell whether it was there to be cancelled.

        Its launcher ends what runs in good order; it ends when the scheduler says so.

        Raises:
            NotFoundError: There is none of that id.
            SchedulerError: The scheduler does not answer, or refuses.
        """
        return await batch.cancel(
            self._jobs, batch.find_system(self._site), job_id, reason or "cancelled by the user"
        )

    async def pause(self, name: str, *, reason: str = "") -> None:
        """Keep a queue policy from submitting until it is resumed.

        Raises:
            NotFoundError: There is no such policy in ensemble.toml.
        """
        self._check_policy(name)
        await self._jobs.pause(name, by="user", reason=reason or "no reason given")
        await self._jobs.note_decision(name, f"paused by user: {reason or 'no reason given'}")
        await self._store.ring()

    async def resume(self, name: str) -> bool:
        """Let a queue policy submit again, its failures forgotten; tell whether anything had kept it.

        Raises:
            NotFoundError: There is no such policy in ensemble.toml.
        """
        self._check_policy(name)
        found = await self._jobs.resume(name)
        if found:
            await self._jobs.note_decision(name, "resumed by user")
        await self._store.ring()
        return found

    async def service(self) -> Service:
        """Return what is known of the service, `ensemble serve`."""
        return await self._jobs.service()

    def _submitter(self) -> batch.Submitter:
        return batch.Submitter(self._site, self._jobs, batch.find_system(self._site))

    def _template(self, name: str | None) -> str:
        return name or self._site.settings.scheduler.template

    def _check_policy(self, name: str) -> None:
        known = self._site.settings.queue
        if name not in known:
            listed = f"known: {', '.join(known)}" if known else "ensemble.toml has none"
            raise NotFoundError(f"there is no queue policy {name!r}; {listed}")


def parse_ids(text: str) -> list[int]:
    """Read a task selector: `12`, or `3-9` for a range.

    Raises:
        UsageError: It is neither.
    """
    first, dash, last = text.partition("-")
    digits = [first, last] if dash else [first]
    if all(number.isascii() and number.isdecimal() and len(number) < 20 for number in digits):
        low, high = int(digits[0]), int(digits[-1])
        if low <= high < 2**63 and high - low < 10_000_000:
            return list(range(low, high + 1))
    raise UsageError(f"{text!r} selects no task: write an id like 12 or a range like 3-9")
