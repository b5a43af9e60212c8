from __future__ import annotations

import calendar
import os
from pathlib import Path

import pytest

from ensemble.drivers import batch, nodes, walltime
from ensemble.drivers.nodes import find_allocation
from ensemble.errors import AllocationError

PBS = Path(__file__).parent.parent / "data" / "pbs"
NOW = 1_795_352_600.0
CORES = len(os.sched_getaffinity(0))
#: No scheduler's command is found there, so every question goes unanswered.
NO_COMMANDS = {"PATH": "/nonexistent"}


async def find(environ, *, virtual_nodes=None):
    return await find_allocation(NO_COMMANDS | environ, virtual_nodes=virtual_nodes, now=NOW)


def names(allocation):
    return [node.name for node in allocation.nodes]


def script(folder: Path, name: str, body: str) -> dict[str, str]:
    """Write a command that prints something, and return the environment in which it is found."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


# This machine


async def test_a_plain_machine_is_one_virtual_node():
    allocation = await find({"SLURMD_NODENAME": "here"})
    assert (allocation.scheduler, allocation.job_id, allocation.ends_at) == ("local", None, None)
    assert names(allocation) == ["here:0"]
    assert allocation.nodes[0].is_virtual
    assert allocation.nodes[0].cores == CORES
    assert allocation.head_is_compute


async def test_virtual_nodes_share_the_cores():
    allocation = await find({}, virtual_nodes=CORES + 1)
    assert len(allocation.nodes) == CORES + 1
    assert {node.cores for node in allocation.nodes} == {1}
    assert sum(node.cores for node in (await find({}, virtual_nodes=CORES)).nodes) == CORES
    assert all(node.is_virtual for node in allocation.nodes)


async def test_uneven_shares_lose_no_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    allocation = await find({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, virtual_nodes=3)
    assert [node.cores for node in allocation.nodes] == [3, 3, 2]
    assert [node.gpus for node in allocation.nodes] == [1, 1, 1]


@pytest.mark.parametrize("number", [0, -3])
async def test_refuses_no_nodes(number):
    with pytest.raises(AllocationError, match="--nodes 1 or more"):
        await find({}, virtual_nodes=number)


# A job of the local scheduler

LOCAL = {
    "ENSEMBLE_LOCAL_JOB_ID": "7",
    "ENSEMBLE_LOCAL_JOB_NODES": "3",
    "ENSEMBLE_LOCAL_JOB_END": "1795353519",
    "SLURMD_NODENAME": "here",
}


async def test_a_local_job():
    allocation = await find(LOCAL)
    assert (allocation.scheduler, allocation.job_id) == ("local", "7")
    assert names(allocation) == ["here:0", "here:1", "here:2"]
    assert all(node.is_virtual for node in allocation.nodes)
    assert allocation.ends_at == 1795353519
    assert allocation.head_is_compute


async def test_some_nodes_of_a_local_job_are_as_large_as_among_all(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    allocation = await find(LOCAL, virtual_nodes=2)
    assert [(node.name, node.cores) for node in allocation.nodes] == [("here:0", 3), ("here:1", 3)]
    with pytest.raises(AllocationError, match=r"--nodes 4, but local job 7 has 3"):
        await find(LOCAL, virtual_nodes=4)


@pytest.mark.parametrize("end", [None, "", "soon", "-1", "1e9", "99999999999", "1795353519\n1"])
async def test_a_local_job_without_an_end(end):
    environ = {name: value for name, value in LOCAL.items() if not name.endswith("END")}
    if end is not None:
        environ["ENSEMBLE_LOCAL_JOB_END"] = end
    assert (await find(environ)).ends_at is None


@pytest.mark.parametrize("number", ["", "0", "-1", "two", "1.5", "9999999", "٣"])
async def test_a_local_job_whose_nodes_cannot_be_told(number):
    with pytest.raises(AllocationError, match=r"ENSEMBLE_LOCAL_JOB_NODES is .* in local job 7"):
        await find(LOCAL | {"ENSEMBLE_LOCAL_JOB_NODES": number})


async def test_no_local_job_without_its_id():
    stale = {name: value for name, value in LOCAL.items() if not name.endswith("ID")}
    for environ in (stale, stale | {"ENSEMBLE_LOCAL_JOB_ID": ""}):
        allocation = await find(environ, virtual_nodes=2)
        assert (allocation.job_id, len(allocation.nodes), allocation.ends_at) == (None, 2, None)


async def test_another_scheduler_inside_a_local_job():
    allocation = await find(SLURM | LOCAL)
    assert (allocation.scheduler, allocation.job_id) == ("slurm", "123")


# Slurm

SLURM = {
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_NODELIST": "nid[001-003]",
    "SLURM_JOB_CPUS_PER_NODE": "64(x2),32",
    "SLURM_JOB_END_TIME": "1795353519",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURMD_NODENAME": "nid001",
}


async def test_slurm():
    allocation = await find(SLURM)
    assert (allocation.scheduler, allocation.job_id) == ("slurm", "123")
    assert names(allocation) == ["nid001", "nid002", "nid003"]
    assert [node.cores for node in allocation.nodes] == [64, 64, 32]
    assert {node.gpus for node in allocation.nodes} == {4}
    assert not any(node.is_virtual for node in allocation.nodes)
    assert allocation.ends_at == 1795353519
    assert allocation.restart_count == 2
    assert allocation.head_is_compute


async def test_slurm_first_nodes_only():
    assert names(await find(SLURM, virtual_nodes=2)) == ["nid001", "nid002"]
    with pytest.raises(AllocationError, match=r"--nodes 4, but slurm job 123 has 3"):
        await find(SLURM, virtual_nodes=4)


async def test_slurm_from_the_login_node():
    allocation = await find(SLURM | {"SLURMD_NODENAME": ""})
    assert not allocation.head_is_compute


async def test_slurm_without_counts():
    bare = {"SLURM_JOB_ID": "1", "SLURM_NODELIST": "a,b"}
    assert [node.cores for node in (await find(bare)).nodes] == [CORES, CORES]
    assert [node.cores for node in (await find(bare | {"SLURM_CPUS_ON_NODE": "9"})).nodes] == [9, 9]
    short = bare | {"SLURM_JOB_CPUS_PER_NODE": "4", "SLURM_CPUS_ON_NODE": "9"}
    assert [node.cores for node in (await find(short)).nodes] == [9, 9]


async def test_slurm_asks_squeue_for_the_end(tmp_path):
    environ = {**SLURM, "SLURM_JOB_END_TIME": "", "SQUEUE_FORMAT": "%j"}
    body = '[ -z "$SQUEUE_FORMAT" ] && [ "$SLURM_TIME_FORMAT" = %s ] && [ "$LC_ALL" = C ] && echo "1795353519|14:59"'
    allocation = await find(environ | script(tmp_path, "squeue", body))
    assert allocation.ends_at == 1795353519


@pytest.mark.parametrize("body", ["echo boom >&2; exit 1", "echo garbage", "true", "kill -9 $$"])
async def test_a_failing_squeue_leaves_the_end_unknown(tmp_path, body):
    environ = SLURM | {"SLURM_JOB_END_TIME": ""}
    assert (await find(environ | script(tmp_path, "squeue", body))).ends_at is None
    assert (await find(environ)).ends_at is None


async def test_a_hanging_squeue_leaves_the_end_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "ANSWER_TIMEOUT_S", 0.1)
    environ = SLURM | {"SLURM_JOB_END_TIME": ""} | script(tmp_path, "squeue", "exec sleep 60")
    assert (await find(environ)).ends_at is None


async def test_slurm_without_a_node_list():
    with pytest.raises(AllocationError, match="SLURM_JOB_NODELIST is not set"):
        await find({"SLURM_JOB_ID": "1"})


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("1795353519|14:59\n", 1795353519),
        ("N/A|14:59\n", NOW + 899),
        ("N/A|1-00:00:01\n", NOW + 86_401),
        ("NONE|UNLIMITED\n", None),
        ("4294967295|UNLIMITED", None),
        ("2026-11-22T13:02:21|INVALID", None),
        ("", None),
    ],
)
def test_parse_squeue(text, end):
    assert walltime.parse_squeue(text, NOW) == end


# PBS


def pbs_environ():
    lines = (PBS / "job-env.txt").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines) | {"PBS_NODEFILE": str(PBS / "nodefile.txt")}


async def test_pbs_as_recorded(tmp_path):
    body = f'[ "$TZ" = UTC ] && [ "$4" = 3.pbshead ] && cat {PBS / "qstat-running.json"}'
    environ = pbs_environ() | script(tmp_path, "qstat", body)
    allocation = await find(environ)
    assert (allocation.scheduler, allocation.job_id) == ("pbs", "3.pbshead")
    assert names(allocation) == ["pbshead"]
    assert allocation.ends_at == calendar.timegm((2026, 11, 22, 13, 7, 21))
    assert not allocation.head_is_compute


async def test_pbs_with_a_line_for_each_process(tmp_path):
    file = tmp_path / "nodes"
    file.write_text("x1\nx1\nx2\nx2\nx1\n")
    environ = pbs_environ() | {"PBS_NODEFILE": str(file), "SLURMD_NODENAME": "X1.example.org"}
    allocation = await find(environ)
    assert names(allocation) == ["x1", "x2"]
    assert {node.cores for node in allocation.nodes} == {CORES}
    assert allocation.head_is_compute
    assert allocation.ends_at is None


@pytest.mark.parametrize("content", ["", "\n\n"])
async def test_pbs_with_an_empty_node_file(tmp_path, content):
    file = tmp_path / "nodes"
    file.write_text(content)
    with pytest.raises(AllocationError, match=r"\$PBS_NODEFILE .* is empty"):
        await find(pbs_environ() | {"PBS_NODEFILE": str(file)})


async def test_pbs_without_a_node_file(tmp_path):
    with pytest.raises(AllocationError, match="cannot read"):
        await find(pbs_environ() | {"PBS_NODEFILE": str(tmp_path / "gone")})
    with pytest.raises(AllocationError, match="PBS_NODEFILE is not set"):
        await find({"PBS_JOBID": "1.s"})


def test_parse_qstat():
    text = (PBS / "qstat-running.json").read_text()
    assert walltime.parse_qstat(text) == calendar.timegm((2026, 11, 22, 13, 7, 21))
    invalid = text.replace('"PBS_O_LANG":\t"C.UTF-8"', '"BAD":\t"a "quote" and \\q"')
    assert invalid != text
    assert walltime.parse_qstat(invalid) == walltime.parse_qstat(text)
    for broken in ("", "{}", (PBS / "qstat-server-down.txt").read_text()):
        assert walltime.parse_qstat(broken) is None
    assert (
        walltime.parse_qstat(text.replace("Nov 22 13:02:21 2026", "Nov 99 13:02:21 2026")) is None
    )


# Cobalt


async def test_cobalt():
    environ = {
        "COBALT_JOBID": "77",
        "COBALT_PARTNAME": "1001-1003,1030",
        "COBALT_ENDTIME": "1795353519.5",
    }
    allocation = await find(environ)
    assert (allocation.scheduler, allocation.job_id) == ("cobalt", "77")
    assert names(allocation) == ["nid01001", "nid01002", "nid01003", "nid01030"]
    assert allocation.ends_at == 1795353519.5
    assert not allocation.head_is_compute


@pytest.mark.parametrize("content", ["n1,n2", "n1\nn2\n"])
async def test_cobalt_node_file(tmp_path, content):
    file = tmp_path / "nodes"
    file.write_text(content)
    environ = {"COBALT_JOBID": "77", "COBALT_NODEFILE": str(file), "COBALT_PARTNAME": "5"}
    assert names(await find(environ)) == ["n1", "n2"]


# LSF


async def test_lsf_leaves_the_launch_node_out(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("batch3\n" + "a1\n" * 42 + "a2\n" * 42)
    environ = {"LSB_JOBID": "930", "LSB_JOBINDEX": "0", "LSB_DJOB_HOSTFILE": str(file)}
    allocation = await find(environ | script(tmp_path, "bjobs", 'echo "0:59 L"'))
    assert (allocation.scheduler, allocation.job_id) == ("lsf", "930")
    assert names(allocation) == ["a1", "a2"]
    assert allocation.ends_at == NOW + 59 * 60


async def test_lsf_array_and_counts():
    environ = {"LSB_JOBID": "930", "LSB_JOBINDEX": "4", "LSB_MCPU_HOSTS": "front 1 a1 4 a2 8"}
    allocation = await find(environ)
    assert allocation.job_id == "930[4]"
    assert names(allocation) == ["a1", "a2"]


@pytest.mark.parametrize(
    ("hosts", "kept"),
    [("a1", ["a1"]), ("a1 a2", ["a1", "a2"]), ("batch1", ["batch1"]), ("login1 b b", ["b"])],
)
async def test_lsf_keeps_what_it_has(hosts, kept):
    assert names(await find({"LSB_JOBID": "1", "LSB_HOSTS": hosts})) == kept


async def test_lsf_malformed_counts():
    with pytest.raises(AllocationError, match="LSB_MCPU_HOSTS"):
        await find({"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "a 1 b"})


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("0:59 L\n", NOW + 3540),
        ("26:05 L", NOW + 93_900),
        ("120 second(s)", NOW + 120),
        ("-\n", None),
        ("", None),
    ],
)
def test_parse_bjobs(text, end):
    assert walltime.parse_bjobs(text, NOW) == end


# Grid Engine


async def test_sge(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("c1.local 4 all.q@c1 UNDEFINED\nc2.local 4 all.q@c2 UNDEFINED\n\n")
    environ = {
        "JOB_ID": "9",
        "SGE_TASK_ID": "undefined",
        "PE_HOSTFILE": str(file),
        "RESTARTED": "1",
        "SLURMD_NODENAME": "c1",
    }
    allocation = await find(environ)
    assert (allocation.scheduler, allocation.job_id, allocation.ends_at) == ("sge", "9", None)
    assert names(allocation) == ["c1.local", "c2.local"]
    assert allocation.head_is_compute
    assert allocation.restart_count == 1
    assert (await find(environ | {"SGE_TASK_ID": "3"})).job_id == "9.3"


async def test_sge_without_a_parallel_environment():
    environ = {"JOB_ID": "9", "SGE_TASK_ID": "undefined", "SLURMD_NODENAME": "c7"}
    assert names(await find(environ)) == ["c7"]


# Flux


async def test_flux_instance(tmp_path):
    body = 'case "$1" in getattr) echo "f[1-2]" ;; job) echo 3600 ;; esac'
    environ = {"FLUX_ENCLOSING_ID": "ƒM7", "FLUX_URI": "local:///x", "SLURM_JOB_ID": "1"}
    allocation = await find(environ | script(tmp_path, "flux", body))
    assert (allocation.scheduler, allocation.job_id) == ("flux", "ƒM7")
    assert names(allocation) == ["f1", "f2"]
    assert allocation.ends_at == NOW + 3600


async def test_flux_job_that_is_no_instance(tmp_path):
    body = 'case "$1" in jobs) echo "f[3-4]" ;; job) echo 4294967295 ;; esac'
    allocation = await find({"FLUX_JOB_ID": "123"} | script(tmp_path, "flux", body))
    assert names(allocation) == ["f3", "f4"]
    assert allocation.ends_at is None


async def test_flux_that_does_not_answer():
    with pytest.raises(AllocationError, match="flux job 123"):
        await find({"FLUX_JOB_ID": "123"})


def test_a_flux_address_alone_is_no_job():
    assert nodes.find_scheduler({"FLUX_URI": "local:///run/flux/local"}) == "local"
    assert nodes.find_scheduler({"JOB_ID": "5"}) == "local"


# Parts


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({}, 0),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb,GPU-cc"}, 3),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3"}, 4),
        ({"ZE_AFFINITY_MASK": "0.0,0.1"}, 2),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0"}, 8),
    ],
)
def test_count_gpus(environ, gpus):
    assert nodes.count_gpus(environ) == gpus


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30),
        ("02:03", 123),
        ("01:30:00", 5400),
        ("1-02:03:04", 93_784),
        ("2-12", 216_000),
        ("2-12:30", 217_800),
        ("", None),
        ("UNLIMITED", None),
        ("1:2:3:4", None),
    ],
)
def test_parse_duration(text, seconds):
    assert walltime.parse_duration(text) == seconds


def test_node_name():
    assert nodes.node_name({"SLURMD_NODENAME": "nid1"}) == "nid1"
    assert "." not in nodes.node_name({})
