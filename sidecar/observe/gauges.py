"""Gauges: queues, attempts in flight and learned limits, read from frozen statuses when Prometheus scrapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from sidecar.admission import NO_MODEL, Admission, CircuitState, PoolStatus, Priority, State, UpstreamStatus


class AdmissionGauges(Collector):
    """The gauges that docs/metrics.md lists.

    Each value is the sum over the models of an upstream. A queue is counted only at the first upstream of its pool. A
    limit that is not known yet has no sample. A state is 1 while any model is in it.
    """

    def __init__(self, admissions: Sequence[Admission]) -> None:
        self._admissions = admissions

    def __repr__(self) -> str:
        return f"<AdmissionGauges {','.join(name for admission in self._admissions for name in admission.names)}>"

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the present values."""

        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(name, text, labels=("backend", *labels))

        requests = gauge("sidecar_queue_requests", "Requests that wait for a permit.", "priority")
        size = gauge("sidecar_queue_bytes", "Bytes of request bodies that wait.")
        in_flight = gauge("sidecar_in_flight_requests", "Attempts that hold a permit.")
        request_rate = gauge("sidecar_limit_requests_per_second", "Requests a second that the provider seems to allow.")
        token_rate = gauge("sidecar_limit_tokens_per_second", "LLM tokens a second that the provider seems to allow.")
        concurrency = gauge("sidecar_limit_concurrency", "Attempts in flight that the provider seems to allow.")
        state = gauge("sidecar_limit_state", "1 while a limit is in this state.", "dimension", "state")
        for admission in self._admissions:
            pools = list(admission.status())
            for name in admission.names:
                queues = [pool for pool in pools if pool.upstreams[0].name == name]
                for priority in Priority:
                    waiting = sum(pool.waiting[priority] for pool in queues)
                    requests.add_metric((name, priority.name.lower()), waiting)
                size.add_metric((name,), sum(pool.waiting_bytes for pool in queues))
                upstreams = list(upstreams_named(pools, name))
                in_flight.add_metric((name,), sum(upstream.concurrency.in_flight or 0 for upstream in upstreams))
                upstreams = [upstream for upstream in upstreams if upstream.model != NO_MODEL]
                for family, gates in (
                    (request_rate, [upstream.requests for upstream in upstreams]),
                    (token_rate, [upstream.tokens for upstream in upstreams]),
                    (concurrency, [upstream.concurrency for upstream in upstreams]),
                ):
                    known = sum(gate.limit for gate in gates if gate.limit is not None)
                    if known:
                        family.add_metric((name,), known)
                for (dimension, value), count in _states(upstreams).items():
                    state.add_metric((name, dimension, value), min(count, 1))
        yield from (requests, size, in_flight, request_rate, token_rate, concurrency, state)


def upstreams_named(pools: Sequence[PoolStatus], name: str) -> Iterator[UpstreamStatus]:
    """Yield the upstreams with this name: one upstream per model, or a single upstream that all models share."""
    seen = set()
    for pool in pools:
        for upstream in pool.upstreams:
            if upstream.name == name and upstream.model not in seen:
                seen.add(upstream.model)
                yield upstream


def _states(upstreams: Sequence[UpstreamStatus]) -> Counter[tuple[str, str]]:
    """Count the models in each state. A state that no model is in has the count 0."""
    counts: Counter[tuple[str, str]] = Counter(
        {(dimension, state.value): 0 for dimension in ("requests", "tokens") for state in State}
        | {("hold", state.value): 0 for state in CircuitState}
    )
    for upstream in upstreams:
        counts["requests", upstream.requests.state] += 1
        if upstream.tokens.limit is not None:
            counts["tokens", upstream.tokens.state] += 1
        if upstream.circuit.state:
            counts["hold", upstream.circuit.state] += 1
    return counts
