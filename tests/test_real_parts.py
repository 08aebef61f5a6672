"""A test that lacks a part fails in CI and is skipped elsewhere, with one line that says how to get the part."""

from __future__ import annotations

import re

import pytest
from real_parts import ROOT, platform_lacks, real_environment, real_packages, real_part

#: `skipif` and the others, used anywhere except in the helper, would be a second way.
_OTHER_WAYS = re.compile(r"importorskip|\bskipif\b|pytest\.skip\b|environ\W+CI\b")


def asks():
    """Each kind of part, one that does not exist."""
    return [
        lambda: real_part("no-such-program", "install it"),
        lambda: real_packages("no_such_package", how_to_get_them="install it"),
        lambda: real_environment(".venv-no-such"),
    ]


@pytest.mark.parametrize("ask", asks(), ids=["program", "packages", "environment"])
@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_part_fails_in_ci_and_is_skipped_elsewhere(ask, ci, outcome, monkeypatch):
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match=r"^missing: .*no.such.*; .*(install it|creates it)"):
        ask()


def test_a_fact_about_the_platform_is_skipped_also_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.skip.Exception, match="platform: no IPv6"):
        platform_lacks("no IPv6")


def test_no_test_skips_in_a_way_of_its_own():
    files = [
        file for file in (ROOT / "tests").rglob("*.py") if file.name not in ("real_parts.py", "test_real_parts.py")
    ]
    assert len(files) > 50
    assert [str(file.relative_to(ROOT)) for file in files if _OTHER_WAYS.search(file.read_text())] == []
