"""The growth limit: some providers refuse calls because traffic rises too quickly, even at a low rate.

DashScope reports "Request rate increased too quickly". The rule behind it is not published. This model is assumed:

    calls in the last second <= base + factor * (calls/s over some time before it).

A burst after a pause violates this rule; a steady stream never does.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from math import inf, log2

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
#: Weight of the assumed factor when base and factor are fitted to refusals, in (calls/s)^2: the variance of a count
#: that is rounded to whole calls (1/12), divided by the variance of the factor among providers (about 1).
ASSUMED_WEIGHT = 1 / 12
#: Relative error of the earlier rate, because the provider may measure it over another time.
BLUR = 0.07
#: A refusal after n calls shows that the rule allows n calls and a part of the next one. After a pause, the part is 0,
#: because a base is a whole number; otherwise at most this part is assumed.
PART = 0.7
#: While the gate delays calls, the allowed calls grow by one step in `GrowthGate._step_seconds`, to test whether the
#: provider allows more. A step is STEP_CALLS calls plus the share STEP_SHARE of the allowed calls.
STEP_CALLS, STEP_SHARE = 0.5, 0.05
#: Seconds of a step: at first, and at most, because a limit may change. Each refusal that agrees with the allowed calls
#: doubles it. So does a refusal with no accepted call before it, because then each test costs more.
MIN_STEP_SECONDS, MAX_STEP_SECONDS = 4.0, 160.0
#: A refusal agrees with the allowed calls if it comes at no less than this share of them. Otherwise the steps are short
#: again. If the allowed calls have grown by a whole call and beyond 1 / AGREES times their value, and no refusal came,
#: the rule allows far more: the steps are half as long as at first, then a quarter, and so on.
AGREES = 0.8


class GrowthGate:
    """Limit how quickly the rate of calls rises. Inactive, and without cost, until the first refusal for growth."""

    __slots__ = (
        "_changed_at",
        "_cut_at",
        "_grown",
        "_grown_at",
        "_last",
        "_on_change",
        "_refusals",
        "_refused_at",
        "_step_seconds",
        "base",
        "dormant",
        "factor",
        "log",
        "name",
    )  # fmt: skip

    def __init__(self, on_change: Callable[[Change], None] = lambda _: None) -> None:
        """`on_change` is called after each refusal for growth that changed the base."""
        self.base = inf
        """Calls allowed in one second after a pause; infinite until the first refusal for growth."""
        self.factor = FACTOR
        self._on_change = on_change
        self.log: list[float] = []
        """Send times of the calls that were not refused for growth, as loop times. While the gate is dormant, the
        upstream appends to this list."""
        self.name: Cause = "growth"
        self.dormant = True
        self._changed_at = -inf
        self._cut_at = -inf  # refused calls that were sent until this time belong to the last refusal
        self._refused_at = -inf  # send time of the first refused call of the last refusal
        # The last refusal for each power of two of the earlier calls/s: the earlier calls/s and the calls they allow.
        self._refusals: dict[int, tuple[float, float]] = {}
        self._last = 0  # key of the last refusal
        self._grown_at = -inf
        self._step_seconds = MIN_STEP_SECONDS
        self._grown = 1.0  # factor by which the allowed calls have grown since the last refusal

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
            allowed = self.allowed(now)
            growth = 1.0 + (STEP_CALLS / allowed + STEP_SHARE) * seconds / self._step_seconds
            self.base *= growth
            self.factor = min(self.factor * growth, 2 * FACTOR)
            self._grown *= growth
            if AGREES * (allowed - 1.0) > allowed / self._grown:  # the rule allows more
                self._step_seconds, self._grown = min(self._step_seconds, MIN_STEP_SECONDS) / 2, 1.0
                self._refusals.clear()

    def trim(self, now: float) -> None:
        """Delete the send times that are older than the longest memory."""
        del self.log[: bisect_left(self.log, now - 1.0 - MEMORIES[-1])]

    def _refused(self, now: float, sent_at: float) -> None:
        """Learn from a refusal for growth of the attempt sent at `sent_at`. The refusals of one burst count once."""
        index = bisect_left(self.log, sent_at)
        if index < len(self.log) and self.log[index] == sent_at:
            del self.log[index]
        if sent_at > self._cut_at:
            longer = min(max(2.0 * self._step_seconds, MIN_STEP_SECONDS), MAX_STEP_SECONDS)
            if not self.dormant:
                if bisect_right(self.log, self._cut_at) == index:  # no call was accepted since the last refusal
                    self._step_seconds = longer
                    return  # the provider refuses every call at present, so this refusal shows no limit
                agrees = self._count_not_refused(sent_at) + 1 >= AGREES * self.allowed(sent_at)
                self._step_seconds = longer if agrees else MIN_STEP_SECONDS
            self._refused_at = sent_at
        else:
            self._refused_at = min(self._refused_at, sent_at)
            self._refusals.pop(self._last, None)
        before, calls = self._rate_before(self._refused_at), self._count_not_refused(self._refused_at)
        self._last = round(log2(1.0 + before))
        self._refusals[self._last] = before, calls + min(FACTOR * before, PART) - BLUR * self.factor * before
        self._fit()
        self._cut_at = now
        self._grown = 1.0
        self.dormant = False

    def _fit(self) -> None:
        """Fit base and factor to the known refusals by least squares. The result would prevent the last refusal."""
        known = self._refusals.values()
        mean_before = sum(before for before, _ in known) / len(known)
        mean_calls = sum(calls for _, calls in known) / len(known)
        spread = sum((before - mean_before) ** 2 for before, _ in known)
        common = sum((before - mean_before) * (calls - mean_calls) for before, calls in known)
        factor = max((common + ASSUMED_WEIGHT * FACTOR) / (spread + ASSUMED_WEIGHT), 0.0)
        base = mean_calls - factor * mean_before
        before, calls = self._refusals[self._last]
        if (over := base + factor * before - calls) > 0.0:  # share `over` between base and factor by their variances
            over /= ASSUMED_WEIGHT + before**2
            base, factor = base - over * ASSUMED_WEIGHT, max(factor - over * before, 0.0)
        self.base, self.factor = max(base, MIN_BASE), factor
