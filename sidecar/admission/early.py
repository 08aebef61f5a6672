"""Refusals that come before the pace has reached the limit: chance, other users of the account, or a lower limit."""

from __future__ import annotations

from collections import deque
from math import inf

from .estimate import VAGUE, Estimate
from .policer import Interval, Sent, rate_between

#: So many within so many seconds mean that others use the account too.
SHARED_AFTER, SHARED_WINDOW_SECONDS = 5, 90.0
#: What one leaves of the limit, the first and the second time in an episode; the third time it is measured.
CUTS = (0.985, 0.94)
#: So many of them are not forgotten when a lower limit explains them.
KEPT = 2
#: How unsure that limit is.
MEASURED = 0.15


class EarlyRefusals:
    """An episode of them, and how many there were of late."""

    __slots__ = ("_since", "_taken", "_times", "count")

    def __init__(self) -> None:
        self.count = 0
        """In this episode."""
        self._since = 0.0
        self._taken: list[Sent] = []
        self._times: deque[float] = deque(maxlen=SHARED_AFTER)

    def add(self, now: float, interval: Interval) -> None:
        """One more, and what was taken since the refusal before."""
        self._times.append(now)
        if self.count == 0:
            self._begin(interval.refused)
        else:
            self.count += 1
            self._taken += interval.taken

    def _begin(self, sent: Sent) -> None:
        self.count, self._since, self._taken = 1, sent.at, []

    def often(self, now: float) -> bool:
        """More often than chance and a moving limit explain."""
        return len(self._times) == SHARED_AFTER and self._times[0] > now - SHARED_WINDOW_SECONDS

    def forget(self) -> None:
        """What came of late has been explained."""
        self._times.clear()

    def cut(self, interval: Interval, estimate: Estimate) -> bool:
        """Take a little off the limit, for chance. False if that was done often enough in this episode."""
        if self.count > len(CUTS):
            return False
        estimate.limit *= CUTS[self.count - 1]
        if estimate.unsure > VAGUE:
            estimate.limit = min(estimate.limit, interval.rate(estimate.burst)[1])
        return True

    def measure(self, sent: Sent, estimate: Estimate) -> bool:
        """Learn the lower limit that explains the episode up to this refusal. Whether it has moved."""
        most = rate_between(self._since, self._taken, sent.at, sent.amount, inf)[1]
        moved = estimate.replace(min(most, 0.9 * estimate.limit))
        estimate.unsure = MEASURED
        while len(self._times) > KEPT:  # if there are more all the same, others are likelier than one that falls again
            self._times.popleft()
        self._begin(sent)
        return moved
