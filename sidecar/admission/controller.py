"""Learns one dimension's limit (requests, or LLM tokens, a second) from which attempts were refused.

A quota is a policer: nothing slows down before a refusal, so the only signal is *which* attempts were refused, by the
time at which they were sent. The controller is pure: every call takes `now`, nothing waits, nothing is scheduled.

    START ──refused──▶ ASSESS ──the limit is known well──▶ STEADY ⇄ PROBE
                         ▲                                   │
                         └──── refused again and again ──────┤
                                                             └── so often that others must share it ──▶ SHARED

A refusal gives bounds on the limit (`policer.rate_between`), so an estimate and how uncertain it is. The pace then
starts below the estimate by that uncertainty and rises until the next refusal (`ramp.py`). The states ASSESS, STEADY
and PROBE only name where on which ramp the pace is.
"""

from __future__ import annotations

from math import inf
from typing import Any

from sidecar.admission.blackout import Blackouts
from sidecar.admission.bucket import TokenBucket
from sidecar.admission.early import EarlyRefusals
from sidecar.admission.estimate import LEAST, MOVED, RECALLED, SUREST, VAGUE, Estimate
from sidecar.admission.first import FirstBurst
from sidecar.admission.fit import Fit
from sidecar.admission.policer import Interval, Sent, Trace
from sidecar.admission.ramp import Ramp
from sidecar.admission.shared import KEPT, Share
from sidecar.admission.start import START_CREDIT, Start
from sidecar.admission.states import START, State

#: A refusal before this share of a ramp's length has come too early,
EARLY = 0.4
#: ... and before this one, where a bucket that is ours alone would have had credit left.
SOON = 0.95
#: A limit that was known well does not turn out to be off by more than this share, unless it has moved.
OFF = 0.05
#: A pace of more than so many times what goes out, of late, is not what holds requests back.
MAX_AHEAD, LATE_SECONDS = 2.0, 1.5


