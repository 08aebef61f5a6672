"""Ended requests leave no reference cycles: a full garbage collection of many objects would stop the event loop."""

from __future__ import annotations

import asyncio
import gc

import pytest
from running import chat
from scripted_upstream import CHAT_ANSWER, Upstream


async def script(link, seen):
    if b"nothing" in seen.body:
        await link.gone()
    elif b"reset" in seen.body:
        link.reset()
    elif b"refuse" in seen.body:
        await link.answer({"error": {"message": "no", "code": "limit_requests"}}, status=429)
    elif b"stream" in seen.body:
        await link.start_stream()
        await link.chunk(b'data: {"choices":[{"index":0,"delta":{"content":"A gate."}}]}\n\ndata: [DONE]\n\n')
        await link.chunk(b"")
    else:
        await link.answer(CHAT_ANSWER)


@pytest.mark.parametrize("text", ["answer", "stream", "refuse", "reset", "nothing", "nothing, and the caller leaves"])
async def test_ended_requests_leave_nothing_of_ours_to_the_garbage_collector(serving, text):
    body = chat(text, stream=text == "stream")

    async def ask(sidecar, number):
        headers = {"X-Camera-Id": f"camera-{number}", "X-Request-Timeout": "0.2"}
        post = sidecar.post(body, headers=headers)
        try:
            async with asyncio.timeout(0.1 if "leaves" in text else None), post as response:
                await response.read()
        except TimeoutError:
            pass

    async with Upstream(script) as upstream:
        sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await asyncio.gather(*(ask(sidecar, number) for number in range(20)))
            await sidecar.until(sidecar.at_rest)
            gc.collect()
            modules = {type(left).__module__ for left in gc.garbage}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not {name for name in modules if name.startswith(("sidecar", "backends"))}
