"""Growing delays between tries. Pure: the caller waits."""

from __future__ import annotations


class Backoff:
    """Delays that double from *base_s* up to *cap_s* while failures follow each other."""

    def __init__(self, *, base_s: float, cap_s: float) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self.failures = 0

    def fail(self) -> float:
        """Count a failure; return the seconds to wait before the next try."""
        delay_s = min(self._cap_s, self._base_s * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return delay_s

    def succeed(self) -> None:
        """Forget the failures."""
        self.failures = 0
