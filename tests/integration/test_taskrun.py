"""One task from its launch to its end, where an MPI launcher's words are not its program's: no Slurm is needed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ensemble.core.events import Ended, Started
from ensemble.core.model import Claim, Node, Output, Placement
from ensemble.drivers import process
from ensemble.drivers.mpi import MpiLauncher
from ensemble.drivers.mpiline import Flavor
from ensemble.service import taskrun
from ensemble.service.taskrun import Ground, Handle
from tests.integration.test_process import no_file_descriptors, start

#: As srun 22.05 does while slurmctld is away, and when a step can never be made.
AWAY = """\
srun: cluster configuration lacks support for cpu binding
srun: error: Unable to confirm allocation for job 7: Unable to contact slurm controller (connect failure)
srun: Check SLURM_JOB_ID environment variable. Expired or invalid job 7
"""
NEVER = (
    "srun: error: Unable to create step for job 7: Requested node configuration is not available\n"
)
#: Says what it was told to so many times; then it runs its last argument, and tells of a failure as srun does.
SRUN = """#!/bin/sh
echo x >> "$ENSEMBLE_SITE/calls"
if test $(wc -l < "$ENSEMBLE_SITE/calls") -le {times}; then cat "$ENSEMBLE_SITE/says"; exit 1; fi
for program; do :; done
"$program" || {{ code=$?; echo "srun: error: n1: task 0: Exited with exit code $code"; exit $code; }}
"""
VIRTUAL = Placement(nodes=(Node(name="n1", cores=1, is_virtual=True),))


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    async def admit() -> None:
        pass

    monkeypatch.setattr(taskrun, "_AGAIN_S", (0.01,) * 3)
    with ThreadPoolExecutor(2) as executor:
        yield Ground(
            site=tmp_path,
            marker_prefix=f"8{os.getpid()}-1-1.",
            environ={"PATH": os.environ["PATH"]},
            mpi=None,
            mpi_error="",
            is_single_rank_wrapped=True,
            executor=executor,
            readers=executor,
            grace_s=0.1,
            error_tail_lines=20,
            scheduler="slurm",
            scheduler_job_id=None,
            admit=admit,
        )


async def run(
    ground: Ground, says: str, times: int, program: str, output: Output = Output.FILE
) -> tuple[Ended, int]:
    """Run a program under such an srun; return how that ended, and how often it was asked."""
    (ground.site / "says").write_text(says)
    srun = script(ground.site / "srun", SRUN.format(times=times))
    command = script(ground.site / "program", f"#!/bin/sh\n{program}\n")
    claim = Claim(
        id=1, attempt=1, name="x", workflow="w", app=None, argv=(str(command),), workdir="x",
        output=output,
    )  # fmt: skip
    launcher = MpiLauncher(flavor=Flavor.SRUN, command=(str(srun),))
    events: list[object] = []
    await taskrun.run_task(claim, VIRTUAL, Handle(), replace(ground, mpi=launcher), events.append)
    assert [type(event) for event in events] == [Started, Ended]
    assert isinstance(events[1], Ended)
    return events[1], len((ground.site / "calls").read_text().splitlines())


@pytest.mark.parametrize("output", [Output.FILE, Output.TAIL])
async def test_a_step_that_slurm_cannot_make_for_now_is_made_later(
    ground: Ground, output: Output
) -> None:
    ended, calls = await run(ground, AWAY, 2, "echo ran", output)
    assert (ended.status, ended.start_error, calls) == (0, None, 3)
    files = {path.name: path.read_text() for path in (ground.site / "x").iterdir()}
    assert files == ({"x.out": "ran\n"} if output is Output.FILE else {})


async def test_a_step_that_slurm_never_makes_is_asked_for_once(ground: Ground) -> None:
    ended, calls = await run(ground, NEVER, 9, "echo ran")
    assert (ended.status, calls) == (1, 1)
    told = f"Slurm would not start {ground.site}/program: Requested node configuration is not available"
    assert ended.start_error == told
    assert (ground.site / "x" / "x.out").read_text() == NEVER


@pytest.mark.parametrize("output", [Output.FILE, Output.TAIL])
@pytest.mark.parametrize("work", ["echo worked", "seq 5000", ":"], ids=["brief", "long", "silent"])
async def test_a_program_whose_own_step_was_refused_is_not_run_again(
    ground: Ground, work: str, output: Output
) -> None:
    program = f'{work}\necho x >> "$ENSEMBLE_SITE/runs"\ncat "$ENSEMBLE_SITE/says"; exit 1'
    ended, calls = await run(ground, AWAY, 0, program, output)
    assert (ended.status, ended.start_error, calls) == (1, None, 1)
    assert (ground.site / "runs").read_text() == "x\n"
    assert [path.name for path in (ground.site / "x").iterdir()] == ["x.out"][
        : output is Output.FILE
    ]


async def test_words_of_a_refusal_that_cannot_be_removed_are_moved_aside(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    ended, calls = await run(ground, AWAY, 1, "echo ran")
    assert (ended.status, calls) == (0, 2)
    assert (ground.site / "x" / "x.out").read_text() == "ran\n"
    assert (ground.site / "x" / "x.out.1").read_text() == AWAY


async def test_without_file_descriptors_no_launcher_is_taken_for_hung(tmp_path: Path) -> None:
    task = start(tmp_path, "sleep", "100")
    assert not taskrun._may_have_child(task)
    with no_file_descriptors():
        assert taskrun._may_have_child(task)
    await process.end_tree(task, grace_s=0)
