"""Structured logs: console lines for a terminal, JSON lines for a daemon.

Events are `noun.verb_past` with keys; ids are bound once (`get_logger().bind(launcher=7)`).
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:  # structlog takes 40 ms to import, which most commands can do without
    from structlog.typing import FilteringBoundLogger, Processor

    Logger = FilteringBoundLogger


def get_logger(**bound: Any) -> Logger:
    """Return a logger with *bound* keys on every line."""
    import structlog

    logger: Logger = structlog.get_logger(**bound)
    return logger


def configure(*, as_json: bool, debug: bool = False, stream: TextIO | None = None) -> None:
    """Set up logging for this process, once, from its entry point.

    Args:
        as_json: One JSON object a line instead of console lines.
        debug: Show debug events too.
        stream: Where lines go; standard error when None.
    """
    import structlog

    out = stream or sys.stderr
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=out.isatty(), pad_event_to=24)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.DEBUG if debug else logging.INFO
        ),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
