"""What a refusal proves about a token bucket that nobody has seen.

A provider's quota is modelled as a policer: a bucket that refills at `rate` and holds `burst`; a call that finds less
than its amount in it is refused and takes nothing. So at the instant of a refusal the bucket is *known*: as good as
empty. Every call that was taken since then is a lower bound on the rate, and the next refusal is an upper bound: two
refusals with n calls between them, `seconds` apart, give the rate to within 1/n. That holds whatever the burst is, as
long as the bucket did not run full in between; where it did, the burst decides what was lost, hence `burst` below.

Linux' BBR estimates a policer's rate in the same way (`lt_bw` in net/ipv4/tcp_bbr.c), without the bounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import inf

from sidecar.admission.learning.tuning import POLICER_MAX_REMEMBERED


class Sent:
    """One attempt as a controller remembers it: when it was sent, how much it took, and whether it was refused."""

    __slots__ = ("amount", "at", "bound", "refused")

    def __init__(self, at: float, amount: float, bound: bool) -> None:
        self.at = at
        self.amount = amount
        self.bound = bound
        """It had to wait for this dimension: more would have been sent."""
        self.refused = False


class Interval:
    """Between two refusals: the first left the bucket empty at `start`, and it gave `taken` until it refused one."""

    __slots__ = ("refused", "start", "taken", "total")

    def __init__(self, start: float, taken: list[Sent], refused: Sent) -> None:
        self.start = start
        self.taken = taken
        self.refused = refused
        self.total = sum(one.amount for one in taken)

    def rate(self, burst: float) -> tuple[float, float]:
        """The lowest and the highest rate that explain it; see `rate_between`."""
        return rate_between(self.start, self.taken, self.refused.at, self.refused.amount, burst)

    @property
    def mostly_bound(self) -> bool:
        """It was used to the limit, but for a fifth."""
        return sum(one.amount for one in self.taken if one.bound) >= 0.8 * self.total


class Trace:
    """What was sent since the provider's bucket was last known to be empty: since the last refusal, mostly."""

    __slots__ = ("sent", "start")

    def __init__(self, now: float) -> None:
        self.start = now
        """When it was empty."""
        self.sent: deque[Sent] = deque()
        """In order. Whoever appends calls `trim` above POLICER_MAX_REMEMBERED."""

    def __iter__(self) -> Iterator[Sent]:
        return iter(self.sent)

    def trim(self) -> None:
        """Forget the first half: what the bucket held before the later half is taken to be nothing."""
        for _ in range(POLICER_MAX_REMEMBERED // 2):
            self.start = self.sent.popleft().at

    def until(self, refused: Sent) -> Interval:
        """What was taken since then, until this one was refused."""
        return Interval(self.start, [one for one in self.sent if not one.refused and one.at <= refused.at], refused)

    def emptied(self, at: float) -> None:
        """The bucket was empty at that time too, so that what was sent before shows nothing more."""
        self.start = at
        while self.sent and self.sent[0].at <= at:
            self.sent.popleft()


def level_after(start: float, level: float, sent: Sequence[Sent], *, at: float, rate: float, burst: float) -> float:
    """
    What a bucket holds at `at` that held `level` at `start` and gave each of `sent` its amount.

    level(t) = min(burst, level(t0) + rate * (t - t0)) - amount; negative where so much could not have been taken.
    """
    for one in sent:
        level = min(burst, level + rate * (one.at - start)) - one.amount
        start = one.at
    return min(burst, level + rate * (at - start))


def rate_between(start: float, taken: Sequence[Sent], at: float, amount: float, burst: float) -> tuple[float, float]:
    """
    The lowest and the highest rate at which a bucket, empty at `start`, takes all of `taken` and refuses `amount` at
    `at`. `taken` are in order, after `start` and not after `at`. (0, inf) where that says nothing.
    """
    seconds = at - start
    if seconds <= 0:
        return 0.0, inf
    total = sum(one.amount for one in taken)
    most = (total + amount) / seconds
    burst = max(burst, amount)
    # The lowest at which no call found less than its amount, though it began with just less than `amount`.
    lowest = _bisect(most, lambda rate: _takes(start, amount, taken, rate, burst))
    # The highest that leaves less than `amount` at the end, though it began with nothing.
    highest = _bisect(most, lambda rate: level_after(start, 0.0, taken, at=at, rate=rate, burst=burst) >= amount)
    return lowest, max(highest, lowest)


def _takes(start: float, level: float, sent: Sequence[Sent], rate: float, burst: float) -> bool:
    for one in sent:
        level = min(burst, level + rate * (one.at - start)) - one.amount
        start = one.at
        if level < -1e-9 * one.amount:
            return False
    return True


def _bisect(guess: float, holds: Callable[[float], bool]) -> float:
    """The rate from which on `holds`, to within a part in a thousand or so; 0 where it always does."""
    low, high = 0.0, guess
    while not holds(high) and high < 1000 * guess:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low
