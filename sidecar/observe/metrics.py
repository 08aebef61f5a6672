"""The metrics of the contract, written once a ticket is finished, from what its stopwatch says.

Nothing here is asked for anything while a request is under way: metrics cannot slow or break the path. Everything
belongs to a `Metrics` object, so two sidecars can live in one process.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Gauge, Histogram, disable_created_metrics

from backends.base import Throttled, Usage
from sidecar.admission import Priority, Ticket
from sidecar.observe import series
from sidecar.observe.trace import TracingStopwatch

log = logging.getLogger("sidecar")

Outcome = Literal[
    "ok", "invalid", "rejected_upstream", "moderated", "shed", "superseded", "deadline", "cancelled", "error"
]

#: Seconds, from 1 ms to 120 s, about a factor of 2 apart.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 1.5, 2.5, 5, 10, 15, 30, 45, 60, 90, 120)
#: Model names that get a label of their own; later ones are `other`, so that a caller cannot grow the series.
MAX_MODELS = 20

#: The priorities as labels.
_PRIORITIES = {priority: priority.name.lower() for priority in Priority}

#: What `totals` reads: metric, what it is called there, and the label that tells its values apart.
_TOTALS = (
    ("sidecar_requests", "requests", "outcome"),
    ("sidecar_upstream_attempts", "attempts", "result"),
    ("sidecar_throttles", "throttles", "kind"),
    ("sidecar_tokens", "tokens", "kind"),
    ("sidecar_queue_wait_cause_seconds", "waited", "cause"),
    ("sidecar_queue_wait_seconds", "seconds.queue", None),
    ("sidecar_backend_lock_wait_seconds", "seconds.lock", None),
    ("sidecar_backend_duration_seconds", "seconds.upstream", None),
)


class Metrics:
    """Every metric that requests write. Gauges of what is (queues, limits) are read by `admin` when scraped."""

    def __init__(
        self, registry: CollectorRegistry, on_trace: Callable[[Ticket, TracingStopwatch, str, str], None] | None = None
    ) -> None:
        """`on_trace` is told, with API and outcome, of each traced ticket that has ended."""
        self.registry = registry
        self._on_trace = on_trace
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside every counter and histogram that nobody queries

        self._metrics: dict[str, series.Counter | series.Histogram] = {}

        def counter(name: str, text: str, labels: tuple[str, ...]) -> defaultdict[series.Labels, float]:
            metric = self._metrics[name] = series.Counter(name, text, labels)
            registry.register(metric)
            return metric.by

        def seconds(name: str, text: str, labels: tuple[str, ...]) -> series.Histogram:
            metric = self._metrics[name] = series.Histogram(name, text, labels, BUCKETS)
            registry.register(metric)
            return metric

        self._requests = counter("sidecar_requests", "Requests by how they ended.", ("api", "backend", "outcome"))
        self._duration = seconds(
            "sidecar_request_duration_seconds", "Arrival to last byte.", ("api", "backend", "outcome")
        )
        self._queue_wait = seconds(
            "sidecar_queue_wait_seconds", "Arrival to admission, all requeues summed.", ("backend", "priority")
        )
        self._causes = counter(
            "sidecar_queue_wait_cause_seconds", "Seconds in the queue by what held it.", ("backend", "cause")
        )
        self._lock_wait = seconds(
            "sidecar_backend_lock_wait_seconds",
            "Admission to the backend starting work: the GPU lock or batch, or the upstream connection pool.",
            ("backend",),
        )
        self._first_byte = seconds(
            "sidecar_backend_time_to_first_byte_seconds", "Backend starting work to its first byte.", ("backend",)
        )
        self._backend_duration = seconds(
            "sidecar_backend_duration_seconds", "Backend starting work to its last byte.", ("backend",)
        )
        self._attempts = counter(
            "sidecar_upstream_attempts", "Calls to the backend by what they were told.", ("backend", "result")
        )
        self._throttles = counter(
            "sidecar_throttles", "Refusals by the provider by what they were about.", ("backend", "kind")
        )
        self._retries = counter("sidecar_retries", "Attempts after the first, by reason.", ("backend", "reason"))
        self._tokens = counter(
            "sidecar_tokens", "LLM tokens as the provider counted them.", ("backend", "model", "kind")
        )
        self._models: set[str] = set()
        self._codes: set[str] = set()
        self._keyless: set[str] = set()  # backends whose provider refuses the key
        self.batch_size = Histogram(
            "sidecar_batch_size",
            "Requests in one batch of the local backend.",
            ("backend",),
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64),
            registry=registry,
        )
        self.event_loop_lag = Histogram(
            "sidecar_event_loop_lag_seconds",
            "How late the event loop runs a timer.",
            buckets=(0.0005, *BUCKETS[:12]),
            registry=registry,
        )
        self.build_info = Gauge(
            "sidecar_build_info", "1, with what is running in the labels.", ("version", "python"), registry=registry
        )

    def attempt(self, backend: str, result: str) -> None:
        """One call to the backend ended."""
        self._attempts[backend, result] += 1
        if result == "ok":
            self._keyless.discard(backend)

    def key_refused(self, backend: str, message: str) -> None:
        """The provider refused our key. Logged once until it takes it: callers see a 401 and cannot know whose."""
        if backend not in self._keyless:
            self._keyless.add(backend)
            log.warning("%s: %s. Is SIDECAR_DASHSCOPE_API_KEY a key of this provider and region?", backend, message)

    def throttled(self, backend: str, kind: str, code: str) -> None:
        """The provider refused a call because of a limit. An unknown code is logged once."""
        self._throttles[backend, kind] += 1
        if kind == "unknown" and code not in self._codes and len(self._codes) < MAX_MODELS:
            self._codes.add(code)
            log.warning("the provider refused with a code this version does not know: %.80r", code)

    def retry(self, backend: str, why: Exception) -> None:
        """A ticket goes back to the queue after an attempt that brought nothing."""
        self._retries[backend, why.kind if isinstance(why, Throttled) else type(why).__name__] += 1

    def tokens(self, backend: str, model: str, usage: Usage | None) -> None:
        """The provider said what a call cost."""
        if usage is None:
            return
        if model not in self._models:
            if len(self._models) >= MAX_MODELS:
                model = "other"
            else:
                self._models.add(model)
        self._tokens[backend, model, "input"] += usage.input_tokens
        self._tokens[backend, model, "output"] += usage.output_tokens

    def finished(self, ticket: Ticket, api: str, backend: str, outcome: Outcome) -> None:
        """A ticket has ended, whichever way, and its watch is stopped."""
        seconds = ticket.stopwatch.seconds
        self._requests[api, backend, outcome] += 1
        trace_id = ticket.trace_id
        self._duration.observe((api, backend, outcome), sum(seconds.values()), trace_id)
        self._queue_wait.observe((backend, _PRIORITIES[ticket.priority]), seconds["queue"], trace_id)
        if ticket.cause_seconds is not None:
            for cause, spent in ticket.cause_seconds.items():
                if spent > 0:
                    self._causes[backend, cause] += spent
        if ticket.attempts:
            self._lock_wait.observe((backend,), seconds["lock"], trace_id)
            if seconds["first_byte"] > 0:
                self._first_byte.observe((backend,), seconds["first_byte"])
                self._backend_duration.observe((backend,), ticket.stopwatch.upstream_seconds)
        if self._on_trace is not None and isinstance(ticket.stopwatch, TracingStopwatch):
            self._on_trace(ticket, ticket.stopwatch, api, outcome)

    def invalid(self, api: str, backend: str) -> None:
        """A request that never became a ticket: its own fault."""
        self._requests[api, backend, "invalid"] += 1

    def totals(self) -> dict[str, dict[str, float]]:
        """What the metrics have counted since the start, by backend: `requests.ok`, `waited.token_rate`, …

        Sums over the labels that are not in the name; seconds for `waited` and `seconds`. Read from the metrics
        themselves, so that no view can tell another story than they do.
        """
        totals: dict[str, dict[str, float]] = {}
        for metric, name, label in _TOTALS:
            for sample in (sample for family in self._metrics[metric].collect() for sample in family.samples):
                if sample.name.endswith(("_total", "_sum")):
                    of_backend = totals.setdefault(sample.labels["backend"], {})
                    key = name if label is None else f"{name}.{sample.labels[label]}"
                    of_backend[key] = of_backend.get(key, 0.0) + sample.value
        return totals
