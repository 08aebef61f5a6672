"""OpenTelemetry spans (receive, queue, lock, upstream) of each request whose caller set the sampled flag.

`assembly.py` imports this module only if an OTLP endpoint is set, because it needs `vlm-sidecar[otel]`. A thread of the
SDK sends the spans. The SDK reads the usual OTEL_* variables: endpoint, headers, timeout, service name, batch size and
batch delay.
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
from sidecar.observe.format import shown_name
from sidecar.observe.trace import TracingStopwatch

#: Seconds to send the last spans when the process ends. A collector that hangs must not delay the end of the drain.
_LAST_SPANS_SECONDS = 2.0
#: Maximum length of a span attribute, in characters. Needed because the caller chooses the name of the model.
_MAX_ATTRIBUTE = 256
_FAILED = ("shed", "deadline", "error")


class _Ids(RandomIdGenerator):
    """Generates span ids. The span of an attempt gets the id that was already sent to the upstream in `traceparent`."""

    next_span_id: int | None = None

    def generate_span_id(self) -> int:
        span_id, self.next_span_id = self.next_span_id, None
        return span_id or super().generate_span_id()


class Spans:
    """Creates and sends the spans of requests that have ended."""

    def __init__(self) -> None:
        """Start the thread that sends spans to OTEL_EXPORTER_OTLP_ENDPOINT.

        It connects only when there is a span to send.
        """
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
        """Create the spans of a traced request that has ended, and pass them to the sending thread without waiting."""
        wall_offset = time.time_ns() - time.monotonic_ns()  # the event loop uses the monotonic clock

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
                "gen_ai.request.model": shown_name(ticket.model),
            },
            start_time=wall(trace.arrived),
        )
        _set_status(request, outcome not in _FAILED, outcome)
        in_request = set_span_in_context(request, Context())
        self._tracer.start_span("receive", in_request, start_time=wall(trace.arrived)).end(wall(trace.started))
        for step in trace.steps:
            is_upstream = step.name == "upstream"
            if is_upstream and step.attempt is not None:
                self._ids.next_span_id = step.attempt.span_id
            kind = SpanKind.CLIENT if is_upstream else SpanKind.INTERNAL
            span = self._tracer.start_span(step.name, in_request, kind=kind, start_time=wall(step.start))
            if step.attempt is not None:
                span.set_attributes({"sidecar.backend": step.attempt.backend, "sidecar.result": step.attempt.result})
                _set_status(span, step.attempt.result == "ok", step.attempt.result)
            span.end(wall(step.end))
        request.end(wall(trace.ended))

    async def close(self) -> None:
        """Send the remaining spans, for at most `_LAST_SPANS_SECONDS`."""
        sending = Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, _LAST_SPANS_SECONDS)


def _set_status(span: Span, ok: bool, description: str) -> None:
    if not ok:
        span.set_status(Status(StatusCode.ERROR, description))
