"""Many tasks from a file: CSV with a header, or JSON lines. Pure; every refusal names its line."""

from __future__ import annotations

import csv
import difflib
import io
import shlex
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import msgspec

from ensemble.core.model import NewTask, Output
from ensemble.errors import UsageError

Format = Literal["csv", "jsonl"]
_SUFFIXES: Mapping[str, Format] = {
    ".csv": "csv", ".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl",
}  # fmt: skip
#: Values of a row are added to those of the defaults.
_MERGED = ("params", "environ", "tags", "data")
#: Mappings of text to text; numbers in JSON become text.
_TEXTS = ("params", "environ", "tags")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One task of a file."""

    #: Where it begins, counted from 1.
    line: int
    task: NewTask


def choose_format(name: str, data: bytes) -> Format:
    """Tell the format by the file's name, else by the first character of what is in it."""
    for suffix, form in _SUFFIXES.items():
        if name.lower().endswith(suffix):
            return form
    return "jsonl" if data.removeprefix(_BOM).lstrip()[:1] in (b"{", b"[") else "csv"


def read(data: bytes, form: Format, defaults: Mapping[str, Any]) -> list[Record]:
    """Read the tasks of a file.

    Args:
        data: All of it, in UTF-8.
        form: Its format.
        defaults: Fields of `NewTask` for all rows; a row's own fields go before them.

    Raises:
        UsageError: A line is malformed; the message begins with its number.
    """
    rows = _csv_rows(data) if form == "csv" else _json_rows(data)
    return [Record(line, _build(line, fields, defaults)) for line, fields in rows]


def build(fields: Mapping[str, Any]) -> NewTask:
    """Make a task of checked and unchecked values alike.

    Raises:
        UsageError: A value has the wrong type, or is text that the database cannot hold.
    """
    try:
        new = msgspec.convert(fields, NewTask)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UsageError(_explain(str(error))) from error
    check_storable(new)
    return new


def check_storable(new: NewTask) -> None:
    """Raise UsageError for text or numbers that PostgreSQL cannot hold."""
    try:
        encoded = msgspec.json.encode(new)
    except UnicodeEncodeError as error:
        raise UsageError("some text is not valid Unicode (UTF-8)") from error
    except (OverflowError, RecursionError, ValueError) as error:
        raise UsageError(f"some value cannot be stored: {error}") from error
    # The escape is also how a backslash before "u0000" looks, hence the second look.
    if b"\\u0000" in encoded and _has_nul(msgspec.to_builtins(new)):
        raise UsageError("a NUL character cannot be stored")
    for parent in new.parents:
        if isinstance(parent, int) and not 0 <= parent < 2**63:
            raise UsageError(f"parent {parent} is not the id of a task")


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(_has_nul(key) or _has_nul(item) for key, item in value.items())
    return isinstance(value, list | tuple) and any(map(_has_nul, value))


# ---------------------------------------------------------------------------- rows


def _build(line: int, fields: dict[str, Any], defaults: Mapping[str, Any]) -> NewTask:
    merged = {**defaults, **fields}
    if "app" in fields:
        merged["command"] = fields.get("command")
    elif "command" in fields:
        merged["app"] = None
    for name in _MERGED:
        if name in defaults and isinstance(fields.get(name), dict):
            merged[name] = {**defaults[name], **fields[name]}
    try:
        return build(merged)
    except UsageError as error:
        raise UsageError(f"line {line}: {error}") from error


def _json_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(data.removeprefix(_BOM).split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            fields = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"line {line}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise UsageError(f"line {line}: expected a JSON object, one a line, for each task")
        yield line, _as_fields(line, fields)


def _as_fields(line: int, given: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in given.items() if value is not None}
    for name in fields:
        if name not in _types():
            close = difflib.get_close_matches(name, _types(), n=1)
            hint = f"did you mean {close[0]}?" if close else "values for a command go into params"
            raise UsageError(f"line {line}: unknown field {name!r}; {hint}")
    for name in _TEXTS:
        if isinstance(fields.get(name), dict):
            fields[name] = {key: _as_text(value) for key, value in fields[name].items()}
    return fields


def _as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _csv_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"line {line}: not UTF-8: {error.reason}") from error
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in lines:
            if not any(cell.strip() for cell in row):
                pass  # also the rows of commas that spreadsheets leave at the end
            elif not header:
                header = _header(line, row)
            else:
                yield line, _cells(line, header, row)
            line = lines.line_num + 1
    except csv.Error as error:
        raise UsageError(f"line {line}: not CSV: {error}") from error


def _header(line: int, row: Sequence[str]) -> list[str]:
    names = [name.strip() for name in row]
    for place, name in enumerate(names, 1):
        if not name:
            raise UsageError(f"line {line}: column {place} of the header has no name")
        if name in names[: place - 1]:
            raise UsageError(f"line {line}: the header names column {name!r} twice")
    return names


def _cells(line: int, header: Sequence[str], row: Sequence[str]) -> dict[str, Any]:
    if len(row) != len(header):
        raise UsageError(f"line {line}: {len(row)} cells, but the header names {len(header)}")
    fields: dict[str, Any] = {}
    params: dict[str, str] = {}
    for name, cell in zip(header, row, strict=True):
        if cell == "":
            continue
        kind = _types().get(name)
        if kind is None:
            params[name] = cell
            continue
        try:
            fields[name] = _read_cell(kind, cell)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise UsageError(f"line {line}: {name} is {cell!r}: {_explain(str(error))}") from error
    if params:
        fields["params"] = {**params, **fields.get("params", {})}
    return fields


def _read_cell(kind: Any, cell: str) -> Any:
    """Read a cell as a field's type: lists as JSON or as shell words, mappings as JSON."""
    choices = typing.get_args(kind)
    shape = typing.get_origin(kind)
    if shape is list and not cell.lstrip().startswith("["):
        words = shlex.split(cell)
        return [_as_id(word) for word in words] if int in typing.get_args(choices[0]) else words
    if shape is dict:
        found = msgspec.json.decode(cell, type=dict[str, Any])
        is_text = choices == (str, str)
        return {k: _as_text(v) for k, v in found.items()} if is_text else found
    if shape is list:
        return msgspec.json.decode(cell, type=kind)
    if kind is str or str in choices:
        return cell
    return msgspec.convert(cell.strip(), kind, strict=False)


def _as_id(word: str) -> int | str:
    return int(word) if word.isascii() and word.isdecimal() and len(word) < 20 else word


@cache
def _types() -> dict[str, Any]:
    return typing.get_type_hints(NewTask)


def _explain(message: str) -> str:
    """Turn `Expected `int`, got `str` - at `$.num_nodes`` into `num_nodes: expected int, got str`."""
    what, _, where = message.replace("`", "").partition(" - at ")
    what = what[:1].lower() + what[1:]
    if what.startswith("invalid enum value"):  # there is but one
        what += f"; use {', '.join(Output)}"
    field = where.removeprefix("$").removeprefix(".")
    return f"{field}: {what}" if field else what
