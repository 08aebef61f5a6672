"""Refusals that come before the pace has reached the limit: chance, other users of the account, or a lower limit."""

from __future__ import annotations

from math import inf

from sidecar.admission.learning.estimate import Estimate
from sidecar.admission.learning.policer import Interval, Sent, rate_between
from sidecar.admission.learning.tuning import EARLY_CUTS, EARLY_MEASURED, ESTIMATE_VAGUE


class EarlyRefusals:
    """One episode of early refusals."""

    __slots__ = ("_since", "_taken", "count")

    def __init__(self) -> None:
        self.count = 0
        """Number of early refusals in this episode."""
        self._since = 0.0
        self._taken: list[Sent] = []

    def add(self, interval: Interval) -> None:
        """Count an early refusal, and add the calls accepted since the previous refusal."""
        if self.count == 0:
            self._begin(interval.refused)
        else:
            self.count += 1
            self._taken += interval.taken

    def _begin(self, sent: Sent) -> None:
        self.count, self._since, self._taken = 1, sent.at, []

    def cut(self, interval: Interval, estimate: Estimate) -> bool:
        """Lower the limit a little, because the refusal may be chance. Return False after enough cuts in an episode."""
        if self.count > len(EARLY_CUTS):
            return False
        estimate.limit *= EARLY_CUTS[self.count - 1]
        if estimate.unsure > ESTIMATE_VAGUE:
            estimate.limit = min(estimate.limit, interval.rate(estimate.burst)[1])
        return True

    def measure(self, sent: Sent, estimate: Estimate) -> float:
        """Learn the lower limit that explains the episode up to now. Return what `Estimate.replace` returns."""
        most = rate_between(self._since, self._taken, sent.at, sent.amount, inf)[1]
        off = estimate.replace(min(most, 0.9 * estimate.limit))
        estimate.unsure = EARLY_MEASURED
        self._begin(sent)
        return off
