"""What was, second by second: a bounded memory for the live views. Filled once a second by `watch`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sidecar.admission import CAUSES

#: Points kept of the last seconds, and of everything since the start.
POINTS = 300

Point = tuple[float | None, ...]


def _sum(old: float, new: float) -> float:
    return old + new


def _last(old: float, new: float) -> float:
    del old
    return new


#: What a point holds, and how two neighbours become one; None: the mean, weighted by the spans.
_MERGE: dict[str, Callable[[float, float], float] | None] = {
    "t": _last,  # seconds since the start, at the point's end
    "span": _sum,  # seconds that it covers
    "sent": _sum,  # attempts that ended
    "refused": _sum,  # ... refused by the provider because of a limit
    "answered": _sum,  # requests that ended well
    "lost": _sum,  # requests that ended otherwise by our or the provider's doing: shed, deadline, error
    "input_tokens": _sum,
    "output_tokens": _sum,
    "queue_seconds": _sum,  # of requests that ended, as in the histograms
    "lock_seconds": _sum,
    "upstream_seconds": _sum,
    "limit": _last,  # requests a second that were learned; null while nothing was
    "token_limit": _last,  # the same in LLM tokens
    "in_flight": None,
    **dict.fromkeys((f"waiting.{cause}" for cause in CAUSES), None),  # requests in the queue, by what holds it
}
FIELDS = tuple(_MERGE)
_T, _SPAN = FIELDS.index("t"), FIELDS.index("span")


class TimeSeries:
    """The last `POINTS` points as they came, and all since the start in at most as many: coarser as time goes by."""

    def __init__(self) -> None:
        self.recent: deque[Point] = deque(maxlen=POINTS)
        self.whole: list[Point] = []
        self._each = 1
        """Points that are merged into one of `whole`."""
        self._merged = 0

    def add(self, point: Point) -> None:
        """Take a point, its fields in the order of `FIELDS`."""
        self.recent.append(point)
        if self._merged:
            self.whole[-1] = merged(self.whole[-1], point)
        else:
            if len(self.whole) >= POINTS:
                self.whole = [merged(*self.whole[at : at + 2]) for at in range(0, POINTS, 2)]
                self._each *= 2
            self.whole.append(point)
        self._merged = (self._merged + 1) % self._each


def merged(old: Point, new: Point) -> Point:
    """One point for two neighbours."""
    spans = (old[_SPAN] or 0.0, new[_SPAN] or 0.0)
    share = spans[1] / (sum(spans) or 1.0)

    def one(how: Callable[[float, float], float] | None, a: float | None, b: float | None) -> float | None:
        if a is None or b is None or how is _last:
            return b
        return round(a + (b - a) * share, 3) if how is None else round(how(a, b), 3)

    return tuple(one(how, a, b) for how, a, b in zip(_MERGE.values(), old, new, strict=True))
