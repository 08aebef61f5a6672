"""Faults of a whole process: no descriptors left, killed under load, an upstream that restarts."""

from __future__ import annotations

import asyncio
import os
import resource
import signal

import aiohttp
from running import BOUND, CHAT, Process, chat


async def ask(client, url):
    async with client.post(url + CHAT, json=chat()) as response:
        await response.read()
        return response.status


async def status(client, url):
    """Send a request. Return the status, or 0 if the connection failed."""
    try:
        return await ask(client, url)
    except aiohttp.ClientError:
        return 0


async def test_after_running_out_of_descriptors_the_process_serves_again(provider):
    url, _ = await provider()
    async with Process("--dashscope-url", url) as process:
        pid = process.process.pid
        soft = len(os.listdir(f"/proc/{pid}/fd")) + 12  # noqa: PTH208
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, soft))
        held = [await asyncio.open_connection("127.0.0.1", process.port) for _ in range(40)]
        for _, writer in held:
            writer.transport.abort()
        async with asyncio.timeout(BOUND), aiohttp.ClientSession() as client:
            while await status(client, process.url) != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            async with client.get(f"{process.admin_url}/livez") as response:
                assert response.status == 200
        assert process.process.returncode is None
        assert len(process.log) < 20_000, "one fault must not flood the log"


async def test_a_process_killed_under_load_can_start_again_on_the_same_port(provider):
    url, simulated = await provider(latency_seconds=0.3)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as client:
        async with Process("--dashscope-url", url) as process:
            port = str(process.port)
            tasks = [asyncio.ensure_future(ask(client, process.url)) for _ in range(8)]
            async with asyncio.timeout(BOUND):
                while simulated.counts.in_flight < 8:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            process.signal(signal.SIGKILL)
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(end, aiohttp.ClientError) for end in ends), ends
            assert await process.ended() == -signal.SIGKILL
        async with asyncio.timeout(BOUND):  # the provider must see that the callers are gone
            while simulated.counts.in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with Process("--dashscope-url", url, "--port", port) as process:
            assert await ask(client, process.url) == 200


async def test_after_an_upstream_restarts_on_its_port_no_request_fails(scripted):
    """All pooled connections break at the same time, and every request still gets its answer."""
    upstream = await scripted()
    async with (
        Process("--dashscope-url", f"{upstream.origin}/v1") as process,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        for _ in range(3):
            assert await asyncio.gather(*(ask(client, process.url) for _ in range(6))) == [200] * 6
            upstream.drop()
