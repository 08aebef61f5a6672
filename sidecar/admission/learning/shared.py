"""An account that others use too: no limit of one's own can be learned, only a share be kept.

Two kinds of refusal come then. Those that the pace brings become fewer when it falls: growth, and a cut for each, let
all who share shrink or grow towards equal shares, for who sends more is refused more often (after Chiu & Jain, 1989).
But where a bucket has little credit, a call is refused whenever another's came just before, however seldom one asks.
Against those it is no help to be slower: what counts is whether a faster pace brings more, so two paces take turns
(`Climb`).
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
    """Whether others use the account, as refusals show it, and what the pace does then."""

    __slots__ = ("_cut", "_highest", "_limits", "_odd", "_often_since", "_refused", "calls", "climb")

    def __init__(self) -> None:
        self.climb: Climb | None = None
        """While refusals come at any pace."""
        self._odd = 0  # refusals that no limit of our own explains
        self._limits: deque[float] = deque(maxlen=SHARED_ALIKE)  # at the latest events while others use the account
        self.calls = 0
        """Calls that went out."""
        self._refused: deque[int] = deque(maxlen=SHARED_OFTEN)  # of them, the latest
        self._often_since = inf
        self._cut = SHARED_MAX_CUT  # of the next refusal
        self._highest = 0.0  # limit since then

    def as_alone(self) -> None:
        """A refusal came where it should if the account is ours alone."""
        self._odd = max(self._odd - 1, 0)

    def explained(self, *, but: int = 0) -> None:
        """What was odd of late is explained, but for so many refusals."""
        self._odd = min(self._odd, but)

    def odd(self, now: float, estimate: Estimate) -> bool:
        """A refusal came where it should not, by chance or for others. Whether it was one too many for chance."""
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
        """A refusal while others share the account, which shows no limit. False if that is over, and it does."""
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
        """What the limit is multiplied by after so many seconds in which it held calls back."""
        if self.climb is not None:
            return 1.0
        refusals = SHARED_REFUSALS * sqrt(SHARED_USUAL / min(estimate.limit / estimate.typical, SHARED_LARGE))
        if (now - estimate.changed_at) * refusals > SHARED_GONE:
            self._cut = SHARED_MAX_CUT
        return exp(min(refusals * self._cut * seconds, SHARED_MAX_GROWTH))

    def in_vain(self, now: float, limit: float, estimate: Estimate) -> bool:
        """A refusal that a slower pace, at this limit, should have prevented. Whether they come at any pace."""
        self._refused.append(self.calls)
        calls = self.calls - self._refused[0] + 1
        # a larger bucket refuses only whoever is too fast
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
        """One more call goes out, at this pace, during a climb. Whether that ends it: no refusals come any more."""
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
    A pace that goes where more is taken, whatever share of it is refused.

    Blocks of calls go out a little above and a little below the pace in turn. Beyond what there is, more calls bring
    only more refusals: the share that is refused grows by as much as the pace. Below that it stays what it is. The
    pace moves by where it is between the two.
    """

    __slots__ = (
        "_began", "_block", "_calls", "_first", "_high", "_paced", "_refused", "_row", "_settled", "_share",
    )  # fmt: skip

    def __init__(self, now: float, share: float) -> None:
        """`share` of the calls before were refused."""
        self._began = now
        self._settled = inf
        self._block = 0
        self._high = True
        self._first = True
        self._paced = True
        self._calls, self._refused = [0.0, 0.0], [0.0, 0.0]  # below, above
        self._share = share  # of the latest calls that were refused
        self._row = 0

    @property
    def factor(self) -> float:
        """The pace of the present block, as a share of the limit."""
        return exp(CLIMB_APART if self._high else -CLIMB_APART)

    def sent(self, now: float, refusal_seconds: float, pace: float) -> float:
        """One call goes out, at this pace if that is what held it back. Returns what the limit is multiplied by."""
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
        steep = min(max((high - low) / (2 * CLIMB_APART * taken), 0.0), 1.0)  # 1: more calls, and no more is taken
        much = low > CLIMB_MAX_REFUSED
        self._first = self._first and steep < 0.5
        self._calls = [CLIMB_KEPT * calls for calls in self._calls]
        self._refused = [CLIMB_KEPT * refused for refused in self._refused]
        if much:
            return exp(-CLIMB_FIRST_STEP)
        return exp((CLIMB_FIRST_STEP if self._first else CLIMB_STEP) * (1.0 - 2.0 * steep))

    def accepted(self) -> None:
        """One call was taken."""
        self._row = 0
        self._share *= 0.95

    def refused(self, sent_at: float) -> float:
        """A call that was sent at that time was refused. Returns what the limit is multiplied by."""
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
        """More were refused in a row than chance explains."""
        return max(self._share, 0.1) ** self._row < 1e-4

    @property
    def needless(self) -> bool:
        """What is slow enough is not refused."""
        return self._calls[0] >= CLIMB_CLEAN_CALLS and self._refused[0] <= CLIMB_CLEAN_SHARE * self._calls[0]
