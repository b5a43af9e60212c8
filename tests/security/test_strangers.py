"""Strangers on this host and its network: what they reach of the store, of a pilots' link, and of the files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ensemble.core import wire
from ensemble.core.database import DRIVER_ERRORS
from ensemble.core.model import Selector
from ensemble.core.states import State
from ensemble.core.store import Store
from ensemble.core.wire import Gone, Pulse
from ensemble.drivers import linkfile, proctree
from ensemble.drivers.linkfile import LinkFile
from ensemble.drivers.pg.files import Role
from ensemble.site import OWNER, TASK, USER, Site
from tests.faults import witness
from tests.faults.witness import witnessed
from tests.integration.launching import WHEEL, Ensemble, Launched, sh
from tests.integration.test_link import hello, speak

pytestmark = WHEEL
NOBODY = 65534
SETPRIV = shutil.which("setpriv")


# ---------------------------------------------------------------------------- the store


def door(site: Site, **change: Any) -> dict[str, Any]:
    """What a stranger needs to connect as a user would, and what of it is another."""
    address = site.address(USER)
    assert address.ca_file is not None
    context = ssl.create_default_context(cafile=address.ca_file)
    context.check_hostname = False
    found = {
        "host": address.host,
        "port": address.port,
        "user": address.user,
        "password": address.password,
        "database": address.database,
        "ssl": context,
        "timeout": 10,
    }
    return found | change


def sockets() -> set[str]:
    """What this process has open to others."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return {each for each in found if each.startswith("socket:")}


