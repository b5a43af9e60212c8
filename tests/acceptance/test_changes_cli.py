"""`ensemble kill`, `retry`, `rm` and `modify` while others are at the same tasks, and while the database goes."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from ensemble.core.model import NewTask, Selector
from ensemble.core.store import Store
from ensemble.site import Site
from tests.acceptance.test_cli import ROOT, Done

BLOCKED = """
    SELECT pid FROM pg_stat_activity
     WHERE datname = current_database() AND application_name = 'ensemble client' AND wait_event_type = 'Lock'"""


class Hands:
    """A site, what others do to its store, and commands that are begun and not waited for."""

    def __init__(self, site: Site, store: Store, eventually: Callable[..., object]) -> None:
        self.site = site
        self.store = store
        self._eventually = eventually

    async def add(self, count: int, **more: object) -> list[int]:
        return await self.store.add([NewTask(command=["true"], **more) for _ in range(count)])

    async def states(self) -> dict[int, str]:
        return {i: str(state) for i, state in (await self.store.task_states(Selector())).items()}

    @asynccontextmanager
    async def begin(self, *words: str, stdin: int = DEVNULL) -> AsyncIterator[Process]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ensemble", *words),
            cwd=self.site.path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=stdin,
            stdout=PIPE,
            stderr=PIPE,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def blocked(self) -> int:
        """Wait until a command waits for a lock; return its backend."""
        return await self._eventually(lambda: self.store.pool.fetchval(BLOCKED))

    async def cut_off(self) -> None:
        """End the connection of the command that waits for a lock."""
        await self.store.pool.execute("SELECT pg_terminate_backend($1)", await self.blocked())


async def end(process: Process) -> Done:
    out, err = await process.communicate()
    return Done(process.returncode, out.decode(), err.decode())


@pytest.fixture
def hands(site, store, eventually) -> Hands:
    return Hands(site, store, eventually)


# ---------------------------------------------------------------------------- while it goes on


@pytest.mark.parametrize(
    ("words", "verb"),
    [(("modify", "1-3", "--priority", "5"), "modified"), (("rm", "1-3"), "removed")],
)
async def test_a_task_that_is_removed_meanwhile_keeps_no_other_from_it(hands, psql, words, verb):
    await hands.add(3)
    theirs = psql.transaction()
    await theirs.start()
    await psql.execute("SELECT remove_tasks('{2}')")
    async with hands.begin(*words) as process:
        await hands.blocked()
        await theirs.commit()
        done = await end(process)
    assert (done.status, done.out) == (0, f"{verb} 2 tasks: 1, 3\n")
    assert done.err == f"not {verb}: task 2 is not there any more\n"


async def test_what_was_modified_before_the_database_was_lost_is_said(hands, psql):
    await hands.add(3)
    async with psql.transaction():
        await psql.execute("SELECT FROM task WHERE id = 2 FOR UPDATE")
        async with hands.begin("modify", "1-3", "--priority", "5") as process:
            await hands.cut_off()
            done = await end(process)
    assert (done.status, done.out) == (4, "modified 1 task: 1\n")
    assert (done.err.startswith("error: "), done.err.count("\n")) == (True, 1), done


async def test_what_was_modified_before_an_interrupt_is_said(hands, psql):
    await hands.add(3)
    async with psql.transaction():
        await psql.execute("SELECT FROM task WHERE id = 2 FOR UPDATE")
        async with hands.begin("modify", "1-3", "--priority", "5") as process:
            await hands.blocked()
            process.send_signal(signal.SIGINT)
            done = await end(process)
    assert (done.status, done.out, done.err) == (130, "modified 1 task: 1\n", "interrupted\n")


async def test_a_retry_asks_nothing_once_it_is_done(hands, owner):
    await hands.add(2)
    await hands.store.kill([1])
    async with owner.transaction():
        await owner.execute("LOCK TABLE shape")  # what lists tasks would wait for it
        async with hands.begin("retry", "1-2") as process:
            done = await end(process)
    assert (done.status, done.out) == (0, "retried 1 task: 1\n")
    assert "not retried: task 2 is PREPROCESSED; only FAILED" in done.err


async def test_a_removal_is_told_though_the_database_goes_after_it(hands, owner):
    [parent, other] = await hands.add(2)
    await hands.add(1, parents=[parent])
    async with owner.transaction():
        await owner.execute("LOCK TABLE shape")
        async with hands.begin("rm", str(parent), str(other)) as process:
            await hands.cut_off()
            done = await end(process)
    assert (done.status, done.out) == (0, f"removed 1 task: {other}\n")
    assert done.err == (
        f"not removed: task {parent} is held by a launcher, or waited for by other tasks\n"
    )


async def test_only_what_is_shown_by_itself_is_looked_up(hands):
    parents = await hands.add(22)
    await hands.add(1, parents=parents)
    async with hands.begin("rm", "1-22", "--yes", "--json") as process:
        done = await end(process)
    notes = [row["note"] for row in done.json]
    assert notes[:20] == ["is waited for by other tasks"] * 20
    assert notes[20:] == ["is held by a launcher, or waited for by other tasks"] * 2


# ---------------------------------------------------------------------------- while it asks


@asynccontextmanager
async def asked(hands: Hands, *words: str) -> AsyncIterator[Callable[[], Awaitable[Done]]]:
    """Begin a command at a terminal; when it has asked, get what answers yes and waits for its end."""
    ours, theirs = pty.openpty()
    try:
        async with hands.begin(*words, stdin=theirs) as process:
            question = await process.stderr.readuntil(b"]:")
            assert f"{words[0].replace('rm', 'remove')} 12 tasks?" in question.decode()

            async def answer() -> Done:
                os.write(ours, b"y\n")
                return await end(process)

            yield answer
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        (("rm",), "removed"),
        (("kill",), "killed"),
        (("retry",), "retried"),
        (("modify", "--priority", "5"), "modified"),
    ],
)
async def test_what_is_gone_when_the_answer_comes_is_told(hands, words, verb):
    ids = await hands.add(12)
    if verb == "retried":
        await hands.store.kill(ids)
    async with asked(hands, words[0], "1-12", *words[1:]) as answer:
        await hands.store.remove(ids[5:])
        done = await answer()
    assert (done.status, done.out.strip()) == (0, f"{verb} 5 tasks: 1, 2, 3, 4, 5")
    assert "no longer selected, and left alone: 7 tasks\n" in done.err


async def test_what_is_selected_no_more_when_the_answer_comes_is_left_alone(hands):
    """And so is what was not selected when the question was asked."""
    ids = await hands.add(13)
    await hands.store.kill(ids[:12])
    async with asked(hands, "rm", "--state", "USER_KILLED") as answer:
        await hands.store.retry(ids[:5])
        await hands.store.kill(ids[12:])
        done = await answer()
    assert done.status == 0
    assert "no longer selected, and left alone: 5 tasks\n" in done.err
    assert await hands.states() == dict.fromkeys(ids[:5], "PREPROCESSED") | {13: "USER_KILLED"}


async def test_what_can_be_done_by_the_time_of_the_answer_was_not_asked_about(hands):
    ids = await hands.add(13)
    await hands.store.kill(ids[:12])
    async with asked(hands, "retry", "1-13") as answer:
        await hands.store.retry(ids[:1])
        await hands.store.kill(ids[12:])
        done = await answer()
    assert "retried 11 tasks" in done.out
    assert "task 1 is PREPROCESSED" in done.err
    assert (await hands.states())[13] == "USER_KILLED"
