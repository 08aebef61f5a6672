"""The provider as a backend in this process: its answers in both dialects, its refusals, failures and counts."""

from __future__ import annotations

import asyncio
import hashlib
from itertools import pairwise

import orjson
import pytest

from backends.base import BillingRefused, Rejected, Request, ServerFailed, Throttled, Timings, Unreachable, Usage
from backends.simulated import Profile, Provider, SimulatedBackend

IMAGE = "https://cameras.example/frame.jpg"
OPENAI_PARTS = [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "Describe this frame."}]
NATIVE_PARTS = [{"image": IMAGE}, {"text": "Describe this frame."}]


def openai(**fields) -> Request:
    body = {"model": "qwen-vl-plus", "messages": [{"role": "user", "content": OPENAI_PARTS}], **fields}
    return Request("openai", "/chat/completions", orjson.dumps(body), "qwen-vl-plus", bool(fields.get("stream")))


def native(stream: bool = False, headers: dict[str, str] | None = None, **parameters) -> Request:
    body = {
        "model": "qwen-vl-plus",
        "input": {"messages": [{"role": "user", "content": NATIVE_PARTS}]},
        "parameters": parameters,
    }
    return Request("native", "/generation", orjson.dumps(body), "qwen-vl-plus", stream, headers or {})


REQUESTS = {"openai": openai, "native": native}


async def backend(**profile) -> SimulatedBackend:
    made = SimulatedBackend(Profile(**profile))
    await made.start()
    return made


async def frames(reply) -> list[bytes]:
    try:
        return [chunk async for chunk in reply.chunks]
    finally:
        await reply.aclose()


def data_of(frame: bytes) -> dict:
    return orjson.loads(frame.partition(b"data:")[2])


async def test_both_dialects_return_the_same_answer_and_the_same_usage():
    made = await backend(answer_tokens=30)
    openai_reply, native_reply = await made.send(openai(), Timings()), await made.send(native(), Timings())
    in_openai, in_native = orjson.loads(openai_reply.body), orjson.loads(native_reply.body)
    assert openai_reply.usage == native_reply.usage == Usage(in_openai["usage"]["prompt_tokens"], 30)
    assert in_native["usage"]["input_tokens"] == in_openai["usage"]["prompt_tokens"] > 1000  # mostly the image
    assert in_openai["usage"]["prompt_tokens_details"]["image_tokens"] == in_native["usage"]["image_tokens"]
    assert in_openai["choices"][0]["finish_reason"] == in_native["output"]["choices"][0]["finish_reason"] == "stop"
    assert in_openai["choices"][0]["message"]["content"]
    assert in_native["output"]["choices"][0]["message"]["content"][0]["text"]


async def test_max_tokens_limits_the_answer():
    reply = await (await backend()).send(openai(max_tokens=5), Timings())
    assert reply.usage.output_tokens == 5
    assert orjson.loads(reply.body)["choices"][0]["finish_reason"] == "length"


async def test_an_openai_stream_contains_the_text_of_the_whole_answer():
    made = await backend()
    request = {"seed": 1, "stream_options": {"include_usage": True}}
    reply = await made.send(openai(stream=True, **request), Timings())
    sent = await frames(reply)
    assert sent[-1] == b"data: [DONE]\n\n"
    chunks = [data_of(frame) for frame in sent[:-1]]
    assert chunks[-1]["choices"] == []
    assert reply.usage == Usage(chunks[-1]["usage"]["prompt_tokens"], chunks[-1]["usage"]["completion_tokens"])
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks[:-1])
    assert len(text) == pytest.approx(reply.usage.output_tokens * 3.5, rel=0.1)
    assert made.provider.counts.ended == {"answered": 1}


