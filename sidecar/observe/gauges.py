"""Gauges of the present state: queues, attempts in flight, learned limits. They are read only when Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf, isfinite

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from sidecar.admission import Admission, HoldKind, Lane, Priority, State


class AdmissionGauges(Collector):
    """The gauges of the contract, for the admission of every backend. Each value is the sum over the backend's models.

    A limit that is not known yet has no sample. The gauge of a state is 1 while at least one model is in that state.
    """

    def __init__(self, admissions: Mapping[str, Admission]) -> None:
        self._admissions = admissions

    def __repr__(self) -> str:
        return f"<AdmissionGauges {','.join(self._admissions)}>"

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the current samples."""

        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(name, text, labels=("backend", *labels))

        requests = gauge("sidecar_queue_requests", "Requests that wait for a permit.", "priority")
        size = gauge("sidecar_queue_bytes", "Bytes of request bodies that wait.")
        in_flight = gauge("sidecar_in_flight_requests", "Attempts that hold a permit.")
        request_rate = gauge("sidecar_limit_requests_per_second", "Requests a second that the provider seems to allow.")
        token_rate = gauge("sidecar_limit_tokens_per_second", "LLM tokens a second that the provider seems to allow.")
        concurrency = gauge("sidecar_limit_concurrency", "Attempts in flight that the provider seems to allow.")
        state = gauge("sidecar_limit_state", "1 while a limit is in this state.", "dimension", "state")
        for name, admission in self._admissions.items():
            lanes = list(admission.lanes.values())
            for priority in Priority:
                requests.add_metric((name, priority.name.lower()), admission.waiting(priority))
            size.add_metric((name,), admission.waiting_bytes())
            in_flight.add_metric((name,), admission.in_flight())
            for family, limits in (
                (request_rate, [lane.limits.requests.limit for lane in lanes]),
                (token_rate, [lane.limits.tokens.limit for lane in lanes]),
                (concurrency, [lane.limits.permits.learned for lane in lanes]),
            ):
                known = sum(limit for limit in limits if isfinite(limit))
                if known:
                    family.add_metric((name,), known)
            for (dimension, value), count in _states(lanes).items():
                state.add_metric((name, dimension, value), min(count, 1))
        yield from (requests, size, in_flight, request_rate, token_rate, concurrency, state)


def _states(lanes: list[Lane]) -> dict[tuple[str, str], int]:
    """Return the number of models in each state. States without a model are included, with 0."""
    rates = {(dimension, state.value): 0 for dimension in ("requests", "tokens") for state in State}
    counts = rates | {("hold", kind.value): 0 for kind in HoldKind}
    for lane in lanes:
        counts["requests", lane.limits.requests.state.value] += 1
        if lane.limits.tokens.limit < inf:
            counts["tokens", lane.limits.tokens.state.value] += 1
        if lane.limits.hold.kind is not None:
            counts["hold", lane.limits.hold.kind.value] += 1
    return counts
