"""The sampler: the same numbers as the metrics, one log line for many refusals, and the reason of a changed limit."""

from __future__ import annotations

import asyncio
import json
import logging

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from running import BOUND, CHAT, Process, chat
from scripted_upstream import CHAT_ANSWER

from backends.base import ReportedLimit
from sidecar.admission import Admission, Ticket, UpstreamSettings, Verdict
from sidecar.observe.metrics import Metrics
from sidecar.observe.sampler import Sampler
from sidecar.observe.time_series import FIELDS, POINTS, TimeSeries


async def ask_many(sidecar, count, **options):
    async def ask(number):
        async with sidecar.post(headers={"X-Camera-Id": f"camera-{number % 3}"}, **options) as response:
            return response.status

    return await asyncio.gather(*(ask(number) for number in range(count)))


def column(sidecar, field):
    return [point[FIELDS.index(field)] for point in sidecar.sidecar.parts.sampler.time_series["dashscope"].recent]


async def test_every_point_is_the_difference_of_the_metrics(serving, provider):
    url, simulated = await provider(requests_per_second=20, burst_requests=5, latency_seconds=0.05)
    sidecar = await serving(dashscope_url=url)
    for count in (3, 12, 1):
        assert await ask_many(sidecar, count) == [200] * count
        sidecar.sidecar.parts.sampler.sample()
    counts = simulated.counts
    assert column(sidecar, "answered") == [3, 12, 1]
    assert sum(column(sidecar, "sent")) == counts.ended["answered"] + sum(counts.refused.values())
    assert sum(column(sidecar, "refused")) == sum(counts.refused.values())
    assert sum(column(sidecar, "output_tokens")) == 16 * 40
    metrics = await sidecar.metrics()
    waited = sum(value for name, value in metrics.items() if name.startswith("sidecar_queue_wait_seconds_sum"))
    assert sum(column(sidecar, "queue_seconds")) == pytest.approx(waited, abs=0.01)


async def test_waiting_requests_are_counted_by_cause_and_described_in_words(serving, provider):
    url, simulated = await provider(latency_seconds=1.0)
    sidecar = await serving(dashscope_url=url, max_concurrency=2)
    asking = asyncio.ensure_future(ask_many(sidecar, 7))
    await sidecar.until(lambda: simulated.counts.in_flight == 2 and sidecar.sidecar.admission.waiting() == 5)
    sidecar.sidecar.parts.sampler.sample()
    assert column(sidecar, "waiting.concurrency") == [5]
    assert column(sidecar, "in_flight") == [2]
    async with sidecar.client.get(f"{sidecar.admin_url}/status") as response:
        [model] = (await response.json())["backends"][0]["models"]
    assert model["in_words"] == "5 wait for one of the 2 permits, 2 are in flight"
    assert {entry["key"] for entry in model["longest_queues"]} == {"camera-0", "camera-1", "camera-2"}
    await asking


async def test_many_refusals_are_one_log_line_and_a_changed_limit_is_logged_with_its_reason(serving, provider, caplog):
    url, simulated = await provider(requests_per_second=30, burst_requests=4, latency_seconds=0.02)
    sidecar = await serving(dashscope_url=url)
    sampler = sidecar.sidecar.parts.sampler
    with caplog.at_level(logging.INFO, logger="sidecar"):
        await ask_many(sidecar, 20)
        refused = sum(simulated.counts.refused.values())
        assert refused > 3
        sampler._last_summary_at = asyncio.get_running_loop().time()
        sampler.sample()
        assert not [record for record in caplog.records if " attempts in " in record.message]
        for _ in range(2):
            sampler._last_summary_at -= 10  # ten seconds later
            sampler.sample()
    [summary] = [record.message for record in caplog.records if " attempts in " in record.message]
    assert f"dashscope refused {refused} of {refused + 20} attempts" in summary
    assert f"request_rate {refused}" in summary
    changed = [record.message for record in caplog.records if "the limit of" in record.message]
    assert changed
    [upstream] = next(sidecar.sidecar.admission.status()).upstreams
    assert changed[-1].endswith(upstream.requests.why)
    assert len(changed) <= 3


async def test_a_hold_is_logged_once(serving, provider, caplog):
    url, _ = await provider(outages=((0.0, 600.0),))
    sidecar = await serving(dashscope_url=url)
    with caplog.at_level(logging.INFO, logger="sidecar"):
        for _ in range(4):
            async with sidecar.post(headers={"X-Request-Timeout": "0.6"}) as response:
                assert response.status >= 500
        sidecar.sidecar.parts.sampler.sample()
        sidecar.sidecar.parts.sampler.sample()
    [line] = [record.message for record in caplog.records if "holding qwen-vl-plus back" in record.message]
    assert "(outage)" in line
    async with sidecar.client.get(f"{sidecar.admin_url}/status") as response:
        [model] = (await response.json())["backends"][0]["models"]
    assert model["in_words"].startswith("on hold for ")


async def test_the_access_log_has_the_waits_and_both_ids_and_no_prompt(provider):
    url, _ = await provider(latency_seconds=0.05)
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"X-Request-Id": "my-request", "X-Camera-Id": "gate", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    async with Process("--dashscope-url", url, "--access-log", "--log-format", "json") as process:
        async with (
            aiohttp.ClientSession() as client,
            client.post(process.url + CHAT, json=chat("a secret prompt"), headers=headers) as response,
        ):
            assert response.status == 200
        process.signal(15)
        assert await process.ended() == 0
    lines = [json.loads(line) for line in process.log.splitlines()]
    [line] = [line for line in lines if line["logger"] == "sidecar.access"]
    assert (line["message"], line["outcome"]) == (f"POST {CHAT} 200", "ok")
    assert (line["request_id"], line["trace_id"], line["key"]) == ("my-request", trace, "gate")
    assert line["first_byte_seconds"] >= 0.05
    parts = ("queue", "lock", "first_byte", "body", "write")
    assert sum(line[f"{part}_seconds"] for part in parts) == pytest.approx(line["total_seconds"], abs=0.001)
    assert "secret" not in process.log


