"""No answer of an upstream and no body of a caller blocks the event loop: measured in its thread's processor time."""

from __future__ import annotations

import time

import pytest
from running import IMAGE_URL

from backends.base import Request
from backends.remote.answers import StreamWatch
from backends.remote.error_bodies import lenient_json
from backends.remote.native import send_native
from backends.remote.refusals import classify
from sidecar.api.body import is_quick
from sidecar.api.errors import _is_json

MIB = 1024 * 1024
#: Seconds. Three times the bound of 0.05 s, because the test's machine may be slow; each case took 0.09 s or more.
BOUND = 0.15
CONTENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


def seconds_of(function, *arguments) -> float:
    """Return the least of three measurements."""
    measured = []
    for _ in range(3):
        before = time.thread_time()
        function(*arguments)
        measured.append(time.thread_time() - before)
    return min(measured)


def filled(piece: bytes, size: int, start: bytes = b"", end: bytes = b"") -> bytes:
    return start + piece * (size // len(piece)) + end


@pytest.mark.parametrize(
    "event", [b"data:error\n\n", b'data:finish_reason":"x\n\n', b"data:{}\n\n", b'data:"base_resp"\n\n']
)
@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_a_piece_of_tiny_events(event, is_chat, begun):
    def feed():
        watch = StreamWatch(is_chat=is_chat)
        if begun:
            watch.feed(CONTENT)
        watch.feed(filled(event, MIB // 2))
        assert watch.has_content

    assert seconds_of(feed) < BOUND


def test_the_end_and_the_usage_are_found_behind_many_events():
    watch = StreamWatch()
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
    watch.feed(CONTENT * 5000 + b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n' + usage)
    assert watch.is_complete
    assert watch.usage == (3, 4)


def test_many_comments_are_no_content():
    watch = StreamWatch()
    watch.feed(filled(b": x\n\n", MIB // 4))
    assert not watch.has_content


@pytest.mark.parametrize("body", [
    filled(b"a", 60 * MIB, b'{"choices":[{"message":{"content":"', b'"},"finish_reason":"stop"}]}'),
    filled(b',\\"', 60 * MIB, b'{"choices":[{"message":{"content":"', b'"},"finish_reason":"stop"}]}'),
], ids=["text", "commas"])  # fmt: skip
def test_a_very_long_answer(body):
    assert seconds_of(lenient_json, body) < BOUND


@pytest.mark.parametrize("body", [filled(b":\n", MIB), filled(b"[],", MIB, b"[", b"0]")], ids=["comments", "lists"])
def test_an_error_of_many_pieces(body):
    assert seconds_of(classify, 429, {}, body) < BOUND
    assert seconds_of(_is_json, body) < BOUND


@pytest.mark.parametrize("piece", [b"no" + b" " * 64, b"out ", b"\\u006f"])
def test_a_refusal_whose_words_are_looked_for_in_a_long_request(piece):
    refusal = b'{"error":{"message":"No balance. Out of credits. Account suspended. Payment required."}}'
    sent = filled(piece, 13 * MIB, b'{"messages":"', b'"}')
    assert seconds_of(lambda: classify(403, {}, refusal, request_body=sent)) < BOUND


def test_words_are_found_in_a_request_with_a_long_image():
    refusal = b'{"error":{"message":"the pantry is overdue: overdue balance"}}'
    image = filled(b"AbC/", MIB, IMAGE_URL.encode()).decode()
    quoting = f'{{"a":"{image}","b":"overdue balance"}}'.encode()
    assert "money" in str(classify(400, {}, refusal, request_body=f'{{"a":"{image}"}}'.encode()))
    assert "money" not in str(classify(400, {}, refusal, request_body=quoting))


def test_a_long_body_whose_image_is_none_is_parsed_in_a_thread():
    start = b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,'
    body = filled(b",{[", 5 * MIB, start + b"!" * 600, b'"}}]}]}')
    assert not is_quick(body)
    assert is_quick(filled(b"A", 3 * MIB, start, b'"}}]}]}'))


async def test_a_native_request_of_many_parts_is_translated_in_a_thread():
    async def send(request, timings):
        raise AssertionError("it is not sent")

    body = filled(b'{"text":"hi"},', MIB, b'{"input":{"messages":[{"content":[', b"0]}]}}")
    request = Request("native", "/services/aigc/multimodal-generation/generation", body, "m")
    before = time.thread_time()
    with pytest.raises(Exception, match="must hold text"):
        await send_native(send, request, None)
    assert time.thread_time() - before < BOUND / 3
