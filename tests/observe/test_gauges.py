"""The gauges of limits: no sample before a limit is known, then the limit and exactly one state."""

from __future__ import annotations

import asyncio

LIMIT = 'sidecar_limit_requests_per_second{backend="dashscope"}'


def in_state(metrics, dimension):
    prefix = f'sidecar_limit_state{{backend="dashscope",dimension="{dimension}",state="'
    return {
        name.removeprefix(prefix).rstrip('"}') for name, value in metrics.items() if name.startswith(prefix) and value
    }


async def test_a_limit_has_a_sample_after_the_first_refusal(serving, provider):
    url, simulated = await provider(requests_per_second=20, burst_requests=2)
    sidecar = await serving(dashscope_url=url)

    async def call():
        async with sidecar.post() as response:
            assert response.status == 200

    await call()
    metrics = await sidecar.metrics()
    assert LIMIT not in metrics
    assert in_state(metrics, "requests") == {"start"}

    await asyncio.gather(*(call() for _ in range(12)))
    assert simulated.counts.refused["request_rate"] > 0
    metrics = await sidecar.metrics()
    assert metrics[LIMIT] > 0
    assert len(in_state(metrics, "requests")) == 1
    assert in_state(metrics, "requests") != {"start"}
    assert in_state(metrics, "hold") <= {"blackout"}


async def test_a_provider_that_is_down_is_in_the_state_outage(serving, provider):
    url, _ = await provider(outages=((0.0, 600.0),))
    sidecar = await serving(dashscope_url=url)
    assert in_state(await sidecar.metrics(), "hold") == set()
    for _ in range(4):
        async with sidecar.post(headers={"X-Request-Timeout": "0.6"}) as response:
            assert response.status >= 500
    assert in_state(await sidecar.metrics(), "hold") == {"outage"}


async def test_the_start_time_of_the_process_is_a_metric(serving):
    """The alert on restarts uses it."""
    sidecar = await serving()
    assert (await sidecar.metrics())["process_start_time_seconds"] > 0
