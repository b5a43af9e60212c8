from __future__ import annotations

import pytest

from ensemble.core.model import NewTask
from ensemble.core.states import State
from tests.integration.launching import WHEEL, Ensemble, path_of, python, sh

pytestmark = WHEEL


async def test_first(ens: Ensemble) -> None:
    ids = await ens.run(sh("echo hello"), sh("echo bye; exit 3"), NewTask(command=["/no/such"]))
    for t in await ens.tasks(): print(t)
    print(ens.launchers[0].log)
    assert 0
