"""A caller that waits for our Retry-After is admitted: over real sockets, with more callers than the queue holds."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

SECONDS = 8.0


@pytest.mark.alone
async def test_a_caller_that_waits_for_retry_after_is_admitted(serving, provider):
    url, simulated = await provider(latency_seconds=0.2)
    sidecar = await serving(dashscope_url=url, max_concurrency=4, queue_size=30)
    async with sidecar.post() as response:  # the sidecar learns how long an answer takes
        await response.read()
    loop = asyncio.get_running_loop()
    end = loop.time() + SECONDS
    tries: Counter[tuple[bool, int]] = Counter()

    async def caller(number):
        obeying = False  # whether this request follows the Retry-After of the previous answer
        while loop.time() < end:
            async with sidecar.post(headers={"X-Camera-Id": f"camera-{number}"}) as response:
                await response.read()
                tries[obeying, response.status] += 1
                obeying = response.status == 503
                wait = float(response.headers["Retry-After"]) if obeying else 0.0
            await asyncio.sleep(wait)

    async with asyncio.TaskGroup() as group:
        for number in range(80):
            group.create_task(caller(number))
    assert {status for _, status in tries} == {200, 503}
    assert tries[True, 200] >= 50, tries
    assert tries[True, 200] >= 0.95 * (tries[True, 200] + tries[True, 503]), tries
    # The provider was never idle because of Retry-After.
    assert simulated.counts.ended["answered"] >= 0.9 * SECONDS * 4 / 0.2
    await sidecar.until(sidecar.at_rest)
