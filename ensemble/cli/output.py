"""`ensemble log` and `ensemble dir`: what a task wrote, and where."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, assert_never

import click

from ensemble.cli.options import TaskId, examples
from ensemble.cli.session import Session
from ensemble.core.model import Output
from ensemble.core.states import FINAL
from ensemble.errors import NotFoundError

if TYPE_CHECKING:
    from ensemble.api import Client
    from ensemble.core.model import Attempt, Task

#: How often a followed file is looked at: there is no bell for what a program writes.
_LOOK_S = 0.2
_CHUNK = 1 << 20


@click.command(epilog=examples("ensemble log 12", "ensemble log 12 -f"))
@click.argument("task_id", type=TaskId(), metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the task has ended for good.")
@click.option(
    "--attempt",
    type=click.IntRange(min=1),
    metavar="N",
    help="The output of an earlier attempt. [default: the last]",
)
@click.pass_obj
def log(session: Session, task_id: int, follow: bool, attempt: int | None) -> None:
    """Print a task's output.

    It is what the program wrote to standard output and error. Of a task whose output is `tail`, the
    end of it is there when the run has ended.
    """
    if follow and attempt is not None:
        raise click.UsageError("-f follows the last attempt: leave out --attempt")

    async def read(client: Client) -> None:
        task = await client.tasks.get(task_id)
        match task.output:
            case Output.FILE:
                await _print_file(client, task, attempt, follow=follow)
            case Output.TAIL:
                await _print_kept(client, task, attempt, follow=follow)
            case Output.NONE:
                raise NotFoundError(f"task {task_id} keeps no output (output = none)")
            case _:
                assert_never(task.output)

    session.run(read)


async def _print_file(client: Client, task: Task, attempt: int | None, *, follow: bool) -> None:
    tail = Tail(await _output_file(client, task, attempt), sys.stdout.buffer)
    if follow:
        await _follow(client, task, tail)
    elif not tail.copy():
        raise _no_output(task, attempt)


async def _print_kept(client: Client, task: Task, attempt: int | None, *, follow: bool) -> None:
    """Print what the store keeps of an output: its end, once the run is over."""
    if follow and task.state not in FINAL:
        click.echo(f"task {task.id} keeps only the end of its output: waiting for it", err=True)
    if follow:
        await client.tasks.wait([task.id])
    found = await client.tasks.detail(task.id)
    started = [each for each in found.attempts if each.started_at is not None]
    wanted = [each for each in started if attempt in (None, each.attempt)]
    if not wanted or wanted[-1].output is None:
        raise _nothing_kept(found.task, attempt, wanted[-1] if wanted else None)
    click.echo(
        f"task {task.id} keeps only the end of its output, 16 kB at most (output = tail)", err=True
    )
    sys.stdout.buffer.write(wanted[-1].output.encode())
    sys.stdout.buffer.flush()


def _nothing_kept(task: Task, attempt: int | None, run: Attempt | None) -> NotFoundError:
    if run is None or run.ended_at is not None:
        return _no_output(task, attempt)
    return NotFoundError(
        f"task {task.id} is {task.state}: the end of its output is kept when it ends "
        "(-f waits for that)"
    )


@click.command("dir", epilog=examples('cd "$(ensemble dir 12)"'))
@click.argument("task_id", type=TaskId(), metavar="ID")
@click.pass_obj
def directory(session: Session, task_id: int) -> None:
    """Print a task's work directory.

    The directory is made when the task starts.
    """

    async def look(client: Client) -> str:
        return client.tasks.workdir(await client.tasks.get(task_id))

    found = session.run(look)
    if sys.stdout.isatty():  # else a program reads it, which wants the very name
        from ensemble.render.text import clean

        found = clean(found)
    click.echo(found)


class Tail:
    """Copies what was added to a file, again from its start when another one took its name."""

    def __init__(self, path: Path, out: BinaryIO) -> None:
        self.path = path
        self._out = out
        self._inode = 0
        self._offset = 0

    def copy(self) -> bool:
        """Write what is new; return whether the file is there at all."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._inode, self._offset = found.st_ino, 0
                file.seek(self._offset)
                while chunk := file.read(_CHUNK):
                    self._offset += len(chunk)
                    self._out.write(chunk)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except PermissionError as error:
            raise NotFoundError(f"cannot read {self.path}: {error.strerror}") from error
        self._out.flush()
        return True


async def _output_file(client: Client, task: Task, attempt: int | None) -> Path:
    """Return the file that an attempt wrote: each start puts the file that is there aside."""
    path = Path(client.tasks.output(task))
    if attempt is None:
        return path
    history = (await client.tasks.detail(task.id)).attempts
    started = [each.attempt for each in history if each.started_at is not None]
    if attempt not in started:
        raise _no_output(task, attempt)
    place = started.index(attempt) + 1
    return path if place == len(started) else path.with_name(f"{path.name}.{place}")


async def _follow(client: Client, task: Task, tail: Tail) -> None:
    async with asyncio.TaskGroup() as group:
        ended = group.create_task(client.tasks.wait([task.id]))
        while not ended.done():
            tail.copy()
            await asyncio.wait([ended], timeout=_LOOK_S)
    if not tail.copy():
        raise _no_output(await client.tasks.get(task.id), None)


def _no_output(task: Task, attempt: int | None) -> NotFoundError:
    of = f" of attempt {attempt}" if attempt is not None else ""
    if task.state in FINAL or attempt is not None:
        return NotFoundError(
            f"task {task.id} is {task.state} and left no output{of} (ensemble show {task.id})"
        )
    return NotFoundError(f"task {task.id} is {task.state}: no output yet (-f waits for it)")