async def test_no_text_of_a_caller_starts_a_log_line_or_moves_the_cursor(provider):
    url, _ = await provider()
    async with Process("--dashscope-url", url, "--access-log") as process, aiohttp.ClientSession() as client:
        async with client.post(process.url + CHAT, json=chat(model="m\n23:59:59 forged \x1b[2J")) as response:
            await response.read()
        process.signal(15)
        assert await process.ended() == 0
    [line] = [line for line in process.log.splitlines() if "forged" in line]
    assert "POST" in line
    assert "\\n23:59:59 forged \\x1b[2J" in line


async def test_a_camera_name_that_is_not_utf_8_is_shown_and_logged(provider):
    """Header bytes that are not UTF-8 must not break `/status`, the live views or the log."""
    url, simulated = await provider(latency_seconds=0.5)
    body = json.dumps(chat()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\nX-Camera-Id: gate "
    options = ("--dashscope-url", url, "--access-log", "--log-format", "json", "--max-concurrency", "1")
    async with Process(*options) as process, aiohttp.ClientSession() as client:
        streams = [await asyncio.open_connection("127.0.0.1", process.port) for _ in range(2)]
        for _, writer in streams:
            writer.write(head.encode() + b"\xff\r\n\r\n" + body)
        async with asyncio.timeout(BOUND):
            while True:
                async with client.get(f"{process.admin_url}/status") as response:
                    assert response.status == 200
                    models = (await response.json())["backends"][0]["models"]
                if models and models[0]["longest_queues"]:
                    break
        assert models[0]["longest_queues"][0]["key"] == "gate \\udcff"
        for reader, writer in streams:
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()
        process.signal(15)
        assert await process.ended() == 0
    assert simulated.counts.ended["answered"] == 2
    lines = [json.loads(line) for line in process.log.splitlines()]
    assert [line["key"] for line in lines if line["logger"] == "sidecar.access"] == ["gate \\udcff"] * 2


async def test_a_closed_live_view_logs_nothing(serving, caplog):
    sidecar = await serving()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        async with sidecar.client.get(f"{sidecar.admin_url}/events") as response:
            assert response.status == 200
        for _ in range(3):
            sidecar.sidecar.parts.sampler.sample()
            await asyncio.sleep(0.05)
    assert caplog.records == []


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5 * POINTS), st.integers(0, 9))
def test_a_time_series_is_bounded_and_loses_no_count(seconds, each):
    series = TimeSeries()
    for second in range(seconds):
        values = dict.fromkeys(FIELDS, 0.0) | {
            "t": second + 1.0,
            "span": 1.0,
            "sent": each + second % 3,
            "in_flight": each,
        }
        series.add(tuple(values[field] for field in FIELDS))
    whole = {field: [point[at] for point in series.whole] for at, field in enumerate(FIELDS)}
    assert len(series.whole) <= POINTS
    assert len(series.recent) == min(seconds, POINTS)
    assert sum(whole["span"]) == seconds == whole["t"][-1]
    assert sum(whole["sent"]) == sum(each + second % 3 for second in range(seconds))
    assert set(whole["in_flight"]) == {float(each)}


async def test_a_refused_key_is_logged_once_until_the_provider_accepts_it(serving, scripted, caplog):
    statuses = iter((401, 401, 200, 401, 401))  # a first 401 is sent once more

    async def script(link, seen):
        await link.answer(CHAT_ANSWER if (status := next(statuses)) == 200 else {"error": {}}, status=status)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    logged = []
    for expected in (401, 200, 401):
        async with sidecar.post() as response:
            assert response.status == expected
        logged.append(caplog.text.count("SIDECAR_DASHSCOPE_API_KEY"))
    assert logged == [1, 1, 2]


async def test_a_learned_limit_that_differs_from_the_reported_one_is_logged_once(caplog, monkeypatch):
    admission = Admission([UpstreamSettings("here")])
    sampler = Sampler(Metrics(CollectorRegistry()), [admission])
    upstream = admission.pool("m").upstreams[0]
    caplog.set_level("INFO", "sidecar")

    def say(limit):
        header = ReportedLimit("x-ratelimit-limit-requests", "request_rate", limit, 60.0)
        ticket = Ticket(now=0.0, deadline=9.0, key="gate", model="m")
        permit = upstream.start(upstream.clock(), ticket, lambda _: None)
        permit.report(Verdict("accepted", upstream.clock(), limits=(header,)))
        sampler.sample()
        sampler.sample()

    upstream.recall(upstream.clock(), {"requests": {"limit": 10.0, "burst": 10.0, "uncertainty": 0.01}}, 1.0)
    say(600.0)
    assert "reports" not in caplog.text  # remembered limits are not known well
    monkeypatch.setattr("sidecar.observe.sampler._KNOWN_ERROR", 0.1)
    say(660.0)
    assert "reports" not in caplog.text  # a tenth apart
    say(1200.0)
    assert caplog.text.count("but the header x-ratelimit-limit-requests reports 20/s") == 1
