"""The circuit: while the provider is down, has no capacity, or refuses every call, only one probe at a time is sent."""

from __future__ import annotations

from enum import StrEnum
from math import inf, isfinite


class HoldKind(StrEnum):
    """Why admission is closed."""

    OUTAGE = "outage"
    CAPACITY = "capacity"
    BLACKOUT = "blackout"
    """A limit refuses every call: the quota of a window is used up, or the provider punishes calls above the limit."""
    BILLING = "billing"


#: The step is the time from a refusal to the next probe. FIRST_STEP: the first step in seconds. The step grows by the
#: factor GROWTH while it is below SHORT_STEP seconds, then by SLOW_GROWTH, up to MAX_STEP seconds.
FIRST_STEP, GROWTH, SHORT_STEP, SLOW_GROWTH, MAX_STEP = 0.5, 2.0, 4.0, 1.25, 5.0
#: Seconds between probes while the provider refuses the account.
BILLING_STEP = 30.0
#: Seconds by which a Retry-After may delay the next probe: normally, and after it was twice found to be true.
LITTLE_TRUST, MUCH_TRUST = 5.0, 120.0
#: Longest estimate, in seconds, of the time for which admission stays closed.
MAX_GUESS = 60.0


class Hold:
    """Admission is open while `kind` is None. While it is closed, `may_probe` returns True if a probe may be sent."""

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
        """Seconds from the last refusal to the successful probe in the previous blackout: this wait was long enough."""
        self.passes = False
        """True: blackouts end by themselves, for example with a quota window, however often probes are sent."""
        self._step = FIRST_STEP
        self.last_refused = 0.0
        self._vain = 0.0  # the longest wait in seconds after which a probe was refused again
        self._asked = 0.0  # loop time until which a Retry-After asked to wait
        self._confirmed = 0

    def __repr__(self) -> str:
        closed = self.kind and f"{self.kind.value} since={self.since:.3f} next_probe={self.next_probe:.3f}"
        return f"<Hold {closed or 'open'} probing={self.probing}>"

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
        Close admission, or keep it closed after a failed probe. `jitter` is a factor on the step.

        `expected` is the loop time at which the closure should end. It replaces the step if it is less than two steps
        away.
        """
        if self.kind is None:
            self.since = now
            self._asked = 0.0
            self._step = FIRST_STEP
            if kind is HoldKind.BLACKOUT and not self.passes:
                # Begin with the wait that was enough last time, but with more than the longest wait that failed.
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
        Take account of a refusal's Retry-After in seconds. The newest value counts.

        It may delay the next probe, by at most `trust` seconds. It never makes the next probe earlier.
        """
        if retry_after is not None and isfinite(retry_after) and retry_after > 0:
            self._asked = now + retry_after
            self.next_probe = max(self.next_probe, now + min(retry_after, self.trust))

    @property
    def trust(self) -> float:
        """Seconds for which a Retry-After is believed at most."""
        return MUCH_TRUST if self._confirmed >= 2 else LITTLE_TRUST

    def open(self, probed_at: float | None = None) -> None:
        """Open admission: the provider accepts work again. `probed_at` is the send time of the successful probe."""
        if probed_at is not None and self.kind is HoldKind.BLACKOUT:
            self.gap = probed_at - self.last_refused
            if self.gap <= self._vain:
                # A shorter wait was enough. So a refusal does not restart a penalty: the blackout ends by itself.
                self._vain = 0.0
        if probed_at is not None and self._asked:
            early = self._asked - probed_at
            if early > 0.5 * (self._asked - self.since):
                self._confirmed = 0  # the probe was accepted long before the time that the provider named
            elif early <= 0 and self.last_refused < self._asked:
                self._confirmed += 1
        self.kind = None
        self.reason = ""
        self.next_probe = -inf

    def seconds_left(self, now: float) -> float:
        """
        Return an estimate of the seconds for which admission stays closed; 0 while it is open.

        The estimate is the time since it closed: if the scale is unknown, the median of the remaining duration equals
        the time that has passed (Gott, 1993). A blackout lasts at least as long as the previous one.
        """
        if self.kind is None:
            return 0.0
        until = self.next_probe
        if self.kind is HoldKind.BLACKOUT:
            until = max(until, self.last_refused + self.gap)
        return max(until - now, min(now - self.since, MAX_GUESS))

    def may_probe(self, now: float) -> bool:
        """Return True if the single probe may be sent now. Only meaningful while admission is closed."""
        return not self.probing and now >= self.next_probe
