"""Results that a launcher could not report before it had to leave: they are read before its lease is closed."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from ensemble.core.leases import Lease
from ensemble.core.model import Cause, Claim, End, NewTask, Outcome, Start
from ensemble.core.states import State
from ensemble.drivers import proctree
from ensemble.service import reaper, runtime, spool
from ensemble.site import program
from tests.integration.launching import WHEEL, Ensemble, Launched, sh
from tests.integration.storing import LONG_AGO, Desk

pytestmark = WHEEL

#: Waits for a word that all tasks wait for; a second run of the same task leaves a second line.
WAIT = 'echo $ENSEMBLE_ATTEMPT >> runs; until [ -e "$ENSEMBLE_SITE/log/go" ]; do sleep 0.02; done; '


@pytest.fixture
async def spools(ens: Ensemble) -> AsyncIterator[Path]:
    """Where this site's spools are; none is left there, nor set aside, unless a test has said so."""
    directory = spool.folder(ens.site.path)
    assert spool.find(directory) == {}
    yield directory
    (ens.site.path / "log" / "go").unlink(missing_ok=True)
    left = sorted(directory.iterdir())
    for path in left:
        path.unlink()
    assert left == []


def release_lease(ens: Ensemble, lease_id: int) -> subprocess.Popen[bytes]:
    """Start what a launcher's guard starts."""
    argv = program(str(ens.site.path), "release-lease", str(lease_id))
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)


async def ended_unheard(
    ens: Ensemble, *tasks: NewTask, flags: tuple[str, ...] = ("--persistent",), **options: object
) -> tuple[Launched, list[int]]:
    """Have a launcher run tasks that end while the database is away."""
    cluster = ens.site.cluster
    assert cluster is not None
    ids = await ens.store.add(tasks)
    launched = ens.launch(*flags, nodes=len(tasks), **options)  # type: ignore[arg-type]
    await ens.reach(State.RUNNING, *ids, within_s=60)
    await cluster.stop("fast")
    (ens.site.path / "log" / "go").touch()
    await ens.gone()
    # The launcher has heard of it, too: what it is told to end before that was cut off.
    await ens.eventually(lambda: "running=0" in launched.log)
    return launched, ids


async def restart(ens: Ensemble) -> None:
    assert ens.site.cluster is not None
    await ens.site.cluster.start()


async def tell_to_leave(ens: Ensemble, launched: Launched) -> None:
    """Signal it twice: not to wait for the database."""
    launched.signal(signal.SIGTERM)
    await ens.eventually(lambda: "launcher.leaving" in launched.log)
    await asyncio.sleep(0.6)  # two within half a second are one
    launched.signal(signal.SIGTERM)
    await without_its_guard_s_word(ens, launched)


async def without_its_guard_s_word(ens: Ensemble, launched: Launched) -> None:
    """Wait until a launcher has left; its guard is not let try, for 16 s, to close the lease."""
    await ens.eventually(lambda: "launcher.ended" in launched.log, within_s=60)

    def is_over() -> bool:
        for pid in proctree.list_children(launched.guard.pid):
            if b"release-lease" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        return launched.guard.poll() is not None

    await ens.eventually(is_over, within_s=60)
    assert launched.guard.returncode == 1, launched.log


async def check_ran_once(ens: Ensemble, *ids: int) -> None:
    for task_id in ids:
        detail = await ens.store.detail(task_id)
        assert (ens.workdir(detail.task) / "runs").read_text() == "1\n", "it ran twice"
        assert [(a.attempt, a.outcome) for a in detail.attempts] == [(1, Outcome.DONE)]
        assert detail.task.state is State.JOB_FINISHED


# ---------------------------------------------------------------------------- launchers that leave


@pytest.mark.parametrize("mode", ["mpi", "serial"])
async def test_what_ended_while_the_database_was_away_is_not_run_again(
    ens: Ensemble, spools: Path, mode: str
) -> None:
    launched, (first, second, failed) = await ended_unheard(
        ens, sh(WAIT), sh(WAIT), sh(WAIT + "echo this is why; exit 7"), mode=mode
    )
    await tell_to_leave(ens, launched)
    (event,) = launched.events("reports.not_written")
    assert (event["reports"], event["spool"]) == ("3", str(spools / "lease-1.jsonl"))
    await restart(ens)
    assert set(await ens.states()) == {State.RUNNING}
    (child,) = await ens.store.add([sh("echo 1 >> runs", parents=[first])])
    if mode == "mpi":  # as its guard would, had the database been back
        reader = release_lease(ens, 1)
        assert "spool.read" in reader.communicate()[1].decode()
        assert reader.returncode == 0
        assert await ens.states() == [State.JOB_FINISHED] * 2 + [State.FAILED, State.PREPROCESSED]
    again = ens.launch("--idle-timeout=0", mode=mode)
    assert await ens.leave(again) == 0, again.log
    await check_ran_once(ens, first, second, child)
    found = await ens.store.detail(failed)
    assert (found.task.state, found.task.exit_code) == (State.FAILED, 7)
    assert (found.task.cause, found.task.losses) == (Cause.EXIT_CODE, 0)
    assert [attempt.error for attempt in found.attempts] == ["this is why"]


