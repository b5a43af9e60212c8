from __future__ import annotations

import json
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, strategies as st

from ensemble.cli.records import build, choose_format, read
from ensemble.core.model import NewTask, Output
from ensemble.errors import UsageError


def tasks(data: str | bytes, form="csv", **defaults):
    raw = data.encode() if isinstance(data, str) else data
    return [record.task for record in read(raw, form, defaults)]


def refusal(data: str | bytes, form="csv", **defaults) -> str:
    with pytest.raises(UsageError) as caught:
        tasks(data, form, **defaults)
    return str(caught.value)


def test_columns_that_are_fields_are_fields_and_the_others_params():
    (task,) = tasks("num_nodes,t,workflow\n2,0.5,sweep\n", app="ising")
    assert task == NewTask(app="ising", num_nodes=2, workflow="sweep", params={"t": "0.5"})


def test_an_empty_cell_is_the_default():
    first, second = tasks("num_nodes,t,u\n,,1\n3,1,\n", app="x", num_nodes=2, params={"t": "9"})
    assert (first.num_nodes, first.params) == (2, {"t": "9", "u": "1"})
    assert (second.num_nodes, second.params) == (3, {"t": "1"})


def test_rows_without_any_value_are_no_tasks():
    assert len(tasks("t,u\n\n1,2\n,\n  ,\n", app="x")) == 1


def test_lists_are_words_or_json_and_mappings_json():
    text = (
        "args,parents,tags,data,auto_timeout_retry\n"
        '"a \'b c\' ""d""",3 prep,"{""k"": 1}","{""x"": [1]}",false\n'
        '"[""a b"", ""--c""]","[4]",,,true\n'
    )
    first, second = tasks(text, app="x")
    assert first.args == ["a", "b c", "d"]
    assert first.parents == [3, "prep"]
    assert (first.tags, first.data, first.auto_timeout_retry) == ({"k": "1"}, {"x": [1]}, False)
    assert (second.args, second.parents, second.auto_timeout_retry) == (["a b", "--c"], [4], True)


def test_a_rows_app_replaces_the_defaults_command_and_the_other_way_round():
    assert tasks("app\nother\n", command=["true"])[0].command is None
    assert tasks("command\necho hi\n", app="x")[0].app is None


def test_mappings_of_a_row_are_added_to_the_defaults():
    (task,) = tasks('{"tags": {"b": 2}}', "jsonl", app="x", tags={"a": "1", "b": "1"})
    assert task.tags == {"a": "1", "b": "2"}


def test_json_lines_keep_hostile_arguments():
    words = ["", " ", '"', "'", "\n", "ü", "--x", "$(rm)", "\u202e"]
    line = msgspec.json.encode({"command": ["echo", *words]})
    assert tasks(b"\n" + line + b"\r\n\n", "jsonl")[0].command == ["echo", *words]


def test_json_numbers_become_text_in_params():
    (task,) = tasks('{"app": "x", "params": {"a": 1, "b": 0.5, "c": true, "d": "e"}}', "jsonl")
    assert task.params == {"a": "1", "b": "0.5", "c": "true", "d": "e"}


def test_a_byte_order_mark_is_not_part_of_the_first_column():
    assert tasks(b"\xef\xbb\xbfnum_nodes\n2\n", app="x")[0].num_nodes == 2


def test_the_line_is_where_a_record_begins():
    text = 't,u\n"two\nlines",1\n3\n'
    assert [record.line for record in read(text.encode()[:-2], "csv", {"app": "x"})] == [2]
    assert refusal(text, app="x").startswith("line 4: 1 cells")


@pytest.mark.parametrize(
    ("text", "begin"),
    [
        ("num_nodes\n1\nmany\n", "line 3: num_nodes is 'many': expected int"),
        ("num_nodes,t\n1\n", "line 2: 1 cells, but the header names 2"),
        ("t,t\n1,2\n", "line 1: the header names column 't' twice"),
        ("t,\n1,2\n", "line 1: column 2 of the header has no name"),
        ('t\n1\n"open\n', "line 3: not CSV"),
        ("args\n'open\n", 'line 2: args is "\'open": no closing quotation'),
        ("tags\n{\n", "line 2: tags is '{'"),
        (b"t\nok\n\xff\n", "line 3: not UTF-8"),
        ("t\na\0b\n", "line 2: a NUL character"),
    ],
)
def test_a_malformed_csv_line_is_named(text, begin):
    assert refusal(text, app="x").startswith(begin)


@pytest.mark.parametrize(
    ("text", "begin"),
    [
        ('{"app": "x"}\n{"app"\n', "line 2: not JSON"),
        ("[1]\n", "line 1: expected a JSON object"),
        ('{"app": "x", "num_node": 1}', "line 1: unknown field 'num_node'; did you mean num_nodes"),
        ('{"app": "x", "num_nodes": "1"}', "line 1: num_nodes: expected int, got str"),
        ('{"app": "x", "params": 3}', "line 1: params: expected object, got int"),
        ('{"app": "x", "parents": [-1]}', "line 1: parent -1 is not"),
        ('{"app": "x", "parents": [99999999999999999999]}', "line 1: parent"),
        ('{"app": "x", "data": {"a": "\\u0000"}}', "line 1: a NUL character"),
        ("\n" * 3 + "[" * 100_000, "line 4: not JSON"),
    ],
)
def test_a_malformed_json_line_is_named(text, begin):
    assert refusal(text, "jsonl").startswith(begin)


def test_a_backslash_before_u0000_is_not_a_nul():
    assert build({"command": ["\\u0000"]}).command == ["\\u0000"]


def test_output_is_a_column_and_a_field():
    found = tasks("output\nnone\ntail\nfile\n \n", command="x")
    assert [task.output for task in found] == [Output.NONE, Output.TAIL, Output.FILE]
    (task,) = tasks('{"command": "x", "output": "tail"}', "jsonl", output="none")
    assert task.output is Output.TAIL
    assert refusal("output\nTail\n", command="x").startswith("line 2: output is 'Tail': ")
    assert refusal('{"output": "mail"}', "jsonl", command="x").endswith("; use file, tail, none")


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(UsageError, match="not valid Unicode"):
        build({"command": ["\udcff"]})


def test_the_format_is_told_by_name_then_by_the_first_character():
    assert choose_format("a.CSV", b"{") == "csv"
    assert choose_format("a.jsonl", b"x") == "jsonl"
    assert choose_format("", b' \n{"app"') == "jsonl"
    assert choose_format("list.txt", b"name\n") == "csv"


#: Texts that are nearly right find more than noise does.
near_csv = st.text(st.sampled_from("a,\"\n\r\\'[{1 \0é") | st.characters(), max_size=60)
cells = st.sampled_from([*NewTask.__struct_fields__, "t", "1", "[", "{}", '"', "x y", "null", "-1"])
near_table = st.lists(st.lists(cells, min_size=1, max_size=4), max_size=5).map(
    lambda rows: "\n".join(",".join(row) for row in rows)
)


@given(near_csv | near_table)
def test_csv_never_fails_with_anything_but_a_usage_error(text):
    with suppress(UsageError):
        tasks(text.encode("utf-8", "surrogatepass"), app="x")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
fields = st.dictionaries(st.sampled_from(NewTask.__struct_fields__), values, max_size=4)


def _json(value) -> bytes:
    return json.dumps(value).encode()


@given(fields.map(_json) | st.binary(max_size=40))
def test_json_never_fails_with_anything_but_a_usage_error(data):
    with suppress(UsageError):
        tasks(data, "jsonl", params={"a": "b"}, tags={"c": "d"})
