"""One camera that floods, sends huge requests or never reads its answers does not harm the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter

import aiohttp
import pytest
from running import CHAT, chat
from scripted_upstream import CHAT_ANSWER

from sidecar.admission import Ticket
from sidecar.admission.queue import FairQueue
from sidecar.api import call

SECONDS = 5.0


@pytest.mark.alone
async def test_a_camera_with_50_times_the_rate_does_not_slow_the_nine_others(serving, provider):
    url, _ = await provider(latency_seconds=0.05)
    sidecar = await serving(dashscope_url=url, requests_per_minute=40 * 60.0)
    ends: Counter[tuple[str, int]] = Counter()

    async def one(camera):
        headers = {"X-Camera-Id": camera, "X-Request-Timeout": "3"}
        async with sidecar.post(headers=headers) as response:
            await response.read()
            ends[camera, response.status] += 1

    async def send(camera, per_second):
        async with asyncio.TaskGroup() as group:
            for _ in range(int(SECONDS * per_second)):
                group.create_task(one(camera))
                await asyncio.sleep(1 / per_second)

    async with asyncio.TaskGroup() as group:
        group.create_task(send("flood", 100.0))
        for number in range(9):
            group.create_task(send(f"camera-{number}", 2.0))
    for number in range(9):
        assert ends[f"camera-{number}", 200] >= 0.95 * SECONDS * 2, ends
    assert ends["flood", 503] > 100, ends


async def test_callers_that_never_read_their_answers_do_not_hold_permits(serving, provider):
    url, simulated = await provider(answer_tokens=2000)
    sidecar = await serving(dashscope_url=url, max_concurrency=2)
    body = json.dumps(chat()).encode()
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    writers = []
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port, limit=1)
        writer.write(head % (CHAT.encode(), len(body)) + body)
        writers.append(writer)
    await sidecar.until(lambda: simulated.counts.ended["answered"] == 20)
    async with sidecar.post() as response:
        assert response.status == 200
    for writer in writers:
        writer.transport.abort()
    await sidecar.until(sidecar.at_rest)


@pytest.mark.http
@pytest.mark.parametrize("way", ["does not read", "reads a little"])
async def test_a_stream_whose_caller_is_slow_loses_its_permit_and_its_connection(serving, scripted, monkeypatch, way):
    monkeypatch.setattr(call, "SLOW_READER_SECONDS", 0.5)
    frame = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % (b"x" * 65_000)

    async def script(link, seen):
        if not json.loads(seen.body).get("stream"):
            await link.answer(CHAT_ANSWER)
            return
        await link.start_stream()
        while True:  # until the sidecar closes the connection
            await link.chunk(frame)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", max_concurrency=2)
    streams = [await sidecar.post(chat(stream=True)).__aenter__() for _ in range(2)]
    stop = asyncio.Event()

    async def read_a_little(stream):
        with contextlib.suppress(aiohttp.ClientError):
            while not stop.is_set():
                await stream.content.read(10)
                await asyncio.sleep(0.05)

    readers = [asyncio.create_task(read_a_little(stream)) for stream in streams if way == "reads a little"]
    async with sidecar.post() as response:  # it waits for a permit
        assert response.status == 200
    await sidecar.until(sidecar.at_rest)
    stop.set()
    await asyncio.gather(*readers)
    for stream in streams:
        with pytest.raises(aiohttp.ClientError):
            await stream.read()
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="openai",backend="dashscope",outcome="cancelled"}'] == 2


async def test_a_full_queue_fails_no_probe_and_answers_503_with_retry_after(serving, provider):
    url, _ = await provider(latency_seconds=1.0)
    sidecar = await serving(dashscope_url=url, max_concurrency=1, queue_size=5)
    tasks = [asyncio.ensure_future(sidecar.post().__aenter__()) for _ in range(6)]
    await sidecar.until(lambda: sidecar.sidecar.admission.waiting() == 5)
    async with sidecar.post() as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "queue_full")
        assert int(response.headers["Retry-After"]) >= 1
    for probe in ("livez", "readyz"):
        async with sidecar.client.get(f"{sidecar.admin_url}/{probe}") as response:
            assert response.status == 200
    for answer in await asyncio.gather(*tasks):
        assert answer.status == 200
        answer.release()
    await sidecar.until(sidecar.at_rest)


def test_huge_requests_of_one_camera_do_not_let_another_camera_starve_the_rest():
    """After a ticket of a million LLM tokens, every key still gets one or two typical tickets per turn."""
    queue = FairQueue()

    def add(key, count, tokens):
        for _ in range(count):
            queue.add(Ticket(now=0.0, deadline=60.0, key=key, tokens=tokens))

    add("flood", 1000, 10.0)
    add("monster", 3, 1_000_000.0)
    for number in range(9):
        add(f"camera-{number}", 20, 10.0)
    served: Counter[str] = Counter()
    for _ in range(400):
        ticket = queue.head()
        queue.take(ticket)
        served[ticket.key] += 1
    assert [served[f"camera-{number}"] for number in range(9)] == [20] * 9, served
