"""Learn from a blackout, in which every call is refused: was it a penalty, or the rest of a used-up quota window?"""

from __future__ import annotations

from collections import deque
from math import inf

from sidecar.admission.learning.bins import History
from sidecar.admission.learning.estimate import Estimate
from sidecar.admission.learning.policer import Interval
from sidecar.admission.learning.states import Event
from sidecar.admission.learning.tuning import (
    BLACKOUT_FEW,
    BLACKOUT_FITS,
    BLACKOUT_LESS,
    BLACKOUT_MAX_PENALTY_SECONDS,
    BLACKOUT_MAX_PENALTY_STEPS,
    BLACKOUT_MIN_LOOK,
    BLACKOUT_PAUSE,
    BLACKOUT_PAUSE_SECONDS,
    BLACKOUT_SAME,
    BLACKOUT_WINDOW_SECONDS,
    ESTIMATE_SUREST,
    HISTORY_BIN_SECONDS,
)


class Blackouts:
    """
    Remember the amounts accepted between blackouts, and what the last blackout showed.

    For a quota window, this class knows the amount that it allows, and bounds on its length. At an even pace, fixed and
    sliding windows need no distinction: the whole amount was accepted since some time, and nothing more is accepted
    until one window length after that time.
    """

    __slots__ = (
        "_before", "_full_at", "_least", "_most", "_refused_at", "_since", "barren", "began", "explained_by", "history",
        "lost_seconds", "next_at", "window", "windowed",
    )  # fmt: skip

    def __init__(self, now: float) -> None:
        self.history = History(2.0 * BLACKOUT_WINDOW_SECONDS + 10.0)
        self.began = now
        """Loop time at which the provider accepted a call again after the previous blackout; before the first blackout,
        the time at which sending began."""
        self.lost_seconds = 0.0
        """Seconds for which the provider accepts nothing after each refusal; 0 if refusals are not punished."""
        self.windowed = False
        """True: the quota is counted in windows."""
        self.window = 0.0
        """Amount that such a window allows, or would allow if the last blackout was the rest of a window."""
        self.next_at = now
        """Loop time at which the next window begins, if the present one is used up."""
        self.barren = 0
        """Number of refusals in a row without an accepted call between them."""
        self.explained_by: float | None = None
        """Lowest limit that explains the punished refusal, if that refusal came too early; else None."""
        self._least, self._most = 0.0, BLACKOUT_WINDOW_SECONDS  # bounds on a window's length in seconds
        self._since: float | None = None  # start of the present window, if it is used up
        self._before: deque[tuple[float, float, float]] = deque(maxlen=2)  # past blackouts: window, _least, _most
        self._full_at = now
        self._refused_at = now  # send time of the last refused call

    @property
    def rate(self) -> float:
        """The limit per second that the window implies."""
        return self.window / self._seconds

    @property
    def unsure(self) -> float:
        """Relative error of `rate`."""
        return (self._most - self._least) / (self._most + self._least)

    @property
    def _seconds(self) -> float:
        return (self._least + self._most) / 2

    def refused(self, at: float, amount: float) -> None:
        """Subtract an amount that was sent at `at` and refused."""
        self.history.add(at, -amount)
        self._refused_at = max(at, self._refused_at)

    def ended(self, closed_at: float, probed_at: float, step: float, typical: float) -> float:
        """
        Learn from a blackout that began at `closed_at` and ended when the probe sent at `probed_at` was accepted.

        `step`: seconds between the last refusal and that probe. Return the amount accepted since the previous blackout
        per second, this blackout included. More than BLACKOUT_WINDOW_SECONDS count as BLACKOUT_WINDOW_SECONDS.

        A window was used up if the blackout was long, or if the same amount was accepted before one of the last two
        blackouts. Two are compared, because more is accepted if a fixed window ends in between.
        """
        taken = self.history.since(self.began) - typical
        seconds = probed_at - self.began
        long = probed_at - closed_at > max(BLACKOUT_MAX_PENALTY_SECONDS, BLACKOUT_MAX_PENALTY_STEPS * step)
        if self.windowed:
            if taken < BLACKOUT_LESS * self.window and not long:
                self.windowed = False
            elif self._since is not None:
                self._between(self._refused_at - self._since, probed_at - self._since)
        elif seconds > BLACKOUT_WINDOW_SECONDS + step:
            if long:
                self.windowed, self.window = True, self.history.since(probed_at - BLACKOUT_WINDOW_SECONDS) - typical
                self._least = self._most = BLACKOUT_WINDOW_SECONDS
        else:
            least = self._refused_at - self.began
            same = (
                (window, at_least, at_most)
                for window, at_least, at_most in self._before
                if self._same(taken, window, typical) and at_least < seconds and least < at_most
            )
            before = next(same, None)
            self.window, self._least, self._most = before or (taken, 0.0, inf)
            self._between(least, seconds)
            self.windowed = (before is not None or long) and taken >= typical
            self._before.appendleft((self.window, self._least, self._most))
        self.began, self._since = probed_at, None
        self.lost_seconds = 0.0 if self.windowed else step
        return taken / max(min(seconds, BLACKOUT_WINDOW_SECONDS), 1e-3)

    def early(self, interval: Interval, estimate: Estimate) -> None:
        """Note the lowest limit that explains a refusal that came too early and is probably punished; see `learn`."""
        if not estimate.has_credit:  # calls accepted in close succession show a bucket of at least two requests
            estimate.burst = 2.0 * estimate.typical
        self.explained_by = interval.rate(inf)[0]

    def learn(self, now: float, seconds: float, whole: float, estimate: Estimate, *, guessed: bool) -> None:
        """Learn the limit from the last blackout of `seconds`. `whole`: the accepted rate, with the blackout's time."""
        if self.windowed:
            estimate.know(self.rate, self.unsure)
            estimate.on(now, Event.BLACKOUT_ENDED, f"everything was refused for {seconds:.1f} s")
        elif seconds * estimate.limit < BLACKOUT_PAUSE * estimate.typical or seconds < BLACKOUT_PAUSE_SECONDS:
            self.lost_seconds = 0.0
        else:
            if guessed:
                estimate.limit = max(estimate.limit, whole)
            elif self.explained_by is not None:
                limit = max(whole, self.explained_by, (1.0 - 1.5 * estimate.unsure) * estimate.limit)
                estimate.know(min(limit, estimate.limit), 1.5 * estimate.unsure)
            estimate.unsure = max(estimate.unsure, 3 * ESTIMATE_SUREST)
            estimate.on(now, Event.BLACKOUT_ENDED, f"refused, and everything with it for {seconds:.1f} s")

    def lost(self, estimate: Estimate) -> float:
        """Return the amount that each refusal costs, beyond the amount that a burst makes up for."""
        return max(self.lost_seconds * estimate.limit - 0.7 * estimate.burst, 0.0)

    def full(self, now: float, at: float, estimate: Estimate) -> bool:
        """Return True if a refused attempt that was sent at `at` fits a used-up window; then `next_at` is known."""
        if self._since is not None and (next_at := self.history.next(self._full_at)) is not None:
            self._between(self._least, max(next_at - self._since, self._least))  # by then the window was over
        self._full_at = at
        since = self._since = self.history.back(at, self.window)
        if since is None or at - since > (1.0 + BLACKOUT_FITS) * self._most:
            self.windowed = False
            return False
        before = self.history.back(since, self.window + estimate.typical)
        # `window` and one more request were accepted from `before` to `since`, so a window is not longer than that
        self._between(at - since, max(self._most if before is None else since - before, at - since))
        self.next_at = since + self._seconds
        estimate.know(self.rate, self.unsure)
        estimate.on(now, Event.WINDOW_USED_UP, "a window is used up")
        return True

    def risen(self, now: float, estimate: Estimate) -> bool:
        """Return True if a slightly shorter window explains that more was accepted than the window allows."""
        since = self.history.back(now, self.window + estimate.typical)
        if since is None or now - since < (1.0 - BLACKOUT_FITS) * self._least:
            self.windowed = False
        else:
            self._between(min(self._least, now - since), now - since)
            estimate.know(self.rate, self.unsure)
        return self.windowed

    def _between(self, least: float, most: float) -> None:
        """Set bounds on a window's length in seconds. Older bounds still count if they agree with the new bounds."""
        if least < self._most and most > self._least:
            least, most = max(least, self._least), min(most, self._most)
        self._least, self._most = least, max(most, least + HISTORY_BIN_SECONDS)

    def _same(self, taken: float, window: float, typical: float) -> bool:
        return taken >= BLACKOUT_FEW * typical and abs(taken - window) <= max(BLACKOUT_SAME * taken, 0.5 * typical)

    def ends(self, now: float, typical: float) -> float:
        """Return the best loop time for the next probe of a used-up window; `now` if no window is used up."""
        since = self._since
        if since is None and not self.windowed and self._same(self.history.since(self.began), self.window, typical):
            since = self.began
        if since is None:
            return now
        last = since + self._most
        if last <= now:
            return now
        return max((max(now, since + self._least) + last) / 2, now + BLACKOUT_MIN_LOOK * self._most)
