"""Tokens to text: the pieces contain whole characters, together they are the answer, and stop sequences end it."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from backends.local.text import AnswerText


def decode(tokens) -> str:
    """Decode tokens of the simplest byte-level vocabulary: each token is one byte or two bytes."""
    return b"".join(token.to_bytes(2) if token > 255 else bytes([token]) for token in tokens).decode(errors="replace")


def push_all(tokens, *, stop=(), max_tokens=10**6) -> tuple[list[str], AnswerText]:
    answer = AnswerText(decode, end_tokens=frozenset(), stop=tuple(stop), max_tokens=min(max_tokens, len(tokens)))
    pieces = []
    for token in tokens:
        pieces.append(answer.push(token))
        if answer.finish_reason is not None:
            break
    return pieces, answer


words = st.text(min_size=1, max_size=120)
any_bytes = st.lists(st.integers(0, 65_535), min_size=1, max_size=200)


@given(words)
def test_no_piece_contains_an_incomplete_character(text):
    pieces, _ = push_all(list(text.encode(errors="replace")))
    assert "".join(pieces) == text.encode(errors="replace").decode()
    assert "\ufffd" not in "".join(pieces).replace("\ufffd", "", text.count("\ufffd"))


@given(any_bytes)
def test_the_pieces_together_are_the_text_of_all_tokens_even_with_invalid_bytes(tokens):
    pieces, _ = push_all(tokens)
    assert "".join(pieces) == decode(tokens)


@given(
    st.text("abc\u00e9", min_size=1, max_size=80), st.lists(st.text("abc\u00e9", min_size=1, max_size=4), max_size=3)
)
def test_an_answer_ends_before_the_first_stop_sequence(text, stops):
    pieces, answer = push_all(list(text.encode()), stop=stops)
    returned = "".join(pieces)
    assert text.startswith(returned)
    if any(stop in text for stop in stops):
        assert any(text[len(returned) :].startswith(stop) for stop in stops)
        assert answer.finish_reason == "stop"
        assert not any(stop in returned for stop in stops)
    else:
        assert returned == text
        assert answer.finish_reason == "length"


def test_text_is_returned_as_soon_as_it_is_certain():
    pieces, _ = push_all(list("a\u00e9b".encode()))
    assert pieces == ["a", "", "\u00e9", "b"]


def test_text_that_may_become_a_stop_sequence_is_held_back():
    pieces, _ = push_all(list(b"one.two.."), stop=[".."])
    assert pieces == ["o", "n", "e", "", ".t", "w", "o", "", ""]


def test_a_long_answer_is_not_decoded_again_as_a_whole_for_each_token():
    lengths = []
    answer = AnswerText(
        lambda tokens: lengths.append(len(tokens)) or decode(tokens),
        end_tokens=frozenset(),
        stop=(),
        max_tokens=5000,
    )
    for at in range(4000):
        answer.push(97 + at % 26)
    assert max(lengths) < 100
