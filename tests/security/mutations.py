"""Texts as an enemy would send them: recorded ones, damaged in the ways that break parsers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, settings, strategies as st

#: What programs stumble over: numbers without end, depth without end, text that is none, words with a meaning elsewhere.
TOKENS = [
    "",
    "\0",
    "\n",
    "\r\n",
    " ",
    "\t",
    "-1",
    "0",
    "-0",
    "٣",
    "9" * 25,
    "9" * 5000,
    "1e400",
    "1.5",
    "NaN",
    "Infinity",
    "-Infinity",
    "null",
    "true",
    "[]",
    "{}",
    '""',
    "[" * 3000,
    '{"a":' * 3000,
    "<a>" * 3000,
    "(" * 3000,
    "\ud800",
    '"\\ud800"',
    "\ufeff",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\u202e",
    "\u2028",
    "%s%n{0}{x}",
    "'; DROP TABLE task; --",
    "$(id)`id`",
    "../../../etc/passwd",
    "--",
    "x" * 70_000,
    "|",
    ",",
    ":",
    "=",
    '"',
    "\\",
    "1-999999999999999999",
    "[1-100000]",
]

#: Fast enough to look at many parsers, and always the same ones: a failure is told, not guessed at.
quick = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@st.composite
def damaged(draw: Callable[..., Any], seeds: Sequence[str]) -> str:
    """Return one of some texts with a few wounds, or something else altogether."""
    text: str = draw(st.sampled_from([*seeds, ""]))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 2, 7, 40, 10**6])))
        what = draw(st.sampled_from(["cut", "put", "again", "end"]))
        if what == "cut":
            text = text[:start] + text[end:]
        elif what == "put":
            text = text[:start] + draw(st.sampled_from(TOKENS) | st.text(max_size=6)) + text[end:]
        elif what == "again":
            text = text[:end] + text[start:end] + text[end:]
        else:
            text = text[:start]
    return text


def damaged_bytes(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Return bytes likewise; not all of them are UTF-8."""
    texts = damaged([seed.decode("latin-1") for seed in seeds])
    whole = texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    return whole | texts.map(lambda text: text.encode("latin-1", "replace"))


def within(seconds: float, call: Callable[[], Any], *errors: type[Exception]) -> Any:
    """Return what a parser returns, None after an error of its own; any other one is a fault, and so is slowness.

    Args:
        seconds: Very many times what it takes on an idle machine.
    """
    begun = time.process_time()
    try:
        return call()
    except errors:
        return None
    finally:
        assert time.process_time() - begun < seconds
