"""Each claim of guarantees.md and security.md is one sentence and names the test functions that prove it."""

from __future__ import annotations

import ast
import re

import pytest
from real_parts import ROOT

from backends.http1 import accepting, descriptors
from backends.json_values import MAX_VALUES

TESTS = ROOT / "tests"
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text()
SECURITY = (ROOT / "docs" / "security.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
#: The sections whose sentences need no test: they promise nothing.
WITHOUT_TESTS = ("What is not guaranteed", "A gateway for many users")
#: A test function as the pages name it.
NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)`")
#: The second cell of a row: only test functions, with commas between them. Some are run by another target of make.
TESTS_CELL = re.compile(rf"{NAMED.pattern}(, {NAMED.pattern})*( \(`make test-pod`\))?")
#: The end of a sentence within a cell.
SENTENCE_END = re.compile(r"[.;!?] |\.$")


def unproven(page: str) -> list[str]:
    """Return the lines of a page that claim something without a test. A claim is a row of a table with two cells.

    The text before the first section only defines what the page is.
    """
    found = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title, *lines = section.splitlines()
        if title in WITHOUT_TESTS:
            continue
        for number, line in enumerate(line for line in lines if line):
            if (number, line) in ((0, "| claim | test |"), (1, "|---|---|")):
                continue
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            is_proven = len(cells) == 2 and TESTS_CELL.fullmatch(cells[1])
            if not (line.startswith("| ") and is_proven) or SENTENCE_END.search(cells[0]):
                found.append(line)
    return found


def functions(file: str) -> set[str]:
    """Return the tests of a file that `make test` collects, or another target that the Makefile shows."""
    if not re.search(r"(^|/)test_\w+\.py$", file) and f"tests/{file}" not in MAKEFILE:
        return set()
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("page", [GUARANTEES, SECURITY], ids=["guarantees", "security"])
def test_every_claim_is_one_sentence_and_names_its_tests(page):
    assert unproven(page) == []
    assert page.count("`, `") + page.count("::test_") > 30


@pytest.mark.parametrize("page", [GUARANTEES, SECURITY], ids=["guarantees", "security"])
def test_every_named_test_exists(page):
    assert [name for name in NAMED.findall(page) if name[1] not in functions(name[0])] == []


@pytest.mark.parametrize("page", [GUARANTEES, SECURITY], ids=["guarantees", "security"])
def test_both_pages_say_what_is_not_guaranteed(page):
    _, _, section = page.partition("## What is not guaranteed\n")
    assert section.partition("\n## ")[0].count("\n* ") > 5


@pytest.mark.parametrize(
    "line",
    [
        "It never fails.",
        "* It never fails (`api/test_bad_input.py::test_unknown_paths_and_wrong_methods`).",
        "| it never fails | `api/test_bad_input.py` |",
        "| it never fails | see the code |",
        "| it never fails | |",
        "| it never fails. It is fast | `a/test_b.py::test_c` |",
        "| it never fails | `a/test_b.py::test_c`, and others |",
    ],
)
def test_a_claim_without_a_test_is_found(line):
    head = "# Page\n\nWhat it is.\n\n## Claims\n\n| claim | test |\n|---|---|\n| it is good | `a/test_b.py::test_c` |\n"
    assert unproven(head) == []
    assert unproven(f"{head}{line}\n") == [line]
    assert unproven(f"{head}\n## What is not guaranteed\n\n{line}\n") == []


def test_a_test_that_nothing_runs_does_not_count():
    assert functions("running.py") == set()
    assert "test_data_is_on_loopback_and_the_admin_port_is_not" in functions("k8s/pod.py")


def test_every_chaos_test_file_is_named_by_a_guarantee():
    assert [file.name for file in TESTS.glob("chaos/test_*.py") if f"`chaos/{file.name}::" not in GUARANTEES] == []


@pytest.mark.parametrize(
    "words",
    [
        f"no complete head within {accepting.FIRST_REQUEST_SECONDS:g} s",
        f"{accepting.MAX_PIPELINED_BYTES // 1024} KiB of them at one connection",
        f"waited {accepting.SLOW_READER_SECONDS:g} s in all",
        f"more than {MAX_VALUES:,} values",
        f"at most {descriptors.MAX_DATA_CONNECTIONS} connections",
        f"at most {descriptors.MAX_ADMIN_CONNECTIONS} connections",
    ],
)
def test_the_numbers_are_those_of_the_code(words):
    assert words in SECURITY
