"""What a provider allows: policers as pure functions of time. No clock, no asyncio: every call is told `now`.

A policer never queues: a request passes at once or is refused at once. The same objects answer, without side effects,
what an oracle would ask (`would_accept`, `next_accept_at`, `true_rate`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from math import inf
from random import Random
from typing import Literal, Protocol, Self

from backends.base import ThrottleKind
from backends.simulated.profile import Profile, changed

#: Why a request does not pass. `outage` and `billing` hold for everything, whatever its cost.
Refusal = ThrottleKind | Literal["outage", "billing"]

#: LLM tokens that a request of another tenant is taken to cost: a 1080p frame and its description.
OTHERS_TOKENS = 1500


class Gate(Protocol):
    """One limit. `cost` is 1 for a gate that counts requests, LLM tokens for one that counts those."""

    kind: ThrottleKind
    counts_tokens: bool

    def ready_at(self, now: float, cost: float) -> float:
        """Give the first instant from `now` on at which `cost` passes if nothing else does meanwhile."""
        ...

    def take(self, now: float, cost: float) -> None:
        """Charge what passed, or what other tenants took, who are never refused."""
        ...

    def charge_refusal(self, now: float, cost: float) -> None:
        """Charge a refused request, at a provider whose refusals cost quota."""
        ...

    def rate(self, now: float, cost: float) -> float:
        """Give the requests/s of `cost` that it allows at present."""
        ...

    def inherit(self, old: Self, now: float) -> None:
        """Take over what was used up under other numbers."""
        ...


class Bucket:
    """Token bucket: `per_second` flow in, up to `burst`, each request takes its cost.

    Kept as the time at which the bucket is full again, so that `ready_at` is exact to the last bit: a request sent at
    that very instant passes. A request that costs more than the bucket holds passes when it is full, and leaves a debt:
    but for such ones, no stretch of t seconds ever passes more than `per_second * t + burst`.
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

    def take(self, now: float, cost: float) -> None:
        self._full_at = max(self._full_at, now) + cost / self._per_second

    def charge_refusal(self, now: float, cost: float) -> None:
        """Take what there is: a bucket that only counts what it gives does not go below empty."""
        full_at = max(self._full_at, now)
        self._full_at = max(full_at, min(full_at + cost / self._per_second, now + self._burst / self._per_second))

    def rate(self, now: float, cost: float) -> float:
        return self._per_second / cost if cost > 0 else inf

    def inherit(self, old: Self, now: float) -> None:
        """Go on with another bucket's missing amount, at this one's rate."""
        missing = min(max(0.0, old._full_at - now) * old._per_second, self._burst)
        self._full_at = now + missing / self._per_second


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

    def take(self, now: float, cost: float) -> None:
        if now >= self._end:
            index = int((now - self._start) / self._length)
            self._end = self._start + (index + 1) * self._length
            if self._end <= now:  # the division was rounded
                self._end = self._start + (index + 2) * self._length
            self._count = 0.0
        self._count += cost

    charge_refusal = take

    def rate(self, now: float, cost: float) -> float:
        return self._limit / self._length

    def inherit(self, old: Self, now: float) -> None:
        """Go on with the other's count, if the windows are the same."""
        if (self._start, self._length) == (old._start, old._length):
            self._end, self._count = old._end, old._count


class SlidingWindow:
    """At most `limit` requests in any `(t - length, t]`: a log of the last `limit` times."""

    kind: ThrottleKind = "request_rate"
    counts_tokens = False

    def __init__(self, limit: float, length: float) -> None:
        self._length = length
        self._log: deque[float] = deque(maxlen=max(1, int(limit)))

    def ready_at(self, now: float, cost: float) -> float:
        if len(self._log) < (self._log.maxlen or 0):
            return now
        return max(now, self._log[0] + self._length)

    def take(self, now: float, cost: float) -> None:
        self._log.append(now)

    charge_refusal = take

    def rate(self, now: float, cost: float) -> float:
        return (self._log.maxlen or 0) / self._length

    def inherit(self, old: Self, now: float) -> None:
        """Go on with the other's log."""
        self._log.extend(old._log)


