"""Every test that guarantees.md or security.md names exists: the file, and the test function in it."""

from __future__ import annotations

import re

import pytest
from real_parts import ROOT

TESTS = ROOT / "tests"
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text()
SECURITY = (ROOT / "docs" / "security.md").read_text()
#: A test file as the documents name it and, if the document names it, a test function in the file.
NAMED = re.compile(r"`(?:tests/)?([\w/]+\.py)(?:::(\w+))?`")


@pytest.mark.parametrize("document", [GUARANTEES, SECURITY], ids=["guarantees", "security"])
def test_every_named_test_exists(document):
    named = NAMED.findall(document)
    assert len(named) > 10
    for file, test in named:
        text = (TESTS / file).read_text()
        assert re.search(rf"^(async )?def {test}\(" if test else r"^(async )?def test_", text, re.MULTILINE), (
            file,
            test,
        )


def test_every_promise_names_a_test():
    rows = [line for line in GUARANTEES.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    assert [row for row in rows if not NAMED.search(row)] == []


def test_every_chaos_test_file_is_named_by_a_promise():
    assert [file.name for file in TESTS.glob("chaos/test_*.py") if f"`chaos/{file.name}" not in GUARANTEES] == []
