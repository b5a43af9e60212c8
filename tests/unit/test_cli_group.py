from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ensemble.__main__ import main
from ensemble.cli import HIDDEN, SECTIONS, group
from ensemble.cli.launch import launch_argv
from ensemble.errors import NotFoundError, StoreUnavailableError
from ensemble.service.options import LaunchOptions

HEAVY = ("asyncio", "asyncpg", "cryptography", "msgspec", "rich", "structlog", "uvloop")
ROOT = Path(__file__).parents[2]


def commands():
    return {name: summary for part in SECTIONS.values() for name, (_, summary) in part.items()}


def context() -> click.Context:
    return click.Context(group, info_name="ensemble")


@pytest.mark.parametrize("name", list(commands()))
def test_the_listed_summary_is_the_commands_own(name):
    command = group.get_command(context(), name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str(200).rstrip(".") == commands()[name].rstrip(".")


def leaves(command: click.Command):
    if isinstance(command, click.Group):
        for name in command.list_commands(context()):
            yield from leaves(command.get_command(context(), name))
    elif not command.hidden:
        yield command


@pytest.mark.parametrize("command", list(leaves(group)), ids=lambda command: command.name)
def test_every_command_has_an_example_and_every_option_a_help(command):
    assert command.epilog.startswith("\b\nExample")
    for param in command.params:
        assert not isinstance(param, click.Option) or param.help or param.name == "role"


def test_hidden_commands_are_there_and_not_shown():
    for name in HIDDEN:
        assert group.get_command(context(), name).hidden
        assert name not in group.list_commands(context())


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom ensemble.__main__ import main\nmain(['--help'])\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["lst"], "there is no command 'lst'; did you mean ls?"),
        (["frobnicate"], "there is no command 'frobnicate'"),
        (["ls", "--limit", "x"], "--limit"),
        (["show"], "Missing argument 'ID'"),
        (["show", "x"], "'x' is not the id of a task"),
        (["show", "9" * 25], "is not the id of a task"),
        (["add", "--param", "x"], "expected KEY=VALUE"),
        (["add", "--data", "[1]"], "expected a JSON object"),
        (["add", "--after", "x"], "selects no task"),
        (["add", "--from", "/nonexistent.csv"], "/nonexistent.csv"),
        (["launch", "--nodes", "0"], "--nodes"),
        (["launch", "--idle-timeout", "nan"], "expected a number, 0 or more"),
        (["launch", "--slots-per-node", "2"], "only tasks in serial mode share nodes"),
        (["add", "--output", "mail", "--", "true"], "'file', 'tail', 'none'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(argv, says, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (NotFoundError("no\x1b[2J such"), 3, "error: no\\x1b[2J such\n"),
        (ExceptionGroup("g", [ValueError(), StoreUnavailableError("gone")]), 4, "error: gone\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ZeroDivisionError("x\ny"),
            1,
            "error: ZeroDivisionError: x y (unexpected; ensemble --debug … shows where)\n",
        ),
    ],
)
def test_every_error_is_one_line(raised, status, line, monkeypatch, capsys):
    def fail(*_args, **_options):
        raise raised

    monkeypatch.setattr(group, "invoke", fail)
    assert main(["status"]) == status
    assert capsys.readouterr().err == line


def test_a_launch_is_asked_for_again_with_the_same_flags():
    options = LaunchOptions(
        wf_filter="--odd", time_limit_minutes=1.5, nodes=2, idle_timeout_s=0, is_persistent=True
    )
    argv = launch_argv("/site", options)
    assert argv[:5] == [sys.executable, "-P", "-m", "ensemble", "--site"]
    assert argv[5:] == [
        "/site", "launch", "--job-mode", "mpi", "--wf-filter=--odd", "--time-limit-minutes=1.5",
        "--nodes=2", "--idle-timeout=0", "--persistent",
    ]  # fmt: skip
