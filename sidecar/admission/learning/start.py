"""How fast to send to a provider of which nothing is known, until its first refusal."""

from __future__ import annotations

from collections import deque
from math import exp, inf

from sidecar.admission.learning.tuning import (
    START_CREDIT,
    START_CREDIT_STEP_SECONDS,
    START_GROWTH,
    START_HEADROOM,
    START_MAX_UNANSWERED,
    START_PACE,
    START_WINDOW_SECONDS,
)


class Start:
    """Paces in requests, whatever the dimension. Goes on measuring the accepted rate when the start is over."""

    __slots__ = ("_answers", "_dormant", "_pace", "_total", "began", "unanswered")

    def __init__(self, *, dormant: bool) -> None:
        self.began = inf
        """When the first request was sent."""
        self._dormant = dormant
        self._pace = START_PACE
        self.unanswered = 0
        """Requests that went out and have not ended."""
        self._answers: deque[tuple[float, float]] = deque()
        self._total = 0.0

    def again(self, now: float) -> None:
        """Begin anew: after a pause the provider is as unknown as at first, and all that waits is no first word."""
        self.began = now

    def answered(self, now: float, amount: float) -> None:
        """A request has ended, and took this amount."""
        self.unanswered -= 1
        self._answers.append((now, amount))
        self._total += amount
        if self._answers[0][0] < now - START_WINDOW_SECONDS:
            self._expire(now)

    def grow(self, seconds: float) -> None:
        """So long the pace was what held requests back."""
        self._pace *= exp(START_GROWTH * seconds)

    def pace(self, now: float) -> float:
        """Requests a second that may go out; infinite for unpaced."""
        if self._dormant or self.unanswered < START_CREDIT or self.began == inf:
            return inf
        steps = (now - self.began) / START_CREDIT_STEP_SECONDS
        if self.unanswered < min(START_CREDIT * 2.0 ** min(steps, 8.0), START_MAX_UNANSWERED):
            return inf
        self._expire(now)
        return max(self._pace, START_HEADROOM * len(self._answers) / START_WINDOW_SECONDS)

    def rate(self, now: float) -> float:
        """The accepted amount a second, of late."""
        self._expire(now)
        return self._total / START_WINDOW_SECONDS

    def _expire(self, now: float) -> None:
        answers = self._answers
        while answers and answers[0][0] < now - START_WINDOW_SECONDS:
            self._total -= answers.popleft()[1]
