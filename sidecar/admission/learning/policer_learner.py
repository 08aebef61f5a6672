"""Learns the limit of one dimension (requests or LLM tokens per second) from the attempts that were refused.

A quota is a policer: nothing slows down before a refusal, so the only signal is *which* attempts were refused, with
their send times. Time comes only from the arguments; the learner never waits and sets no timer.

    START ──refused──▶ ASSESS ──the limit is known well──▶ STEADY ⇄ PROBE
                         ▲                                   │
                         └──── refused again and again ──────┤
                                                             └── so often that others must share it ──▶ SHARED

A refusal gives bounds on the limit (`policer.rate_between`): an estimate with a relative error. The pace then starts
below the estimate by that error and rises until the next refusal (`ramp.py`). The states ASSESS, STEADY and PROBE only
name the position of the pace on its ramp.
"""

from __future__ import annotations

from math import exp, inf

from sidecar.admission.learning.blackout import Blackouts
from sidecar.admission.learning.early import EarlyRefusals
from sidecar.admission.learning.estimate import Estimate
from sidecar.admission.learning.first import FirstBurst
from sidecar.admission.learning.fit import Fit
from sidecar.admission.learning.learner import (
    EMPTY,
    NO_EFFECT,
    UNKNOWN,
    Effect,
    Recovery,
    Remembered,
    Snapshot,
    Unknown,
)
from sidecar.admission.learning.policer import Interval, Sent, Trace
from sidecar.admission.learning.ramp import Ramp
from sidecar.admission.learning.shared import Share
from sidecar.admission.learning.start import Start
from sidecar.admission.learning.states import SHARED, START, Event, State
from sidecar.admission.learning.tuning import (
    ESTIMATE_LEAST,
    ESTIMATE_MOVED,
    ESTIMATE_RECALLED,
    ESTIMATE_SUREST,
    ESTIMATE_UNSUREST,
    ESTIMATE_VAGUE,
    LEARNER_EARLY,
    LEARNER_LATE_SECONDS,
    LEARNER_MAX_AHEAD,
    LEARNER_OFF,
    LEARNER_REMEMBERED_SECONDS,
    LEARNER_SOON,
    POLICER_MAX_REMEMBERED,
    RAMP_RISE,
    SHARED_KEPT,
    START_CREDIT,
    START_WINDOW_SECONDS,
)


