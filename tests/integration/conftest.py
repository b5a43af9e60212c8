"""What integration tests share: a store with hands."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from ensemble.core.store import Store
from tests.integration.storing import Desk


@pytest.fixture
async def desk(store: Store) -> AsyncIterator[Desk]:
    """Hands for an empty store; afterwards its invariants hold, unless the test planted a fault."""
    found = Desk(store)
    yield found
    assert await store.check() == []
