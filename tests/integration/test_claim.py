"""Claims: the right tasks, in the right order, each to one launcher."""

from __future__ import annotations

import asyncio

import pytest

from ensemble.core.leases import Reaping
from ensemble.core.model import NewTask, Room
from ensemble.core.store import Store
from ensemble.errors import LeaseLostError


async def take(lease, nodes=1000, left_s=None, max_tasks=1000, workflows=None, ahead=0):
    room = Room(nodes=nodes, left_s=left_s, max_tasks=max_tasks, ahead=ahead)
    return [claim.id for claim in await lease.claim(room, workflows)]


async def put(desk, *shapes):
    """Add tasks of (priority, num_nodes, wall_time_minutes)."""
    return await desk.store.add(
        [
            NewTask(command=["true"], priority=p, num_nodes=n, wall_time_minutes=w)
            for p, n, w in shapes
        ]
    )


async def test_priority_then_larger_then_longer_then_older_comes_first(desk):
    a, b, c, d, e, f = await put(
        desk, (0, 1, 5), (0, 1, 5), (0, 1, 9), (0, 4, 1), (-1, 8, 9), (7, 1, 0)
    )
    assert await take(await desk.register()) == [f, d, c, a, b, e]


async def test_only_what_fits_the_free_nodes_is_taken(desk):
    shapes = [(5, 64, 0), (5, 8, 0), (5, 3, 0), (5, 3, 0), (1, 16, 0), (1, 2, 0), (0, 1, 0)]
    ids = await put(desk, *shapes)
    lease = await desk.register()
    # 14 nodes: 8 + 3 + 3, and nothing is left for the rest.
    assert await take(lease, nodes=14) == [ids[1], ids[2], ids[3]]
    assert await take(lease, nodes=3) == [ids[5], ids[6]]
    assert await take(lease, nodes=15) == []
    assert await take(lease, nodes=80) == [ids[0], ids[4]]


async def test_only_what_fits_the_time_left_is_taken(desk):
    long, exact, unstated = await put(desk, (9, 1, 11), (0, 1, 10), (0, 1, 0))
    lease = await desk.register()
    assert await take(lease, left_s=-1) == []
    assert await take(lease, left_s=599) == [unstated]
    assert await take(lease, left_s=600) == [exact]
    assert await take(lease) == [long]


async def test_no_more_is_taken_than_asked_for(desk):
    ids = await desk.add(5)
    lease = await desk.register()
    assert await take(lease, max_tasks=2) == ids[:2]
    assert await take(lease, nodes=0) == []
    assert await take(lease, max_tasks=0) == []
    assert await take(lease, nodes=1) == ids[2:3]


async def test_what_is_taken_ahead_is_one_node_wide(desk):
    wide, *narrow = await put(desk, (0, 4, 0), (0, 1, 0), (0, 1, 0), (0, 1, 0), (0, 1, 0))
    lease = await desk.register()
    assert await take(lease, nodes=2, ahead=1) == narrow[:3]
    assert await take(lease, nodes=0, ahead=9) == narrow[3:]
    assert await take(lease, nodes=4, ahead=9) == [wide]


async def test_many_classes_that_do_not_fit_do_not_hide_what_fits(desk):
    fits = await put(desk, (-500, 1, 0))
    await put(desk, *[(p, 64, 0) for p in range(150)], *[(p, 1, 99) for p in range(-150, 0)])
    assert await take(await desk.register(), nodes=8, left_s=600) == fits


@pytest.mark.parametrize(
    ("wf_filter", "found"),
    [
        ("scr", ["screen", "screen_2", "a%screen"]),
        ("screen_", ["screen_2"]),
        ("%", ["a%screen"]),
        ("_", ["screen_2"]),
        ("\\", ["back\\slash"]),
        ("'", ["o'clock"]),
        ("Screen", []),
        ("", ["screen", "screen_2", "a%screen", "back\\slash", "o'clock", ""]),
    ],
)
async def test_the_filter_is_a_substring_and_no_pattern(desk, wf_filter, found):
    names = ["screen", "screen_2", "a%screen", "back\\slash", "o'clock", ""]
    await desk.store.add([NewTask(command=["true"], workflow=name) for name in names])
    lease = await desk.register()
    workflows = await desk.store.workflow_ids(wf_filter)
    taken = await lease.claim(Room(nodes=99, left_s=None, max_tasks=99), workflows)
    assert [claim.workflow for claim in taken] == found


async def test_several_workflows_are_one_queue(desk):
    a, b, c = await desk.store.add(
        [
            NewTask(command=["true"], workflow="x1", priority=1),
            NewTask(command=["true"], workflow="x2", priority=2),
            NewTask(command=["true"], workflow="x1", priority=2, num_nodes=2),
        ]
    )
    workflows = await desk.store.workflow_ids("x")
    assert await take(await desk.register(), workflows=workflows) == [c, b, a]


