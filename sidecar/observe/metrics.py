"""The metrics that docs/metrics.md lists. Times are written once, when a ticket has ended, from the ticket's stopwatch.

The request path reads nothing from this module, so metrics cannot delay or break a request. All state is in a `Metrics`
object, so one process can run two sidecars.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from math import inf
from typing import Literal

from prometheus_client import CollectorRegistry, Gauge, Histogram, disable_created_metrics

from backends.base import Throttled, Usage
from sidecar.admission import Priority, Ticket
from sidecar.observe import instruments
from sidecar.observe.log_writer import DroppedLines
from sidecar.observe.refusal_words import RefusalWords
from sidecar.observe.trace import TracingStopwatch

log = logging.getLogger("sidecar")

RequestOutcome = Literal[
    "ok", "invalid", "rejected_upstream", "moderated", "shed", "superseded", "deadline", "cancelled", "error"
]

#: Upper bounds of the histogram buckets, in seconds: 1 ms to 120 s in steps of about a factor of 2.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 1.5, 2.5, 5, 10, 15, 30, 45, 60, 90, 120)
#: Maximum number of model names with their own label value. Later names get the value `other`, so that callers cannot
#: create an unlimited number of time series.
MAX_MODELS = 20

#: The log line for each resource that can run out, and the seconds between two such lines.
_EXHAUSTED = {
    "data_connections": "all callers' connections are in use: an idle one is closed for each new one; if none is idle, "
    "the new one is closed. Callers should keep fewer connections, or the limit of open files (ulimit -n) be raised",
    "admin_connections": "all connections of the admin port are in use: the oldest one is closed for each new one, so "
    "that probes are answered",
    "descriptors": "the process has no file descriptor left (ulimit -n): callers' idle connections are closed",
}
_EXHAUSTED_LOG_SECONDS = 3600.0

#: The label value of each priority.
_PRIORITIES = {priority: priority.name.lower() for priority in Priority}

#: The metrics that `totals` reads. Rows: metric, key prefix, label. The key in `totals` is `prefix.label-value`, for
#: example `requests.ok`; without a label it is the prefix.
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
    """Every metric that requests write. `AdmissionGauges` has the gauges of the present state (queues, limits)."""

    def __init__(
        self, registry: CollectorRegistry, on_trace: Callable[[Ticket, TracingStopwatch, str, str], None] | None = None
    ) -> None:
        """`on_trace` is called with each traced ticket that has ended, its stopwatch, API and outcome."""
        self.registry = registry
        self._on_trace = on_trace
        # Otherwise each counter and histogram has a second series with its time of creation, which nobody queries.
        disable_created_metrics()  # type: ignore[no-untyped-call]

        self._metrics: dict[str, instruments.Counter | instruments.Histogram] = {}

        def counter(name: str, text: str, labels: tuple[str, ...]) -> defaultdict[instruments.Labels, float]:
            metric = self._metrics[name] = instruments.Counter(name, text, labels)
            registry.register(metric)
            return metric.by

        def seconds(name: str, text: str, labels: tuple[str, ...]) -> instruments.Histogram:
            metric = self._metrics[name] = instruments.Histogram(name, text, labels, BUCKETS)
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
            "sidecar_tokens",
            "LLM tokens, as the provider counted them or as an estimate.",
            ("backend", "model", "kind", "counted"),
        )
        self._labelled_models: set[str] = set()
        self.refusals = RefusalWords()
        self._key_refused_by: set[str] = set()  # backends whose provider has refused the key
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
        self._http_implementation = Gauge(
            "sidecar_http_implementation",
            "1 for the implementation of HTTP that serves: `documented` is slower, see the log.",
            ("implementation",),
            registry=registry,
        )

        self._config_reload_success = Gauge(
            "sidecar_config_reload_success",
            "1 if the settings in force are those that were loaded last, 0 if the last load failed.",
            registry=registry,
        )
        self._config_reload_success_time = Gauge(
            "sidecar_config_reload_success_timestamp_seconds",
            "Unix time at which settings were last loaded with success; the start counts.",
            registry=registry,
        )
        self._exhausted = counter(
            "sidecar_resource_exhausted", "Times that a resource of the process had run out.", ("resource",)
        )
        self._exhausted_logged_at: dict[str, float] = {}  # resource: monotonic time of its last log line
        self.config_reloaded(success=True)
        registry.register(DroppedLines())

    def config_reloaded(self, *, success: bool) -> None:
        """Record a load of the settings."""
        self._config_reload_success.set(success)
        if success:
            self._config_reload_success_time.set_to_current_time()

    def exhausted(self, resource: Literal["data_connections", "admin_connections", "descriptors"]) -> None:
        """Count that a resource of the process had run out. Log this once an hour."""
        self._exhausted[resource,] += 1
        now = time.monotonic()
        if now - self._exhausted_logged_at.get(resource, -inf) >= _EXHAUSTED_LOG_SECONDS:
            self._exhausted_logged_at[resource] = now
            log.warning("%s", _EXHAUSTED[resource])

    def set_http_implementation(self, name: str) -> None:
        """Set which implementation of HTTP the start has chosen: `internal` or `documented`."""
        for implementation in ("internal", "documented"):
            self._http_implementation.labels(implementation).set(implementation == name)

    def __repr__(self) -> str:
        return f"<Metrics requests={sum(self._requests.values()):.0f} attempts={sum(self._attempts.values()):.0f}>"

    def attempt(self, backend: str, result: str) -> None:
        """Count a call to the backend that has ended with this result."""
        self._attempts[backend, result] += 1
        if result == "ok":
            self._key_refused_by.discard(backend)

    def key_refused(self, backend: str, message: str) -> None:
        """Log that the provider refused the sidecar's key. Repeat this only if a key was accepted in between.

        The log line is needed because a caller that gets the 401 cannot see which key was refused.
        """
        if backend not in self._key_refused_by:
            self._key_refused_by.add(backend)
            log.warning("%s: %s. Is SIDECAR_DASHSCOPE_API_KEY a key of this provider and region?", backend, message)

    def throttled(self, backend: str, kind: str) -> None:
        """Count a call that the provider refused because of a limit."""
        self._throttles[backend, kind] += 1

    def retry(self, backend: str, why: Exception) -> None:
        """Count a ticket that returns to the queue after an attempt without an answer."""
        self._retries[backend, why.kind if isinstance(why, Throttled) else type(why).__name__] += 1

    def tokens(self, backend: str, model: str, usage: Usage, counted: Literal["provider", "estimate"]) -> None:
        """Count the LLM tokens of a call. `counted` says who has counted them."""
        if model not in self._labelled_models:
            if len(self._labelled_models) >= MAX_MODELS:
                model = "other"
            else:
                self._labelled_models.add(model)
        self._tokens[backend, model, "input", counted] += usage.input_tokens
        self._tokens[backend, model, "output", counted] += usage.output_tokens

    def finished(self, ticket: Ticket, api: str, backend: str, outcome: RequestOutcome) -> None:
        """Write the metrics of a ticket that has ended with any outcome. Its stopwatch must be stopped."""
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
        """Count an invalid request, which never became a ticket."""
        self._requests[api, backend, "invalid"] += 1

    def totals(self) -> dict[str, dict[str, float]]:
        """Return the sums since the start, by backend and key: `requests.ok`, `waited.token_rate`, …

        Each value is the sum over all labels that are not in the key. Values of `waited.…` and `seconds.…` are seconds.
        The sums are read from the metrics, so every view shows the same numbers as the metrics.
        """
        totals: dict[str, dict[str, float]] = {}
        for metric, name, label in _TOTALS:
            for sample in (sample for family in self._metrics[metric].collect() for sample in family.samples):
                if sample.name.endswith(("_total", "_sum")):
                    of_backend = totals.setdefault(sample.labels["backend"], {})
                    key = name if label is None else f"{name}.{sample.labels[label]}"
                    of_backend[key] = of_backend.get(key, 0.0) + sample.value
        return totals
