"""Find the burst that explains the last few refusals.

Each refusal bounds the limit. If these bounds have no common value, they were computed with a burst that differs from
the provider's.

Only small bursts are tried. With a large burst, many calls lie between two refusals, so it hardly moves the bounds.
"""

from __future__ import annotations

from collections import deque
from math import inf

from sidecar.admission.learning.estimate import Estimate
from sidecar.admission.learning.policer import Interval
from sidecar.admission.learning.states import Event
from sidecar.admission.learning.tuning import (
    ESTIMATE_SUREST,
    FIT_MAX_CALLS,
    FIT_MEET,
    FIT_REFUSALS,
    FIT_SMALL,
    FIT_TRIED,
)


class Fit:
    """The last few refusals, each with the calls accepted since the previous refusal."""

    __slots__ = ("_between",)

    def __init__(self) -> None:
        self._between: deque[Interval] = deque(maxlen=FIT_REFUSALS)

    def forget(self) -> None:
        """Forget the refusals so far, because the limit has changed, or other rules were in effect."""
        self._between.clear()

    def refused(self, now: float, interval: Interval, estimate: Estimate) -> bool:
        """
        Add a refusal. Return True if only another burst explains the refusals; then learn that burst and the limit.

        If no burst explains them, the limit has changed, and only the last refusal counts from now on.
        """
        self._between.append(interval)
        burst, typical = estimate.burst, estimate.typical
        if len(self._between) < 2 or burst > FIT_SMALL * typical or self._bounds(burst) is not None:
            return False
        if any(len(interval.taken) > FIT_MAX_CALLS for interval in self._between):
            return False
        for factor in FIT_TRIED:
            tried = factor * burst
            if tried >= typical and (bounds := self._bounds(tried)) is not None:
                low, high = bounds
                estimate.burst = tried
                estimate.know((low + high) / 2, (high - low) / (low + high), surest=3 * ESTIMATE_SUREST)
                estimate.on(now, Event.BURST_FITTED, "refused: the bucket holds more or less than was thought")
                return True
        while len(self._between) > 1:
            self._between.popleft()
        return False

    def _bounds(self, burst: float) -> tuple[float, float] | None:
        low, high = 0.0, inf
        for interval in self._between:
            least, most = interval.rate(burst)
            low, high = max(low, least), min(high, most)
            if low > (1.0 + FIT_MEET) * high:
                return None
        return min(low, high), high
