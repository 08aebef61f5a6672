"""Spans for OpenTelemetry: receive, queue, lock and upstream of each request whose caller keeps its trace.

Imported only where an OTLP endpoint is named (`app.py`): needs `vlm-sidecar[otel]`. The SDK's own thread sends them,
and reads the usual OTEL_* variables: endpoint, headers, timeout, service name, size and delay of a batch.
"""

from __future__ import annotations

import asyncio
import time
from threading import Thread

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from sidecar import __version__
from sidecar.admission import Ticket
from sidecar.observe.trace import TracingStopwatch

#: Seconds that the last spans may take to leave when the process ends: a collector that hangs must not hold the drain.
_LAST_SPANS_SECONDS = 2.0
#: Characters of an attribute: a model's name is the caller's text.
_MAX_ATTRIBUTE = 256
_FAILED = ("shed", "deadline", "error")


class _Ids(RandomIdGenerator):
    """Ids of spans: the one that the upstream has already been told, where there is one."""

    told: int | None = None

    def generate_span_id(self) -> int:
        told, self.told = self.told, None
        return told or super().generate_span_id()


class Spans:
    """Makes and sends the spans of requests that have ended."""

    def __init__(self) -> None:
        """Start the thread that sends. Where to is in OTEL_EXPORTER_OTLP_ENDPOINT, and never asked before a span is."""
        self._ids = _Ids()
        ours = Resource({"service.name": "vlm-sidecar", "service.version": __version__})
        self._provider = TracerProvider(
            sampler=ParentBased(ALWAYS_OFF),
            resource=ours.merge(OTELResourceDetector().detect()),
            id_generator=self._ids,
            span_limits=SpanLimits(max_span_attribute_length=_MAX_ATTRIBUTE),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("vlm-sidecar", __version__)

    def finished(self, ticket: Ticket, trace: TracingStopwatch, api: str, outcome: str) -> None:
        """A traced request has ended: hand its spans to the thread that sends them, which never waits."""
        wall_offset = time.time_ns() - time.monotonic_ns()  # the loop's clock is the monotonic one

        def wall(seconds: float) -> int:
            return wall_offset + int(seconds * 1e9)

        caller = SpanContext(trace.trace_id, trace.parent_id, is_remote=True, trace_flags=TraceFlags(1))
        request = self._tracer.start_span(
            "request",
            set_span_in_context(NonRecordingSpan(caller), Context()),
            kind=SpanKind.SERVER,
            attributes={
                "sidecar.api": api,
                "sidecar.outcome": outcome,
                "sidecar.priority": ticket.priority.name.lower(),
                "sidecar.attempts": ticket.attempts,
                "gen_ai.request.model": ticket.model,
            },
            start_time=wall(trace.arrived),
        )
        _judge(request, outcome not in _FAILED, outcome)
        inside = set_span_in_context(request, Context())
        self._tracer.start_span("receive", inside, start_time=wall(trace.arrived)).end(wall(trace.started))
        for step in trace.steps:
            is_upstream = step.name == "upstream"
            if is_upstream and step.attempt is not None:
                self._ids.told = step.attempt.span_id
            kind = SpanKind.CLIENT if is_upstream else SpanKind.INTERNAL
            span = self._tracer.start_span(step.name, inside, kind=kind, start_time=wall(step.start))
            if step.attempt is not None:
                span.set_attributes({"sidecar.backend": step.attempt.backend, "sidecar.result": step.attempt.result})
                _judge(span, step.attempt.result == "ok", step.attempt.result)
            span.end(wall(step.end))
        request.end(wall(trace.ended))

    async def close(self) -> None:
        """Send what is left, for a little while."""
        sending = Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, _LAST_SPANS_SECONDS)


def _judge(span: Span, well: bool, how: str) -> None:
    if not well:
        span.set_status(Status(StatusCode.ERROR, how))
