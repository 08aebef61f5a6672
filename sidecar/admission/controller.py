"""Learns one dimension's limit (requests, or LLM tokens, a second) from which attempts were refused.

A quota is a policer: nothing slows down before a refusal, so the only signal is *which* attempts were refused, by the
time at which they were sent. The controller is pure: every call takes `now`, nothing waits, nothing is scheduled.

    START ──refused──▶ ASSESS ──the limit is known well──▶ STEADY ⇄ PROBE
                         ▲                                   │
                         └──── refused again and again ──────┤
                                                             └── so often that others must share it ──▶ SHARED

One mechanism carries ASSESS, STEADY and PROBE. A refusal gives bounds on the limit (`policer.rate_between`), so an
estimate and how uncertain it is. The pace then starts below the estimate by that uncertainty and rises, slowly and
ever faster, until the next refusal: the *ramp*. The less is known, the steeper; what is known well is probed as often
as the refusal budget pays for. A ramp that no refusal ends means that the limit has risen: the pace then grows by a
share a second until one comes. The states only name where on which ramp the pace is.
"""

from __future__ import annotations

from collections import deque
from math import exp, inf
from typing import Any

from .bucket import TokenBucket
from .history import History
from .policer import Sent, rate_between
from .start import START_CREDIT, Start
from .states import CUTS, State

