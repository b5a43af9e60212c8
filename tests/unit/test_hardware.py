from __future__ import annotations

import os

import pytest
from hypothesis import given, strategies as st

from ensemble.drivers import hardware
from ensemble.drivers.hardware import find_gpus, group_cores, node_name, parse_devices


def test_hardware_threads_are_grouped_by_core():
    siblings = {0: (0, 4), 1: (1, 5), 2: (2, 6), 3: (3, 7)}
    found = group_cores(range(8), lambda cpu: siblings[cpu % 4])
    assert found == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_only_threads_that_may_be_used_are_grouped():
    assert group_cores({6, 2, 1}, lambda cpu: (cpu % 4, cpu % 4 + 4)) == [[1], [2, 6]]


def test_a_thread_whose_siblings_are_unknown_is_a_core():
    assert group_cores({3, 1}, lambda _: ()) == [[1], [3]]


@given(cpus=st.sets(st.integers(0, 40)), apart=st.integers(1, 40))
def test_every_thread_is_in_one_core(cpus, apart):
    found = group_cores(cpus, lambda cpu: (cpu % apart, cpu % apart + apart))
    assert sorted(cpu for core in found for cpu in core) == sorted(cpus)
    assert all(core and core == sorted(core) for core in found)
    assert [core[0] for core in found] == sorted(core[0] for core in found)


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("", []),
        ("0", ["0"]),
        ("2,3", ["2", "3"]),
        (" 2 , 3 ", ["2", "3"]),
        ("GPU-8a56,MIG-GPU-7/1/0", ["GPU-8a56", "MIG-GPU-7/1/0"]),
        ("0.0,0.1", ["0.0", "0.1"]),
        ("-1", []),
        ("0,-1,1", ["0"]),
        ("NoDevFiles", []),
        ("none", []),
        ("void", []),
        ("0,", ["0"]),
    ],
)
def test_names_of_devices(text, devices):
    assert list(parse_devices(text)) == devices


@pytest.fixture
def without_devices(monkeypatch):
    monkeypatch.setattr(hardware, "_nvidia_devices", list)


@pytest.mark.usefixtures("without_devices")
@pytest.mark.parametrize(
    ("environ", "devices"),
    [
        ({}, []),
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, ["4", "5"]),
        ({"ROCR_VISIBLE_DEVICES": "1"}, ["1"]),
        ({"ZE_AFFINITY_MASK": "0.0,0.1"}, ["0.0", "0.1"]),
        ({"CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": "1"}, ["1"]),
        ({"CUDA_VISIBLE_DEVICES": "3", "SLURM_GPUS_ON_NODE": "8"}, ["3"]),
        ({"SLURM_GPUS_ON_NODE": "2"}, ["0", "1"]),
        ({"SLURM_GPUS_ON_NODE": "0"}, []),
        ({"SLURM_GPUS_ON_NODE": "a100:2"}, []),
        ({"SLURM_GPUS_ON_NODE": "²"}, []),
        ({"SLURM_GPUS_ON_NODE": "999999999"}, []),
    ],
)
def test_the_devices_that_are_visible_here(environ, devices):
    assert find_gpus(environ) == devices


def test_where_nothing_is_said_the_devices_of_the_node_are_counted(monkeypatch):
    monkeypatch.setattr(hardware, "_nvidia_devices", lambda: ["0000:3b:00.0", "0000:86:00.0"])
    assert find_gpus({}) == ["0", "1"]
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "7"}) == ["7"]


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_devices_that_are_hidden_from_the_job_stay_hidden(monkeypatch, hidden):
    monkeypatch.setattr(hardware, "_nvidia_devices", lambda: ["0000:3b:00.0"])
    assert find_gpus({"CUDA_VISIBLE_DEVICES": hidden}) == []


def test_this_node():
    found = hardware.look({})
    assert {cpu for core in found.cores for cpu in core} == os.sched_getaffinity(0)
    assert found.memory_mb is None or found.memory_mb > 0


def test_the_name_of_this_node_is_the_schedulers():
    assert node_name({"SLURMD_NODENAME": "nid001"}) == "nid001"
    assert "." not in node_name({})
    assert node_name({"SLURMD_NODENAME": ""}) == node_name({})
