"""What it tells when everything was refused for a while: a penalty for a refusal, or the rest of a used-up window."""

from __future__ import annotations

from math import ceil

from .history import History

#: A window that was used up is taken to be at most so long: quotas are told by the minute.
WINDOW_SECONDS = 60.0
#: A blackout longer than this, and than so many of the last wait, is no penalty that begins anew with each refusal.
LONGEST_PENALTY_SECONDS, LONGEST_PENALTY_STEPS = 10.0, 4.0
#: Amounts that differ by less than this share are the same, if they are of so many requests at least.
SAME, FEW = 0.04, 12.0
#: An end fits to those before when it is off by less than this share of a window.
FITS = 0.25
#: A window that held less than this share of the one before was none.
LESS = 0.6


class Blackouts:
    """Remembers what was taken between them, and what the last one cost."""

    __slots__ = ("_first_end", "_taken", "began", "history", "lost_seconds", "unsure", "window", "window_seconds",
                 "windowed")  # fmt: skip

    def __init__(self, now: float) -> None:
        self.history = History(WINDOW_SECONDS + 10.0)
        self.began = now
        """When the provider took something again after the one before; when sending began, if there was none."""
        self.lost_seconds = 0.0
        """How long nothing is taken after each refusal; 0 where refusals are not punished."""
        self.windowed = False
        """The quota is one of windows."""
        self.window = 0.0
        """What such a window holds."""
        self.window_seconds = WINDOW_SECONDS
        """... and how long it is."""
        self.unsure = 1.0
        """How well that rate is known, as a share."""
        self._taken = 0.0  # before the last one
        self._first_end = now  # of a window, from which its length is measured

    def over(self, began: float, closed_at: float, probed_at: float, step: float, typical: float) -> float:
        """
        Everything was refused from `closed_at` until a probe sent at `probed_at`, `step` after the last refused one.

        Gives the rate at which was taken since the one before, this one included: what a window allows, if it was one.
        It is one if it was long, or if as much was taken before it as before the one before.
        """
        ended = probed_at - 0.5 * step  # or so
        seconds = ended - began
        taken = self.history.since(max(began, ended - self.window_seconds)) - typical
        long = probed_at - closed_at > max(LONGEST_PENALTY_SECONDS, LONGEST_PENALTY_STEPS * step)
        same = taken >= FEW * typical and abs(taken - self._taken) <= SAME * taken and seconds <= WINDOW_SECONDS
        if not self.windowed:
            if same or long:
                self._find(ended, min(seconds, WINDOW_SECONDS))
        elif taken < LESS * self._taken and not long:
            self.windowed, self.window_seconds = False, WINDOW_SECONDS
        else:
            self._refine(ended, seconds, same)
        self.unsure = 0.5 * typical / max(taken, typical) + 0.25 * step / self.window_seconds
        self.began, self._taken = ended, taken
        self.lost_seconds, self.window = (0.0, 1.3 * taken) if self.windowed else (step, 0.0)
        return taken / max(min(seconds, self.window_seconds), 1e-3)

    def _find(self, ended: float, seconds: float) -> None:
        self.windowed, self.window_seconds, self._first_end = True, seconds, ended

    def _refine(self, ended: float, seconds: float, same: bool) -> None:
        """One more window was seen to end: the length from all those since the first, if it fits."""
        since = ended - self._first_end
        passed = round(since / self.window_seconds)
        if passed and abs(since - passed * self.window_seconds) < FITS * self.window_seconds:
            self.window_seconds = since / passed
        elif same:
            self._find(ended, seconds)
        else:
            self._first_end = ended

    def ends(self, now: float) -> float:
        """When the present window ends; `now` where there are none."""
        if not self.windowed:
            return now
        return self.began + ceil((now - self.began) / self.window_seconds) * self.window_seconds

    def full(self, now: float) -> float:
        """The rate at which was taken in the time of a window."""
        return self.history.since(now - self.window_seconds) / self.window_seconds
