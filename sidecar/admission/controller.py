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

from collections import deque
from math import exp, inf
from typing import Any

from .blackout import Blackouts
from .bucket import TokenBucket
from .early import EarlyRefusals
from .first import USUAL_BURST_SECONDS, FirstBurst
from .fit import SMALL, Fit
from .policer import Sent, rate_between
from .ramp import SUREST, UNSUREST, VAGUE, Ramp
from .shared import CUT, EPISODE_SECONDS, GROWTH, SHARED_SECONDS, Climb, Refusals
from .start import START_CREDIT, Start
from .states import CUTS, State

#: The least that a limit can be, in usual requests a second: one in an hour.
LEAST = 1 / 3600
#: Seconds of the limit that a bucket is taken to hold at most.
MOST_BURST_SECONDS = 6.0
#: How uncertain a limit that was learned before a restart is at least.
RECALLED = 0.1
#: A refusal before this share of a ramp's length has come too early.
EARLY = 0.4
#: What one event leaves of the limit at least.
LARGEST_CUT = 0.3
#: A pace of more than so many times what goes out, of late, is not what holds requests back.
MOST_AHEAD, LATE_SECONDS = 2.0, 1.5
#: A limit that is another by this share has moved.
MOVED = 0.2
#: Growth of a first guess while nothing contradicts it: a second, where refusals come back at once; how much less for
#: each second that they take; and from one request to the next at most.
SEARCH, SEARCH_CAUTION, SEARCH_PER_REQUEST = 2.0, 5.0, 0.35
#: Sends remembered at most: beyond this many since a refusal, the rate is known better than it will stay true.
MOST_REMEMBERED = 1000
#: A blackout in which less than so many requests would have gone out is a pause between two of them.
PAUSE = 3.0


