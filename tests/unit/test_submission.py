from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings, strategies as st

from ensemble.core import submission
from ensemble.core.model import App, Changes, NewApp, NewTask, Output
from ensemble.errors import UsageError

APP = App(
    id=3,
    name="dock",
    command="vina --config '{conf}.txt'",
    description="",
    environ={"A": "app", "B": "app"},
    env_script="/env.sh",
    created_at=datetime(2030, 1, 1, tzinfo=UTC),
)
ANY_TEXT = st.text(st.characters(), max_size=20)
NASTY = st.text(st.characters(exclude_categories=()), max_size=300)


def resolve(**fields):
    return submission.resolve(NewTask(**fields), {"dock": APP})


def refusal(**fields):
    with pytest.raises(UsageError) as caught:
        resolve(**fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ command lines


def test_an_app_is_split_filled_and_appended_to():
    found = resolve(app="dock", params={"conf": "a b"}, args=["-v", "{x}"], environ={"B": "task"})
    assert found.argv == ("vina", "--config", "a b.txt", "-v", "{x}")
    assert found.environ == {"A": "app", "B": "task"}
    assert (found.name, found.app_id, found.env_script) == ("dock", 3, "/env.sh")


def test_a_list_is_taken_as_it_is():
    assert resolve(command=["echo", "{x} y", ""]).argv == ("echo", "{x} y", "")


@pytest.mark.parametrize(
    ("word", "filled"),
    [("{x}", "1"), ("{{x}}", "{x}"), ("{{{x}}}", "{1}"), ("a{x}{x}", "a11"), ("{}", "{}"),
     ("{1}", "{1}"), ("${x}", "$1"), ("{ x }", "{ x }")],
)  # fmt: skip
def test_placeholders(word, filled):
    assert submission.fill(word, {"x": "1"}) == filled


def test_a_value_is_not_filled_again():
    assert submission.fill("{x}", {"x": "{y}}}"}) == "{y}}}"


def test_a_missing_value_is_named():
    assert "{conf}" in refusal(app="dock")


@settings(deadline=None)
@given(value=ANY_TEXT)
def test_a_filled_word_is_never_split(value):
    words = [
        submission.fill(word, {"x": value})
        for word in submission.split_command("a {x} b", what="c")
    ]
    assert words == ["a", value, "b"]


@pytest.mark.parametrize("command", ["", "  ", [], [""], "a 'b"])
def test_a_command_that_is_none_is_refused(command):
    assert "command" in refusal(command=command)


def test_an_app_or_a_command_but_one():
    assert "one of the two" in refusal()
    assert "one of the two" in refusal(app="dock", command="x")
    assert "no app 'duck'" in refusal(app="duck")


# ------------------------------------------------------------------ names and text


@pytest.mark.parametrize(
    "name", ["a/b", "/", ".", "..", "x" * 300, "a\nb", "\x1b[2J", "\x9b2J", "é" * 120, "\ud800"]
)
def test_names_that_cannot_be_a_directory_are_refused(name):
    assert "name" in refusal(command="x", name=name)


@pytest.mark.parametrize("name", ["a b", "Größe-1.5", "数" * 60, "x" * 128])
def test_names_in_any_script_are_accepted(name):
    assert resolve(command="x", name=name).name == name


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("/usr/bin/env", "env"),
        ("./a b!", "a_b_"),
        ("x/", "task"),
        ("..", "task"),
        ("𠀀" * 99, "𠀀" * 48),
    ],
)
def test_a_task_is_named_after_its_program(program, name):
    assert resolve(command=[program]).name == name


@pytest.mark.parametrize(
    "fields",
    [
        {"args": ["a\0"]},
        {"args": ["\udcff"]},
        {"environ": {"A": "\0"}},
        {"environ": {"A": "\udcff"}},
        {"environ": {"": "x"}},
        {"environ": {"A=B": "x"}},
        {"tags": {"k": "\0"}},
        {"params": {"k\0": "v"}},
        {"data": {"a": [{"b": "\0"}]}},
        {"mpi_flags": ["\0"]},
        {"workflow": "a\tb"},
        {"workflow": "w" * 501},
    ],
)
def test_text_that_cannot_be_passed_on_is_refused(fields):
    refusal(command="x", **fields)


def test_a_field_of_the_wrong_type_is_named():
    assert "args[0]" in refusal(command="x", args=[4])
    assert "num_nodes" in refusal(command="x", num_nodes="4")
    refusal(command="x", data={"a": object()})


