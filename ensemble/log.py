"""Structured logs: console lines for a terminal, JSON lines for a daemon.

Events are `noun.verb_past` with keys; ids are bound once (`get_logger(launcher=7)`).
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:  # structlog takes 40 ms to import, which a command that logs nothing can save
    from structlog.typing import FilteringBoundLogger, Processor

    Logger = FilteringBoundLogger


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    as_json: bool
    debug: bool
    stream: TextIO | None


_wishes: list[_Wish] = []


def configure(*, as_json: bool, debug: bool = False, stream: TextIO | None = None) -> None:
    """Set up logging for this process, from its entry point; takes effect with the first logger.

    Args:
        as_json: One JSON object a line instead of console lines.
        debug: Show debug events too.
        stream: Where lines go; standard error when None.
    """
    _wishes[:] = [_Wish(as_json=as_json, debug=debug, stream=stream)]


def get_logger(**bound: Any) -> Logger:
    """Return a logger with *bound* keys on every line."""
    import structlog

    while _wishes:
        _apply(_wishes.pop())
    logger: Logger = structlog.get_logger().bind(**bound)  # not the proxy, which binds at each call
    return logger


def _apply(wish: _Wish) -> None:
    import structlog

    out = wish.stream or sys.stderr
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if wish.as_json
        else structlog.dev.ConsoleRenderer(colors=out.isatty(), pad_event_to=24)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(
                fmt="iso" if wish.as_json else "%H:%M:%S", utc=wish.as_json
            ),
            structlog.processors.format_exc_info,
            *(() if wish.as_json else (_clean,)),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.DEBUG if wish.debug else logging.INFO
        ),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _Steady(out))),
    )


def _clean(_logger: Any, _name: str, event: dict[str, Any]) -> dict[str, Any]:
    """Write out what would act on a terminal: much of what is logged, others have written."""
    return {
        key: "".join(
            c if c.isprintable() or (c == "\n" and key == "exception") else ascii(c)[1:-1]
            for c in value
        )
        if isinstance(value, str) and not value.isprintable()
        else value
        for key, value in event.items()
    }


class _Steady:
    """A stream that cannot fail its writer: terminals close and disks fill up, and work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()