async def test_the_end_of_the_allocation_is_the_end_of_the_wait(
    ens: Ensemble, spools: Path
) -> None:
    launched, ids = await ended_unheard(
        ens, sh(WAIT), sh(WAIT), flags=("--time-limit-minutes=0.05",), LAUNCHER_MARGIN_S=2
    )
    await without_its_guard_s_word(ens, launched)
    assert list(spool.find(spools)) == [1]
    await restart(ens)
    other = ens.launch("--idle-timeout=0")
    assert await ens.leave(other) == 0
    assert (
        other.events("spool.read")[0] | {"applied": "2", "known": "0"}
        == other.events("spool.read")[0]
    )
    await check_ran_once(ens, *ids)


async def test_a_launcher_that_is_killed_while_it_waits_has_lost_nothing(
    ens: Ensemble, spools: Path
) -> None:
    launched, ids = await ended_unheard(ens, sh(WAIT), sh(WAIT))
    launched.signal(signal.SIGTERM)
    await ens.eventually(lambda: spool.find(spools))
    launched.kill()
    await restart(ens)
    assert await ens.leave(ens.launch("--idle-timeout=0")) == 0
    await check_ran_once(ens, *ids)


async def test_a_database_that_comes_back_is_told_by_the_launcher_itself(
    ens: Ensemble, spools: Path
) -> None:
    launched, ids = await ended_unheard(ens, sh(WAIT), sh(WAIT))
    launched.signal(signal.SIGTERM)
    await ens.eventually(lambda: spool.find(spools))
    await restart(ens)
    assert await ens.leave(launched) == 0, launched.log
    assert spool.find(spools) == {}
    await check_ran_once(ens, *ids)


async def test_a_launcher_whose_database_stays_away_leaves_when_its_lease_is_over(
    ens: Ensemble, spools: Path
) -> None:
    launched, ids = await ended_unheard(ens, sh(WAIT), sh(WAIT), LAUNCHER_LEASE_TTL_S=16)
    # Not even a signal is needed: trust ends first.
    assert await ens.leave(launched, within_s=40) == 1, launched.log
    assert list(spool.find(spools)) == [1]
    await restart(ens)
    assert await ens.leave(ens.launch("--idle-timeout=0")) == 0
    await check_ran_once(ens, *ids)


async def test_where_no_spool_can_be_written_it_stays_and_says_so(
    ens: Ensemble, spools: Path
) -> None:
    for path in [*spools.parent.glob("spool/*")]:
        path.unlink()
    if spools.exists():
        spools.rmdir()
    spools.write_text("in the way")
    try:
        launched, ids = await ended_unheard(ens, sh(WAIT), sh(WAIT))
        launched.signal(signal.SIGTERM)
        await ens.eventually(lambda: "spool.not_written" in launched.log)
        launched.signal(signal.SIGTERM)
        await ens.eventually(lambda: "signal it again to lose them" in launched.log)
        await asyncio.sleep(1.5)  # more than a hurried launcher waits
        assert launched.guard.poll() is None, launched.log
        await restart(ens)
        assert await ens.leave(launched) == 0, launched.log
        await check_ran_once(ens, *ids)
    finally:
        spools.unlink()
        spools.mkdir(0o700)


# ---------------------------------------------------------------------------- those who read


async def begun(desk: Desk, count: int, **options: float) -> tuple[Lease, list[Claim]]:
    """Have a launcher that runs some tasks."""
    lease = await desk.register(**options)  # type: ignore[arg-type]
    await desk.add(count)
    return lease, await desk.begin(lease)


def done(claims: list[Claim]) -> list[End]:
    return [End(id=c.id, attempt=c.attempt, outcome=Outcome.DONE, exit_code=0) for c in claims]


def leave_spool(
    directory: Path, lease: Lease, ends: list[End], starts: tuple[Start, ...] = (), mark: str = ""
) -> Path:
    head = spool.Head(
        mark=mark or lease.mark,
        lease_id=lease.id,
        launcher_id=lease.launcher_id,
        reason="received SIGTERM",
    )
    return spool.write(directory, head, starts, ends, now=runtime.utc_now())


def logged(capfd: pytest.CaptureFixture[str]) -> str:
    return "".join(capfd.readouterr())