class PolicerLearner:
    """The learner of one dimension. Rates and amounts are in its unit: requests or LLM tokens."""

    def __init__(
        self, now: float, *, ceiling: float = inf, budget: float = 0.005, typical: float = 1.0, dormant: bool = False
    ) -> None:
        """`typical` is the amount of a usual request; `dormant`: nothing is paced before the first refusal."""
        self.estimate = Estimate(now, typical)
        self.ceiling = ceiling
        self.refusal_seconds = 0.05
        """Seconds from sending an attempt to its refusal, smoothed."""
        self.unpaced = dormant and ceiling == inf
        """True: no attempt is paced, because neither a limit nor a ceiling is known."""
        self._budget, self._dormant = budget, dormant
        self._remembered_at = inf  # when a limit from before a restart was loaded; infinite after the first refusal
        self._confirmed = False  # True: a call was accepted since the start or the restart
        self._grown_at = now
        self._cut_at = -inf  # refused attempts that were sent until this time belong to the last event
        self._trace = Trace(now)
        self._start = Start(dormant=dormant)
        self._first: FirstBurst | None = None  # not None while the limit is only a guess from it
        self._ramp = Ramp(budget)
        self._fit = Fit()
        self._early = EarlyRefusals()
        self._share = Share()
        self._blackouts = Blackouts(now)

    def usual(self, amount: float, share: float) -> None:
        """See `Learner`."""
        self.estimate.typical += share * (amount - self.estimate.typical)

    def __repr__(self) -> str:
        estimate = self.estimate
        return f"<PolicerLearner {estimate.state.value} limit={estimate.limit:.4g}/s unsure={estimate.unsure:.2g}>"

    @property
    def state(self) -> State:
        """The present state."""
        return self.estimate.state

    @property
    def limit(self) -> float:
        """The learned limit per second; infinite until the first refusal."""
        return self.estimate.limit

    @property
    def certain(self) -> bool:
        """See `Learner`."""
        return self._confirmed and self._first is None

    @property
    def ceiling_seconds(self) -> float:
        """See `Learner`."""
        return self.estimate.typical / self.ceiling

    @property
    def guessed(self) -> bool:
        """See `Learner`."""
        return self._first is not None

    # -- the gate ------------------------------------------------------------------------------------------------------

    def pace(self, now: float) -> float:
        """See `Learner`."""
        estimate = self.estimate
        if estimate.state is START:
            return min(self._start.pace(now) * estimate.typical, self.ceiling)
        height = self._share.factor if estimate.state is SHARED else self._ramp.height
        return min(estimate.limit * height, self.ceiling)

    @property
    def capacity(self) -> float:
        """See `Learner`. After the start, a cushion stays in the provider's bucket."""
        estimate = self.estimate
        burst, typical = estimate.burst, estimate.typical
        if estimate.state is START:
            return min(START_CREDIT * typical, max(self.ceiling, typical))
        return max(burst - min(max(0.1 * burst, typical), 3.0 * typical), typical)  # `Estimate.cushion`

    def sent(self, now: float, amount: float, *, held: bool, pace: float) -> Sent:
        """See `Learner`. Code of other classes is copied here, because this runs for each attempt: calls are slow."""
        if held and not self.unpaced:
            self._grow(now, amount)
        self._grown_at = now
        share, start, history, trace = self._share, self._start, self._blackouts.history, self._trace
        share.calls += 1
        if share.climb is not None and share.sent(now, self.estimate, self.refusal_seconds, pace):
            self._begin()
        start.unanswered += 1
        if start.began == inf:
            start.began = now
        one = Sent(now, amount, held)
        history.pending.append(one)
        if len(history.pending) > POLICER_MAX_REMEMBERED:
            history.flush()
        trace.sent.append(one)
        if len(trace.sent) > POLICER_MAX_REMEMBERED:
            trace.trim()
        return one

    def _empty_for(self, now: float, pause: float) -> Effect:
        """Empty the gate's bucket, because the provider's is empty. Let it give nothing for `pause` more seconds."""
        level = -self.estimate.cushion if self.estimate.has_credit and not self.guessed else 0.0
        return Effect(level - pause * self.pace(now))

    # -- verdicts ------------------------------------------------------------------------------------------------------

    def accepted(self, now: float, sent: Sent) -> None:
        """See `Learner`."""
        self._confirmed = True
        start, amount = self._start, sent.amount
        start.unanswered -= 1  # `Start.answered`, copied here for the reason given in `sent`
        start.answers.append((now, amount))
        start.total += amount
        if start.answers[0][0] < now - START_WINDOW_SECONDS:
            start.expire(now)
        if self._share.climb is not None:
            self._share.climb.accepted()

    def void(self, now: float, sent: Sent) -> None:
        """See `Learner`."""
        self._start.answered(now, 0.0)

    def refused_too(self, now: float, sent: Sent) -> None:
        """See `Learner`."""
        sent.refused = True
        self._start.answered(now, 0.0)
        self._blackouts.refused(sent.at, sent.amount)

    def settled(self, sent: Sent, amount: float) -> None:
        """See `Learner`."""
        if sent.in_bins:
            self._blackouts.history.add(sent.at, amount - sent.amount)
        if self._first is not None and self._first.holds(sent):
            self._first.correct(amount - sent.amount, self.estimate, self.refusal_seconds)
        sent.amount = amount

    def refused(self, now: float, sent: Sent) -> Effect:
        """See `Learner`. The refusals of one burst (recognised by their send times) are one event."""
        self.refused_too(now, sent)
        remembered, self._remembered_at = self._remembered_at, inf
        weight = 1.0 if self.state is START else 0.3  # the first value replaces the assumed value
        self.refusal_seconds = max(self.refusal_seconds + weight * (now - sent.at - self.refusal_seconds), 1e-3)
        if sent.at <= self._cut_at:
            if self._first is None or not self._first.open:
                self._ramp.refused()
                return NO_EFFECT
            self._first.correct(-sent.amount, self.estimate, self.refusal_seconds)
            self._begin()
            return self._empty_for(now, 0.0)
        self._ramp.refused()
        if (climb := self._share.climb) is not None:
            self.estimate.limit *= climb.refused(sent.at)
            return Effect(None, climb.in_vain)
        if remembered < inf:
            self.estimate.burst_at_most(self._trace.until(sent).total)
        if self.state is State.START or (remembered < inf and self._ramp.along < LEARNER_EARLY):
            self._first_refusal(now, sent)
        elif self._refusal(now, sent):
            return NO_EFFECT
        self._cut_at = now
        blackouts = self._blackouts
        if self._first is not None and blackouts.barren:
            self._first.none_for(sent.at - self._trace.start, self.estimate)
        elif blackouts.barren < 2:
            self._trace.emptied(sent.counted_at)
        self._begin()
        if blackouts.windowed:
            rest = max(blackouts.next_at - now, 0.0)
            return Effect(self.estimate.typical - rest * self.pace(now), blackouts.barren >= 1)
        # After the first refusal, wait once more for the time of a refusal: until all verdicts of the burst are known.
        level, _ = self._empty_for(now, now - sent.at if self._first is not None and self._first.open else 0.0)
        return Effect(level, blackouts.barren >= 2 or blackouts.lost_seconds > 0)

    # -- what a refusal does -------------------------------------------------------------------------------------------

    def _first_refusal(self, now: float, sent: Sent) -> None:
        """Guess the limit. A remembered limit is forgotten here: it was refused before the pace reached it."""
        first = FirstBurst(sent.at, self._start.began, self._trace)
        first.guess(self.estimate, self.refusal_seconds)
        self._first = first if first.is_burst else None
        self.unpaced = False
        self.estimate.on(now, Event.FIRST_REFUSAL, "first refusal")

    def _refusal(self, now: float, sent: Sent) -> bool:
        """Learn from a refusal after the first one. If refusals come at any pace, begin a `Climb` and return True."""
        estimate = self.estimate
        burst, limit, pace = estimate.burst, estimate.limit, self.pace(now)
        # A first guess, or a refusal that is punished, says nothing about refusals at other paces.
        counts = not (self.guessed or self._blackouts.lost_seconds)
        known = estimate.unsure < ESTIMATE_RECALLED
        if self._first is not None:
            self._first.open = False
        self._learn(now, self._trace.until(sent))
        slow = known or (pace <= limit and estimate.burst == burst)
        return counts and slow and not self._blackouts.windowed and self._share.in_vain(now, limit, estimate)

    def _learn(self, now: float, interval: Interval) -> None:
        """Learn the limit from the calls accepted since the previous refusal."""
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
            high = inf  # seldom at the limit: the level of the bucket depends on the burst, which is not known well
            if not interval.refused.bound and estimate.has_credit:
                estimate.overspent(min(low, pace))
                estimate.changed(now, "refused within a burst")
                return
        high = min(high, pace)
        low = min(low, high)
        self._first = blackouts.explained_by = None
        if self._ramp.along < LEARNER_EARLY and not guessed:
            if blackouts.lost_seconds:
                blackouts.early(interval, estimate)
            else:
                self._too_early(now, interval)
            return
        self._early.count = 0
        blur = 0.0
        if blackouts.lost_seconds:
            blur = 0.5 * estimate.burst / interval.total  # because the burst is not known well
        elif estimate.has_credit and self._ramp.spent + estimate.typical >= estimate.burst:
            estimate.spent()
        sure = estimate.unsure <= ESTIMATE_VAGUE
        soon = sure and estimate.has_credit and self._ramp.along < LEARNER_SOON
        fell = not sure and not guessed and high < (1.0 - estimate.unsure) * estimate.limit
        off = estimate.narrow(low, high, blur=blur, anew=guessed)
        known = estimate.unsure <= 3 * ESTIMATE_SUREST
        estimate.on(now, Event.MEASURED_WELL if known else Event.MEASURED_ROUGHLY, f"refused at {pace:.3g}/s")
        if not self._look_again(off):
            if (off > LEARNER_OFF or soon or fell) and not blackouts.lost_seconds:
                self._share.odd(now, estimate)
            elif off == 0.0 and sure:
                self._share.as_alone()

    def _look_again(self, off: float) -> bool:
        """Probe soon if the limit has changed, else later each time. Return True for the first change in a while."""
        if off <= ESTIMATE_MOVED:
            self._ramp.confirmed()
        elif self._ramp.moved():
            self._share.explained()
            return True
        return False

    def _too_early(self, now: float, interval: Interval) -> None:
        """Learn from a refusal below the limit: chance, other users of the account, or a lower limit."""
        estimate, early = self.estimate, self._early
        early.add(interval)
        if self._share.odd(now, estimate):
            early.count = 0
        elif early.cut(interval, estimate):
            estimate.changed(now, "refused below the learned limit")
        else:
            self._share.explained(but=SHARED_KEPT)
            self._look_again(early.measure(interval.refused, estimate))
            estimate.on(now, Event.LOWER_LIMIT, "refused again and again: the limit is lower")

    # -- blackouts -----------------------------------------------------------------------------------------------------

    @property
    def windowed(self) -> bool:
        """See `Learner`. Blackouts show it."""
        return self._blackouts.windowed

    def window_ends(self, now: float) -> float:
        """See `Learner`."""
        return self._blackouts.ends(now, self.estimate.typical)

    def resumed(self, now: float, after: Recovery | Remembered | Unknown | float) -> Effect:
        """See `Learner`."""
        if after is UNKNOWN or (isinstance(after, Recovery) and not self._confirmed):
            refusal_seconds, unanswered = self.refusal_seconds, self._start.unanswered
            # Initialise again, so that no part of what was learned is left.
            self.__init__(  # type: ignore[misc]
                now,
                ceiling=self.ceiling,
                budget=self._budget,
                typical=self.estimate.typical,
                dormant=self._dormant,
            )
            self.refusal_seconds, self._start.unanswered = refusal_seconds, unanswered
            return Effect(0.0)
        if isinstance(after, Recovery):
            if self.state is State.START:
                return NO_EFFECT
            self._recovered(now, after.closed_at, after.probed_at, after.step)
            return EMPTY
        if isinstance(after, Remembered):
            self._recall(now, after)
            return EMPTY
        return self._restart(now, after)

    def _recovered(self, now: float, closed_at: float, probed_at: float, step: float) -> None:
        """
        Learn from a blackout that began at `closed_at` and ended when the probe sent at `probed_at` was accepted.

        `step`: seconds between the last refusal and that probe. If the blackout was a penalty for its refusal, that
        refusal bounds the limit like any other. If it was the rest of a used-up window, the limit is the amount
        accepted since the previous blackout, divided by the whole time. That is also nearly true if the punished
        refusal came too early.
        """
        estimate, blackouts = self.estimate, self._blackouts
        blackouts.began = max(self._start.began, blackouts.began)
        whole = blackouts.ended(closed_at, probed_at, step, estimate.typical)
        if self._first is not None and blackouts.barren:
            self._first.none_for(step, estimate)  # each refusal may have restarted the penalty
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

    def _restart(self, now: float, share: float) -> Effect:
        """Continue after a pause, such as an outage, at this share of the limit, and rise from there."""
        if self.state is State.START:
            self._start.again(now)
            return NO_EFFECT
        self._trace.emptied(now)
        self._ramp.end(share)
        return EMPTY

    # -- the ramp ------------------------------------------------------------------------------------------------------

    def _unbounded_pace(self) -> float:
        height = self._share.factor if self.state is State.SHARED else self._ramp.height
        return self.estimate.limit * height

    def _begin(self) -> None:
        """Begin a new ramp from the present estimate."""
        estimate, blackouts = self.estimate, self._blackouts
        estimate.limit = max(estimate.limit, ESTIMATE_LEAST * estimate.typical)
        self._ramp.begin(
            estimate,
            self.refusal_seconds,
            # a guess must be improved soon, even if that costs refusals
            lost=0.0 if self.guessed else blackouts.lost(estimate),
            window=blackouts.window if blackouts.windowed else 0.0,
        )

    def _grow(self, now: float, amount: float) -> None:
        """Raise the pace or the limit, because the pace delayed an attempt of this amount."""
        estimate, blackouts, seconds = self.estimate, self._blackouts, min(now - self._grown_at, 0.5)
        if self.state is State.START:
            self._start.grow(seconds)
        elif now - self._remembered_at > LEARNER_REMEMBERED_SECONDS and self._confirmed:
            # No refusal for LEARNER_REMEMBERED_SECONDS: the limit may be far higher than before the restart.
            estimate.limit *= exp(RAMP_RISE * min(now - self._grown_at, 1.0))
            estimate.unsure = ESTIMATE_UNSUREST
            self._begin()
        elif self._first is not None and self._first.searching:
            estimate.limit *= self._first.growth(seconds, self.refusal_seconds)
        elif self.state is State.SHARED:
            estimate.limit *= self._share.growth(now, now - self._grown_at, self.estimate)
        else:
            if self._ramp.along >= 1.0 and self.pace(now) > (
                LEARNER_MAX_AHEAD * blackouts.history.rate(now, LEARNER_LATE_SECONDS) + 3.0 * estimate.typical
            ):
                seconds = 0.0  # something else delays most requests
            self._ramp.grow(seconds, amount, estimate.typical)
            if blackouts.windowed and self._ramp.risen:
                fits = blackouts.risen(now, estimate)
                self._begin()
                if not fits:
                    self._ramp.end(1.0)
            if self.state is State.STEADY and self._ramp.along > 0.7:
                estimate.on(now, Event.PACE_ABOVE_LIMIT, "the pace is above the limit, to see whether it has risen")

    # -- memory and operators ------------------------------------------------------------------------------------------

    def _recall(self, now: float, known: Remembered) -> None:
        """Start from a limit that was learned before a restart, and test soon whether it is still true."""
        self.estimate.recall(known.limit, known.burst, known.error)
        self._trace.emptied(now)
        self._cut_at = now
        self.unpaced = self._confirmed = False
        self._remembered_at = now
        self.estimate.on(now, Event.REMEMBERED, known.why)
        self._begin()

    def rate(self, now: float) -> float:
        """See `Learner`."""
        return self._start.rate(now)

    def use(self, now: float) -> float:
        """See `Learner`."""
        return 0.0 if self.limit == inf else self.rate(now) / self.limit

    def snapshot(self) -> Snapshot:
        """See `Learner`."""
        one = self.estimate
        return Snapshot(one.limit, one.burst, one.unsure, one.state.value, one.changed_why, one.changed_at)