class RateController:
    """One dimension of one provider account and model. Rates and amounts are in its unit: requests, or LLM tokens."""

    def __init__(
        self, now: float, *, ceiling: float = inf, budget: float = 0.005, typical: float = 1.0, dormant: bool = False
    ) -> None:
        """`typical` is the amount of a usual request; `dormant`: nothing is paced before the first refusal."""
        self.state = State.START
        self.limit = inf
        """The learned limit, a second; infinite while nothing was ever refused."""
        self.burst = START_CREDIT * typical
        """What the provider is taken to let through at once after a pause."""
        self.ceiling = ceiling
        self.typical = typical
        self.changed_at = now
        self.changed_why = "nothing was refused yet"
        self.refusal_seconds = 0.05
        """How long a refusal takes to come back, smoothed."""
        self._unpaced = dormant and ceiling == inf
        """Whatever comes may go: nothing need be counted yet."""
        self._ramp = Ramp(budget)
        self._unsure = UNSUREST
        self._start = Start(dormant=dormant)
        self._bucket = TokenBucket(now, inf, START_CREDIT * typical)
        self._filled_at = -inf
        self._sent: deque[Sent] = deque()  # since the last refusal
        self._empty_at = now  # when the provider's bucket was last known to be empty: the last refusal's send time
        self._cut_at = -inf
        self._grown_at = now
        # the first refusal
        self._first: FirstBurst | None = None  # while its refusals are still coming back
        self.guessed = False
        """The limit is a guess from the first burst, and may well be far off."""
        self._searching = False  # and the provider's bucket was empty, so that whatever is taken shows more
        # refusals that come too early
        self._early = EarlyRefusals()
        self._fit = Fit()
        self._shared_until = -inf
        self._climb: Climb | None = None  # while refusals come at any pace
        self._refusals = Refusals()
        # blackouts
        self._blackouts = Blackouts(now)
        self._barren = 0  # refusals with nothing taken between
        self._rest_until = now  # a window is used up until then
        self._least: float | None = None  # that explains a refusal that came too early and was punished

    # -- the gate ------------------------------------------------------------------------------------------------------

    def pace(self, now: float) -> float:
        """What may be sent a second at this instant; infinite for unpaced."""
        if self.state is State.START:
            return min(self._start.pace(now) * self.typical, self.ceiling)
        return min(self._unbounded_pace(), self.ceiling)

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `amount` may be sent; 0 for now."""
        if self._unpaced:
            return 0.0
        self._fill(now)
        return self._bucket.wait(now, amount)

    def seconds_for(self, now: float, amount: float) -> float:
        """Seconds until so much in all may have been sent, at the pace of now."""
        self._fill(now)
        missing = amount - self._bucket.level(now)
        return missing / self.pace(now) if missing > 0 else 0.0

    def sent(self, now: float, amount: float, bound: bool) -> Sent:
        """One attempt goes out. `bound`: it had to wait for this dimension, so more would have been sent."""
        if not self._unpaced:
            if now != self._filled_at:  # `wait` has, in the turn in which it let this one through
                self._fill(now)
            if bound:
                self._grow(now, amount)
            self._bucket.take(now, amount)
        self._grown_at = now
        self._refusals.calls += 1
        if self._climb is not None:
            self._climbed(now, self._climb)
        self._start.sent(now)
        self._blackouts.history.add(now, amount)
        one = Sent(now, amount, bound)
        self._sent.append(one)
        if len(self._sent) > MOST_REMEMBERED:
            self._forget()
        return one

    def _fill(self, now: float) -> None:
        self._filled_at = now
        if self.state is State.START:
            self._bucket.set(now, self.pace(now), min(START_CREDIT * self.typical, max(self.ceiling, self.typical)))
        else:
            self._bucket.set(now, self.pace(now), max(self.burst - self._cushion(), self.typical))

    def _empty(self, now: float) -> None:
        """Nothing is saved up: what the provider's bucket holds is not known, or is nothing."""
        self._set_level(now, 0.0)

    def _set_level(self, now: float, amount: float) -> None:
        """So much may be sent at once, whatever it was; what is below nothing has to flow in first."""
        self._fill(now)
        self._bucket.take(now, self._bucket.level(now) - amount)

    def _cushion(self) -> float:
        """What is left in the provider's bucket, so that chance (other callers, uneven ways) does not empty it."""
        return min(max(0.1 * self.burst, self.typical), 3.0 * self.typical)

    @property
    def _has_credit(self) -> bool:
        return self.burst >= 2.0 * self.typical

    # -- verdicts ------------------------------------------------------------------------------------------------------

    def accepted(self, now: float, sent: Sent) -> None:
        """The provider took it."""
        self._start.answered(now, sent.amount)
        if self._climb is not None:
            self._climb.accepted()

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
        if not self._unpaced:
            self._bucket.take(now, amount - sent.amount)
        self._blackouts.history.add(sent.at, amount - sent.amount)
        if self._first is not None and self._first.holds(sent):
            self._first.taken += amount - sent.amount  # it was judged by what was reserved
            self._guess(self._first)
        sent.amount = amount

    def refused(self, now: float, sent: Sent) -> bool:
        """
        The provider refused it for this dimension. One burst of refusals, told by their send times, is one event.

        True if everything is refused, whatever the pace: a hold must find out when that ends.
        """
        self.refused_too(now, sent)
        self.refusal_seconds += 0.3 * (now - sent.at - self.refusal_seconds)
        if sent.at <= self._cut_at:
            if self._first is not None:
                self._first.taken -= sent.amount
                self._guess(self._first)
                self._begin()
                self._drain(now, 0.0)
            else:
                self._ramp.refused()
            return False
        self._ramp.refused()
        if self._climb is not None:
            before = self._climb.in_vain
            self._climb.refused(sent.at)
            if self._climb.in_vain and not before:
                self.limit *= CUT
            return self._climb.in_vain
        if self.state is State.START:
            self._first_refusal(now, sent)
        else:
            self._first = None
            burst, limit, pace = self.burst, self.limit, self.pace(now)
            # a first guess, a share, or a pace that was punished says nothing of other paces
            counts = not self.guessed and self.state is not State.SHARED and not self._blackouts.lost_seconds
            known = self._unsure < RECALLED
            self._refusal(now, sent)
            below = pace <= limit and self.burst == burst
            if counts and (known or below):
                self._refusals.add(limit, below=below)
            if self._in_vain(now):
                return False
        self._cut_at = now
        if self._barren and self.guessed:
            self._none_for(sent.at - self._empty_at)
        elif self._barren < 2:
            self._empty_at = sent.at
            while self._sent and self._sent[0].at <= sent.at:
                self._sent.popleft()
        self._begin()
        if self._blackouts.windowed:
            self._set_level(now, self.typical - max(self._rest_until - now, 0.0) * self.pace(now))
            return self._barren >= 1
        # after the first one as long again, to see what became of the rest of the burst
        self._drain(now, now - sent.at if self._first is not None else 0.0)
        return self._barren >= 2 or self._blackouts.lost_seconds > 0

    def _none_for(self, seconds: float) -> None:
        """So long nothing was taken after a refusal: the limit is below one request in that time."""
        most = self.typical / seconds
        self.limit = max(min(self.limit, most), self.burst / USUAL_BURST_SECONDS if self._has_credit else 0.0)

    def _drain(self, now: float, pause: float) -> None:
        """The provider's bucket is empty, and so is this one; for `pause` seconds it gives nothing."""
        level = -self._cushion() if self._has_credit and not self.guessed else 0.0
        self._set_level(now, level - pause * self.pace(now))

    def _in_vain(self, now: float) -> bool:
        """Whether refusals come at any pace; then what counts is what a pace brings."""
        if self._blackouts.windowed or self.guessed or self.burst > SMALL * self.typical:
            return False  # a larger bucket refuses only whoever is too fast
        if not (below := self._refusals.in_vain()):
            return False
        self.limit, share = below
        self._climb = Climb(now, share)
        self._to(now, State.SHARED, "refused at any pace: others use the account too")
        return True

    def _climbed(self, now: float, climb: Climb) -> None:
        """One more call went out while refusals come at any pace."""
        self.limit *= climb.sent(now, self.refusal_seconds, self.pace(now) / self.typical)
        if climb.needless:
            self._climb = None
            self._unsure = RECALLED
            self._to(now, State.ASSESS, "the account seems to be ours alone again")
            self._begin()

    def _begin(self) -> None:
        """Begin a new ramp with what is known now."""
        blackouts = self._blackouts
        self.limit = max(self.limit, LEAST * self.typical)
        self._ramp.begin(
            self.limit,
            self.burst,
            self.typical,
            self._unsure,
            self.refusal_seconds,
            # what is only guessed is soon to be known better, whatever that costs
            lost=0.0 if self.guessed else max(blackouts.lost_seconds * self.limit - 0.7 * self.burst, 0.0),
            window=blackouts.window if blackouts.windowed else 0.0,
        )

    def _first_refusal(self, now: float, sent: Sent) -> None:
        first = FirstBurst(sent.at, self._start.began, self._sent)
        self._guess(first)
        self._first = first if first.is_burst else None
        self.guessed = self._searching = first.is_burst
        self._unsure = UNSUREST
        self._to(now, State.ASSESS, "first refusal")

    def _guess(self, first: FirstBurst) -> None:
        """The limit and the burst from the first burst alone; the limit where the search begins."""
        self.limit, self.burst = first.guess(self.typical)
        self.limit = max(self.limit, first.quick(self.typical, self.refusal_seconds))

    def _refusal(self, now: float, sent: Sent) -> None:
        """The limit from what was taken since the refusal before."""
        taken = [one for one in self._sent if not one.refused and one.at <= sent.at]
        self._barren = 0 if taken else self._barren + 1
        pace = self._unbounded_pace()
        if self.state is State.SHARED:
            if now < self._shared_until:
                if now > self.changed_at + EPISODE_SECONDS:
                    self.limit *= CUT
                    self._changed(now, "refused while others share the account")
                return
            self._to(now, State.ASSESS, "the account seems to be ours alone again")
        if not taken:
            return  # the bucket was empty, and still is
        if self._blackouts.windowed and self._window_full(now, sent):
            return

        if self._refit(now, sent, taken):
            return

        def between(burst: float) -> tuple[float, float]:
            return rate_between(self._empty_at, taken, sent.at, sent.amount, burst)

        low, high = between(self.burst)
        for _ in range(2):  # a limit that has risen has mostly risen with its credit
            risen = (low + high) / 2 / self.limit
            if risen < 1.0 + MOVED or self._unsure > VAGUE or not self._has_credit:
                break
            low, high = between(risen * self.burst)
        total = sum(one.amount for one in taken)
        guessed = self.guessed
        if not guessed and sum(one.amount for one in taken if one.bound) < 0.8 * total:
            high = inf  # seldom at the limit: how full the bucket was hangs on a burst that is known badly
            if not sent.bound and self._has_credit:
                self.burst = max(0.85 * self.burst, self.typical)
                self.limit = max(self.limit, min(low, pace))
                self._changed(now, "refused within a burst")
                return
        high = min(high, pace)
        low = min(low, high)
        self.guessed, self._searching, self._least = False, False, None
        if self._ramp.along < EARLY and not guessed:
            if self._blackouts.lost_seconds:
                if not self._has_credit:  # else what was taken in close succession would have been refused
                    self.burst = 2.0 * self.typical
                self._least = between(inf)[0]
            else:
                self._too_early(now, sent, taken)
            return
        self._early.count = 0
        width, middle = (high - low) / (low + high), (low + high) / 2
        if self._unsure >= UNSUREST:  # as high as that leaves: few calls hardly bound it from below
            middle = max(middle, high / (1.0 + UNSUREST))
        if self._blackouts.lost_seconds:
            width = max(width, 0.5 * self.burst / total)  # for the burst is known badly
        elif self._has_credit and self._ramp.spent + self.typical >= self.burst:  # as much was spent, and perhaps more
            self.burst = min(1.05 * self.burst, MOST_BURST_SECONDS * self.limit)
        if not guessed and low <= self.limit <= high:
            self.limit += self._unsure / (self._unsure + width) * (middle - self.limit)
            width = min(width, 0.6 * self._unsure)
            self._ramp.confirmed()
        else:
            self._learn(max(middle, LARGEST_CUT * self.limit))
        self._unsure = min(max(width, SUREST), UNSUREST)
        self._to(now, State.ASSESS if self._unsure > 3 * SUREST else State.STEADY, f"refused at {pace:.3g}/s")

    def _refit(self, now: float, sent: Sent, taken: list[Sent]) -> bool:
        """Whether another burst, and only that, explains the last few refusals; then it is learned, with the limit."""
        self._fit.add(self._empty_at, taken, sent)
        if self._blackouts.lost_seconds or self.guessed:
            self._fit.forget()
            return False
        another = self._fit.another(self.burst, self.typical)
        if another is None:
            return False
        self.burst, low, high = another
        self.limit = (low + high) / 2
        self._unsure = min(max((high - low) / (low + high), 3 * SUREST), UNSUREST)
        self._least, self._early.count = None, 0
        self._to(now, State.ASSESS, "refused: the bucket holds more or less than was thought")
        return True

    def _learn(self, limit: float) -> None:
        """Another limit. Where the old one was known well, it has moved, and so may the credit, which goes with it."""
        if self._unsure <= VAGUE and abs(limit / self.limit - 1.0) > MOVED:
            if self._ramp.moved():
                self._early.forget()
            if self._has_credit:
                self.burst = max(self.burst * limit / self.limit, 2.0 * self.typical)
        else:
            self._ramp.confirmed()
        self.limit = limit

    def _window_full(self, now: float, sent: Sent) -> bool:
        """Whether a window is used up: then the next brings more, and not before."""
        next_at = self._blackouts.full(sent.at, self.typical)
        if next_at is None:
            return False
        self._learn_window()
        self._rest_until = next_at
        self._to(now, State.STEADY, "a window is used up")
        return True

    def _window_risen(self, now: float) -> None:
        """A window holds more than was thought, or there never was one."""
        if self._blackouts.risen(now, self.typical):
            self._learn_window()
            self._begin()
        else:
            self._begin()
            self._ramp.end(1.0)

    def _learn_window(self) -> None:
        self.limit = self._blackouts.rate
        self._unsure = min(max(self._blackouts.unsure, SUREST), UNSUREST)

    def _too_early(self, now: float, sent: Sent, taken: list[Sent]) -> None:
        """It came before the pace had reached the limit: chance, other users of the account, or a lower limit."""
        early = self._early
        early.add(now, sent, taken, self.limit)
        if early.often(now):
            early.forget()
            early.count = 0
            self._shared_until = now + SHARED_SECONDS
            self.limit *= CUT
            self._to(now, State.SHARED, "refused too often for one user of the account")
        elif early.count <= len(CUTS):
            self.limit *= CUTS[early.count - 1]
            if self._unsure > VAGUE:
                self.limit = min(self.limit, rate_between(self._empty_at, taken, sent.at, sent.amount, self.burst)[1])
            self._changed(now, "refused below the learned limit")
        else:
            most = early.most(sent)
            self._learn(max(min(most, 0.9 * self.limit), LARGEST_CUT * self.limit))
            self._unsure = 0.15
            early.explained()
            early.begin(sent, self.limit)
            self._to(now, State.ASSESS, "refused again and again: the limit is lower")

    @property
    def windowed(self) -> bool:
        """The quota is one of windows, as far as blackouts have shown."""
        return self._blackouts.windowed

    def window_ends(self, now: float) -> float:
        """When the present window ends; `now` where there are none."""
        return self._blackouts.ends(now, self.typical)

    # -- blackouts -----------------------------------------------------------------------------------------------------

    def recovered(self, now: float, closed_at: float, probed_at: float, step: float) -> None:
        """
        Everything was refused from `closed_at` on until the probe sent at `probed_at` was taken; nothing was tried for
        `step` seconds before that.

        If it was a penalty for the refusal, that refusal tells the limit as any other does. If it was the rest of a
        used-up window, the limit is what was taken since the one before, over all of the time; which also holds,
        nearly, where a refusal was punished that should not have come yet.
        """
        blackouts = self._blackouts
        blackouts.began = max(self._start.began, blackouts.began)
        whole = blackouts.ended(closed_at, probed_at, step, self.typical)
        seconds = probed_at - closed_at
        if self.guessed and self._barren:
            self._none_for(step)  # each refusal may have begun it anew
            self._searching = not self._has_credit
        self._barren = self._early.count = 0
        if self._climb is not None:
            blackouts.lost_seconds = 0.0
        elif blackouts.windowed:
            self._learn_window()
            self.guessed = self._searching = False
            self._sent.clear()
            self._empty_at = probed_at
            self._to(now, State.ASSESS, f"everything was refused for {seconds:.1f} s")
        elif seconds * self.limit < PAUSE * self.typical:
            blackouts.lost_seconds = 0.0
        else:
            if self.guessed:
                self.limit = max(self.limit, whole)
            elif self._least is not None:
                self.limit = min(max(whole, self._least, (1.0 - 1.5 * self._unsure) * self.limit), self.limit)
                self._unsure = min(1.5 * self._unsure, UNSUREST)
            self._unsure = max(self._unsure, 3 * SUREST)
            self._to(now, State.ASSESS, f"refused, and everything with it for {seconds:.1f} s")
        self._least = None
        self._early.forget()
        self._begin()
        self._empty(now)

    def restart(self, now: float, share: float) -> None:
        """Go on after a pause, such as an outage, at that share of the limit, and rise from there."""
        if self.state is State.START:
            self._start.again(now)
            return
        self._sent.clear()
        self._empty_at = now
        self._ramp.end(share)
        self._empty(now)

    # -- the ramp ------------------------------------------------------------------------------------------------------

    def _unbounded_pace(self) -> float:
        if self._climb is not None:
            return self.limit * self._climb.factor
        return self.limit if self.state is State.SHARED else self.limit * self._ramp.height()

    def _grow(self, now: float, amount: float) -> None:
        seconds = min(now - self._grown_at, 0.5)
        if self.state is State.START:
            self._start.grow(seconds)
        elif self._searching:
            self.limit *= exp(min(SEARCH / (1.0 + SEARCH_CAUTION * self.refusal_seconds) * seconds, SEARCH_PER_REQUEST))
        elif self._climb is not None:
            pass
        elif self.state is State.SHARED:
            self.limit *= exp(GROWTH * seconds)
        else:
            if self._ramp.along >= 1.0 and self.pace(now) > MOST_AHEAD * self._of_late(now) + 3.0 * self.typical:
                seconds = 0.0  # something else holds most of them back
            self._ramp.grow(seconds, amount, self.typical)
            if self._blackouts.windowed and self._ramp.risen:
                self._window_risen(now)
            if self.state is State.STEADY and self._ramp.along > 0.7:
                self._to(now, State.PROBE, "the pace is above the limit, to see whether it has risen")

    def _of_late(self, now: float) -> float:
        """The rate at which was sent in the last second or two, refusals left out."""
        return self._blackouts.history.since(now - LATE_SECONDS) / LATE_SECONDS

    def _forget(self) -> None:
        """Drop the older half; what the bucket held then is taken to be nothing."""
        for _ in range(MOST_REMEMBERED // 2):
            self._empty_at = self._sent.popleft().at

    # -- memory --------------------------------------------------------------------------------------------------------

    def learned(self) -> dict[str, float] | None:
        """What is worth remembering over a restart, as `recall` takes it; None while nothing was learned."""
        if self.limit == inf:
            return None
        return {"limit": self.limit, "burst": self.burst, "uncertainty": self._unsure}

    def recall(self, now: float, limit: float, burst: float, uncertainty: float = RECALLED) -> None:
        """Begin with what was learned before a restart, and find out soon how true it still is."""
        self.limit, self.burst = limit, max(burst, self.typical)
        self._unsure = min(max(uncertainty, RECALLED), UNSUREST)
        self._empty_at = self._cut_at = now
        self._to(now, State.ASSESS, "remembered from before the restart")
        self._begin()
        self._empty(now)

    # -- for operators -------------------------------------------------------------------------------------------------

    def rate(self, now: float) -> float:
        """The accepted amount a second, of late."""
        return self._start.rate(now)

    def use(self, now: float) -> float:
        """The accepted rate as a share of the limit; 0 while no limit is known."""
        return 0.0 if self.limit == inf else self.rate(now) / self.limit

    def status(self, now: float) -> dict[str, Any]:
        """What was learned, and when and why it last changed."""
        pace = self.pace(now)
        return {
            "state": self.state.value,
            "learned": None if self.limit == inf else round(self.limit, 3),
            "pace": None if pace == inf else round(pace, 3),
            "burst": None if self.limit == inf else round(self.burst, 1),
            "uncertainty": None if self.limit == inf else round(self._unsure, 3),
            "changed_seconds_ago": round(now - self.changed_at, 1),
            "changed_why": self.changed_why,
        }

    def _to(self, now: float, state: State, why: str) -> None:
        self.state = state
        self._unpaced = False
        self._changed(now, why)

    def _changed(self, now: float, why: str) -> None:
        self.changed_at = now
        self.changed_why = why
