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


async def hangs(link, _):
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("script", "timeout_seconds"),
    [(refuses, 10), (fails, 10), (throttles, 10), (resets, 10), (breaks, 10), (hangs, 10), (hangs, 0.3)],
    ids=["refused", "failed", "throttled", "reset", "broken", "deadline", "caller gone"],
)
async def test_no_body_waits_for_the_garbage_collector(serving, scripted, script, timeout_seconds):
    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", deadline=1)
    fields = {"messages": [{"role": "user", "content": CONTENT}], "stream": script is breaks}
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
