"""Compute bounds on the rate of an unknown token bucket from its refusals.

A provider's quota is modelled as a policer: a bucket that refills at `rate` and holds at most `burst`. A call that
finds less than its amount in the bucket is refused and takes nothing. So at a refusal the level of the bucket is
*known*: it is nearly empty. The calls accepted since then give a lower bound on the rate, and the next refusal gives an
upper bound: two refusals with n accepted calls between them give the rate to within 1/n. This holds for every burst, if
the bucket was never full in between. If it was full, the burst decides how much was lost. So the functions below need
`burst`.

Linux' BBR estimates a policer's rate in the same way (`lt_bw` in net/ipv4/tcp_bbr.c), without the bounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import inf
from operator import attrgetter
from typing import Any

from sidecar.admission.learning.tuning import POLICER_MAX_REMEMBERED


class Sent:
    """One attempt: when it was sent, its amount, and whether it was refused."""

    __slots__ = ("against", "amount", "at", "bound", "counted_at", "in_bins", "refused", "spent")

    def __init__(self, at: float, amount: float, bound: bool) -> None:
        self.at = at
        self.amount = amount
        self.bound = bound
        """True: this dimension delayed the attempt, so more would have been sent."""
        self.refused = False
        self.in_bins = False
        """True: `History` has counted the amount in one of its bins."""
        self.counted_at = at
        """`at`, plus how much later than usual the provider counted it, if it says when."""
        self.spent = 0.0
        """Total amount sent up to and including this attempt; 0 before the provider reported limits."""
        self.against: tuple[Any, ...] = ()
        """The reported limits of which nothing remained when it was sent."""


class Interval:
    """The time between two refusals: the bucket was empty at `start`, gave `taken`, and then refused `refused`."""

    __slots__ = ("refused", "start", "taken", "total")

    def __init__(self, start: float, taken: list[Sent], refused: Sent) -> None:
        self.start = start
        self.taken = taken
        self.refused = refused
        self.total = sum(one.amount for one in taken)

    def rate(self, burst: float) -> tuple[float, float]:
        """Return the lowest and the highest rate that explain the interval; see `rate_between`."""
        return rate_between(self.start, self.taken, self.refused.counted_at, self.refused.amount, burst)

    @property
    def mostly_bound(self) -> bool:
        """True if this dimension delayed calls with at least 80 % of the accepted amount."""
        return sum(one.amount for one in self.taken if one.bound) >= 0.8 * self.total


class Trace:
    """The attempts sent since the provider's bucket was last known to be empty: usually, since the last refusal."""

    __slots__ = ("sent", "start")

    def __init__(self, now: float) -> None:
        self.start = now
        """Loop time at which the bucket was empty."""
        self.sent: deque[Sent] = deque()
        """In the order of sending. Code that appends must call `trim` above POLICER_MAX_REMEMBERED."""

    def __iter__(self) -> Iterator[Sent]:
        return iter(self.sent)

    def trim(self) -> None:
        """Forget the older half, and assume that the bucket was empty at the end of that half."""
        for _ in range(POLICER_MAX_REMEMBERED // 2):
            self.start = self.sent.popleft().at

    def until(self, refused: Sent) -> Interval:
        """Return the interval from `start` to this refusal."""
        at = refused.counted_at
        taken = [one for one in self.sent if not one.refused and one.counted_at <= at]
        taken.sort(key=_counted_at)  # large requests arrive later than small ones that were sent after them
        return Interval(self.start, taken, refused)

    def emptied(self, at: float) -> None:
        """Record that the bucket was empty at `at`, so that earlier attempts show nothing more."""
        self.start = at
        self.sent = deque(one for one in self.sent if one.counted_at > at)


_counted_at = attrgetter("counted_at")


def level_after(start: float, level: float, sent: Sequence[Sent], *, at: float, rate: float, burst: float) -> float:
    """
    Return the level at `at` of a bucket that had `level` at `start` and gave each of `sent` its amount.

    level(t) = min(burst, level(t0) + rate * (t - t0)) - amount; negative if the bucket could not have given so much.
    """
    for one in sent:
        level = min(burst, level + rate * (one.counted_at - start)) - one.amount
        start = one.counted_at
    return min(burst, level + rate * (at - start))


def rate_between(start: float, taken: Sequence[Sent], at: float, amount: float, burst: float) -> tuple[float, float]:
    """
    Return the lowest and the highest rate at which a bucket, empty at `start`, accepts all of `taken` and then refuses
    `amount` at the time `at`. `taken` is in order, after `start` and not after `at`. (0, inf): there are no bounds.
    """
    seconds = at - start
    if seconds <= 0:
        return 0.0, inf
    total = sum(one.amount for one in taken)
    most = (total + amount) / seconds
    burst = max(burst, amount)
    # The lowest rate at which every call found its amount, if the bucket began with nearly `amount`.
    lowest = _bisect(most, lambda rate: _takes(start, amount, taken, rate, burst))
    # The highest rate that leaves less than `amount` at the end, if the bucket began empty.
    highest = _bisect(most, lambda rate: level_after(start, 0.0, taken, at=at, rate=rate, burst=burst) >= amount)
    return lowest, max(highest, lowest)


def _takes(start: float, level: float, sent: Sequence[Sent], rate: float, burst: float) -> bool:
    for one in sent:
        level = min(burst, level + rate * (one.counted_at - start)) - one.amount
        start = one.counted_at
        if level < -1e-9 * one.amount:
            return False
    return True


def _bisect(guess: float, holds: Callable[[float], bool]) -> float:
    """Return the lowest rate for which `holds` is true, to within about 0.1 %; about 0 if it is always true."""
    low, high = 0.0, guess
    while not holds(high) and high < 1000 * guess:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low