async def lease_of(desk: Desk, lease: Lease) -> tuple[str, bool]:
    statement = "SELECT ROW (state, swept) FROM lease WHERE id = $1"
    return tuple(await desk.sql(statement, lease.id))  # type: ignore[return-value]


async def test_readers_that_come_at_once_or_die_in_the_middle_do_no_harm(
    ens: Ensemble, desk: Desk, spools: Path
) -> None:
    lease, claims = await begun(desk, 3)
    path = leave_spool(spools, lease, done(claims))
    async with ens.store.pool.acquire() as psql, psql.transaction():
        # Nobody can close the lease meanwhile.
        await psql.execute("SELECT FROM lease WHERE id = $1 FOR KEY SHARE", lease.id)
        readers = [release_lease(ens, lease.id) for _ in range(3)]
        await ens.reach(State.JOB_FINISHED)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"

        async def all_wait() -> bool:
            return bool(await desk.sql(waiting) == len(readers))

        await ens.eventually(all_wait)
        readers[0].kill()
        assert path.exists()
    logs = [reader.communicate()[1].decode() for reader in readers]
    assert [reader.returncode for reader in readers] == [-signal.SIGKILL, 0, 0], logs
    assert not path.exists()
    assert await lease_of(desk, lease) == ("RELEASED", True)
    assert [await desk.tell(c.id) for c in claims] == [("JOB_FINISHED", 1, False)] * 3


