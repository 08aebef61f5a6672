"""Recognises requests and keys (cameras) that the provider never answers while it answers the others.

A request can make the provider fail each time, and a provider can refuse one camera for a reason that no other camera
shares. Such attempts show nothing about the provider, so no gate may learn from them.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import NamedTuple

from sidecar.admission.ticket import Ticket

#: A request or key is the cause if it fails or is refused again, although this many attempts of others, which were sent
#: after its first failure or refusal, were accepted. But a limit refuses some of all requests. So a refused request or
#: key is the cause only after REFUSALS refusals, and if OTHERS times as many attempts were accepted as others refused.
OTHERS, REFUSALS = 4, 3
#: The latest of these attempts was accepted at most this many seconds ago. Otherwise the provider may have stopped
#: answering everything.
RECENT_SECONDS = 5.0
#: Number of requests and keys that are remembered. Bounds the memory.
MAX_REMEMBERED = 256


class _First(NamedTuple):
    """The loop time of the first attempt without an answer, and the numbers of attempts before it.

    These attempts were started, accepted or refused.
    """

    at: float
    started: int
    accepted: int
    refused: int


class Suspects:
    """The requests and keys whose attempts at one upstream were not accepted since their first failure or refusal."""

    __slots__ = ("_accepted", "_accepted_at", "_firsts", "_latest", "_own", "_refused", "_taught_by")

    def __init__(self) -> None:
        self._firsts: dict[Ticket | str, _First] = {}
        self._own: dict[Ticket | str, int] = {}  # the refusals of each of them
        self._latest: deque[int] = deque([0] * OTHERS, maxlen=OTHERS)  # numbers of the latest accepted attempts
        self._accepted_at = -inf  # loop time of the latest acceptance
        self._accepted = self._refused = 0  # numbers of attempts
        self._taught_by: set[str] = set()  # up to two keys from whose refusals limits were learned

    def __repr__(self) -> str:
        return f"<Suspects {len(self._firsts)} accepted={self._accepted} refused={self._refused}>"

    def accepted(self, now: float, ticket: Ticket, number: int) -> None:
        """Note that the attempt with this number was accepted."""
        if self._firsts:
            for who in (ticket, ticket.key):
                if self._firsts.pop(who, None) is not None:
                    del self._own[who]
            self._latest.append(number)
            self._accepted += 1
            self._accepted_at = now

    def unanswered(self, now: float, ticket: Ticket, started: int, *, refused: bool) -> bool:
        """Note a failure or refusal, and return True if its request or its key is the cause.

        `started`: number of attempts that have started so far.
        """
        self._refused += refused
        is_cause = False
        for who in (ticket, ticket.key):
            if who not in self._firsts:
                if len(self._firsts) >= MAX_REMEMBERED:
                    oldest = next(iter(self._firsts))
                    del self._firsts[oldest], self._own[oldest]
                self._firsts[who], self._own[who] = _First(now, started, self._accepted, self._refused - refused), 0
            self._own[who] += refused
            is_cause = is_cause or self._is_cause(now, who)
        return is_cause

    def refused_before(self, key: str, at: float) -> bool:
        """Return True if this key failed or was refused before a loop time, and was not accepted since."""
        return key in self._firsts and self._firsts[key].at < at

    def taught(self, key: str) -> None:
        """Note that a limit is learned from a refusal of this key."""
        if len(self._taught_by) < 2:
            self._taught_by.add(key)

    def is_only_teacher(self, now: float, key: str) -> bool:
        """Return True, once, if this key is the cause of its refusals, and all limits were learned from them alone."""
        is_only = self._taught_by == {key} and self._is_cause(now, key)
        if is_only:
            self._taught_by.clear()
        return is_only

    def _is_cause(self, now: float, who: Ticket | str) -> bool:
        first = self._firsts[who]
        own = self._own[who]
        others_refused = self._refused - first.refused - own
        return (
            min(self._latest) > first.started
            and now <= self._accepted_at + RECENT_SECONDS
            and (not own or (own >= REFUSALS and self._accepted - first.accepted >= OTHERS * others_refused))
        )
