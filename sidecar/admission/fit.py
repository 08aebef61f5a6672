"""Which burst explains the last few refusals.

Each of them bounds the limit, and where the bounds do not meet, they were computed with a burst that is not the
provider's.

Only small bursts are looked for: a large one hardly moves the bounds, since many calls lie between two refusals then.
"""

from __future__ import annotations

from collections import deque
from math import inf

from .policer import Sent, rate_between

#: So many refusals are to be explained, with no more than so many calls between any two of them.
REFUSALS, MOST_CALLS = 4, 60
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
        self._between: deque[tuple[float, list[Sent], Sent]] = deque(maxlen=REFUSALS)

    def add(self, empty_at: float, taken: list[Sent], refused: Sent) -> None:
        """One more refusal; the bucket was empty at `empty_at`, and gave `taken` since."""
        self._between.append((empty_at, taken, refused))

    def forget(self) -> None:
        """What came before does not count: the limit has moved, or other rules were at work."""
        self._between.clear()

    def another(self, burst: float, typical: float) -> tuple[float, float, float] | None:
        """
        Another burst, and the lowest and highest limit with it.

        None if the present one explains the refusals, or if none does: then the limit has moved, and only the last
        refusal counts from now on.
        """
        if len(self._between) < 2 or burst > SMALL * typical or self._bounds(burst) is not None:
            return None
        if any(len(taken) > MOST_CALLS for _, taken, _ in self._between):
            return None
        for factor in TRIED:
            tried = factor * burst
            if tried >= typical and (bounds := self._bounds(tried)) is not None:
                return tried, *bounds
        while len(self._between) > 1:
            self._between.popleft()
        return None

    def _bounds(self, burst: float) -> tuple[float, float] | None:
        low, high = 0.0, inf
        for empty_at, taken, refused in self._between:
            least, most = rate_between(empty_at, taken, refused.at, refused.amount, burst)
            low, high = max(low, least), min(high, most)
            if low > (1.0 + MEET) * high:
                return None
        return min(low, high), high
