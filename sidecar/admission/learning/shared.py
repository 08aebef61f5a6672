"""An account that others use too. No limit can be learned then, so the aim is a fair share of the limit.

There are two kinds of refusals. The first kind becomes rarer at a lower pace. Then slow growth, and a cut for each
refusal, lead all users towards equal shares, because a user who sends more is refused more often (Chiu & Jain, 1989).
The second kind comes at any pace: if a bucket allows almost no burst, a call is refused whenever another user's call
came just before it. A lower pace does not help then. It matters only whether a higher pace gets more calls accepted, so
two paces take turns (`Climb`).
"""

from __future__ import annotations

from collections import deque
from math import exp, inf, sqrt

from sidecar.admission.learning.estimate import Estimate
from sidecar.admission.learning.states import Event
from sidecar.admission.learning.tuning import (
    CLIMB_APART,
    CLIMB_BINDS,
    CLIMB_CALLS,
    CLIMB_CLEAN_CALLS,
    CLIMB_CLEAN_SHARE,
    CLIMB_FIRST_STEP,
    CLIMB_IN_VAIN,
    CLIMB_KEPT,
    CLIMB_MAX_REFUSED,
    CLIMB_REFUSALS,
    CLIMB_SETTLES,
    CLIMB_STEP,
    ESTIMATE_RECALLED,
    FIT_SMALL,
    SHARED_ALIKE,
    SHARED_CROWD_SECONDS,
    SHARED_EPISODE_SECONDS,
    SHARED_GONE,
    SHARED_LARGE,
    SHARED_MAX_CUT,
    SHARED_MAX_GROWTH,
    SHARED_MIN_CUT,
    SHARED_ODD,
    SHARED_OFTEN,
    SHARED_OFTEN_CALLS,
    SHARED_OFTEN_SECONDS,
    SHARED_REFUSALS,
    SHARED_SAME,
    SHARED_SETTLE,
    SHARED_USUAL,
)


class Share:
    """Detect from refusals whether others use the account, and adapt the limit while they do."""

    __slots__ = ("_cut", "_highest", "_limits", "_odd", "_often_since", "_refused", "calls", "climb")

    def __init__(self) -> None:
        self.climb: Climb | None = None
        """Not None while refusals come at any pace."""
        self._odd = 0  # unexplained refusals: no limit of a single user explains them
        self._limits: deque[float] = deque(maxlen=SHARED_ALIKE)  # limits at the latest refusals while shared
        self.calls = 0
        """Number of sent calls."""
        self._refused: deque[int] = deque(maxlen=SHARED_OFTEN)  # `calls` at the latest refusals
        self._often_since = inf
        self._cut = SHARED_MAX_CUT  # share of the limit that the next refusal takes off
        self._highest = 0.0  # the highest limit since `_often_since`

    def as_alone(self) -> None:
        """Count a refusal that is explained without other users."""
        self._odd = max(self._odd - 1, 0)

    def explained(self, *, but: int = 0) -> None:
        """Forget the unexplained refusals, except for the number `but`."""
        self._odd = min(self._odd, but)

    def odd(self, now: float, estimate: Estimate) -> bool:
        """Count an unexplained refusal (chance, or other users). Return True if there are too many for chance."""
        self._odd += 1
        if self._odd < SHARED_ODD:
            return False
        self._odd = 0
        self._limits.clear()
        self._cut = SHARED_MAX_CUT
        estimate.limit *= 1.0 - SHARED_MAX_CUT
        estimate.on(now, Event.OTHERS_CAME, "refused too often for one user of the account")
        return True

    def refused(self, now: float, estimate: Estimate) -> bool:
        """Learn from a refusal while others use the account. Return False if they have left: then it shows a limit."""
        if now <= estimate.changed_at + SHARED_EPISODE_SECONDS:
            return True
        self._limits.append(estimate.limit)
        self._cut = (
            SHARED_MAX_CUT
            if now <= estimate.changed_at + SHARED_CROWD_SECONDS
            else max(SHARED_SETTLE * self._cut, SHARED_MIN_CUT)
        )
        if len(self._limits) == SHARED_ALIKE and max(self._limits) <= (1.0 + SHARED_SAME * self._cut) * min(
            self._limits
        ):
            estimate.on(now, Event.OTHERS_LEFT, "the account seems to be ours alone again")
            return False
        estimate.limit *= 1.0 - self._cut
        estimate.changed(now, "refused while others share the account")
        return True

    @property
    def factor(self) -> float:
        """The pace as a share of the limit."""
        return 1.0 if self.climb is None else self.climb.factor

    def growth(self, now: float, seconds: float, estimate: Estimate) -> float:
        """Return the factor for the limit after `seconds` in which it delayed calls."""
        if self.climb is not None:
            return 1.0
        refusals = SHARED_REFUSALS * sqrt(SHARED_USUAL / min(estimate.limit / estimate.typical, SHARED_LARGE))
        if (now - estimate.changed_at) * refusals > SHARED_GONE:
            self._cut = SHARED_MAX_CUT
        return exp(min(refusals * self._cut * seconds, SHARED_MAX_GROWTH))

    def in_vain(self, now: float, limit: float, estimate: Estimate) -> bool:
        """Count a refusal that a lower pace should have prevented. If refusals come at any pace, climb: return True."""
        self._refused.append(self.calls)
        calls = self.calls - self._refused[0] + 1
        # A larger bucket refuses only a user that sends too fast.
        if (
            len(self._refused) < SHARED_OFTEN
            or calls > SHARED_OFTEN_CALLS
            or estimate.burst > FIT_SMALL * estimate.typical
        ):
            self._often_since, self._highest = inf, 0.0
            return False
        self._often_since = min(self._often_since, now)
        self._highest = max(self._highest, limit)
        if now - self._often_since < SHARED_OFTEN_SECONDS:
            return False
        self._refused.clear()
        self.climb = Climb(now, SHARED_OFTEN / calls)
        estimate.limit = self._highest
        estimate.on(now, Event.OTHERS_CAME, "refused at any pace: others use the account too")
        return True

    def sent(self, now: float, estimate: Estimate, refusal_seconds: float, pace: float) -> bool:
        """Record a call that is sent during a climb. Return True if the climb ends, because refusals are rare now."""
        if self.climb is None:
            return False
        estimate.limit *= self.climb.sent(now, refusal_seconds, pace / estimate.typical)
        if not self.climb.needless:
            return False
        self.climb = None
        estimate.unsure = ESTIMATE_RECALLED
        estimate.on(now, Event.OTHERS_LEFT, "the account seems to be ours alone again")
        return True


