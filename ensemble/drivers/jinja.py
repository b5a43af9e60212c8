"""The part of Jinja2 that job templates are written in: enough for a script, and nothing that could hang or escape.

There are no loops, calls, attributes or growing texts, so that rendering ends, at once, whatever is in the file.
Every printed value is quoted for the shell.
"""

from __future__ import annotations

import difflib
import errno
import math
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from ensemble.errors import EnsembleError, TemplateError

#: Limits that no job template comes near.
_MOST_BYTES = 256 * 1024
_MOST_INCLUDES = 50
_MOST_NUMBER = 10**12


class Raw(str):
    """A command line that is ready to be printed: it is not quoted again."""

    __slots__ = ()


def quote(value: object) -> str:
    """Print a value so that the shell reads it as one word."""
    if isinstance(value, Raw):
        return value
    if value is None:
        raise jinja2.TemplateRuntimeError(
            "the value to be printed is none: put {% if … %} and {% endif %} around the line"
        )
    if not isinstance(value, str | int | float | jinja2.Undefined):
        raise jinja2.TemplateRuntimeError(f"a {type(value).__name__} cannot be printed")
    # A plain str: Jinja's own kind would turn quotes into HTML. What is undefined raises its error here.
    return shlex.quote(str(value))


# Filters


def hms(minutes: object) -> str:
    """Return minutes as HH:MM:SS: 90 is 01:30:00, 1500 is 25:00:00."""
    hours, seconds = divmod(max(1, round(60 * _minutes("hms", minutes))), 3600)
    return f"{hours:02}:{seconds // 60:02}:{seconds % 60:02}"


def hm(minutes: object) -> str:
    """Return minutes as HH:MM, a part of a minute as a whole one: 90 is 01:30."""
    hours, rest = divmod(math.ceil(_minutes("hm", minutes)), 60)
    return f"{hours:02}:{rest:02}"


def _minutes(name: str, value: object) -> float:
    if not _is_number(value) or not 0 < value < _MOST_NUMBER:
        raise jinja2.TemplateRuntimeError(f"{name} wants minutes, a number above 0, not {value!r}")
    return value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Templates

#: All that there may be in a template.
_ALLOWED: tuple[type[nodes.Node], ...] = (
    nodes.Output, nodes.TemplateData, nodes.If, nodes.Assign, nodes.Include, nodes.Name, nodes.Const,
    nodes.List, nodes.Tuple, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not,
    nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Keyword, nodes.Neg, nodes.Pos,
    nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod,
)  # fmt: skip
_FILTERS = ("abs", "default", "int", "lower", "max", "min", "trim", "upper")
#: What leaves no quote open: an escaped character, a quoted text, a comment.
_CLOSED = re.compile(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*"|(?<!\S)#.*""")


class Environment(SandboxedEnvironment):
    """Jinja2 without all that could take long, or reach beyond the template's directory."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%"})

    def __init__(self, folder: Path, *, known: Mapping[str, object]) -> None:
        super().__init__(
            loader=_Loader(folder, known),
            undefined=jinja2.StrictUndefined,
            finalize=quote,
            autoescape=False,
            keep_trailing_newline=True,
            trim_blocks=True,
            lstrip_blocks=True,
            # In a shell script, `${#words}` begins no comment.
            comment_start_string="{##",
            comment_end_string="##}",
            # Every use of a file goes through the loader, which counts.
            cache_size=0,
        )
        self.filters = {name: self.filters[name] for name in _FILTERS} | {"hms": hms, "hm": hm}
        self.globals.clear()

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute with numbers only, and not with huge ones: texts would double with every line."""
        if not all(_is_number(side) and abs(side) <= _MOST_NUMBER for side in (left, right)):
            raise jinja2.TemplateRuntimeError(f"{operator} is for numbers only")
        return super().call_binop(context, operator, left, right)


