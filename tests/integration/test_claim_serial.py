"""Claims in serial mode: tasks of one rank that share nodes; exactly what fits, in order, each once."""

from __future__ import annotations

import asyncio
import random
from fractions import Fraction

import pytest

from ensemble.core.leases import Reaping
from ensemble.core.model import (
    Need,
    NewTask,
    Outcome,
    Room,
    SlotRoom,
    Unfit,
    Vacancy,
)
from ensemble.core.packing import SlotBook
from ensemble.errors import LeaseLostError


def vacancy(nodes=1, share=1, cores=8, all_cores=8, gpus=0, memory_mb=None):
    return Vacancy(
        nodes=nodes,
        share=Fraction(share),
        cores=cores,
        all_cores=all_cores,
        gpus=gpus,
        memory_mb=memory_mb,
    )


def room(*free, whole=None, left_s=None, max_tasks=1000, ahead=0, slots=1):
    return SlotRoom(
        free=free,
        whole=free if whole is None else (whole,),
        left_s=left_s,
        max_tasks=max_tasks,
        ahead=ahead,
        slots_per_node=slots,
    )


async def take(lease, *free, workflows=None, **more):
    return [claim.id for claim in await lease.claim(room(*free, **more), workflows)]


async def put(desk, count=1, **needs):
    return await desk.store.add([NewTask(command=["true"], **needs)] * count)


# ---------------------------------------------------------------------------- order


async def test_priority_then_longer_then_older_comes_first_whatever_the_shape(desk):
    [low] = await put(desk, priority=-1, wall_time_minutes=99, node_packing_count=8)
    first, second = await put(desk, 2, node_packing_count=8)
    [longer] = await put(desk, wall_time_minutes=5, node_packing_count=9)
    [packed] = await put(desk, node_packing_count=9)
    [high] = await put(desk, priority=3, memory_mb=5, node_packing_count=7)
    lease = await desk.register()
    assert await take(lease, vacancy(nodes=9)) == [high, longer, first, second, packed, low]


async def test_only_tasks_of_one_node_and_one_rank_are_taken(desk):
    await put(desk, 2, num_nodes=2, priority=9)
    await put(desk, 2, ranks_per_node=2, priority=9)
    tasks = await put(desk, 2, node_packing_count=4)
    assert await take(await desk.register(), vacancy(nodes=9), ahead=9) == tasks


async def test_a_claim_carries_what_is_to_be_packed(desk):
    await put(desk, node_packing_count=3, threads_per_rank=4, threads_per_core=2, gpus_per_rank=1,
              memory_mb=70, time_limit_minutes=2)  # fmt: skip
    lease = await desk.register()
    [claim] = await lease.claim(room(vacancy(gpus=1)), None)
    assert (claim.node_packing_count, claim.threads_per_rank, claim.threads_per_core) == (3, 4, 2)
    assert (claim.gpus_per_rank, claim.memory_mb, claim.output) == (1, 70, "file")
    assert (claim.attempt, claim.argv, claim.time_limit_minutes) == (1, ("true",), 2)