@pytest.mark.parametrize("incremental", [True, False])
async def test_a_native_frame_contains_the_new_text_or_the_whole_text_so_far(incremental):
    reply = await (await backend()).send(native(stream=True, incremental_output=incremental), Timings())
    sent = await frames(reply)
    assert [frame.split(b"\n")[0] for frame in sent] == [b"id:%d" % number for number in range(1, len(sent) + 1)]
    contents = [data_of(frame)["output"]["choices"][0]["message"]["content"] for frame in sent]
    texts = [content[0]["text"] if content else "" for content in contents]
    whole = "".join(texts) if incremental else texts[-1]
    assert len(whole) == pytest.approx(reply.usage.output_tokens * 3.5, rel=0.1)
    if not incremental:
        assert all(later.startswith(before) for before, later in pairwise(texts))


@pytest.mark.parametrize("dialect", REQUESTS)
@pytest.mark.parametrize(
    ("profile", "error", "kind"),
    [
        ({"requests_per_second": 0.001}, Throttled, "request_rate"),
        ({"tokens_per_second": 0.001, "burst_tokens": 1.0}, Throttled, "token_rate"),
        ({"growth_base_per_second": 1.0}, Throttled, "growth"),
        ({"requests_per_second": 0.001, "vague_refusals": True}, Throttled, "unknown"),
        ({"outages": ((0.0, 99.0),), "outage_status": 503}, Throttled, "capacity"),
        ({"outages": ((0.0, 99.0),), "outage_status": 500}, ServerFailed, None),
        ({"outages": ((0.0, 99.0),)}, Unreachable, None),
        ({"billing_refused": True}, BillingRefused, None),
        ({"error_share": 1.0}, ServerFailed, None),
        ({"reset_share": 1.0}, Unreachable, None),
        ({"moderation_share": 1.0}, Rejected, None),
    ],
)
async def test_each_refusal_and_each_failure_raises_the_right_error(dialect, profile, error, kind):
    made = await backend(**profile)
    with pytest.raises(error) as raised:
        for _ in range(2):  # the quotas accept the first request
            await made.send(REQUESTS[dialect](), Timings())
    if kind is not None:
        assert raised.value.kind == kind
    assert made.provider.counts.in_flight == 0


@pytest.mark.parametrize("dialect", REQUESTS)
async def test_a_request_above_the_concurrency_is_refused_and_cancelling_frees_the_permit_at_once(dialect):
    made = await backend(concurrency=1, latency_seconds=60)
    first = asyncio.create_task(made.send(REQUESTS[dialect](), Timings()))
    await asyncio.sleep(0)
    with pytest.raises(Throttled) as raised:
        await made.send(REQUESTS[dialect](), Timings())
    assert raised.value.kind == "concurrency"
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert made.provider.counts.in_flight == 0
    assert made.provider.counts.ended == {"cancelled": 1}


@pytest.mark.parametrize("dialect", REQUESTS)
async def test_a_refusal_inside_a_200_stream_is_raised_like_any_other_refusal(dialect):
    made = await backend(requests_per_second=0.001, in_stream_errors=True)
    await frames(await made.send(REQUESTS[dialect](stream=True), Timings()))
    with pytest.raises(Throttled) as raised:
        await made.send(REQUESTS[dialect](stream=True), Timings())
    assert raised.value.kind == "request_rate"


@pytest.mark.parametrize("dialect", REQUESTS)
async def test_an_error_after_some_content_is_forwarded_and_recorded(dialect):
    made = await backend(error_share=1.0, in_stream_errors=True)
    reply = await made.send(REQUESTS[dialect](stream=True), Timings())
    sent = await frames(reply)
    assert len(sent) > 2
    assert isinstance(reply.failure, ServerFailed)
    assert reply.usage is None
    assert made.provider.counts.ended == {"error": 1}


async def test_a_stream_that_is_reset_half_way_raises_unreachable():
    made = await backend(reset_share=1.0)
    reply = await made.send(openai(stream=True), Timings())
    with pytest.raises(Unreachable):
        await frames(reply)
    assert made.provider.counts.ended == {"reset": 1}


