"""What the documents say is shown by a test, is: the file is there, and the test in it."""

from __future__ import annotations

import re

import pytest
from real_parts import ROOT

TESTS = ROOT / "tests"
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text()
SECURITY = (ROOT / "docs" / "security.md").read_text()
#: A file of tests as the documents name it, and a test in it where they name one.
NAMED = re.compile(r"`(?:tests/)?([\w/]+\.py)(?:::(\w+))?`")


@pytest.mark.parametrize("document", [GUARANTEES, SECURITY], ids=["guarantees", "security"])
def test_every_test_that_is_named_exists(document):
    named = NAMED.findall(document)
    assert len(named) > 10
    for file, test in named:
        text = (TESTS / file).read_text()
        assert re.search(rf"^(async )?def {test}\(" if test else r"^(async )?def test_", text, re.MULTILINE), (
            file,
            test,
        )


def test_every_promise_names_its_test():
    rows = [line for line in GUARANTEES.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    assert [row for row in rows if not NAMED.search(row)] == []


def test_every_chaos_test_stands_for_a_promise():
    assert [file.name for file in TESTS.glob("chaos/test_*.py") if f"`chaos/{file.name}" not in GUARANTEES] == []
