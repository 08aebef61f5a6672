"""JSON that would become very many objects is found before it is parsed, and no text is taken for it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import json_values
from backends.json_values import MAX_VALUES, has_too_many_values

MANY = MAX_VALUES + MAX_VALUES // 10


@pytest.mark.parametrize(
    "value", ["{}", "[]", '""', "0", '{"a":0}', "[[]]", '"a,b"', '"\\""', '"\\\\"', '"\\\\\\""', " 1 "]
)
def test_many_values_are_found_whatever_they_are(value):
    assert has_too_many_values(f"[{','.join([value] * MANY)}]".encode())
    assert not has_too_many_values(f"[{','.join([value] * (MAX_VALUES // 4))}]".encode())


def test_one_long_chain_of_lists_or_objects_is_found():
    assert has_too_many_values(b"[" * MANY)
    assert has_too_many_values(b'{"a":' * MANY)


@pytest.mark.parametrize("piece", ["a, b, ", '{"a": [1, {}]}, ', 'He said "no", "no". ', "\\,", '\\",', "\n[,"])
def test_the_text_of_a_string_never_counts(piece):
    text = piece * MANY
    assert not has_too_many_values(json.dumps({"messages": [{"role": "user", "content": text}]}).encode())


@pytest.mark.parametrize("text", [b"", b'"', b'"' * 3, b"\\" * MANY, b'"' + b"," * MANY, b"\xff" * MANY])
def test_what_is_no_json_raises_nothing(text):
    assert not has_too_many_values(text)


VALUES = st.recursive(
    st.none() | st.integers() | st.text('a,{}[]"\\:', max_size=6),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text('b,"\\', max_size=3), inner, max_size=5),
    max_leaves=30,
)


def size(value) -> int:
    """The number of lists, objects and values in them."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(size, inner))


@given(VALUES)
def test_the_count_is_right_for_any_json(value):
    """Each value but the outermost one is behind a comma or a bracket, and an empty list or object adds its bracket."""
    with pytest.MonkeyPatch.context() as patch:
        text = json.dumps(value).encode()
        real = size(value)
        patch.setattr(json_values, "MAX_VALUES", 2 * real)  # a list of one counts twice: its bracket, and its value's
        assert not has_too_many_values(text)
        patch.setattr(json_values, "MAX_VALUES", max((real - 2) // 2, 0))
        assert real < 4 or has_too_many_values(text)
