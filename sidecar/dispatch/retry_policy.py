"""What a failed attempt means for its request: once more, elsewhere, or an error to the caller.

A table, and the budget that one of its rows needs. Nothing waits here: a retry is a ticket that goes back to the queue
with a time before which it is not sent.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sidecar.admission.gates.base import VerdictOutcome

#: Retries of failures (never of refusals) may be this share of the answers in the last window, so that we do not
#: multiply the load of an ailing provider, and as many more as `RETRY_RESERVE`. Finagle's retry budget has the same
#: 20 %, of 10 s; tower's too.
RETRY_SHARE, RETRY_RESERVE, RETRY_WINDOW_SECONDS = 0.2, 10, 10.0
MAX_FAILED_ATTEMPTS = 3
#: Full jitter: a retry waits between 0 and this many seconds, doubled for each failure before.
RETRY_STEP_SECONDS = 0.5
#: Before a request is given up, it waits this long: if others fail too then, it is not to blame.
OUTAGE_CHECK_SECONDS = 1.0

Action = Literal["again", "again_later", "again_if_failing", "elsewhere", "fail"]


@dataclass(frozen=True, slots=True)
class Situation:
    """An attempt that brought no answer, and what is known around it."""

    outcome: VerdictOutcome
    elsewhere: bool
    """Another upstream, where it was not tried yet, could take the request."""
    failing: bool
    """The upstream has answered before, and now fails request after request: an outage."""
    has_answered: bool
    """The upstream has answered before: it is no wrong address."""
    failed_attempts: int
    """Of this request, one after the other."""


#: The first row whose outcome and condition fit decides; the last condition of a row is asked only for its outcome.
TABLE: tuple[tuple[VerdictOutcome, Callable[[Situation], bool], Action], ...] = (
    ("refused", lambda _: True, "again"),
    ("failed", lambda one: one.elsewhere, "elsewhere"),
    ("failed", lambda one: one.failing, "again_later"),
    ("failed", lambda one: one.failed_attempts < MAX_FAILED_ATTEMPTS, "again_later"),  # within the budget
    ("failed", lambda one: one.has_answered, "again_if_failing"),
    ("timed_out", lambda one: one.elsewhere, "elsewhere"),
    ("account", lambda one: one.elsewhere, "elsewhere"),
)


class RetryBudget:
    """How many retries the latest answers pay for, in a window of two halves."""

    __slots__ = ("_answers", "_began", "_retries")

    def __init__(self, now: float) -> None:
        self._began = now
        self._answers = [0, 0]  # in the half before, in this one
        self._retries = [0, 0]

    def answered(self, now: float) -> None:
        """An attempt brought a whole answer."""
        if now - self._began >= RETRY_WINDOW_SECONDS / 2:
            self._move(now)
        self._answers[1] += 1

    def take(self, now: float) -> bool:
        """Use one retry. Return False if none is left."""
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
    """Decides for one upstream."""

    __slots__ = ("budget",)

    def __init__(self, now: float) -> None:
        self.budget = RetryBudget(now)

    def decide(self, now: float, situation: Situation) -> Action:
        """Apply the table. A retry of a single request's failure uses the budget; one in an outage does not."""
        for outcome, fits, action in TABLE:
            if situation.outcome == outcome and fits(situation):
                if action == "again_later" and not situation.failing and not self.budget.take(now):
                    continue
                return action
        return "fail"


def jitter(rng: random.Random, failed_attempts: int, seconds_left: float) -> float:
    """Seconds to wait before a retry."""
    longest = RETRY_STEP_SECONDS * 2.0 ** (failed_attempts - 1)
    return rng.uniform(0.0, min(longest, max(seconds_left, 0.0)))
