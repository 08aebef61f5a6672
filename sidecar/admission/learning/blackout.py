"""What it tells when everything was refused for a while: a penalty for a refusal, or the rest of a used-up window."""

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
    Remembers what was taken between them, and what the last one cost.

    Of a window is known what it holds, and the bounds of its length. Whether it is fixed or slides makes no difference
    at an even pace: what it holds was taken since some time, and nothing is until that time is one length ago.
    """

    __slots__ = (
        "_before", "_full_at", "_least", "_most", "_refused_at", "_since", "barren", "began", "explained_by", "history",
        "lost_seconds", "next_at", "window", "windowed",
    )  # fmt: skip

    def __init__(self, now: float) -> None:
        self.history = History(2.0 * BLACKOUT_WINDOW_SECONDS + 10.0)
        self.began = now
        """When the provider took something again after the one before; when sending began, if there was none."""
        self.lost_seconds = 0.0
        """How long nothing is taken after each refusal; 0 where refusals are not punished."""
        self.windowed = False
        """The quota is one of windows."""
        self.window = 0.0
        """What such a window holds, or would if the last blackout was one's end."""
        self.next_at = now
        """When the next window begins, if one is used up."""
        self.barren = 0
        """Refusals with nothing taken between."""
        self.explained_by: float | None = None
        """The least limit that explains the refusal that is punished, if that came too early."""
        self._least, self._most = 0.0, BLACKOUT_WINDOW_SECONDS  # seconds of a window
        self._since: float | None = None  # the present one is used up, and was begun then
        self._before: deque[tuple[float, float, float]] = deque(maxlen=2)  # what blackouts showed
        self._full_at = now
        self._refused_at = now  # the last refusal's send time

    @property
    def rate(self) -> float:
        """What a window allows, a second."""
        return self.window / self._seconds

    @property
    def unsure(self) -> float:
        """How well that rate is known, as a share."""
        return (self._most - self._least) / (self._most + self._least)

    @property
    def _seconds(self) -> float:
        return (self._least + self._most) / 2

    def refused(self, at: float, amount: float) -> None:
        """What was sent at that time was not taken."""
        self.history.add(at, -amount)
        self._refused_at = max(at, self._refused_at)

    def ended(self, closed_at: float, probed_at: float, step: float, typical: float) -> float:
        """
        Everything was refused from `closed_at` until a probe sent at `probed_at`, `step` after the last refused one.

        Gives the rate at which was taken since the one before, this one included.
        It was a window's if it was long, or if as much was taken before it as before one of the last two: where a fixed
        window ended in between, more was.
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
        """A refusal came too early that is likely to be punished: what it says counts as far as that agrees."""
        if not estimate.has_credit:  # else what was taken in close succession would have been refused
            estimate.burst = 2.0 * estimate.typical
        self.explained_by = interval.rate(inf)[0]

    def learn(self, now: float, seconds: float, whole: float, estimate: Estimate, *, guessed: bool) -> None:
        """What the last one, of so many seconds, says of the limit; at `whole` was taken, blackout and all."""
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
        """What each refusal costs, beyond what a burst makes good."""
        return max(self.lost_seconds * estimate.limit - 0.7 * estimate.burst, 0.0)

    def full(self, now: float, at: float, estimate: Estimate) -> bool:
        """Whether a refusal that was sent at that time fits to a window that is used up; then `next_at` is known."""
        if self._since is not None and (next_at := self.history.next(self._full_at)) is not None:
            self._between(self._least, max(next_at - self._since, self._least))  # nothing was refused then
        self._full_at = at
        since = self._since = self.history.back(at, self.window)
        if since is None or at - since > (1.0 + BLACKOUT_FITS) * self._most:
            self.windowed = False
            return False
        before = self.history.back(since, self.window + estimate.typical)
        # no more than that was taken in the window before, though nothing was refused
        self._between(at - since, max(self._most if before is None else since - before, at - since))
        self.next_at = since + self._seconds
        estimate.know(self.rate, self.unsure)
        estimate.on(now, Event.WINDOW_USED_UP, "a window is used up")
        return True

    def risen(self, now: float, estimate: Estimate) -> bool:
        """More was taken than was thought to be allowed. Whether that fits to a window, a little shorter."""
        since = self.history.back(now, self.window + estimate.typical)
        if since is None or now - since < (1.0 - BLACKOUT_FITS) * self._least:
            self.windowed = False
        else:
            self._between(min(self._least, now - since), now - since)
            estimate.know(self.rate, self.unsure)
        return self.windowed

    def _between(self, least: float, most: float) -> None:
        """Seconds that a window lasts at least and at most. What was thought counts as far as it agrees."""
        if least < self._most and most > self._least:
            least, most = max(least, self._least), min(most, self._most)
        self._least, self._most = least, max(most, least + HISTORY_BIN_SECONDS)

    def _same(self, taken: float, window: float, typical: float) -> bool:
        return taken >= BLACKOUT_FEW * typical and abs(taken - window) <= max(BLACKOUT_SAME * taken, 0.5 * typical)

    def ends(self, now: float, typical: float) -> float:
        """When best to look whether the window that is used up has ended; `now` where there is none."""
        since = self._since
        if since is None and not self.windowed and self._same(self.history.since(self.began), self.window, typical):
            since = self.began
        if since is None:
            return now
        last = since + self._most
        if last <= now:
            return now
        return max((max(now, since + self._least) + last) / 2, now + BLACKOUT_MIN_LOOK * self._most)
