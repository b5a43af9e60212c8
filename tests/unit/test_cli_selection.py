from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from ensemble.cli.selection import Declined, Selection, chosen, confirm, read
from ensemble.core.model import Selector
from ensemble.core.states import State
from ensemble.errors import UsageError


def select(*words: str) -> tuple[int, Selection | str]:
    seen = []

    @click.command()
    @chosen
    def command(selection):
        seen.append(selection)

    result = CliRunner().invoke(command, words)
    return result.exit_code, seen[0] if seen else result.output


def test_ids_and_ranges_are_taken_together_once_and_in_order():
    found = read(["12", "3-5", "4"])
    assert found.selector == Selector(ids=(12, 3, 4, 5))
    assert found.named == (12, 4)


@pytest.mark.parametrize("word", ["", "x", "-1", "5-3", "1-", "1-2-3", "²", "1.5", "9" * 30])
def test_what_is_no_id_is_refused(word):
    with pytest.raises(UsageError, match="selects no task"):
        read([word])


def test_filters_become_a_selector():
    status, found = select(
        "--workflow", "w", "--state", "failed", "--state", "RUNNING", "--name", "n",
        "--app", "a", "--tag", "k=v=w",
    )  # fmt: skip
    assert status == 0
    assert found == Selection(
        selector=Selector(
            workflow="w",
            states=(State.FAILED, State.RUNNING),
            name="n",
            app="a",
            tags={"k": "v=w"},
        )
    )


def test_all_selects_everything_and_stands_alone():
    assert select("--all") == (0, Selection(selector=Selector()))
    assert select("--all", "3")[0] == 2


def test_nothing_said_is_not_everything():
    status, text = select()
    assert status == 2
    assert "say which tasks" in text


@pytest.mark.parametrize("words", [("--state", "BROKEN"), ("--tag", "x"), ("--tag", "=x")])
def test_wrong_filters_are_usage_errors(words):
    assert select(*words)[0] == 2


def test_few_are_not_asked_about():
    assert not confirm("kill", 10, yes=False)
    assert not confirm("kill", 11, yes=True)


def test_nobody_to_ask_is_an_error_that_names_the_option(monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(UsageError, match="kill 11 tasks: repeat it with --yes"):
        confirm("kill", 11, yes=False)


def test_no_means_no(monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda *_args, **_options: False)
    with pytest.raises(Declined):
        confirm("kill", 11, yes=False)
