"""What is known of one dimension's limit: how high it is, how much is let through at once, and how sure that is."""

from __future__ import annotations

from math import inf

from sidecar.admission.learning.policer import Interval
from sidecar.admission.learning.states import TRANSITIONS, Event, State
from sidecar.admission.learning.tuning import (
    ESTIMATE_LARGEST_CUT,
    ESTIMATE_MAX_BURST_SECONDS,
    ESTIMATE_MOVED,
    ESTIMATE_RECALLED,
    ESTIMATE_SUREST,
    ESTIMATE_UNSUREST,
    ESTIMATE_VAGUE,
    START_CREDIT,
)


class Estimate:
    """A provider's bucket, as far as refusals have shown. Rates and amounts are in the dimension's unit."""

    __slots__ = ("burst", "changed_at", "changed_why", "limit", "state", "typical", "unsure")

    def __init__(self, now: float, typical: float) -> None:
        self.state = State.START
        self.limit = inf
        """What may be sent a second; infinite while nothing was ever refused."""
        self.burst = START_CREDIT * typical
        """What the provider is taken to let through at once after a pause."""
        self.unsure = ESTIMATE_UNSUREST
        """The share by which the limit may be off."""
        self.typical = typical
        """The amount of a usual request."""
        self.changed_at = now
        self.changed_why = "nothing was refused yet"

    def on(self, now: float, event: Event, why: str) -> None:
        """Change the state as `TRANSITIONS` says. Raises `KeyError` for an event that is impossible in this state."""
        self.state = TRANSITIONS[self.state, event]
        self.changed(now, why)

    def changed(self, now: float, why: str) -> None:
        """Tell operators that it changed, and why."""
        self.changed_at = now
        self.changed_why = why

    @property
    def has_credit(self) -> bool:
        """A pause saves up more than the next request."""
        return self.burst >= 2.0 * self.typical

    @property
    def cushion(self) -> float:
        """What is left in the provider's bucket, so that chance (other callers, uneven ways) does not empty it."""
        return min(max(0.1 * self.burst, self.typical), 3.0 * self.typical)

    def bounds(self, interval: Interval) -> tuple[float, float]:
        """The lowest and the highest limit that explain what was taken between two refusals."""
        low, high = interval.rate(self.burst)
        for _ in range(2):  # a limit that has risen has mostly risen with its credit
            risen = (low + high) / 2 / self.limit
            if risen < 1.0 + ESTIMATE_MOVED or self.unsure > ESTIMATE_VAGUE or not self.has_credit:
                break
            low, high = interval.rate(risen * self.burst)
        return low, high

    def know(self, limit: float, unsure: float, *, surest: float = ESTIMATE_SUREST) -> None:
        """Take this for the limit, to within that share."""
        self.limit = limit
        self.unsure = min(max(unsure, surest), ESTIMATE_UNSUREST)

    def narrow(self, low: float, high: float, *, blur: float = 0.0, anew: bool = False) -> float:
        """
        A refusal bounds the limit, and no better than to within a share of `blur`. Gives what `replace` does.

        `anew`: whatever was thought of it before does not count.
        """
        width, middle = max((high - low) / (low + high), blur), (low + high) / 2
        if self.unsure >= ESTIMATE_UNSUREST:  # as high as that leaves: few calls hardly bound it from below
            middle = max(middle, high / (1.0 + ESTIMATE_UNSUREST))
        if not anew and low <= self.limit <= high:
            limit = self.limit + self.unsure / (self.unsure + width) * (middle - self.limit)
            self.know(limit, min(width, 0.6 * self.unsure))
            return 0.0
        off = self.replace(middle)
        self.know(self.limit, width)
        return off

    def replace(self, limit: float) -> float:
        """
        Another limit. Gives by what share the one before was off, or 0 if that was not known well. Beyond
        ESTIMATE_MOVED it has moved, and its credit with it.
        """
        limit = max(limit, ESTIMATE_LARGEST_CUT * self.limit)
        off = abs(limit / self.limit - 1.0) if self.unsure <= ESTIMATE_VAGUE else 0.0
        if off > ESTIMATE_MOVED and self.has_credit:
            self.burst = max(self.burst * limit / self.limit, 2.0 * self.typical)
        self.limit = limit
        return off

    def spent(self) -> None:
        """As much was taken at once as was thought to be there, and perhaps more is."""
        self.burst = min(1.05 * self.burst, ESTIMATE_MAX_BURST_SECONDS * self.limit)

    def overspent(self, low: float) -> None:
        """A burst was refused, of calls that came below the limit, which is at least so high."""
        self.burst = max(0.85 * self.burst, self.typical)
        self.limit = max(self.limit, low)

    def recall(self, limit: float, burst: float, uncertainty: float) -> None:
        """Begin with what was learned before a restart."""
        self.burst = max(burst, self.typical)
        self.know(limit, uncertainty, surest=ESTIMATE_RECALLED)
