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
from typing import Any, Literal

import msgspec

from ensemble.core.model import App, Changes, NewApp, NewTask, Output
from ensemble.errors import UsageError

#: More nodes than the largest machine has (Fugaku: 158,976).
LARGEST_MACHINE = 158_976
_INT4 = 2**31 - 1
_INT8 = 2**63 - 1
_NAME_LENGTH = 128
_WORKFLOW_LENGTH = 500
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
#: What neither an argument nor a column of the store can hold: NUL, and halves of characters, as
#: which Python reads bytes that are not UTF-8.
_UNSTORABLE = re.compile(r"[\0\ud800-\udfff]")
#: What later releases bring; accepting it now would lose it silently.
_TASK_STAGES = (
    "input_files",
    "stage_in_url",
    "stage_out_url",
    "stage_out_files",
    "post_error_handler",
    "post_timeout_handler",
)
#: More tasks than any node runs at once.
LARGEST_PACKING = 1_000_000
#: How work directories are arranged below `data/`: a thousand to a directory, or all in one.
Layout = Literal["sharded", "flat"]
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
    output: Output


def check_app(new: NewApp) -> None:
    """Raise UsageError unless *new* can be registered."""
    _check_name("app", new.name)
    split_command(new.command, what=f"app {new.name}")
    for field in ("command", "description", "env_script"):
        _check_storable(getattr(new, field), field)
    _check_environ(new.environ)
    if new.output not in tuple(Output):
        raise UsageError(f"app {new.name}: output is {new.output!r}; use {_one_of(Output)}")
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
    _check_types(new)
    _refuse_stages(new)
    _check_numbers(new)
    _check_workflow(new.workflow)
    if (new.app is None) == (new.command is None):
        raise UsageError("give an app or a command, one of the two")
    app = None
    if new.app is not None:
        app = apps.get(new.app)
        if app is None:
            raise UsageError(f"there is no app {new.app!r} (ensemble app ls; ensemble app add)")
    argv = (*_words(new, app), *new.args)
    _check_storable(argv, "an argument")
    for field in ("mpi_flags", "cpu_affinity", "params", "tags", "data"):
        _check_storable(getattr(new, field), field)
    name = new.name or new.app or _default_name(argv[0])
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
        output=Output(new.output or (app.output if app else Output.FILE)),
    )


def warnings(new: NewTask) -> list[str]:
    """Return what is accepted and probably not meant."""
    if new.num_nodes > LARGEST_MACHINE:
        return [
            f"num_nodes {new.num_nodes} is more than any machine has; it waits for a bigger one"
        ]
    return []


def workdir(task_id: int, name: str, layout: Layout = "sharded") -> str:
    """Return where a task runs, relative to the site: a thousand tasks to a directory, or flat."""
    if layout == "flat":
        return f"data/{name}_{task_id}"
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
    wanted = {parent for task in tasks for parent in task.parents if isinstance(parent, str)}
    if not wanted:
        return list(range(len(tasks)))
    places = _places(wanted, names)
    graph = {i: _siblings(task, places) for i, task in enumerate(tasks)}
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        loop = " -> ".join(names[i] for i in reversed(error.args[1]))
        raise UsageError(f"tasks wait for each other in a circle: {loop}") from error


def siblings(task: NewTask, names: Sequence[str]) -> list[int]:
    """Return the indexes of the parents that *task* names within its own submission."""
    wanted = {parent for parent in task.parents if isinstance(parent, str)}
    return _siblings(task, _places(wanted, names)) if wanted else []


