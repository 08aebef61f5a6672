"""The circuit is closed while the provider answers. While open, it lets one half-open probe pass at a time."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from math import inf
from typing import Literal

from sidecar.admission.gates.base import Ahead, Change, GateStatus, Verdict, VerdictOutcome
from sidecar.admission.gates.reported_waits import QUOTA_SECONDS, ReportedWaits, is_valid
from sidecar.admission.learning.learner import Recovery
from sidecar.admission.ticket import Cause, Ticket


class CircuitState(StrEnum):
    """Why the circuit is open. The values are labels of `sidecar_limit_state`."""

    OUTAGE = "outage"
    CAPACITY = "capacity"
    BLACKOUT = "blackout"
    """A limit refuses every call: the quota of a window is used up, or the provider punishes calls above the limit."""
    DOUBT = "account_doubt"
    """One call was refused because of the account or the key. A request of another key is the next probe. If none
    waits, the same request is sent again. So one wrong answer, or one refused request or key, closes nothing."""
    BILLING = "billing"
    UNAUTHORIZED = "unauthorized"
    """The provider refuses the sidecar's key."""
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
#: Seconds until the first probe and maximum seconds between two probes while the provider refuses the account. Each
#: refused probe doubles the time. A probe is sent earlier if the provider reported that a quota ends earlier.
ACCOUNT_STEPS: dict[CircuitState, tuple[float, float]] = {
    CircuitState.BILLING: (5.0, 30.0),
    CircuitState.UNAUTHORIZED: (5.0, 5.0),  # a new key is used soon
    CircuitState.QUOTA: (60.0, 1800.0),
}
#: These circuits open because of refusals of the account or the key, or of a used-up quota of a long period.
ACCOUNT_STATES = frozenset({CircuitState.DOUBT, *ACCOUNT_STEPS})
#: The account is refused to every key if it was refused to ENOUGH_KEYS that were not refused before the circuit opened,
#: or to MANY_KEYS of any kind. Until then, a request of a key that was not refused yet is a probe at once.
ENOUGH_KEYS, MANY_KEYS = 2, 8
#: Number of refused keys that are remembered. Bounds the memory.
MAX_REFUSED_KEYS = 256
#: While the account is refused, a key that was not refused yet may probe earlier by this share of the time between two
#: probes, and at most by MAX_STEP. Otherwise a refused key that asks all the time would always be the probe.
EARLIER_SHARE = 0.5
#: Seconds. The circuit is expected to stay open for as long as it has been open already. This is the maximum of that
#: estimate.
MAX_GUESS = 60.0
#: In a blackout, a probe counts as accepted if it is not refused within this many seconds, or within three times the
#: usual time of a refusal if that is longer.
PATIENCE_SECONDS = 0.5

#: What a verdict says to the circuit. `failed`: also no byte in time. `account`: the account or the key is refused.
Event = Literal["accepted", "refused", "capacity", "failed", "account", "quota", "nothing"]
#: What a probe's verdict does: close the circuit; keep it open for the same reason (`again`) or for another; send the
#: next probe, because this one showed nothing (`later`); open it for the reason that the verdict names (`confirmed`).
Move = CircuitState | Literal["close", "again", "later", "confirmed"]

_OTHER: dict[Event, Move] = {
    "accepted": "close", "refused": "again", "capacity": CircuitState.CAPACITY, "failed": CircuitState.OUTAGE,
    "account": CircuitState.DOUBT, "quota": CircuitState.QUOTA, "nothing": "later",
}  # fmt: skip
#: An ordinary limit that refuses a probe shows that the account is accepted. A failure shows nothing about it.
_ACCOUNT: dict[Event, Move] = _OTHER | {"refused": "close", "failed": "later", "account": "confirmed"}
#: The move after the verdict of a probe, by the state of the circuit.
MOVES: dict[CircuitState, dict[Event, Move]] = {
    CircuitState.OUTAGE: _OTHER,
    CircuitState.CAPACITY: _OTHER,
    CircuitState.BLACKOUT: _OTHER,
    CircuitState.DOUBT: _ACCOUNT | {"failed": CircuitState.OUTAGE},
    CircuitState.BILLING: _ACCOUNT,
    CircuitState.UNAUTHORIZED: _ACCOUNT,
    CircuitState.QUOTA: _ACCOUNT,
}
#: These verdicts open a closed circuit at once.
FIRST_MOVES: dict[Event, CircuitState] = {
    "capacity": CircuitState.CAPACITY, "account": CircuitState.DOUBT, "quota": CircuitState.QUOTA,
}  # fmt: skip


