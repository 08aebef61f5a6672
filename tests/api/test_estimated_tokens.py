"""Every generation is counted in LLM tokens: as the provider reports them, or as an estimate."""

from __future__ import annotations

import asyncio
import json

import pytest
from running import chat
from scripted_upstream import CHAT_ANSWER

from backends.remote.answers import output_bytes_of
from backends.remote.output_meter import OutputMeter

#: About 4 characters per LLM token, and one LLM token per event, as vLLM streams.
WORDS = ["The ", "white ", "van ", "is ", "par", "ked ", "in ", "front ", "of ", "the ", "gate. ", "No", " one "] * 10
CHINESE = ["白色", "面包车", "停在", "大门", "前面", "没有", "人", "。"] * 10


def event(text, *, role="", ascii_only=False):
    delta = {"content": text, **({"role": role} if role else {})}
    data = {"id": "chatcmpl-9", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    return b"data: " + json.dumps(data, ensure_ascii=ascii_only).encode() + b"\n\n"


END = b'data: {"id":"chatcmpl-9","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1225,"completion_tokens":130,"total_tokens":1355}}\n\n'


def streaming(*pieces, hold=None):
    async def script(link, _):
        await link.start_stream()
        for piece in pieces:
            await link.chunk(piece)
        if hold is not None:
            await link.gone()
            hold.set()
        else:
            await link.chunk(b"")

    return script


async def counted(sidecar):
    """Return the LLM tokens by who has counted them and by kind."""
    await sidecar.until(sidecar.at_rest)
    found = {}
    for name, value in (await sidecar.metrics()).items():
        if name.startswith("sidecar_tokens_total"):
            labels = dict(part.split("=") for part in name.partition("{")[2][:-1].replace('"', "").split(","))
            found[labels["counted"], labels["kind"]] = value
    return found


async def stream(serving, scripted, script, **settings):
    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", **settings)
    async with sidecar.post(chat(stream=True)) as response:
        await response.read()
    return await counted(sidecar)


@pytest.mark.parametrize(
    ("words", "together", "ascii_only"),
    [(WORDS, 1, False), (WORDS, 6, False), (CHINESE, 1, False), (CHINESE, 4, False), (CHINESE, 4, True)],
)
async def test_a_stream_without_usage_is_counted_as_an_estimate(serving, scripted, words, together, ascii_only):
    """However the provider divides its text into events, and with or without escapes: within a factor of two."""
    pieces = [
        event("".join(words[at : at + together]), role="" if at else "assistant", ascii_only=ascii_only)
        for at in range(0, len(words), together)
    ]
    found = await stream(serving, scripted, streaming(*pieces, END, DONE))
    assert set(found) == {("estimate", "input"), ("estimate", "output")}
    assert len(words) / 2 <= found["estimate", "output"] <= len(words) * 2
    assert found["estimate", "input"] > 5


async def test_the_providers_count_takes_the_place_of_the_estimate(serving, scripted):
    found = await stream(serving, scripted, streaming(*map(event, WORDS), END, USAGE, DONE))
    assert found == {("provider", "input"): 1225, ("provider", "output"): 130}


async def test_a_stream_that_stalls_is_counted(serving, scripted):
    hold = asyncio.Event()
    found = await stream(serving, scripted, streaming(*map(event, WORDS), hold=hold), stream_idle=0.2)
    assert 65 <= found["estimate", "output"] <= 260
    await asyncio.wait_for(hold.wait(), 5)


async def test_a_stream_whose_caller_leaves_is_counted(serving, scripted):
    hold = asyncio.Event()
    upstream = await scripted(streaming(b"".join(map(event, WORDS)), hold=hold))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    response = await sidecar.post(chat(stream=True))
    await response.content.readexactly(len(b"".join(map(event, WORDS))))
    response.close()
    await asyncio.wait_for(hold.wait(), 5)
    found = await counted(sidecar)
    assert 65 <= found["estimate", "output"] <= 260


async def test_a_stream_with_an_error_after_its_content_is_counted(serving, scripted):
    error = b'data: {"error":{"message":"An internal error","code":"internal_error"}}\n\n'
    found = await stream(serving, scripted, streaming(*map(event, WORDS), error))
    assert 65 <= found["estimate", "output"] <= 260


async def test_a_stream_whose_provider_breaks_off_is_counted(serving, scripted):
    found = await stream(serving, scripted, streaming(*map(event, WORDS)))
    assert 65 <= found["estimate", "output"] <= 260


@pytest.mark.parametrize("native", [False, True])
async def test_a_whole_answer_without_usage_is_counted_as_an_estimate(serving, scripted, native):
    answer = {**CHAT_ANSWER, "choices": [{"message": {"content": "".join(WORDS)}, "finish_reason": "stop"}]}
    del answer["usage"]

    async def script(link, _):
        await link.answer(answer)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    body = {"model": "m", "input": {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}}
    path = "/api/v1/services/aigc/multimodal-generation/generation"
    async with sidecar.post(body, path) if native else sidecar.post() as response:
        assert response.status == 200
    found = await counted(sidecar)
    assert set(found) == {("estimate", "input"), ("estimate", "output")}
    assert 65 <= found["estimate", "output"] <= 260


async def test_a_refused_request_costs_nothing(serving, scripted):
    async def script(link, _):
        await link.answer({"error": {"message": "no", "code": "bad_image"}}, 400)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post() as response:
        assert response.status == 400
    assert await counted(sidecar) == {}


def test_few_events_are_parsed_and_empty_ones_are_no_content():
    parsed = []
    now = 0.0

    def bytes_of(payload):
        parsed.append(payload)
        return output_bytes_of(payload)

    meter = OutputMeter(lambda: now, bytes_of)
    for number in range(500):
        now = number / 100
        meter.feed(event("four"))
    assert len(parsed) <= 6, "the first, and one per second"
    assert meter.output_bytes == pytest.approx(2000, rel=0.01)
    assert meter.progress.content_at == now
    for _ in range(500):
        now += 0.01
        meter.feed(event(""))
        meter.feed(b": ping\n\n")
    assert meter.progress.content_at < 4.99 + 1.01
