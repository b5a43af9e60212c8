"""What integration tests share: a site with launchers, a store with hands."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ensemble.core.database import Address, connect
from ensemble.core.store import Store
from ensemble.site import OWNER, Site
from tests.integration.launching import Ensemble
from tests.integration.serving import Serving
from tests.integration.storing import Desk


@pytest.fixture
async def ens(site: Site, store: Store, eventually: Callable[..., Any]) -> AsyncIterator[Ensemble]:
    """An empty store and launchers; afterwards nothing runs and the books are right."""
    shutil.rmtree(site.path / "data", ignore_errors=True)
    made = Ensemble(site, store, eventually)
    yield made
    running = [each for each in made.launchers if each.guard.poll() is None]
    for launched in made.launchers:
        launched.kill()
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
async def desk(store: Store) -> AsyncIterator[Desk]:
    """Hands for an empty store; afterwards its invariants hold, unless the test planted a fault."""
    found = Desk(store)
    yield found
    assert await store.check() == []


@pytest.fixture
async def owner(site: Site, address: Address) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A connection of the schema's owner."""
    connection = await connect(site.address(OWNER), name="test owner")
    yield connection
    connection.terminate()
