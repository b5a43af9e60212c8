"""The clock of a host jumps under a running launcher (libfaketime, for it and all below it)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ensemble.core.model import Outcome
from ensemble.core.states import State
from tests.faults.witness import check, witnessed
from tests.integration.launching import WHEEL, Ensemble

LIBRARY = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")

pytestmark = [
    WHEEL,
    pytest.mark.skipif(
        not LIBRARY.exists(), reason="NOT TESTED: no libfaketime to set clocks with"
    ),
]


def fake(folder: Path) -> tuple[Path, dict[str, str]]:
    """Return a file that says by how much clocks are wrong, and the variables that make them so.

    Clocks that count since boot go on as they are, as in a host whose time is set.
    """
    dial = folder / "clock"
    dial.write_text("+0")
    return dial, {
        "LD_PRELOAD": os.fspath(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": os.fspath(dial),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


@pytest.mark.parametrize("mode", ["mpi", "serial"])
async def test_a_clock_that_jumps_costs_nothing(ens: Ensemble, tmp_path: Path, mode: str) -> None:
    """Forwards and back by more than a lease, while tasks run, end and are killed."""
    dial, variables = fake(tmp_path)
    script = "date +%s > begun; while [ ! -e go ]; do sleep 0.02; done; date +%s > ended"
    ids = await ens.store.add(
        [witnessed(script, time_limit_minutes=30, node_packing_count=2) for _ in range(4)]
    )
    launched = ens.launch(
        "--idle-timeout=0", "--time-limit-minutes=60", mode=mode, nodes=4, variables=variables,
        LAUNCHER_LEASE_TTL_S=60, LAUNCHER_HEARTBEAT_S=0.2,
    )  # fmt: skip
    await ens.reach(State.RUNNING, *ids, within_s=30)
    lease = await ens.leased(launched)
    for jump, task_id in (("+3d", ids[0]), ("-2d", ids[1]), ("+0", ids[2])):
        dial.write_text(jump)
        await _renewed(ens, lease)
        task = await ens.task(task_id)
        (ens.workdir(task) / "go").touch()
        await ens.reach(State.JOB_FINISHED, task_id)
    await ens.store.kill([ids[3]])
    assert await ens.leave(launched) == 0, launched.log
    folder = ens.workdir(await ens.task(ids[0]))
    begun, ended = (int((folder / name).read_text()) for name in ("begun", "ended"))
    assert ended - begun > 86_400, "no clock jumped"
    for task_id in ids:
        [attempt] = (await ens.store.detail(task_id)).attempts
        assert attempt.started_at is not None
        assert attempt.ended_at is not None
        assert attempt.claimed_at <= attempt.started_at <= attempt.ended_at
        assert (attempt.ended_at - attempt.claimed_at).total_seconds() < 120
        assert attempt.outcome is (Outcome.KILLED if task_id == ids[3] else Outcome.DONE)
    await check(ens)


async def _renewed(ens: Ensemble, lease: int) -> None:
    """Wait until a lease was renewed twice from now."""
    query = "SELECT renewed_at FROM lease WHERE id = $1 AND state = 'ACTIVE'"
    for _ in range(2):
        last = await ens.store.pool.fetchval(query, lease)
        assert last is not None, "the lease was lost"

        async def later(last: object = last) -> bool:
            return bool(await ens.store.pool.fetchval(f"{query} AND renewed_at > $2", lease, last))

        await ens.eventually(later)
