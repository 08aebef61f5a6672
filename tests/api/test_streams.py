"""Streams that fail after their first byte: the caller gets one error in the stream, and no request is sent twice."""

from __future__ import annotations

import asyncio

import pytest
from running import chat

pytestmark = pytest.mark.http

ERROR = b'data: {"error":{"message":"An internal error","code":"internal_error","type":"internal_error"}}\n\n'


def event(text):
    return b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode()


async def stream_of(sidecar):
    async with sidecar.post(chat(stream=True)) as response:
        assert response.status == 200
        return await response.read()


async def test_an_error_within_the_stream_is_forwarded_once_and_counted(serving, scripted):
    async def script(link, _):
        await link.start_stream()
        await link.chunk(event("A gate."))
        await link.chunk(ERROR)
        await link.chunk(b"")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    assert await stream_of(sidecar) == event("A gate.") + ERROR
    assert len(upstream.seen) == 1
    await sidecar.until(sidecar.at_rest)
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="openai",backend="dashscope",outcome="error"}'] == 1
    assert metrics['sidecar_upstream_attempts_total{backend="dashscope",result="server_error"}'] == 1


async def test_a_connection_that_breaks_within_the_stream_gives_an_error_and_no_retry(serving, scripted):
    async def script(link, _):
        await link.start_stream()
        await link.chunk(event("A gate."))
        await asyncio.sleep(0.05)  # the first chunk must arrive before the reset, which would discard it
        link.reset()

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    text = await stream_of(sidecar)
    assert text.startswith(event("A gate."))
    assert text.count(b'"code":"upstream_error"') == 1
    assert b"[DONE]" not in text
    assert len(upstream.seen) == 1
    await sidecar.until(sidecar.at_rest)


@pytest.mark.parametrize("code", ["limit_requests", "limit_burst_rate"])
async def test_after_a_refusal_before_a_streams_first_content_the_request_is_sent_again(serving, scripted, code):
    answers = 0

    async def script(link, _):
        nonlocal answers
        answers += 1
        await link.start_stream()
        if answers == 1:
            await link.chunk(
                b'data: {"error":{"message":"Requests rate limit exceeded","code":"%b"}}\n\n' % code.encode()
            )
        else:
            await link.chunk(event("A gate.") + b"data: [DONE]\n\n")
        await link.chunk(b"")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    assert await stream_of(sidecar) == event("A gate.") + b"data: [DONE]\n\n"
    assert len(upstream.seen) == 2


async def test_a_slow_reader_slows_the_provider_and_does_not_fill_memory(serving, scripted):
    """A caller stops reading a stream of 40 MB: the provider can send only as much as the socket buffers hold."""
    sent = 0
    piece = event("x" * 65_000)

    async def script(link, _):
        nonlocal sent
        await link.start_stream()
        while sent < 40_000_000:
            await link.chunk(piece)
            sent += len(piece)
        await link.chunk(b"")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post(chat(stream=True)) as response:
        await response.content.readany()
        before = -1
        while sent > before:  # until the provider can write no more
            before = sent
            await asyncio.sleep(0.3)
        assert sent < 20_000_000
        size = 0
        while data := await response.content.readany():
            size += len(data)
        assert sent >= 40_000_000
    await sidecar.until(sidecar.at_rest)


async def test_a_stream_whose_caller_stopped_reading_ends_at_its_deadline(serving, scripted):
    """The error is written for a caller that reads again, but the sidecar does not wait until it is read."""

    async def script(link, _):
        await link.start_stream()
        while True:
            await link.chunk(event("x" * 65_000))

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post(chat(stream=True), headers={"X-Request-Timeout": "1"}) as response:
        await response.content.readany()
        await sidecar.until(sidecar.at_rest)
        metrics = await sidecar.metrics()
        assert metrics['sidecar_requests_total{api="openai",backend="dashscope",outcome="deadline"}'] == 1
        *_, last = (await response.read()).split(b"\n\n", -1)[:-1]
        assert b"deadline_exceeded" in last


async def test_every_task_that_waits_until_idle_continues_when_the_last_request_ends(serving, scripted):
    """Two tasks wait at the same time, and again for the next request."""
    more = asyncio.Semaphore(0)

    async def script(link, _):
        await link.start_stream()
        await link.chunk(event("A gate."))
        await more.acquire()
        await link.chunk(b"")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    data = sidecar.sidecar.data
    async with asyncio.timeout(10):
        for _ in range(2):
            await data.wait_until_idle()
            async with sidecar.post(chat(stream=True)) as response:
                await response.content.readany()
                waiting = [asyncio.ensure_future(data.wait_until_idle()) for _ in range(2)]
                done, _ = await asyncio.wait(waiting, timeout=0.05)
                assert not done
                more.release()
                await asyncio.gather(*waiting)
