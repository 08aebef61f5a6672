"""The translation between native requests and a backend for OpenAI's dialect: requests, answers, streams and errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from backends.base import BackendError, Rejected, Reply, Request, ServerFailed, Timings, Usage
from backends.remote.native import send_native
from backends.simulated.backend import SimulatedBackend

PATH = "/services/aigc/multimodal-generation/generation"
IMAGE = "data:image/jpeg;base64,AAAA"


def native(*, stream: bool = False, messages: object = None, **parameters: object) -> Request:
    asked = (
        [{"role": "user", "content": [{"image": IMAGE}, {"text": "Describe it."}]}] if messages is None else messages
    )
    body = {"model": "qwen-vl-plus", "input": {"messages": asked}, "parameters": parameters}
    headers = {"X-DashScope-SSE": "enable"} if stream else {}
    return Request("native", PATH, json.dumps(body).encode(), "qwen-vl-plus", stream=stream, headers=headers)


@pytest.fixture
async def simulated():
    backend = SimulatedBackend()
    await backend.start()
    yield backend
    await backend.close()


def frames(raw: bytes) -> list[tuple[int, str, int, dict]]:
    """Return (id, event, status, data) of each frame."""
    read = []
    for frame in raw.decode().split("\n\n"):
        if frame:
            number, event, *fields, status_line, data = frame.split("\n")
            status = int(status_line.removeprefix(":HTTP_STATUS/"))
            assert fields == ([] if status == 200 else [f"status:{status}"])  # the official SDK reads only this field
            read.append((int(number[3:]), event[6:], status, json.loads(data.removeprefix("data:"))))
    return read


def text_of(answer: dict) -> str:
    (choice,) = answer["output"]["choices"]
    return "".join(part["text"] for part in choice["message"]["content"])


async def test_the_request_is_translated_to_openais_format():
    sent: list[Request] = []

    async def send(request: Request, timings: Timings) -> Reply:
        sent.append(request)
        raise ServerFailed("the test needs no answer")

    with pytest.raises(ServerFailed):
        await send_native(send, native(stream=True, max_tokens=9, top_p=0.5, incremental_output=True), Timings())
    (request,) = sent
    assert (request.dialect, request.path, request.stream) == ("openai", "/chat/completions", True)
    assert request.headers == {}
    parts = [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "Describe it."}]
    assert json.loads(request.body) == {
        "model": "qwen-vl-plus",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 9,
        "top_p": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("part", "translated"),
    [
        ({"image": IMAGE, "max_pixels": 9}, {"type": "image_url", "image_url": {"url": IMAGE}, "max_pixels": 9}),
        ({"video": [IMAGE, IMAGE], "fps": 2}, {"type": "video", "video": [IMAGE, IMAGE], "fps": 2}),
        (
            {"video": "http://a/b.mp4", "fps": 2},
            {"type": "video_url", "video_url": {"url": "http://a/b.mp4"}, "fps": 2},
        ),
        (
            {"type": "x", "text": "a", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        ),
    ],
)
async def test_a_part_is_translated_with_its_options(part, translated):
    sent: list[Request] = []

    async def send(request: Request, timings: Timings) -> Reply:
        sent.append(request)
        raise ServerFailed("the test needs no answer")

    with pytest.raises(ServerFailed):
        await send_native(send, native(messages=[{"role": "user", "content": [part]}]), Timings())
    assert json.loads(sent[0].body)["messages"][0]["content"] == [translated]


async def test_a_whole_answer_is_translated_to_the_native_format(simulated):
    reply = await send_native(simulated.send, native(), Timings())
    answer = json.loads(reply.body)
    assert len(text_of(answer)) > 10
    assert answer["output"]["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["input_tokens"] == reply.usage.input_tokens
    assert answer["usage"]["total_tokens"] == reply.usage.input_tokens + reply.usage.output_tokens
    assert answer["usage"]["image_tokens"] > 0
    assert answer["request_id"]


@pytest.mark.parametrize("incremental", [True, False])
async def test_a_stream_is_translated_to_native_frames(simulated, incremental):
    whole = json.loads((await send_native(simulated.send, native(), Timings())).body)
    request = native(stream=True, incremental_output=incremental)
    reply = await send_native(simulated.send, request, Timings())
    read = frames(b"".join([chunk async for chunk in reply.chunks]))
    await reply.aclose()
    assert [frame[0] for frame in read] == list(range(1, len(read) + 1))
    assert {frame[1:3] for frame in read} == {("result", 200)}
    texts = [text_of(frame[3]) for frame in read]
    assert len(texts) > 2
    if incremental:
        assert texts[-1] == ""
    else:
        assert all(after.startswith(before) for before, after in pairwise(texts))
    assert ("".join(texts) if incremental else texts[-1]).strip()
    reasons = [frame[3]["output"]["choices"][0]["finish_reason"] for frame in read]
    assert reasons == ["null"] * (len(read) - 1) + ["stop"]
    assert read[-1][3]["usage"]["output_tokens"] == reply.usage.output_tokens
    assert read[-1][3]["usage"].keys() == whole["usage"].keys()


async def test_events_split_anywhere_are_joined_and_an_error_in_the_stream_becomes_an_error_frame():
    failure = ServerFailed("the engine died", status=503, code="engine_down")
    raw = b'data: {"choices":[{"delta":{"content":"a \\u00e9"},"finish_reason":null}]}\r\n\r\ndata: {"error":{}}\n\n'
    inner = Reply(200, {})

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(len(raw)):
            yield raw[at : at + 1]
        inner.failure = failure
        inner.usage = Usage(1, 2)

    async def send(request: Request, timings: Timings) -> Reply:
        inner.chunks = chunks()
        return inner

    reply = await send_native(send, native(stream=True), Timings())
    first, second = frames(b"".join([chunk async for chunk in reply.chunks]))
    assert text_of(first[3]) == "a \u00e9"
    assert second[:3] == (2, "error", 503)
    assert second[3]["code"] == "engine_down"
    assert (reply.failure, reply.usage) == (failure, Usage(1, 2))


async def test_an_error_has_the_native_format_and_names_the_native_field():
    async def send(request: Request, timings: Timings) -> Reply:
        field = "messages[0].content[0].image_url.url"
        raise Rejected(f"{field}: is not base64", status=400, code="invalid_request", body=b"{}")

    with pytest.raises(Rejected) as caught:
        await send_native(send, native(), Timings())
    body = json.loads(caught.value.body)
    assert body["message"] == caught.value.message == "input.messages[0].content[0].image: is not base64"
    assert body["code"] == "invalid_request"
    assert body["request_id"]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hello", "input.messages: must be a list"),
        (["hello"], r"input.messages\[0\]: must be an object"),
        ([{"role": "user", "content": [{"audio": "x"}]}], r"input.messages\[0\].content\[0\]: must hold text, image"),
    ],
)
async def test_a_request_that_cannot_be_translated_is_refused_with_the_name_of_the_field(simulated, messages, expected):
    with pytest.raises(BackendError, match=expected) as caught:
        await send_native(simulated.send, native(messages=messages), Timings())
    assert caught.value.status == 400
    assert json.loads(caught.value.body)["code"] == "InvalidParameter"


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"choices": [{}]}'])
async def test_an_answer_that_is_not_a_completion_is_a_server_failure(body):
    async def send(request: Request, timings: Timings) -> Reply:
        return Reply(200, {}, body)

    with pytest.raises(ServerFailed, match="no chat completion"):
        await send_native(send, native(), Timings())
