"""What integration tests share: a service, a store with hands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from ensemble.core.store import Store
from ensemble.site import Site
from tests.integration.serving import Serving
from tests.integration.storing import Desk


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
