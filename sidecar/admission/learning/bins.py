"""The recently sent amounts in time bins. They show how much a used-up quota window allowed."""

from __future__ import annotations

from collections import deque

from sidecar.admission.learning.policer import Sent
from sidecar.admission.learning.tuning import HISTORY_BIN_SECONDS


class History:
    """The amounts of the last `seconds`, by send time."""

    __slots__ = ("_bins", "_seconds", "pending")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.pending: list[Sent] = []
        """Attempts that are not in a bin yet. To append here costs no method call for each attempt."""
        self._bins: deque[list[float]] = deque()  # [number, amount]

    def flush(self) -> None:
        """Put the pending amounts into bins."""
        pending, self.pending = self.pending, []
        for sent in pending:
            sent.in_bins = True
            self._add(sent.at, sent.amount)

    def add(self, at: float, amount: float) -> None:
        """Add a sent amount, or subtract a refused amount (then `amount` is negative)."""
        if self.pending:
            self.flush()
        self._add(at, amount)

    def _add(self, at: float, amount: float) -> None:
        number = int(at / HISTORY_BIN_SECONDS)
        bins = self._bins
        if bins and bins[-1][0] == number:
            bins[-1][1] += amount
            return
        if not bins or bins[-1][0] < number:
            bins.append([number, amount])
            while bins[0][0] < number - self._seconds / HISTORY_BIN_SECONDS:
                bins.popleft()
            return
        for one in reversed(bins):
            if one[0] <= number:
                one[1] += amount
                return

    def since(self, at: float) -> float:
        """Return the total amount since the loop time `at`."""
        if self.pending:
            self.flush()
        number = int(at / HISTORY_BIN_SECONDS)
        total = 0.0
        for one, amount in reversed(self._bins):  # newest first, because most calls ask for a recent time
            if one < number:
                break
            total += amount
        return total

    def rate(self, now: float, seconds: float) -> float:
        """Return the amount per second over the last `seconds`."""
        return self.since(now - seconds) / seconds

    def back(self, at: float, amount: float) -> float | None:
        """Return the latest loop time from which `amount` was sent until `at`; None if less was sent."""
        if self.pending:
            self.flush()
        number = int(at / HISTORY_BIN_SECONDS)
        for one, more in reversed(self._bins):
            if one <= number:
                amount -= more
                if amount <= 0.0:
                    return one * HISTORY_BIN_SECONDS
        return None

    def next(self, at: float) -> float | None:
        """Return the end of the first bin after `at` that has an amount above 0; None if there is none."""
        if self.pending:
            self.flush()
        number, found = int(at / HISTORY_BIN_SECONDS), None
        for one, amount in reversed(self._bins):
            if one <= number:
                break
            if amount > 0:
                found = (one + 1) * HISTORY_BIN_SECONDS
        return found
