"""The templates for Slurm, on a real one: what it reads in the directives, and who gets its signals."""

from __future__ import annotations

import shlex
import sys

import pytest

from ensemble.drivers.template import Raw, builtin, render
from tests.slurm.cluster import Slurm, wait_for

#: Prints what it got, and whether it was signalled.
LAUNCHER = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("drained", flush=True), os._exit(0)))
print("cwd", os.getcwd(), "argument", sys.argv[1], flush=True)
signal.pause()
"""


@pytest.fixture
def values(tmp_path):
    site = tmp_path / "it's a $(site)"
    site.mkdir()
    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER)
    return {
        "id": 7,
        "name": "ens-site-7",
        "site": site,
        "project": None,
        "queue": None,
        "nodes": 2,
        "minutes": 50,
        "job_mode": "mpi",
        "wf_filter": None,
        "slots_per_node": 1,
        "output": tmp_path / "out",
        "launch": Raw(shlex.join([sys.executable, str(launcher), "a 'b' \"c\""])),
        "path": "/usr/bin",
    }


def submit(slurm: Slurm, name: str, values, *flags: str) -> str:
    return slurm.batch(render(builtin()[name], values), *flags)


def test_directives_are_read_as_they_were_meant(slurm, values):
    job = submit(
        slurm,
        "slurm",
        values | {"project": 'it\'s#my "own"', "queue": "debug", "minutes": 90},
        "--hold",
    )
    expected = {
        "NumNodes": "2-2",
        "TimeLimit": "01:30:00",
        "Partition": "debug",
        "Requeue": "0",
        "OverSubscribe": "NO",
        "MinMemoryNode": "0",
    }
    assert {name: slurm.field(job, name) for name in expected} == expected
    # squeue, as scontrol's fields end at a space.
    assert slurm.run("squeue", "-h", "-j", job, "-o", "%a").strip() == 'it\'s#my "own"'


def test_without_project_and_queue_the_defaults_hold(slurm, values):
    job = submit(slurm, "slurm", values, "--hold")
    assert slurm.field(job, "Partition") == "debug"
    assert slurm.field(job, "Account") == "(null)"


def test_flags_override_the_template(slurm, values):
    job = submit(slurm, "slurm", values, "--hold", "--nodes=3", "--time=5")
    assert (slurm.field(job, "NumNodes"), slurm.field(job, "TimeLimit")) == ("3-3", "00:05:00")


def test_the_launcher_is_in_its_place_and_is_signalled(slurm, values):
    job = submit(slurm, "slurm", values)
    wait_for(lambda: "argument" in slurm.output(job), within_s=30)
    assert slurm.output(job) == f"cwd {values['site']} argument a 'b' \"c\"\n"
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    assert slurm.wait(job) == "COMPLETED"
    assert slurm.output(job).endswith("drained\n")


def test_a_queue_that_is_not_there_is_refused_in_words(slurm, values):
    with pytest.raises(AssertionError, match="invalid partition specified: night"):
        submit(slurm, "slurm", values | {"queue": "night"})


@pytest.mark.parametrize(
    "name", ["perlmutter-cpu", "perlmutter-gpu", "frontier", "lumi-c", "lumi-g"]
)
def test_slurm_understands_the_directives_for_known_machines(slurm, values, name):
    # Partitions, features and GPUs of the machine are not here: anything else would be an option it does not know.
    flags = ["--hold", "--partition=debug", "--constraint=", "--gpus-per-node=0"]
    job = submit(slurm, name, values | {"project": "proj", "queue": "q"}, *flags)
    assert (slurm.field(job, "TimeLimit"), slurm.field(job, "Account")) == ("00:50:00", "proj")
