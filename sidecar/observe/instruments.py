"""Counters and histograms that requests write and Prometheus reads.

The classes of prometheus-client take a lock and search all buckets for each observation. The classes here only add a
number, and only in the event loop, so they need no lock. prometheus-client still writes the names and the text.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import inf

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]


class Counter(Collector):
    """A counter with labels. Write it with `counter.by[label_values] += amount`."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self.by: defaultdict[Labels, float] = defaultdict(float)
        self._described = name, text, labels

    def __repr__(self) -> str:
        return f"<Counter {self._described[0]} series={len(self.by)}>"

    def collect(self) -> Iterator[Metric]:
        """Return the current samples."""
        name, text, labels = self._described
        family = CounterMetricFamily(name, text, labels=labels)
        for values, count in self.by.items():
            family.add_metric(values, count)
        yield family


class _Bins:
    """One series of a histogram."""

    __slots__ = ("counts", "exemplars", "total")

    def __init__(self, size: int) -> None:
        self.counts = [0] * size
        self.exemplars: list[Exemplar | None] = [None] * size
        self.total = 0.0


class Histogram(Collector):
    """A histogram with labels: one bin up to each of `bounds` (inclusive) and one bin above the last bound."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._described = name, text, labels
        self._bounds = bounds
        self._by: dict[Labels, _Bins] = {}

    def __repr__(self) -> str:
        return f"<Histogram {self._described[0]} series={len(self._by)}>"

    def observe(self, labels: Labels, value: float, trace_id: str | None = None) -> None:
        """Add one observation. `trace_id`: the sampled trace of the request, which becomes an exemplar."""
        bins = self._by.get(labels)
        if bins is None:
            bins = self._by[labels] = _Bins(len(self._bounds) + 1)
        at = bisect_left(self._bounds, value)
        bins.counts[at] += 1
        bins.total += value
        if trace_id is not None:
            bins.exemplars[at] = Exemplar({"trace_id": trace_id}, value, time.time())

    def collect(self) -> Iterator[Metric]:
        """Return the current samples."""
        name, text, labels = self._described
        family = HistogramMetricFamily(name, text, labels=labels)
        names = [floatToGoString(bound) for bound in (*self._bounds, inf)]  # type: ignore[no-untyped-call]
        for values, bins in self._by.items():
            under, buckets = 0, []
            for bound, count, exemplar in zip(names, bins.counts, bins.exemplars, strict=True):
                under += count
                buckets.append((bound, under) if exemplar is None else (bound, under, exemplar))
            family.add_metric(values, buckets, bins.total)
        yield family
