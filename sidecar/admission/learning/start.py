"""The pace for an unknown provider, until its first refusal."""

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
    """The pace at the start, always in requests per second. Measures the accepted rate after the start too."""

    __slots__ = ("_dormant", "_pace", "answers", "began", "total", "unanswered")

    def __init__(self, *, dormant: bool) -> None:
        self.began = inf
        """Loop time at which the first request was sent; infinite before that."""
        self._dormant = dormant
        self._pace = START_PACE
        self.unanswered = 0
        """Number of requests that were sent and have not ended."""
        self.answers: deque[tuple[float, float]] = deque()
        """Times and accepted amounts of the attempts that ended within the last START_WINDOW_SECONDS."""
        self.total = 0.0
        """Sum of these amounts."""

    def again(self, now: float) -> None:
        """Begin again after a pause, so that the waiting requests are not all sent at once."""
        self.began = now

    def answered(self, now: float, amount: float) -> None:
        """Record that a request has ended. `amount`: its accepted amount, 0 if it was not accepted."""
        self.unanswered -= 1
        self.answers.append((now, amount))
        self.total += amount
        if self.answers[0][0] < now - START_WINDOW_SECONDS:
            self.expire(now)

    def grow(self, seconds: float) -> None:
        """Raise the pace, after `seconds` in which it delayed requests."""
        self._pace *= exp(START_GROWTH * seconds)

    def pace(self, now: float) -> float:
        """Return the requests per second that may be sent; infinite while they are not paced."""
        if self._dormant or self.unanswered < START_CREDIT or self.began == inf:
            return inf
        steps = (now - self.began) / START_CREDIT_STEP_SECONDS
        if self.unanswered < min(START_CREDIT * 2.0 ** min(steps, 8.0), START_MAX_UNANSWERED):
            return inf
        self.expire(now)
        return max(self._pace, START_HEADROOM * len(self.answers) / START_WINDOW_SECONDS)

    def rate(self, now: float) -> float:
        """Return the accepted amount per second, over the last START_WINDOW_SECONDS."""
        self.expire(now)
        return self.total / START_WINDOW_SECONDS

    def expire(self, now: float) -> None:
        """Forget the answers that are older than START_WINDOW_SECONDS."""
        answers = self.answers
        while answers and answers[0][0] < now - START_WINDOW_SECONDS:
            self.total -= answers.popleft()[1]
