"""The spans that a collector receives: OTLP over HTTP on a real socket, decoded from protobuf."""

from __future__ import annotations

import asyncio
import sys
from itertools import pairwise

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from running import chat
from scripted_upstream import CHAT_ANSWER

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
KEPT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


class Collector:
    """A collector that stores the spans it receives at `/v1/traces`."""

    def __init__(self) -> None:
        self.raw = b""
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.hangs = False
        self.asked = asyncio.Event()

    async def take(self, http: web.BaseRequest) -> web.Response:
        self.asked.set()
        if self.hangs:
            await asyncio.Event().wait()
        assert (http.path, http.content_type) == ("/v1/traces", "application/x-protobuf")
        body = await http.read()
        self.raw += body
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append({item.key: item.value.string_value for item in group.resource.attributes})
            self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return web.Response(content_type="application/x-protobuf")


@pytest.fixture
async def collector(monkeypatch):
    """A collector that all sidecars of this test send their spans to."""
    collector = Collector()
    runner = web.ServerRunner(web.Server(collector.take, handler_cancellation=True), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{runner.addresses[0][1]}")
    yield collector
    await runner.cleanup()


async def refuses_once(link, request):
    """A provider that refuses the first call because of its request rate."""
    if link.number == 0 and not hasattr(link, "refused"):
        link.refused = True
        await link.answer({"error": {"code": "limit_requests", "message": "slow down"}}, status=429)
    else:
        await link.answer(CHAT_ANSWER)


def attributes(span: Span) -> dict[str, str | int]:
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


async def test_the_steps_of_a_request_are_one_trace_that_the_provider_can_continue(serving, scripted, collector):
    upstream = await scripted(refuses_once)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", dashscope_api_key="sk-provider-secret")
    async with sidecar.post(chat("SECRET PROMPT"), headers=KEPT | {"X-Camera-Id": "gate"}) as response:
        assert response.status == 200
        assert response.headers["traceparent"] == KEPT["traceparent"], "echoed as the caller sent it"
    await sidecar.until(sidecar.at_rest)
    await sidecar.sidecar.close()

    by_start = sorted(collector.spans, key=lambda span: (span.start_time_unix_nano, -span.end_time_unix_nano))
    request = next(span for span in by_start if span.name == "request")
    inside = [span for span in by_start if span is not request]
    assert [span.name for span in inside] == ["receive", "queue", "lock", "upstream", "queue", "lock", "upstream"]
    assert {span.trace_id.hex() for span in by_start} == {TRACE}
    assert request.parent_span_id.hex() == CALLER
    assert {span.parent_span_id for span in inside} == {request.span_id}
    assert len({span.span_id for span in by_start}) == len(by_start)
    for before, after in pairwise(inside):
        assert before.end_time_unix_nano == pytest.approx(after.start_time_unix_nano, abs=2e6)
    assert request.start_time_unix_nano == inside[0].start_time_unix_nano
    assert inside[-1].end_time_unix_nano <= request.end_time_unix_nano

    calls = [span for span in inside if span.name == "upstream"]
    sent = [seen.headers["traceparent"] for seen in upstream.seen]
    assert sent == [f"00-{TRACE}-{span.span_id.hex()}-01" for span in calls]
    assert [attributes(span)["sidecar.result"] for span in calls] == ["throttled", "ok"]
    assert [span.status.code for span in calls] == [Status.STATUS_CODE_ERROR, Status.STATUS_CODE_UNSET]
    assert (request.kind, calls[0].kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
    assert attributes(request) == {
        "sidecar.api": "openai", "sidecar.outcome": "ok", "sidecar.priority": "normal", "sidecar.attempts": 2,
        "gen_ai.request.model": "qwen-vl-plus",
    }  # fmt: skip
    assert collector.resources[0]["service.name"] == "vlm-sidecar"
    for secret in (b"SECRET PROMPT", b"sk-provider", b"base64", b"gate"):
        assert secret not in collector.raw


async def test_no_word_of_the_provider_is_in_a_span(serving, scripted, collector):
    async def quotes(link, _):
        error = {"code": "SecretPrompt", "message": "SECRET PROMPT", "type": "sk-provider-secret"}
        await link.answer({"error": error}, status=429, headers="X-Request-Id: sk-provider-secret\r\n")

    upstream = await scripted(quotes)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", dashscope_api_key="sk-provider-secret")
    async with sidecar.post(chat("SECRET PROMPT"), headers=KEPT | {"X-Request-Timeout": "0.3"}) as response:
        assert response.status == 503
    await sidecar.until(sidecar.at_rest)
    await sidecar.sidecar.close()
    assert {span.name for span in collector.spans} >= {"request", "upstream"}
    for secret in (b"secret", b"prompt", b"sk-provider"):
        assert secret not in collector.raw.lower()


async def test_the_spans_have_the_durations_of_server_timing(serving, provider, collector):
    url, _ = await provider(latency_seconds=0.1)
    sidecar = await serving(dashscope_url=url, max_concurrency=1)

    async def ask(number):
        headers = {"traceparent": f"00-{number:032x}-{CALLER}-01"}
        async with sidecar.post(headers=headers) as response:
            parts = (part.split(";dur=") for part in response.headers["Server-Timing"].split(", "))
            return {name: float(found) for name, found in parts}

    timings = await asyncio.gather(*(ask(number) for number in range(1, 5)))
    await sidecar.sidecar.close()
    assert sum(timing["queue"] for timing in timings) > 500, "they waited for each other"
    for number, timing in enumerate(timings, 1):
        spans = [span for span in collector.spans if span.trace_id == number.to_bytes(16)]
        for part in ("queue", "lock", "upstream"):
            (span,) = (span for span in spans if span.name == part)
            assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6 == pytest.approx(timing[part], abs=0.1)


async def test_a_stream_has_one_upstream_span_and_a_refused_request_is_an_error(serving, provider, collector):
    url, _ = await provider(latency_seconds=0.05)
    sidecar = await serving(dashscope_url=url, queue_size=1, max_concurrency=1)
    async with sidecar.post(chat(stream=True), headers=KEPT) as response:
        assert len((await response.read()).split(b"data: ")) > 3
    await sidecar.until(sidecar.at_rest)
    async with sidecar.post(headers=KEPT | {"X-Request-Timeout": "0.001"}) as response:
        assert response.status >= 500
    await sidecar.sidecar.close()
    stream, refused = sorted((s for s in collector.spans if s.name == "request"), key=lambda s: s.start_time_unix_nano)
    inside = [span.name for span in collector.spans if span.parent_span_id == stream.span_id]
    assert sorted(inside) == ["lock", "queue", "receive", "upstream"]
    assert (stream.status.code, refused.status.code) == (Status.STATUS_CODE_UNSET, Status.STATUS_CODE_ERROR)


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": f"00-{TRACE}-{CALLER}-00"},
        {},
        {"traceparent": f"ff-{TRACE}-{CALLER}-01"},
        {"traceparent": f"00-{'0' * 32}-{CALLER}-01"},
        {"traceparent": f"00-{TRACE}-{'0' * 16}-01"},
    ],
    ids=["flag off", "none", "version", "no trace id", "no parent id"],
)
async def test_a_trace_that_is_not_sampled_makes_no_spans_and_passes_unchanged(serving, scripted, collector, headers):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    kept = "a" * 32
    for sent in (headers, {"traceparent": f"00-{kept}-{CALLER}-01"}):
        async with sidecar.post(headers=sent) as response:
            assert response.status == 200
    await sidecar.sidecar.close()
    assert {span.trace_id.hex() for span in collector.spans} == {kept}
    assert upstream.seen[0].headers.get("traceparent") == headers.get("traceparent")


async def test_a_collector_that_hangs_delays_neither_requests_nor_the_stop(serving, collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    collector.hangs = True
    sidecar = await serving()
    for _ in range(2):
        async with sidecar.post(headers=KEPT) as response:
            assert response.status == 200
        async with asyncio.timeout(10):
            await collector.asked.wait()
    async with asyncio.timeout(10):
        await sidecar.sidecar.close()


async def test_without_the_extra_the_sidecar_serves_and_logs_what_to_install(serving, collector, monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "sidecar.observe.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    sidecar = await serving()
    assert "install vlm-sidecar[otel]" in caplog.text
    async with sidecar.post(headers=KEPT) as response:
        assert response.status == 200
