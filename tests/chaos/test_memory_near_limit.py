"""Bodies that come in faster than they can be served are refused before the kernel would kill the process."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter

import aiohttp
from running import BOUND, CHAT, IMAGE_URL, Process, chat

MIB = 1024 * 1024
BODY = json.dumps(chat()).encode().replace(IMAGE_URL.encode(), IMAGE_URL.encode() + b"A" * (13 * MIB))
HEAD = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
UPLOADS = 40
#: All of them are 520 MiB.
QUEUE_BYTES = 64 * MIB
#: What may be had above what the process has when idle: the bound, and as much for read buffers and the allocator's
#: holes. Without a bound it would be six times as much.
HEADROOM = 2 * QUEUE_BYTES + 32 * MIB


def allow(pid: int, more: int) -> None:
    """Let the process have so many bytes of memory more than it has; what asks for more gets `MemoryError`."""
    with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
        has = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.prlimit(pid, resource.RLIMIT_DATA, (has + more, has + more))


async def upload(port: int, whole: asyncio.Event) -> tuple[int, bytes]:
    """Send all of a body but its end, and that when `whole` is set; status and answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(HEAD % (CHAT.encode(), len(BODY)))
        answered = asyncio.ensure_future(reader.read())
        for at in range(0, len(BODY) - 10, MIB):
            writer.write(BODY[at : min(at + MIB, len(BODY) - 10)])
            await writer.drain()
            if answered.done():
                break
        else:
            waiting = asyncio.ensure_future(whole.wait())
            await asyncio.wait((answered, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            writer.write(BODY[-10:])
        answer = await answered
        return int(answer.split(b" ", 2)[1]) if answer else 0, answer
    except ConnectionError:  # refused, and closed while we were sending
        return 0, b""
    finally:
        writer.close()


async def test_slow_uploads_are_refused_in_sum_before_memory_ends(scripted):
    upstream = await scripted()
    options = ("--dashscope-url", f"{upstream.origin}/v1", "--queue-bytes", str(QUEUE_BYTES), "--max-concurrency", "1")
    async with Process(*options) as process, aiohttp.ClientSession() as client:
        allow(process.process.pid, HEADROOM)
        whole = asyncio.Event()
        uploads = [asyncio.ensure_future(upload(process.port, whole)) for _ in range(UPLOADS)]
        fit = QUEUE_BYTES // len(BODY)
        async with asyncio.timeout(BOUND):
            while sum(one.done() for one in uploads) < UPLOADS - fit:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        async with client.get(f"{process.admin_url}/livez") as response:
            assert response.status == 200
        async with client.post(process.url + CHAT, json=chat()) as response:  # which is small, and finds room
            assert response.status == 200
        whole.set()
        ends = await asyncio.wait_for(asyncio.gather(*uploads), BOUND)
        async with client.post(process.url + CHAT, data=BODY) as response:  # all is given back
            assert response.status == 200, await response.text()
        assert "MemoryError" not in process.log
        assert "defect" not in process.log
    statuses = Counter(status for status, _ in ends)
    assert statuses[200] == fit, statuses
    assert set(statuses) <= {200, 503, 0}, statuses
    refused = [answer for status, answer in ends if status == 503]
    assert refused
    assert all(b'"queue_full"' in answer and b"Retry-After: " in answer for answer in refused)


async def test_uploads_that_stall_give_way_to_those_that_come(serving, scripted, monkeypatch):
    """One caller that never finishes must not shut the others out until its deadline."""
    monkeypatch.setattr("sidecar.admission.arrivals.STALLED_SECONDS", 0.2)
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", queue_bytes=4 * MIB)
    admission = sidecar.sidecar.admission
    head = HEAD % (CHAT.encode(), 10 * MIB)
    stalled = []
    for _ in range(4):
        stalled.append(await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port))
        stalled[-1][1].write(head + b"{" * (MIB - 1024))
    await sidecar.until(lambda: admission.arriving_bytes() == 4 * MIB - 4096)
    frame = chat()
    frame["messages"][0]["content"][0]["image_url"]["url"] += "A" * (2 * MIB)
    async with sidecar.post(frame) as response:  # nobody has stalled for long yet
        assert response.status == 503
    await asyncio.sleep(0.3)
    async with sidecar.post(frame) as response:
        assert response.status == 200, await response.text()
    ends = [await asyncio.wait_for(reader.read(), BOUND) for reader, _ in stalled[:2]]
    assert all(b"gave way to others" in end and b" 503 " in end for end in ends), "the first have had to"
    assert admission.arriving_bytes() == 2 * (MIB - 1024), "no more than were needed"
    for _, writer in stalled:
        writer.transport.abort()
    await sidecar.until(sidecar.at_rest)
    assert admission.arriving_bytes() == 0
