"""The estimate of one dimension's limit: the rate, the burst, and the relative error of the rate."""

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
    """The estimated token bucket of a provider. Rates and amounts are in the dimension's unit."""

    __slots__ = ("burst", "changed_at", "changed_why", "limit", "state", "typical", "unsure")

    def __init__(self, now: float, typical: float) -> None:
        self.state = State.START
        self.limit = inf
        """Estimated limit per second; infinite until the first refusal."""
        self.burst = START_CREDIT * typical
        """Estimated amount that the provider accepts at once after a pause."""
        self.unsure = ESTIMATE_UNSUREST
        """Relative error of the limit."""
        self.typical = typical
        """Amount of a usual request."""
        self.changed_at = now
        self.changed_why = "nothing was refused yet"

    def on(self, now: float, event: Event, why: str) -> None:
        """Change the state as `TRANSITIONS` says. Raises `KeyError` for an event that is impossible in this state."""
        self.state = TRANSITIONS[self.state, event]
        self.changed(now, why)

    def changed(self, now: float, why: str) -> None:
        """Record the time and the reason of a change, for operators."""
        self.changed_at = now
        self.changed_why = why

    @property
    def has_credit(self) -> bool:
        """True if the bucket holds at least two usual requests, so that a pause saves up more than the next request."""
        return self.burst >= 2.0 * self.typical

    @property
    def cushion(self) -> float:
        """Amount to leave in the provider's bucket, so that chance (other callers, uneven delays) cannot empty it."""
        return min(max(0.1 * self.burst, self.typical), 3.0 * self.typical)

    def bounds(self, interval: Interval) -> tuple[float, float]:
        """Return the lowest and the highest limit that explain the calls accepted between two refusals."""
        low, high = interval.rate(self.burst)
        for _ in range(2):  # if a limit has risen, its burst has usually risen in proportion
            risen = (low + high) / 2 / self.limit
            if risen < 1.0 + ESTIMATE_MOVED or self.unsure > ESTIMATE_VAGUE or not self.has_credit:
                break
            low, high = interval.rate(risen * self.burst)
        return low, high

    def know(self, limit: float, unsure: float, *, surest: float = ESTIMATE_SUREST) -> None:
        """Set the limit and its relative error (at least `surest`, at most ESTIMATE_UNSUREST)."""
        self.limit = limit
        self.unsure = min(max(unsure, surest), ESTIMATE_UNSUREST)

    def narrow(self, low: float, high: float, *, blur: float = 0.0, anew: bool = False) -> float:
        """
        Improve the limit with the bounds from a refusal. Return 0 if they agree with it, else what `replace` returns.

        `blur`: minimum relative error of the bounds. `anew`: do not average with the old limit.
        """
        width, middle = max((high - low) / (low + high), blur), (low + high) / 2
        if self.unsure >= ESTIMATE_UNSUREST:  # choose a high value: few calls hardly bound the limit from below
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
        Replace the limit. Return its relative change, or 0 if the old limit was not known well.

        A change above ESTIMATE_MOVED means that the provider's limit has changed. Then the burst is scaled in
        proportion. One call lowers the limit at most to ESTIMATE_LARGEST_CUT times its old value.
        """
        limit = max(limit, ESTIMATE_LARGEST_CUT * self.limit)
        off = abs(limit / self.limit - 1.0) if self.unsure <= ESTIMATE_VAGUE else 0.0
        if off > ESTIMATE_MOVED and self.has_credit:
            self.burst = max(self.burst * limit / self.limit, 2.0 * self.typical)
        self.limit = limit
        return off

    def spent(self) -> None:
        """Raise the burst by 5 %: the provider accepted the whole estimated burst at once, so it may allow more."""
        self.burst = min(1.05 * self.burst, ESTIMATE_MAX_BURST_SECONDS * self.limit)

    def overspent(self, low: float) -> None:
        """Lower the burst: a burst was refused, although the rate was below the limit. The limit is at least `low`."""
        self.burst = max(0.85 * self.burst, self.typical)
        self.limit = max(self.limit, low)

    def burst_at_most(self, taken: float) -> None:
        """Lower a remembered burst to the amount accepted since the restart: no larger burst has been seen since then.

        With a burst that is too large, the limit would be computed too low, and the next refusal would come late.
        """
        self.burst = max(min(self.burst, taken), self.typical)

    def recall(self, limit: float, burst: float, uncertainty: float) -> None:
        """Start from values that were learned before a restart."""
        self.burst = max(burst, self.typical)
        self.know(limit, uncertainty, surest=ESTIMATE_RECALLED)