# ---------------------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    ("needs", "free", "slots", "fits"),
    [
        ({}, vacancy(nodes=3), 1, 3),
        ({}, vacancy(share=Fraction(63, 64)), 1, 0),
        ({}, vacancy(share=Fraction(63, 64), cores=0), 64, 63),
        ({"node_packing_count": 3}, vacancy(share=Fraction(1, 3)), 1, 1),
        ({"node_packing_count": 3}, vacancy(share=Fraction(333_333, 1_000_000)), 1, 0),
        ({"node_packing_count": 5}, vacancy(nodes=2, share=Fraction(4, 7)), 1, 4),
        ({"node_packing_count": 1_000_000}, vacancy(share=Fraction(1, 3)), 1, 999),
        # Eight cores: three tasks have two of them each, nine none of their own.
        ({"node_packing_count": 3}, vacancy(cores=5), 1, 2),
        ({"node_packing_count": 9}, vacancy(cores=0), 1, 9),
        ({"node_packing_count": 2}, vacancy(cores=8), 4, 4),
        ({"node_packing_count": 64, "threads_per_rank": 3}, vacancy(), 1, 2),
        ({"node_packing_count": 64, "threads_per_rank": 3, "threads_per_core": 2}, vacancy(), 1, 4),
        # More threads than there are cores: all of them.
        ({"node_packing_count": 64, "threads_per_rank": 99}, vacancy(nodes=2), 1, 2),
        ({"node_packing_count": 64, "threads_per_rank": 99}, vacancy(cores=7), 1, 0),
        ({"node_packing_count": 64, "gpus_per_rank": 2}, vacancy(gpus=5), 1, 2),
        ({"node_packing_count": 64, "gpus_per_rank": 1}, vacancy(gpus=0), 1, 0),
        ({"node_packing_count": 8, "memory_mb": 300}, vacancy(memory_mb=1000), 1, 3),
        ({"node_packing_count": 8, "memory_mb": 300}, vacancy(memory_mb=299), 1, 0),
        ({"node_packing_count": 8, "memory_mb": 300}, vacancy(), 1, 8),
        ({"node_packing_count": 8}, vacancy(memory_mb=0), 1, 8),
    ],
)  # fmt: skip
async def test_as_many_are_taken_as_fit(desk, needs, free, slots, fits):
    ids = await put(desk, 999, **needs)
    assert await take(await desk.register(), free, slots=slots) == ids[:fits]


async def test_what_fits_is_counted_node_by_node(desk):
    await put(desk, 9, node_packing_count=2)
    halves = vacancy(nodes=3, share=Fraction(1, 2), cores=4)
    odd = vacancy(nodes=4, share=Fraction(1, 3), cores=4)
    assert len(await take(await desk.register(), halves, odd)) == 3


async def test_a_fraction_too_fine_for_the_database_is_rounded_down(desk):
    await put(desk, 9, node_packing_count=3)
    lease = await desk.register()
    third = Fraction(1, 3)
    assert await take(lease, vacancy(share=third - Fraction(1, 3**60))) == []
    assert len(await take(lease, vacancy(share=third + Fraction(1, 3**20)))) == 1
    assert len(await take(lease, vacancy(share=2 * third + Fraction(1, 3**60)))) in (1, 2)


async def test_several_shapes_share_what_is_free(desk):
    big = await put(desk, 2, node_packing_count=2, priority=2)
    small = await put(desk, 30, node_packing_count=8, priority=1)
    assert await take(await desk.register(), vacancy(nodes=1), vacancy(share=Fraction(1, 2))) == [
        *big,
        *small[:4],
    ]


async def test_what_is_too_big_for_the_rest_does_not_keep_smaller_ones_out(desk):
    [first] = await put(desk, node_packing_count=64, wall_time_minutes=3)
    [whole] = await put(desk, wall_time_minutes=2)
    rest = await put(desk, 70, node_packing_count=64, wall_time_minutes=1)
    lease = await desk.register()
    assert await take(lease, vacancy()) == [first, *rest[:63]]
    assert await take(lease, vacancy()) == [whole]


@pytest.mark.parametrize(
    "needs", [{"gpus_per_rank": 1}, {"memory_mb": 60}, {"threads_per_rank": 5}]
)
async def test_shapes_that_want_the_same_are_not_taken_all_for_one_place(desk, needs):
    for packing in range(10, 30):
        await put(desk, 5, node_packing_count=packing, **needs)
    free = vacancy(gpus=1, memory_mb=100)
    assert len(await take(await desk.register(), free)) == 1


async def test_no_more_is_taken_than_asked_for(desk):
    ids = await put(desk, 5, node_packing_count=64)
    lease = await desk.register()
    assert await take(lease, vacancy(), max_tasks=2) == ids[:2]
    assert await take(lease, vacancy(), max_tasks=0) == []
    assert await take(lease) == []
    await put(desk, 2, node_packing_count=32)
    assert await take(lease, vacancy(), max_tasks=4) == [*ids[2:], 6]


# ---------------------------------------------------------------------------- ahead


