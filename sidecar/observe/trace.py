"""What a request whose trace somebody keeps remembers on its way, and what it tells the provider of it.

Plain data: `spans.py` makes OpenTelemetry's spans of it once the request has ended. A request that nobody traces has
the plain stopwatch, and pays nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from backends.base import Request
from sidecar.admission import Part, Stopwatch

#: What each part of the stopwatch is called in a trace. To write the answer is the caller's time, and no span.
_NAMES: dict[Part, str] = {"queue": "queue", "lock": "lock", "first_byte": "upstream", "body": "upstream"}


@dataclass(slots=True)
class TracedAttempt:
    """One call to a backend."""

    backend: str
    span_id: int
    """What the upstream was told to be its parent: the attempt's `upstream` span."""
    result: str = "cancelled"


@dataclass(slots=True)
class TracedStep:
    """One stay in the queue, behind the lock or upstream, in seconds on the loop's clock."""

    name: str
    start: float
    end: float
    attempt: TracedAttempt | None
    """None in the queue."""


class TracingStopwatch(Stopwatch):
    """A stopwatch that also remembers when each part was."""

    __slots__ = ("_attempt", "arrived", "parent_id", "steps", "trace_id")

    def __init__(self, now: float, *, arrived: float, trace_id: int, parent_id: int) -> None:
        """`arrived`: when the request's head was there, on the loop's clock; `parent_id`: the caller's span."""
        super().__init__(now)
        self.arrived = arrived
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.steps: list[TracedStep] = []
        self._attempt: TracedAttempt | None = None

    @property
    def ended(self) -> float:
        """When the stopwatch was last stopped, on the loop's clock."""
        return self._since

    def switch(self, part: Part, now: float) -> None:
        """From `now` on, time goes to `part`."""
        name = _NAMES.get(self._part)
        if name is not None:
            if self.steps and self.steps[-1].name == name:
                self.steps[-1].end = now  # the chunks of a stream are one step, with the writes between them
            else:
                self.steps.append(TracedStep(name, self._since, now, None if name == "queue" else self._attempt))
        super().switch(part, now)

    def attempt(self, request: Request, backend: str) -> Request:
        """An attempt begins: give the request as it is to be sent, a child of the span that this attempt will be."""
        self._attempt = TracedAttempt(backend, random.getrandbits(64) or 1)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "traceparent"}
        headers["traceparent"] = f"00-{self.trace_id:032x}-{self._attempt.span_id:016x}-01"
        return replace(request, headers=headers)

    def attempted(self, result: str) -> None:
        """The attempt has ended so, in the words of `sidecar_upstream_attempts_total`."""
        if self._attempt is not None:
            self._attempt.result = result
