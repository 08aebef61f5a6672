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
#: Maximum delay of the next probe by a Retry-After, in seconds: LITTLE_TRUST normally, MUCH_TRUST after two
#: Retry-Afters in a row were found to be true.
LITTLE_TRUST, MUCH_TRUST = 5.0, 30.0
#: Seconds. The circuit is expected to stay open for as long as it has been open already. This is the maximum of that
#: estimate.
MAX_GUESS = 60.0
#: In a blackout, a probe counts as accepted if it is not refused within this many seconds, or within three times the
#: usual time of a refusal if that is longer.
PATIENCE_SECONDS = 0.5
#: After the circuit closes, the number of attempts without an answer is limited to 2, then 4, 8, … up to MAX_RISING;
#: after that there is no limit. It doubles after each round of answers. An attempt counts as answered after
#: ANSWERED_SECONDS without a refusal or a failure, so that long answers do not delay the rise.
MAX_RISING, ANSWERED_SECONDS = 64, 2.0
#: Seconds between the first attempts, while nothing is known about the provider. A first refusal (which takes about
#: 50 ms) then stops the rest of the first burst.
COLD_STEP_SECONDS = 0.01


class Circuit:
    """Closed while `state` is None. While open, it lets one probe at a time pass, at the loop time `next_probe`."""

    __slots__ = (
        "_answered",
        "_cold",
        "_failed",
        "_failures",
        "_longest_failed_wait",
        "_on_change",
        "_on_close",
        "_probed_at",
        "_probes",
        "_random",
        "_refusal_seconds",
        "_retry_after_until",
        "_rising",
        "_sent_at",
        "_silent",
        "_step",
        "_true_retry_afters",
        "_unanswered",
        "_window_ends",
        "answer_seconds",
        "dormant",
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
        cold: bool = False,
        on_change: Callable[[Change], None] = lambda _: None,
    ) -> None:
        """`on_close` is called when a probe was accepted, with the state that ends; `on_change` with every new state.

        `window_ends` and `refusal_seconds` are functions of the learner of the request rate. `random` returns the
        jitter, from 0 to 1. `cold`: the first attempts are spaced, because nothing is known about the provider.
        """
        self.name: Cause = "hold"
        self.dormant = not cold
        self.state: CircuitState | None = None
        self.reason = ""
        self.since = 0.0
        self.next_probe = 0.0
        self.last_refused = 0.0
        self.gap = 0.0
        """Seconds from the last refusal to the successful probe in the previous blackout: this wait was long enough."""
        self.ends_by_itself = False
        """True: probes do not prolong a blackout, because it ends at a fixed time (for example with a quota window)."""
        self.answer_seconds = 0.0
        """Seconds that an answer takes, set by the upstream; 0 while none is known."""
        self._on_close = on_close
        self._window_ends = window_ends
        self._refusal_seconds = refusal_seconds
        self._random = random
        self._on_change = on_change
        self._probes: dict[Ticket, float] = {}  # in flight: send times. More than one only if an answer is slow
        self._probed_at = -inf  # send time of the latest probe
        self._cold = cold  # True until the first verdict
        self._sent_at = -inf  # send time of the latest attempt
        self._rising = 0  # while the load rises: maximum number of attempts without an answer; 0: no limit
        self._unanswered: dict[Ticket, float] = {}  # send time of each unanswered attempt, while `_cold` or rising
        self._answered = 0  # answers in the present round
        self._failures = self._silent = 0
        self._failed: set[Ticket] = set()
        self._step = FIRST_STEP
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

    def may_probe(self, now: float) -> bool:
        """Return True if a probe may be sent now, while the circuit is open.

        A probe without a verdict delays the next probe by at most MAX_STEP seconds.
        """
        return now >= self.next_probe and (not self._probes or now >= self._probed_at + MAX_STEP)

    # -- the gate ------------------------------------------------------------------------------------------------------

    @property
    def certain(self) -> bool:
        """See `Gate`."""
        return True

    def advance(self, now: float) -> None:
        """Count an attempt as answered if it was sent ANSWERED_SECONDS ago and no refusal came.

        Close the circuit if the probe was not refused in time.
        """
        if self._probe_passes_in(now) <= 0:
            self._close(now, self._probed_at)
        while self._unanswered and now >= next(iter(self._unanswered.values())) + ANSWERED_SECONDS:
            del self._unanswered[next(iter(self._unanswered))]
            if self._rising:
                self._rise()

    def opens_at(self, now: float, cost: float) -> float:
        """See `Gate`. While the circuit is open, the result is `now` if the half-open probe may be sent now."""
        if self.state is not None:
            if not self._probes:
                return max(now, self.next_probe)
            return min(now + self._probe_passes_in(now), max(now, self.next_probe, self._probed_at + MAX_STEP))
        if self._cold:
            return max(now, self._sent_at + COLD_STEP_SECONDS)
        if not self._rising:
            return now
        if self._rising <= len(self._unanswered):
            return next(iter(self._unanswered.values())) + ANSWERED_SECONDS
        if self._rising == 1:
            return now
        # Spread a round over the time of one answer: a burst would test only the provider's burst size, not its rate.
        answer_seconds = min(self.answer_seconds or ANSWERED_SECONDS, ANSWERED_SECONDS)
        return max(now, self._sent_at + answer_seconds / self._rising)

    def reserve(self, now: float, ticket: Ticket, cost: float, *, held: bool) -> Ticket:
        """See `Gate`. While the circuit is open, this attempt is the probe. Call it only if not `dormant`."""
        if self.state is not None:
            self._probes[ticket] = self._probed_at = now
        elif self._rising or self._cold:
            self._unanswered[ticket] = now
        self._sent_at = now
        return ticket

    def settle(self, now: float, reservation: Ticket, verdict: Verdict, *, blamed: Cause | None) -> None:
        """See `Gate`."""
        probed_at = self._probes.pop(reservation, None)
        is_probe = probed_at is not None
        if not self.dormant:
            self._rise_by(now, reservation, verdict)
        match verdict.outcome:
            case "accepted":
                self._forget_failures()
                if probed_at is not None:
                    self._close(now, probed_at)
            case "refused":
                self._forget_failures()
                if verdict.named == "capacity":
                    self._refused(now, CircuitState.CAPACITY, verdict, opens=is_probe or self.state is None)
                elif self.state is not None:
                    self._refused(now, self.state, verdict, opens=is_probe)
            case "failed":
                self._failures += 1
                if len(self._failed) < OUTAGE_TICKETS:  # more are not needed, and each keeps its request in memory
                    self._failed.add(reservation)
                down = self._failures >= OUTAGE_FAILURES and len(self._failed) >= OUTAGE_TICKETS
                if is_probe or (self.state is None and down):
                    self.open(now, CircuitState.OUTAGE, verdict.reason)
            case "timed_out":
                self._silent += 1
                if is_probe or (self.state is None and self._silent >= OUTAGE_SILENT):
                    self.open(now, CircuitState.OUTAGE, verdict.reason)
            case "account":
                self.open(now, CircuitState.BILLING, verdict.reason)
            case _:
                if probed_at is not None:  # the probe showed nothing (its caller left): keep the time between probes
                    step = BILLING_STEP if self.state is CircuitState.BILLING else self._step
                    if self.state is CircuitState.BLACKOUT:  # its caller had too little time even for a refusal
                        step = FIRST_STEP
                    self.next_probe = max(self.next_probe, probed_at + step)

    def seconds_for(self, now: float, ahead: Ahead) -> float:
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
        self.dormant = False
        self.reason = reason
        self.last_refused = now
        if state is not before:
            self._on_change(Change(now, "hold", 0.0, 0.0, state.value, reason))
        step = BILLING_STEP if state is CircuitState.BILLING else self._step * jitter
        if 0.0 < expected - now < 2.0 * step:
            step = min(expected - now, 1.2 * MAX_STEP)
        self.next_probe = now + step
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
        self._cold = False
        self._unanswered.clear()
        self._start_rising(2)  # the probe was the first round
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
        return self._probed_at + max(PATIENCE_SECONDS, 3 * self._refusal_seconds()) - now

    # -- rising slowly -------------------------------------------------------------------------------------------------

    def _rise_by(self, now: float, ticket: Ticket, verdict: Verdict) -> None:
        """Adjust how many attempts may be without an answer.

        An answered attempt counts towards the next doubling. After a refusal for capacity, or failures of two requests
        with no answer between them, start again at 1. (One failure is not enough: its request may be the cause.) After
        any other refusal, stop limiting: the gate that learns from that refusal sets the pace.
        """
        sent_at = self._unanswered.pop(ticket, None)
        was_sent = sent_at is not None
        good, bad = verdict.outcome == "accepted", verdict.outcome in ("refused", "failed")
        if self._cold and (good or bad):
            self._cold = False
            # After a refusal, the gate that learned from it raises the load slowly, by a factor of at most 1.42 per
            # attempt.
            learned = verdict.outcome == "refused" and verdict.named != "capacity"
            self._start_rising(1 if bad and not learned else 0)
        elif was_sent and good:
            self._rise()
        elif sent_at is not None and verdict.outcome == "abandoned" and self._rising:
            if now - sent_at >= max(PATIENCE_SECONDS, 3 * self._refusal_seconds()):  # a refusal would have come
                self._rise()
        elif was_sent and verdict.outcome == "refused" and verdict.named != "capacity":
            self._start_rising(0)
        elif was_sent and bad and (verdict.outcome == "refused" or self._failed - {ticket}):
            self._start_rising(1)

    def rise(self, now: float) -> None:
        """Let the load rise slowly from now on, because the learned limit was wrong."""
        if self.state is None:
            self._unanswered.clear()
            self._start_rising(2)

    def _rise(self) -> None:
        """Count one answer. Each complete round of answers doubles the allowed number of attempts without an answer."""
        self._answered += 1
        if self._answered >= self._rising:
            self._start_rising(2 * self._rising if self._rising < MAX_RISING else 0)

    def _start_rising(self, unanswered: int) -> None:
        self._rising, self._answered = unanswered, 0
        if not unanswered:
            self._unanswered.clear()
        self.dormant = self.state is None and not self._rising and not self._cold

    def _forget_failures(self) -> None:
        self._failures = self._silent = 0
        self._failed.clear()
