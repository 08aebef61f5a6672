"""One request, end to end: what `make check` runs beside the tests in virtual time."""

from __future__ import annotations

import signal

import aiohttp
from running import CHAT, Process, chat, samples


async def test_the_sidecar_starts_answers_one_request_counts_it_and_drains(provider):
    url, simulated = await provider()
    async with Process("--dashscope-url", url) as process, aiohttp.ClientSession() as client:
        async with client.post(process.url + CHAT, json=chat()) as response:
            answer = await response.json()
            assert (response.status, answer["choices"][0]["message"]["role"]) == (200, "assistant")
            assert "queue;dur=" in response.headers["Server-Timing"]
        async with client.get(f"{process.admin_url}/metrics") as response:
            found = samples(await response.text())
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
    assert simulated.counts.accepted == 1
    assert found['sidecar_requests_total{api="openai",backend="dashscope",outcome="ok"}'] == 1
