"""How long a stream may take: until its first content, between two pieces of content, and as a whole."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from running import chat

from sidecar.dispatch.stream_bounds import StreamBounds, StreamSettings

pytestmark = pytest.mark.http

#: Seconds between two pieces of a steady stream.
STEP = 0.05
DONE = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


def event(text, **fields):
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}], **fields}).encode() + b"\n\n"


EMPTY = [b": still here\n\n", event(""), b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n']


class Streaming:
    """A provider that sends `first`, and then each of `then` in a circle until the caller goes or `steps` are sent."""

    def __init__(self, *first, then=(), steps=None, end=DONE):
        self.first, self.then, self.steps, self.end = first, then, steps, end
        self.left = asyncio.Event()

    async def __call__(self, link, _):
        await link.start_stream()
        for piece in self.first:
            await link.chunk(piece)
        gone = asyncio.ensure_future(link.gone())
        step = 0
        while not gone.done() and step != self.steps:
            await asyncio.wait([gone], timeout=STEP)
            if self.then and not gone.done():
                await link.chunk(self.then[step % len(self.then)])
                step += 1
        if gone.done():
            self.left.set()
        else:
            gone.cancel()
            await link.chunk(self.end)
            await link.chunk(b"")
            link.is_open = False
            link.close()


async def read(sidecar, path="/v1/chat/completions", body=None, **headers):
    """Return the whole stream and how many seconds it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with sidecar.post(chat(stream=True) if body is None else body, path, headers=headers) as response:
        assert response.status == 200
        return await response.read(), loop.time() - began


def last_error(text):
    """Return the error in the last event of an OpenAI stream. Every event must be one that a client can read."""
    *_, last = [part for part in text.split(b"\n\n") if part]
    return json.loads(last.removeprefix(b"data: "))["error"]


async def outcomes(sidecar):
    await sidecar.until(sidecar.at_rest)
    metrics = await sidecar.metrics()
    names = ("sidecar_requests_total", "sidecar_upstream_attempts_total")
    return {name.split('="')[-1][:-2]: value for name, value in metrics.items() if name.startswith(names)}


async def test_the_deadline_does_not_cut_a_stream_that_keeps_sending_content(serving, scripted):
    upstream = await scripted(Streaming(event("A"), then=[event(" word")], steps=16))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", deadline=0.3)
    text, seconds = await read(sidecar)
    assert text == event("A") + event(" word") * 16 + DONE
    assert seconds > 0.6
    assert await outcomes(sidecar) == {"ok": 1}


@pytest.mark.parametrize("then", [(), EMPTY], ids=["silence", "comments and empty pieces"])
async def test_a_stream_that_stalls_after_its_first_word_ends_with_an_error_and_frees_its_permit(
    serving, scripted, then
):
    streaming = Streaming(event("A"), then=then)
    upstream = await scripted(streaming)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", stream_idle=0.3)
    text, seconds = await read(sidecar)
    assert text.startswith(event("A"))
    error = last_error(text)
    assert error["code"] == "deadline_exceeded"
    assert "0.3 s" in error["message"]
    assert "SIDECAR_STREAM_IDLE" in error["message"]
    assert 0.25 < seconds < 3
    await asyncio.wait_for(streaming.left.wait(), 5)
    await sidecar.until(sidecar.at_rest)
    assert await outcomes(sidecar) == {"deadline": 1, "timeout": 1}


async def test_a_stream_that_stalls_in_the_middle_of_an_event_ends_with_a_whole_error_event(serving, scripted):
    upstream = await scripted(Streaming(event("A"), event(" long word")[:30]))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", stream_idle=0.2)
    text, _ = await read(sidecar)
    assert text.startswith(event("A") + event(" long word")[:30] + b"\n\n")
    assert last_error(text)["code"] == "deadline_exceeded"


async def test_no_stream_takes_longer_than_its_maximum(serving, scripted):
    streaming = Streaming(event("A"), then=[event(" word")])
    upstream = await scripted(streaming)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", stream_max=0.5)
    text, seconds = await read(sidecar)
    assert "SIDECAR_STREAM_MAX" in last_error(text)["message"]
    assert 0.45 < seconds < 3
    await asyncio.wait_for(streaming.left.wait(), 5)
    assert await outcomes(sidecar) == {"deadline": 1, "timeout": 1}


