"""Refusals that come before the pace has reached the limit: chance, other users of the account, or a lower limit."""

from __future__ import annotations

from math import inf

from sidecar.admission.learning.estimate import Estimate
from sidecar.admission.learning.policer import Interval, Sent, rate_between
from sidecar.admission.learning.tuning import EARLY_CUTS, EARLY_MEASURED, ESTIMATE_VAGUE


class EarlyRefusals:
    """An episode of them."""

    __slots__ = ("_since", "_taken", "count")

    def __init__(self) -> None:
        self.count = 0
        """In this episode."""
        self._since = 0.0
        self._taken: list[Sent] = []

    def add(self, interval: Interval) -> None:
        """One more, and what was taken since the refusal before."""
        if self.count == 0:
            self._begin(interval.refused)
        else:
            self.count += 1
            self._taken += interval.taken

    def _begin(self, sent: Sent) -> None:
        self.count, self._since, self._taken = 1, sent.at, []

    def cut(self, interval: Interval, estimate: Estimate) -> bool:
        """Take a little off the limit, for chance. False if that was done often enough in this episode."""
        if self.count > len(EARLY_CUTS):
            return False
        estimate.limit *= EARLY_CUTS[self.count - 1]
        if estimate.unsure > ESTIMATE_VAGUE:
            estimate.limit = min(estimate.limit, interval.rate(estimate.burst)[1])
        return True

    def measure(self, sent: Sent, estimate: Estimate) -> float:
        """Learn the lower limit that explains the episode up to this refusal. Gives by what share the other was off."""
        most = rate_between(self._since, self._taken, sent.at, sent.amount, inf)[1]
        off = estimate.replace(min(most, 0.9 * estimate.limit))
        estimate.unsure = EARLY_MEASURED
        self._begin(sent)
        return off
