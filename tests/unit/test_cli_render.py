from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, strategies as st

from ensemble.cli.add import _warn_of_gpus
from ensemble.core.model import JobMode, Launcher, NewTask, Output, Task, TaskDetail
from ensemble.core.states import State
from ensemble.render import document, tables, task as screen, text, waiting

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def make(**fields) -> Task:
    values = {
        "id": 1, "name": "t", "workflow": "", "app": None, "state": State.PREPROCESSED,
        "argv": ("true",), "workdir": "data/0/t_1", "num_nodes": 1, "ranks_per_node": 1,
        "node_packing_count": 1, "wall_time_minutes": 0, "time_limit_minutes": None, "priority": 0,
        "attempt": 0, "failures": 0, "timeouts": 0, "losses": 0, "pending_parents": 0,
        "lease_id": None, "exit_code": None, "cause": None, "reason": None, "error": None,
        "output": Output.FILE, "nodes": (), "created_at": NOW - timedelta(hours=2), "started_at": None, "ended_at": None,
        "tags": {},
    }  # fmt: skip
    return Task(**{**values, **fields})


@given(st.text())
def test_clean_text_is_one_printable_line(raw):
    assert text.clean(raw).isprintable()


def test_escapes_and_surrogates_are_written_out():
    assert text.clean("a\x1b[31m\n\u202e\udcff") == r"a\x1b[31m\n\u202e\udcff"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-1, "0.0s"),
        (0.44, "0.4s"),
        (42.9, "42s"),
        (252, "4m12s"),
        (7500, "2h05m"),
        (273600, "3d04h"),
    ],
)
def test_spans(seconds, shown):
    assert text.span(seconds) == shown


def test_ids_are_listed_when_few_and_ranges_when_many():
    assert text.list_ids([5, 3]) == ["5", "3"]
    assert text.list_ids([*range(3, 1003)]) == ["3-1002"]
    assert text.list_ids([1, *range(7, 30), 40]) == ["1", "7-29", "40"]


def test_a_table_shows_markup_as_text_and_no_escapes(capsys):
    tables.tasks([make(name="[bold]x\x1b[2J", workflow=":smile:")], NOW)
    out = capsys.readouterr().out
    assert r"[bold]x\x1b[2J" in out
    assert ":smile:" in out
    assert "\x1b" not in out


def test_outside_a_terminal_no_line_is_wrapped_and_no_cell_empty(capsys):
    tables.tasks([make(name="n" * 128, workflow="w" * 300)], NOW)
    header, row = capsys.readouterr().out.splitlines()
    assert len(row.split()) == len(header.split())


def test_on_a_terminal_columns_without_values_are_left_out(monkeypatch, capsys):
    from rich.console import Console

    terminal = Console(force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(tables, "_console", lambda: terminal)
    tables.tasks([make(state=State.FAILED, exit_code=3)], NOW)
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "id", "name", "state", "attempt", "nodes", "exit", "age",
    ]  # fmt: skip


def test_a_claimed_task_is_shown_as_claimed(capsys):
    tables.tasks([make(lease_id=4)], NOW)
    assert " claimed " in capsys.readouterr().out


def test_elapsed_is_the_last_run():
    start = NOW - timedelta(minutes=10)
    end = NOW - timedelta(minutes=4)
    assert document.elapsed_s(make(), NOW) is None
    assert document.elapsed_s(make(started_at=start, state=State.RUNNING), NOW) == 600
    assert document.elapsed_s(make(started_at=start, ended_at=end), NOW) == 360
    again = make(started_at=start, ended_at=end, state=State.RUNNING)
    assert document.elapsed_s(again, NOW) == 600


# ---------------------------------------------------------------------------- one task


def detail(task: Task, **spec) -> TaskDetail:
    return TaskDetail(task=task, spec=spec, parents=(), children=(), attempts=(), events=())


def launcher(mode: JobMode, nodes: int = 2, wf_filter: str | None = None) -> Launcher:
    return Launcher(
        id=1, lease_id=1, host="h", pid=1, job_mode=mode, wf_filter=wf_filter,
        nodes=tuple(f"n{i}" for i in range(nodes)), scheduler="slurm", scheduler_job_id="7", aside={},
        lease_state="ACTIVE", started_at=NOW, ended_at=None, last_seen_at=NOW, tasks=0,
    )  # fmt: skip


MPI, SERIAL = launcher(JobMode.MPI), launcher(JobMode.SERIAL)


@pytest.mark.parametrize(
    ("needs", "live", "most_gpus", "says"),
    [
        ({}, [MPI], 0, None),
        ({}, [SERIAL], None, None),
        ({}, [], None, "no launcher runs"),
        ({"workflow": "a"}, [launcher(JobMode.MPI, wf_filter="b")], None, "--wf-filter"),
        ({"workflow": "ab"}, [launcher(JobMode.MPI, wf_filter="b")], None, None),
        ({"ranks_per_node": 2}, [SERIAL], None, "1 node x 2 ranks: only mpi mode takes it"),
        ({"num_nodes": 2}, [SERIAL], None, "2 nodes x 1 rank: only mpi mode takes it"),
        ({"num_nodes": 2}, [SERIAL, MPI], None, None),
        ({"num_nodes": 3}, [MPI], None, "it needs 3 nodes and the largest launcher has 2"),
        ({"gpus": 5}, [SERIAL], 4, "it needs 5 GPUs per node"),
        ({"gpus": 4}, [SERIAL], 4, None),
        ({"gpus": 5}, [SERIAL], None, None),
        ({"gpus": 5}, [MPI], 4, None),  # it hands out whole nodes, whatever is in them
        ({"gpus": 3, "ranks_per_node": 2}, [], 4, "it needs 6 GPUs per node"),
    ],
)
def test_why_a_task_waits(needs, live, most_gpus, says):
    gpus = needs.pop("gpus", 0)
    reason = waiting.explain(detail(make(**needs), gpus_per_rank=gpus), live, most_gpus)
    assert (says in reason) if says else reason is None, reason


def test_more_gpus_than_launchers_told_of_are_warned_of():
    task = NewTask(command="x", gpus_per_rank=3, ranks_per_node=2)
    assert _warn_of_gpus(task, None) is None
    assert _warn_of_gpus(task, 6) is None
    assert "6 asked for" in _warn_of_gpus(task, 5)
    assert _warn_of_gpus(NewTask(command="x"), 0) is None


def test_what_a_task_takes_of_its_node_is_shown(capsys):
    found = detail(
        make(node_packing_count=1200, output=Output.TAIL),
        threads_per_rank=2, threads_per_core=1, gpus_per_rank=1, memory_mb=4096,
        wait_for_parents=True, params={},
    )  # fmt: skip
    screen.show(found, NOW, folder="/x", waits="for you")
    out = capsys.readouterr().out
    assert (
        "1 node x 1 rank, 2 threads per rank, 1 thread per core, 1 GPU per rank, 4,096 MiB of "
        "memory, 1,200 such tasks share a node\n"
    ) in out
    assert "the last 16 kB, when it has ended (ensemble log 1)" in out
    assert "waits      for you\n" in out
    assert "gpus_per_rank" not in out
