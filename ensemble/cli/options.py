"""Options and argument types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ensemble.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


class TaskId(click.ParamType[int]):
    """The id of a task."""

    name = "ID"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read an id that the database can hold."""
        text = str(value)
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**63):
            self.fail(f"{text!r} is not the id of a task: expected a number like 12", param, ctx)
        return int(text)


class Amount(click.ParamType[float]):
    """A finite number above zero, or from zero on."""

    name = "NUMBER"

    def __init__(self, *, may_be_zero: bool = False) -> None:
        self._may_be_zero = may_be_zero

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read a number within bounds; neither `nan` nor `inf` is one."""
        least = "0 or more" if self._may_be_zero else "more than 0"
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number < 1e9 or (number == 0 and not self._may_be_zero):
            self.fail(f"{value!r}: expected a number, {least}", param, ctx)
        return number


def examples(*lines: str) -> str:
    """Return the end of a command's help: command lines to copy, not re-wrapped by click."""
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(("\b", title, *(f"  {line}" for line in lines)))


#: What becomes of a task's output.
OUTPUT = click.Choice(("file", "tail", "none"))


def as_json(function: F) -> F:
    """Add `--json`."""
    add = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document: all fields, times in UTC."
    )
    return add(function)


def assume_yes(function: F) -> F:
    """Add `--yes`."""
    add = click.option(
        "--yes", "-y", is_flag=True, help="Do not ask, also when it is about more than ten tasks."
    )
    return add(function)


def read_pairs(
    _ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    """Turn repeated `key=value` into a mapping; the last of a key counts."""
    pairs = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{value!r}: expected KEY=VALUE", param=param)
        pairs[key] = text
    return pairs


def read_object(
    _ctx: click.Context, param: click.Parameter, value: str | None
) -> dict[str, Any] | None:
    """Read a JSON object."""
    import msgspec

    if value is None:
        return None
    try:
        return msgspec.json.decode(value, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise click.BadParameter(f"expected a JSON object: {error}", param=param) from error


def read_ids(_ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[int]:
    """Turn repeated ids and ranges into ids."""
    from ensemble.api import parse_ids

    try:
        return [task_id for value in values for task_id in parse_ids(value)]
    except UsageError as error:
        raise click.BadParameter(str(error), param=param) from error
