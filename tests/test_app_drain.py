"""SIGTERM, SIGINT and `drain` with a real process under load: no accepted request is lost."""

from __future__ import annotations

import asyncio
import signal
import sys

import aiohttp
import pytest
from running import BOUND, CHAT, Process, chat


async def ask(client, process):
    async with client.post(process.url + CHAT, json=chat()) as response:
        body = await response.json()
        return response.status, body["error"]["code"] if "error" in body else "ok", response.headers


@pytest.fixture
async def client():
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(BOUND)) as session:
        yield session


async def in_flight(client, process, count):
    """Wait until `count` requests are in flight or queued."""
    async with asyncio.timeout(BOUND):
        while True:
            async with client.get(f"{process.admin_url}/status") as response:
                backend = (await response.json())["backends"][0]
            if backend["in_flight"] + backend["queue"]["requests"] == count:
                return
            await asyncio.sleep(0.01)


async def unready(client, process):
    """Wait until the process is not ready, and return the reason. It takes a moment after a signal."""
    async with asyncio.timeout(BOUND):
        while True:
            async with client.get(f"{process.admin_url}/readyz") as response:
                if response.status == 503:
                    return await response.text()
            await asyncio.sleep(0.01)


async def test_sigterm_with_8_in_flight_and_50_queued_loses_none(client, provider):
    url, simulated = await provider(latency_seconds=0.25)
    async with Process("--dashscope-url", url, "--max-concurrency", "8") as process:
        tasks = [asyncio.ensure_future(ask(client, process)) for _ in range(58)]
        await in_flight(client, process, 58)
        process.signal(signal.SIGTERM)
        assert await unready(client, process) == "draining\n"
        async with client.get(f"{process.admin_url}/livez") as response:
            assert response.status == 200
        status, code, headers = await ask(client, process)
        assert (status, code, headers["Retry-After"]) == (503, "draining", "1")
        assert headers["Connection"] == "close"
        async with client.get(f"{process.url}/health") as response:
            assert response.status == 503, "a load balancer that asks the data port must not send more"
        assert [answer[:2] for answer in await asyncio.gather(*tasks)] == [(200, "ok")] * 58
        assert await process.ended() == 0
        assert simulated.counts.ended["answered"] == 58


async def test_requests_longer_than_the_drain_timeout_get_an_answer(client, provider):
    url, simulated = await provider(latency_seconds=60)
    async with Process("--dashscope-url", url, "--max-concurrency", "2", "--drain-timeout", "0.5") as process:
        tasks = [asyncio.ensure_future(ask(client, process)) for _ in range(5)]
        await in_flight(client, process, 5)
        process.signal(signal.SIGTERM)
        assert [answer[:2] for answer in await asyncio.gather(*tasks)] == [(503, "draining")] * 5
        assert await process.ended() == 0
        assert simulated.counts.disconnects == 2


async def test_a_second_signal_ends_the_drain_immediately(client, provider):
    url, _ = await provider(latency_seconds=60)
    async with Process("--dashscope-url", url) as process:
        task = asyncio.ensure_future(ask(client, process))
        await in_flight(client, process, 1)
        process.signal(signal.SIGINT)
        async with asyncio.timeout(BOUND):
            while "draining" not in process.log:  # noqa: ASYNC110  only the log shows it
                await asyncio.sleep(0.01)
        process.signal(signal.SIGINT)
        assert (await task)[:2] == (503, "draining")
        assert await process.ended() == 0


async def test_a_started_stream_is_finished(client, provider):
    url, _ = await provider(answer_tokens=60, stream_tokens_per_second=60)
    async with (
        Process("--dashscope-url", url) as process,
        client.post(process.url + CHAT, json=chat(stream=True)) as response,
    ):
        await response.content.readany()
        process.signal(signal.SIGTERM)
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
        assert await process.ended() == 0


async def test_the_drain_command_waits_for_the_end(client, provider):
    url, _ = await provider(latency_seconds=1.0)
    async with Process("--dashscope-url", url) as process:
        task = asyncio.ensure_future(ask(client, process))
        await in_flight(client, process, 1)
        command = [sys.executable, "-m", "sidecar", "drain", "--admin-port", str(process.admin_port)]
        drain = await asyncio.create_subprocess_exec(*command)
        assert (await task)[0] == 200
        assert await drain.wait() == 0
        assert await process.ended() == 0
        late = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, text = await late.communicate()
        assert late.returncode == 1
        assert b"no sidecar answers" in text
