"""The doorbell: it may be lost, never for long, and every return is announced."""

from __future__ import annotations

import asyncio

import pytest

from ensemble.core.listener import EVENT, KILL, RESYNC, WORK, Listener


@pytest.fixture
async def listening(address):
    """A running listener and what it heard."""
    heard = []
    listener = Listener(address, [KILL, WORK, EVENT], heard.append, ping_s=0.5, ping_timeout_s=2)
    async with asyncio.TaskGroup() as group:
        worker = group.create_task(listener.run())
        yield listener, heard
        worker.cancel()


async def test_it_says_resync_first_and_then_what_rang(desk, psql, listening, eventually):
    _, heard = listening
    await eventually(lambda: heard == [RESYNC])
    await psql.execute("NOTIFY ensemble_kill")
    await eventually(lambda: heard == [RESYNC, KILL])
    await desk.store.ring()
    await eventually(lambda: set(heard[2:]) == {EVENT, WORK})
    await psql.execute("NOTIFY other")
    await psql.execute("NOTIFY ensemble_kill, 'a payload is not believed'")
    await eventually(lambda: len(heard) == 5)
    assert heard[-1] == KILL


async def test_it_returns_after_its_backend_was_terminated(psql, listening, eventually):
    listener, heard = listening
    for count in (1, 2, 3):
        await eventually(lambda count=count: heard.count(RESYNC) == count)
        assert await psql.fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE application_name = 'ensemble listener' AND usename = current_user"
        )
    await eventually(lambda: heard.count(RESYNC) == 4 and listener.is_connected, within_s=30)


async def test_it_returns_after_a_restart_of_the_server(site, psql, listening, eventually):
    listener, heard = listening
    await eventually(lambda: heard == [RESYNC])
    await site.cluster.stop("fast")
    await eventually(lambda: not listener.is_connected)
    assert heard == [RESYNC]
    await site.cluster.start()
    await eventually(lambda: heard == [RESYNC, RESYNC], within_s=30)
    assert listener.is_connected


async def test_a_callback_that_raises_does_not_end_it(address, psql, eventually):
    heard = []

    def fail(channel):
        heard.append(channel)
        raise ValueError(channel)

    async with asyncio.TaskGroup() as group:
        worker = group.create_task(Listener(address, [KILL], fail).run())
        await eventually(lambda: heard == [RESYNC])
        for count in (2, 3):
            await psql.execute("NOTIFY ensemble_kill")
            await eventually(lambda count=count: len(heard) == count)
        worker.cancel()
