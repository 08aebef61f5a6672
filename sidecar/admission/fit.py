"""Which burst explains the last few refusals.

Each of them bounds the limit, and where the bounds do not meet, they were computed with a burst that is not the
provider's.

Only small bursts are looked for: a large one hardly moves the bounds, since many calls lie between two refusals then.
"""

from __future__ import annotations

from collections import deque
from math import inf

from sidecar.admission.estimate import SUREST, Estimate
from sidecar.admission.policer import Interval
from sidecar.admission.states import State

#: So many refusals are to be explained, with no more than so many calls between any two of them.
REFUSALS, MAX_CALLS = 4, 60
#: Bounds that miss one another by this share meet, for clocks and ways are uneven.
MEET = 0.01
#: A burst of more than so many usual requests is not small.
SMALL = 4.0
#: What is tried, as multiples of the present burst: the nearest first.
TRIED = (1.25, 0.8, 1.6, 0.6, 2.0, 0.5, 2.5, 0.4, 3.2, 4.0, 6.0)


class Fit:
    """The last few refusals, each with what was taken since the one before."""

    __slots__ = ("_between",)

    def __init__(self) -> None:
        self._between: deque[Interval] = deque(maxlen=REFUSALS)

    def forget(self) -> None:
        """What came before does not count: the limit has moved, or other rules were at work."""
        self._between.clear()

    def refused(self, now: float, interval: Interval, estimate: Estimate) -> bool:
        """
        One more. Whether another burst, and only that, explains them; then it is learned, with the limit.

        If none does, the limit has moved, and only the last refusal counts from now on.
        """
        self._between.append(interval)
        burst, typical = estimate.burst, estimate.typical
        if len(self._between) < 2 or burst > SMALL * typical or self._bounds(burst) is not None:
            return False
        if any(len(interval.taken) > MAX_CALLS for interval in self._between):
            return False
        for factor in TRIED:
            tried = factor * burst
            if tried >= typical and (bounds := self._bounds(tried)) is not None:
                low, high = bounds
                estimate.burst = tried
                estimate.know((low + high) / 2, (high - low) / (low + high), surest=3 * SUREST)
                estimate.to(now, State.ASSESS, "refused: the bucket holds more or less than was thought")
                return True
        while len(self._between) > 1:
            self._between.popleft()
        return False

    def _bounds(self, burst: float) -> tuple[float, float] | None:
        low, high = 0.0, inf
        for interval in self._between:
            least, most = interval.rate(burst)
            low, high = max(low, least), min(high, most)
            if low > (1.0 + MEET) * high:
                return None
        return min(low, high), high
