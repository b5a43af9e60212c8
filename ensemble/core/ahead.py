"""Single-node tasks claimed for nodes that will be free in a moment. Pure.

Without them a node would wait for the store's answer after each short task; with more, work would
be hoarded away from other launchers. So they are bounded in time, and there are none for long
tasks (docs/decisions/0006-claim-ahead-for-short-tasks.md).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection

from ensemble.core.events import Pair
from ensemble.core.model import Claim

#: Runs longer than this are not claimed ahead.
_SHORT_S = 1.0
#: How much work is claimed ahead, in seconds of a node and at most in tasks a node.
_AHEAD_S = 0.25
_AHEAD_PER_NODE = 16
#: Ticks in which no node came free, after which what was claimed ahead is given back.
_PATIENCE_TICKS = 3


class Ahead:
    """The tasks claimed ahead, in claim order, and how many there should be."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._claims: deque[Claim] = deque()
        #: The usual length of a single-node run, in seconds; None until one has ended.
        self._usual_s: float | None = None
        self._still_ticks = 0

    def __len__(self) -> int:
        return len(self._claims)

    @property
    def pairs(self) -> frozenset[Pair]:
        """The attempts that are held here."""
        return frozenset((claim.id, claim.attempt) for claim in self._claims)

    def wanted(self) -> int:
        """Return how many tasks to hold for the next moment."""
        if self._usual_s is None or self._usual_s > _SHORT_S:
            return 0
        soon = _AHEAD_S / max(self._usual_s, 1e-3)
        return math.ceil(self._nodes * min(soon, _AHEAD_PER_NODE))

    def learn(self, took_s: float) -> None:
        """Take in the length of a single-node run: a moving mean of them is the usual one."""
        took_s = max(took_s, 0.0)
        last_s = took_s if self._usual_s is None else self._usual_s
        self._usual_s = last_s + (took_s - last_s) / 8

    def add(self, claim: Claim) -> None:
        """Keep a task for the next free node."""
        self._claims.append(claim)

    def pop(self) -> Claim:
        """Take the first task out, for a node that is free."""
        return self._claims.popleft()

    def take(self, pairs: Collection[Pair]) -> list[Claim]:
        """Take out those of *pairs* that are here."""
        found = [claim for claim in self._claims if (claim.id, claim.attempt) in pairs]
        self._claims = deque(claim for claim in self._claims if claim not in found)
        return found

    def clear(self) -> list[Claim]:
        """Take all out."""
        claims = list(self._claims)
        self._claims.clear()
        return claims

    def node_freed(self) -> None:
        """Note that nodes do come free."""
        self._still_ticks = 0

    def tick(self) -> list[Claim]:
        """Count a tick; take all out when no node came free for too long: others may have some."""
        self._still_ticks += 1
        if not self._claims or self._still_ticks < _PATIENCE_TICKS:
            return []
        self._usual_s = None
        return self.clear()