# ------------------------------------------------------------------ numbers and later features


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_nodes", 0), ("num_nodes", 2**31), ("ranks_per_node", 0), ("node_packing_count", 0),
     ("node_packing_count", 1_000_001), ("threads_per_rank", 0), ("threads_per_core", 0),
     ("wall_time_minutes", -1), ("max_retries", -1), ("gpus_per_rank", -1), ("memory_mb", 0),
     ("priority", 2**31), ("time_limit_minutes", 0.0), ("time_limit_minutes", float("nan")),
     ("time_limit_minutes", 1e9), ("parents", [0]), ("parents", [2**63])],
)  # fmt: skip
def test_numbers_out_of_bounds_are_refused_by_name(field, value):
    assert field in refusal(command="x", **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("input_files", ["a"]), ("stage_in_url", "u"), ("stage_out_url", "u"),
     ("stage_out_files", ["a"]), ("post_error_handler", True), ("post_timeout_handler", True)],
)  # fmt: skip
def test_stages_are_refused_in_so_many_words(field, value):
    assert f"{field}: staging and handlers are not supported" in refusal(
        command="x", **{field: value}
    )


def test_more_nodes_than_any_machine_has_is_a_warning():
    assert submission.warnings(NewTask(num_nodes=158_976)) == []
    assert len(submission.warnings(NewTask(num_nodes=158_977))) == 1


def test_changes_are_checked_like_tasks():
    submission.check_changes(Changes(num_nodes=2, workflow="w"))
    for changes in (
        Changes(num_nodes=0),
        Changes(time_limit_minutes=-1),
        Changes(workflow="\n"),
        Changes(tags={"a": "\0"}),
    ):
        with pytest.raises(UsageError):
            submission.check_changes(changes)


@pytest.mark.parametrize(
    "fields",
    [{"name": "a/b"}, {"command": ""}, {"command": "a\0"}, {"description": "\0"}, {"env_script": "\0"},
     {"preprocess": "x"}, {"postprocess": "x"}, {"environ": {"=": ""}}, {"output": "x"}],
)  # fmt: skip
def test_apps_are_checked(fields):
    submission.check_app(NewApp(name="a", command="x"))
    with pytest.raises(UsageError):
        submission.check_app(NewApp(**{"name": "a", "command": "x", **fields}))


@settings(deadline=None)
@given(
    st.builds(
        NewTask,
        command=NASTY | st.lists(NASTY, max_size=3),
        args=st.lists(NASTY, max_size=3),
        params=st.dictionaries(NASTY, NASTY, max_size=3),
        name=NASTY,
        workflow=NASTY,
        num_nodes=st.integers(),
        priority=st.integers(),
        time_limit_minutes=st.none() | st.floats(),
        environ=st.dictionaries(NASTY, NASTY, max_size=3),
        data=st.dictionaries(NASTY, st.recursive(NASTY, st.lists, max_leaves=3), max_size=2),
    )
)
def test_a_task_is_resolved_or_refused_with_a_usage_error(new):
    try:
        found = submission.resolve(new, {})
    except UsageError:
        return
    assert len(f"{found.name}_{2**63}.out.99".encode()) <= 255
    "".join(found.argv).encode()


# ------------------------------------------------------------------ parents


def ordered(*tasks):
    new = [NewTask(command="x", name=name, parents=parents) for name, parents in tasks]
    return submission.order(new, names=[task.name for task in new])


def test_parents_come_first():
    order = ordered(("c", ["b"]), ("b", ["a", 12]), ("a", []))
    assert order == [2, 1, 0]


def test_without_named_parents_the_order_is_as_given():
    assert ordered(("b", [3]), ("a", [])) == [0, 1]


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([("a", ["z"])], "'z': no task"),
        ([("a", []), ("a", []), ("b", ["a"])], "'a': 2 tasks"),
        ([("a", ["a"])], "circle: a -> a"),
        ([("a", ["b"]), ("b", ["a"])], "circle"),
    ],
)
def test_parents_that_cannot_be_are_refused(tasks, words):
    with pytest.raises(UsageError, match=words):
        ordered(*tasks)


def test_a_long_chain_is_ordered_in_no_time():
    count = 30_000
    assert ordered(*((f"t{i}", [f"t{i - 1}"] if i else []) for i in range(count))) == list(
        range(count)
    )


def test_siblings_are_the_named_parents():
    task = NewTask(command="x", parents=["b", 7, "a"])
    assert submission.siblings(task, ["a", "b"]) == [1, 0]


def test_work_directories_are_a_thousand_to_a_directory_or_flat():
    assert submission.workdir(41_007, "dock") == "data/41/dock_41007"
    assert submission.workdir(41_007, "dock", "flat") == "data/dock_41007"


# ------------------------------------------------------------------ output


def test_the_output_is_the_tasks_or_the_apps_or_a_file():
    tail = {"dock": replace(APP, output=Output.TAIL)}
    task = NewTask(app="dock", params={"conf": "x"})
    assert submission.resolve(task, {"dock": APP}).output is Output.FILE
    assert submission.resolve(task, tail).output is Output.TAIL
    assert resolve(command="x").output is Output.FILE
    assert resolve(command="x", output="none").output is Output.NONE
    assert "output" in refusal(command="x", output="nowhere")
