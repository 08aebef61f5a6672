"""Guess burst and limit from the first refusal and the amount that the provider accepted before it."""

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
    """The calls sent up to the first refusal. Their verdicts may arrive only after it."""

    __slots__ = ("_since", "_until", "is_burst", "open", "searching", "taken")

    def __init__(self, refused_at: float, began: float, sent: Iterable[Sent]) -> None:
        began = min(began, refused_at)  # the refused call may have been sent before the learner began again
        self.is_burst = refused_at - began <= FIRST_SECONDS
        """True: the refusal came so soon that mostly a saved burst was accepted. The limit is then a guess, which may
        be far off."""
        self.open = True
        """True while refusals of these calls may still arrive."""
        self.searching = True
        """True: the provider's bucket was empty, so accepted calls show a higher limit, and the guess grows."""
        self._since = began if self.is_burst else refused_at - START_WINDOW_SECONDS
        self._until = refused_at
        self.taken = sum(one.amount for one in sent if one.at >= self._since and not one.refused)

    def holds(self, one: Sent) -> bool:
        """Return True if `one` was sent before the refusal, was not refused, and its amount still counts."""
        return self.open and self._since <= one.at <= self._until and not one.refused

    def correct(self, more: float, estimate: Estimate, refusal_seconds: float) -> None:
        """Add `more` to the accepted amount (negative: less was accepted), and guess again."""
        self.taken += more
        self.guess(estimate, refusal_seconds)

    def guess(self, estimate: Estimate, refusal_seconds: float) -> None:
        """
        Guess the burst, and the limit from which the search for a higher limit begins.

        taken = limit * (seconds + usual burst seconds): the first content of the bucket, and the amount refilled
        meanwhile. A small accepted amount says little about the rate. Then the search begins at a higher rate, but with
        at most one request per `refusal_seconds`.
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
        """Lower the limit below one request per `seconds`, because nothing was accepted for so long after a refusal."""
        most = estimate.typical / seconds
        least = estimate.burst / FIRST_USUAL_BURST_SECONDS if estimate.has_credit else 0.0
        estimate.limit = max(min(estimate.limit, most), least)

    def growth(self, seconds: float, refusal_seconds: float) -> float:
        """Return the factor for the guess after `seconds` in which it delayed requests."""
        return exp(
            min(FIRST_SEARCH / (1.0 + FIRST_SEARCH_CAUTION * refusal_seconds) * seconds, FIRST_SEARCH_PER_REQUEST)
        )
