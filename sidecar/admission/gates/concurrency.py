"""How many attempts may be in flight: derived from the pace, and learned where the provider limits it."""

from __future__ import annotations

from collections import Counter, deque
from math import inf

#: Refusals, over so many seconds and times that of an answer at least, that must all have met more in flight than
#: accepted attempts did before concurrency is suspected: within a moment of each other they may as well tell of a rate
#: that fell, and until the first answers are back there are more in flight all the time.
SUSPECT_AFTER, SUSPECT_SECONDS, SUSPECT_LATENCIES = 4, 10.0, 3.0
#: No more than this share of the accepted had as many beside them: four refusals that all do would otherwise be chance.
CHANCE = 0.1


class Permits:
    """
    A counting semaphore whose size moves. It never waits: whoever finds it empty stays in the queue.

    Shrinking takes nothing back: attempts in flight finish, and none is admitted until they fit.
    """

    __slots__ = ("_budget", "_cut_at", "_paid", "_suspects", "_taken", "in_flight", "learned", "size", "step")

    def __init__(self, size: int, budget: float = 0.005) -> None:
        self.size = size
        """What the pace needs and memory allows."""
        self.learned = inf
        """What the provider allows, once a refusal has shown it."""
        self.in_flight = 0
        self.step = 0
        """How many more than learned are let out at present, to see whether more is allowed."""
        self._budget = budget
        self._cut_at = -inf
        self._paid = 0.0  # of a refusal, by the budget
        self._suspects: deque[tuple[float, int]] = deque(maxlen=SUSPECT_AFTER)  # when sent, and how many beside
        self._taken: Counter[int] = Counter()  # accepted attempts by how many they had beside them

    @property
    def allowed(self) -> float:
        """Attempts that may be in flight now."""
        return min(self.size, self.learned + self.step)

    @property
    def free(self) -> bool:
        """One more attempt may start."""
        return self.in_flight < self.size and self.in_flight < self.learned + self.step

    def take(self) -> int:
        """Count one attempt as in flight; returns how many there were beside it."""
        self.in_flight += 1
        return self.in_flight - 1

    def give_back(self) -> None:
        """Count one attempt as ended."""
        assert self.in_flight > 0, "a permit was given back twice"  # noqa: S101  a defect of ours, never of a caller
        self.in_flight -= 1

    def accepted(self, beside: int, bound: bool) -> None:
        """An attempt that had so many beside it was taken. `bound`: it had to wait for a permit."""
        self._taken[beside] += 1
        if beside >= self.learned:  # more than was thought: the limit has risen, look further and faster
            self.learned = beside + 1
            self.step = max(2 * self.step, 1)
        if self.learned < inf:
            self._paid = min(self._paid + self._budget, 1.0)
            if bound and self._paid >= 1.0:
                self._paid = 0.0
                self.step = max(self.step, 1)

    def refused(self, now: float, sent_at: float, beside: int) -> None:
        """The provider refused an attempt with so many beside it, for that reason. One burst is one event."""
        if sent_at > self._cut_at:
            self._cut_at = now
            self.learned = max(beside, 1) if self.learned == inf else max(min(self.learned, beside), 1)
        elif beside >= 1:
            self.learned = min(self.learned, beside)
        self.step = 0
        self._paid = 0.0

    def suspect(self, now: float, sent_at: float, beside: int, latency: float) -> bool:
        """
        A refusal named another limit, or none. True if concurrency explains the latest ones better.

        A rate refuses at any number in flight; a limit on concurrency only above what was taken, but for a few.
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
            self._taken.clear()  # what was once taken need not be so for ever
            self._suspects.clear()
            return False
        self.learned = least
        self._suspects.clear()
        return True
