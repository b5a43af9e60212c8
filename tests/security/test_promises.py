"""Every promise of docs/security.md names a test that is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_the_document_names_is_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    gone = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"^(async )?def {name}\b", (ROOT / path).read_text("utf-8"), re.M)
    ]
    assert gone == []


def test_no_promise_is_shown_by_a_test_that_is_expected_to_fail() -> None:
    text = (ROOT / "docs" / "security.md").read_text("utf-8")
    for path in sorted((ROOT / "tests" / "security").glob("test_*.py")):
        for decorators, name in re.findall(
            r"((?:^@.*\n(?:^[ )].*\n)*)+)(?:async )?def (\w+)", path.read_text("utf-8"), re.M
        ):
            assert "xfail" not in decorators or name not in text, name
