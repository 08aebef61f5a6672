"""An accepted answer is judged by what it must contain, and a 200 that has arrived is never asked for again."""

from __future__ import annotations

import asyncio
import gzip
import json
from contextlib import asynccontextmanager

import pytest
from answer_readings import meaning_of
from scripted_upstream import BOUND, CHAT_ANSWER, Link, Seen

from backends.base import BackendError, Reply, Request, ServerFailed, Throttled, Timings
from backends.remote import answers
from backends.remote.answers import judge
from backends.remote.backend import DashScopeBackend
from backends.remote.error_bodies import lenient_json

CHAT = Request("openai", "/chat/completions", b'{"messages": []}', "m")
STREAM = Request("openai", "/chat/completions", b'{"stream": true}', "m", stream=True)
NATIVE = Request("native", "/services/aigc/multimodal-generation/generation", b"{}", "m")
#: A native request of a server without a native API: it is translated.
TRANSLATED = Request(
    "native", "/services/aigc/multimodal-generation/generation", b'{"input": {"messages": []}}', "m", stream=True
)


@asynccontextmanager
async def connected(base_url):
    made = DashScopeBackend(base_url=base_url)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def backend(upstream):
    async with connected(f"{upstream.origin}/compatible-mode/v1") as made:
        yield made


@pytest.fixture
async def plain_backend(upstream):
    """Connect to a server that has only OpenAI's API."""
    async with connected(f"{upstream.origin}/v1") as made:
        yield made


def answering(body: bytes | dict, content_type: str = "application/json", **more):
    async def script(link: Link, _: Seen) -> None:
        await link.answer(body, content_type=content_type, **more)

    return script


def streaming(*events: object, content_type: str = "text/event-stream"):
    async def script(link: Link, _: Seen) -> None:
        await link.start_stream(content_type)
        for event in events:
            data = event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n"
            await link.chunk(data)
        await link.chunk(b"")

    return script


async def error_of(backend: DashScopeBackend, request: Request) -> BackendError:
    async with asyncio.timeout(BOUND):
        with pytest.raises(BackendError) as caught:
            await backend.send(request, Timings())
    return caught.value


async def read_all(reply: Reply) -> bytes:
    assert reply.chunks is not None
    try:
        async with asyncio.timeout(BOUND):
            return b"".join([piece async for piece in reply.chunks])
    finally:
        await reply.aclose()


def piece(content: str | None = None, reason: str | None = None, **delta: object) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": content, **delta}, "finish_reason": reason}]}


LIMIT = {"code": 429, "message": "Too many requests a minute"}
# A1, A2: an error inside a 200.
ERRORS = [
    ({"choices": None, "error": LIMIT}, "request_rate"),
    ({"choices": [], "error": LIMIT}, "request_rate"),
    ({"choices": [{"message": {"content": ""}, "finish_reason": None}], "error": LIMIT}, "request_rate"),
    ({"choices": [{"message": {"content": "half"}, "error": {"code": 503, "message": "overloaded"}}]}, "capacity"),
    ({"choices": [{"message": {"content": "half"}, "finish_reason": "error"}]}, "server"),
    ({"choices": None, "base_resp": {"status_code": 1039, "status_msg": "x"}}, "token_rate"),
    ({"output": None, "code": "Throttling.RateQuota", "message": "x", "request_id": "r"}, "request_rate"),
    ({"output": {"choices": []}, "code": "Arrearage", "request_id": "r"}, "billing"),
    ({"success": False, "errors": [{"code": 3040, "message": "no room"}]}, "capacity"),
    ({"type": "error", "error": {"type": "overloaded_error"}}, "capacity"),
]


@pytest.mark.parametrize(("body", "meaning"), ERRORS)
async def test_an_error_inside_a_200_is_raised_like_any_other_error(backend, upstream, body, meaning):
    upstream.script = answering(body)
    assert meaning_of(await error_of(backend, CHAT)) == meaning
    assert meaning_of(await error_of(backend, NATIVE)) == meaning


@pytest.mark.parametrize(("body", "meaning"), ERRORS)
async def test_an_error_as_the_first_event_of_a_stream_is_raised_also_after_an_empty_role(
    backend, upstream, body, meaning
):
    upstream.script = streaming(b": ping\n\n", piece("", role="assistant"), body)
    assert meaning_of(await error_of(backend, STREAM)) == meaning


