"""Token bucket."""

from __future__ import annotations

from math import inf


class TokenBucket:
    """
    Lets `rate` units a second through on average, and at most `capacity` at once.

    level(t) = min(capacity, level(t0) + rate * (t - t0)), the policer of RFC 2697 without its excess bucket.
    An amount above the capacity passes once the bucket is full, and leaves a debt: a large one is late, never stuck.
    """

    __slots__ = ("_at", "_level", "capacity", "rate")

    def __init__(self, now: float, rate: float = inf, capacity: float = 1.0) -> None:
        self.rate = rate
        self.capacity = capacity
        self._level = capacity
        self._at = now

    def level(self, now: float) -> float:
        """What could be taken at once. Negative while a debt is being paid."""
        if now <= self._at:
            return self._level
        if self.rate == inf:
            return self.capacity
        return min(self.capacity, self._level + self.rate * (now - self._at))

    def wait(self, now: float, amount: float = 1.0) -> float:
        """Seconds until `amount` may be taken, if nothing else is taken before; 0 for now."""
        if self.rate == inf:
            return 0.0
        missing = min(amount, self.capacity) - self.level(now)
        # A timer that fires a rounding error early, of amounts or of seconds, must not find the door shut.
        if missing <= 1e-9 * max(amount, self.rate):
            return 0.0
        return missing / self.rate if self.rate > 0 else inf

    def take(self, now: float, amount: float = 1.0) -> None:
        """Take `amount`, into debt if need be. A negative amount gives back."""
        self._level = min(self.capacity, self.level(now) - amount)
        self._at = max(self._at, now)

    def set(self, now: float, rate: float, capacity: float) -> None:
        """Change the size from `now` on. What is in the bucket stays, as far as it fits."""
        level = self.level(now)
        if self.rate == inf and rate != inf:
            level = min(level, 0.0)  # what an unlimited bucket held was never earned
        self.rate = rate
        self.capacity = capacity
        self._level = min(level, capacity)
        self._at = max(self._at, now)
