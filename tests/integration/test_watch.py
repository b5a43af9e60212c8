"""Watching: every event once, in order, soon, and no late commit is missed."""

from __future__ import annotations

import asyncio
import time

import pytest

from ensemble.api import Client
from ensemble.core.model import Outcome
from ensemble.core.store import Store
from ensemble.errors import EnsembleError, NotFoundError


async def moves(desk, cursor, **filters):
    events, cursor = await desk.store.new_events(cursor, **filters)
    return [(event.task_id, str(event.to_state)) for event in events], cursor


async def test_events_come_once_and_in_order(desk):
    start = await desk.store.horizon()
    a, b = await desk.add(2)
    await desk.store.kill([b])
    found, cursor = await moves(desk, start)
    assert found == [(a, "PREPROCESSED"), (b, "PREPROCESSED"), (b, "USER_KILLED")]
    assert await moves(desk, cursor) == ([], cursor)
    assert (await moves(desk, start))[0] == found


async def test_a_transaction_that_commits_late_is_not_missed(desk, psql):
    a, b, c = await desk.add(3)
    cursor = await desk.store.horizon()
    async with psql.transaction():
        await psql.execute("UPDATE task SET state = 'USER_KILLED' WHERE id = $1", a)
        await desk.store.kill([b])
        found, cursor = await moves(desk, cursor)
        assert found == []  # b came later and waits for a
    await desk.store.kill([c])
    found, cursor = await moves(desk, cursor)
    assert found == [(a, "USER_KILLED"), (b, "USER_KILLED"), (c, "USER_KILLED")]


async def test_a_limit_splits_the_stream_and_loses_nothing(desk):
    cursor = await desk.store.horizon()
    ids = await desk.add(7)
    seen = []
    while True:
        found, cursor = await moves(desk, cursor, limit=3)
        if not found:
            break
        seen += [task for task, _ in found]
    assert seen == ids


async def test_filters_choose_and_what_they_skip_is_not_read_again(desk):
    start = await desk.store.horizon()
    await desk.add(2, workflow="a_b")
    [c] = await desk.add(1, workflow="axb")
    assert (await moves(desk, start, workflow="a_"))[0] == [
        (1, "PREPROCESSED"),
        (2, "PREPROCESSED"),
    ]
    assert (await moves(desk, start, ids=[c, 99]))[0] == [(c, "PREPROCESSED")]
    found, cursor = await moves(desk, start, ids=[99])
    assert found == []
    assert int(cursor.xid) > int(start.xid)
    await desk.store.kill([c])
    assert (await moves(desk, cursor, ids=[c]))[0] == [(c, "USER_KILLED")]


async def test_a_kill_in_psql_reaches_a_watcher_within_a_second(site, desk, psql, eventually):
    lease = await desk.register()
    task = await desk.add_one()
    [claim] = await desk.begin(lease)
    client = Client(site, desk.store)
    seen = []

    async def watch():
        async for event in client.watch(ids=[task]):
            note = (str(event.to_state), time.monotonic())
            seen.append(note)

    watcher = asyncio.create_task(watch())
    await eventually(lambda: is_listening(desk))
    took = []
    for _ in range(3):
        began = time.monotonic()
        await psql.execute("UPDATE task SET state = 'USER_KILLED'")
        await eventually(lambda: seen and seen[-1][0] == "USER_KILLED")
        took.append(seen[-1][1] - began)
        await desk.end(lease, claim, Outcome.ERROR)
        await desk.store.retry([task])
        [claim] = await desk.begin(lease)
        seen.clear()
    watcher.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watcher
    assert min(took) < 1


async def is_listening(desk):
    return await desk.sql(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ensemble listener'"
        " AND query LIKE 'LISTEN%' AND state = 'idle'"
    )


async def test_wait_returns_when_the_process_is_gone_not_when_the_state_is_final(
    site, desk, eventually
):
    lease = await desk.register()
    task = await desk.add_one()
    [claim] = await desk.begin(lease)
    waiting = asyncio.create_task(Client(site, desk.store).tasks.wait([task]))
    await eventually(lambda: is_listening(desk))
    await desk.store.kill([task])
    assert not waiting.done()
    await desk.end(lease, claim, Outcome.ERROR)
    await desk.store.ring()
    began = time.monotonic()
    assert await waiting == {task: "USER_KILLED"}
    assert time.monotonic() - began < 1


async def test_wait_gives_up_in_time_and_knows_what_does_not_exist(site, desk):
    tasks = Client(site, desk.store).tasks
    task = await desk.add_one()
    with pytest.raises(TimeoutError):
        await tasks.wait([task], timeout_s=0.1)
    with pytest.raises(NotFoundError, match="no task 99"):
        await tasks.wait([99])


async def test_a_wait_without_time_looks_once(site, desk):
    tasks = Client(site, desk.store).tasks
    task, other = await desk.add(2)
    await desk.store.kill([task])
    assert await tasks.wait([task], timeout_s=0) == {task: "USER_KILLED"}
    with pytest.raises(TimeoutError):
        await tasks.wait([task, other], timeout_s=0)


async def test_a_ring_costs_who_waits_for_many_a_look_at_a_few(site, desk, eventually, monkeypatch):
    ids = await desk.add(2500)
    looks = []
    unfinished = desk.store.unfinished

    async def seen(asked):
        looks.append(len(asked))
        return await unfinished(asked)

    monkeypatch.setattr(desk.store, "unfinished", seen)
    waiting = asyncio.create_task(Client(site, desk.store).tasks.wait(ids))
    await eventually(lambda: len(looks) > 2)
    begun = len(looks)
    await desk.store.ring()
    await eventually(lambda: len(looks) > begun)
    assert set(looks[2:]) == {1000}
    await desk.store.kill(ids)
    assert set((await waiting).values()) == {"USER_KILLED"}
    assert looks.count(2500) == 3  # the one without time, the first and the last


async def test_a_wait_that_loses_the_store_says_so_plainly(site, desk, eventually):
    task = await desk.add_one()
    store = await Store.open(site.address())
    tasks = Client(site, store).tasks
    waiting = asyncio.create_task(tasks.wait([task]))
    await eventually(lambda: is_listening(desk))
    await store.close()
    await desk.store.ring()
    with pytest.raises(EnsembleError):
        await waiting