ANSWERS = [
    CHAT_ANSWER,
    {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]},
    {"choices": [{"message": {"content": None, "tool_calls": [{"id": "1"}]}, "finish_reason": "tool_calls"}]},
    {"choices": [{"message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "length"}]},
    {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}], "error": None},
    {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}], "base_resp": {"status_code": 0}},
    {"output": {"text": "fine", "finish_reason": "stop"}},
    {"output": {"choices": [{"message": {"content": [{"text": "fine"}]}, "finish_reason": "stop"}]}},
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_a_caller_can_read_is_an_answer(answer):
    assert judge(answer, is_chat=True) == "answer"


@pytest.mark.parametrize("body", [b"{}", b'{"choices": []}', b"<html>", b"", b"[]", b'{"id": "x", "usage": null}'])
async def test_a_complete_200_without_an_answer_is_an_error_that_is_not_sent_again(backend, upstream, body):
    upstream.script = answering(body)
    error = await error_of(backend, CHAT)
    assert isinstance(error, ServerFailed)
    assert not error.may_resend


ANSWER = json.dumps(CHAT_ANSWER)
# A3: what strict parsers refuse.
LENIENT = [
    ANSWER.replace("1225", "NaN").encode(),
    ANSWER.replace('"index": 0', '"logprob": -Infinity, "index": 0').encode(),
    ANSWER.replace("A gate.", r"A \ud83d gate").encode(),
    b"\xef\xbb\xbf" + ANSWER.encode(),
    ANSWER.encode("utf-16"),
    ANSWER.replace("A gate.", "A\tgate\x01").encode(),
    ANSWER.encode()[:-1] + b",}",
]


@pytest.mark.parametrize("body", LENIENT)
async def test_a_200_that_is_not_strict_json_is_passed_on_unchanged(backend, upstream, body):
    upstream.script = answering(body)
    reply = await backend.send(CHAT, Timings())
    assert reply.body == body
    assert len(upstream.seen) == 1


# A4: the label says nothing.
@pytest.mark.parametrize("label", ["text/plain", "application/octet-stream", "application/json", "text/html"])
async def test_a_stream_with_another_label_is_a_stream(backend, upstream, label):
    upstream.script = streaming(b"\n", piece("A gate", "stop"), b"data: [DONE]\n\n", content_type=label)
    reply = await backend.send(STREAM, Timings())
    assert b"A gate" in await read_all(reply)


async def test_json_that_is_labelled_as_a_stream_is_read_as_json(backend, upstream):
    upstream.script = answering({"error": LIMIT}, content_type="text/event-stream")
    assert isinstance(await error_of(backend, STREAM), Throttled)
    upstream.script = answering(CHAT_ANSWER, content_type="text/event-stream")
    assert json.loads((await backend.send(STREAM, Timings())).body) == CHAT_ANSWER


# A5
@pytest.mark.parametrize("encoding", ["br", "gzip", "zstd"])
async def test_a_compressed_answer_is_passed_on_with_its_encoding(backend, upstream, encoding):
    packed = gzip.compress(ANSWER.encode())  # for the other two any bytes serve: nobody reads them
    upstream.script = answering(packed, headers=f"Content-Encoding: {encoding}\r\n")
    for request in (CHAT, STREAM):
        reply = await backend.send(request, Timings())
        assert (reply.body or await read_all(reply)) == packed
        assert reply.headers["Content-Encoding"] == encoding
    assert len(upstream.seen) == 2


async def test_a_compressed_answer_that_must_be_translated_is_an_error_that_names_the_encoding(plain_backend, upstream):
    upstream.script = answering(b"\x0b\x02\x80", headers="Content-Encoding: br\r\n")
    error = await error_of(plain_backend, TRANSLATED)
    assert "br" in error.message
    assert not error.may_resend


async def test_a_compressed_refusal_is_read(backend, upstream):
    body = gzip.compress(b'{"error": {"code": "Arrearage"}}')
    upstream.script = answering(body, status=400, headers="Content-Encoding: gzip\r\n")
    assert meaning_of(await error_of(backend, CHAT)) == "billing"
    upstream.script = answering(b"\x0b\x02\x80", status=429, headers="Content-Encoding: br\r\n")
    assert meaning_of(await error_of(backend, CHAT)) == "unknown"


# A7
@pytest.mark.parametrize("events", [[piece("A"), piece(" ga")], [piece("A"), {"choices": [], "usage": None}]])
async def test_a_stream_that_does_not_say_that_it_has_ended_is_a_failure(backend, upstream, events):
    upstream.script = streaming(*events)
    reply = await backend.send(STREAM, Timings())
    with pytest.raises(ServerFailed, match="ended in the middle"):
        await read_all(reply)
    reply = await backend.send(STREAM, Timings())
    assert reply.deliver is not None
    with pytest.raises(ServerFailed, match="ended in the middle"):
        await reply.deliver(lambda _: True)
    await reply.aclose()


