"""Names of callers as people see them."""

from __future__ import annotations

import pytest

from sidecar.observe.format import shown_name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("gate-3", "gate-3"),
        ("", ""),
        ("院子", r"\u9662\u5b50"),
        ("a\x1b[2Jb\nc", r"a\x1b[2Jb\nc"),
        ("bytes \udcff", r"bytes \udcff"),
        ("c" * 64, "c" * 64),
        ("c" * 65, "c" * 61 + "..."),
    ],
)
def test_a_name_is_printable_ascii_of_at_most_64_characters(name, shown):
    assert shown_name(name) == shown