class Circuit:
    """Closed while `state` is None. While open, it lets one probe at a time pass, at the loop time `next_probe`."""

    __slots__ = (
        "_account_step",
        "_failed",
        "_failures",
        "_longest_failed_wait",
        "_on_change",
        "_on_close",
        "_others_at",
        "_probed_at",
        "_probes",
        "_random",
        "_refusal_seconds",
        "_refused_before",
        "_silent",
        "_step",
        "_unsuspected",
        "_waits",
        "_window_ends",
        "ends_at",
        "ends_by_itself",
        "gap",
        "last_refused",
        "name",
        "next_probe",
        "reason",
        "refused_keys",
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
        refused_before: Callable[[str, float], bool] = lambda key, at: False,
    ) -> None:
        """`on_close` is called when a probe was accepted, with the state that ends; `on_change` with every new state.

        `window_ends` and `refusal_seconds` are functions of the learner of the request rate. `random` returns the
        jitter, from 0 to 1. `refused_before` returns whether a key was refused before a loop time, and not accepted
        since.
        """
        self.name: Cause = "hold"
        self.state: CircuitState | None = None
        self.reason = ""
        self.since = 0.0
        self.next_probe = -inf
        """Loop time before which no probe may be sent; -inf while the circuit is closed."""
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
        self._refused_before = refused_before
        self._probes: dict[Ticket, float] = {}  # in flight: send times. More than one only if an answer is slow
        self._probed_at = -inf  # send time of the latest probe
        self._failures = self._silent = 0
        self._failed: set[Ticket] = set()
        self._step = FIRST_STEP
        self._account_step = 0.0  # seconds between two probes while the account is refused; 0: the next request probes
        self.refused_keys: set[str] = set()
        """The keys that were refused because of the account since the circuit opened for this reason."""
        self._unsuspected = 0  # how many of them were not refused before it opened
        self._others_at = -inf  # loop time from which another key may probe while only these are refused
        self._longest_failed_wait = 0.0  # the longest wait in seconds after which a probe was refused again
        self._waits = ReportedWaits()

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
        """True while the provider refuses the account: no money, a refused key, or a used-up quota of a long period.

        False while only one request was refused: requests wait, because the next one is the probe.
        """
        return self.state in ACCOUNT_STEPS and self._account_step > 0.0

    def others_fail(self, ticket: Ticket) -> bool:
        """Return True if other requests than this one failed since the last answer."""
        return bool(self._failed - {ticket})

    @property
    def refuses_few_keys(self) -> bool:
        """True if only the keys in `refused_keys` may be refused. A request of another key is a probe at once."""
        return (
            self._unsuspected < ENOUGH_KEYS and 0 < len(self.refused_keys) < MANY_KEYS and self.state in ACCOUNT_STATES
        )

    def refuses(self, now: float, key: str) -> bool:
        """Return True if a request of this key need not wait, because the account is refused and no probe is due."""
        if not self.refuses_account or (self.refuses_few_keys and key not in self.refused_keys):
            return False
        return not self.may_probe(now, key)

    def may_probe(self, now: float, key: str | None = None) -> bool:
        """Return True if a probe may be sent now, while the circuit is open. None: of any key.

        A probe without a verdict delays the next probe by at most MAX_STEP seconds.
        """
        return now >= self._next_probe_of(key) and (not self._probes or now >= self._probed_at + MAX_STEP)

    def _next_probe_of(self, key: str | None) -> float:
        """Return the loop time before which this key may not probe."""
        if key is None or not self.refused_keys or key in self.refused_keys or self.state not in ACCOUNT_STATES:
            return self.next_probe
        if self.refuses_few_keys:
            return self._others_at
        if self.state is CircuitState.QUOTA and self.ends_at < inf:
            return self.next_probe
        return self.next_probe - min(EARLIER_SHARE * self._account_step, MAX_STEP)

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
        return self.opens_for(now, None)

    def opens_for(self, now: float, key: str | None) -> float:
        """Return the loop time at which a ticket of this key may start (None: of any key)."""
        if self.state is None:
            return now
        at = max(now, self._next_probe_of(key))
        if not self._probes:
            return at
        return min(now + self._probe_passes_in(now), max(at, self._probed_at + MAX_STEP))

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
        event = _event(verdict)
        down = self._count(verdict.outcome, reservation)
        if self.state is None:
            state = CircuitState.OUTAGE if down else FIRST_MOVES.get(event)
            # The second refusal of one request, between accepted calls of others, is the request's own fault.
            if state is not None and not (event == "account" and reservation.doubted):
                self._note_refused(now, event, reservation.key)
                self.open(now, state, verdict.reason, verdict.retry_after)
        elif probed_at is not None:
            self._note_refused(now, event, reservation.key)
            self._probed(now, self.state, probed_at, event, verdict)
        elif event == "quota" and self.state is not CircuitState.QUOTA:
            self.open(now, CircuitState.QUOTA, verdict.reason, verdict.retry_after)
        elif event == "accepted" and (
            self.state is CircuitState.DOUBT or (self.refuses_few_keys and reservation.key not in self.refused_keys)
        ):
            self._close(now, None)
        elif verdict.outcome == "refused":
            self._heed(now, verdict.retry_after)

    def _note_refused(self, now: float, event: Event, key: str) -> None:
        if event in ("account", "quota") and key not in self.refused_keys and len(self.refused_keys) < MAX_REFUSED_KEYS:
            self.refused_keys.add(key)
            opened_at = now if self.state not in ACCOUNT_STATES else self.since
            self._unsuspected += not self._refused_before(key, opened_at)

    def _forget_refused(self) -> None:
        self.refused_keys.clear()
        self._unsuspected = 0

    def _count(self, outcome: VerdictOutcome, ticket: Ticket) -> bool:
        """Count the failures in a row. Return True if the provider is down."""
        if outcome in ("accepted", "refused"):
            self._forget_failures()
        elif outcome == "timed_out":
            self._silent += 1
            return self._silent >= OUTAGE_SILENT
        elif outcome == "failed":
            self._failures += 1
            if len(self._failed) < OUTAGE_TICKETS:  # more are not needed, and each keeps its request in memory
                self._failed.add(ticket)
            return self._failures >= OUTAGE_FAILURES and len(self._failed) >= OUTAGE_TICKETS
        return False

    def _probed(self, now: float, state: CircuitState, probed_at: float, event: Event, verdict: Verdict) -> None:
        """Make the move that follows the verdict of the probe that was sent at `probed_at`; see `MOVES`."""
        if state is CircuitState.QUOTA and self._waits.is_same_end(now, verdict.retry_after):
            event = "quota"  # whatever the provider calls it
        move = MOVES[state][event]
        if move == "close":
            self._close(now, probed_at)
        elif move == "later":
            # The probe showed nothing, for example because its caller left: keep the time between probes.
            step = self._step
            if state is CircuitState.BLACKOUT:  # its caller had too little time even for a refusal
                step = FIRST_STEP
            elif state in ACCOUNT_STEPS:  # a long step would let callers that leave keep the circuit open
                step = MAX_STEP
            self.next_probe = max(self.next_probe, probed_at + step)
            self._others_at = probed_at + FIRST_STEP
        else:
            if move == "again":
                move = state
            elif move == "confirmed":
                move = CircuitState.UNAUTHORIZED if verdict.named == "unauthorized" else CircuitState.BILLING
            self.open(now, move, verdict.reason, verdict.retry_after)

    def seconds_for(self, now: float, ahead: Ahead, *, guess: bool) -> float:
        """See `Gate`."""
        return self.seconds_left(now)

    def seconds_left(self, now: float) -> float:
        """Return an estimate of the seconds for which the circuit stays open; 0 if it is closed.

        The estimate is the time for which the circuit has been open, at most MAX_GUESS: for an event of unknown length,
        the median remaining time equals the elapsed time (Gott, 1993). It is at least the time until the next probe.
        In a blackout, it is also at least the time until `gap` seconds after the last refusal. 0 while few keys were
        refused because of the account, because a request of another key need not wait.
        """
        if self.state is None or self.refuses_few_keys:
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
            self._waits.begin()
            self._step = FIRST_STEP
            # Start with the wait that was enough in the previous blackout (`gap`). If a probe was refused after a wait
            # of `_longest_failed_wait`, start slightly above that.
            if state is CircuitState.BLACKOUT and not self.ends_by_itself:
                self._step = min(max(self.gap, 1.01 * self._longest_failed_wait, FIRST_STEP), MAX_STEP)
        elif state is self.state:
            if state is CircuitState.BLACKOUT:
                self._longest_failed_wait = max(self._longest_failed_wait, now - self.last_refused)
            self._step = min(self._step * (GROWTH if self._step < SHORT_STEP else SLOW_GROWTH), MAX_STEP)
        if self._waits.show_used_up_quota(now, retry_after) and state in (CircuitState.CAPACITY, CircuitState.BLACKOUT):
            state = CircuitState.QUOTA
            reason = f"{reason}; for {QUOTA_SECONDS:.0f} s it has named the same end for every call"
        before, self.state = self.state, state
        self.reason = reason
        if state not in ACCOUNT_STATES:
            self._forget_refused()
        if before not in ACCOUNT_STATES:
            self._others_at = -inf
        self.last_refused = now
        if state is not before:
            self._on_change(Change(now, "hold", 0.0, 0.0, state.value, reason))
        step = self._step * jitter
        if state in ACCOUNT_STEPS:
            first, longest = ACCOUNT_STEPS[state]
            if before is state:
                if now >= self.next_probe - MAX_STEP:  # else another key confirms the first refusal
                    self._account_step = min(max(2.0 * self._account_step, first), longest)
            else:
                # Only one request was refused. If this is its own fault, the next request shows it at once.
                is_unsure = self._unsuspected < ENOUGH_KEYS and (before, state) == (
                    CircuitState.DOUBT,
                    CircuitState.UNAUTHORIZED,
                )
                self._account_step = 0.0 if is_unsure else first
            step = self._account_step * jitter
        if 0.0 < expected - now < 2.0 * step:
            step = min(expected - now, 1.2 * MAX_STEP)
        self.next_probe = now + step
        if state is CircuitState.QUOTA:
            was_false = before is state and now >= self.ends_at  # the end that the provider reported before
            self.ends_at = now + retry_after if is_valid(retry_after) else inf
            if not was_false:
                self.next_probe = min(self.next_probe, max(self.ends_at, now + FIRST_STEP))
        else:
            self._heed(now, retry_after)
            if before is state is CircuitState.CAPACITY and is_valid(retry_after):
                self._waits.double()

    def _close(self, now: float, probed_at: float | None) -> None:
        """Close the circuit, because the probe that was sent at `probed_at` was accepted.

        None: another call was accepted, which shows that there was no reason to open.
        """
        state = self.state
        if state is None:
            return
        if probed_at is not None:
            self._learn(now, state, probed_at)
        self.state = None
        self.reason = ""
        self.next_probe = -inf
        self._probes.clear()
        self._forget_refused()
        why = "a probe" if probed_at is not None else "another call"
        self._on_change(Change(now, "hold", 0.0, 0.0, "", f"{why} was accepted after {now - self.since:.1f} s"))

    def _learn(self, now: float, state: CircuitState, probed_at: float) -> None:
        """Learn from the waits that were long enough or too short."""
        waited = max(probed_at - self.last_refused, 0.0)
        self._on_close(now, state, Recovery(self.since, probed_at, waited))
        if state is CircuitState.BLACKOUT:
            self.gap = waited
            if self.gap <= self._longest_failed_wait:
                # This wait was not longer than an earlier wait that failed. So the length of the wait does not matter:
                # a refused probe does not prolong the blackout, which ends by itself.
                self._longest_failed_wait = 0.0
        self._waits.judge(self.since, self.last_refused, probed_at)

    def _heed(self, now: float, retry_after: float | None) -> None:
        """Delay the next probe until a refusal's Retry-After (seconds) has passed, as far as it is believed.

        The newest value counts. It never makes the probe earlier.
        """
        self.next_probe = max(self.next_probe, self._waits.delay(now, retry_after, self.last_refused))

    def _probe_passes_in(self, now: float) -> float:
        """Return the seconds until a probe without a verdict counts as accepted.

        Infinite if a missing refusal proves nothing: outside a blackout, and if more than one request was refused
        because of the account. Refusals of the account come as soon as usual refusals, but no time is known for them.
        """
        if not self._probes or self.state is None:
            return inf
        if self.state is CircuitState.BLACKOUT:
            return self._probed_at + self.refusal_seconds() - now
        is_unsure = self.state is CircuitState.DOUBT or (self.state in ACCOUNT_STEPS and not self.refuses_account)
        return self._probed_at + MAX_STEP - now if is_unsure else inf

    def refusal_seconds(self) -> float:
        """Return the seconds after which an attempt without a verdict was probably not refused."""
        return max(PATIENCE_SECONDS, 3 * self._refusal_seconds())

    def _forget_failures(self) -> None:
        self._failures = self._silent = 0
        self._failed.clear()


def _event(verdict: Verdict) -> Event:
    match verdict.outcome:
        case "refused":
            return "capacity" if verdict.named == "capacity" else "refused"
        case "account":
            return "quota" if verdict.named == "quota_period" else "account"
        case "timed_out":
            return "failed"
        case "abandoned":
            return "nothing"
        case outcome:
            return outcome