@pytest.mark.parametrize(
    "events",
    [[piece("A"), b"data: [DONE]\n\n"], [piece("A"), piece("", "stop"), {"choices": [], "usage": None}],
     [piece("A", "length")], [piece("A"), b"data: [DONE]"]],
)  # fmt: skip
async def test_a_stream_has_ended_with_done_or_with_a_finish_reason(backend, upstream, events):
    upstream.script = streaming(*events)
    reply = await backend.send(STREAM, Timings())
    assert await read_all(reply)
    assert reply.failure is None


async def test_the_translation_invents_no_end_of_a_stream(plain_backend, upstream):
    upstream.script = streaming(piece("A ga"))
    reply = await plain_backend.send(TRANSLATED, Timings())
    with pytest.raises(ServerFailed, match="ended in the middle"):
        await read_all(reply)


def native_frames(raw: bytes) -> list[dict]:
    return [json.loads(part.partition(b"data:")[2])["output"] for part in raw.split(b"\n\n") if part]


# A6
async def test_the_translation_reads_events_with_other_fields_and_comments(plain_backend, upstream):
    upstream.script = streaming(
        b'id: 1\nevent: message\ndata: {"choices":[{"delta":{"content":"A"}}]}\n\n',
        b': ping\ndata:{"choices":[{"delta":{"content":" gate"},"finish_reason":"stop"}]}\r\n\r\n',
        b"data: [DONE]\n\n",
    )
    frames = native_frames(await read_all(await plain_backend.send(TRANSLATED, Timings())))
    assert frames[-1]["choices"][0]["message"]["content"] == [{"text": "A gate"}]
    assert frames[-1]["choices"][0]["finish_reason"] == "stop"


# A8
async def test_the_translation_of_a_stream_keeps_tool_calls_reasoning_and_each_of_two_choices(plain_backend, upstream):
    def call(**parts: object) -> dict:
        return piece(tool_calls=[{"index": 0, **parts}])

    upstream.script = streaming(
        piece(reasoning_content="I "), piece(reasoning_content="think"),
        call(id="c1", type="function", function={"name": "zoom", "arguments": '{"x"'}),
        call(function={"arguments": ": 1}"}), piece(reason="tool_calls"),
        {"choices": [{"index": 1, "delta": {"content": "B"}, "finish_reason": "stop"}]},
        b"data: [DONE]\n\n",
    )  # fmt: skip
    first, second = native_frames(await read_all(await plain_backend.send(TRANSLATED, Timings())))[-1]["choices"]
    assert first["message"]["reasoning_content"] == "I think"
    [made] = first["message"]["tool_calls"]
    assert (made["id"], made["function"]) == ("c1", {"name": "zoom", "arguments": '{"x": 1}'})
    assert (first["index"], first["finish_reason"]) == (0, "tool_calls")
    assert (second["index"], second["message"]["content"], second["finish_reason"]) == (1, [{"text": "B"}], "stop")


# A9
async def test_the_upstreams_own_request_id_is_in_the_headers_and_never_in_the_message(backend, upstream):
    for status in (429, 500, 400):
        upstream.script = answering({"error": {"message": "x"}}, status=status, headers="X-Request-Id: up-7\r\n")
        error = await error_of(backend, CHAT)
        assert error.upstream_request_id == error.headers["X-Upstream-Request-Id"] == "up-7"
        assert "up-7" not in error.message  # everybody sees the message, and an id can be a part of a key
    upstream.script = answering({"code": "X", "message": "x", "request_id": "in-the-body"}, status=500)
    assert (await error_of(backend, CHAT)).upstream_request_id == "in-the-body"
    upstream.script = answering({"error": {"message": "x"}}, status=500, headers="X-Request-Id: mine\r\n")
    echoed = Request("openai", CHAT.path, CHAT.body, "m", headers={"X-Request-Id": "mine"})
    assert (await error_of(backend, echoed)).upstream_request_id == ""


# What a passed-through path answers is often a resource that failed earlier.
FAILED_JOB = {
    "id": "ftjob-7", "object": "fine_tuning.job", "status": "failed", "usage": {"prompt_tokens": 9},
    "error": {"code": "exceeded_quota", "message": "You exceeded your quota, check your plan and billing details."},
}  # fmt: skip
FAILED_BATCH = {"id": "b-7", "object": "batch", "errors": {"data": [{"code": "rate_limit_exceeded", "message": "x"}]}}
BARE_ERROR = {"error": {"code": "Arrearage", "message": "Access denied: overdue payment."}}


