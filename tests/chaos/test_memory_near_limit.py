"""Bodies that arrive faster than they can be served wait at their callers, before the kernel would kill the process."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter

import aiohttp
import pytest
from running import BOUND, CHAT, IMAGE_URL, Process, chat

MIB = 1024 * 1024
BODY = json.dumps(chat()).encode().replace(IMAGE_URL.encode(), IMAGE_URL.encode() + b"A" * (13 * MIB))
HEAD = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
UPLOADS = 40
#: Bytes. All uploads together have 520 MiB.
QUEUE_BYTES = 64 * MIB
#: Bytes that the process may use in addition to its idle memory: QUEUE_BYTES for the bodies that are received or wait,
#: the same for the bodies in flight, and 32 MiB for fragmentation. Without the bound, it would need 520 MiB and more.
HEADROOM = 2 * QUEUE_BYTES + 32 * MIB


def limit_memory(pid: int, additional_bytes: int) -> None:
    """Limit the process to its present data memory and `additional_bytes`. Beyond that it gets a `MemoryError`."""
    with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.prlimit(pid, resource.RLIMIT_DATA, (used + additional_bytes, used + additional_bytes))


@pytest.mark.alone
async def test_the_sum_of_many_uploads_is_bounded_and_all_are_answered(scripted):
    upstream = await scripted()
    options = ("--dashscope-url", f"{upstream.origin}/v1", "--queue-bytes", str(QUEUE_BYTES), "--max-concurrency", "1")
    async with Process(*options) as process, aiohttp.ClientSession() as client:
        limit_memory(process.process.pid, HEADROOM)
        uploads = [asyncio.ensure_future(ask(client, process.url)) for _ in range(UPLOADS)]
        async with client.get(f"{process.admin_url}/livez") as response:
            assert response.status == 200
        statuses = Counter(await asyncio.wait_for(asyncio.gather(*uploads), 3 * BOUND))
        async with client.post(process.url + CHAT, data=BODY) as response:  # all memory is released
            assert response.status == 200, await response.text()
        assert "MemoryError" not in process.log
        assert "defect" not in process.log
    assert set(statuses) <= {200, 503}, statuses  # 503 only behind a queue that is full of complete bodies
    assert statuses[200] >= QUEUE_BYTES // len(BODY) - 1, statuses


async def test_stalled_uploads_give_way_when_others_need_the_space(serving, scripted, monkeypatch):
    """A caller that never finishes must not block the others until its deadline."""
    monkeypatch.setattr("backends.byte_budget.STALLED_SECONDS", 0.2)
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", queue_bytes=16 * MIB)
    listener = sidecar.sidecar._data_listener
    head = HEAD % (CHAT.encode(), 10 * MIB)
    stalled = []
    for _ in range(3):
        stalled.append(await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port))
        stalled[-1][1].write(head + b"{" * (MIB - 1024))
    await sidecar.until(lambda: listener.budget.is_full)
    async with sidecar.post(chat()) as response:  # a usual frame passes
        assert response.status == 200, await response.text()
    frame = chat()
    frame["messages"][0]["content"][0]["image_url"]["url"] += "A" * (2 * MIB)
    async with sidecar.post(frame) as response:
        assert response.status == 200, await response.text()
    end = await asyncio.wait_for(stalled[0][0].read(), BOUND)
    assert b" 408 " in end and b'"request_timeout"' in end and b"SIDECAR_QUEUE_BYTES" in end
    for _, writer in stalled:
        writer.transport.abort()
    await sidecar.until(sidecar.at_rest)
    assert listener.budget.held_bytes == 0


@pytest.mark.alone
async def test_the_sum_of_the_bodies_at_a_provider_that_never_answers_is_bounded(scripted):
    async def never(link, seen):
        await link.gone()

    upstream = await scripted(never)
    options = ("--dashscope-url", f"{upstream.origin}/v1", "--queue-bytes", str(QUEUE_BYTES))
    async with Process(*options) as process, aiohttp.ClientSession() as client:
        limit_memory(process.process.pid, HEADROOM)
        asks = [asyncio.ensure_future(ask(client, process.url)) for _ in range(UPLOADS)]
        fitting = QUEUE_BYTES // 2 // len(BODY)  # the share of large bodies in flight. As many wait
        async with asyncio.timeout(BOUND):
            while len(upstream.seen) < fitting or sum(one.done() for one in asks) < UPLOADS - 2 * fitting:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert len(upstream.seen) == fitting
        async with client.get(f"{process.admin_url}/livez") as response:
            assert response.status == 200
        for one in asks:
            one.cancel()
        assert "MemoryError" not in process.log
        assert "defect" not in process.log


async def ask(client: aiohttp.ClientSession, url: str) -> int:
    async with client.post(url + CHAT, data=BODY) as response:
        return response.status
