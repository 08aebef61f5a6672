"""Admission closed but for one probe at a time: while the provider is down, has no room, or refuses everything."""

from __future__ import annotations

from enum import StrEnum
from math import inf, isfinite


class HoldKind(StrEnum):
    """Why admission is closed."""

    OUTAGE = "outage"
    CAPACITY = "capacity"
    BLACKOUT = "blackout"
    """Every call is refused for a limit: a used-up window, or a provider that punishes."""
    BILLING = "billing"


#: Seconds to the first probe; the factor between probes, up to a step of so many seconds and beyond; the longest step.
FIRST_STEP, GROWTH, SHORT_STEP, SLOW_GROWTH, MAX_STEP = 0.5, 2.0, 4.0, 1.25, 5.0
BILLING_STEP = 30.0
#: How long a Retry-After may put off the next probe: until the provider's word was found true, and after it was twice.
LITTLE_TRUST, MUCH_TRUST = 5.0, 120.0
#: Nothing is guessed to last longer than this many more.
MAX_GUESS = 60.0


class Hold:
    """Open while `kind` is None. While closed, `may_probe` says when the one probe may go."""

    __slots__ = (
        "_asked",
        "_confirmed",
        "_step",
        "_vain",
        "gap",
        "kind",
        "last_refused",
        "next_probe",
        "passes",
        "probing",
        "reason",
        "since",
    )

    def __init__(self) -> None:
        self.kind: HoldKind | None = None
        self.reason = ""
        self.since = 0.0
        self.next_probe = 0.0
        self.probing = False
        self.gap = 0.0
        """Seconds from the last refusal to the probe that was taken, in the blackout before: what it takes to wait."""
        self.passes = False
        """A blackout ends by itself, as that of a window does, however often is asked meanwhile."""
        self._step = FIRST_STEP
        self.last_refused = 0.0
        self._vain = 0.0  # the longest wait after a refusal that was refused too
        self._asked = 0.0  # the loop's time until which a Retry-After asked to wait
        self._confirmed = 0

    def close(
        self,
        now: float,
        kind: HoldKind,
        reason: str,
        retry_after: float | None = None,
        *,
        jitter: float = 1.0,
        expected: float = 0.0,
    ) -> None:
        """
        Close, or stay closed after a probe that failed too. `jitter` is what the step is multiplied by.

        `expected` is when it should end; only what is near makes a difference.
        """
        if self.kind is None:
            self.since = now
            self._asked = 0.0
            self._step = FIRST_STEP
            if kind is HoldKind.BLACKOUT and not self.passes:  # as long as it took, unless that was tried in vain
                self._step = min(max(self.gap, 1.01 * self._vain, FIRST_STEP), MAX_STEP)
        elif kind is self.kind:
            if kind is HoldKind.BLACKOUT:
                self._vain = max(self._vain, now - self.last_refused)
            self._step = min(self._step * (GROWTH if self._step < SHORT_STEP else SLOW_GROWTH), MAX_STEP)
        self.kind = kind
        self.reason = reason
        self.last_refused = now
        step = BILLING_STEP if kind is HoldKind.BILLING else self._step * jitter
        if 0.0 < expected - now < 2.0 * step:
            step = expected - now
        self.next_probe = now + step
        self.heard(now, retry_after)

    def heard(self, now: float, retry_after: float | None) -> None:
        """
        A refusal asks to wait so many seconds: the newest word counts. It may put the next probe off, as far as it is
        trusted, and never brings it forward.
        """
        if retry_after is not None and isfinite(retry_after) and retry_after > 0:
            self._asked = now + retry_after
            self.next_probe = max(self.next_probe, now + min(retry_after, self.trust))

    @property
    def trust(self) -> float:
        """Seconds that a Retry-After is believed at most."""
        return MUCH_TRUST if self._confirmed >= 2 else LITTLE_TRUST

    def open(self, probed_at: float | None = None) -> None:
        """The provider takes work again; `probed_at` is when the probe that it took was sent."""
        if probed_at is not None and self.kind is HoldKind.BLACKOUT:
            self.gap = probed_at - self.last_refused
            if self.gap <= self._vain:  # no penalty that begins anew with each refusal: it ends by itself
                self._vain = 0.0
        if probed_at is not None and self._asked:
            early = self._asked - probed_at
            if early > 0.5 * (self._asked - self.since):
                self._confirmed = 0  # it was taken long before the provider said
            elif early <= 0 and self.last_refused < self._asked:
                self._confirmed += 1
        self.kind = None
        self.reason = ""
        self.next_probe = -inf

    def seconds_left(self, now: float) -> float:
        """
        A guess at how long it stays closed: what has lasted some time lasts as long again, as half of such things do
        whatever their scale (Gott, 1993); a blackout as long as the one before, at least.
        """
        if self.kind is None:
            return 0.0
        until = self.next_probe
        if self.kind is HoldKind.BLACKOUT:
            until = max(until, self.last_refused + self.gap)
        return max(until - now, min(now - self.since, MAX_GUESS))

    def may_probe(self, now: float) -> bool:
        """While closed: the one probe may go now."""
        return not self.probing and now >= self.next_probe