@pytest.mark.parametrize("begun", [True, False])
async def test_closing_an_unfinished_stream_returns_its_permit(begun):
    made = await backend()
    reply = await made.send(openai(stream=True), Timings())
    if begun:
        await anext(reply.chunks)
    assert made.provider.counts.in_flight == 1
    await reply.aclose()
    assert made.provider.counts.in_flight == 0
    assert made.provider.counts.ended == {"cancelled": 1}


async def test_retry_after_can_be_honest_or_wrong():
    for retry_after, seconds in (("honest", 100.0), ("1665", 1665.0)):
        made = await backend(requests_per_second=0.01, retry_after=retry_after)
        await made.send(openai(), Timings())
        with pytest.raises(Throttled) as raised:
            await made.send(openai(), Timings())
        assert raised.value.retry_after == seconds


async def test_a_request_waits_at_the_provider_instead_of_a_growth_refusal_if_its_header_asks_for_it():
    made = await backend(growth_base_per_second=1.0)
    await made.send(native(), Timings())
    with pytest.raises(Throttled):
        await made.send(native(), Timings())
    reply = await made.send(native(headers={"X-DashScope-Wait-Timeout": "5"}), Timings())
    assert reply.status == 200


async def test_each_model_has_its_own_quota_and_several_backends_can_share_one_account():
    provider = Provider(Profile(requests_per_second=0.001), history=10)
    first, second = SimulatedBackend(provider), SimulatedBackend(provider)
    await first.send(openai(), Timings())
    await first.send(openai(model="qwen-vl-max"), Timings())
    with pytest.raises(Throttled):
        await second.send(openai(), Timings())
    assert [decision for _, decision in provider.history] == ["accepted", "accepted", "request_rate"]


async def test_a_changed_profile_applies_at_once_and_the_used_quota_stays_used():
    made = await backend(requests_per_second=0.001)
    await made.send(openai(), Timings())
    made.provider.change(Profile(requests_per_second=0.002))
    with pytest.raises(Throttled):
        await made.send(openai(), Timings())
    made.provider.change(Profile())
    assert (await made.send(openai(), Timings())).status == 200


async def test_an_echo_reports_the_received_request_without_the_key():
    request = openai(simulate={"echo": True, "input_tokens": 7, "output_tokens": 3})
    request = Request("openai", "/x", request.body, "m", headers={"Authorization": "Bearer sk-secret", "X-A": "1"})
    reply = await (await backend()).send(request, Timings())
    echo = orjson.loads(reply.body)["echo"]
    assert echo["sha256"] == hashlib.sha256(request.body).hexdigest()
    assert echo["headers"] == {"authorization": "(hidden)", "x-a": "1"}
    assert reply.usage == Usage(7, 3)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"model":1,"messages":[{}]}',
        b'{"model":"m"}',
        b'{"model":"m","messages":[]}',
        b'{"model":"m","messages":"hello"}',
    ],
)
async def test_an_invalid_body_is_rejected(body):
    made = await backend()
    with pytest.raises(Rejected):
        await made.send(Request("openai", "/x", body, ""), Timings())
    assert made.provider.counts.ended == {"invalid": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": ["hello"]},
        {"messages": [{"content": ["hello", 1, None]}]},
        {"messages": [{"content": [{"image_url": {"url": IMAGE}, "min_pixels": "few", "max_pixels": -1}]}]},
        {"simulate": {"input_tokens": "many", "output_tokens": []}},
        {"max_tokens": "all"},
    ],
)
async def test_unknown_values_in_a_body_are_ignored(fields):
    assert (await (await backend()).send(openai(**fields), Timings())).status == 200


async def test_the_same_seed_gives_the_same_outcomes():
    async def outcomes(seed: int) -> list[str]:
        made = await backend(error_share=0.5, seed=seed)
        results = await asyncio.gather(*(made.send(openai(), Timings()) for _ in range(40)), return_exceptions=True)
        return [type(result).__name__ for result in results]

    assert await outcomes(1) == await outcomes(1) != await outcomes(2)
