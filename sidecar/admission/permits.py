"""Limit the attempts in flight. The number is derived from the pace, and learned if the provider limits concurrency."""

from __future__ import annotations

from collections import Counter, deque
from math import inf

#: Refusals are put down to concurrency only if SUSPECT_AFTER of them all met more attempts in flight than accepted
#: attempts did. They must span at least SUSPECT_SECONDS seconds and SUSPECT_LATENCIES times the latency of an answer.
#: Refusals close together can equally come from a rate limit that fell, and until the first answers arrive the number
#: in flight only rises.
SUSPECT_AFTER, SUSPECT_SECONDS, SUSPECT_LATENCIES = 4, 10.0, 3.0
#: Concurrency is suspected only if at most this share of the accepted attempts had as many others in flight. With a
#: larger share, four refusals at such numbers could be chance.
CHANCE = 0.1


class Permits:
    """
    A counting semaphore with a variable size. It never waits: without a free permit, the ticket stays in the queue.

    A smaller size revokes no permit: attempts in flight finish, and no other starts until the number is below the size.
    """

    __slots__ = ("_budget", "_cut_at", "_paid", "_suspects", "_taken", "in_flight", "learned", "size", "step")

    def __init__(self, size: int, budget: float = 0.005) -> None:
        self.size = size
        """Permits that the pace needs, within the bound for memory."""
        self.learned = inf
        """The provider's limit on concurrency; infinite until a refusal has shown it."""
        self.in_flight = 0
        self.step = 0
        """Attempts allowed at present above the learned limit, to test whether the provider allows more."""
        self._budget = budget
        self._cut_at = -inf
        self._paid = 0.0  # share of one refusal for which the budget has paid
        self._suspects: deque[tuple[float, int]] = deque(maxlen=SUSPECT_AFTER)  # send time, other attempts in flight
        self._taken: Counter[int] = Counter()  # accepted attempts by the number of other attempts in flight

    def __repr__(self) -> str:
        return f"<Permits in_flight={self.in_flight} allowed={self.allowed} learned={self.learned}>"

    @property
    def allowed(self) -> float:
        """Attempts that may be in flight now."""
        return min(self.size, self.learned + self.step)

    @property
    def free(self) -> bool:
        """True if one more attempt may start."""
        return self.in_flight < self.size and self.in_flight < self.learned + self.step

    def take(self) -> int:
        """Count one attempt as in flight and return the number of other attempts in flight."""
        self.in_flight += 1
        return self.in_flight - 1

    def give_back(self) -> None:
        """Count one attempt as ended."""
        assert self.in_flight > 0, "a permit was given back twice"  # noqa: S101  a defect of ours, never of a caller
        self.in_flight -= 1

    def accepted(self, beside: int, bound: bool) -> None:
        """Learn from an accepted attempt with `beside` others in flight. `bound`: it had to wait for a permit."""
        self._taken[beside] += 1
        if beside >= self.learned:  # more than the learned limit: it has risen, so double the steps of the search
            self.learned = beside + 1
            self.step = max(2 * self.step, 1)
        if self.learned < inf:
            self._paid = min(self._paid + self._budget, 1.0)
            if bound and self._paid >= 1.0:
                self._paid = 0.0
                self.step = max(self.step, 1)

    def refused(self, now: float, sent_at: float, beside: int) -> None:
        """Learn from a refusal for concurrency with `beside` others in flight. A burst of refusals counts once."""
        if sent_at > self._cut_at:
            self._cut_at = now
            self.learned = max(beside, 1) if self.learned == inf else max(min(self.learned, beside), 1)
        elif beside >= 1:
            self.learned = min(self.learned, beside)
        self.step = 0
        self._paid = 0.0

    def suspect(self, now: float, sent_at: float, beside: int, latency: float) -> bool:
        """
        Return True if concurrency explains the latest refusals better. Call it if a refusal does not name concurrency.

        A rate limit refuses at any number in flight. A limit on concurrency refuses only above the numbers at which
        attempts were accepted, with few exceptions.
        """
        if beside >= self.learned:
            return True
        if sent_at <= self._cut_at:
            return False
        self._cut_at = now
        self._suspects.append((sent_at, beside))
        seconds = sent_at - self._suspects[0][0]
        if len(self._suspects) < SUSPECT_AFTER or seconds < max(SUSPECT_SECONDS, SUSPECT_LATENCIES * latency):
            return False
        least = min(beside for _, beside in self._suspects)
        above = sum(count for at, count in self._taken.items() if at >= least)
        if least < 1 or above > min(SUSPECT_AFTER, CHANCE * self._taken.total()):
            self._taken.clear()  # old observations may no longer be true: the provider's limit can change
            self._suspects.clear()
            return False
        self.learned = least
        self._suspects.clear()
        return True
