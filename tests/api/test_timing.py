"""The stopwatch: for every outcome of a request, the sum of its parts is the time that the caller measured."""

from __future__ import annotations

import asyncio
import re

import pytest
from running import chat

pytestmark = pytest.mark.alone

#: Seconds.
TOLERANCE = 0.002


@pytest.fixture
def tickets(monkeypatch):
    """Record every finished ticket with its outcome and its total time in seconds, by the event loop's clock."""
    from sidecar.observe.metrics import Metrics  # noqa: PLC0415

    finished = []
    real = Metrics.finished

    def recording(self, ticket, api, backend, outcome):
        finished.append((ticket, outcome, asyncio.get_running_loop().time() - ticket.stopwatch.started))
        real(self, ticket, api, backend, outcome)

    monkeypatch.setattr(Metrics, "finished", recording)
    return finished


def assert_sums(tickets, outcome):
    found = [(ticket, wall) for ticket, ended, wall in tickets if ended == outcome]
    assert found, [ended for _, ended, _ in tickets]
    for ticket, wall in found:
        assert sum(ticket.stopwatch.seconds.values()) == pytest.approx(wall, abs=TOLERANCE)
        if ticket.cause_seconds is not None:
            assert sum(ticket.cause_seconds.values()) == pytest.approx(ticket.stopwatch.seconds["queue"], abs=TOLERANCE)


def server_timing(response):
    return {name: float(ms) / 1e3 for name, ms in re.findall(r"(\w+);dur=([\d.]+)", response.headers["Server-Timing"])}


async def timed(sidecar, body=None, **options):
    """Send a request. Return status, the parts of Server-Timing, and the time until the complete answer, in seconds."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with sidecar.post(body, **options) as response:
        await response.read()
        return response.status, server_timing(response), loop.time() - begun


def assert_header_sums(timing):
    assert timing["queue"] + timing["lock"] + timing["upstream"] == pytest.approx(timing["total"], abs=TOLERANCE)


async def test_the_parts_of_a_success_sum_up(serving, provider, tickets):
    url, _ = await provider(latency_seconds=0.3)
    sidecar = await serving(dashscope_url=url)
    status, timing, wall = await timed(sidecar)
    assert status == 200
    assert_header_sums(timing)
    assert timing["upstream"] == pytest.approx(0.3, abs=0.05)
    assert timing["total"] == pytest.approx(wall, abs=0.05)
    assert_sums(tickets, "ok")


async def test_the_parts_of_a_refused_and_repeated_request_sum_up(serving, provider, tickets):
    """The sum includes the waits of all attempts. The wait for the next attempt counts as queue, not as upstream."""
    url, simulated = await provider(latency_seconds=0.1, requests_per_second=5, burst_requests=2)
    sidecar = await serving(dashscope_url=url)
    answers = await asyncio.gather(*(timed(sidecar) for _ in range(8)))
    assert simulated.counts.refused["request_rate"] > 0
    for status, timing, _ in answers:
        assert status == 200
        assert_header_sums(timing)
    assert_sums(tickets, "ok")
    assert max(ticket.attempts for ticket, _, _ in tickets) > 1


async def test_the_parts_of_a_moderation_refusal_sum_up(serving, provider, tickets):
    url, _ = await provider(latency_seconds=0.1, moderation_share=1.0)
    sidecar = await serving(dashscope_url=url)
    status, timing, _ = await timed(sidecar)
    assert status == 400
    assert_header_sums(timing)
    assert_sums(tickets, "moderated")


async def test_the_parts_of_cancelled_requests_sum_up(serving, provider, tickets):
    url, simulated = await provider(latency_seconds=30)
    sidecar = await serving(dashscope_url=url, max_concurrency=1)
    tasks = [asyncio.ensure_future(timed(sidecar)) for _ in range(3)]
    await sidecar.until(lambda: simulated.counts.in_flight == 1 and sidecar.sidecar.admission.waiting() == 2)
    for task in reversed(tasks):
        task.cancel()
        await asyncio.sleep(0.05)
    await sidecar.until(lambda: len(tickets) == 3)
    assert_sums(tickets, "cancelled")
    await sidecar.until(sidecar.at_rest)


async def test_the_parts_of_a_superseded_request_sum_up(serving, provider, tickets):
    url, simulated = await provider(latency_seconds=0.5)
    sidecar = await serving(dashscope_url=url, max_concurrency=1)
    first = asyncio.ensure_future(timed(sidecar))
    await sidecar.until(lambda: simulated.counts.in_flight == 1)
    latest = {"X-Camera-Id": "gate", "X-Queue-Policy": "latest"}
    old = asyncio.ensure_future(timed(sidecar, headers=latest))
    await sidecar.until(lambda: sidecar.sidecar.admission.waiting() == 1)
    new = asyncio.ensure_future(timed(sidecar, headers=latest))
    assert [status for status, _, _ in await asyncio.gather(first, old, new)] == [200, 409, 200]
    assert_sums(tickets, "superseded")


async def test_the_parts_of_a_request_past_its_deadline_sum_up(serving, provider, tickets):
    url, _ = await provider(latency_seconds=30)
    sidecar = await serving(dashscope_url=url)
    status, timing, _ = await timed(sidecar, headers={"X-Request-Timeout": "0.4"})
    assert status == 504
    assert_header_sums(timing)
    assert timing["total"] == pytest.approx(0.4, abs=0.1)
    assert_sums(tickets, "deadline")


async def test_the_parts_of_a_shed_request_sum_up(serving, provider, tickets):
    url, simulated = await provider(latency_seconds=0.6)
    sidecar = await serving(dashscope_url=url, max_concurrency=1, queue_size=1)
    tasks = [asyncio.ensure_future(timed(sidecar))]
    await sidecar.until(lambda: simulated.counts.in_flight == 1)
    tasks += [asyncio.ensure_future(timed(sidecar)) for _ in range(2)]
    answers = await asyncio.gather(*tasks)
    assert sorted(status for status, _, _ in answers) == [200, 200, 503]
    for _, timing, _ in answers:
        assert_header_sums(timing)
    assert_sums(tickets, "shed")


async def test_the_parts_of_a_stream_sum_up(serving, provider, tickets):
    url, _ = await provider(first_token_seconds=0.2, answer_tokens=40, stream_tokens_per_second=200)
    sidecar = await serving(dashscope_url=url)
    status, timing, wall = await timed(sidecar, chat(stream=True))
    assert status == 200
    assert_header_sums(timing)
    assert timing["upstream"] == pytest.approx(0.2, abs=0.05)  # the header is sent with the first byte
    assert_sums(tickets, "ok")
    ((ticket, _, _),) = tickets
    assert sum(ticket.stopwatch.seconds.values()) == pytest.approx(wall, abs=0.05)


async def test_the_parts_of_a_failed_request_sum_up(serving, provider, tickets):
    url, _ = await provider(latency_seconds=0.1, error_share=1.0)
    sidecar = await serving(dashscope_url=url)
    status, timing, _ = await timed(sidecar)
    assert status == 502
    assert_header_sums(timing)
    assert_sums(tickets, "error")
