"""A request that fails releases its body at once, not only at the next garbage collection."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import tracemalloc

import aiohttp
import pytest
from running import CHAT, PNG, chat

BODY_BYTES, REQUESTS = 1_400_000, 8
#: A PNG with padding after its end, which every decoder ignores.
URL = "data:image/png;base64," + base64.b64encode(PNG + bytes(BODY_BYTES * 3 // 4)).decode()
CONTENT = [{"type": "image_url", "image_url": {"url": URL}}]
FIRST = b'data: {"choices":[{"index":0,"delta":{"content":"A"}}]}\n\n'


async def refuses(link, _):
    await link.answer({"error": {"message": "no"}}, status=400)


async def fails(link, _):
    await link.answer({"error": {"message": "broken"}}, status=500)


async def throttles(link, _):
    await link.answer({"error": {"message": "Requests rate limit exceeded", "code": "limit_requests"}}, status=429)


async def resets(link, _):
    link.writer.transport.abort()


async def breaks(link, _):
    await link.start_stream()
    await link.chunk(FIRST)
    link.writer.transport.abort()


async def errs_before_content(link, _):
    await link.start_stream()
    await link.chunk(b'data: {"error":{"message":"Invalid image","code":"invalid_parameter_error"}}\n\n')
    await link.chunk(b"")


async def errs_after_content(link, _):
    await link.start_stream()
    await link.chunk(FIRST)
    await link.chunk(b'data: {"error":{"message":"Invalid image","code":"invalid_parameter_error"}}\n\n')
    await link.chunk(b"")


async def stalls_and_errs(link, _):
    await link.start_stream()
    await asyncio.sleep(2.2)
    await link.chunk(b'data: {"error":{"message":"Invalid image","code":"invalid_parameter_error"}}\n\n')
    await link.chunk(b"")


async def ends_early(link, _):
    await link.start_stream()
    await link.chunk(FIRST)
    await link.chunk(b"")


async def holds_an_error(link, _):
    await link.answer({"choices": None, "error": {"message": "Invalid image", "code": "invalid_parameter_error"}})


async def holds_nothing(link, _):
    await link.answer({"choices": []})


async def hangs(link, _):
    await asyncio.Event().wait()


#: Scripts whose request asks for a stream.
STREAMS = (breaks, errs_before_content, errs_after_content, stalls_and_errs, ends_early)
WHOLE = (refuses, fails, throttles, resets, holds_an_error, holds_nothing, hangs)


@pytest.mark.parametrize(
    ("script", "timeout_seconds"),
    [*((script, 10) for script in (*WHOLE, *STREAMS)), (hangs, 0.3)],
    ids=[*(script.__name__ for script in (*WHOLE, *STREAMS)), "caller gone"],
)
async def test_no_body_waits_for_the_garbage_collector(serving, scripted, script, timeout_seconds):
    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", deadline=4 if script is stalls_and_errs else 1)
    fields = {"messages": [{"role": "user", "content": CONTENT}], "stream": script in STREAMS}
    body = json.dumps(chat(**fields)).encode()
    bound = aiohttp.ClientTimeout(timeout_seconds)

    async def ask():
        try:
            async with sidecar.client.post(sidecar.url + CHAT, data=body, timeout=bound) as response:
                await response.read()
        except TimeoutError:
            pass

    await ask()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        await asyncio.gather(*(ask() for _ in range(REQUESTS)))
        await sidecar.until(sidecar.at_rest)
        held, _ = tracemalloc.get_traced_memory()
        gc.collect()
        assert held - tracemalloc.get_traced_memory()[0] < BODY_BYTES
    finally:
        tracemalloc.stop()
        gc.enable()
