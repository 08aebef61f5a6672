"""Records the steps of a traced request and passes its trace on to the provider.

A request is traced if the caller set the sampled flag of its `traceparent`. This module only stores data. When the
request has ended, `otel.py` makes OpenTelemetry spans from it. Other requests have the plain stopwatch, without extra
cost.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from backends.base import Request
from sidecar.admission import Part, Stopwatch

#: The span name of each part of the stopwatch. `write` has no span: how long it takes depends on the caller.
_NAMES: dict[Part, str] = {"queue": "queue", "lock": "lock", "first_byte": "upstream", "body": "upstream"}


@dataclass(slots=True)
class TracedAttempt:
    """One call to a backend."""

    backend: str
    span_id: int
    """The id of the attempt's `upstream` span. The upstream received it as the id of its parent span."""
    result: str = "cancelled"


@dataclass(slots=True)
class TracedStep:
    """One period of a request: in the queue, at the backend's lock, or upstream. Times are loop times in seconds."""

    name: str
    start: float
    end: float
    attempt: TracedAttempt | None
    """The attempt that the step belongs to; None for a step in the queue."""


class TracingStopwatch(Stopwatch):
    """A stopwatch that also records when each part started and ended."""

    __slots__ = ("_attempt", "arrived", "parent_id", "steps", "trace_id")

    def __init__(self, now: float, *, arrived: float, trace_id: int, parent_id: int) -> None:
        """`arrived` is when the request's head was received, in seconds of the loop's clock.

        `parent_id` is the caller's span.
        """
        super().__init__(now)
        self.arrived = arrived
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.steps: list[TracedStep] = []
        self._attempt: TracedAttempt | None = None

    @property
    def ended(self) -> float:
        """When the stopwatch was stopped (the loop's clock, seconds)."""
        return self._since

    def switch(self, part: Part, now: float) -> None:
        """End the running part at `now` and start `part`."""
        name = _NAMES.get(self._part)
        if name is not None:
            if self.steps and self.steps[-1].name == name:
                self.steps[-1].end = now  # all chunks of a stream, with the writes between them, are one step
            else:
                self.steps.append(TracedStep(name, self._since, now, None if name == "queue" else self._attempt))
        super().switch(part, now)

    def start_attempt(self, request: Request, backend: str) -> Request:
        """Record that an attempt starts. Return the request with a `traceparent` that names the attempt's span."""
        self._attempt = TracedAttempt(backend, random.getrandbits(64) or 1)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "traceparent"}
        headers["traceparent"] = f"00-{self.trace_id:032x}-{self._attempt.span_id:016x}-01"
        return replace(request, headers=headers)

    def end_attempt(self, result: str) -> None:
        """Record the result of the attempt: a value of the label `result` of `sidecar_upstream_attempts_total`."""
        if self._attempt is not None:
            self._attempt.result = result
