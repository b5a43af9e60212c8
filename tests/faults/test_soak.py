"""The soak in small, some seconds of users and faults at full load, from one seed; and what longer ones have found."""

from __future__ import annotations

import os
import signal
from typing import Any

import asyncpg

from ensemble.core.states import State
from ensemble.service import spool
from ensemble.service.reaper import reap
from tests.faults import witness
from tests.faults.soak import Plan, soak
from tests.faults.witness import witnessed
from tests.integration.launching import WHEEL, Ensemble, Launched

SEED = 20
QUICK: dict[str, Any] = {"LAUNCHER_LEASE_TTL_S": "4", "LAUNCHER_HEARTBEAT_S": "0.5"}
#: The first attempt does not end by itself.
ONCE = '[ "$ENSEMBLE_ATTEMPT" -gt 1 ] || sleep 600'


async def test_some_seconds_of_every_kind_of_trouble_break_nothing() -> None:
    made, path = await soak(Plan(seconds=6, seed=SEED, gap_s=0.6, period_s=1, tasks=3000, mass=0.9))
    assert made.wrong == [], f"the site is kept in {path}\n" + "\n".join(made.lines)
    assert len(made.feeder.ids) >= 1500


async def finish(ens: Ensemble) -> None:
    """Have another launcher run what is to run again; then look at everything."""
    other = ens.launch("--persistent", **QUICK)
    await ens.reach(State.JOB_FINISHED)
    other.signal(signal.SIGTERM)
    assert await ens.leave(other) == 0, other.log
    await witness.check(ens)


@WHEEL
async def test_a_dead_launcher_whose_guard_stands_still_leaves_nothing_beside_the_next_attempt(
    ens: Ensemble,
) -> None:
    await ens.store.add([witnessed(ONCE) for _ in range(2)])
    launched = ens.launch("--persistent", **QUICK)
    await ens.reach(State.RUNNING)
    child = launched.pid
    launched.signal(signal.SIGSTOP)
    os.kill(child, signal.SIGKILL)
    await finish(ens)
    assert await ens.leave(launched) != 0


@WHEEL
async def test_a_launcher_that_stands_still_without_a_guard_is_ended_when_its_lease_runs_out(
    ens: Ensemble,
) -> None:
    await ens.store.add([witnessed(ONCE) for _ in range(2)])
    launched = ens.launch("--persistent", **QUICK)
    await ens.reach(State.RUNNING)
    os.kill(launched.pid, signal.SIGSTOP)
    launched.guard.kill()
    await finish(ens)


@WHEEL
async def test_of_a_lease_that_runs_out_in_silence_no_key_is_left(
    ens: Ensemble, owner: asyncpg.Connection[Any]
) -> None:
    launched = await joined(ens)
    # As if on another host: nobody has evidence.
    await owner.execute("UPDATE launcher SET host = 'elsewhere'")
    child = launched.pid
    launched.signal(signal.SIGSTOP)
    os.kill(child, signal.SIGKILL)
    launched.signal(signal.SIGKILL)
    await ens.leave(launched)

    async def is_reaped() -> bool:
        await reap(ens.store, spool.folder(ens.site.path))
        return await ens.store.launchers() == []

    await ens.eventually(is_reaped)
    assert [path.name for path in launched.run_directory.iterdir() if path.suffix != ".log"] == []


async def joined(ens: Ensemble) -> Launched:
    launched = ens.launch("--persistent", mode="serial", nodes=1, **QUICK)
    await ens.joined(launched, 1)
    assert (launched.run_directory / "link.json").exists()
    return launched