async def test_a_reader_that_died_before_it_removed_the_spool_leaves_nothing_to_do(
    desk: Desk, ens: Ensemble, spools: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lease, (one, other) = await begun(desk, 2)
    lost = End(id=other.id, attempt=1, outcome=Outcome.LOST, cause=Cause.NODE_LOST)
    start = Start(id=other.id, attempt=1, at=LONG_AGO)
    path = leave_spool(spools, lease, [*done([one]), lost], (start,))
    copy = path.read_bytes()
    assert await reaper.reap(ens.store, spools) == 0
    path.write_bytes(copy)
    assert await reaper.reap(ens.store, spools) == 0
    assert await desk.states() == {one.id: "JOB_FINISHED", other.id: "RESTART_READY"}
    assert (await desk.task(other.id)).losses == 1
    assert "spool.refused" not in logged(capfd)


async def test_a_spool_is_read_before_its_lease_expires_however_late(
    desk: Desk, ens: Ensemble, spools: Path
) -> None:
    lease, claims = await begun(desk, 2, ttl_s=0.05)
    leave_spool(spools, lease, done(claims[:1]))
    await desk.sql("UPDATE lease SET expires_at = now() - interval '1 hour'")
    await reaper.reap(ens.store, spools)
    assert await desk.states() == {claims[0].id: "JOB_FINISHED", claims[1].id: "RESTART_READY"}
    assert await lease_of(desk, lease) == ("RELEASED", True)


async def test_what_comes_after_the_lease_was_closed_is_refused_and_counted(
    desk: Desk, ens: Ensemble, spools: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lease, claims = await begun(desk, 3)
    await reaper.release(ens.store, spools, lease.id)
    assert set((await desk.states()).values()) == {"RESTART_READY"}
    await desk.begin(await desk.register(), 1)
    leave_spool(spools, lease, done(claims))
    await reaper.reap(ens.store, spools)
    assert sorted((await desk.states()).values()) == ["RESTART_READY", "RESTART_READY", "RUNNING"]
    (line,) = [line for line in logged(capfd).splitlines() if "spool.refused" in line]
    assert "reports=3" in line


async def test_a_task_in_an_open_transaction_keeps_its_lease_open(
    desk: Desk, ens: Ensemble, spools: Path
) -> None:
    lease, claims = await begun(desk, 2, ttl_s=0.05)
    path = leave_spool(spools, lease, done(claims))
    async with ens.store.pool.acquire() as psql, psql.transaction():
        await psql.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", claims[0].id)
        await reaper.reap(ens.store, spools)  # its time is over, too
        assert (await lease_of(desk, lease))[0] == "ACTIVE"
        assert path.exists()
    await reaper.reap(ens.store, spools)
    assert set((await desk.states()).values()) == {"JOB_FINISHED"}
    assert not path.exists()


async def test_one_of_a_living_launcher_is_left_to_itself(
    desk: Desk, ens: Ensemble, spools: Path
) -> None:
    lease, claims = await begun(desk, 1)
    path = leave_spool(spools, lease, done(claims))
    await reaper.reap(ens.store, spools, own_lease=lease.id)
    assert path.exists()
    path.unlink()


async def test_whoever_does_not_see_the_files_reaps_as_without_them(
    desk: Desk, ens: Ensemble, spools: Path
) -> None:
    lease, claims = await begun(desk, 1)
    path = leave_spool(spools, lease, done(claims))
    await reaper.release(ens.store, spools / "elsewhere", lease.id)
    assert await desk.states() == {claims[0].id: "RESTART_READY"}
    path.unlink()


async def test_while_the_spools_cannot_be_listed_no_lease_is_closed(
    desk: Desk, ens: Ensemble, spools: Path
) -> None:
    lease, claims = await begun(desk, 1, ttl_s=0.05)
    path = leave_spool(spools, lease, done(claims))
    await desk.sql("UPDATE lease SET expires_at = now() - interval '1 hour'")
    away = spools.rename(spools.with_name("spool-away"))
    spools.symlink_to(spools)
    try:
        with pytest.raises(OSError, match="symbolic links"):
            await reaper.release(ens.store, spools, lease.id)
        launched = ens.launch("--persistent", LAUNCHER_LEASE_TTL_S=4)
        await ens.eventually(lambda: len(launched.events("reap.failed")) > 1)
        assert await lease_of(desk, lease) == ("ACTIVE", False)
    finally:
        spools.unlink()
        away.rename(spools)
    await ens.reach(State.JOB_FINISHED)
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0, launched.log
    assert await desk.tell(claims[0].id) == ("JOB_FINISHED", 1, False)
    assert not path.exists()


async def test_while_a_spool_cannot_be_read_its_lease_is_not_closed(
    desk: Desk, ens: Ensemble, spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease, claims = await begun(desk, 1, ttl_s=0.05)
    leave_spool(spools, lease, done(claims))
    await desk.sql("UPDATE lease SET expires_at = now() - interval '1 hour'")

    def fail(path: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    with monkeypatch.context() as stale:
        stale.setattr(Path, "lstat", fail)
        assert await reaper.reap(ens.store, spools) == 0
        await reaper.release(ens.store, spools, lease.id)
    assert await lease_of(desk, lease) == ("ACTIVE", False)
    await reaper.reap(ens.store, spools)
    assert await desk.tell(claims[0].id) == ("JOB_FINISHED", 1, False)


@pytest.mark.parametrize(
    "fault", ["torn", "version", "site", "process", "launcher", "name", "lease", "folder"]
)
async def test_what_is_no_spool_of_this_site_is_set_aside_once(
    desk: Desk, ens: Ensemble, spools: Path, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lease, claims = await begun(desk, 1, ttl_s=0.05)
    marks = {"site": f"z{lease.mark[1:]}", "process": lease.mark[:-1] + "2"}
    path = leave_spool(spools, lease, done(claims), mark=marks.get(fault, ""))
    data = path.read_bytes()
    if fault == "torn":
        path.write_bytes(data[:-1])
    elif fault == "version":
        path.write_bytes(data.replace(b'"version":1', b'"version":2'))
    elif fault == "launcher":
        path.write_bytes(data.replace(b'"launcher_id":1', b'"launcher_id":2'))
    elif fault == "name":
        path = path.rename(spools / "lease-77.jsonl")
    elif fault == "lease":
        path.write_bytes(data.replace(b'"lease_id":1', b'"lease_id":2'))
    elif fault == "folder":
        path.unlink()
        path.mkdir()
    await ens.eventually(lambda: reaper.reap(ens.store, spools))
    await reaper.reap(ens.store, spools)
    aside = path.with_name(f"{path.name}.bad")
    assert list(spools.iterdir()) == [aside]
    aside.rmdir() if fault == "folder" else aside.unlink()
    assert logged(capfd).count("spool.set_aside") == 1
    assert await desk.states() == {claims[0].id: "RESTART_READY"}


async def test_no_damage_ends_the_reader(desk: Desk, ens: Ensemble, spools: Path) -> None:
    dice = random.Random(20260701)
    values = [None, -1, 0, 2**31, 2**63 - 1, 2**70, 1e308, "", "\0", "x" * 20_000, [], ["\0"], {}, True,
              *Outcome, *Cause, "2026-01-01T00:00:00Z", "0002-01-01T00:00:00+14:00"]  # fmt: skip
    for _ in range(100):
        lease, claims = await begun(desk, 3)
        start = Start(id=claims[2].id, attempt=1, at=LONG_AGO, nodes=("n1",))
        lost = End(id=claims[2].id, attempt=1, outcome=Outcome.LOST)
        path = leave_spool(spools, lease, [*done(claims[:2]), lost], (start,))
        lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
        for _ in range(dice.randint(1, 2)):
            line = dice.choice(lines)
            line[dice.choice(list(line))] = dice.choice(values)
        path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        assert await spool.replay(ens.store, spools) == set()
        assert not path.exists()
        await reaper.release(ens.store, spools, lease.id)
        assert (await lease_of(desk, lease))[0] == "RELEASED"
        path.with_name(f"{path.name}.bad").unlink(missing_ok=True)
