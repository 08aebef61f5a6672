"""The growth limit: some providers refuse calls because traffic rose too quickly, whatever the rate itself.

DashScope reports "Request rate increased too quickly". The rule behind it is not published. This model is assumed:

    calls in the last second <= base + factor * (calls/s over some time before it).

A burst after a pause violates this rule; a steady stream never does.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from math import inf

from sidecar.admission.gates.base import Ahead, GateStatus, Verdict
from sidecar.admission.ticket import Cause, Ticket

#: Seconds before the last second over which the earlier rate is measured. The provider's own value is unknown, so both
#: are used and the lower rate counts.
MEMORIES = (8.0, 12.0)
FACTOR = 2.5
MIN_BASE = 1.0
#: Calls within so many seconds count as sent together: the first attempts at a provider are spaced by some ms.
TOGETHER_SECONDS = 0.1
#: A further refusal shows the factor by the calls that were accepted in the second before it; CUT bounds what it takes
#: off. While the gate delays calls and no further refusal comes, base and factor grow by the share RECOVERY per second,
#: up to RECOVERED of what was refused last: so a cut that was too deep is made good within seconds. Beyond that the
#: refusal budget pays for each step.
CUT, RECOVERY, RECOVERED = 0.6, 0.1, 0.93


class GrowthGate:
    """Limit how quickly the rate of calls rises. Inactive, and without cost, until the first refusal for growth."""

    __slots__ = (
        "_bound", "_budget", "_changed_at", "_cut_at", "_first", "_grown_at", "_refused_at_level", "base", "dormant",
        "factor", "log", "name",
    )  # fmt: skip

    def __init__(self, budget: float = 0.005) -> None:
        self.base = inf
        """Calls allowed in one second after a pause; infinite until the first refusal for growth."""
        self.factor = FACTOR
        self._budget = budget
        self.log: list[float] = []
        """Send times of the calls that were not refused. While the gate is dormant, the upstream appends to it."""
        self.name: Cause = "growth"
        self.dormant = True
        self._changed_at = -inf
        self._cut_at = -inf
        self._first = False
        self._refused_at_level = (0.0, 0.0)  # factor and base at the last refusal
        self._grown_at = -inf
        self._bound = 0

    @property
    def certain(self) -> bool:
        """See `Gate`."""
        return True

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
            self._refused(now, reservation)
            self._changed_at = now

    def explains(self, now: float, reservation: float) -> float:
        """See `Gate`. Only a provider that names growth is taken to limit it."""
        return 0.0

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
        # wait until `over` calls (rounded up) of the last second are older than one second
        index = min(last + max(int(over + 0.999) - 1, 0), len(self.log) - 1)
        if index >= 0:  # ... and those sent with them: in small steps, each call would meet the edge of the rule
            index = max(bisect_right(self.log, self.log[index] + TOGETHER_SECONDS) - 1, index)
        return max(self.log[index] + 1.0 - now, 1e-3) if index >= 0 else 0.1

    def seconds_for(self, now: float, ahead: Ahead) -> float:
        """See `Gate`: each second allows more in the next one."""
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
        """Return the calls per second before the last second: the lower one of those over both memories."""
        before = bisect_right(self.log, now - 1.0)
        return min((before - bisect_left(self.log, now - 1.0 - memory)) / memory for memory in MEMORIES)

    def _accepted(self, now: float) -> int:
        """Return the calls of the last second that were not refused."""
        return bisect_right(self.log, now) - bisect_right(self.log, now - 1.0)

    def _sent(self, now: float, bound: bool) -> None:
        """Record one sent attempt. `bound`: it had to wait for this gate."""
        if len(self.log) > 64 and self.log[len(self.log) // 2] < now - 1.0 - MEMORIES[-1]:
            self.trim(now)
        self.log.append(now)
        if bound:
            seconds, self._grown_at = min(now - self._grown_at, 0.5), now
            factor, base = self._refused_at_level
            if self.factor < RECOVERED * factor:
                self.factor *= 1.0 + RECOVERY * seconds
            if self.base < RECOVERED * base:
                self.base *= 1.0 + RECOVERY * seconds
            self._bound += 1
            if self._bound * self._budget >= 1.0:  # the budget allows one refusal: test whether more is allowed
                self._bound = 0
                self.factor = min(self.factor * 1.05, 2 * FACTOR)
                self.base *= 1.05

    def trim(self, now: float) -> None:
        """Forget what is too old to count."""
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
                shown = (self._accepted(sent_at) - self.base) / max(self._rate_before(sent_at), 1e-6)
                self.factor = max(CUT * self.factor, min(shown, self.factor))
                self.base = max(self.base * 0.97, MIN_BASE)
            self._cut_at = now
            self._bound = 0
        if self._first:
            # The first burst after a pause shows the base directly: the calls that were accepted of it.
            taken = bisect_right(self.log, sent_at) - bisect_left(self.log, sent_at - 1.0)
            before = bisect_left(self.log, sent_at - 1.0) - bisect_left(self.log, sent_at - 1.0 - MEMORIES[0])
            self.base = max(taken - self.factor * before / MEMORIES[0], MIN_BASE)
        self.dormant = False
