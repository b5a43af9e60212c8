"""What a launcher did: for its progress line and its summary."""

from __future__ import annotations

from collections import Counter

from ensemble.core.model import End, Outcome


class Tally:
    """Counts ends and busy node-seconds."""

    def __init__(self, *, nodes: int, now: float) -> None:
        self._nodes = nodes
        self._began = self._last = now
        self._first_start: float | None = None
        self._last_end = now
        self._busy_s = 0.0
        self._outcomes: Counter[Outcome] = Counter()

    @property
    def done(self) -> int:
        """Runs that ended well."""
        return self._outcomes[Outcome.DONE]

    @property
    def ended(self) -> int:
        """Runs that ended, however."""
        return sum(n for outcome, n in self._outcomes.items() if outcome is not Outcome.GIVEN_BACK)

    def count(self, end: End) -> None:
        """Take in the end of a run."""
        self._outcomes[end.outcome] += 1
        if end.outcome is not Outcome.GIVEN_BACK:
            self._last_end = self._last

    def pass_time(self, now: float, busy_nodes: float) -> None:
        """Say how many nodes were busy until *now*, in monotonic seconds."""
        if busy_nodes and self._first_start is None:
            self._first_start = self._last
        self._busy_s += (now - self._last) * busy_nodes
        self._last = now

    def summary(self) -> dict[str, object]:
        """Return what is logged and printed at the end; times in seconds."""
        began = self._began if self._first_start is None else self._first_start
        wall_s = max(self._last_end - began, 0.0)
        busy = self._busy_s / (wall_s * self._nodes) if wall_s > 0 else 0.0
        failed = {
            str(outcome): n
            for outcome, n in sorted(self._outcomes.items())
            if outcome not in (Outcome.DONE, Outcome.GIVEN_BACK)
        }
        return {
            "tasks": self.ended,
            "done": self.done,
            **failed,
            "wall_s": round(wall_s, 2),
            "utilisation": f"{min(busy, 1.0):.1%}",
        }
