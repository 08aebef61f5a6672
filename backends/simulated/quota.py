"""The limits of a simulated provider: policers as pure functions of time. Every call gets `now`; there is no clock.

A policer has no queue: it accepts or refuses a request at once. An oracle in a benchmark also
reads these objects (`would_accept`, `next_accept_at`, `true_rate`). Reading does not use up quota.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from math import inf
from random import Random
from typing import Literal, NamedTuple, Protocol, Self

from backends.base import ThrottleKind
from backends.simulated.profile import Profile, changed

#: The reason of a refusal. `outage` and `billing` apply to every request, whatever its cost.
Refusal = ThrottleKind | Literal["outage", "billing"]

#: The assumed cost of another tenant's request in LLM tokens: a 1080p frame and its description.
OTHER_TENANT_TOKENS = 1500


class Report(NamedTuple):
    """One limit as headers report it."""

    limit: float
    window: float
    """Seconds in which `limit` may be sent."""
    remaining: float
    reset: float
    """Seconds until the window ends, or until the bucket is full."""
    refills: bool
    """Whether the limit is a bucket, which refills continuously."""


class Gate(Protocol):
    """One limit. `cost` is in LLM tokens for a gate that counts them; for a gate that counts requests it is 1."""

    kind: ThrottleKind
    counts_tokens: bool

    def ready_at(self, now: float, cost: float) -> float:
        """Return the earliest time, not before `now`, at which the gate accepts `cost`.

        This is correct if the gate accepts no other request until then.
        """
        ...

    def charge(self, now: float, cost: float) -> None:
        """Charge an accepted request. Requests of other tenants are charged here too; they are never refused."""
        ...

    def charge_refusal(self, now: float, cost: float) -> None:
        """Charge a refused request. This is called only if the provider's refusals cost quota."""
        ...

    def rate(self, now: float, cost: float) -> float:
        """Return the requests/s that the gate allows at present, for requests of this cost."""
        ...

    def carry_over(self, old: Self, now: float) -> None:
        """Copy the used part of the quota from the gate `old`, which had other limits."""
        ...

    def report(self, now: float) -> Report | None:
        """Return the limit as headers report it; None if no provider reports such a limit."""
        ...


class Bucket:
    """Token bucket: it is refilled with `per_second` up to `burst`, and each request removes its cost.

    The state is the time at which the bucket is full again. This makes `ready_at` exact to the last bit: a request at
    exactly that time is accepted. A request that costs more than `burst` is accepted when the bucket is full, and
    leaves a debt. Apart from such requests, at most `per_second * t + burst` is accepted within any t seconds.
    """

    def __init__(self, kind: ThrottleKind, per_second: float, burst: float, now: float) -> None:
        self.kind: ThrottleKind = kind
        self.counts_tokens = kind == "token_rate"
        self._per_second = per_second
        self._burst = burst
        self._full_at = now

    def ready_at(self, now: float, cost: float) -> float:
        ready = self._full_at - (self._burst - min(cost, self._burst)) / self._per_second
        return ready if ready > now else now

    def charge(self, now: float, cost: float) -> None:
        self._full_at = max(self._full_at, now) + cost / self._per_second

    def charge_refusal(self, now: float, cost: float) -> None:
        """Remove the cost, or the whole content if that is less: a refusal does not leave a debt."""
        full_at = max(self._full_at, now)
        self._full_at = max(full_at, min(full_at + cost / self._per_second, now + self._burst / self._per_second))

    def rate(self, now: float, cost: float) -> float:
        return self._per_second / cost if cost > 0 else inf

    def carry_over(self, old: Self, now: float) -> None:
        """At the start, the same amount is missing as in the other bucket. It is refilled at this bucket's rate."""
        missing = min(max(0.0, old._full_at - now) * old._per_second, self._burst)
        self._full_at = now + missing / self._per_second

    def report(self, now: float) -> Report:
        """Report a window in which the bucket is filled once."""
        reset = max(self._full_at - now, 0.0)
        remaining = max(self._burst - reset * self._per_second, 0.0)
        return Report(self._burst, self._burst / self._per_second, remaining, reset, refills=True)


