"""Token bucket."""

from __future__ import annotations

from math import inf

#: No call delays later calls by more than about this many seconds, however large its amount: providers count LLM tokens
#: per minute, and an estimate can be far too high (a picture's header may claim any size).
MAX_DEBT_SECONDS = 60.0


class TokenBucket:
    """
    Let `rate` units/s pass on average, and at most `capacity` units at once.

    level(t) = min(capacity, level(t0) + rate * (t - t0)), the policer of RFC 2697 without its excess bucket.
    An amount above the capacity passes when the bucket is full, and leaves a debt. So a large amount is delayed, but
    never blocked for ever. The debt is at most the amount of MAX_DEBT_SECONDS.
    """

    __slots__ = ("_at", "_level", "capacity", "rate")

    def __init__(self, now: float, rate: float = inf, capacity: float = 1.0) -> None:
        self.rate = rate
        self.capacity = capacity
        self._level = capacity
        self._at = now

    def __repr__(self) -> str:
        return f"<TokenBucket level={self._level:.4g} of {self.capacity:.4g} at={self._at:.3f} rate={self.rate:.4g}/s>"

    def level(self, now: float) -> float:
        """Return the units that could be taken at once. Negative while a debt is being paid."""
        if now <= self._at:
            return self._level
        if self.rate == inf:
            return self.capacity
        return min(self.capacity, self._level + self.rate * (now - self._at))

    def wait(self, now: float, amount: float = 1.0) -> float:
        """Return the seconds until `amount` may be taken if nothing else is taken before; 0 means now."""
        if self.rate == inf:
            return 0.0
        level = self._level if now <= self._at else self.level(now)
        missing = min(amount, self.capacity) - level
        # A timer may fire early by a rounding error, in units or in seconds. The bucket must then already be open.
        if missing <= 1e-9 * max(amount, self.rate):
            return 0.0
        return missing / self.rate if self.rate > 0 else inf

    def take(self, now: float, amount: float = 1.0) -> None:
        """Take `amount`, even if this leaves a debt. A negative amount is given back."""
        level = self._level if now <= self._at else self.level(now)
        self._level = max(min(self.capacity, level - amount), -MAX_DEBT_SECONDS * self.rate)
        self._at = max(self._at, now)

    def set(self, now: float, rate: float, capacity: float) -> None:
        """Change rate and capacity from `now` on. The level stays, up to the new capacity."""
        level = self._level
        if now > self._at:
            grown = level + self.rate * (now - self._at) if self.rate != inf else self.capacity
            level = min(self.capacity, grown)
            self._at = now
        if self.rate == inf and rate != inf:
            level = min(level, 0.0)  # an unlimited bucket is always full: start it empty, so that no burst follows
        self.rate = rate
        self.capacity = capacity
        self._level = min(level, capacity)