async def test_what_somebody_has_locked_is_skipped(desk, psql):
    first, second = await desk.add(2)
    lease = await desk.register()
    async with psql.transaction():
        await psql.execute("UPDATE task SET priority = 3 WHERE id = $1", first)
        assert await take(lease) == [second]
    assert await take(lease) == [first]


async def test_several_claimers_share_no_task_and_leave_none(address, desk):
    ids = await desk.add(2000)
    leases = [await desk.register() for _ in range(4)]
    taken = []

    async def work(lease):
        while batch := await take(lease, nodes=17):
            taken.extend(batch)

    async with asyncio.TaskGroup() as group:
        for lease in leases:
            group.create_task(work(lease))
    while rest := await take(leases[0]):  # what all four had locked at the same moment
        taken.extend(rest)
    assert sorted(taken) == ids
    assert await desk.sql("SELECT count(*) FROM attempt") == len(ids)


async def test_a_claim_under_a_closed_lease_takes_nothing(desk):
    task = await desk.add_one()
    lease = await desk.register()
    await Reaping(desk.store.pool).bury(lease.id, state="EXPIRED", evidence="gone")
    with pytest.raises(LeaseLostError, match=f"lease {lease.id} is not active"):
        await take(lease)
    with pytest.raises(LeaseLostError):
        await lease.renew()
    assert await desk.tell(task) == ("PREPROCESSED", 0, False)


async def test_a_reaper_waits_for_a_claim_and_then_finds_its_tasks(desk, psql, eventually):
    task = await desk.add_one()
    lease = await desk.register()
    reaping = Reaping(desk.store.pool)
    async with asyncio.TaskGroup() as group:
        async with psql.transaction():
            await psql.fetch("SELECT * FROM claim_tasks($1, NULL, 1, 99, 0, 1)", lease.id)
            assert await reaping.expire() == []  # skips it
            await lease.renew()  # is not blocked by the claim
            closing = group.create_task(reaping.bury(lease.id, state="EXPIRED", evidence="gone"))
            await eventually(lambda: is_waiting(desk))
        assert await closing
    assert await reaping.release() == 1
    assert await desk.tell(task) == ("PREPROCESSED", 1, False)


async def test_a_claim_waits_for_a_reaper_and_then_takes_nothing(desk, psql, eventually):
    task = await desk.add_one()
    lease = await desk.register()
    async with psql.transaction():
        assert await psql.fetchval("SELECT close_lease($1, 'EXPIRED', 'gone')", lease.id)
        claim = asyncio.create_task(take(lease))
        await eventually(lambda: is_waiting(desk))
    with pytest.raises(LeaseLostError):
        await claim
    assert await desk.tell(task) == ("PREPROCESSED", 0, False)


async def is_waiting(desk):
    return await desk.sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")


async def test_an_open_kill_blocks_neither_heartbeat_nor_claim_nor_other_reports(desk, psql):
    lease = await desk.register()
    victim, other = await desk.add(2)
    first, second = await desk.begin(lease)
    late = await desk.add_one()
    async with psql.transaction():
        await psql.execute("UPDATE task SET state = 'USER_KILLED' WHERE id = $1", victim)
        async with asyncio.timeout(5):
            await lease.renew()
            assert await take(lease) == [late]
            assert await desk.end(lease, second) == "applied"
            assert await desk.end(lease, first) == "busy"
            assert await lease.drain("time") == 0
    assert await desk.end(lease, first) == "applied"
    assert await desk.tell(victim) == ("USER_KILLED", 1, False)
    assert await desk.tell(other) == ("JOB_FINISHED", 1, False)


async def test_a_claim_carries_all_that_it_takes_to_run(desk: object, store: Store):
    [parent, child] = await store.add(
        [
            NewTask(command=["true"], name="p"),
            NewTask(
                command="echo {x} '{{y}}'",
                params={"x": "a b"},
                args=["c"],
                name="n",
                workflow="w",
                parents=["p"],
                wait_for_parents=False,
                num_nodes=2,
                ranks_per_node=3,
                threads_per_rank=4,
                threads_per_core=2,
                gpus_per_rank=1,
                wall_time_minutes=7,
                time_limit_minutes=0.5,
                environ={"A": "1"},
                mpi_flags=["--x"],
                cpu_affinity="depth",
            ),
        ]
    )
    lease = await desk.register()
    claim, _ = await lease.claim(Room(nodes=9, left_s=None, max_tasks=9), None)
    assert claim.argv == ("echo", "a b", "{y}", "c")
    assert (claim.id, claim.attempt, claim.name, claim.workflow) == (child, 1, "n", "w")
    assert (claim.num_nodes, claim.ranks_per_node, claim.threads_per_rank) == (2, 3, 4)
    assert (claim.threads_per_core, claim.gpus_per_rank, claim.time_limit_minutes) == (2, 1, 0.5)
    assert (claim.environ, claim.mpi_flags, claim.cpu_affinity) == ({"A": "1"}, ("--x",), "depth")
    assert (claim.parent_ids, claim.workdir) == ((parent,), f"data/0/n_{child}")
