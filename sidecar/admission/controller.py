"""Learns one dimension's limit (requests or LLM tokens a second) from what attempts are told.

A quota is a policer: nothing slows down before a refusal, so the only signal is which attempts were refused, by the
time at which they were *sent*. The controller is pure: every call takes `now`, nothing waits, nothing is scheduled.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import inf


class State(StrEnum):
    """What the controller is doing. Also the values of the `state` label of `sidecar_limit_state`."""

    START = "start"
    STEADY = "steady"


#: Until anything is known, this many requests go out unpaced: what all cameras send at once.
START_CREDIT = 16.0
#: A silent provider is a willing one: refusals come back quickly, so another credit follows after this many seconds.
CREDIT_STEP_SECONDS = 0.1
#: ... up to this many without an answer.
MOST_UNANSWERED = 64.0
START_FLOOR = 2.0
START_WINDOW_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Sent:
    """What the controller remembers of one attempt: when it was sent, and the amount sent up to and including it."""

    at: float
    total: float
    amount: float


class RateController:
    """One dimension of one provider account and model. Rates and amounts are in its unit: requests, or LLM tokens."""

    def __init__(self, now: float, *, ceiling: float = inf, typical: float = 1.0) -> None:
        self.state = State.START
        self.limit = inf
        """The learned limit; infinite while nothing was ever refused."""
        self.ceiling = ceiling
        self.changed_at = now
        self.changed_why = "nothing learned yet"
        self._typical = typical
        self._total = 0.0
        self._refused_total = 0.0
        self._last_cut = -inf
        self._mark_total = 0.0
        self._mark_refused = 0.0
        self._answered = 0.0
        self._window_start = now
        self._window_total = 0.0
        self._rate_seen = 0.0
        self._grown_at = now
        self._first_sent: float | None = None

    def pace(self, now: float) -> float:
        """What may be sent a second at this instant; infinite for unpaced."""
        if self.state is State.START:
            return min(self._start_pace(now), self.ceiling)
        since = now - self._last_cut
        share = 0.93 if since < 5.0 else 0.985
        return min(self.limit * share, self.ceiling)

    def burst(self, now: float) -> float:
        """How much may be sent at once on top of the pace."""
        if self.state is State.START:
            return START_CREDIT * self._typical
        return max(self._typical, min(self.limit * 0.5, 4 * self._typical))

    def sent(self, now: float, amount: float, bound: bool) -> Sent:
        """One attempt goes out. `bound`: it had to wait for this dimension, so more would have been sent."""
        if self._first_sent is None:
            self._first_sent = now
        self._total += amount
        if bound and self.state is State.STEADY and now - self._last_cut > 5.0:
            # proportional growth, only while the rate itself is what holds requests back
            self.limit *= 1.0 + 0.01 * min(now - self._grown_at, 1.0)
        self._grown_at = now
        return Sent(now, self._total, amount)

    def accepted(self, now: float, sent: Sent) -> None:
        """The provider took it."""
        self._answered += sent.amount
        elapsed = now - self._window_start
        self._window_total += sent.amount
        if elapsed >= START_WINDOW_SECONDS:
            self._rate_seen = self._window_total / elapsed
            self._window_start, self._window_total = now, 0.0

    def refused(self, now: float, sent: Sent) -> None:
        """The provider refused it for this dimension. One burst of refusals, told by their send times, is one event."""
        self._answered += sent.amount
        if sent.at <= self._last_cut:
            self._refused_total += sent.amount
            return
        elapsed = sent.at - max(self._last_cut, self._first_sent or now)
        taken = sent.total - self._mark_total - (self._refused_total - self._mark_refused) - sent.amount
        self._refused_total += sent.amount
        measured = taken / elapsed if elapsed > 0.2 else max(self._rate_seen, START_FLOOR * self._typical)
        before = self.limit
        self.limit = min(max(measured, 0.7 * before), before) if before != inf else measured
        self.limit = max(self.limit, 0.02 * self._typical)
        self.state = State.STEADY
        self._last_cut = now
        self._mark_total = self._total
        self._mark_refused = self._refused_total
        self.changed_at = now
        self.changed_why = f"refused; {measured:.3g}/s were taken since the refusal before"

    def _start_pace(self, now: float) -> float:
        if self._first_sent is None:
            return inf
        steps = (now - self._first_sent) / CREDIT_STEP_SECONDS
        unanswered = self._total - self._answered
        allowed = min(START_CREDIT * 2.0 ** min(steps, 8.0), MOST_UNANSWERED) * self._typical
        if unanswered < allowed:
            return inf
        return max(START_FLOOR * self._typical, 2.5 * self._rate_seen + 3 * self._typical)
