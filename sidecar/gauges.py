"""What is, read when Prometheus asks: queues, attempts in flight, learned limits. Nothing is written meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .admission import Admission, Priority


class AdmissionGauges(Collector):
    """The gauges of the contract over every backend's admission. A backend's models are told in sum, or their least."""

    def __init__(self, admissions: Mapping[str, Admission]) -> None:
        self._admissions = admissions

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Give the families as they are now."""
        requests = GaugeMetricFamily(
            "sidecar_queue_requests", "Requests that wait for a permit.", labels=("backend", "priority")
        )
        size = GaugeMetricFamily("sidecar_queue_bytes", "Bytes of request bodies that wait.", labels=("backend",))
        in_flight = GaugeMetricFamily("sidecar_in_flight_requests", "Attempts that hold a permit.", labels=("backend",))
        for name, admission in self._admissions.items():
            for priority in Priority:
                requests.add_metric((name, priority.name.lower()), admission.waiting(priority))
            size.add_metric((name,), admission.waiting_bytes())
            in_flight.add_metric((name,), admission.in_flight())
        yield from (requests, size, in_flight)
