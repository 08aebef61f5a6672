"""Decides what follows a failed attempt: a retry, an attempt at another upstream, or an error for the caller.

Contains the table of decisions and the retry budget. A retry does not wait here: its ticket goes back to the queue with
`not_before`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sidecar.admission.gates.base import VerdictOutcome

#: Retry budget: in each RETRY_WINDOW_SECONDS, at most RETRY_SHARE x answers + RETRY_RESERVE retries after failures.
#: Refusals do not use it. It keeps retries from multiplying the load of a failing provider. Source: the retry budgets
#: of Finagle and tower use 20 % over 10 s.
RETRY_SHARE, RETRY_RESERVE, RETRY_WINDOW_SECONDS = 0.2, 10, 10.0
#: Maximum number of consecutive failed attempts of one request while the upstream has no outage.
MAX_FAILED_ATTEMPTS = 3
#: Full jitter: a retry waits between 0 and this many seconds. Each earlier failure of the request doubles the maximum.
RETRY_STEP_SECONDS = 0.5
#: The last retry of a request waits this many seconds. If other requests also fail by then, this request is not the
#: cause, and the retry is sent.
OUTAGE_CHECK_SECONDS = 1.0

Action = Literal["again", "again_first", "again_later", "again_if_failing", "elsewhere", "fail"]


@dataclass(frozen=True, slots=True)
class Situation:
    """A failed attempt and the facts that the decision needs."""

    outcome: VerdictOutcome
    elsewhere: bool
    """True if an upstream that the request has not tried could take it."""
    failing: bool
    """True if the upstream has answered before and now fails different requests in a row: an outage. Also if a limit
    may have refused this attempt without words."""
    has_answered: bool
    """True if the upstream has answered before, so its address is right."""
    failed_attempts: int
    """Number of consecutive failed attempts of this request."""
    certain: bool = True
    """True unless this is the first refusal of the account, which may be wrong or the request's own fault."""


#: The first row whose outcome and condition match gives the action. A condition is evaluated only if the outcome of its
#: row matches.
TABLE: tuple[tuple[VerdictOutcome, Callable[[Situation], bool], Action], ...] = (
    ("refused", lambda _: True, "again"),
    ("failed", lambda situation: situation.elsewhere, "elsewhere"),
    ("failed", lambda situation: situation.failing, "again_later"),
    ("failed", lambda situation: situation.failed_attempts < MAX_FAILED_ATTEMPTS, "again_later"),  # within the budget
    ("failed", lambda situation: situation.has_answered, "again_if_failing"),
    ("timed_out", lambda _: True, "elsewhere"),  # an attempt is stopped early only if another upstream can take it
    ("account", lambda situation: situation.elsewhere, "elsewhere"),
    ("account", lambda situation: not situation.certain, "again_first"),
)


class RetryBudget:
    """Limits retries to a share of the recent answers.

    The window has two halves, and both count. When a new half begins, the older of the two is dropped.
    """

    __slots__ = ("_answers", "_began", "_retries")

    def __init__(self, now: float) -> None:
        self._began = now
        self._answers = [0, 0]  # in the previous half, in the present half
        self._retries = [0, 0]

    def answered(self, now: float) -> None:
        """Count one complete answer."""
        if now - self._began >= RETRY_WINDOW_SECONDS / 2:
            self._move(now)
        self._answers[1] += 1

    def take(self, now: float) -> bool:
        """Use one retry. Return False if the budget has no retry left."""
        self._move(now)
        if sum(self._retries) + 1 > RETRY_RESERVE + RETRY_SHARE * sum(self._answers):
            return False
        self._retries[1] += 1
        return True

    def _move(self, now: float) -> None:
        halves = int((now - self._began) / (RETRY_WINDOW_SECONDS / 2))
        if halves:
            self._began += halves * RETRY_WINDOW_SECONDS / 2
            for counts in (self._answers, self._retries):
                counts[:] = [counts[1] if halves == 1 else 0, 0]


class RetryPolicy:
    """Decides what follows the failed attempts at one upstream."""

    __slots__ = ("budget",)

    def __init__(self, now: float) -> None:
        self.budget = RetryBudget(now)

    def decide(self, now: float, situation: Situation) -> Action:
        """Apply the table. A retry after a failure uses the budget, except during an outage."""
        for outcome, fits, action in TABLE:
            if situation.outcome == outcome and fits(situation):
                if action == "again_later" and not situation.failing and not self.budget.take(now):
                    continue
                return action
        return "fail"


def jitter(rng: random.Random, failed_attempts: int, seconds_left: float) -> float:
    """Return the seconds to wait before a retry."""
    longest = RETRY_STEP_SECONDS * 2.0 ** (failed_attempts - 1)
    return rng.uniform(0.0, min(longest, max(seconds_left, 0.0)))
