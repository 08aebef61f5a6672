"""The gauge `sidecar_held_bytes`: what callers and upstreams make the process hold, by the place where it is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from sidecar.admission import Admission

#: The places, in the order in which a request passes them.
PLACES = ("heads", "receiving", "pipelined", "waiting", "in_flight", "answers", "slow_readers", "pictures")


class HeldBytes(Collector):
    """Reads the counts where they are kept, at each scrape."""

    def __init__(self, admissions: Sequence[Admission]) -> None:
        self._admissions = admissions
        self.sources: list[Callable[[], Mapping[str, int]]] = [self._of_admissions]
        """Functions that return bytes by place. The bytes of the same place are added."""

    def __repr__(self) -> str:
        return f"<HeldBytes {self.by_place()}>"

    def by_place(self) -> dict[str, int]:
        """Return the bytes of each place."""
        held = dict.fromkeys(PLACES, 0)
        for source in self.sources:
            for place, count in source().items():
                held[place] += count
        return held

    def _of_admissions(self) -> dict[str, int]:
        in_flight = sum(admission.bytes_in_flight() for admission in self._admissions)
        waiting = sum(admission.waiting_bytes() for admission in self._admissions)
        return {"waiting": waiting, "in_flight": in_flight}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the present values."""
        family = GaugeMetricFamily(
            "sidecar_held_bytes", "Bytes that callers and upstreams make the process hold.", labels=("where",)
        )
        for place, count in self.by_place().items():
            family.add_metric((place,), count)
        yield family