@pytest.mark.parametrize("body", [FAILED_JOB, FAILED_BATCH, BARE_ERROR, {"code": "Arrearage", "message": "x"}])
async def test_what_a_get_returns_is_never_an_error_of_the_call(backend, upstream, body):
    upstream.script = answering(body)
    reply = await backend.send(Request("openai", "/batches/b-7", b"", "", method="GET"), Timings())
    assert (json.loads(reply.body), reply.usage, len(upstream.seen)) == (body, None, 1)


@pytest.mark.parametrize("body", [FAILED_JOB, FAILED_BATCH, {"data": [], "errors": [{"code": "x"}]}])
async def test_a_resource_with_errors_of_its_own_is_the_answer_to_a_post(backend, upstream, body):
    upstream.script = answering(body)
    reply = await backend.send(Request("openai", "/batches/b-7/cancel", b"{}", ""), Timings())
    assert json.loads(reply.body) == body


@pytest.mark.parametrize(
    "body", [BARE_ERROR, {**BARE_ERROR, "data": None, "id": None}, {"object": "error", "code": "Arrearage"}]
)
async def test_an_error_in_a_200_to_another_post_is_raised(backend, upstream, body):
    upstream.script = answering(body)
    assert meaning_of(await error_of(backend, Request("openai", "/embeddings", b"{}", "e"))) == "billing"


EMPTY_EVENT = b'data: {"choices": []}\n\n'
REFUSAL_EVENT = b'data: {"error": {"code": "Arrearage"}}\r\n\r\n'


@pytest.mark.parametrize(
    ("body", "meaning"),
    [
        (b": ping\n\n" + REFUSAL_EVENT + EMPTY_EVENT * 200_000, "billing"),
        (EMPTY_EVENT * 50 + REFUSAL_EVENT.strip(), "billing"),
        (EMPTY_EVENT * 200_000 + REFUSAL_EVENT, "server"),
        (b": " + b"x" * 300_000 + b"\n\n" + REFUSAL_EVENT, "server"),
    ],
    ids=["first", "the fiftieth, without an empty line", "too late", "too far"],
)
async def test_only_the_beginning_of_a_stream_that_nobody_asked_for_is_searched_for_an_error(
    backend, upstream, monkeypatch, body, meaning
):
    parsed: list[bytes] = []
    monkeypatch.setattr(answers, "lenient_json", lambda data: parsed.append(data) or lenient_json(data))
    upstream.script = answering(body)
    assert meaning_of(await error_of(backend, CHAT)) == meaning
    assert len(parsed) <= 100


PICTURE = piece("", images=[{"image_url": {"url": "data:image/png;base64," + "iVBO" * 400_000}}])


@pytest.mark.parametrize("before", [b"", b": " + b"keep-alive " * 80_000 + b"\n\n"], ids=["at once", "after comments"])
async def test_one_very_long_event_with_data_is_content_and_is_asked_for_once(backend, upstream, before):
    upstream.script = streaming(*([before] if before else []), PICTURE, piece("", "stop"), b"data: [DONE]\n\n")
    reply = await backend.send(STREAM, Timings())
    assert (await read_all(reply)).endswith(b"data: [DONE]\n\n")
    assert len(upstream.seen) == 1


def test_a_very_long_comment_is_no_content():
    watch = answers.StreamWatch()
    for part in (b": x", b"data: " * 50_000, b"\n\n", b"data: {}\n\n"):
        watch.feed(part)
        assert not watch.has_content
    for part in (b"id: 3\nevent: result\n", b"data: " + b"x" * 200_000, b"x" * 100_000):
        assert not watch.has_content
        watch.feed(part)
    assert watch.has_content


async def test_comments_without_end_are_an_error_that_is_not_sent_again(backend, upstream):
    upstream.script = streaming(*[b": " + b"tick " * 20_000 + b"\n\n"] * 12)
    error = await error_of(backend, STREAM)
    assert "no content" in error.message
    assert not error.may_resend


async def test_a_model_that_thinks_for_long_with_empty_texts_is_delivered(backend, upstream):
    thinking = b"".join(b"data: " + json.dumps(piece("")).encode() + b"\n\n" for _ in range(3000))
    upstream.script = streaming(*[thinking] * 5, piece("At last", "stop"))
    assert b"At last" in await read_all(await backend.send(STREAM, Timings()))


