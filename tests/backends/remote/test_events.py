"""The one reader of server-sent events, against the rules of the WHATWG standard."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.remote.events import Event, EventReader, begins_like_events, events_in

STREAMS = [
    (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
    (b"data:a\r\n\r\ndata:b\r\n\r\n", [b"a", b"b"]),
    (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
    (b"data: a\r\n\ndata: b\n\r\n", [b"a", b"b"]),
    (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
    (b": a comment\n\ndata: a\n: another\n\n", [b"a"]),
    (b"id: 7\nevent: x\ndata: a\nretry: 3\nunknown: y\n\n", [b"a"]),
    (b"data:  two spaces\n\ndata\n\ndata:\n\n", [b" two spaces"]),
    (b"data: a\ndata: b\ndata:c\n\n", [b"a\nb\nc"]),
    (b'data: {"a": 1}\ndata: {"a": 2}\ndata: [DONE]\n\n', [b'{"a": 1}', b'{"a": 2}', b"[DONE]"]),
    (b'data: {"a":\ndata: {"b": 1}\ndata: }\n\n', [b'{"a":\n{"b": 1}\n}']),
    (b"\n\n\ndata: a\n\n\n\ndata: b\n\n", [b"a", b"b"]),
    (b"data: the last one has no empty line", [b"the last one has no empty line"]),
    (b"data: a: b\n\n", [b"a: b"]),
]


def read(pieces: list[bytes], limit: int = 1000) -> list[Event]:
    reader = EventReader(limit)
    blocks = [reader.feed(piece) for piece in pieces]
    return [event for block in [*blocks, reader.end()] for event in events_in(block)]


@pytest.mark.parametrize(("stream", "data"), STREAMS)
def test_events_are_read_line_by_line_as_the_standard_says(stream, data):
    assert [event.data for event in read([stream]) if event.data] == data


@given(stream=st.sampled_from(STREAMS), cuts=st.lists(st.integers(0, 100), max_size=20))
def test_events_do_not_depend_on_where_the_network_splits_the_stream(stream, cuts):
    raw, data = stream
    edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    pieces = [raw[start:end] for start, end in pairwise(edges)]
    assert [event.data for event in read(pieces) if event.data] == data


def test_the_status_of_an_event_is_read_from_dashscopes_comment_and_no_other():
    raw = b"event:error\n:HTTP_STATUS/429\ndata:x\n\n: 429\ndata: y\n\nstatus: 503\ndata: z\n\n"
    assert read([raw]) == [Event(b"error", b"x", 429), Event(b"", b"y", 0), Event(b"", b"z", 503)]


def test_an_event_above_the_limit_is_skipped_and_the_next_is_read():
    pieces = [b"data: " + b"x" * 400, b"x" * 400, b"x" * 400 + b"\n\ndata: a\n\n", b"data: b\n\n"]
    assert [event.data for event in read(pieces, limit=500)] == [b"a", b"b"]


@pytest.mark.parametrize(
    ("body", "is_stream"),
    [
        (b"data: {}\n\n", True), (b": ping\n\n", True), (b"\xef\xbb\xbf event: x\n", True), (b"id:1\n", True),
        (b'{"choices": []}', False), (b"<html>", False), (b"[]", False), (b"identity is no field", False),
        (b"", None), (b"\n\n", None), (b"dat", None), (b"{", False),
        (b"\n" * 90, None), (b"\r\n" * 90 + b"event: x\n", True), (b" " * 64 + b"[1]", False),
        (b"\xef", None), (b"\xef\xbb", None), (b"\xef\xbb\xbf", None), (b"\xef\xbb\xbe", False),
        (b"\n" * 61 + b"data: x", True), (b"\n" * 61 + b"dates", False), (b"\n" * 500 + b"ret", None),
    ],
)  # fmt: skip
def test_the_content_shows_whether_an_answer_is_a_stream(body, is_stream):
    assert begins_like_events(body) is is_stream


@given(stream=st.sampled_from([raw for raw, _ in STREAMS]), length=st.integers(0, 100))
def test_the_first_bytes_of_a_stream_never_look_like_something_else(stream, length):
    assert begins_like_events(stream[:length]) is not False
