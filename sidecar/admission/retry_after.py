"""Reserve a place for each caller that was refused with a `Retry-After`, for the time at which it will return.

If each caller got only the predicted wait, all callers that are refused at the same moment would return at the same
moment. By then, new callers would have taken the places, and they themselves would be refused again. So each caller
gets its own time. The times are as far apart as the upstreams can serve the callers, and near its time new callers
leave room. A returning caller is recognised by its key and the time, because callers have no identity of their own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from math import ceil

#: Share of the throughput that is reserved for returning callers. The rest is for new callers and prediction errors.
SHARE = 0.9
#: Seconds by which a returning caller may be late, or early because of clock error.
LATE_SECONDS, EARLY_SECONDS = 2.0, 0.001
#: The longest Retry-After in seconds for any backlog; the maximum number of reserved places (bounds the memory).
MAX_SECONDS, MAX_RESERVED = 3600, 4096
#: `make` tries at most this many later seconds to find a second that is not crowded. Bounds the processor time of one
#: refusal.
MAX_LATER = 100


class Promises:
    """The reserved places: which key returns at which loop time."""

    __slots__ = ("_expected", "_later", "_later_of_key")

    def __init__(self) -> None:
        self._later: list[tuple[float, str]] = []  # places in the future, sorted by time
        self._later_of_key: Counter[str] = Counter()
        self._expected: deque[tuple[float, str]] = deque()  # places whose time has come

    def __len__(self) -> int:
        return len(self._later) + len(self._expected)

    def make(self, now: float, key: str, wait: float, per_second: float) -> int:
        """
        Reserve a place for a caller with this key and return its Retry-After in whole seconds.

        The Retry-After is `wait` seconds plus the time to serve the places ahead of the caller at SHARE x `per_second`
        requests/s. These places are ahead: all future places of the same key, and those places of other keys that the
        queue's round robin serves before this place.
        """
        self._advance(now)
        pace = max(SHARE * per_second, 1 / MAX_SECONDS)
        own = self._later_of_key.get(key, 0)
        others = len(self._later_of_key) - (own > 0)
        ahead = min(own + others * (own + 1), len(self._later))
        seconds = max(ceil(min(wait + ahead / pace, MAX_SECONDS)), 1)
        # The predicted wait differs between callers, and the time is rounded up. So some seconds would get too many
        # callers.
        window, latest = max(1.0, 1.0 / pace), min(seconds + MAX_LATER, MAX_SECONDS)
        while seconds < latest and self._crowd(now + seconds, window, 2 * (own + 1)) >= pace * window:
            seconds += 1
        if len(self._later) < MAX_RESERVED:
            insort(self._later, (now + seconds, key))
            self._later_of_key[key] += 1
        return seconds

    def _crowd(self, end: float, window: float, max_own: int) -> int:
        """Count the places in the `window` seconds up to `end`. Ignore keys with more than `max_own` future places."""
        end += EARLY_SECONDS  # include the places at `end` itself
        first, last = bisect_left(self._later, (end - window,)), bisect_left(self._later, (end,))
        return sum(self._later_of_key[key] <= max_own for _, key in self._later[first:last])

    def redeem(self, now: float, key: str) -> bool:
        """Return True if a place is reserved for this key now, and use that place up."""
        self._advance(now)
        for promise in self._expected:
            if promise[1] == key:
                self._expected.remove(promise)
                return True
        return False

    def due(self, now: float, seconds: float) -> int:
        """Return how many callers should return within `seconds`, including those that are late."""
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
