"""From what a user asks to what the store keeps: checks, command lines, order. Pure.

Every refusal is a UsageError whose one line says which field is wrong and what is accepted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter

from ensemble.core.model import App, Changes, NewApp, NewTask
from ensemble.errors import UsageError

#: More nodes than the largest machine has (Fugaku: 158,976).
LARGEST_MACHINE = 158_976
_INT4 = 2**31 - 1
_NAME_LENGTH = 128
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: What later releases bring; accepting it now would lose it silently.
_TASK_STAGES = (
    "input_files",
    "stage_in_url",
    "stage_out_url",
    "stage_out_files",
    "post_error_handler",
    "post_timeout_handler",
)
#: Lower bounds of the whole numbers; the upper one is PostgreSQL's `int`.
_BOUNDS = {
    "num_nodes": 1,
    "ranks_per_node": 1,
    "threads_per_rank": 1,
    "threads_per_core": 1,
    "gpus_per_rank": 0,
    "memory_mb": 1,
    "node_packing_count": 1,
    "wall_time_minutes": 0,
    "priority": -_INT4,
    "max_retries": 0,
    "max_timeouts": 0,
    "max_losses": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A checked task with everything filled in that does not need the database."""

    new: NewTask
    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    env_script: str | None
    app_id: int | None


def check_app(new: NewApp) -> None:
    """Raise UsageError unless *new* can be registered."""
    _check_name("app", new.name)
    split_command(new.command, what=f"app {new.name}")
    _check_environ(new.environ)
    for field in ("preprocess", "postprocess"):
        if getattr(new, field) is not None:
            raise UsageError(
                f"app {new.name}: {field} scripts are not supported by this release; "
                "call it from the command itself"
            )


def resolve(new: NewTask, apps: Mapping[str, App]) -> Resolved:
    """Check one task and build its command line.

    Args:
        apps: The registered apps by name.

    Raises:
        UsageError: Something in it is wrong.
    """
    _refuse_stages(new)
    _check_numbers(new)
    _check_text(new.workflow, "workflow")
    if (new.app is None) == (new.command is None):
        raise UsageError("give an app or a command, one of the two")
    app = None
    if new.app is not None:
        app = apps.get(new.app)
        if app is None:
            raise UsageError(f"there is no app {new.app!r} (ensemble app ls; ensemble app add)")
    argv = (*_words(new, app), *new.args)
    for word in argv:
        if "\0" in word:
            raise UsageError("a NUL character cannot be passed in an argument")
    name = new.name or new.app or re.sub(r"[^\w.-]", "_", argv[0].rsplit("/", 1)[-1])[:64] or "task"
    _check_name("task", name)
    environ = {**(app.environ if app else {}), **new.environ}
    _check_environ(environ)
    return Resolved(
        new=new,
        name=name,
        argv=argv,
        environ=environ,
        env_script=app.env_script if app else None,
        app_id=app.id if app else None,
    )


def warnings(new: NewTask) -> list[str]:
    """Return what is accepted and probably not meant."""
    if new.num_nodes > LARGEST_MACHINE:
        return [
            f"num_nodes {new.num_nodes} is more than any machine has; it waits for a bigger one"
        ]
    return []


def workdir(task_id: int, name: str) -> str:
    """Return where a task runs, relative to the site: a thousand tasks to a directory."""
    return f"data/{task_id // 1000}/{name}_{task_id}"


@lru_cache(maxsize=256)  # a hundred thousand tasks share a few commands
def split_command(command: str, *, what: str) -> tuple[str, ...]:
    """Split a command into words as a shell would, without running one."""
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UsageError(f"{what}: the command cannot be split into words: {error}") from error
    if not words:
        raise UsageError(f"{what}: the command is empty")
    return words


def fill(word: str, params: Mapping[str, str]) -> str:
    """Fill `{name}` in *word*; `{{` and `}}` stand for braces. The result is never split."""

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        try:
            return str(params[match[1]])
        except KeyError:
            raise UsageError(
                f"the command wants a value for {{{match[1]}}}: give it in params, "
                f"or write {{{{{match[1]}}}}} for plain braces"
            ) from None

    return _PLACEHOLDER.sub(value, word)


def order(tasks: Sequence[NewTask], *, names: Sequence[str]) -> list[int]:
    """Return the indexes of *tasks* so that parents named in the same submission come first.

    Raises:
        UsageError: A parent's name is unknown or ambiguous, or parents form a cycle.
    """
    if not any(isinstance(parent, str) for task in tasks for parent in task.parents):
        return list(range(len(tasks)))
    graph = {i: set(siblings(task, names)) for i, task in enumerate(tasks)}
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        loop = " -> ".join(names[i] for i in reversed(error.args[1]))
        raise UsageError(f"tasks wait for each other in a circle: {loop}") from error


def siblings(task: NewTask, names: Sequence[str]) -> list[int]:
    """Return the indexes of the parents that *task* names within its own submission."""
    found = []
    for parent in task.parents:
        if isinstance(parent, str):
            places = [i for i, name in enumerate(names) if name == parent]
            if len(places) != 1:
                how = "no task" if not places else f"{len(places)} tasks"
                raise UsageError(f"parent {parent!r}: {how} of this submission has that name")
            found.append(places[0])
    return found


def _words(new: NewTask, app: App | None) -> list[str]:
    if isinstance(new.command, list):
        if not new.command or not new.command[0]:
            raise UsageError("the command is empty")
        return new.command
    command = app.command if app else new.command or ""
    what = f"app {app.name}" if app else "command"
    return [fill(word, new.params) for word in split_command(command, what=what)]


def _refuse_stages(new: NewTask) -> None:
    for field in _TASK_STAGES:
        if getattr(new, field):
            raise UsageError(
                f"{field}: staging and handlers are not supported by this release; "
                "move files in the command itself"
            )


def _check_numbers(new: NewTask) -> None:
    for field, least in _BOUNDS.items():
        value = getattr(new, field)
        if value is not None and not least <= value <= _INT4:
            raise UsageError(f"{field} is {value}; it must be at least {least} and below 2^31")
    if new.time_limit_minutes is not None and not 0 < new.time_limit_minutes < 1e9:
        raise UsageError(f"time_limit_minutes is {new.time_limit_minutes}; it must be above 0")


def _check_name(what: str, name: str) -> None:
    if not name or len(name) > _NAME_LENGTH or "/" in name or name in {".", ".."}:
        shown = name if len(name) <= 40 else f"{name[:40]}… ({len(name)} characters)"
        raise UsageError(
            f"{what} name {shown!r}: use 1 to {_NAME_LENGTH} characters without slashes"
        )
    if len(name.encode()) > 200:
        raise UsageError(f"{what} name {name[:40]!r}…: too long for a directory's name")
    _check_text(name, f"{what} name")


def _check_text(text: str, what: str) -> None:
    if _CONTROL.search(text):
        raise UsageError(f"{what} {text!r}: control characters are not accepted")


def _check_environ(environ: Mapping[str, str]) -> None:
    for key, value in environ.items():
        if not key or "=" in key or "\0" in key + value:
            raise UsageError(f"environment variable {key!r}: a name has no '=' and no NUL")


def check_changes(changes: Changes) -> None:
    """Raise UsageError unless the changed values are in range."""
    given = {name: getattr(changes, name) for name in _BOUNDS if hasattr(changes, name)}
    plain = {name: value for name, value in given.items() if value is not None}
    _check_numbers(NewTask(command=["-"], time_limit_minutes=changes.time_limit_minutes, **plain))
    _check_text(changes.workflow or "", "workflow")
