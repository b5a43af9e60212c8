"""What is to stay as it is over time: memory, the database's size per task, and the time of a claim."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import asyncpg

from bench.memory import memory_of
from ensemble.core.database import DRIVER_ERRORS, connect
from ensemble.core.leases import register
from ensemble.core.model import JobMode, NewLauncher, SlotRoom, Vacancy
from ensemble.drivers import process
from ensemble.errors import EnsembleError
from tests.faults.soaking.ground import Ground

MEASURED = ("launcher", "pilot", "service")
_SIZE = """
    SELECT sum(pg_total_relation_size(c.oid))::bigint FROM pg_class c
     WHERE c.relnamespace = 'ensemble'::regnamespace AND c.relkind = 'r'
"""
_CLAIMS = 6


@dataclass
class Sample:
    """One look."""

    at_s: float
    #: MB (PSS) of each process, by role and what names it for good.
    memory: dict[str, dict[tuple[int, int], float]] = field(default_factory=dict)
    #: Bytes of tables and indexes for each task that is on record.
    bytes_per_task: float | None = None
    claim_ms: float | None = None


class _TakeBack(Exception):
    """Nothing of a probe is to stay."""


class Sampler:
    """Looks every few seconds."""

    def __init__(self, ground: Ground, count_tasks: Callable[[], int]) -> None:
        self._ground = ground
        self._count_tasks = count_tasks
        self.samples: list[Sample] = []

    async def watch(self, *, period_s: float) -> None:
        """Look for ever."""
        began = time.monotonic()
        while True:
            await asyncio.sleep(period_s)
            sample = Sample(time.monotonic() - began)
            for each in self._ground.processes():
                if each.role in MEASURED:
                    with contextlib.suppress(OSError, KeyError):  # it has just ended
                        memory = memory_of(each.pid).pss_mb
                        sample.memory.setdefault(each.role, {})[each.pid, each.start_ticks] = memory
            with contextlib.suppress(EnsembleError, TimeoutError, *DRIVER_ERRORS):
                async with asyncio.timeout(period_s):
                    await self._ask(sample)
            self.samples.append(sample)

    async def _ask(self, sample: Sample) -> None:
        connection = await connect(self._ground.site.address(), name="soak sample")
        try:
            size = await connection.fetchval(_SIZE)
            sample.bytes_per_task = size / max(self._count_tasks(), 1)
            sample.claim_ms = await claim_ms(connection)
        finally:
            connection.terminate()

    # ------------------------------------------------------------------ what came of it

    def report(self) -> list[str]:
        """Compare the first third of the time with the last."""
        lines = [
            self._line("database, bytes per task", lambda each: each.bytes_per_task),
            self._line("claim of one task, ms", lambda each: each.claim_ms),
        ]
        for role in MEASURED:
            name = f"{role}, largest, MB"
            lines.append(self._line(name, lambda each, role=role: largest(each, role)))
            lines += self._lives(role)
        return lines

    def _line(self, name: str, value: Callable[[Sample], float | None]) -> str:
        values = [found for each in self.samples if (found := value(each)) is not None]
        third = len(values) // 3
        if not third:
            return f"{name}: too few samples ({len(values)})"
        first, last = statistics.median(values[:third]), statistics.median(values[-third:])
        return f"{name}: {first:,.1f} -> {last:,.1f} ({len(values)} samples)"

    def _lives(self, role: str) -> list[str]:
        """Tell of the longest life how it began and ended: most are cut short."""
        lives: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
        for sample in self.samples:
            for who, memory in sample.memory.get(role, {}).items():
                lives[who].append((sample.at_s, memory))
        if not lives:
            return []
        life = max(lives.values(), key=lambda life: life[-1][0] - life[0][0])
        (began, first), (ended, last) = life[0], life[-1]
        return [
            f"  of {len(lives)} lives the longest, {ended - began:.0f} s: {first:.1f} -> {last:.1f} MB,"
            f" most {max(memory for _, memory in life):.1f}"
        ]


def largest(sample: Sample, role: str) -> float | None:
    """Return the memory of the largest process of a role."""
    return max(sample.memory.get(role, {}).values(), default=None)


async def claim_ms(connection: asyncpg.Connection) -> float:
    """Time claims of one task, each under a lease of its own; all of it is taken back."""
    times = []
    pool = _Pool(connection)
    node = Vacancy(nodes=1, share=Fraction(1), cores=2, all_cores=2, gpus=0, memory_mb=None)
    room = SlotRoom(free=(node,), whole=(node,), left_s=None, max_tasks=1, slots_per_node=64)
    for _ in range(_CLAIMS):
        with contextlib.suppress(_TakeBack):
            async with connection.transaction():
                lease = await register(pool, _who(), ttl_s=60)  # type: ignore[arg-type]
                lease._pool = pool
                began = time.perf_counter()
                await lease.claim(room, None)
                times.append(1000 * (time.perf_counter() - began))
                raise _TakeBack
    return statistics.median(times[1:])  # the first makes the session's plans


def _who() -> NewLauncher:
    return NewLauncher(
        identity=process.identity(None),
        version="soak",
        job_mode=JobMode.SERIAL,
        wf_filter=None,
        nodes=("probe",),
        scheduler="soak",
        scheduler_job_id=None,
    )


class _Pool:
    """One connection that stands for a pool: what a lease asks is part of its transaction."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self.fetch = connection.fetch

    @contextlib.asynccontextmanager
    async def acquire(self):
        yield self._connection