@pytest.mark.parametrize("shapes", [1, 2])
async def test_some_more_are_taken_ahead(desk, shapes):
    if shapes == 2:
        await put(desk, 1, node_packing_count=3, priority=-9)
    ids = await put(desk, 30, node_packing_count=4)
    lease = await desk.register()
    assert await take(lease, vacancy(), ahead=3) == ids[:7]
    full = {"whole": vacancy(), "ahead": 5}
    assert await take(lease, vacancy(share=0, cores=0), **full) == ids[7:12]
    assert await take(lease, **full) == ids[12:17]
    assert await take(lease, max_tasks=2, **full) == ids[17:19]


async def test_what_does_not_fit_now_does_not_use_up_the_place_of_what_does(desk):
    gpu = await put(desk, 9, gpus_per_rank=1, node_packing_count=4, priority=1)
    cpu = await put(desk, 9, node_packing_count=4)
    free, whole = vacancy(gpus=0), vacancy(gpus=1)
    assert await take(await desk.register(), free, whole=whole, ahead=2) == [*gpu[:2], *cpu[:4]]


@pytest.mark.parametrize("needs", [{"gpus_per_rank": 2}, {"memory_mb": 101}])
async def test_what_fits_no_node_of_the_launcher_is_not_taken_ahead(desk, needs):
    await put(desk, 9, priority=1, node_packing_count=4, **needs)
    [other] = await put(desk, node_packing_count=4)
    nodes = vacancy(gpus=1, memory_mb=100)
    assert await take(await desk.register(), nodes, ahead=5) == [other]


# ---------------------------------------------------------------------------- time and filter


async def test_only_what_fits_the_time_left_is_taken(desk):
    [long] = await put(desk, wall_time_minutes=11, priority=9)
    [exact] = await put(desk, wall_time_minutes=10)
    [unstated] = await put(desk)
    lease = await desk.register()
    assert await take(lease, vacancy(nodes=9), left_s=-1) == []
    assert await take(lease, vacancy(nodes=9), left_s=599) == [unstated]
    assert await take(lease, vacancy(nodes=9), left_s=600) == [exact]
    assert await take(lease, vacancy(nodes=9), left_s=1e12) == [long]


async def test_many_priorities_of_what_is_too_long_do_not_hide_what_fits(desk):
    await desk.store.add(
        [NewTask(command=["true"], priority=p, wall_time_minutes=99) for p in range(240)]
    )
    [fits] = await put(desk, priority=-500)
    lease = await desk.register()
    assert await take(lease, vacancy(nodes=8), left_s=600) == [fits]
    assert await take(lease, vacancy(nodes=8), left_s=600) == []


async def test_a_filter_takes_of_its_workflows_only_and_they_are_one_queue(desk):
    [a] = await put(desk, workflow="x1", priority=1, node_packing_count=8)
    [b] = await put(desk, workflow="x2", priority=2, node_packing_count=8)
    await put(desk, 9, workflow="y", priority=9, node_packing_count=8)
    c, d = await put(desk, 2, workflow="x1", priority=2, node_packing_count=9)
    lease = await desk.register()
    assert await take(lease, vacancy(), workflows=[]) == []
    workflows = await desk.store.workflow_ids("x")
    assert await take(lease, vacancy(), workflows=workflows, max_tasks=3) == [b, c, d]
    assert await take(lease, vacancy(), workflows=workflows, ahead=9) == [a]


async def test_one_shape_in_several_workflows_is_counted_once(desk):
    for name in ("x1", "x2", "x3"):
        await put(desk, 9, workflow=name, node_packing_count=4)
    workflows = await desk.store.workflow_ids("x")
    taken = await take(await desk.register(), vacancy(nodes=2), workflows=workflows, ahead=1)
    assert taken == list(range(1, 10))


@pytest.mark.parametrize("workflow", ["", "x"])
async def test_very_many_shapes_are_taken_in_order_and_what_cannot_fit_hides_none(desk, workflow):
    tasks = [
        NewTask(command=["true"], workflow=workflow, memory_mb=1000 + i, wall_time_minutes=i)
        for i in range(1500)
    ]
    await desk.store.add(tasks)
    [wide] = await put(desk, workflow=workflow, num_nodes=9, priority=1)
    lease = await desk.register()
    workflows = await desk.store.workflow_ids(workflow) if workflow else None
    large = vacancy(nodes=3, memory_mb=9999)
    assert await take(lease, large, workflows=workflows) == [1500, 1499, 1498]
    small = vacancy(nodes=1, memory_mb=1100)  # the first thousand are too large
    for _ in range(200):
        if taken := await take(lease, small, workflows=workflows):
            break
    assert taken[0] <= 101
    assert wide not in taken