class FixedWindow:
    """At most `limit` requests in each window `[start + k * length, start + (k + 1) * length)`."""

    kind: ThrottleKind = "request_rate"
    counts_tokens = False

    def __init__(self, limit: float, length: float, start: float) -> None:
        self._limit = limit
        self._length = length
        self._start = start
        self._end = start + length
        self._count = 0.0

    def ready_at(self, now: float, cost: float) -> float:
        return now if now >= self._end or self._count + cost <= self._limit else self._end

    def charge(self, now: float, cost: float) -> None:
        if now >= self._end:
            index = int((now - self._start) / self._length)
            self._end = self._start + (index + 1) * self._length
            if self._end <= now:  # the division above was rounded down
                self._end = self._start + (index + 2) * self._length
            self._count = 0.0
        self._count += cost

    charge_refusal = charge

    def rate(self, now: float, cost: float) -> float:
        return self._limit / self._length

    def carry_over(self, old: Self, now: float) -> None:
        """Copy the count of the other gate, if both have the same windows."""
        if (self._start, self._length) == (old._start, old._length):
            self._end, self._count = old._end, old._count

    def report(self, now: float) -> Report:
        """Report the present window."""
        used = self._count if now < self._end else 0.0
        reset = self._length - (now - self._start) % self._length
        return Report(self._limit, self._length, max(self._limit - used, 0.0), reset, refills=False)


class SlidingWindow:
    """At most `limit` requests in any `(t - length, t]`. The log contains the times of the last `limit` requests."""

    kind: ThrottleKind = "request_rate"
    counts_tokens = False

    def __init__(self, limit: float, length: float) -> None:
        self._length = length
        self._log: deque[float] = deque(maxlen=max(1, int(limit)))

    def ready_at(self, now: float, cost: float) -> float:
        if len(self._log) < (self._log.maxlen or 0):
            return now
        return max(now, self._log[0] + self._length)

    def charge(self, now: float, cost: float) -> None:
        self._log.append(now)

    charge_refusal = charge

    def rate(self, now: float, cost: float) -> float:
        return (self._log.maxlen or 0) / self._length

    def carry_over(self, old: Self, now: float) -> None:
        """Copy the log of the other gate."""
        self._log.extend(old._log)

    def report(self, now: float) -> Report:
        """Report the requests of the last window. The window ends when its oldest request leaves it."""
        limit = float(self._log.maxlen or 0)
        used = len(self._log) - bisect_right(self._log, now - self._length)
        reset = self._log[-used] + self._length - now if used else 0.0
        return Report(limit, self._length, limit - used, reset, refills=False)