class Climb:
    """
    A search for the pace at which more calls are accepted, whatever share of them is refused.

    Blocks of calls are sent alternately a little above and a little below the pace. Above the available rate, more
    calls bring only more refusals: the refused share grows with the pace. Below that rate, the refused share does not
    change. In the first case the pace goes down, in the second it goes up, and between them it changes less.
    """

    __slots__ = (
        "_began", "_block", "_calls", "_first", "_high", "_paced", "_refused", "_row", "_settled", "_share",
    )  # fmt: skip

    def __init__(self, now: float, share: float) -> None:
        """`share`: refused share of the latest calls."""
        self._began = now
        self._settled = inf
        self._block = 0
        self._high = True
        self._first = True
        self._paced = True
        self._calls, self._refused = [0.0, 0.0], [0.0, 0.0]  # in blocks below the pace, above the pace
        self._share = share  # refused share of the latest calls
        self._row = 0

    @property
    def factor(self) -> float:
        """The pace of the present block, as a share of the limit."""
        return exp(CLIMB_APART if self._high else -CLIMB_APART)

    def sent(self, now: float, refusal_seconds: float, pace: float) -> float:
        """Record a call sent at this pace (requests per second). Return the factor for the limit."""
        self._block += 1
        if self._block == CLIMB_SETTLES:
            self._settled = now
        elif self._block > CLIMB_SETTLES:
            self._calls[self._high] += 1.0
        seconds = now - self._began
        if self._block < CLIMB_CALLS or seconds < CLIMB_REFUSALS * refusal_seconds:
            return 1.0
        self._paced = self._paced and self._block > CLIMB_BINDS * pace * seconds
        self._block, self._began, self._settled, self._high = 0, now, inf, not self._high
        if not self._high:
            return 1.0
        step = self._step() if self._paced else 1.0
        self._paced = True
        return step

    def _step(self) -> float:
        low, high = (refused / calls for refused, calls in zip(self._refused, self._calls, strict=True))
        taken = max(1.0 - (low + high) / 2, 0.1)
        steep = min(max((high - low) / (2 * CLIMB_APART * taken), 0.0), 1.0)  # 1: more calls, but no more are accepted
        much = low > CLIMB_MAX_REFUSED
        self._first = self._first and steep < 0.5
        self._calls = [CLIMB_KEPT * calls for calls in self._calls]
        self._refused = [CLIMB_KEPT * refused for refused in self._refused]
        if much:
            return exp(-CLIMB_FIRST_STEP)
        return exp((CLIMB_FIRST_STEP if self._first else CLIMB_STEP) * (1.0 - 2.0 * steep))

    def accepted(self) -> None:
        """Record an accepted call."""
        self._row = 0
        self._share *= 0.95

    def refused(self, sent_at: float) -> float:
        """Record a refused call with its send time. Return the factor for the limit."""
        before = self.in_vain
        self._row += 1
        self._share += 0.05 * (1.0 - self._share)
        if sent_at < self._began:
            self._refused[not self._high] += 1.0
        elif sent_at > self._settled:
            self._refused[self._high] += 1.0
        return CLIMB_IN_VAIN if self.in_vain and not before else 1.0

    @property
    def in_vain(self) -> bool:
        """True if more calls in a row were refused than chance explains."""
        return max(self._share, 0.1) ** self._row < 1e-4

    @property
    def needless(self) -> bool:
        """True if almost no call in blocks below the pace was refused, so the climb is not needed."""
        return self._calls[0] >= CLIMB_CLEAN_CALLS and self._refused[0] <= CLIMB_CLEAN_SHARE * self._calls[0]
