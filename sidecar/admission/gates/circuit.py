"""The circuit is closed while the provider answers. While open, it lets one half-open probe pass at a time."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from math import inf, isfinite

from sidecar.admission.gates.base import Ahead, Change, GateStatus, Verdict
from sidecar.admission.learning.learner import Recovery
from sidecar.admission.ticket import Cause, Ticket


class CircuitState(StrEnum):
    """Why the circuit is open. The values are labels of `sidecar_limit_state`."""

    OUTAGE = "outage"
    CAPACITY = "capacity"
    BLACKOUT = "blackout"
    """A limit refuses every call: the quota of a window is used up, or the provider punishes calls above the limit."""
    BILLING = "billing"
    QUOTA = "quota_period"
    """The quota of a day or of another long period is used up."""


#: The provider is down after OUTAGE_FAILURES consecutive failures (5xx, broken connections) of at least OUTAGE_TICKETS
#: different requests: one request that makes the provider fail each time is not an outage.
OUTAGE_FAILURES, OUTAGE_TICKETS = 6, 2
#: This many attempts in a row without a byte in time also open the circuit as an outage.
OUTAGE_SILENT = 3
#: If this many different requests fail in a row, the provider is the cause of the failures and not a request.
FAILING_TICKETS = 2
#: The step is the time from a refusal to the next probe. FIRST_STEP: the first step in seconds. The step grows by the
#: factor GROWTH while it is below SHORT_STEP seconds, then by SLOW_GROWTH, up to MAX_STEP seconds.
FIRST_STEP, GROWTH, SHORT_STEP, SLOW_GROWTH, MAX_STEP = 0.5, 2.0, 4.0, 1.25, 5.0
#: Seconds between two probes while the provider refuses the account.
BILLING_STEP = 30.0
#: Seconds between two probes while the quota of a long period is used up: QUOTA_STEP, then twice as long after each
#: refused probe, up to MAX_QUOTA_STEP. A probe is sent earlier if the provider reported that the period ends earlier.
QUOTA_STEP, MAX_QUOTA_STEP = 60.0, 1800.0
#: Maximum delay of the next probe by a Retry-After, in seconds: LITTLE_TRUST normally, MUCH_TRUST after two
#: Retry-Afters in a row were found to be true.
LITTLE_TRUST, MUCH_TRUST = 5.0, 30.0
#: Seconds. The circuit is expected to stay open for as long as it has been open already. This is the maximum of that
#: estimate.
MAX_GUESS = 60.0
#: In a blackout, a probe counts as accepted if it is not refused within this many seconds, or within three times the
#: usual time of a refusal if that is longer.
PATIENCE_SECONDS = 0.5


class Circuit:
    """Closed while `state` is None. While open, it lets one probe at a time pass, at the loop time `next_probe`."""

    __slots__ = (
        "_failed",
        "_failures",
        "_longest_failed_wait",
        "_on_change",
        "_on_close",
        "_probed_at",
        "_probes",
        "_quota_step",
        "_random",
        "_refusal_seconds",
        "_retry_after_until",
        "_silent",
        "_step",
        "_true_retry_afters",
        "_window_ends",
        "ends_at",
        "ends_by_itself",
        "gap",
        "last_refused",
        "name",
        "next_probe",
        "reason",
        "since",
        "state",
    )  # fmt: skip

    def __init__(
        self,
        *,
        on_close: Callable[[float, CircuitState, Recovery], None],
        window_ends: Callable[[float], float],
        refusal_seconds: Callable[[], float],
        random: Callable[[], float],
        on_change: Callable[[Change], None] = lambda _: None,
    ) -> None:
        """`on_close` is called when a probe was accepted, with the state that ends; `on_change` with every new state.

        `window_ends` and `refusal_seconds` are functions of the learner of the request rate. `random` returns the
        jitter, from 0 to 1.
        """
        self.name: Cause = "hold"
        self.state: CircuitState | None = None
        self.reason = ""
        self.since = 0.0
        self.next_probe = 0.0
        self.last_refused = 0.0
        self.gap = 0.0
        """Seconds from the last refusal to the successful probe in the previous blackout: this wait was long enough."""
        self.ends_at = inf
        """Loop time at which a used-up quota ends, as the provider reported it; inf if it reported no end."""
        self.ends_by_itself = False
        """True: probes do not prolong a blackout, because it ends at a fixed time (for example with a quota window)."""
        self._on_close = on_close
        self._window_ends = window_ends
        self._refusal_seconds = refusal_seconds
        self._random = random
        self._on_change = on_change
        self._probes: dict[Ticket, float] = {}  # in flight: send times. More than one only if an answer is slow
        self._probed_at = -inf  # send time of the latest probe
        self._failures = self._silent = 0
        self._failed: set[Ticket] = set()
        self._step = FIRST_STEP
        self._quota_step = QUOTA_STEP
        self._longest_failed_wait = 0.0  # the longest wait in seconds after which a probe was refused again
        self._retry_after_until = 0.0  # loop time at which the provider's latest Retry-After ends
        self._true_retry_afters = 0  # how many Retry-Afters in a row were found to be true

    def __repr__(self) -> str:
        opened = self.state and f"open {self.state.value} since={self.since:.3f} next_probe={self.next_probe:.3f}"
        return f"<Circuit {opened or 'closed'} probing={self.probing}>"

    @property
    def probing(self) -> bool:
        """True while a probe is in flight."""
        return bool(self._probes)

    @property
    def failing(self) -> bool:
        """True if the provider fails different requests in a row, so that no single request is the cause."""
        return self.state is not None or len(self._failed) >= FAILING_TICKETS

    @property
    def refuses_account(self) -> bool:
        """True while the provider refuses the account: it has no money, or the quota of a long period is used up."""
        return self.state in (CircuitState.BILLING, CircuitState.QUOTA)

    def others_fail(self, ticket: Ticket) -> bool:
        """Return True if other requests than this one failed since the last answer."""
        return bool(self._failed - {ticket})

    def may_probe(self, now: float) -> bool:
        """Return True if a probe may be sent now, while the circuit is open.

        A probe without a verdict delays the next probe by at most MAX_STEP seconds.
        """
        return now >= self.next_probe and (not self._probes or now >= self._probed_at + MAX_STEP)

    # -- the gate ------------------------------------------------------------------------------------------------------

    @property
    def dormant(self) -> bool:
        """See `Gate`: True while the circuit is closed."""
        return self.state is None

    def advance(self, now: float) -> None:
        """Close the circuit if the probe was not refused in time."""
        if self._probe_passes_in(now) <= 0:
            self._close(now, self._probed_at)

    def opens_at(self, now: float, cost: float) -> float:
        """See `Gate`. While the circuit is open, the result is `now` if the half-open probe may be sent now."""
        if self.state is None:
            return now
        if not self._probes:
            return max(now, self.next_probe)
        return min(now + self._probe_passes_in(now), max(now, self.next_probe, self._probed_at + MAX_STEP))

    def reserve(self, now: float, ticket: Ticket, cost: float, *, held: bool) -> Ticket:
        """See `Gate`. While the circuit is open, this attempt is the probe."""
        if self.state is not None:
            self._probes[ticket] = self._probed_at = now
        return ticket

    def settle(self, now: float, reservation: Ticket, verdict: Verdict, *, blamed: Cause | None) -> None:
        """See `Gate`."""
        if self.state is None and verdict.outcome == "accepted":  # the usual case
            if self._failures or self._silent:
                self._forget_failures()
            return
        probed_at = self._probes.pop(reservation, None)
        is_probe = probed_at is not None
        match verdict.outcome:
            case "accepted":
                self._forget_failures()
                if probed_at is not None:
                    self._close(now, probed_at)
            case "refused":
                self._forget_failures()
                if verdict.named == "capacity":
                    self._refused(now, CircuitState.CAPACITY, verdict, opens=is_probe or self.state is None)
                elif self.refuses_account and probed_at is not None:
                    # An ordinary limit refused the probe, so the account is accepted again: as after an accepted probe.
                    self._close(now, probed_at)
                elif self.state is not None:
                    self._refused(now, self.state, verdict, opens=is_probe)
            case "failed":
                self._failures += 1
                if len(self._failed) < OUTAGE_TICKETS:  # more are not needed, and each keeps its request in memory
                    self._failed.add(reservation)
                down = self._failures >= OUTAGE_FAILURES and len(self._failed) >= OUTAGE_TICKETS
                if self.refuses_account and is_probe:  # it shows nothing about the account
                    self.next_probe = now + MAX_STEP
                elif is_probe or (self.state is None and down):
                    self.open(now, CircuitState.OUTAGE, verdict.reason)
            case "timed_out":
                self._silent += 1
                if self.refuses_account and is_probe:
                    self.next_probe = now + MAX_STEP
                elif is_probe or (self.state is None and self._silent >= OUTAGE_SILENT):
                    self.open(now, CircuitState.OUTAGE, verdict.reason)
            case "account":
                state = CircuitState.QUOTA if verdict.named == "quota_period" else CircuitState.BILLING
                if is_probe or self.state is not state:
                    self.open(now, state, verdict.reason, verdict.retry_after)
            case _:
                if probed_at is not None:  # the probe showed nothing (its caller left): keep the time between probes
                    step = self._step
                    if self.state is CircuitState.BLACKOUT:  # its caller had too little time even for a refusal
                        step = FIRST_STEP
                    elif self.refuses_account:  # a long step would let callers that leave keep the circuit open
                        step = MAX_STEP
                    self.next_probe = max(self.next_probe, probed_at + step)

    def seconds_for(self, now: float, ahead: Ahead, *, guess: bool) -> float:
        """See `Gate`."""
        return self.seconds_left(now)

    def seconds_left(self, now: float) -> float:
        """Return an estimate of the seconds for which the circuit stays open; 0 if it is closed.

        The estimate is the time for which the circuit has been open, at most MAX_GUESS: for an event of unknown length,
        the median remaining time equals the elapsed time (Gott, 1993). It is at least the time until the next probe.
        In a blackout, it is also at least the time until `gap` seconds after the last refusal.
        """
        if self.state is None:
            return 0.0
        until = self.next_probe
        if self.state is CircuitState.BLACKOUT:
            until = max(until, self.last_refused + self.gap)
        return max(until - now, min(now - self.since, MAX_GUESS))

    def status(self, now: float) -> GateStatus:
        """See `Gate`."""
        if self.state is None:
            return GateStatus("hold", limit=None)
        return GateStatus(
            "hold", limit=None, state=self.state.value, why=self.reason, since=self.since, next_at=self.next_probe
        )

    # -- opening and closing -------------------------------------------------------------------------------------------

    def open(self, now: float, state: CircuitState, reason: str, retry_after: float | None = None) -> None:
        """Open the circuit, or keep it open after a failed probe."""
        expected = self._window_ends(now) if state is CircuitState.BLACKOUT else now
        jitter = 1.0 + 0.2 * self._random()
        if self.state is None:
            self.since = now
            self._retry_after_until = 0.0
            self._step = FIRST_STEP
            # Start with the wait that was enough in the previous blackout (`gap`). If a probe was refused after a wait
            # of `_longest_failed_wait`, start slightly above that.
            if state is CircuitState.BLACKOUT and not self.ends_by_itself:
                self._step = min(max(self.gap, 1.01 * self._longest_failed_wait, FIRST_STEP), MAX_STEP)
        elif state is self.state:
            if state is CircuitState.BLACKOUT:
                self._longest_failed_wait = max(self._longest_failed_wait, now - self.last_refused)
            self._step = min(self._step * (GROWTH if self._step < SHORT_STEP else SLOW_GROWTH), MAX_STEP)
        before, self.state = self.state, state
        self.reason = reason
        self.last_refused = now
        if state is not before:
            self._on_change(Change(now, "hold", 0.0, 0.0, state.value, reason))
        step = self._step * jitter
        if state is CircuitState.BILLING:
            step = BILLING_STEP
        elif state is CircuitState.QUOTA:
            self._quota_step = min(2.0 * self._quota_step, MAX_QUOTA_STEP) if before is state else QUOTA_STEP
            step = self._quota_step * jitter
        if 0.0 < expected - now < 2.0 * step:
            step = min(expected - now, 1.2 * MAX_STEP)
        self.next_probe = now + step
        if state is CircuitState.QUOTA:
            was_false = before is state and now >= self.ends_at  # the end that the provider reported before
            is_valid = isfinite(seconds := retry_after or 0.0) and seconds > 0
            self.ends_at = now + seconds if is_valid else inf
            if not was_false:
                self.next_probe = min(self.next_probe, max(self.ends_at, now + FIRST_STEP))
        else:
            self._heed(now, retry_after)

    def _close(self, now: float, probed_at: float) -> None:
        """Close the circuit, because the probe that was sent at `probed_at` was accepted."""
        state = self.state
        if state is None:
            return
        waited = max(probed_at - self.last_refused, 0.0)
        self._on_close(now, state, Recovery(self.since, probed_at, waited))
        if state is CircuitState.BLACKOUT:
            self.gap = waited
            if self.gap <= self._longest_failed_wait:
                # This wait was not longer than an earlier wait that failed. So the length of the wait does not matter:
                # a refused probe does not prolong the blackout, which ends by itself.
                self._longest_failed_wait = 0.0
        if self._retry_after_until:
            early = self._retry_after_until - probed_at
            if early > 0.5 * (self._retry_after_until - self.since):
                self._true_retry_afters = 0  # the probe was accepted long before the time that the provider named
            elif early <= 0 and self.last_refused < self._retry_after_until:
                self._true_retry_afters += 1
        self.state = None
        self.reason = ""
        self.next_probe = -inf
        self._probes.clear()
        self._on_change(Change(now, "hold", 0.0, 0.0, "", f"a probe was accepted after {now - self.since:.1f} s"))

    def _refused(self, now: float, state: CircuitState, verdict: Verdict, *, opens: bool) -> None:
        if opens:
            self.open(now, state, verdict.reason, verdict.retry_after)
        else:
            self._heed(now, verdict.retry_after)

    def _heed(self, now: float, retry_after: float | None) -> None:
        """
        Delay the next probe until a refusal's Retry-After (seconds) has passed. The newest value counts.

        It delays the probe by at most `trust` seconds, and never makes it earlier.
        """
        if retry_after is not None and isfinite(retry_after) and retry_after > 0:
            self._retry_after_until = now + retry_after
            trust = MUCH_TRUST if self._true_retry_afters >= 2 else LITTLE_TRUST
            self.next_probe = max(self.next_probe, now + min(retry_after, trust))

    def _probe_passes_in(self, now: float) -> float:
        """Return the seconds until a probe without a verdict counts as accepted.

        Infinite outside a blackout: in the other states, a missing refusal proves nothing.
        """
        if not self._probes or self.state is not CircuitState.BLACKOUT:
            return inf
        return self._probed_at + self.refusal_seconds() - now

    def refusal_seconds(self) -> float:
        """Return the seconds after which an attempt without a verdict was probably not refused."""
        return max(PATIENCE_SECONDS, 3 * self._refusal_seconds())

    def _forget_failures(self) -> None:
        self._failures = self._silent = 0
        self._failed.clear()
