"""Learners behind the contract: today's, one that knows the limit, and a plain AIMD."""

from collections import deque
from dataclasses import dataclass
from math import inf

from sidecar.admission.learning.learner import EMPTY, NO_EFFECT, Learner, Recovery, Remembered, Snapshot
from sidecar.admission.learning.policer import Sent
from sidecar.admission.learning.policer_learner import PolicerLearner


class Simple:
    """What the two simple learners share. Both pace from the first attempt on, and know neither windows nor bursts."""

    unpaced = False
    guessed = False
    certain = True
    refusal_seconds = 0.05
    windowed = False

    def __init__(self, now, ceiling=inf):
        self.ceiling = ceiling
        self.changed_at, self.why, self.state = now, "", "start"
        self.typical = 1.0
        self._accepted = deque()

    @property
    def ceiling_seconds(self):
        return self.typical / self.ceiling

    def usual(self, amount, share):
        self.typical += share * (amount - self.typical)

    def sent(self, now, amount, *, held, pace):
        return Sent(now, amount, held)

    def accepted(self, now, sent):
        self._accepted.append((now, sent.amount))

    def settled(self, sent, amount):
        sent.amount = amount

    def refused_too(self, now, sent):
        sent.refused = True

    def void(self, now, sent):
        pass

    def window_ends(self, now):
        return now

    def rate(self, now):
        while self._accepted and self._accepted[0][0] < now - 2.0:
            self._accepted.popleft()
        return sum(amount for _, amount in self._accepted) / 2.0

    def use(self, now):
        return 0.0 if self.limit == inf else self.rate(now) / self.limit

    def snapshot(self):
        return Snapshot(self.limit, self.capacity, 0.1, self.state, self.why, self.changed_at)


class OracleLearner(Simple):
    """Knows the limit and the burst, and learns nothing."""

    def __init__(self, now, rate, burst, ceiling=inf):
        super().__init__(now, ceiling)
        self._rate, self._burst = rate, burst

    @property
    def limit(self):
        return self._rate

    @property
    def capacity(self):
        return max(self._burst, self.typical)

    def pace(self, now):
        return min(self._rate, self.ceiling)

    def refused(self, now, sent):
        sent.refused = True
        return EMPTY

    def resumed(self, now, after):
        return EMPTY


class AimdLearner(Simple):
    """Additive increase while the pace binds, multiplicative decrease on a refusal: one for each round of refusals."""

    INCREASE, DECREASE = 0.2, 0.7

    def __init__(self, now, pace=4.0, ceiling=inf):
        super().__init__(now, ceiling)
        self._pace, self._cut_at, self._known = pace, -inf, False

    @property
    def limit(self):
        return self._pace if self._known else inf

    @property
    def capacity(self):
        return self.typical

    def pace(self, now):
        return min(self._pace, self.ceiling)

    def accepted(self, now, sent):
        super().accepted(now, sent)
        if sent.bound:
            self._pace += self.INCREASE * self.typical * sent.amount / self._pace

    def refused(self, now, sent):
        sent.refused = True
        if sent.at <= self._cut_at:
            return NO_EFFECT
        self._known = True
        self._pace = max(self.DECREASE * min(self._pace, self.ceiling), 0.1 * self.typical)
        self._cut_at = self.changed_at = now
        self.state, self.why = "assess", "refused"
        return NO_EFFECT

    def resumed(self, now, after):
        if isinstance(after, Remembered):
            self._pace, self._known = after.limit, True
        elif not isinstance(after, Recovery):
            self._pace *= max(after, 0.1)
        return EMPTY


@dataclass(frozen=True)
class Kind:
    """A learner with what can be asked of it at a plain token bucket."""

    name: str
    make: object
    """A function of the bucket's rate and burst, the amount of a usual attempt, and the ceiling."""
    used: float
    """The share of the rate that it uses at least, after a minute."""
    refused: float
    """The share of its calls that are refused at most."""

    def __str__(self):
        return self.name


def _policer(rate, burst, typical=1.0, ceiling=inf) -> Learner:
    return PolicerLearner(0.0, typical=typical, ceiling=ceiling)


def _oracle(rate, burst, typical=1.0, ceiling=inf) -> Learner:
    learner = OracleLearner(0.0, rate, burst, ceiling)
    learner.typical = typical
    return learner


def _aimd(rate, burst, typical=1.0, ceiling=inf) -> Learner:
    learner = AimdLearner(0.0, 4.0 * typical, ceiling)
    learner.typical = typical
    return learner


LEARNERS = (
    Kind("policer", _policer, used=0.95, refused=0.02),
    Kind("oracle", _oracle, used=0.99, refused=0.002),
    Kind("AIMD", _aimd, used=0.55, refused=0.25),
)
