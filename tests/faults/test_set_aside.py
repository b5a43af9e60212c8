"""A node that cannot start what starts elsewhere gets no more tasks, and none fails for it."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from ensemble.core.model import Cause, NewTask, Outcome, Selector
from ensemble.core.states import State
from ensemble.errors import LaunchError
from tests.faults.witness import check, witnessed
from tests.integration.launching import MPICH, WHEEL, Ensemble, sh

pytestmark = [WHEEL, pytest.mark.mpi]

_UNSHARE = (
    ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
)


def _without_files(folder: Path, site: Path) -> Path:
    """Write an mpiexec whose last rank's node lacks the work directories' file system."""
    rank, command = folder / "rank", folder / "mpiexec"
    rank.write_text(
        "#!/bin/sh\n"
        'if [ "$PMI_RANK" = 1 ]; then\n'
        f"""  exec {" ".join(_UNSHARE)} sh -c 'mount -t tmpfs -o ro none "{site}/data" && exec "$@"' sh "$@"\n"""
        'fi\nexec "$@"\n'
    )
    # mpiexec FLAGS -n N PROGRAM ...: the program's place is after the number of ranks.
    command.write_text(
        f'#!/bin/sh\n[ $# -gt 3 ] || exec {MPICH} "$@"\n'
        "flags=\n"
        'while [ "$1" != -n ]; do flags="$flags $1"; shift; done\n'
        f'shift; ranks=$1; shift; exec {MPICH} $flags -n $ranks {rank} "$@"\n'
    )
    for file in (rank, command):
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return command


async def test_a_node_without_its_file_system_is_set_aside_and_its_tasks_run_elsewhere(
    ens: Ensemble, tmp_path: Path
) -> None:
    probe = subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    if probe.returncode != 0:
        pytest.skip("NOT TESTED: a node without its file system (no mount name spaces here)")
    (ens.site.path / "data").mkdir(exist_ok=True)
    command = _without_files(tmp_path, ens.site.path)
    ids = await ens.store.add([witnessed("sleep 0.05", node_packing_count=2) for _ in range(60)])
    launched = ens.launch("--idle-timeout=0", mode="serial", MPI_COMMAND=command)
    await ens.eventually(lambda: launched.events("node.set_aside"), within_s=30)
    assert await ens.leave(launched) == 0, launched.log
    assert len(launched.events("node.set_aside")) == 1
    states = await ens.store.task_states(Selector(ids=tuple(ids)))
    assert set(states.values()) == {State.JOB_FINISHED}, "a task failed for its node"
    lost = await ens.store.pool.fetch("SELECT cause, reason FROM attempt WHERE outcome = 'lost'")
    assert lost
    assert {row["cause"] for row in lost} == {Cause.NODE_LOST}
    assert all("was set aside" in row["reason"] for row in lost)
    [known] = await ens.store.launchers(only_live=False)
    assert len(known.aside) == 1
    await check(ens)


async def test_tasks_that_start_nowhere_set_no_node_aside(ens: Ensemble) -> None:
    ids = await ens.store.add([sh("true") for _ in range(20)])
    failing = await ens.store.add([NewTask(command=["/no/such/program"]) for _ in range(30)])
    launched = ens.launch("--idle-timeout=0", mode="serial")
    assert await ens.leave(launched) == 0, launched.log
    assert launched.events("node.set_aside") == []
    states = await ens.store.task_states(Selector(ids=tuple(ids)))
    assert set(states.values()) == {State.JOB_FINISHED}
    states = await ens.store.task_states(Selector(ids=tuple(failing)))
    assert set(states.values()) == {State.FAILED}
    await check(ens)


@pytest.mark.parametrize("mode", ["mpi", "serial"])
async def test_a_site_that_is_moved_is_not_made_anew_and_no_task_fails_for_it(
    ens: Ensemble, mode: str
) -> None:
    place, elsewhere = ens.site.path, ens.site.path.with_name("moved")
    launched = ens.launch("--persistent", mode=mode)
    await ens.leased(launched)
    if mode == "serial":
        await ens.eventually(lambda: launched.events("pilot.joined"))
    place.rename(elsewhere)
    try:
        await ens.store.add([witnessed() for _ in range(5)])
        await ens.eventually(lambda: launched.guard.poll() is not None)
        assert not place.exists()
    finally:
        elsewhere.rename(place)
    assert launched.guard.returncode == LaunchError.exit_code, launched.log
    assert f"the site's directory {place} is not there" in launched.log
    assert {attempt.outcome for task in await ens.tasks() for attempt in (await ens.store.detail(task.id)).attempts} <= {
        Outcome.GIVEN_BACK
    }  # fmt: skip
    assert await ens.leave(ens.launch("--idle-timeout=0", mode=mode)) == 0
    assert set(await ens.states()) == {State.JOB_FINISHED}
    # Its own papers were out of its reach when it left.
    for link in (place / "log").glob("**/link*.json"):
        link.unlink()
    await check(ens)
