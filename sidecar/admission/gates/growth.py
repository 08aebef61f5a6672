"""The growth limit: some providers refuse calls because traffic rises too quickly, even at a low rate.

DashScope reports "Request rate increased too quickly". The rule behind it is not published. This model is assumed:

    calls in the last second <= base + factor * (calls/s over some time before it).

A burst after a pause violates this rule; a steady stream never does.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from math import inf

from sidecar.admission.gates.base import Ahead, Change, GateStatus, Verdict
from sidecar.admission.ticket import Cause, Ticket

#: Seconds. The earlier rate is measured over this time before the last second. It is unknown over how many seconds the
#: provider measures, so the gate measures over both times and uses the lower rate.
MEMORIES = (8.0, 12.0)
#: The assumed factor until refusals show another value.
FACTOR = 2.5
#: Minimum of `GrowthGate.base`, in calls.
MIN_BASE = 1.0
#: Calls within this many seconds count as one burst. Needed because the first attempts at a provider are sent some ms
#: apart.
TOGETHER_SECONDS = 0.1
#: After the first refusal, each refusal for growth gives a new factor: (calls accepted in the second before the refused
#: call - base) / earlier rate. A refusal never raises the factor, and lowers it at most to CUT times its old value.
#: While the gate delays calls and no refusal comes, base and factor grow by the share RECOVERY per second, up to
#: RECOVERED times their values at the last refusal, so a cut that was too deep is corrected within seconds. Above that,
#: the refusal budget pays for each step.
CUT, RECOVERY, RECOVERED = 0.6, 0.1, 0.93


class GrowthGate:
    """Limit how quickly the rate of calls rises. Inactive, and without cost, until the first refusal for growth."""

    __slots__ = (
        "_budget",
        "_changed_at",
        "_cut_at",
        "_first",
        "_grown_at",
        "_held_count",
        "_on_change",
        "_refused_at_level",
        "base",
        "dormant",
        "factor",
        "log",
        "name",
    )  # fmt: skip

    def __init__(self, budget: float = 0.005, on_change: Callable[[Change], None] = lambda _: None) -> None:
        """`budget` is the share of attempts that may be refused. `on_change` is called after each refusal for growth
        that changed the base.
        """
        self.base = inf
        """Calls allowed in one second after a pause; infinite until the first refusal for growth."""
        self.factor = FACTOR
        self._budget = budget
        self._on_change = on_change
        self.log: list[float] = []
        """Send times of the calls that were not refused for growth, as loop times. While the gate is dormant, the
        upstream appends to this list."""
        self.name: Cause = "growth"
        self.dormant = True
        self._changed_at = -inf
        self._cut_at = -inf
        self._first = False
        self._refused_at_level = (0.0, 0.0)  # factor and base at the last refusal, before it changed them
        self._grown_at = -inf
        self._held_count = 0

    def advance(self, now: float) -> None:
        """See `Gate`."""

    def opens_at(self, now: float, cost: float) -> float:
        """See `Gate`."""
        wait = self._wait(now)
        return now + wait if wait > 0 else now

    def reserve(self, now: float, ticket: Ticket, cost: float, *, held: bool) -> float:
        """See `Gate`."""
        self._sent(now, held)
        return now

    def settle(self, now: float, reservation: float, verdict: Verdict, *, blamed: Cause | None) -> None:
        """See `Gate`."""
        if verdict.outcome == "refused" and blamed == "growth":
            old = self.base
            self._refused(now, reservation)
            self._changed_at = now
            if self.base != old:
                self._on_change(Change(now, self.name, old, self.base, "", "refused for growth"))

    def status(self, now: float) -> GateStatus:
        """See `Gate`."""
        if self.dormant:
            return GateStatus("growth", limit=None)
        return GateStatus(
            "growth", limit=self.base, pace=self.allowed(now), why="refused for growth", since=self._changed_at,
            factor=self.factor,
        )  # fmt: skip

    def _wait(self, now: float) -> float:
        """Return the seconds until one more call may be sent; 0 means now."""
        if self.base == inf:
            return 0.0
        last = bisect_right(self.log, now - 1.0)
        over = len(self.log) - last + 1 - self.allowed(now)
        if over <= 0:
            return 0.0
        # Wait until `over` calls (rounded up) of the last second are older than one second.
        index = min(last + max(int(over + 0.999) - 1, 0), len(self.log) - 1)
        # Wait also for the calls that were sent together with the last of them. Otherwise the gate would open for one
        # call at a time, each exactly at the limit.
        if index >= 0:
            index = max(bisect_right(self.log, self.log[index] + TOGETHER_SECONDS) - 1, index)
        return max(self.log[index] + 1.0 - now, 1e-3) if index >= 0 else 0.1

    def seconds_for(self, now: float, ahead: Ahead, *, guess: bool) -> float:
        """See `Gate`: the calls allowed in one second raise the number that is allowed in the next second."""
        if self.dormant:
            return 0.0
        requests = ahead.requests
        seconds = self._wait(now)
        before = float(len(self.log) - bisect_left(self.log, now - MEMORIES[-1]))
        while requests > (allowed := max(self.base + self.factor * before / MEMORIES[-1], 1.0)):
            requests -= allowed
            before += allowed
            seconds += 1.0
        return seconds

    def allowed(self, now: float) -> float:
        """Return the number of calls that are allowed in the second before `now`."""
        return max(self.base + self.factor * self._rate_before(now), 1.0)

    def _rate_before(self, now: float) -> float:
        """Return the calls/s before the last second: the lower of the two rates that MEMORIES gives."""
        before = bisect_right(self.log, now - 1.0)
        return min((before - bisect_left(self.log, now - 1.0 - memory)) / memory for memory in MEMORIES)

    def _count_not_refused(self, now: float) -> int:
        """Return the number of calls of the last second that were not refused for growth."""
        return bisect_right(self.log, now) - bisect_right(self.log, now - 1.0)

    def _sent(self, now: float, held: bool) -> None:
        """Record one sent attempt. `held`: this gate delayed it."""
        if len(self.log) > 64 and self.log[len(self.log) // 2] < now - 1.0 - MEMORIES[-1]:
            self.trim(now)
        self.log.append(now)
        if held:
            seconds, self._grown_at = min(now - self._grown_at, 0.5), now
            factor, base = self._refused_at_level
            if self.factor < RECOVERED * factor:
                self.factor *= 1.0 + RECOVERY * seconds
            if self.base < RECOVERED * base:
                self.base *= 1.0 + RECOVERY * seconds
            self._held_count += 1
            if self._held_count * self._budget >= 1.0:  # the budget allows one refusal: test whether more is allowed
                self._held_count = 0
                self.factor = min(self.factor * 1.05, 2 * FACTOR)
                self.base *= 1.05

    def trim(self, now: float) -> None:
        """Delete the send times that are older than the longest memory."""
        del self.log[: bisect_left(self.log, now - 1.0 - MEMORIES[-1])]

    def _refused(self, now: float, sent_at: float) -> None:
        """Learn from a refusal for growth of the attempt sent at `sent_at`. The refusals of one burst count once."""
        index = bisect_left(self.log, sent_at)
        if index < len(self.log) and self.log[index] == sent_at:
            del self.log[index]
        if sent_at > self._cut_at:
            self._first = self.dormant
            if not self.dormant:
                self._refused_at_level = (self.factor, self.base)
                shown = (self._count_not_refused(sent_at) - self.base) / max(self._rate_before(sent_at), 1e-6)
                self.factor = max(CUT * self.factor, min(shown, self.factor))
                self.base = max(self.base * 0.97, MIN_BASE)
            self._cut_at = now
            self._held_count = 0
        if self._first:
            # The number of accepted calls of the first burst after a pause shows the base directly.
            accepted = bisect_right(self.log, sent_at) - bisect_left(self.log, sent_at - 1.0)
            before = bisect_left(self.log, sent_at - 1.0) - bisect_left(self.log, sent_at - 1.0 - MEMORIES[0])
            self.base = max(accepted - self.factor * before / MEMORIES[0], MIN_BASE)
        self.dormant = False