async def turned_away(site: Site, **change: Any) -> str:
    before = sockets()
    try:
        connection = await asyncpg.connect(**door(site, **change))
    except (*DRIVER_ERRORS, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
    else:
        connection.terminate()
        raise AssertionError(f"somebody was let in with {change}")
    # The driver hangs up a moment later; a socket that outlives the event loop is some later test's warning.
    async with asyncio.timeout(60):
        while sockets() - before:
            await asyncio.sleep(0.005)
    return told


async def test_who_has_no_password_or_another_one_is_turned_away(store: Store, site: Site) -> None:
    real = [site.address(role).password for role in Role]
    assert len(set(real)) == 3
    assert all(len(password or "") >= 40 for password in real)
    # Nothing of a stranger's own may help: ~/.pgpass and PGPASSWORD are asked where none is given.
    for password in ("", "wrong", "ensemble_user", "postgres", *real[:1], "x" * 100_000, "ü"):
        told = await turned_away(site, password=password, passfile="/nonexistent")
        assert "Authorization" in told or "Password" in told or "Connection" in told, told
    for role in (OWNER, TASK):
        told = await turned_away(site, user=str(role), password=site.address(USER).password)
        assert "InvalidPassword" in told


async def test_who_is_a_user_of_the_system_is_nobody_to_the_database(
    store: Store, site: Site
) -> None:
    import pwd

    names = {each.pw_name for each in pwd.getpwall()} | {
        "root",
        "postgres",
        "nobody",
        "ensemble",
        "",
    }
    names |= {
        "all",
        "+ensemble_user",
        "replication",
        "ensemble_user\0postgres",
        "'; DROP ROLE x; --",
    }
    for name in sorted(names):
        # By the rules of access, before any password is asked for: none of these has a line there.
        told = await turned_away(site, user=name)
        assert "pg_hba.conf" in told or not name.isprintable() or not name, (name, told)


@pytest.mark.parametrize("database", ["postgres", "template0", "template1", "replication"])
async def test_no_role_reaches_another_database(store: Store, site: Site, database: str) -> None:
    for role in Role:
        address = site.address(role)
        told = await turned_away(
            site, user=address.user, password=address.password, database=database
        )
        assert "no pg_hba.conf entry" in told, told
    assert "no pg_hba.conf entry" in await turned_away(site, user="postgres", database=database)


async def test_replication_is_refused(store: Store, site: Site) -> None:
    """With it, all of the cluster could be copied."""
    for mode in ("true", "database"):
        told = await turned_away(site, server_settings={"replication": mode})
        assert "no pg_hba.conf entry" in told or "permission denied to start WAL" in told, told


@pytest.mark.parametrize(
    "words", [b"", b"\x00\x00\x00\x08\x04\xd2\x16/", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64]
)
async def test_plaintext_gets_no_word_of_the_store(store: Store, site: Site, words: bytes) -> None:
    address = site.address(USER)
    startup = b"user\0ensemble_user\0database\0ensemble\0\0"
    message = (len(startup) + 8).to_bytes(4, "big") + b"\x00\x03\x00\x00" + startup
    with socket.create_connection(("127.0.0.1", address.port or 0), timeout=10) as plain:
        plain.sendall(words or message)
        plain.shutdown(socket.SHUT_WR)
        heard = b""
        with contextlib.suppress(ConnectionError):
            while data := plain.recv(65536):
                heard += data
    assert len(heard) < 400
    assert not heard.startswith(b"R"), "it asked for a password, or let somebody in, without TLS"
    assert b"ensemble_owner" not in heard
    told = await turned_away(site, ssl=False)
    assert "no pg_hba.conf entry" in told


async def test_old_tls_and_weak_ciphers_are_refused(store: Store, site: Site) -> None:
    for setting in ("old", "none"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with contextlib.suppress(ssl.SSLError, ValueError):
            if setting == "old":
                import warnings

                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    context.minimum_version = ssl.TLSVersion.TLSv1
                    context.maximum_version = ssl.TLSVersion.TLSv1_1
            else:
                context.maximum_version = ssl.TLSVersion.TLSv1_2
                context.set_ciphers("aNULL:eNULL:@SECLEVEL=0")
        await turned_away(site, ssl=context)


async def test_it_listens_on_the_loopback_only_and_on_no_unix_socket(
    store: Store, site: Site
) -> None:
    port = site.address(USER).port
    assert port is not None
    listening = {
        line.split()[1]
        for name in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(name).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    }
    assert listening == {f"0100007F:{port:04X}"}
    assert f".s.PGSQL.{port}" not in Path("/proc/net/unix").read_text()


#: What the everyday role must not be able to do, though whoever has it may add tasks.
FORBIDDEN = [
    "CREATE SCHEMA x",
    "CREATE TABLE public.x (a int)",
    "CREATE TABLE ensemble.x (a int)",
    "CREATE TEMPORARY TABLE x (a int)",
    "CREATE FUNCTION ensemble.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE EXTENSION dblink",
    "CREATE ROLE x",
    "ALTER ROLE ensemble_user SUPERUSER",
    "ALTER ROLE ensemble_owner PASSWORD 'x'",
    "ALTER ROLE ensemble_task CONNECTION LIMIT -1",
    "GRANT ensemble_owner TO ensemble_user",
    "SET ROLE ensemble_owner",
    "SET SESSION AUTHORIZATION ensemble_owner",
    "SET session_replication_role = replica",
    "ALTER TABLE ensemble.task DISABLE TRIGGER ALL",
    "ALTER TABLE ensemble.task DROP COLUMN state",
    "DROP TABLE ensemble.task",
    "DROP SCHEMA ensemble CASCADE",
    "DROP DATABASE ensemble",
    "TRUNCATE ensemble.task",
    "TRUNCATE ensemble.event",
    "INSERT INTO ensemble.event (task_id, at, from_state, to_state, attempt, actor) VALUES (1, now(), '', '', 1, 'x')",
    "UPDATE ensemble.event SET actor = 'somebody'",
    "DELETE FROM ensemble.event",
    "UPDATE ensemble.move SET actor = 'x'",
    "DELETE FROM ensemble.schema_version",
    "DELETE FROM ensemble.service",
    "COPY ensemble.task TO '/tmp/x'",
    "COPY ensemble.workflow FROM PROGRAM 'touch /tmp/x'",
    "SELECT pg_read_file('postgresql.conf')",
    "SELECT pg_ls_dir('.')",
    "SELECT pg_stat_file('pg_hba.conf')",
    "SELECT lo_import('/etc/passwd')",
    "SELECT * FROM pg_authid",
    "SELECT passwd FROM pg_shadow",
    "SELECT rolpassword FROM pg_catalog.pg_authid",
    "ALTER SYSTEM SET ssl = off",
    "SELECT pg_reload_conf()",
    "SELECT pg_promote()",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'ensemble_owner'",
    "SELECT pg_rotate_logfile()",
    "CHECKPOINT",
    "CREATE EVENT TRIGGER x ON ddl_command_start EXECUTE FUNCTION f()",
    "CREATE PUBLICATION p FOR ALL TABLES",
    "SELECT pg_create_physical_replication_slot('x')",
    "LOAD 'auto_explain'",
    "DO LANGUAGE plpython3u 'pass'",
]  # fmt: skip


@pytest.mark.parametrize("role", [USER, TASK])
async def test_what_the_everyday_roles_cannot_do(
    store: Store, site: Site, owner: asyncpg.Connection[Any], role: Role
) -> None:
    (task_id,) = await store.add([sh("true")])
    await store.kill([task_id])
    before = await owner.fetchval("SELECT count(*) FROM event")
    address = site.address(role)
    connection = await asyncpg.connect(**door(site, user=address.user, password=address.password))
    allowed = []
    try:
        for statement in FORBIDDEN:
            transaction = connection.transaction()
            await transaction.start()
            with contextlib.suppress(asyncpg.PostgresError):
                await connection.execute(statement)
                allowed.append(statement)
            await transaction.rollback()  # nothing of it stays
    finally:
        connection.terminate()
    assert allowed == []
    assert await owner.fetchval("SELECT count(*) FROM event") == before
    assert await owner.fetchval("SELECT current_user") == "ensemble_owner"
    assert await store.check() == []


async def test_the_owner_reads_no_file_and_runs_no_program(
    owner: asyncpg.Connection[Any],
) -> None:
    """Even with the highest of our passwords nobody gets a shell from the database itself."""
    for statement in (
        "COPY (SELECT 1) TO PROGRAM 'touch /tmp/x'",
        "COPY workflow FROM '/etc/passwd'",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT lo_import('/etc/passwd')",
        "CREATE FUNCTION f() RETURNS int LANGUAGE c AS '/lib/x.so', 'f'",
        "ALTER SYSTEM SET archive_command = 'touch /tmp/x'",
        "CREATE ROLE x SUPERUSER",
        "ALTER ROLE ensemble_owner SUPERUSER",
        "SET ROLE postgres",
        "SELECT rolpassword FROM pg_authid",
        "GRANT pg_execute_server_program TO ensemble_owner",
    ):
        with pytest.raises(asyncpg.PostgresError) as caught:
            await owner.execute(statement)
        assert caught.value.sqlstate == "42501", (statement, caught.value)


async def test_functions_do_what_their_caller_may_and_no_more(
    owner: asyncpg.Connection[Any],
) -> None:
    """A function that runs as its owner must not look names up where its caller says."""
    rows = await owner.fetch(
        "SELECT p.proname AS name, p.proconfig AS config FROM pg_proc p"
        " JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'ensemble' AND p.prosecdef"
    )
    for row in rows:
        path = [each for each in row["config"] or [] if each.startswith("search_path=")]
        assert path, f"{row['name']} runs as its owner with its caller's search_path"
        assert "public" not in path[0]


async def test_other_databases_of_the_cluster_are_closed_to_all(
    owner: asyncpg.Connection[Any],
) -> None:
    rows = await owner.fetch(
        "SELECT datname AS name, has_database_privilege('ensemble_user', datname, 'TEMP') AS temp,"
        " has_database_privilege('ensemble_user', datname, 'CREATE') AS creates FROM pg_database"
        " WHERE datname = 'ensemble'"
    )
    assert [dict(row) for row in rows] == [{"name": "ensemble", "temp": False, "creates": False}]
    roles = await owner.fetch(
        "SELECT rolname AS name FROM pg_roles WHERE rolcanlogin AND rolname NOT LIKE 'ensemble%'"
    )
    assert [row["name"] for row in roles] == ["postgres"]


# ---------------------------------------------------------------------------- a pilots' link


@contextlib.contextmanager
def knocking(port: int, number: int, *, says: bytes = b"") -> Iterator[list[socket.socket]]:
    """Open many connections and keep them."""
    with contextlib.ExitStack() as stack:
        calls = []
        for _ in range(number):
            call = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            if says:
                call.sendall(says)
            calls.append(call)
        yield calls


async def joined(ens: Ensemble, **settings: object) -> tuple[Launched, LinkFile]:
    launched = ens.launch("--persistent", mode="serial", **settings)  # type: ignore[arg-type]
    await ens.joined(launched)
    return launched, linkfile.read(launched.run_directory / "link.json")


async def end(ens: Ensemble, launched: Launched) -> None:
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0, launched.log


async def test_the_key_of_another_launcher_of_the_same_site_opens_nothing(ens: Ensemble) -> None:
    one, first = await joined(ens)
    other, second = await joined(ens)
    assert first.key != second.key
    assert first.certificate != second.certificate
    for mine, theirs, launched in ((first, second, other), (second, first, one)):
        context = mine.client_context()
        context.verify_mode = (
            ssl.CERT_NONE
        )  # the launcher must notice, whatever the stranger thinks
        before = len(launched.events("link.refused"))
        heard = speak(theirs, context, wire.encode(hello(0)), wire.encode(Gone(launch=0, rank=0)))
        assert heard == b""
        await ens.eventually(lambda: len(launched.events("link.refused")) > before)  # noqa: B023
        assert "no TLS with the launch's certificate" in launched.log.rpartition("link.refused")[2]
        # Nor does a pilot of one take the other for its own.
        with (
            socket.create_connection(("127.0.0.1", theirs.port), timeout=30) as plain,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            mine.client_context().wrap_socket(plain)
    ids = await ens.store.add([witnessed(), witnessed()])
    await ens.reach(State.JOB_FINISHED, *ids)
    await end(ens, one)
    await end(ens, other)
    await witness.check(ens)


async def test_words_of_a_pilot_that_are_said_again_change_nothing(ens: Ensemble) -> None:
    (held,) = await ens.store.add([sh("sleep 600")])
    launched, link = await joined(ens)
    await ens.reach(State.RUNNING, held)
    pilots = launched.pilots()
    context = link.client_context()
    report = wire.Report(
        now=1.0, ran=[], done=[wire.Done(held, 1, 1.0, 1.0, 0)], failed=[], dropped=[]
    )
    for rank in (0, 1):
        # As it was said at the start, for ranks that have joined: also with what would end a task.
        words = wire.encode(hello(rank)) + wire.encode(report) + wire.encode(Pulse(1.0))
        assert speak(link, context, words) == b""
    await ens.eventually(lambda: len(launched.events("link.refused")) == 2)
    assert launched.pilots() == pilots
    assert (await ens.task(held)).state is State.RUNNING
    # TLS itself takes nothing a second time: no tickets, no early data.
    with (
        socket.create_connection(("127.0.0.1", link.port), timeout=30) as plain,
        context.wrap_socket(plain) as stream,
    ):
        assert stream.version() == "TLSv1.3"
        assert not stream.session_reused
    await ens.store.kill([held])
    await ens.gone()
    await end(ens, launched)
    await witness.check(ens)


@pytest.mark.parametrize(
    "says", [b"", b"\x16\x03\x01\x02\x00\x01\x00"], ids=["nothing", "half a hello"]
)
async def test_hundreds_who_call_and_say_nothing_do_not_stall_the_pilots(
    ens: Ensemble, says: bytes
) -> None:
    launched, link = await joined(ens)
    pilots = launched.pilots()
    with knocking(link.port, 800, says=says):
        # While all of them are there, work goes on as ever.
        ids = await ens.store.add([witnessed() for _ in range(20)])
        await ens.reach(State.JOB_FINISHED, *ids)
        (held,) = await ens.store.add([sh("sleep 600")])
        await ens.reach(State.RUNNING, held)
        await ens.store.kill([held])
        await ens.gone()
        assert launched.pilots() == pilots
        assert not launched.events("pilot.silent")
        await end(ens, launched)
    assert len(launched.events("link.refused")) <= 20
    await witness.check(ens)


async def test_callers_do_not_use_up_a_launchers_descriptors(ens: Ensemble) -> None:
    launched = ens.launch("--persistent", mode="serial")
    # Before it has begun: what it starts inherits that, and cannot raise it.
    resource.prlimit(launched.guard.pid, resource.RLIMIT_NOFILE, (400, 400))
    await ens.joined(launched)
    link = linkfile.read(launched.run_directory / "link.json")
    try:
        with knocking(link.port, 600):
            ids = await ens.store.add([witnessed() for _ in range(4)])
            await ens.reach(State.JOB_FINISHED, *ids, within_s=12)
            assert len(os.listdir(f"/proc/{launched.pid}/fd")) < 350
    finally:
        launched.signal(signal.SIGTERM)
        await ens.leave(launched, within_s=60)


async def test_who_holds_a_certificate_but_says_no_word_gets_no_place(ens: Ensemble) -> None:
    launched, link = await joined(ens)
    context = link.client_context()
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", link.port), 30))
            stack.enter_context(context.wrap_socket(plain))
        ids = await ens.store.add([witnessed(), witnessed()])
        await ens.reach(State.JOB_FINISHED, *ids)
        assert len(launched.pilots()) == 2
        await end(ens, launched)
    await witness.check(ens)


async def test_a_link_is_on_the_loopback_where_all_nodes_are(ens: Ensemble) -> None:
    launched, link = await joined(ens)
    listening = {
        line.split()[1]
        for name in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(name).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{link.port:04X}")
    }
    assert listening == {f"0100007F:{link.port:04X}"}
    await end(ens, launched)


# ---------------------------------------------------------------------------- another user of this host


as_root = pytest.mark.skipif(
    os.geteuid() != 0 or SETPRIV is None,
    reason="NOT TESTED: only root, with setpriv, can become another user",
)


def as_nobody(*argv: str) -> subprocess.CompletedProcess[bytes]:
    assert SETPRIV is not None
    words = [
        SETPRIV,
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        "--no-new-privs",
        "--",
    ]
    return subprocess.run([*words, *argv], cwd="/", capture_output=True, timeout=30)


@as_root
async def test_another_user_reads_no_secret_and_no_environment(ens: Ensemble) -> None:
    """With the directories above opened, as a site in a shared place would have them."""
    with seen_by_all(ens.site.path):
        (held,) = await ens.store.add([sh("sleep 600")])
        launched, _ = await joined(ens)
        await ens.reach(State.RUNNING, held)
        site = ens.site.path
        assert as_nobody("ls", str(site)).returncode == 0, "the test itself cannot look"
        secret = [
            site / "db",
            *(site / "db" / name for name in ("secrets.json", "pgpass", "ca.key", "server.key", "cluster.json",
                                              "server.json", "pgdata", "postgres.log", "ca.crt")),
            launched.run_directory / "link.json",
            *(each for each in (site / "log" / "spool",) if each.exists()),
        ]  # fmt: skip
        for path in secret:
            assert path.exists(), path
            for words in (("cat", str(path)), ("ls", f"{path}/"), ("cp", str(path), "/dev/null")):
                done = as_nobody(*words)
                assert done.returncode != 0, (words, done)
                assert done.stdout == b"", words
        check_unwritable(site, launched.run_directory)
        ours = [launched.guard.pid, launched.pid, *launched.machinery(), *ens.processes(held)]
        for pid in ours:
            for name in ("environ", "fd/0", "mem", "cwd/ensemble.toml"):
                assert as_nobody("cat", f"/proc/{pid}/{name}").stdout == b"", (pid, name)
            assert as_nobody("kill", "-0", str(pid)).returncode != 0
        await ens.store.kill([held])
        await ens.gone()
        await end(ens, launched)
    await witness.check(ens)


@contextlib.contextmanager
def seen_by_all(site: Path) -> Iterator[None]:
    """Let everybody come as far as a site, as in a shared place."""
    modes = {
        folder: folder.stat().st_mode & 0o7777
        for folder in (site, *site.parents)
        if folder != Path("/")
    }
    for folder, mode in modes.items():
        folder.chmod(mode | 0o055)
    try:
        yield
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)


def check_unwritable(site: Path, *more: Path) -> None:
    for path in (
        site,
        *(site / name for name in ("db", "log", "templates", "qsubmit", "data")),
        *more,
    ):
        if path.exists():
            assert as_nobody("touch", f"{path}/planted").returncode != 0, path
            assert not (path / "planted").exists()
    for path in (site / "ensemble.toml", site / "templates" / "job.sh"):
        assert as_nobody("sh", "-c", 'echo >> "$0"', str(path)).returncode != 0


@as_root
async def test_another_user_s_ensemble_gets_nowhere_with_somebody_s_site(
    site: Site, store: Store, tmp_path: Path
) -> None:
    """A site's directory may be seen; its commands want the passwords, which may not."""
    import sys

    with seen_by_all(site.path):
        if as_nobody(sys.executable, "-c", "import ensemble").returncode != 0:
            pytest.skip("NOT TESTED: another user cannot run this Python at all")
        for words in (
            ("ls",),
            ("status",),
            ("add", "--", "true"),
            ("db", "stop"),
            ("db", "backup", "/tmp/x"),
        ):
            done = as_nobody(
                sys.executable, "-P", "-m", "ensemble", "--site", str(site.path), *words
            )
            assert done.returncode != 0, (words, done)
            assert b"Traceback" not in done.stderr
            assert done.stderr.startswith(b"error: "), done
    assert await store.task_states(Selector()) == {}
    assert proctree.scan()
