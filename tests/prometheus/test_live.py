"""A real Prometheus scrapes a loaded sidecar: waits are what the callers measured, and alerts reach an Alertmanager."""

from __future__ import annotations

import asyncio
import re

import pytest
from running import samples


async def test_queue_wait_and_lock_wait_are_what_the_callers_measured(serving, provider, monitored):
    url, _ = await provider(latency_seconds=0.2)
    sidecar = await serving(dashscope_url=url, max_concurrency=2)
    watched = await monitored(sidecar)

    async def call():
        async with sidecar.post() as response:
            assert response.status == 200
            timing = response.headers["Server-Timing"]
            return {part: float(found) / 1e3 for part, found in re.findall(r"(\w+);dur=([\d.]+)", timing)}

    told = await asyncio.gather(*(call() for _ in range(20)))

    async def all_scraped():
        return await watched.query("sum(sidecar_requests_total)") == len(told)

    await watched.until(all_scraped)
    for part, metric in (
        ("queue", "sidecar_queue_wait_seconds_sum"),
        ("lock", "sidecar_backend_lock_wait_seconds_sum"),
    ):
        measured = sum(timing[part] for timing in told)
        # Server-Timing has two decimals of a millisecond: 20 calls may be 0.2 ms apart.
        assert await watched.query(f"sum({metric})") == pytest.approx(measured, rel=0.05, abs=0.0005), part
    assert sum(timing["queue"] for timing in told) > 1, "they did wait"


async def test_an_outage_reaches_the_alertmanager(serving, provider, monitored):
    url, _ = await provider(outages=((0.0, 600.0),))
    sidecar = await serving(dashscope_url=url)
    watched = await monitored(sidecar)
    for _ in range(4):
        async with sidecar.post(headers={"X-Request-Timeout": "0.6"}) as response:
            assert response.status >= 500

    async def told():
        return "VlmSidecarUpstreamOutage" in await watched.alerts()

    await watched.until(told)


async def test_ten_thousand_cameras_and_models_make_few_series(serving):
    sidecar = await serving()
    gate = asyncio.Semaphore(32)

    async def call(number):
        body = {"model": f"model-{number}", "messages": [{"role": "user", "content": "x"}]}
        async with gate, sidecar.post(body, headers={"X-Camera-Id": f"camera-{number}"}) as response:
            assert response.status == 200

    await asyncio.gather(*(call(number) for number in range(10_000)))
    async with sidecar.client.get(f"{sidecar.admin_url}/metrics") as response:
        text = await response.text()
    assert "camera-" not in text
    assert len(samples(text)) < 500
