"""Bodies that arrive faster than they can be served are refused before the kernel would kill the process."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter

import aiohttp
import pytest
from running import BOUND, CHAT, IMAGE_URL, Process, chat

from sidecar.admission.admission import BODIES_SHARE

MIB = 1024 * 1024
BODY = json.dumps(chat()).encode().replace(IMAGE_URL.encode(), IMAGE_URL.encode() + b"A" * (13 * MIB))
HEAD = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
UPLOADS = 40
#: Bytes. All uploads together have 520 MiB.
QUEUE_BYTES = 64 * MIB
#: Bytes that the process may use in addition to its idle memory: QUEUE_BYTES for the bodies, the same again and 32 MiB
#: for read buffers and fragmentation. Without the queue bound, the process would need about six times as much.
HEADROOM = 2 * QUEUE_BYTES + 32 * MIB


def limit_memory(pid: int, additional_bytes: int) -> None:
    """Limit the process to its present data memory and `additional_bytes`. Beyond that it gets a `MemoryError`."""
    with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.prlimit(pid, resource.RLIMIT_DATA, (used + additional_bytes, used + additional_bytes))


async def upload(port: int, whole: asyncio.Event) -> tuple[int, bytes]:
    """Send a body except its last 10 bytes, and these when `whole` is set. Return status and answer."""
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
    except ConnectionError:  # the server refused and closed while the test was sending
        return 0, b""
    finally:
        writer.close()


@pytest.mark.alone
async def test_the_sum_of_slow_uploads_is_bounded_before_memory_runs_out(scripted):
    upstream = await scripted()
    options = ("--dashscope-url", f"{upstream.origin}/v1", "--queue-bytes", str(QUEUE_BYTES), "--max-concurrency", "1")
    async with Process(*options) as process, aiohttp.ClientSession() as client:
        limit_memory(process.process.pid, HEADROOM)
        whole = asyncio.Event()
        uploads = [asyncio.ensure_future(upload(process.port, whole)) for _ in range(UPLOADS)]
        fitting = QUEUE_BYTES // len(BODY)
        async with asyncio.timeout(BOUND):
            while sum(one.done() for one in uploads) < UPLOADS - fitting:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        async with client.get(f"{process.admin_url}/livez") as response:
            assert response.status == 200
        async with client.post(process.url + CHAT, json=chat()) as response:  # this small request fits
            assert response.status == 200
        whole.set()
        ends = await asyncio.wait_for(asyncio.gather(*uploads), BOUND)
        async with client.post(process.url + CHAT, data=BODY) as response:  # all memory is released
            assert response.status == 200, await response.text()
        assert "MemoryError" not in process.log
        assert "defect" not in process.log
    statuses = Counter(status for status, _ in ends)
    assert statuses[200] == fitting, statuses
    assert set(statuses) <= {200, 503, 0}, statuses
    refused = [answer for status, answer in ends if status == 503]
    assert refused
    assert all(b'"queue_full"' in answer and b"Retry-After: " in answer for answer in refused)


async def test_stalled_uploads_are_refused_when_others_need_the_space(serving, scripted, monkeypatch):
    """A caller that never finishes must not block the others until its deadline."""
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
    async with sidecar.post(frame) as response:  # no upload has stalled long enough yet
        assert response.status == 503
    await asyncio.sleep(0.3)
    async with sidecar.post(frame) as response:
        assert response.status == 200, await response.text()
    ends = [await asyncio.wait_for(reader.read(), BOUND) for reader, _ in stalled[:2]]
    assert all(b"gave way to others" in end and b" 503 " in end for end in ends), "the first two must be refused"
    assert admission.arriving_bytes() == 2 * (MIB - 1024), "no more uploads than necessary are refused"
    for _, writer in stalled:
        writer.transport.abort()
    await sidecar.until(sidecar.at_rest)
    assert admission.arriving_bytes() == 0


@pytest.mark.alone
async def test_the_sum_of_the_bodies_at_a_provider_that_never_answers_is_bounded(scripted):
    async def never(link, seen):
        await link.gone()

    upstream = await scripted(never)
    options = ("--dashscope-url", f"{upstream.origin}/v1", "--queue-bytes", str(QUEUE_BYTES))
    async with Process(*options) as process, aiohttp.ClientSession() as client:
        limit_memory(process.process.pid, HEADROOM + QUEUE_BYTES)  # in flight, and waiting or being received
        asks = [asyncio.ensure_future(ask(client, process.url)) for _ in range(UPLOADS)]
        waiting, in_flight = QUEUE_BYTES // len(BODY), int(BODIES_SHARE * QUEUE_BYTES) // len(BODY)
        async with asyncio.timeout(BOUND):
            while len(upstream.seen) < in_flight or sum(one.done() for one in asks) < UPLOADS - waiting - in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert len(upstream.seen) == in_flight
        async with client.get(f"{process.admin_url}/livez") as response:
            assert response.status == 200
        for one in asks:
            one.cancel()
        assert "MemoryError" not in process.log
        assert "defect" not in process.log


async def ask(client: aiohttp.ClientSession, url: str) -> int:
    async with client.post(url + CHAT, data=BODY) as response:
        return response.status
