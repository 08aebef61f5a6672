"""How fast to send to a provider of which nothing is known, until its first refusal."""

from __future__ import annotations

from collections import deque
from math import exp, inf

#: Until anything is known, this many requests go out unpaced: what all cameras send at once.
START_CREDIT = 16.0
#: A silent provider is a willing one: refusals come back quickly, so as much again follows after each of these seconds
CREDIT_STEP_SECONDS = 0.1
#: ... up to this many without an answer.
MAX_UNANSWERED = 64.0
#: Requests a second beyond that, growing by this share a second while they bind.
START_PACE, START_GROWTH = 16.0, 0.4
#: ... and never below this many times the accepted rate.
HEADROOM = 1.25


class Start:
    """Paces in requests, whatever the dimension. Goes on measuring the accepted rate when the start is over."""

    __slots__ = ("_answers", "_dormant", "_pace", "_total", "_unanswered", "began")

    #: The accepted rate is over this time.
    WINDOW_SECONDS = 1.5

    def __init__(self, *, dormant: bool) -> None:
        self.began = inf
        """When the first request was sent."""
        self._dormant = dormant
        self._pace = START_PACE
        self._unanswered = 0
        self._answers: deque[tuple[float, float]] = deque()
        self._total = 0.0

    def sent(self, now: float) -> None:
        """A request goes out."""
        if self.began == inf:
            self.began = now
        self._unanswered += 1

    def again(self, now: float) -> None:
        """Begin anew: after a pause the provider is as unknown as at first, and all that waits is no first word."""
        self.began = now

    def answered(self, now: float, amount: float) -> None:
        """A request has ended, and took this amount."""
        self._unanswered -= 1
        self._answers.append((now, amount))
        self._total += amount
        if self._answers[0][0] < now - self.WINDOW_SECONDS:
            self._expire(now)

    def grow(self, seconds: float) -> None:
        """So long the pace was what held requests back."""
        self._pace *= exp(START_GROWTH * seconds)

    def pace(self, now: float) -> float:
        """Requests a second that may go out; infinite for unpaced."""
        if self._dormant or self._unanswered < START_CREDIT or self.began == inf:
            return inf
        steps = (now - self.began) / CREDIT_STEP_SECONDS
        if self._unanswered < min(START_CREDIT * 2.0 ** min(steps, 8.0), MAX_UNANSWERED):
            return inf
        self._expire(now)
        return max(self._pace, HEADROOM * len(self._answers) / self.WINDOW_SECONDS)

    def rate(self, now: float) -> float:
        """The accepted amount a second, of late."""
        self._expire(now)
        return self._total / self.WINDOW_SECONDS

    def _expire(self, now: float) -> None:
        answers = self._answers
        while answers and answers[0][0] < now - self.WINDOW_SECONDS:
            self._total -= answers.popleft()[1]