# ---------------------------------------------------------------------------- several at once


async def test_what_somebody_has_locked_is_skipped(desk, psql):
    first, second = await put(desk, 2, node_packing_count=2)
    lease = await desk.register()
    async with psql.transaction():
        await psql.execute("UPDATE task SET priority = 3 WHERE id = $1", first)
        assert await take(lease, vacancy()) == [second]
    assert await take(lease, vacancy()) == [first]


@pytest.mark.parametrize("priority", [0, 1])
@pytest.mark.parametrize("workflows", [None, ["x1", "x2"]])
@pytest.mark.parametrize("ahead", [0, 2])
async def test_what_somebody_has_locked_keeps_no_place_from_other_kinds(
    desk, psql, priority, workflows, ahead
):
    packing = 3 if workflows else 2  # one shape in two workflows is two kinds, too
    locked = await put(desk, 2, workflow="x1", node_packing_count=packing, priority=priority)
    others = await put(desk, 30, workflow="x2", node_packing_count=3)
    lease = await desk.register()
    chosen = workflows and await desk.store.workflow_ids("x")
    more = {"workflows": chosen, "ahead": ahead}
    async with psql.transaction():
        await psql.execute("SELECT FROM task WHERE id = ANY ($1) FOR SHARE", locked)
        assert await take(lease, vacancy(), **more) == others[: 3 + ahead]
    assert await take(lease, vacancy(), max_tasks=2, **more) == locked


@pytest.mark.parametrize(
    "needs", [{"gpus_per_rank": 1}, {"memory_mb": 60}, {"threads_per_rank": 5}]
)
async def test_what_is_locked_of_many_kinds_keeps_nothing_from_the_rest(desk, psql, needs):
    locked = []
    for packing in range(10, 30):
        first, _ = await put(desk, 2, node_packing_count=packing, priority=packing % 3, **needs)
        locked.append(first)
    [last] = await put(desk, node_packing_count=30, priority=-1, **needs)
    lease = await desk.register()
    free = vacancy(nodes=22, gpus=1, memory_mb=100)
    async with psql.transaction():
        await psql.execute("SELECT FROM task WHERE id = ANY ($1) FOR SHARE", locked)
        taken = await take(lease, free)
    assert len(taken) == 21
    assert last in taken
    assert not set(taken) & set(locked)
    assert sorted(await take(lease, free)) == locked


async def test_of_a_kind_that_is_locked_in_part_the_rest_is_taken_in_its_place(desk, psql):
    locked, large = await put(desk, 2, node_packing_count=2)
    small = await put(desk, 30, node_packing_count=8)
    lease = await desk.register()
    async with psql.transaction():
        await psql.execute("SELECT FROM task WHERE id = $1 FOR SHARE", locked)
        assert await take(lease, vacancy()) == [large, *small[:4]]


@pytest.mark.parametrize("shapes", [1, 3])
async def test_several_claimers_share_no_task_and_leave_none(desk, shapes):
    ids = []
    for shape in range(shapes):
        ids += await put(desk, 600, node_packing_count=16 + shape)
    leases = [await desk.register() for _ in range(3)]
    taken = []

    async def work(lease):
        while batch := await take(lease, vacancy(), ahead=1):
            taken.extend(batch)

    async with asyncio.TaskGroup() as group:
        for lease in leases:
            group.create_task(work(lease))
    while rest := await take(leases[0], vacancy()):  # what all three had locked at the same moment
        taken.extend(rest)
    assert sorted(taken) == ids
    assert await desk.sql("SELECT count(*) FROM attempt") == len(ids)


async def test_a_claim_under_a_closed_lease_takes_nothing(desk):
    [task] = await put(desk)
    lease = await desk.register()
    await Reaping(desk.store.pool).bury(lease.id, state="EXPIRED", evidence="gone")
    with pytest.raises(LeaseLostError, match=f"lease {lease.id} is not active"):
        await take(lease, vacancy())
    assert await desk.tell(task) == ("PREPROCESSED", 0, False)