#: Requests a second that any provider is taken to allow when a first refusal says nothing else.
FLOOR = 2.0
#: The ramp begins and ends at this share below and above the limit, at least and at most.
SUREST, UNSUREST = 0.01, 0.3
#: How uncertain a limit that was learned before a restart is at least.
RECALLED = 0.1
#: A ramp's length as a share of the calls that pay for one refusal, and where on it, in shares of its length, no
#: refusal means that the limit has risen. Of a bucket that gives credit, a ramp first saves some and then spends it:
#: the refusal comes at about 1.4. Without credit it comes as soon as the pace is over the limit, at 0.7.
RAMP, RISEN = 0.7, 1.6
RAMP_NO_CREDIT, RISEN_NO_CREDIT = 1.3, 1.15
#: Growth a second of a risen limit, where refusals come back at once.
RISE = 0.35
#: ... and at most by this share from one request to the next: at half a request a second, a second is no time.
RISE_PER_REQUEST = 0.08
#: ... and so much slower where a window was used up before: it takes all until it takes nothing.
WINDOW_CAUTION = 8.0
#: A ramp's length in seconds is held within these, since a limit may move: too slow for a small one is no use either.
SHORTEST_RAMP_SECONDS, LONGEST_RAMP_SECONDS = 4.0, 100.0
#: Where each refusal begins a blackout, this share of the quota may be lost to probing, and a ramp may take so long.
LOST_SHARE, LONGEST_LOSING_SECONDS = 0.02, 600.0
#: ... and the limit is taken to lie so far between what was taken for certain and the pace that was punished.
PUNISHED_HOPE = 0.2
#: A window that was used up is taken to be at most so long: quotas are told by the minute.
WINDOW_SECONDS = 60.0
#: A blackout longer than this is no penalty for a refusal.
LONGEST_PENALTY_SECONDS = 10.0
#: What one event leaves of the limit at least.
LARGEST_CUT = 0.3
#: Sends remembered at most: beyond this many since a refusal, the rate is known better than it will stay true.
MOST_REMEMBERED = 1000
#: Seconds of the limit that a bucket is taken to hold at most.
MOST_BURST_SECONDS = 6.0
#: A refusal at so many times the rate that the credit explains makes a credit of less than so many requests doubtful.
DOUBTFUL, SMALL_BURST = 1.4, 4.0
#: Debt of refusals that slows probing down at most, and what it is slowed down by for each.
MOST_DEBT, SLOWER_BY = 2.0, 0.15
#: Refusals below the learned limit within so many seconds mean that others use the account too, for so long.
SHARED_AFTER, SHARED_WINDOW_SECONDS, SHARED_SECONDS = 5, 90.0, 240.0
#: A limit that falls to this share twice within so many seconds did not: the bucket has credit that was not known of.
FELL, FELL_AGAIN_SECONDS = 0.8, 240.0
#: While shared: what a refusal leaves, and growth a second, the same for all, so that the larger shrinks towards equal
#: shares (Chiu & Jain, 1989: it meets refusals in proportion to what it sends).
SHARED_CUT, SHARED_GROWTH = 0.8, 0.012


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
        self._budget = budget
        self._start = Start(dormant=dormant)
        self._bucket = TokenBucket(now, inf, START_CREDIT * typical)
        self._sent: deque[Sent] = deque()  # since the last refusal
        self._empty_at = now  # when the provider's bucket was last known to be empty: the last refusal's send time
        self._cut_at = -inf
        self._first_burst = False
        self._burst_from = now
        self._doubted: tuple[float, float] | tuple[()] | None = None  # limit and burst that were; () once they hold
        self._unsure = UNSUREST
        self._purse = 0.0  # refusals that the budget has paid for and that were not spent; a debt below 0
        # the ramp
        self._ramp = 0.0  # amount sent on it while the pace bound
        self._rise = 1.0
        self._grown_at = now
        # refusals that come too early
        self._early = 0
        self._early_at: deque[float] = deque(maxlen=SHARED_AFTER)
        self._barren = 0
        self._episode_at = now
        self._episode: list[Sent] = []
        self._shared_until = -inf
        self._before = inf  # the limit before the first of them
        self._fell_at = -inf
        # blackouts
        self._history = History(WINDOW_SECONDS + 10.0)
        self._recovered_at = now
        self._refused_pace = 0.0  # the pace at the latest refusal after something was taken
        self._unexpected = False  # the refusal before the latest blackout came too early
        self._blackouts = 0  # such, one after the other
        self._lost = 0.0  # amount that each refusal costs, where it is punished
        self._window = 0.0  # amount that a window held, where one was used up
        self._windowed = False  # more than once: the quota is one of windows

    # -- the gate ------------------------------------------------------------------------------------------------------

    def pace(self, now: float) -> float:
        """What may be sent a second at this instant; infinite for unpaced."""
        if self.state is State.START:
            return min(self._start.pace(now) * self.typical, self.ceiling)
        return min(self._unbounded_pace(), self.ceiling)

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `amount` may be sent; 0 for now."""
        self._fill(now)
        return self._bucket.wait(now, amount)

    def seconds_for(self, now: float, amount: float) -> float:
        """Seconds until so much in all may have been sent, at the pace of now."""
        self._fill(now)
        missing = amount - self._bucket.level(now)
        return missing / self.pace(now) if missing > 0 else 0.0

    def sent(self, now: float, amount: float, bound: bool) -> Sent:
        """One attempt goes out. `bound`: it had to wait for this dimension, so more would have been sent."""
        self._fill(now)
        if bound:
            self._grow(now, amount)
        self._grown_at = now
        self._bucket.take(now, amount)
        self._start.sent(now)
        self._history.add(now, amount)
        self._purse = min(self._purse + self._budget, 1.0)
        one = Sent(now, amount, bound)
        self._sent.append(one)
        if len(self._sent) > MOST_REMEMBERED:
            self._forget()
        return one

    def _fill(self, now: float) -> None:
        if self.state is State.START:
            self._bucket.set(now, self.pace(now), min(START_CREDIT * self.typical, max(self.ceiling, self.typical)))
        else:
            self._bucket.set(now, self.pace(now), max(self.burst - self._cushion(), self.typical))

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

    def void(self, now: float, sent: Sent) -> None:
        """It ended, and says nothing of this limit."""
        self._start.answered(now, 0.0)

    def settle(self, now: float, sent: Sent, amount: float) -> None:
        """It took another amount than was reserved."""
        self._bucket.take(now, amount - sent.amount)
        self._history.add(sent.at, amount - sent.amount)
        if self._first_burst and self._burst_from <= sent.at <= self._empty_at and not sent.refused:
            self.burst = max(self.burst + amount - sent.amount, self.typical)  # it was judged by what was reserved
            self.limit = self._guess()
        sent.amount = amount

    def refused(self, now: float, sent: Sent) -> bool:
        """
        The provider refused it for this dimension. One burst of refusals, told by their send times, is one event.

        True if everything is refused, whatever the pace: a hold must find out when that ends.
        """
        self._start.answered(now, 0.0)
        sent.refused = True
        self._history.add(sent.at, -sent.amount)
        self.refusal_seconds += 0.3 * (now - sent.at - self.refusal_seconds)
        if sent.at <= self._cut_at:
            if self._first_burst:
                self.burst = max(self.burst - sent.amount, self.typical)
                self.limit = self._guess()
            else:
                self._purse = max(self._purse - 1.0, -MOST_DEBT)
            return False
        self._purse = max(self._purse - 1.0, -MOST_DEBT)
        self._first_burst = self.state is State.START
        if self._first_burst:
            self._first_refusal(now, sent)
        else:
            self._refusal(now, sent)
        self._cut_at = now
        self._empty_at = sent.at
        self._ramp, self._rise = 0.0, 1.0
        while self._sent and self._sent[0].at <= sent.at:
            self._sent.popleft()
        self._fill(now)
        level = -self._cushion() if self._has_credit else 0.0
        if self._first_burst:
            level -= (now - sent.at) * self.pace(now)  # as long again, to see what became of the rest of the burst
        self._bucket.take(now, self._bucket.level(now) - level)
        return self._barren >= 2 or self._lost > 0 or self._windowed

    def _guess(self) -> float:
        """The limit after the first refusal: a bucket mostly holds one to five seconds of its rate."""
        return max(self.burst / 2.0, FLOOR * self.typical)

    def _first_refusal(self, now: float, sent: Sent) -> None:
        window = Start.WINDOW_SECONDS
        taken = sum(one.amount for one in self._sent if one.at >= sent.at - window and not one.refused)
        self.burst = max(taken, self.typical)
        self._burst_from = sent.at - window
        self.limit = self._guess()
        if sent.at - self._start.began > window:
            self.limit = max(0.8 * taken / window, FLOOR * self.typical)
            self._first_burst = False
        self._unsure = UNSUREST
        self._to(now, State.ASSESS, "first refusal")

    def _refusal(self, now: float, sent: Sent) -> None:
        """The limit from what was taken since the refusal before."""
        taken = [one for one in self._sent if not one.refused and one.at <= sent.at]
        self._barren = 0 if taken else self._barren + 1
        pace = self._unbounded_pace()
        if taken:
            self._refused_pace = pace
        if self.state is State.SHARED:
            if now < self._shared_until:
                self.limit *= SHARED_CUT
                self._changed(now, "refused while others share the account")
                return
            self._to(now, State.ASSESS, "the account seems to be ours alone again")
        if self._windowed:
            self._window_full(now, sent)
            return
        low, high = rate_between(self._empty_at, taken, sent.at, sent.amount, self.burst)
        if self._doubted is None and pace > DOUBTFUL * high and 2.0 <= self.burst / self.typical < SMALL_BURST:
            # The pace was far above: either the bucket gave all its credit for that, or it has none and the limit is
            # near the pace. Try that once; it is soon known to be wrong.
            self._doubted, self.burst = ((low + high) / 2, self.burst), self.typical
            low, high = rate_between(self._empty_at, taken, sent.at, sent.amount, self.burst)
        total = sum(one.amount for one in taken)
        if sum(one.amount for one in taken if one.bound) < 0.8 * total:
            high = inf  # seldom at the limit: how full the bucket was hangs on a burst that is known badly
            if not sent.bound and self._has_credit:
                self.burst = max(0.85 * self.burst, self.typical)
                self.limit = max(self.limit, min(low, pace))
                self._changed(now, "refused within a burst")
                return
        self._unexpected = self._ramp < 0.4 * self._length() and (taken != [] or self._unexpected)
        if not taken or self._ramp < 0.4 * self._length():
            self._too_early(now, sent, taken)
            return
        self._early = 0
        self._window *= 0.9  # unless a blackout follows, it was none
        self.burst = min(1.05 * self.burst, MOST_BURST_SECONDS * self.limit) if self._has_credit else self.burst
        high = min(high, pace)
        low = min(low, high)
        width = (high - low) / (low + high)
        if low <= self.limit <= high:
            width = min(width, 0.6 * self._unsure)
        else:
            self.limit = max((low + high) / 2, LARGEST_CUT * self.limit)
        self._unsure = min(max(width, SUREST), UNSUREST)
        self._to(now, State.ASSESS if self._unsure > 3 * SUREST else State.STEADY, f"refused at {pace:.3g}/s")

    def _window_full(self, now: float, sent: Sent) -> None:
        """What was taken in the last minute is what a minute allows; the rest of the window brings nothing."""
        taken = self._history.since(sent.at - WINDOW_SECONDS) / WINDOW_SECONDS
        self.limit = max(taken, CUTS[1] * self.limit)  # less was taken, perhaps, for less was sent
        self._unsure = SUREST
        self._unexpected = False
        self._to(now, State.STEADY, "a window is used up")

    def _too_early(self, now: float, sent: Sent, taken: list[Sent]) -> None:
        """It came before the pace had reached the limit: chance, other users of the account, or a lower limit."""
        self._early += 1
        self._early_at.append(now)
        if self._early == 1:
            self._episode_at, self._episode = sent.at, []
            self._before = self.limit
        else:
            self._episode += taken
        if len(self._early_at) == SHARED_AFTER and self._early_at[0] > now - SHARED_WINDOW_SECONDS:
            self._early_at.clear()
            self._shared_until = now + SHARED_SECONDS
            self._early = 0
            self.limit *= SHARED_CUT
            self._to(now, State.SHARED, "refused too often for one user of the account")
        elif self._early == 2 and self._doubted:
            (self.limit, self.burst), self._doubted = self._doubted, ()
            self._unsure, self._early = 0.1, 0
            self._to(now, State.ASSESS, "refused below the learned limit: there is a credit after all")
        elif self._early <= len(CUTS):
            self.limit *= CUTS[self._early - 1]
            if self._unsure > 5 * SUREST and taken:
                self.limit = min(self.limit, rate_between(self._empty_at, taken, sent.at, sent.amount, self.burst)[1])
            self._changed(now, "refused below the learned limit")
        else:
            _, high = rate_between(self._episode_at, self._episode, sent.at, sent.amount, inf)
            if high < FELL * self._before:
                if not self._has_credit and now < self._fell_at + FELL_AGAIN_SECONDS:
                    self.burst = 2.0 * self.typical  # what was taken between the two falls came out of credit
                self._fell_at = now
            self.limit = max(min(high, 0.9 * self.limit), LARGEST_CUT * self.limit)
            self._unsure = 0.15
            self._early = 1
            self._early_at.clear()
            self._episode_at, self._episode = sent.at, []
            self._to(now, State.ASSESS, "refused again and again: the limit is lower")

    # -- blackouts -----------------------------------------------------------------------------------------------------

    def recovered(self, now: float, closed_at: float, probed_at: float, gap: float, step: float) -> None:
        """
        Everything was refused from `closed_at` on until the probe sent at `probed_at` was taken.

        `step` is how long nothing was tried before that probe, `gap` what it took to wait after a refusal the time
        before, 0 if there was none. A blackout not much longer is a penalty for the refusal, and the limit stands. A
        long one, or one after the other, is the rest of a used-up window, and the limit is what was taken since the one
        before, over all of the time.
        """
        first = self._recovered_at <= self._start.began
        since = max(self._recovered_at, self._start.began, probed_at - WINDOW_SECONDS - 0.5 * step)
        taken = self._history.since(since)
        seconds = probed_at - closed_at
        before = self._before if self._early else self.limit
        self._blackouts = self._blackouts + 1 if self._unexpected else 0
        self._recovered_at = probed_at
        self._barren = self._early = 0
        self._sent.clear()
        self._empty_at = probed_at
        self._ramp, self._rise = 0.0, 1.0
        if seconds * before < 3 * self.typical:
            return  # no more than a pause between two requests at a small limit
        self._early_at.clear()
        whole = taken / max(min(probed_at - since, WINDOW_SECONDS), 1e-3)
        if gap and seconds <= 1.5 * gap + 0.5 and self._blackouts < 2:
            low = max(CUTS[0] * before, whole)
            high = max(self._refused_pace, low)
            self.limit = low + PUNISHED_HOPE * (high - low)
            self._lost, self._window, self._windowed = seconds * self.limit, 0.0, False
            self._unsure = min(max(PUNISHED_HOPE * (high - low) / low, 5 * SUREST), UNSUREST)
            self._to(now, State.STEADY, f"refused, and everything with it for {seconds:.1f} s")
        else:
            self.limit = max(whole, 0.02 * self.typical if first else 0.7 * min(before, self.limit))
            self._windowed = not first or seconds > LONGEST_PENALTY_SECONDS
            self._lost, self._window = 0.0, 1.3 * taken if self._windowed else 0.0
            self._unsure = 4 * SUREST if self._windowed else UNSUREST
            self._to(now, State.ASSESS, f"everything was refused for {seconds:.1f} s")
        self._fill(now)
        self._bucket.take(now, self._bucket.level(now))

    def restart(self, now: float, share: float) -> None:
        """Go on after a pause, such as an outage, at that share of the limit, and rise from there."""
        if self.state is State.START:
            self._start.again(now)
            return
        self._sent.clear()
        self._empty_at = now
        self._ramp, self._rise = RISEN * self._length(), share
        self._fill(now)
        self._bucket.take(now, self._bucket.level(now))

    # -- the ramp ------------------------------------------------------------------------------------------------------

    def _length(self) -> float:
        """Amount to be sent on a ramp: what the refusal budget pays for, less of it the less is known."""
        share, longest = RAMP, LONGEST_RAMP_SECONDS
        if not self._has_credit:
            share, longest = RAMP_NO_CREDIT, 2 * LONGEST_RAMP_SECONDS
        length = (1.0 - SLOWER_BY * self._purse) * share * self.typical / self._budget
        if self._lost:
            length, longest = max(length, self._lost / LOST_SHARE), LONGEST_LOSING_SECONDS
        length = min(max(length, SHORTEST_RAMP_SECONDS * self.limit), longest * self.limit)
        sure = 5 * SUREST if self._lost else SUREST
        return max(length * sure / self._unsure, 2 * self.typical, self._window)

    def _along(self) -> float:
        return self._ramp / self._length()

    def _height(self) -> float:
        """The pace as a share of the limit: from 1 - unsure at the ramp's foot to 1 + unsure at its length."""
        if self.state is State.SHARED:
            return 1.0
        along = min(self._along(), RISEN)
        return 1.0 - self._unsure + 2.0 * self._unsure * along * along

    def _unbounded_pace(self) -> float:
        return self.limit * self._height() * self._rise

    def _grow(self, now: float, amount: float) -> None:
        seconds = min(now - self._grown_at, 0.5)
        if self.state is State.START:
            self._start.grow(seconds)
            return
        if self.state is State.SHARED:
            self.limit *= exp(SHARED_GROWTH * seconds)
            return
        self._ramp += amount
        along = self._along()
        if along >= (RISEN if self._has_credit else RISEN_NO_CREDIT):
            growth = RISE / (1.0 + 2.0 * self.refusal_seconds) * seconds
            if self._windowed:
                growth /= WINDOW_CAUTION
            self._rise *= exp(min(growth, RISE_PER_REQUEST * amount / self.typical))
        if self.state is State.STEADY and along > 0.7:
            self._to(now, State.PROBE, "the pace is above the limit, to see whether it has risen")

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
        self._fill(now)
        self._bucket.take(now, self._bucket.level(now))

    # -- for operators -------------------------------------------------------------------------------------------------

    def use(self, now: float) -> float:
        """The accepted rate as a share of the limit; 0 while no limit is known."""
        return 0.0 if self.limit == inf else self._start.rate(now) / self.limit

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
        self._changed(now, why)

    def _changed(self, now: float, why: str) -> None:
        self.changed_at = now
        self.changed_why = why
