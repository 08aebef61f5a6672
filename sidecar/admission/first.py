"""What the first refusal shows: how much a provider takes at once, and so what its limit may be."""

from __future__ import annotations

from collections.abc import Iterable
from math import exp

from sidecar.admission.estimate import Estimate
from sidecar.admission.policer import Sent
from sidecar.admission.start import Start

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
#: Growth of the guess while nothing contradicts it: a second, where refusals come back at once; how much less for each
#: second that they take; and from one request to the next at most.
SEARCH, SEARCH_CAUTION, SEARCH_PER_REQUEST = 2.0, 5.0, 0.35


class FirstBurst:
    """The calls up to the first refusal. Whether they were taken may come out only after it."""

    __slots__ = ("_since", "_until", "is_burst", "open", "searching", "taken")

    def __init__(self, refused_at: float, began: float, sent: Iterable[Sent]) -> None:
        self.is_burst = refused_at - began <= FIRST_SECONDS
        """It came so soon that what was taken is mostly credit: the limit is a guess, and may well be far off."""
        self.open = True
        """Its refusals are still coming back."""
        self.searching = True
        """The provider's bucket was empty, so that whatever is taken shows more."""
        self._since = began if self.is_burst else refused_at - Start.WINDOW_SECONDS
        self._until = refused_at
        self.taken = sum(one.amount for one in sent if one.at >= self._since and not one.refused)

    def holds(self, one: Sent) -> bool:
        """It is one of those that were taken, and what it took still counts."""
        return self.open and self._since <= one.at <= self._until and not one.refused

    def correct(self, more: float, estimate: Estimate, refusal_seconds: float) -> None:
        """So much more was taken than it seemed; guess again."""
        self.taken += more
        self.guess(estimate, refusal_seconds)

    def guess(self, estimate: Estimate, refusal_seconds: float) -> None:
        """
        Guess the limit from which on to look for a higher one, and the burst.

        taken = limit * (seconds + USUAL_BURST_SECONDS): what a bucket held at first, and what flowed in meanwhile. The
        fewer were taken, the less do they tell of the rate: then the search begins higher, but with no more than one
        before each refusal is back.
        """
        typical, seconds = estimate.typical, self._until - self._since
        limit = max(self.taken / (seconds + USUAL_BURST_SECONDS), FLOOR / (1.0 + seconds) * typical)
        burst = self.taken - limit * seconds
        if self.is_burst:
            per_second = min(QUICK / max(self.taken / typical, 1.0), 1.0 / refusal_seconds)
            limit = max(limit, per_second * typical / (1.0 + self._until - self._since))
        else:
            limit = max(LASTING * self.taken / seconds, FLOOR * typical)
        estimate.limit, estimate.burst = limit, burst if burst >= 2.0 * typical else typical

    def none_for(self, seconds: float, estimate: Estimate) -> None:
        """So long nothing was taken after a refusal: the limit is below one request in that time."""
        most = estimate.typical / seconds
        least = estimate.burst / USUAL_BURST_SECONDS if estimate.has_credit else 0.0
        estimate.limit = max(min(estimate.limit, most), least)

    def growth(self, seconds: float, refusal_seconds: float) -> float:
        """What the guess is multiplied by after so many seconds in which it held requests back."""
        return exp(min(SEARCH / (1.0 + SEARCH_CAUTION * refusal_seconds) * seconds, SEARCH_PER_REQUEST))
