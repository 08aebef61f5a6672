"""A real Prometheus scrapes a loaded sidecar: its waits equal the callers' measurements, and alerts are delivered."""

from __future__ import annotations

import asyncio
import time

import pytest


class Locked:
    """A lock in front of a backend, like that of a GPU. It measures the waits for the lock and the work itself."""

    def __init__(self, backend):
        self.lock_seconds = self.work_seconds = 0.0
        self.send = backend.send
        self.one = asyncio.Lock()
        backend.send = self.locked

    async def locked(self, request, timings):
        asked = time.perf_counter()
        async with self.one:
            start = time.perf_counter()
            try:
                return await self.send(request, timings)
            finally:
                self.lock_seconds += start - asked
                self.work_seconds += time.perf_counter() - start


@pytest.mark.alone
async def test_queue_wait_and_lock_wait_are_what_the_callers_measured(serving, provider, monitored):
    """The quota refuses some calls, and the lock admits one at a time.

    The expected values are measured without the sidecar's stopwatch.
    """
    url, simulated = await provider(latency_seconds=0.1, requests_per_second=8, burst_requests=4)
    sidecar = await serving(dashscope_url=url, max_concurrency=4)
    monitoring = await monitored(sidecar)
    locked = Locked(sidecar.sidecar.parts.backends[0])
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"

    async def call():
        start = time.perf_counter()
        async with sidecar.post(headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}) as response:
            assert response.status == 200
            await response.read()
        return time.perf_counter() - start

    async def connect():
        async with sidecar.client.get(f"{sidecar.url}/health") as response:
            assert response.status == 200

    async def scrapes():
        return await monitoring.query("up") == 1

    # First start both programs and open 30 connections: the sidecar cannot see these waits.
    await monitoring.until(scrapes)
    await asyncio.gather(*(connect() for _ in range(30)))
    waited = sum(await asyncio.gather(*(call() for _ in range(30))))

    async def all_scraped():
        return await monitoring.query("sum(sidecar_requests_total)") == 30

    await monitoring.until(all_scraped)
    assert simulated.counts.refused, "the quota was met"
    queued = waited - locked.lock_seconds - locked.work_seconds
    assert queued > 20 and locked.lock_seconds > 2, "they did wait, for both"
    reported = {
        part: await monitoring.query(f"sum(sidecar_{part}_seconds_sum)") for part in ("queue_wait", "backend_lock_wait")
    }
    assert reported == pytest.approx({"queue_wait": queued, "backend_lock_wait": locked.lock_seconds}, rel=0.05)

    parameters = {"query": "sidecar_queue_wait_seconds_bucket", "start": time.time() - 60, "end": time.time() + 1}
    exemplars = (await monitoring.get(f"{monitoring.prometheus}/api/v1/query_exemplars", **parameters))["data"]
    assert {one["labels"]["trace_id"] for series in exemplars for one in series["exemplars"]} == {trace}


async def test_an_outage_reaches_the_alertmanager(serving, provider, monitored):
    url, _ = await provider(outages=((0.0, 600.0),))
    sidecar = await serving(dashscope_url=url)
    monitoring = await monitored(sidecar)
    for _ in range(4):
        async with sidecar.post(headers={"X-Request-Timeout": "0.6"}) as response:
            assert response.status >= 500

    async def reported():
        return "VlmSidecarUpstreamOutage" in await monitoring.alerts()

    await monitoring.until(reported)