def _places(wanted: set[str], names: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {name: [] for name in wanted}
    for i, name in enumerate(names):
        if name in wanted:
            places[name].append(i)
    return places


def _siblings(task: NewTask, places: Mapping[str, Sequence[int]]) -> list[int]:
    found = []
    for parent in task.parents:
        if isinstance(parent, str):
            if len(places[parent]) != 1:
                how = f"{len(places[parent])} tasks" if places[parent] else "no task"
                have = "have" if places[parent] else "has"
                raise UsageError(f"parent {parent!r}: {how} of this submission {have} that name")
            found.append(places[parent][0])
    return found


def _default_name(program: str) -> str:
    """Name a task after its program; short enough for a directory in any script."""
    name = re.sub(r"[^\w.-]", "_", program.rsplit("/", 1)[-1])[:48]
    return name if name.strip(".") else "task"


def _words(new: NewTask, app: App | None) -> list[str]:
    if isinstance(new.command, list):
        if not new.command or not new.command[0]:
            raise UsageError("the command is empty")
        return new.command
    command = app.command if app else new.command or ""
    what = f"app {app.name}" if app else "command"
    return [fill(word, new.params) for word in split_command(command, what=what)]


def _check_types(new: NewTask) -> None:
    """Refuse what a Python program may put into a field: the constructor does not look."""
    try:
        msgspec.convert(msgspec.to_builtins(new), NewTask)
    except (msgspec.ValidationError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the task is malformed: {str(error).replace('$.', '')}") from error


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
    if new.node_packing_count > LARGEST_PACKING:
        raise UsageError(
            f"node_packing_count is {new.node_packing_count}; it must be at most {LARGEST_PACKING:,}"
        )
    if new.time_limit_minutes is not None and not 0 < new.time_limit_minutes < 1e9:
        raise UsageError(
            f"time_limit_minutes is {new.time_limit_minutes}; it must be above 0 and below 1e9"
        )
    for parent in new.parents:
        if isinstance(parent, int) and not 0 < parent <= _INT8:
            raise UsageError(f"parents: {parent} is not the id of a task")


def _one_of(choices: type[Output]) -> str:
    return ", ".join(choices)


def _check_name(what: str, name: str) -> None:
    if not name or len(name) > _NAME_LENGTH or "/" in name or name in {".", ".."}:
        shown = name if len(name) <= 40 else f"{name[:40]}… ({len(name)} characters)"
        raise UsageError(
            f"{what} name {shown!r}: use 1 to {_NAME_LENGTH} characters without slashes"
        )
    _check_text(name, f"{what} name")
    if len(name.encode()) > 200:
        raise UsageError(f"{what} name {name[:40]!r}…: too long for a directory's name")


def _check_workflow(name: str) -> None:
    _check_text(name, "workflow")
    if len(name) > _WORKFLOW_LENGTH:
        raise UsageError(
            f"workflow {name[:40]!r}… has {len(name)} characters; up to {_WORKFLOW_LENGTH} are accepted"
        )


def _check_text(text: str, what: str) -> None:
    if _CONTROL.search(text):
        raise UsageError(f"{what} {text!r}: control characters are not accepted")
    _check_storable(text, what)


def _check_storable(value: Any, what: str) -> None:
    """Refuse text, at any depth of *value*, that the store cannot hold."""
    if isinstance(value, str):
        found = _UNSTORABLE.search(value)
        if found is not None:
            bad = "a NUL character" if found[0] == "\0" else "text that is not UTF-8"
            raise UsageError(f"{what}: {bad} cannot be passed on")
    elif not value:
        return  # most fields of most tasks
    elif isinstance(value, list | tuple):
        for item in value:
            _check_storable(item, what)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_storable(key, what)
            _check_storable(item, what)


def _check_environ(environ: Mapping[str, str]) -> None:
    for key, value in environ.items():
        if not key or "=" in key or "\0" in key + value:
            raise UsageError(f"environment variable {key!r}: a name has no '=' and no NUL")
        _check_storable(key + value, f"environment variable {key!r}")


def check_changes(changes: Changes) -> None:
    """Raise UsageError unless the changed values are in range."""
    given = {name: getattr(changes, name) for name in _BOUNDS if hasattr(changes, name)}
    plain = {name: value for name, value in given.items() if value is not None}
    _check_numbers(NewTask(command=["-"], time_limit_minutes=changes.time_limit_minutes, **plain))
    _check_workflow(changes.workflow or "")
    for field in ("tags", "data"):
        _check_storable(getattr(changes, field), field)
