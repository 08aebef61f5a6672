"""The admin listener: three different probes, metrics, status, and a drain that no web page can start."""

from __future__ import annotations

import asyncio

import pytest
from running import CHAT, chat


async def get(sidecar, path, **options):
    async with sidecar.client.get(sidecar.admin_url + path, **options) as response:
        return response.status, await response.text()


async def test_probes_of_a_running_sidecar(serving):
    sidecar = await serving()
    assert await get(sidecar, "/startupz") == (200, "started\n")
    assert await get(sidecar, "/readyz") == (200, "ready\n")
    assert await get(sidecar, "/livez") == (200, "alive\n")


async def test_readyz_stays_200_and_names_an_upstream_that_is_down(serving, provider):
    url, _ = await provider(outages=((0.0, 600.0),))
    sidecar = await serving(dashscope_url=url)
    for _ in range(4):
        async with sidecar.post(headers={"X-Request-Timeout": "0.6"}) as response:
            assert response.status >= 500
    status, text = await get(sidecar, "/readyz")
    assert status == 200
    assert "dashscope on hold for qwen-vl-plus" in text


async def test_the_admin_listener_serves_no_inference(serving):
    sidecar = await serving()
    async with sidecar.client.post(sidecar.admin_url + CHAT, json=chat()) as response:
        assert response.status == 404
    assert (await get(sidecar, "/drain"))[0] == 405


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example:9464"}],
)
async def test_no_web_page_can_start_a_drain(serving, headers):
    sidecar = await serving()
    async with sidecar.client.post(f"{sidecar.admin_url}/drain", headers=headers) as response:
        assert response.status == 403
    assert await get(sidecar, "/readyz") == (200, "ready\n")


@pytest.mark.alone
async def test_every_metric_of_the_contract_exists_and_has_the_right_value(serving, provider):
    url, simulated = await provider(latency_seconds=0.5, requests_per_second=50, burst_requests=3)
    sidecar = await serving(dashscope_url=url, max_concurrency=4)
    tasks = [
        asyncio.ensure_future(sidecar.post(chat(), headers={"X-Request-Priority": "high"}).__aenter__())
        for _ in range(9)
    ]
    await sidecar.until(lambda: simulated.counts.in_flight >= 3)
    metrics = await sidecar.metrics()
    assert metrics['sidecar_in_flight_requests{backend="dashscope"}'] <= 4
    assert metrics['sidecar_queue_requests{backend="dashscope",priority="high"}'] >= 4
    assert metrics['sidecar_queue_bytes{backend="dashscope"}'] > 0
    for answer in await asyncio.gather(*tasks):
        assert answer.status == 200
        answer.release()
    await sidecar.until(sidecar.at_rest)
    metrics = await sidecar.metrics()
    backend = 'backend="dashscope"'
    assert metrics[f'sidecar_requests_total{{api="openai",{backend},outcome="ok"}}'] == 9
    assert metrics[f'sidecar_queue_wait_seconds_count{{{backend},priority="high"}}'] == 9
    assert metrics[f"sidecar_backend_lock_wait_seconds_count{{{backend}}}"] == 9
    assert metrics[f"sidecar_backend_time_to_first_byte_seconds_count{{{backend}}}"] == 9
    assert metrics[f"sidecar_backend_duration_seconds_count{{{backend}}}"] == 9
    assert metrics[f'sidecar_upstream_attempts_total{{{backend},result="ok"}}'] == 9
    assert metrics[f'sidecar_tokens_total{{{backend},counted="provider",kind="output",model="qwen-vl-plus"}}'] == 9 * 40
    causes = [value for name, value in metrics.items() if name.startswith("sidecar_queue_wait_cause_seconds_total")]
    waited = sum(value for name, value in metrics.items() if name.startswith("sidecar_queue_wait_seconds_sum"))
    assert sum(causes) == pytest.approx(waited, abs=0.02)
    refused = simulated.counts.refused["request_rate"]
    throttled = metrics.get(f'sidecar_throttles_total{{{backend},kind="request_rate"}}', 0)
    assert throttled == refused == metrics.get(f'sidecar_upstream_attempts_total{{{backend},result="throttled"}}', 0)


async def test_openmetrics_if_the_scraper_accepts_it(serving):
    sidecar = await serving()
    async with sidecar.client.get(
        f"{sidecar.admin_url}/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"}
    ) as response:
        assert response.content_type == "application/openmetrics-text"
        assert (await response.text()).endswith("# EOF\n")


async def test_callers_cannot_create_time_series_by_camera_model_or_request_id(serving):
    sidecar = await serving()

    async def ask(number):
        headers = {"X-Camera-Id": f"camera-{number}", "X-Request-Id": f"id-{number}"}
        async with sidecar.post(chat(model=f"model-{number}"), headers=headers) as response:
            assert response.status == 200

    for start in range(0, 300, 50):
        await asyncio.gather(*(ask(number) for number in range(start, start + 50)))
    text = (await get(sidecar, "/metrics"))[1]
    assert "camera-" not in text
    assert "id-1" not in text
    series = [line for line in text.splitlines() if line.startswith("sidecar_tokens_total")]
    assert len(series) <= 2 * 21
    assert any('model="other"' in line for line in series)


@pytest.mark.parametrize(("flags", "sampled"), [("01", True), ("00", False)])
async def test_a_sampled_trace_is_an_exemplar_in_openmetrics_and_creates_no_time_series(serving, flags, sampled):
    sidecar = await serving()
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    series = []
    for _ in range(2):
        async with sidecar.post(headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-{flags}"}) as response:
            assert response.status == 200
        await sidecar.until(sidecar.at_rest)
        series.append((await sidecar.metrics()).keys())
    assert series[0] == series[1]
    headers = {"Accept": "application/openmetrics-text;version=1.0.0"}
    async with sidecar.client.get(f"{sidecar.admin_url}/metrics", headers=headers) as response:
        lines = [line for line in (await response.text()).splitlines() if trace in line]
    names = {line.partition("{")[0] for line in lines}
    waits = {"request_duration", "queue_wait", "backend_lock_wait"}
    assert names == ({f"sidecar_{wait}_seconds_bucket" for wait in waits} if sampled else set())
