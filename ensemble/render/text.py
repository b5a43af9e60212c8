"""Words for people: times, spans, id lists, and text that cannot act on a terminal. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

#: Longer lists of ids are written as ranges.
_LIST_UP_TO = 20


def clean(text: str) -> str:
    """Return *text* with control characters, escapes and the like written out, not acted on."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def clean_lines(text: str) -> list[str]:
    """Return the lines of *text*, each without anything that acts on a terminal."""
    return [clean(line.expandtabs().rstrip()) for line in text.splitlines()]


def span(seconds: float) -> str:
    """Write a duration with two units at most: `0.4s`, `42s`, `4m12s`, `2h05m`, `3d04h`."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f}s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def local_time(at: datetime | None) -> str:
    """Write a moment in the reader's time zone; empty when there is none."""
    return "" if at is None else at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def short_time(at: datetime) -> str:
    """Write a moment of this year for a narrow column, in the reader's time zone."""
    return at.astimezone().strftime("%m-%d %H:%M:%S")


def list_ids(ids: Sequence[int]) -> list[str]:
    """Write ids one by one when they are few, else as ranges like `3-1002`, in their order."""
    if len(ids) <= _LIST_UP_TO:
        return [str(task_id) for task_id in ids]
    runs: list[list[int]] = []
    for task_id in ids:
        if runs and task_id == runs[-1][1] + 1:
            runs[-1][1] = task_id
        else:
            runs.append([task_id, task_id])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]


def plural(count: int, noun: str) -> str:
    """Write a number of things: `1 task`, `1,204 tasks`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def group_nodes(nodes: Sequence[str], limit: int = 4) -> str:
    """Write node names, the first few of many."""
    more = f" +{len(nodes) - limit}" if len(nodes) > limit else ""
    return clean(",".join(nodes[:limit])) + more
