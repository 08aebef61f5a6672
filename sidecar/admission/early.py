"""Refusals that come before the pace has reached the limit: chance, other users of the account, or a lower limit."""

from __future__ import annotations

from collections import deque
from math import inf

from .policer import Sent, rate_between

#: So many within so many seconds mean that others use the account too.
SHARED_AFTER, SHARED_WINDOW_SECONDS = 5, 90.0
#: So many of them are not forgotten when a lower limit explains them.
KEPT = 2


class EarlyRefusals:
    """An episode of them, and how many there were of late."""

    __slots__ = ("_since", "_taken", "_times", "count", "limit_before")

    def __init__(self) -> None:
        self.count = 0
        """In this episode."""
        self.limit_before = inf
        """The limit when the episode began."""
        self._since = 0.0
        self._taken: list[Sent] = []
        self._times: deque[float] = deque(maxlen=SHARED_AFTER)

    def add(self, now: float, sent: Sent, taken: list[Sent], limit: float) -> None:
        """One more; `taken` was taken since the refusal before."""
        self.count += 1
        self._times.append(now)
        if self.count == 1:
            self.begin(sent, limit)
        else:
            self._taken += taken

    def begin(self, sent: Sent, limit: float) -> None:
        """Begin an episode with this one."""
        self.count, self.limit_before = 1, limit
        self._since, self._taken = sent.at, []

    def often(self, now: float) -> bool:
        """More often than chance and a moving limit explain."""
        return len(self._times) == SHARED_AFTER and self._times[0] > now - SHARED_WINDOW_SECONDS

    def forget(self) -> None:
        """What came of late has been explained."""
        self._times.clear()

    def explained(self) -> None:
        """By a limit that is lower; if there are more all the same, others are likelier than one that falls again."""
        while len(self._times) > KEPT:
            self._times.popleft()

    def most(self, sent: Sent) -> float:
        """The highest limit that explains the episode, up to this refusal."""
        return rate_between(self._since, self._taken, sent.at, sent.amount, inf)[1]
