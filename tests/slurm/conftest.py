"""A real private Slurm of four nodes for the tests here."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.core.store import Store
from ensemble.site import Site
from tests.slurm.batch import BatchSite, SlurmEnsemble
from tests.slurm.cluster import Slurm, find_missing, kill

CONF = Path(__file__).parent.parent / "data" / "slurm.conf.in"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    # A second to start: not worth having its daemons beside other tests' checks for leaks.
    if missing := find_missing():
        pytest.skip(f"NOT TESTED on Slurm: no {missing} (apt-get install slurm-wlm)")
    started = Slurm.start(CONF.read_text())
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(started.path, ignore_errors=True)


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    """Four idle nodes, n0 to n3, of four cores each; afterwards no job is left."""
    cluster.wait_until_idle()
    yield cluster
    cluster.cancel_all()


@pytest.fixture
async def ens(
    site: Site, store: Store, eventually: Callable[..., Any], slurm: Slurm
) -> AsyncIterator[SlurmEnsemble]:
    """An empty store and batch jobs; afterwards nothing runs on any node and the books are right."""
    shutil.rmtree(site.path / "data", ignore_errors=True)
    made = SlurmEnsemble(site, store, eventually, slurm)
    yield made
    slurm.cancel_all()
    left = made.left()
    kill(set(left))
    assert not left, "processes were left"
    assert await store.check() == []


@pytest.fixture
async def batches(ens: SlurmEnsemble) -> AsyncIterator[BatchSite]:
    """The site, with this Slurm as its scheduler; afterwards no service is left, and `ens` looks for the rest."""
    made = BatchSite(ens)
    try:
        yield made
    finally:
        made.close()