async def test_x_request_timeout_is_the_whole_budget_of_a_stream(serving, scripted):
    upstream = await scripted(Streaming(event("A"), then=[event(" word")]))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", deadline=0.5)
    for given in ("0.5", "99"):  # never more than SIDECAR_DEADLINE
        text, seconds = await read(sidecar, **{"X-Request-Timeout": given})
        assert "X-Request-Timeout" in last_error(text)["message"]
        assert 0.45 < seconds < 3


async def test_a_native_caller_of_an_openai_upstream_gets_the_bound_as_a_native_error_event(serving, scripted):
    upstream = await scripted(Streaming(event("A gate.")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", stream_idle=0.2)
    body = {"model": "m", "input": {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}}
    path = "/api/v1/services/aigc/multimodal-generation/generation"
    text, _ = await read(sidecar, path, body, **{"X-DashScope-SSE": "enable"})
    first, last = [part for part in text.split(b"\n\n") if part]
    assert b"A gate." in first
    assert last.startswith(b"event:error\nstatus:504\n:HTTP_STATUS/504\ndata:")
    assert json.loads(last.partition(b"data:")[2])["code"] == "deadline_exceeded"


async def test_a_stream_that_stalls_does_not_make_the_next_requests_wait(serving, scripted):
    upstream = await scripted(Streaming(event("A")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", stream_idle=0.2, max_concurrency=1)
    for answer in await asyncio.gather(*(read(sidecar) for _ in range(3))):
        assert last_error(answer[0])["code"] == "deadline_exceeded"
    assert len(upstream.seen) == 3


async def test_the_official_client_raises_the_error_of_a_stalled_stream(serving, scripted):
    upstream = await scripted(Streaming(event("A gate")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", stream_idle=0.2)
    async with openai.AsyncOpenAI(base_url=f"{sidecar.url}/v1", api_key="unused", max_retries=0) as client:
        stream = await client.chat.completions.create(**chat(stream=True))
        words = []
        with pytest.raises(openai.APIError, match="SIDECAR_STREAM_IDLE"):
            async for piece in stream:
                words.append(piece.choices[0].delta.content)  # noqa: PERF401  those before the error
    assert words == ["A gate"]


async def test_a_drain_that_times_out_ends_a_stream_that_is_within_its_bounds(serving, scripted):
    upstream = await scripted(Streaming(event("A"), then=[event(" word")]))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post(chat(stream=True)) as response:
        await response.content.readany()
        sidecar.sidecar.drain()
        sidecar.sidecar.data.abort_all()  # what the end of SIDECAR_DRAIN_TIMEOUT does
        text = await response.read()
    assert last_error(text)["code"] == "draining"


class Noted:
    content_at: float | None = None


@pytest.mark.parametrize(
    ("now", "content_at", "budget", "look", "why"),
    [
        (10.0, None, False, 15.0, ""),
        (68.0, None, False, 70.0, ""),
        (70.0, None, False, 70.0, "deadline"),
        (12.0, 11.0, False, 16.0, ""),
        (16.0, 11.0, False, 16.0, "STREAM_IDLE"),
        (99.0, 98.0, False, 103.0, ""),
        (109.0, 108.0, False, 110.0, ""),
        (110.0, 109.0, False, 110.0, "STREAM_MAX"),
        (69.0, 68.0, True, 70.0, ""),
    ],
)
@pytest.mark.internal_http
def test_when_a_stream_is_looked_at_again(now, content_at, budget, look, why):
    """The stream began at 10 s, its deadline is at 70 s; 5 s without content and 100 s as a whole are allowed."""
    noted = Noted()
    noted.content_at = content_at
    bounds = StreamBounds(StreamSettings(5.0, 100.0, budget), noted, began=10.0, deadline=70.0)
    assert bounds.next_look(now) == look
    if look <= now:
        assert why in (bounds.reason("x") or "deadline")
