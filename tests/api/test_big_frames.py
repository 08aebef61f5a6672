"""A waiting request with a frame of 10 MB holds only one copy of the frame, in every API."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import tracemalloc

import pytest
from running import CHAT, PNG, chat

MB = 1 << 20
#: A PNG with padding after its end, which every decoder ignores.
IMAGE = base64.b64encode(PNG + bytes(10 * MB)).decode()
URL = f"data:image/png;base64,{IMAGE}"
BODIES = {
    CHAT: {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]}]},
    "/api/v1/services/aigc/multimodal-generation/generation": {
        "input": {"messages": [{"role": "user", "content": [{"image": URL}, {"text": "What?"}]}]}
    },
    "/api/inference/describe": {"image_b64": IMAGE},
    "/api/inference/crop-describe": {"image_b64": IMAGE, "max_crops": 0},
}


@pytest.mark.parametrize("path", BODIES)
async def test_a_frame_of_10_mb_is_held_once_while_it_waits_and_is_answered(serving, scripted, path):
    go = asyncio.Event()

    async def script(link, seen):
        await go.wait()
        answer = {"choices": [{"message": {"content": "A gate."}, "finish_reason": "stop"}], "output": {}}
        await link.answer(answer)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1", max_concurrency=1, deadline=15)
    body = json.dumps({"model": "m", **BODIES[path]}).encode()
    headers = {"Content-Type": "application/json"}

    async def ask(body: bytes, path: str) -> int:
        async with sidecar.client.post(sidecar.url + path, data=body, headers=headers) as response:
            return response.status

    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(ask(json.dumps(chat(model="m")).encode(), CHAT))
        await upstream.arrived.wait()
        tracemalloc.start()
        try:
            second = tasks.create_task(ask(body, path))
            await sidecar.until(lambda: sidecar.sidecar.admission.waiting() == 1)
            # Wait, because the thread that checked the body may still hold a reference to it.
            await sidecar.until(lambda: tracemalloc.get_traced_memory()[0] < 1.1 * len(body))
        finally:
            tracemalloc.stop()
        go.set()
    assert (first.result(), second.result()) == (200, 200)
    assert len(upstream.seen[1].body) > 10 * MB


async def test_a_body_that_is_being_parsed_is_counted_so_that_others_are_not_read(serving, scripted):
    """Large bodies take turns in one thread. Until then nothing else knows of them."""
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", queue_bytes=8 * MB, deadline=15)
    listener = sidecar.sidecar._data_listener
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 2 * MB}]}).encode()
    may_parse = threading.Event()
    sidecar.sidecar.data._parse_turns.thread.submit(may_parse.wait)

    async def ask() -> int:
        async with sidecar.client.post(sidecar.url + CHAT, data=body) as response:
            await response.read()
            return response.status

    try:
        asks = [asyncio.ensure_future(ask()) for _ in range(4)]
        await sidecar.until(lambda: listener.budget.held_bytes > len(body) and listener.budget.is_full)
        assert listener.budget.held_bytes < 2 * len(body)
    finally:
        may_parse.set()
    assert await asyncio.gather(*asks) == [200] * 4
    assert listener.budget.held_bytes == 0