class Growth:
    """Accepted requests of the last second <= base + factor * (mean accepted/s over the `memory` seconds before it).

    `base` is in requests/s. The rule imitates DashScope's "Request rate increased too quickly", whose real rule is not
    published.
    """

    kind: ThrottleKind = "growth"
    counts_tokens = False

    def __init__(self, base: float, factor: float, memory: float) -> None:
        self._base = base
        self._factor = factor
        self._memory = memory
        self._log: list[float] = []

    def _allowed(self, now: float) -> float:
        before = bisect_right(self._log, now - 1) - bisect_right(self._log, now - 1 - self._memory)
        return self._base + self._factor * before / self._memory

    def _passes(self, now: float) -> bool:
        return len(self._log) - bisect_right(self._log, now - 1) + 1 <= self._allowed(now)

    def ready_at(self, now: float, cost: float) -> float:
        """An approximation: it checks only the times at which a logged request leaves the one-second window."""
        if self._passes(now):
            return now
        for taken in self._log[bisect_right(self._log, now - 1) :]:
            if self._passes(taken + 1):
                return taken + 1
        return inf  # with a base below 1 even the first request is never accepted

    def charge(self, now: float, cost: float) -> None:
        if len(self._log) > 64 and self._log[len(self._log) // 2] < now - 1 - self._memory:
            del self._log[: bisect_left(self._log, now - 1 - self._memory)]
        self._log.append(now)

    def charge_refusal(self, now: float, cost: float) -> None:
        """Do nothing: the rule counts accepted requests only."""

    def rate(self, now: float, cost: float) -> float:
        return self._allowed(now)

    def carry_over(self, old: Self, now: float) -> None:
        """Use the log of the other gate."""
        self._log = old._log

    def report(self, now: float) -> None:
        """Return None: no provider reports such a rule."""


class OtherTenants:
    """The other tenants of one gate. They use a fixed rate of `per_second` requests/s and are never refused.

    Their requests arrive at random intervals (a Poisson process) if `random` is given, else at equal intervals.
    """

    def __init__(self, gate: Gate, per_second: float, cost: float, random: Random | None, now: float) -> None:
        self._gate = gate
        self._per_second = per_second
        self._cost = cost
        self._random = random
        self._next = now + self._interval()

    def _interval(self) -> float:
        return self._random.expovariate(self._per_second) if self._random else 1 / self._per_second

    def advance(self, now: float) -> None:
        """Charge the requests that have arrived until now."""
        while self._next <= now:
            self._gate.charge(self._next, self._cost)
            self._next += self._interval()


def _gates(profile: Profile, epoch: float, now: float) -> Iterator[Gate]:
    if profile.growth_base_per_second < inf:
        yield Growth(profile.growth_base_per_second, profile.growth_factor, profile.growth_memory_seconds)
    if profile.requests_per_second < inf:
        yield Bucket("request_rate", profile.requests_per_second, profile.burst_requests, now)
    if profile.tokens_per_second < inf:
        yield Bucket("token_rate", profile.tokens_per_second, profile.burst_tokens, now)
    if profile.window_requests < inf:
        yield FixedWindow(profile.window_requests, profile.window_seconds, epoch)
    if profile.sliding_requests < inf:
        yield SlidingWindow(profile.sliding_requests, profile.sliding_seconds)


class Quota:
    """All limits of one account and model, and the other causes of refusals: outages, an empty account, punishment.

    All times are in seconds on the caller's clock. The times in the profile are relative to `start`. The calls must be
    made in the order of their times.
    """

    def __init__(self, profile: Profile, start: float, random: Random) -> None:
        self._random = random
        self._epoch = start
        self._gates: list[Gate] = []
        self._other_tenants: list[OtherTenants] = []
        self.in_flight = 0
        self._blackout_until = -inf
        self._blackout_kind: ThrottleKind = "unknown"
        self.change(profile, start)

    @property
    def profile(self) -> Profile:
        """The profile at the time of the last `arrive` or `advance`, with the scheduled changes until then."""
        return self._profile

    def change(self, profile: Profile, now: float) -> None:
        """Set another profile. The used part of each quota stays used."""
        self._start = now
        self._changes = deque(sorted(profile.changes, key=lambda change: change[0]))
        self._outages = [(now + start, now + end) for start, end in profile.outages]
        self._apply(profile, now)

    def _apply(self, profile: Profile, now: float) -> None:
        old = {(type(gate), gate.kind): gate for gate in self._gates}
        self._profile = profile
        self._gates = list(_gates(profile, self._epoch, now))
        for gate in self._gates:
            if (before := old.get((type(gate), gate.kind))) is not None:
                gate.carry_over(before, now)
        self._other_tenants = []
        if profile.others_share > 0:
            random = None if profile.others_steady else self._random
            for gate in self._gates:
                if not isinstance(gate, Growth):
                    cost = OTHER_TENANT_TOKENS if gate.counts_tokens else 1
                    per_second = profile.others_share * gate.rate(now, cost)
                    self._other_tenants.append(OtherTenants(gate, per_second, cost, random, now))

    def advance(self, now: float) -> None:
        """Apply the changes of the profile and the requests of other tenants that are due until `now`."""
        while self._changes and self._start + self._changes[0][0] <= now:
            after, values = self._changes.popleft()
            for tenants in self._other_tenants:
                tenants.advance(self._start + after)
            self._apply(changed(self._profile, values), self._start + after)
        for tenants in self._other_tenants:
            tenants.advance(now)

    def arrive(self, now: float, tokens: float) -> Refusal | None:
        """Accept or refuse a request that costs `tokens` LLM tokens. Returns None if it is accepted, else the reason.

        The caller must call `leave` when an accepted request ends.
        """
        self.advance(now)
        refusal = self._decide(now, tokens)
        if refusal is None:
            for gate in self._gates:
                gate.charge(now, tokens if gate.counts_tokens else 1)
            self.in_flight += 1
        elif refusal != "outage" and refusal != "billing":  # noqa: PLR1714  mypy narrows two comparisons only
            if self._profile.refusals_cost_quota:
                for gate in self._gates:
                    gate.charge_refusal(now, tokens if gate.counts_tokens else 1)
            if self._profile.punish_seconds > 0:
                self._blackout_until = now + self._profile.punish_seconds
                self._blackout_kind = refusal
        return refusal

    def leave(self) -> None:
        """Return the permit of an accepted request that has ended."""
        self.in_flight -= 1

    def _decide(self, now: float, tokens: float) -> Refusal | None:
        profile = self._profile
        if self._outages and any(start <= now < end for start, end in self._outages):
            return "outage"
        if profile.billing_refused:
            return "billing"
        if now < self._blackout_until:
            return self._blackout_kind
        if self.in_flight >= profile.concurrency:
            return "concurrency"
        for gate in self._gates:
            if gate.ready_at(now, tokens if gate.counts_tokens else 1) > now:
                return gate.kind
        return None

    def reports(self, now: float) -> Iterator[tuple[bool, Report]]:
        """Yield each limit as headers report it, and whether it counts LLM tokens."""
        self.advance(now)
        for gate in self._gates:
            if (report := gate.report(now)) is not None:
                yield gate.counts_tokens, report

    def would_accept(self, now: float, tokens: float) -> bool:
        """Return whether a request would be accepted now. The answer is exact."""
        self.advance(now)
        return self._decide(now, tokens) is None

    def next_accept_at(self, now: float, tokens: float) -> float:
        """Return the earliest time, not before `now`, at which a request would be accepted if no other request arrives.

        The time is exact for bucket, windows, punishment and outages. It is a best effort with the growth rule, with
        other tenants, or if a change of the profile is due. It is infinite while the account is empty or all permits
        are in use; in the second case, call this again after `leave`.
        """
        self.advance(now)
        if self._profile.billing_refused or self.in_flight >= self._profile.concurrency:
            return inf
        at = max(now, self._blackout_until)
        while at < inf:
            later = max((gate.ready_at(at, tokens if gate.counts_tokens else 1) for gate in self._gates), default=at)
            later = max((end for start, end in self._outages if start <= later < end), default=later)
            if later <= at:
                break
            at = later
        return at

    def true_rate(self, now: float, tokens: float) -> float:
        """Return the requests/s that this tenant may send at present, for requests that cost `tokens` LLM tokens.

        The share of other tenants is subtracted.
        """
        self.advance(now)
        profile = self._profile
        if profile.billing_refused or any(start <= now < end for start, end in self._outages):
            return 0.0
        rates = [
            gate.rate(now, tokens if gate.counts_tokens else 1)
            * (1 if isinstance(gate, Growth) else 1 - profile.others_share)
            for gate in self._gates
        ]
        if profile.latency_seconds > 0:
            rates.append(profile.concurrency / profile.latency_seconds)
        return min(rates, default=inf)
