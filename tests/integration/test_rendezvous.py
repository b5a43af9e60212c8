"""Pilots find each other: real mpiruns, each rank a guard with a stand-in for the pilot below it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.config import MpiSettings
from ensemble.core.model import Node
from ensemble.drivers import linkfile, mpi, mpienv, pilotline, world
from ensemble.drivers.guardlink import guard_argv
from ensemble.drivers.mpi import Flavor, MpiLauncher
from ensemble.errors import LaunchError
from tests.pilots import PILOT, is_alive, stories

#: Shadows mpi4py. On the last rank it is broken; on the others it steps aside.
SHADOW = """
import os, sys, time
if (os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK")) == "{rank}":
    {does}
sys.path = [each for each in sys.path if each != os.path.dirname(os.path.dirname(__file__))]
del sys.modules["mpi4py"]
import mpi4py
"""


async def detect(path: str, *flavors: Flavor) -> MpiLauncher:
    found = await mpi.detect(MpiSettings(command=path), scheduler="local", environ=os.environ)
    assert found.flavor in flavors
    return found


async def find_mpich() -> MpiLauncher:
    path = Path(sys.executable).parent / "mpiexec"
    if not path.exists():
        pytest.skip("NOT TESTED with MPICH: no mpiexec beside this python (pip install mpich)")
    return await detect(str(path), Flavor.MPICH)


async def find_openmpi() -> MpiLauncher:
    path = shutil.which("mpirun.openmpi")
    if path is None:
        pytest.skip("NOT TESTED with Open MPI: no mpirun.openmpi (apt-get install openmpi-bin)")
    return await detect(path, Flavor.OPENMPI4, Flavor.OPENMPI5)


async def find_openmpi5() -> MpiLauncher:
    path = os.environ.get("OPENMPI5")
    if path is None:
        pytest.skip("NOT TESTED with Open MPI 5: $OPENMPI5 does not name an mpirun of it")
    return await detect(path, Flavor.OPENMPI5)


MPICH = pytest.param(find_mpich, id="mpich", marks=pytest.mark.mpi)
OPENMPI = pytest.param(find_openmpi, id="openmpi", marks=pytest.mark.openmpi)
OPENMPI5 = pytest.param(find_openmpi5, id="openmpi5", marks=pytest.mark.openmpi)


@pytest.fixture(params=[MPICH, OPENMPI, OPENMPI5])
async def launcher(request) -> MpiLauncher:
    return await request.param()


class Pilots:
    """Launches of stand-ins on virtual nodes."""

    def __init__(self, folder: Path, eventually: Callable[..., Any]) -> None:
        self.folder = folder
        self._eventually = eventually
        self.mpirun: subprocess.Popen[str] | None = None
        self.expected = 0

    def start(
        self, launcher: MpiLauncher, count: int, *, mpi_s: float = 30, environ: dict[str, str] | None = None
    ) -> None:  # fmt: skip
        self.expected = count
        (self.folder / "pilot.py").write_text(PILOT)
        link = linkfile.make(["127.0.0.1"], 7, count, launcher_id=3)
        link.write(self.folder / "link.json")
        nodes = [Node(name=f"v{number}", cores=1, is_virtual=True) for number in range(count)]
        pilot = [sys.executable, "-P", str(self.folder / "pilot.py")]
        program = [*pilot, str(self.folder), str(count), str(mpi_s)]
        env = pilotline.pilot_environ(launcher, {**os.environ, **(environ or {})})
        argv = pilotline.pilot_launch_argv(
            launcher,
            nodes,
            guard_argv(program, is_exit_zero=True),
            exports=pilotline.exported(env),
        )
        # A file, not a pipe: what is left behind must not hold up the test.
        with (self.folder / "output").open("w") as output:
            self.mpirun = subprocess.Popen(
                argv, env=env | {"TMPDIR": str(self.folder)}, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True, text=True,
            )  # fmt: skip

    async def told(self) -> list[dict[str, Any]]:
        """Return what the pilots found out, by rank."""
        try:
            return await self._eventually(lambda: stories(self.folder, self.expected), within_s=60)
        except AssertionError as error:
            raise AssertionError((self.folder / "output").read_text()) from error

    def end(self, rank: int | None = None) -> None:
        """Let one pilot leave, or all."""
        (self.folder / ("stop" if rank is None else f"stop{rank}")).touch()

    def ended(self) -> int:
        """Return the exit status of mpirun, once it has ended by itself."""
        assert self.mpirun is not None
        return self.mpirun.wait(timeout=30)


@pytest.fixture
def pilots(tmp_path: Path, eventually) -> Iterator[Pilots]:
    found = Pilots(tmp_path, eventually)
    yield found
    found.end()
    if found.mpirun is not None:
        try:
            found.mpirun.wait(timeout=10)
        except subprocess.TimeoutExpired:
            found.mpirun.terminate()
            found.mpirun.wait(timeout=10)


@pytest.mark.parametrize("count", [1, 2, 4])
async def test_every_pilot_learns_its_rank_and_the_link(launcher, pilots, count):
    pilots.start(launcher, count)
    told = await pilots.told()
    assert [(each["rank"], each["size"], each["place"]) for each in told] == [
        (rank, count, rank) for rank in range(count)
    ]
    how = "mpi" if count > 1 else "environ"
    assert {(each["how"], each["note"], each["launcher"]) for each in told} == {(how, None, 3)}
    pilots.end()
    assert pilots.ended() == 0


async def test_the_others_outlive_a_killed_pilot(launcher, pilots, eventually):
    pilots.start(launcher, 3)
    told = await pilots.told()
    os.kill(told[1]["pilot"], signal.SIGKILL)
    await eventually(lambda: not is_alive(told[1]["guard"]))
    pilots.end(0)
    await eventually(lambda: not is_alive(told[0]["guard"]))
    assert [is_alive(each["pilot"]) for each in told] == [False, False, True]
    assert pilots.mpirun.poll() is None
    pilots.end()
    assert pilots.ended() == 0


async def test_a_killed_guard_ends_the_others_only_with_hydra(launcher, pilots, eventually):
    pilots.start(launcher, 3)
    told = await pilots.told()
    os.kill(told[1]["guard"], signal.SIGKILL)
    await eventually(lambda: not is_alive(told[1]["pilot"]))
    if launcher.flavor is Flavor.MPICH:
        assert pilots.ended() == 128 + signal.SIGKILL or pilots.ended() == signal.SIGKILL
        await eventually(lambda: not any(is_alive(each["pilot"]) for each in told))
        return
    pilots.end(0)
    await eventually(lambda: not is_alive(told[0]["guard"]))
    assert is_alive(told[2]["pilot"])
    assert pilots.mpirun.poll() is None
    pilots.end()
    assert pilots.ended() == 0


async def test_a_library_of_another_mpi_is_noticed(launcher, pilots):
    other = await (find_openmpi() if launcher.flavor is Flavor.MPICH else find_mpich())
    library = pilotline.pilot_environ(other, {})["MPI4PY_LIBMPI"]
    pilots.start(launcher, 2, mpi_s=20, environ={"MPI4PY_LIBMPI": library})
    told = await pilots.told()
    assert [(each["rank"], each["size"], each["place"]) for each in told] == [(0, 2, 0), (1, 2, 1)]
    assert {each["how"] for each in told} == {"environ"}
    assert all("by the environment" in each["note"] for each in told)
    pilots.end()
    assert pilots.ended() == 0


@pytest.mark.parametrize(
    ("does", "note"),
    [
        ("time.sleep(600)", "did not end"),
        ("raise ImportError('libmpi.so: not today')", "not today"),
        ("os.kill(os.getpid(), 9)", "status -9"),
    ],
    ids=["hangs", "fails", "killed"],
)
async def test_pilots_do_without_an_mpi_that_does_not_work(launcher, pilots, does, note):
    package = pilots.folder / "shadow" / "mpi4py"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SHADOW.format(rank=1, does=does))
    pilots.start(launcher, 2, mpi_s=4, environ={"PYTHONPATH": str(package.parent)})
    told = await pilots.told()
    assert [(each["rank"], each["size"], each["place"]) for each in told] == [(0, 2, 0), (1, 2, 1)]
    assert {each["how"] for each in told} == {"environ"}
    assert note in told[1]["note"]
    assert max(each["s"] for each in told) < 60, "it waited for who hangs"
    assert pilots.mpirun.poll() is None
    pilots.end()
    # Where MPI was begun and never finalised, Hydra may kill who leaves last; they had nothing left to do.
    assert pilots.ended() in ({0, 9} if launcher.flavor is Flavor.MPICH else {0})


async def test_a_rank_without_mpi_and_without_a_launcher_says_what_to_do(tmp_path):
    linkfile.make(["127.0.0.1"], 7, 2, launcher_id=3).write(tmp_path / "link.json")
    environ = mpienv.clean_environ(os.environ)
    with pytest.raises(
        LaunchError, match=r"set MPI4PY_LIBMPI .*tells no rank|tells no rank.* set MPI4PY_LIBMPI"
    ):
        await world.meet(tmp_path / "link.json", 2, 30, environ)


async def test_a_missing_link_file_is_told_in_one_line(tmp_path):
    with pytest.raises(LaunchError, match=r"cannot read .*link.json: No such file"):
        await world.meet(tmp_path / "link.json", 1, 30, os.environ)