class _Loader(jinja2.BaseLoader):
    """Reads files of one directory, and refuses what has no place in a job template."""

    def __init__(self, folder: Path, known: Mapping[str, object]) -> None:
        self._folder = folder
        self._known = set(known)
        self._loads = 0

    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, None]:
        """Return a file's text and its path."""
        path = self._folder / template
        if Path(template).name != template or not mode_of(path):
            raise jinja2.TemplateNotFound(template, f"there is no {template!r} in {self._folder}")
        self._loads += 1
        if self._loads > _MOST_INCLUDES:
            raise TemplateError(
                f"{path}: included again and again, more than {_MOST_INCLUDES} times"
            )
        text = _read(path)
        for line, message in self._find_faults(environment, text, str(path)):
            raise jinja2.TemplateSyntaxError(message, line, template, str(path))
        return text, str(path), None

    def _find_faults(
        self, environment: jinja2.Environment, text: str, path: str
    ) -> Iterator[tuple[int, str]]:
        tree = environment.parse(text, path, path)
        filters = set(environment.filters)
        for node in tree.find_all(nodes.Node):
            if not isinstance(node, _ALLOWED):
                word = type(node).__name__.lower()
                yield (
                    node.lineno,
                    f"{word!r} has no place in a job template: there are if, set, include, "
                    f"comparisons, arithmetic and the filters {', '.join(sorted(filters))}",
                )
            elif isinstance(node, nodes.Filter) and node.name not in filters:
                yield node.lineno, f"there is no filter {node.name!r}{_hint(node.name, filters)}"
            elif isinstance(node, nodes.Include) and not isinstance(node.template, nodes.Const):
                yield node.lineno, "include wants the name of one file, in quotes"
            elif isinstance(node, nodes.Assign) and any(node.find_all((nodes.List, nodes.Tuple))):
                yield node.lineno, "set is for one text or number"
        yield from self._find_unknown_names(tree)
        yield from _find_quoted_values(environment, text)

    def _find_unknown_names(self, tree: nodes.Template) -> Iterator[tuple[int, str]]:
        # Also where they are not used this time. What a template tests for may be missing.
        names = list(tree.find_all(nodes.Name))
        self._known |= {name.name for name in names if name.ctx == "store"} | set(_probed(tree))
        for name in names:
            if name.name not in self._known:
                yield (
                    name.lineno,
                    f"there is no variable {name.name!r}{_hint(name.name, self._known)}",
                )


def _probed(tree: nodes.Template) -> Iterator[str]:
    for test in tree.find_all((nodes.Test, nodes.Filter)):
        if test.name in {"defined", "undefined", "default"} and isinstance(test.node, nodes.Name):
            yield test.node.name


def _find_quoted_values(environment: jinja2.Environment, text: str) -> Iterator[tuple[int, str]]:
    """Find values inside quotes, where their own quotes would end those: `"{{ site }}"`."""
    line = ""
    for number, kind, word in environment.lex(text):
        if kind == "data":
            line = (line + word).rpartition("\n")[2]
        elif kind == "variable_begin":
            if re.search("['\"]", _CLOSED.sub("", line)):
                yield number, "a value stands inside quotes: it is quoted already, leave them out"
            line += "x"


def mode_of(path: Path) -> int:
    """Return the mode of a file, 0 where there is none.

    Raises:
        EnsembleError: The file system does not say: that is no sign that there is none.
    """
    try:
        return path.stat().st_mode
    except ValueError:  # a null byte
        return 0
    except OSError as error:
        if error.errno in _ABSENT:
            return 0
        raise _unreadable(path, error) from error


_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})


def _unreadable(path: Path, error: OSError) -> EnsembleError:
    # No fault of the template's: later it may be read.
    return EnsembleError(f"cannot read {path}: {error.strerror or error}")


def _read(path: Path) -> str:
    if not stat.S_ISREG(mode_of(path)):
        raise TemplateError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > _MOST_BYTES:
        raise TemplateError(f"{path} is larger than {_MOST_BYTES // 1024} KB: no job template is")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TemplateError(f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x})") from error


def _hint(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"
