"""What a launcher asks the store for, and what it does when that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest

from ensemble.config import LauncherSettings
from ensemble.core.dispatch import Policy
from ensemble.core.model import JobMode, Node, Room
from ensemble.core.states import State
from ensemble.core.store import Store
from ensemble.errors import StoreUnavailableError
from ensemble.service.launcher import Launcher
from ensemble.service.runner import MpiRunner
from tests.integration.launching import WHEEL, Ensemble, sh
from tests.integration.storing import Desk

pytestmark = WHEEL


async def test_a_filter_that_could_not_be_looked_up_does_not_let_everything_through(
    desk: Desk,
) -> None:
    await desk.add(workflow="other")
    away = await Store.open(desk.store.address)
    await away.close()
    nodes = [Node(name="n", cores=1)]
    launcher = Launcher(
        store=away,
        lease=await desk.register(),
        nodes=nodes,
        settings=LauncherSettings(),
        policy=Policy(),
        wf_filter="mine",
        job_mode=JobMode.MPI,
        make_runner=lambda post, spawn: MpiRunner(
            nodes, cast("Any", None), max_launches=1, post=post, spawn=spawn
        ),
        guard=None,
        site=Path("nowhere"),
    )
    room = Room(nodes=1, left_s=None, max_tasks=1)
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            await launcher._claim(room)
    assert not (await desk.store.counts()).held


async def test_an_allocation_of_a_thousand_years_is_no_error(desk: Desk) -> None:
    (task,) = await desk.add()
    lease = await desk.register()
    claims = await lease.claim(Room(nodes=1, left_s=1e12, max_tasks=1), None)
    assert [claim.id for claim in claims] == [task]


async def test_another_releases_schema_brought_in_meanwhile_ends_no_running_task(
    ens: Ensemble, owner: asyncpg.Connection[Any]
) -> None:
    signature = "claim_tasks(bigint, int[], int, int, int, int)"
    rename = "ALTER FUNCTION {} RENAME TO {}"
    first = (await ens.store.add([sh("until test -e go; do sleep 0.05; done")]))[0]
    launched = ens.launch("--idle-timeout=0", nodes=2)
    await ens.reach(State.RUNNING, first)
    await owner.execute(rename.format(signature, "another_claim_tasks"))
    try:
        await ens.store.add([sh("true")])
        await ens.eventually(lambda: "claim_tasks" in launched.log)
        assert launched.guard.poll() is None
    finally:
        await owner.execute(rename.format(f"another_{signature}", "claim_tasks"))
    (ens.workdir(await ens.task(first)) / "go").touch()
    assert await ens.leave(launched) == 0, launched.log
    assert set(await ens.states()) == {State.JOB_FINISHED}
    assert len(await ens.outcomes(first)) == 1
