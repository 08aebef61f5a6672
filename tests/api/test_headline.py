"""The purpose of the product: requests run concurrently, and a quota causes a wait instead of a 429."""

from __future__ import annotations

import asyncio
from statistics import mean

import pytest
from running import chat

pytestmark = pytest.mark.alone


async def ask(sidecar, camera, **options):
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with sidecar.post(chat(f"camera {camera}"), headers={"X-Camera-Id": f"{camera}"}, **options) as response:
        await response.read()
        return response.status, loop.time() - begun


async def test_ten_cameras_at_once_do_not_wait_for_each_other(serving, provider):
    url, _ = await provider(latency_seconds=1.27)
    sidecar = await serving(dashscope_url=url)
    answers = await asyncio.gather(*(ask(sidecar, camera) for camera in range(10)))
    assert {status for status, _ in answers} == {200}
    assert mean(seconds for _, seconds in answers) <= 1.40


async def test_64_requests_reach_an_unlimited_provider_64_at_a_time(serving, provider):
    url, simulated = await provider(latency_seconds=1.0)
    sidecar = await serving(dashscope_url=url)
    answers = await asyncio.gather(*(ask(sidecar, camera) for camera in range(64)))
    assert {status for status, _ in answers} == {200}
    assert simulated.counts.max_in_flight == 64


async def test_at_90_percent_of_a_small_quota_every_request_is_answered_and_no_caller_gets_a_429(serving, provider):
    """Ten cameras send at the same instant, four times: 2.7 requests/s on average. The quota is 3/s with burst 3."""
    url, simulated = await provider(latency_seconds=0.2, requests_per_second=3, burst_requests=3)
    sidecar = await serving(dashscope_url=url)
    waves = []
    for _ in range(4):
        waves += [asyncio.ensure_future(ask(sidecar, camera)) for camera in range(10)]
        await asyncio.sleep(10 / 2.7)
    answers = await asyncio.gather(*waves)
    assert [status for status, _ in answers] == [200] * 40
    assert simulated.counts.refused["request_rate"] <= 16  # only the first burst meets refusals
