from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, strategies as st

from ensemble.core.model import Task
from ensemble.core.states import State
from ensemble.render import document, tables, text

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def make(**fields) -> Task:
    values = {
        "id": 1, "name": "t", "workflow": "", "app": None, "state": State.PREPROCESSED,
        "argv": ("true",), "workdir": "data/0/t_1", "num_nodes": 1, "ranks_per_node": 1,
        "node_packing_count": 1, "wall_time_minutes": 0, "time_limit_minutes": None, "priority": 0,
        "attempt": 0, "failures": 0, "timeouts": 0, "losses": 0, "pending_parents": 0,
        "lease_id": None, "exit_code": None, "cause": None, "reason": None, "error": None,
        "nodes": (), "created_at": NOW - timedelta(hours=2), "started_at": None, "ended_at": None,
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
