"""Tokens to text: pieces of whole characters that together are the answer, and ends before a stop sequence."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from backends.local.text import AnswerText


def decode(tokens) -> str:
    """A byte-level vocabulary at its coarsest: a token is a byte, or two."""
    return b"".join(token.to_bytes(2) if token > 255 else bytes([token]) for token in tokens).decode(errors="replace")


def say(tokens, *, stop=(), max_tokens=10**6) -> tuple[list[str], AnswerText]:
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
def test_no_piece_holds_a_broken_character(text):
    pieces, _ = say(list(text.encode(errors="replace")))
    assert "".join(pieces) == text.encode(errors="replace").decode()
    assert "\ufffd" not in "".join(pieces).replace("\ufffd", "", text.count("\ufffd"))


@given(any_bytes)
def test_the_pieces_together_are_the_text_of_all_tokens_even_of_broken_ones(tokens):
    pieces, _ = say(tokens)
    assert "".join(pieces) == decode(tokens)


@given(
    st.text("abc\u00e9", min_size=1, max_size=80), st.lists(st.text("abc\u00e9", min_size=1, max_size=4), max_size=3)
)
def test_an_answer_ends_before_the_first_stop_sequence(text, stops):
    pieces, answer = say(list(text.encode()), stop=stops)
    said = "".join(pieces)
    assert text.startswith(said)
    if any(stop in text for stop in stops):
        assert any(text[len(said) :].startswith(stop) for stop in stops)
        assert answer.finish_reason == "stop"
        assert not any(stop in said for stop in stops)
    else:
        assert said == text
        assert answer.finish_reason == "length"


def test_text_is_given_out_as_it_comes():
    pieces, _ = say(list("a\u00e9b".encode()))
    assert pieces == ["a", "", "\u00e9", "b"]


def test_what_may_become_a_stop_sequence_is_held_back():
    pieces, _ = say(list(b"one.two.."), stop=[".."])
    assert pieces == ["o", "n", "e", "", ".t", "w", "o", "", ""]


def test_a_long_answer_does_not_decode_all_of_it_again_for_each_token():
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