def need(claim, slots):
    return Need(
        packing=max(claim.node_packing_count, slots),
        threads=claim.threads_per_rank,
        threads_per_core=claim.threads_per_core,
        gpus=claim.gpus_per_rank,
        memory_mb=claim.memory_mb,
    )


@pytest.mark.parametrize("seed", range(3))
async def test_every_claim_places_something_until_all_is_done(desk, seed):
    """The books of a launcher beside it: what it cannot place it gives back, and comes to an end."""
    rng = random.Random(seed)
    await desk.store.add(
        [
            NewTask(
                command=["true"],
                priority=rng.randrange(3),
                node_packing_count=rng.choice([1, 2, 3, 5, 8]),
                threads_per_rank=rng.choice([None, 1, 3, 20]),
                gpus_per_rank=rng.choice([0, 0, 1, 2]),
                memory_mb=rng.choice([None, 100, 400]),
            )
            for _ in range(150)
        ]
    )
    cores = [[core] for core in range(8)]
    books = [SlotBook(cores, ["0", "1"], 1000), SlotBook(cores[:4], ["0"], 500)]
    whole = tuple(book.vacancy for book in books)
    lease = await desk.register()
    running, given_back, slots = [], 0, rng.choice([1, 2])
    while True:
        free = tuple(book.vacancy for book in books)
        wanted = SlotRoom(free=free, whole=whole, left_s=None, max_tasks=50, slots_per_node=slots)
        claims = await lease.claim(wanted, None)
        placed = 0
        for claim in claims:
            for book in books:
                if book.claim(claim.id, need(claim, slots)) is not None:
                    running.append((book, claim))
                    placed += 1
                    break
            else:
                given_back += 1
                await desk.end(lease, claim, Outcome.GIVEN_BACK)
        assert placed or not claims
        if not running:
            break
        for _ in range(rng.randrange(1, len(running) + 1)):
            book, claim = running.pop(rng.randrange(len(running)))
            book.release(claim.id)
            assert await desk.end(lease, claim) == "applied"
    assert set((await desk.states()).values()) == {"JOB_FINISHED"}
    assert given_back < 150


# ---------------------------------------------------------------------------- what is left


async def test_what_a_launcher_leaves_alone_is_counted_by_reason(desk):
    await put(desk, 2, num_nodes=5)
    await put(desk, 3, ranks_per_node=2, wall_time_minutes=99)
    await put(desk, 4, gpus_per_rank=3, wall_time_minutes=99)
    await put(desk, 5, memory_mb=900, gpus_per_rank=2)
    await put(desk, 6, wall_time_minutes=31, workflow="w")
    await put(desk, 7, wall_time_minutes=30)
    await desk.store.kill(await put(desk, num_nodes=9))
    lease = await desk.register()
    nodes = (vacancy(gpus=2, memory_mb=100), vacancy(gpus=1, memory_mb=1000))
    serial = room(*nodes, left_s=1800)
    assert await lease.left_alone(serial, None) == {
        Unfit.RANKS: 5,
        Unfit.GPUS: 4,
        Unfit.MEMORY: 5,
        Unfit.TIME: 6,
    }
    [only] = [await desk.store.workflow_ids("w")]
    assert await lease.left_alone(serial, only) == {Unfit.TIME: 6}
    assert await lease.left_alone(serial, []) == {}
    mpi = Room(nodes=4, left_s=1800, max_tasks=0)
    assert await lease.left_alone(mpi, None) == {Unfit.NODES: 2, Unfit.TIME: 13}
    await lease.claim(Room(nodes=99, left_s=None, max_tasks=99), None)
    assert await lease.left_alone(mpi, None) == {}


async def test_only_what_serial_mode_can_run_is_a_prospect(desk):
    lease = await desk.register()
    parent = await desk.add_one(priority=9)
    await desk.begin(lease, 1)
    await desk.add_one(parents=[parent], ranks_per_node=2)
    assert await lease.has_prospect(None, 1)
    assert not await lease.has_prospect(None, 1, is_serial=True)
    await desk.add_one(parents=[parent])
    assert await lease.has_prospect(None, 1, is_serial=True)
