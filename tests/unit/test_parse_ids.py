from __future__ import annotations

import pytest

from ensemble.api import parse_ids
from ensemble.errors import UsageError


@pytest.mark.parametrize(
    ("text", "ids"), [("12", [12]), ("3-5", [3, 4, 5]), ("7-7", [7]), ("0012", [12])]
)
def test_an_id_or_a_range(text, ids):
    assert parse_ids(text) == ids


@pytest.mark.parametrize(
    "text",
    [
        *("", "-", "-3", "3-", "5-3", "1-2-3", "a", "1.5", " 1", "1_0", "+1", "\u0661", "²"),
        *("9223372036854775808", "1-9999999999", "9" * 5000, "1-" + "9" * 5000),
    ],
)
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(UsageError, match="selects no task"):
        parse_ids(text)
