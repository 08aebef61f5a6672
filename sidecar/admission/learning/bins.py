"""How much was taken of late, in bins: what a used-up window held."""

from __future__ import annotations

from collections import deque

from sidecar.admission.learning.tuning import HISTORY_BIN_SECONDS


class History:
    """Amounts by the time at which they were sent, for the last `seconds`."""

    __slots__ = ("_bins", "_seconds", "pending")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.pending: list[tuple[float, float]] = []
        """Times and amounts that were sent and are not yet in a bin: an append for each attempt costs no call."""
        self._bins: deque[list[float]] = deque()  # [number, amount]

    def flush(self) -> None:
        """Put what is pending into bins."""
        pending, self.pending = self.pending, []
        for at, amount in pending:
            self._add(at, amount)

    def add(self, at: float, amount: float) -> None:
        """Add what was sent, or take off what was refused (a negative amount)."""
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
        """The amount from then on."""
        if self.pending:
            self.flush()
        number = int(at / HISTORY_BIN_SECONDS)
        total = 0.0
        for one, amount in reversed(self._bins):  # the newest first: what is asked for is mostly of late
            if one < number:
                break
            total += amount
        return total

    def rate(self, now: float, seconds: float) -> float:
        """The amount a second, in the last few seconds."""
        return self.since(now - seconds) / seconds

    def back(self, at: float, amount: float) -> float | None:
        """The time from which on so much was sent until `at`; None if less was."""
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
        """When something was sent next after that time."""
        if self.pending:
            self.flush()
        number, found = int(at / HISTORY_BIN_SECONDS), None
        for one, amount in reversed(self._bins):
            if one <= number:
                break
            if amount > 0:
                found = (one + 1) * HISTORY_BIN_SECONDS
        return found
