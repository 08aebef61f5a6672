"""The past of a backend in bounded memory, for the live views. The sampler adds one point per second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sidecar.admission import CAUSES

#: Maximum number of points in `recent` (five minutes at one point per second) and in `whole` (since the start).
POINTS = 300

Point = tuple[float | None, ...]


def _sum(old: float, new: float) -> float:
    return old + new


def _last(old: float, new: float) -> float:
    del old
    return new


#: The fields of a point, and how two neighbouring points are merged into one. None: the mean, weighted by the field
#: `span`.
_MERGE: dict[str, Callable[[float, float], float] | None] = {
    "t": _last,  # seconds since the start, at the end of the point
    "span": _sum,  # seconds that the point covers
    "sent": _sum,  # attempts that ended
    "refused": _sum,  # attempts that the provider refused because of a limit
    "answered": _sum,  # requests with the outcome ok
    "lost": _sum,  # requests that failed because of the sidecar or the provider: shed, deadline, error
    "input_tokens": _sum,
    "output_tokens": _sum,
    "queue_seconds": _sum,  # of requests that ended, as in the histograms; the same for lock and upstream
    "lock_seconds": _sum,
    "upstream_seconds": _sum,
    "limit": _last,  # learned limit in requests/s; null while it is not known
    "token_limit": _last,  # learned limit in LLM tokens/s; null while it is not known
    "in_flight": None,
    **dict.fromkeys((f"waiting.{cause}" for cause in CAUSES), None),  # waiting requests, by the cause of the wait
}
FIELDS = tuple(_MERGE)
_T, _SPAN = FIELDS.index("t"), FIELDS.index("span")


class TimeSeries:
    """The last `POINTS` points, and the whole time since the start in at most `POINTS` points.

    The points since the start get coarser with time: when `whole` is full, each pair of neighbours is merged into one.
    """

    def __init__(self) -> None:
        self.recent: deque[Point] = deque(maxlen=POINTS)
        self.whole: list[Point] = []
        self._points_per_entry = 1
        """The number of added points that one point of `whole` covers."""
        self._in_last = 0
        """The number of added points in the last point of `whole`; 0 when that point is complete."""

    def __repr__(self) -> str:
        return (
            f"<TimeSeries recent={len(self.recent)} whole={len(self.whole)} points_per_entry={self._points_per_entry}>"
        )

    def add(self, point: Point) -> None:
        """Add a point. Its fields are in the order of `FIELDS`."""
        self.recent.append(point)
        if self._in_last:
            self.whole[-1] = merged(self.whole[-1], point)
        else:
            if len(self.whole) >= POINTS:
                self.whole = [merged(*self.whole[at : at + 2]) for at in range(0, POINTS, 2)]
                self._points_per_entry *= 2
            self.whole.append(point)
        self._in_last = (self._in_last + 1) % self._points_per_entry


def merged(old: Point, new: Point) -> Point:
    """Return one point for two neighbours."""
    spans = (old[_SPAN] or 0.0, new[_SPAN] or 0.0)
    share = spans[1] / (sum(spans) or 1.0)

    def merge_field(how: Callable[[float, float], float] | None, a: float | None, b: float | None) -> float | None:
        if a is None or b is None or how is _last:
            return b
        return round(a + (b - a) * share, 3) if how is None else round(how(a, b), 3)

    return tuple(merge_field(how, a, b) for how, a, b in zip(_MERGE.values(), old, new, strict=True))