@pytest.mark.parametrize("blank", [b"\n" * 90, b"\r\n" * 2000, b" \t" * 40 + b"\n"])
async def test_many_blank_lines_before_a_stream_or_an_answer_change_nothing(backend, upstream, blank):
    event = b"data: " + json.dumps(piece("A gate", "stop")).encode() + b"\n\n"
    upstream.script = streaming(*[blank] * 3, event)
    assert (await read_all(await backend.send(STREAM, Timings()))).endswith(event)
    upstream.script = answering(blank + json.dumps({"error": LIMIT}).encode(), content_type="text/event-stream")
    assert isinstance(await error_of(backend, STREAM), Throttled)


NULL_REASON = {"choices": [{"index": 0, "delta": {}, "finish_reason": None}], "usage": {"prompt_tokens": 3}}
SPACED = b'data: {"choices": [{"delta": {"content": "b"}, "finish_reason" : "length"}]}\n\n'
NATIVE_END = b'data:{"output":{"choices":[{"finish_reason":"stop","message":{"content":[{"text":"b"}]}}]}}\n\n'


def sse(event: object) -> bytes:
    return event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n"


def compact(event: object) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
@pytest.mark.parametrize(
    "last", [piece("", "stop"), compact(piece("", "stop")), SPACED, NATIVE_END, b"data: [DONE]\n\n"]
)
def test_the_end_of_a_stream_is_remembered_wherever_the_network_splits_it(size, last):
    first = compact(piece("a")) + compact(piece("finish_reason"))
    whole = first + sse(last) + compact(NULL_REASON) + sse(NULL_REASON) + b": ping\n\n" * 3
    for raw, ends in ((whole, True), (first + compact(NULL_REASON), False)):
        watch = answers.StreamWatch()
        for at in range(0, len(raw), size):
            watch.feed(raw[at : at + size])
        watch.end()
        assert watch.is_complete is ends


def test_words_about_the_end_in_a_text_are_not_the_end():
    watch = answers.StreamWatch()
    for text in ('{"finish_reason": "stop"}', "data: [DONE]", '"finish_reason":"null"'):
        watch.feed(sse(piece(text)) + compact(piece(text)))
    watch.end()
    assert not watch.is_complete


def test_a_very_long_last_event_is_no_cut_but_a_long_event_that_is_cut_is_one():
    long = b"data: " + b"x" * 300_000
    for rest, complete in ((b"\n\n", True), (b"", False), (b"\n\n" + sse(piece("b")), False)):
        watch = answers.StreamWatch()
        watch.feed(sse(piece("a")))
        watch.feed(long)
        if rest:
            watch.feed(rest)
        watch.end()
        assert watch.is_complete is complete


ODD_USAGES = [
    {"prompt_tokens": None, "completion_tokens": None}, {"prompt_tokens": 5, "completion_tokens": None},
    {"prompt_tokens": "7", "completion_tokens": []}, {"prompt_tokens": -3, "completion_tokens": 1}, [4, 5], "many",
]  # fmt: skip


@pytest.mark.parametrize("usage", ODD_USAGES)
async def test_an_odd_usage_does_not_cut_a_translated_stream(plain_backend, upstream, usage):
    good = {"prompt_tokens": 31, "completion_tokens": 4, "prompt_tokens_details": 12}
    upstream.script = streaming(
        {**piece("A "), "usage": usage}, {**piece("gate", "stop"), "usage": usage}, {"choices": [], "usage": good}
    )
    raw = await read_all(await plain_backend.send(TRANSLATED, Timings()))
    assert native_frames(raw)[-1]["choices"][0]["message"]["content"] == [{"text": "A gate"}]
    first, *_, last = (json.loads(part.partition(b"data:")[2])["usage"] for part in raw.split(b"\n\n") if part)
    assert (first, last) == ({}, {"input_tokens": 31, "output_tokens": 4, "total_tokens": 35})


@pytest.mark.parametrize("usage", ODD_USAGES)
async def test_an_odd_usage_does_not_spoil_a_translated_answer(plain_backend, upstream, usage):
    upstream.script = answering({**CHAT_ANSWER, "usage": usage})
    whole = Request("native", "/services/aigc/multimodal-generation/generation", TRANSLATED.body, "m")
    assert json.loads((await plain_backend.send(whole, Timings())).body)["usage"] == {}


async def test_the_translation_survives_deltas_whose_values_change_their_type(plain_backend, upstream):
    upstream.script = streaming(
        piece("A", extra=["x"], tool_calls="none"), piece(" gate", extra="y", tool_calls=[{"index": 0, "id": "c"}]),
        piece("", "stop"),
    )  # fmt: skip
    message = native_frames(await read_all(await plain_backend.send(TRANSLATED, Timings())))[-1]["choices"][0][
        "message"
    ]
    assert (message["content"], message["extra"], message["tool_calls"][0]["id"]) == ([{"text": "A gate"}], "y", "c")