class Growth:
    """Accepted requests of the last second <= base + factor * (mean accepted/s over the `memory` seconds before it).

    In the spirit of DashScope's "Request rate increased too quickly": the real rule is not published.
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
        """Best effort: looks at the instants at which one of the last second's requests grows old."""
        if self._passes(now):
            return now
        for taken in self._log[bisect_right(self._log, now - 1) :]:
            if self._passes(taken + 1):
                return taken + 1
        return inf  # a base below 1 never lets a first request pass

    def take(self, now: float, cost: float) -> None:
        if len(self._log) > 64 and self._log[len(self._log) // 2] < now - 1 - self._memory:
            del self._log[: bisect_left(self._log, now - 1 - self._memory)]
        self._log.append(now)

    def charge_refusal(self, now: float, cost: float) -> None:
        """Nothing: the rule looks at what was accepted."""

    def rate(self, now: float, cost: float) -> float:
        return self._allowed(now)

    def inherit(self, old: Self, now: float) -> None:
        """Go on with the other's log."""
        self._log = old._log


class Others:
    """Other tenants on one gate: a background that takes a fixed share and is never refused itself."""

    def __init__(self, gate: Gate, per_second: float, cost: float, random: Random | None, now: float) -> None:
        self._gate = gate
        self._per_second = per_second
        self._cost = cost
        self._random = random
        self._next = now + self._interval()

    def _interval(self) -> float:
        return self._random.expovariate(self._per_second) if self._random else 1 / self._per_second

    def advance(self, now: float) -> None:
        """Take what came until now."""
        while self._next <= now:
            self._gate.take(self._next, self._cost)
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
    """All the limits of one account and model, and what else refuses: outages, an empty account, punishment.

    Times are absolute, on whatever clock the caller uses; those in the profile count from `start`. Calls must come in
    the order of their times.
    """

    def __init__(self, profile: Profile, start: float, random: Random) -> None:
        self._random = random
        self._epoch = start
        self._gates: list[Gate] = []
        self._others: list[Others] = []
        self.in_flight = 0
        self._blackout_until = -inf
        self._blackout_kind: ThrottleKind = "unknown"
        self.change(profile, start)

    @property
    def profile(self) -> Profile:
        """What is in force since the last `arrive` or `advance`, with the changes that have come by then."""
        return self._profile

    def change(self, profile: Profile, now: float) -> None:
        """Put another profile in force from now on. What was used up stays used up."""
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
                gate.inherit(before, now)
        self._others = []
        if profile.others_share > 0:
            random = None if profile.others_steady else self._random
            for gate in self._gates:
                if not isinstance(gate, Growth):
                    cost = OTHERS_TOKENS if gate.counts_tokens else 1
                    self._others.append(Others(gate, profile.others_share * gate.rate(now, cost), cost, random, now))

    def advance(self, now: float) -> None:
        """Let pass what happens by itself: the profile's changes, and the other tenants."""
        while self._changes and self._start + self._changes[0][0] <= now:
            after, values = self._changes.popleft()
            for others in self._others:
                others.advance(self._start + after)
            self._apply(changed(self._profile, values), self._start + after)
        for others in self._others:
            others.advance(now)

    def arrive(self, now: float, tokens: float) -> Refusal | None:
        """Judge a request of so many LLM tokens: None if it passes, and then `leave` must follow when it is over."""
        self.advance(now)
        refusal = self._judge(now, tokens)
        if refusal is None:
            for gate in self._gates:
                gate.take(now, tokens if gate.counts_tokens else 1)
            self.in_flight += 1
        elif refusal != "outage" and refusal != "billing":  # noqa: PLR1714  the type checker narrows by these
            if self._profile.refusals_cost_quota:
                for gate in self._gates:
                    gate.charge_refusal(now, tokens if gate.counts_tokens else 1)
            if self._profile.punish_seconds > 0:
                self._blackout_until = now + self._profile.punish_seconds
                self._blackout_kind = refusal
        return refusal

    def leave(self) -> None:
        """Take note that a request that passed is over."""
        self.in_flight -= 1

    def _judge(self, now: float, tokens: float) -> Refusal | None:
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

    def would_accept(self, now: float, tokens: float) -> bool:
        """Tell whether a request would pass now. Exact."""
        self.advance(now)
        return self._judge(now, tokens) is None

    def next_accept_at(self, now: float, tokens: float) -> float:
        """Give the first instant from now on at which a request would pass if no other came meanwhile.

        Exact for bucket, windows, punishment and outages; best effort where the growth rule or other tenants are at
        work or a change is due. Infinite while the account is empty or all permits are taken: ask again when a request
        has left.
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
        """Give the requests/s of `tokens` that this tenant is allowed at present, less what others take."""
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
