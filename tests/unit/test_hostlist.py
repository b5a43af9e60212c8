from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from ensemble.drivers import hostlist
from ensemble.errors import AllocationError

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "hostlist.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["accept"], ids=lambda case: case["input"])
def test_accepts_what_scontrol_accepts(case):
    assert hostlist.expand(case["input"]) == case["hosts"]


@pytest.mark.parametrize("text", GOLDEN["refuse"])
def test_refuses_what_scontrol_refuses(text):
    with pytest.raises(AllocationError) as caught:
        hostlist.expand(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", " ", ",", "n1,", ",n1", "a,,b", "n 1", "-n1", "n[1-2],", "[]", "n[[1]]", "n:1", "n1\nn2"],
)
def test_refuses_what_is_not_a_list(text):
    with pytest.raises(AllocationError):
        hostlist.expand(text)


def test_is_bounded():
    assert len(hostlist.expand("n[1-100000]")) == 100_000
    for text in (
        "n[0-100000]",
        "n[1-99999],m[1-2]",
        "n[1-1000]r[1-1000]",
        "n[1-" + "9" * 5000 + "]",
        "n" * 300,
    ):
        with pytest.raises(AllocationError):
            hostlist.expand(text)


def test_a_message_stays_short():
    with pytest.raises(AllocationError) as caught:
        hostlist.expand("n[1-2" * 10_000)
    assert len(str(caught.value)) < 250


def test_surrounding_white_space_is_ignored():
    assert hostlist.expand(" n[1-2]\n") == ["n1", "n2"]


def test_counts():
    assert hostlist.counts("64(x2),32") == [64, 64, 32]
    assert hostlist.counts("4") == [4]
    assert hostlist.counts("2(x3),1\n") == [2, 2, 2, 1]


@pytest.mark.parametrize(
    "text", ["", "x", "4,", "4(x2", "4(2)", "-1", "4(x999999)", "4(x60000),4(x60000)", "٤"]
)
def test_counts_refuses(text):
    with pytest.raises(AllocationError):
        hostlist.counts(text)


prefixes = st.from_regex(r"[a-z][a-z0-9-]{0,6}[a-z]", fullmatch=True)


@given(
    st.lists(
        st.tuples(prefixes, st.integers(0, 50), st.integers(0, 30), st.integers(1, 5)),
        min_size=1,
        max_size=6,
    )
)
def test_what_is_written_with_brackets_reads_as_the_same_hosts(groups):
    written, hosts = [], []
    for prefix, low, more, width in groups:
        written.append(f"{prefix}[{low:0{width}}-{low + more}]")
        hosts += [f"{prefix}{number:0{width}}" for number in range(low, low + more + 1)]
    assert hostlist.expand(",".join(written)) == hosts
    assert hostlist.expand(",".join(hosts)) == hosts


@given(st.text(alphabet="n1-9[],0a(x) \n²", max_size=40) | st.text(max_size=40))
def test_anything_else_is_an_allocation_error(text):
    for parse in (hostlist.expand, hostlist.counts):
        message = ""
        try:
            assert parse(text)
        except AllocationError as error:
            message = str(error)
        assert "\n" not in message


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(1, 20)), min_size=1, max_size=8))
def test_counts_round_trip(groups):
    text = ",".join(f"{n}(x{times})" if times > 1 else str(n) for n, times in groups)
    assert hostlist.counts(text) == [n for n, times in groups for _ in range(times)]
