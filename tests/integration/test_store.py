from __future__ import annotations

from ensemble.core.model import NewTask
from ensemble.core.store import Store


async def test_added_tasks_get_rising_ids(store: Store) -> None:
    ids = await store.add([NewTask(command=["true"]), NewTask(command=["true"])])
    assert ids == [1, 2]
