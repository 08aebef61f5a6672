"""The callers that were sent away with a `Retry-After`: when each comes back, a place is kept for it.

Told the bare wait, all that are sent away in one moment come back in one moment, find those in their places who never
had to go, and are sent away again. So each is told a time of its own, spaced by what can be served, and near that time
newcomers leave room. Who came back is told by its key and the time: callers have no name of their own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from math import ceil

#: Those who come back are given this share of what can be served; the rest is for newcomers, and for error.
SHARE = 0.9
#: A caller may be so many seconds late, or early by an error of a clock.
LATE_SECONDS, EARLY_SECONDS = 2.0, 0.001
#: Nobody is sent away for longer, whatever the backlog; and so many are remembered at most.
MAX_SECONDS, MOST = 3600, 4096
#: Seconds that are looked at for one that is not crowded: what sending one caller away may cost.
MAX_LATER = 100


class Promises:
    """When whom was told to come back. Times are the loop's."""

    __slots__ = ("_expected", "_later", "_later_of_key")

    def __init__(self) -> None:
        self._later: list[tuple[float, str]] = []  # in order
        self._later_of_key: Counter[str] = Counter()
        self._expected: deque[tuple[float, str]] = deque()  # whose time has come

    def __len__(self) -> int:
        return len(self._later) + len(self._expected)

    def make(self, now: float, key: str, wait: float, per_second: float) -> int:
        """
        Whole seconds after which to come back: `wait`, and behind those of its key and as many of each other key (as
        the queue's round robin would have it) that come later than now, of whom `per_second` can be served.
        """
        self._advance(now)
        pace = max(SHARE * per_second, 1 / MAX_SECONDS)
        own = self._later_of_key.get(key, 0)
        others = len(self._later_of_key) - (own > 0)
        ahead = min(own + others * (own + 1), len(self._later))
        told = max(ceil(min(wait + ahead / pace, MAX_SECONDS)), 1)
        # Each is told from another wait, and rounded up: some seconds would be crowded.
        window, latest = max(1.0, 1.0 / pace), min(told + MAX_LATER, MAX_SECONDS)
        while told < latest and self._crowd(now + told, window, 2 * (own + 1)) >= pace * window:
            told += 1
        if len(self._later) < MOST:
            insort(self._later, (now + told, key))
            self._later_of_key[key] += 1
        return told

    def _crowd(self, end: float, window: float, most: int) -> int:
        """How many come then, but for those of keys that have more than so many to come."""
        end += EARLY_SECONDS  # this instant's too
        first, last = bisect_left(self._later, (end - window,)), bisect_left(self._later, (end,))
        return sum(self._later_of_key[key] <= most for _, key in self._later[first:last])

    def redeem(self, now: float, key: str) -> bool:
        """Whether somebody of this key was to come back now. That promise is kept, and none any more."""
        self._advance(now)
        for promise in self._expected:
            if promise[1] == key:
                self._expected.remove(promise)
                return True
        return False

    def due(self, now: float, seconds: float) -> int:
        """How many are to come within so many seconds, those who are late among them."""
        self._advance(now)
        return len(self._expected) + bisect_left(self._later, (now + seconds,))

    def _advance(self, now: float) -> None:
        come = bisect_left(self._later, (now + EARLY_SECONDS,))
        for due, key in self._later[:come]:
            self._expected.append((due, key))
            self._later_of_key[key] -= 1
            if not self._later_of_key[key]:
                del self._later_of_key[key]
        del self._later[:come]
        while self._expected and self._expected[0][0] < now - LATE_SECONDS:
            self._expected.popleft()
