"""What the first refusal shows: how much a provider takes at once, and so what its limit may be."""

from __future__ import annotations

from collections.abc import Iterable
from math import exp

from sidecar.admission.learning.estimate import Estimate
from sidecar.admission.learning.policer import Sent
from sidecar.admission.learning.tuning import (
    FIRST_FLOOR,
    FIRST_LASTING,
    FIRST_QUICK,
    FIRST_SEARCH,
    FIRST_SEARCH_CAUTION,
    FIRST_SEARCH_PER_REQUEST,
    FIRST_SECONDS,
    FIRST_USUAL_BURST_SECONDS,
    START_WINDOW_SECONDS,
)


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
        self._since = began if self.is_burst else refused_at - START_WINDOW_SECONDS
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

        taken = limit * (seconds + usual burst seconds): what a bucket held at first, and what flowed in meanwhile. The
        fewer were taken, the less do they tell of the rate: then the search begins higher, but with no more than one
        before each refusal is back.
        """
        typical, seconds = estimate.typical, self._until - self._since
        limit = max(self.taken / (seconds + FIRST_USUAL_BURST_SECONDS), FIRST_FLOOR / (1.0 + seconds) * typical)
        burst = self.taken - limit * seconds
        if self.is_burst:
            per_second = min(FIRST_QUICK / max(self.taken / typical, 1.0), 1.0 / refusal_seconds)
            limit = max(limit, per_second * typical / (1.0 + self._until - self._since))
        else:
            limit = max(FIRST_LASTING * self.taken / seconds, FIRST_FLOOR * typical)
        estimate.limit, estimate.burst = limit, burst if burst >= 2.0 * typical else typical

    def none_for(self, seconds: float, estimate: Estimate) -> None:
        """So long nothing was taken after a refusal: the limit is below one request in that time."""
        most = estimate.typical / seconds
        least = estimate.burst / FIRST_USUAL_BURST_SECONDS if estimate.has_credit else 0.0
        estimate.limit = max(min(estimate.limit, most), least)

    def growth(self, seconds: float, refusal_seconds: float) -> float:
        """What the guess is multiplied by after so many seconds in which it held requests back."""
        return exp(
            min(FIRST_SEARCH / (1.0 + FIRST_SEARCH_CAUTION * refusal_seconds) * seconds, FIRST_SEARCH_PER_REQUEST)
        )