class RateController:
    """One dimension of one provider account and model. Rates and amounts are in its unit: requests, or LLM tokens."""

    def __init__(
        self, now: float, *, ceiling: float = inf, budget: float = 0.005, typical: float = 1.0, dormant: bool = False
    ) -> None:
        """`typical` is the amount of a usual request; `dormant`: nothing is paced before the first refusal."""
        self.estimate = Estimate(now, typical)
        self.ceiling = ceiling
        self.refusal_seconds = 0.05
        """How long a refusal takes to come back, smoothed."""
        self.unpaced = dormant and ceiling == inf
        """Whatever comes may go: nothing need be counted yet."""
        self._bucket = TokenBucket(now, inf, START_CREDIT * typical)
        self._filled_at = -inf
        self._grown_at = now
        self._cut_at = -inf  # what was sent until then, and is refused, is of the last event
        self._trace = Trace(now)
        self._start = Start(dormant=dormant)
        self._first: FirstBurst | None = None  # while the estimate is but a guess from it
        self._ramp = Ramp(budget)
        self._fit = Fit()
        self._early = EarlyRefusals()
        self._share = Share()
        self._blackouts = Blackouts(now)

    def __repr__(self) -> str:
        estimate = self.estimate
        return f"<RateController {estimate.state.value} limit={estimate.limit:.4g}/s unsure={estimate.unsure:.2g}>"

    @property
    def state(self) -> State:
        """What the controller is doing."""
        return self.estimate.state

    @property
    def limit(self) -> float:
        """The learned limit, a second; infinite while nothing was ever refused."""
        return self.estimate.limit

    @property
    def guessed(self) -> bool:
        """The limit is a guess from the first burst, and may well be far off."""
        return self._first is not None

    # -- the gate ------------------------------------------------------------------------------------------------------

    def pace(self, now: float) -> float:
        """What may be sent a second at this instant; infinite for unpaced."""
        estimate = self.estimate
        if estimate.state is START:
            return min(self._start.pace(now) * estimate.typical, self.ceiling)
        return min(self._unbounded_pace(), self.ceiling)

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `amount` may be sent; 0 for now."""
        if self.unpaced:
            return 0.0
        self._fill(now)
        return self._bucket.wait(now, amount)

    def seconds_for(self, now: float, amount: float) -> float:
        """Seconds until so much in all may have been sent, at the pace of now."""
        self._fill(now)
        return max(amount - self._bucket.level(now), 0.0) / self.pace(now)

    def sent(self, now: float, amount: float, bound: bool) -> Sent:
        """One attempt goes out. `bound`: it had to wait for this dimension, so more would have been sent."""
        if not self.unpaced:
            if now != self._filled_at:  # `wait` has, in the turn in which it let this one through
                self._fill(now)
            if bound:
                self._grow(now, amount)
            self._bucket.take(now, amount)
        self._grown_at = now
        if self._share.sent(now, self.estimate, self.refusal_seconds, self._bucket.rate):
            self._begin()
        self._start.sent(now)
        self._blackouts.history.add(now, amount)
        one = Sent(now, amount, bound)
        self._trace.add(one)
        return one

    def _fill(self, now: float) -> None:
        self._filled_at = now
        estimate = self.estimate
        if estimate.state is START:
            capacity = min(START_CREDIT * estimate.typical, max(self.ceiling, estimate.typical))
        else:
            capacity = max(estimate.burst - estimate.cushion, estimate.typical)
        self._bucket.set(now, self.pace(now), capacity)

    def _set_level(self, now: float, amount: float) -> None:
        """So much may be sent at once, whatever it was; what is below nothing has to flow in first."""
        self._fill(now)
        self._bucket.take(now, self._bucket.level(now) - amount)

    def _drain(self, now: float, pause: float) -> None:
        """The provider's bucket is empty, and so is this one; for `pause` seconds it gives nothing."""
        level = -self.estimate.cushion if self.estimate.has_credit and not self.guessed else 0.0
        self._set_level(now, level - pause * self.pace(now))

    # -- verdicts ------------------------------------------------------------------------------------------------------

    def accepted(self, now: float, sent: Sent) -> None:
        """The provider took it."""
        self._start.answered(now, sent.amount)
        if self._share.climb is not None:
            self._share.climb.accepted()

    def void(self, now: float, sent: Sent) -> None:
        """It ended, and says nothing of this limit."""
        self._start.answered(now, 0.0)

    def refused_too(self, now: float, sent: Sent) -> None:
        """It was refused when everything was, which says nothing new."""
        sent.refused = True
        self._start.answered(now, 0.0)
        self._blackouts.refused(sent.at, sent.amount)

    def settle(self, now: float, sent: Sent, amount: float) -> None:
        """It took another amount than was reserved."""
        if not self.unpaced:
            self._bucket.take(now, amount - sent.amount)
        self._blackouts.history.add(sent.at, amount - sent.amount)
        if self._first is not None and self._first.holds(sent):
            self._first.correct(amount - sent.amount, self.estimate, self.refusal_seconds)
        sent.amount = amount

    def refused(self, now: float, sent: Sent) -> bool:
        """
        The provider refused it for this dimension. One burst of refusals, told by their send times, is one event.

        True if everything is refused, whatever the pace: a hold must find out when that ends.
        """
        self.refused_too(now, sent)
        self.refusal_seconds += 0.3 * (now - sent.at - self.refusal_seconds)
        if sent.at <= self._cut_at:
            if self._first is None or not self._first.open:
                self._ramp.refused()
            else:
                self._first.correct(-sent.amount, self.estimate, self.refusal_seconds)
                self._begin()
                self._drain(now, 0.0)
            return False
        self._ramp.refused()
        if (climb := self._share.climb) is not None:
            self.estimate.limit *= climb.refused(sent.at)
            return climb.in_vain
        if self.state is State.START:
            self._first_refusal(now, sent)
        elif self._refusal(now, sent):
            return False
        self._cut_at = now
        blackouts = self._blackouts
        if self._first is not None and blackouts.barren:
            self._first.none_for(sent.at - self._trace.start, self.estimate)
        elif blackouts.barren < 2:
            self._trace.emptied(sent.at)
        self._begin()
        if blackouts.windowed:
            rest = max(blackouts.next_at - now, 0.0)
            self._set_level(now, self.estimate.typical - rest * self.pace(now))
            return blackouts.barren >= 1
        # after the first one as long again, to see what became of the rest of the burst
        self._drain(now, now - sent.at if self._first is not None and self._first.open else 0.0)
        return blackouts.barren >= 2 or blackouts.lost_seconds > 0

    # -- what a refusal does -------------------------------------------------------------------------------------------

    def _first_refusal(self, now: float, sent: Sent) -> None:
        first = FirstBurst(sent.at, self._start.began, self._trace)
        first.guess(self.estimate, self.refusal_seconds)
        self._first = first if first.is_burst else None
        self.unpaced = False
        self.estimate.to(now, State.ASSESS, "first refusal")

    def _refusal(self, now: float, sent: Sent) -> bool:
        """A refusal after others. Whether they come at any pace: then what counts is what a pace brings."""
        estimate = self.estimate
        burst, limit, pace = estimate.burst, estimate.limit, self.pace(now)
        # neither a first guess nor a pace that was punished says anything of other paces
        counts = not (self.guessed or self._blackouts.lost_seconds)
        known = estimate.unsure < RECALLED
        if self._first is not None:
            self._first.open = False
        self._learn(now, self._trace.until(sent))
        slow = known or (pace <= limit and estimate.burst == burst)
        return counts and slow and not self._blackouts.windowed and self._share.in_vain(now, limit, estimate)

    def _learn(self, now: float, interval: Interval) -> None:
        """The limit from what was taken since the refusal before."""
        estimate, blackouts, guessed = self.estimate, self._blackouts, self.guessed
        blackouts.barren = 0 if interval.taken else blackouts.barren + 1
        pace = self._unbounded_pace()
        if estimate.state is State.SHARED and self._share.refused(now, estimate):
            return
        if not interval.taken:
            return  # the bucket was empty, and still is
        if blackouts.windowed and blackouts.full(now, interval.refused.at, estimate):
            return
        if blackouts.lost_seconds or guessed:
            self._fit.forget()
        elif self._fit.refused(now, interval, estimate):
            self._early.count = 0
            return
        low, high = estimate.bounds(interval)
        if not guessed and not interval.mostly_bound:
            high = inf  # seldom at the limit: how full the bucket was hangs on a burst that is known badly
            if not interval.refused.bound and estimate.has_credit:
                estimate.overspent(min(low, pace))
                estimate.changed(now, "refused within a burst")
                return
        high = min(high, pace)
        low = min(low, high)
        self._first = blackouts.explained_by = None
        if self._ramp.along < EARLY and not guessed:
            if blackouts.lost_seconds:
                blackouts.early(interval, estimate)
            else:
                self._too_early(now, interval)
            return
        self._early.count = 0
        blur = 0.0
        if blackouts.lost_seconds:
            blur = 0.5 * estimate.burst / interval.total  # for the burst is known badly
        elif estimate.has_credit and self._ramp.spent + estimate.typical >= estimate.burst:
            estimate.spent()
        sure = estimate.unsure <= VAGUE
        soon = sure and estimate.has_credit and self._ramp.along < SOON
        fell = not sure and not guessed and high < (1.0 - estimate.unsure) * estimate.limit
        off = estimate.narrow(low, high, blur=blur, anew=guessed)
        known = estimate.unsure <= 3 * SUREST
        estimate.to(now, State.STEADY if known else State.ASSESS, f"refused at {pace:.3g}/s")
        if not self._look_again(off):
            if (off > OFF or soon or fell) and not blackouts.lost_seconds:
                self._share.odd(now, estimate)
            elif off == 0.0 and sure:
                self._share.as_alone()

    def _look_again(self, off: float) -> bool:
        """Soon for a limit that has moved, and later each time for one that has not. Whether it has just moved."""
        if off <= MOVED:
            self._ramp.confirmed()
        elif self._ramp.moved():
            self._share.explained()
            return True
        return False

    def _too_early(self, now: float, interval: Interval) -> None:
        """It came before the pace had reached the limit: chance, other users of the account, or a lower limit."""
        estimate, early = self.estimate, self._early
        early.add(interval)
        if self._share.odd(now, estimate):
            early.count = 0
        elif early.cut(interval, estimate):
            estimate.changed(now, "refused below the learned limit")
        else:
            self._share.explained(but=KEPT)
            self._look_again(early.measure(interval.refused, estimate))
            estimate.to(now, State.ASSESS, "refused again and again: the limit is lower")

    # -- blackouts -----------------------------------------------------------------------------------------------------

    @property
    def windowed(self) -> bool:
        """The quota is one of windows, as far as blackouts have shown."""
        return self._blackouts.windowed

    def window_ends(self, now: float) -> float:
        """When the present window ends; `now` where there are none."""
        return self._blackouts.ends(now, self.estimate.typical)

    def recovered(self, now: float, closed_at: float, probed_at: float, step: float) -> None:
        """
        Everything was refused from `closed_at` on until the probe sent at `probed_at` was taken; nothing was tried for
        `step` seconds before that.

        If it was a penalty for the refusal, that refusal tells the limit as any other does. If it was the rest of a
        used-up window, the limit is what was taken since the one before, over all of the time; which also holds,
        nearly, where a refusal was punished that should not have come yet.
        """
        estimate, blackouts = self.estimate, self._blackouts
        blackouts.began = max(self._start.began, blackouts.began)
        whole = blackouts.ended(closed_at, probed_at, step, estimate.typical)
        if self._first is not None and blackouts.barren:
            self._first.none_for(step, estimate)  # each refusal may have begun it anew
            self._first.searching = not estimate.has_credit
        if self._share.climb is not None:
            blackouts.lost_seconds = 0.0
        else:
            blackouts.learn(now, probed_at - closed_at, whole, estimate, guessed=self.guessed)
            if blackouts.windowed:
                self._first = None
                self._trace.emptied(probed_at)
        blackouts.barren, blackouts.explained_by, self._early.count = 0, None, 0
        self._share.explained()
        self._begin()
        self._set_level(now, 0.0)

    def restart(self, now: float, share: float) -> None:
        """Go on after a pause, such as an outage, at that share of the limit, and rise from there."""
        if self.state is State.START:
            self._start.again(now)
            return
        self._trace.emptied(now)
        self._ramp.end(share)
        self._set_level(now, 0.0)

    # -- the ramp ------------------------------------------------------------------------------------------------------

    def _unbounded_pace(self) -> float:
        height = self._share.factor if self.state is State.SHARED else self._ramp.height()
        return self.estimate.limit * height

    def _begin(self) -> None:
        """Begin a new ramp with what is known now."""
        estimate, blackouts = self.estimate, self._blackouts
        estimate.limit = max(estimate.limit, LEAST * estimate.typical)
        self._ramp.begin(
            estimate,
            self.refusal_seconds,
            # what is only guessed is soon to be known better, whatever that costs
            lost=0.0 if self.guessed else blackouts.lost(estimate),
            window=blackouts.window if blackouts.windowed else 0.0,
        )

    def _grow(self, now: float, amount: float) -> None:
        """The pace was what held this amount back."""
        estimate, blackouts, seconds = self.estimate, self._blackouts, min(now - self._grown_at, 0.5)
        if self.state is State.START:
            self._start.grow(seconds)
        elif self._first is not None and self._first.searching:
            estimate.limit *= self._first.growth(seconds, self.refusal_seconds)
        elif self.state is State.SHARED:
            estimate.limit *= self._share.growth(now, now - self._grown_at, self.estimate)
        else:
            if self._ramp.along >= 1.0 and self.pace(now) > (
                MAX_AHEAD * blackouts.history.rate(now, LATE_SECONDS) + 3.0 * estimate.typical
            ):
                seconds = 0.0  # something else holds most of them back
            self._ramp.grow(seconds, amount, estimate.typical)
            if blackouts.windowed and self._ramp.risen:
                fits = blackouts.risen(now, estimate)
                self._begin()
                if not fits:
                    self._ramp.end(1.0)
            if self.state is State.STEADY and self._ramp.along > 0.7:
                estimate.to(now, State.PROBE, "the pace is above the limit, to see whether it has risen")

    # -- memory and operators ------------------------------------------------------------------------------------------

    def recall(self, now: float, limit: float, burst: float, uncertainty: float = RECALLED) -> None:
        """Begin with what was learned before a restart, and find out soon how true it still is."""
        self.estimate.recall(limit, burst, uncertainty)
        self._trace.emptied(now)
        self._cut_at = now
        self.unpaced = False
        self.estimate.to(now, State.ASSESS, "remembered from before the restart")
        self._begin()
        self._set_level(now, 0.0)

    def rate(self, now: float) -> float:
        """The accepted amount a second, of late."""
        return self._start.rate(now)

    def use(self, now: float) -> float:
        """The accepted rate as a share of the limit; 0 while no limit is known."""
        return 0.0 if self.limit == inf else self.rate(now) / self.limit

    def status(self, now: float) -> dict[str, Any]:
        """What was learned, and when and why it last changed."""
        return self.estimate.status(now, self.pace(now))
