"""What the first refusal shows: how much a provider takes at once, and so what its limit may be."""

from __future__ import annotations

from collections.abc import Iterable

from .policer import Sent
from .start import Start

#: Requests a second that any provider is taken to allow when a first refusal at once says nothing else.
FLOOR = 2.0
#: A bucket may be small and yet fill quickly: more is looked for from so many requests a second on.
QUICK = 32.0
#: Seconds of the limit that a bucket is taken to hold when nothing is known of it.
USUAL_BURST_SECONDS = 1.5
#: A first refusal within so many seconds shows a burst, and what came later a rate,
FIRST_SECONDS = 5.0
#: ... of which so much is taken to last.
LASTING = 0.8


class FirstBurst:
    """The calls up to the first refusal. Whether they were taken may come out only after it."""

    __slots__ = ("_since", "_until", "is_burst", "taken")

    def __init__(self, refused_at: float, began: float, sent: Iterable[Sent]) -> None:
        self.is_burst = refused_at - began <= FIRST_SECONDS
        """It came so soon that what was taken is mostly credit."""
        self._since = began if self.is_burst else refused_at - Start.WINDOW_SECONDS
        self._until = refused_at
        self.taken = sum(one.amount for one in sent if one.at >= self._since and not one.refused)

    def holds(self, one: Sent) -> bool:
        """It is one of those that were taken."""
        return self._since <= one.at <= self._until and not one.refused

    def guess(self, typical: float) -> tuple[float, float]:
        """
        The limit, a second, and the burst.

        taken = limit * (seconds + USUAL_BURST_SECONDS): what a bucket held at first, and what flowed in meanwhile.
        """
        seconds = self._until - self._since
        limit = max(self.taken / (seconds + USUAL_BURST_SECONDS), FLOOR / (1.0 + seconds) * typical)
        burst = self.taken - limit * seconds
        if not self.is_burst:
            limit = max(LASTING * self.taken / seconds, FLOOR * typical)
        return limit, burst if burst >= 2.0 * typical else typical

    def quick(self, typical: float, refusal_seconds: float) -> float:
        """
        The limit from which on to look for a higher one: the fewer were taken, the less do they tell of the rate.

        No more goes out than one before each refusal is back.
        """
        if not self.is_burst:
            return 0.0
        per_second = min(QUICK / max(self.taken / typical, 1.0), 1.0 / refusal_seconds)
        return per_second * typical / (1.0 + self._until - self._since)
