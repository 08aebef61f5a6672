"""The interface of a gate, the outcome of an attempt, and the statuses for metrics, status page and log.

A gate is one condition that can delay a ticket: a request rate, a token rate, growth, concurrency, or the circuit. All
methods are synchronous and take `now` (seconds on the event loop's clock). A gate never waits and sets no timer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from sidecar.admission.learning.reported import ReportedLimit, ReportedStatus
from sidecar.admission.ticket import Cause, Ticket

VerdictOutcome = Literal["accepted", "refused", "failed", "timed_out", "account", "abandoned"]
#: The limits that a provider can name in a refusal.
Dimension = Literal["request_rate", "token_rate", "growth", "concurrency", "capacity", "quota_period", "unauthorized"]


class Verdict(NamedTuple):
    """The outcome of one attempt.

    A tuple, because each attempt makes one and a frozen dataclass takes four times as long to make.
    """

    outcome: VerdictOutcome
    """`accepted`: the request passed the limits. `refused`: a limit refused it. `failed`: 5xx or a broken connection.
    `timed_out`: no byte came in time. `account`: the provider refuses the account (billing, key). `abandoned`: the
    attempt ended without an answer that shows whether the provider accepted it."""
    at: float
    """Loop time at which the outcome was known."""
    named: Dimension | None = None
    """The limit that the provider named in a refusal; None if it named no limit. With the outcome `account`:
    `quota_period` (the quota of a day or of another long period is used up), `unauthorized` (the key is refused), or
    None (money)."""
    usage: tuple[int, int] | None = None
    """LLM tokens of input and output, as the provider counted them."""
    retry_after: float | None = None
    """The provider's Retry-After in seconds."""
    reason: str = ""
    """Why the attempt got no answer. Empty: it got one, or its caller left."""
    limits: tuple[ReportedLimit, ...] = ()
    """The limits that the answer's headers report."""
    counted_at: float | None = None
    """Loop time at which the provider says that it counted the request; None if it does not say so."""


class Ahead(NamedTuple):
    """The requests and LLM tokens that must be sent up to and including one position in the queue."""

    requests: float
    tokens: float
    """LLM tokens, as the upstream estimates them."""


@dataclass(frozen=True, slots=True)
class GateStatus:
    """The state of a gate, for operators. Rates are per second."""

    name: Cause
    limit: float | None
    """The learned limit; None while none is known."""
    pace: float | None = None
    """The rate that is allowed now; None if the gate limits no rate now. Concurrency: the allowed attempts in
    flight."""
    state: str = ""
    why: str = ""
    """Why the limit or the state last changed."""
    since: float = 0.0
    """Loop time of the last change, in seconds."""
    burst: float | None = None
    """Burst: calls or LLM tokens that can be sent at once after a pause."""
    error: float | None = None
    """The relative error of the limit: its uncertainty as a share of the limit."""
    factor: float | None = None
    """Growth gate only: allowed calls/s as a multiple of the earlier calls/s."""
    in_flight: int | None = None
    """Concurrency gate only: attempts that hold a permit."""
    next_at: float | None = None
    """Circuit only: loop time at which the next probe may be sent."""
    reported: ReportedStatus | None = None
    """Rates only: the limit that the provider's headers report."""


@dataclass(frozen=True, slots=True)
class Change:
    """A learned limit or its state changed, or the circuit opened or closed."""

    at: float
    """Loop time of the change."""
    dimension: Cause
    old: float
    new: float
    """`old` and `new` are the limit before and after the change, per second. Infinite: unknown. 0 for the circuit."""
    state: str
    """The learner's state, or the circuit's state; empty if the circuit has closed."""
    reason: str


class Gate(Protocol):
    """One condition that can delay a ticket."""

    name: Cause

    dormant: bool
    """True: the gate is open at present, so callers need not ask it."""

    def advance(self, now: float) -> None:
        """Update the gate to the time `now`. Call it before the methods below."""
        ...

    def opens_at(self, now: float, cost: float) -> float:
        """Return the loop time at which an attempt of `cost` LLM tokens may start. Has no side effects.

        `now`: the gate is open. inf: the gate opens only after an event, for example the end of an attempt.
        """
        ...

    def reserve(self, now: float, ticket: Ticket, cost: float, *, held: bool) -> Any:
        """Record that an attempt of this ticket starts, and return its reservation for `settle`.

        `held`: this gate delayed the attempt.
        """
        ...

    def settle(self, now: float, reservation: Any, verdict: Verdict, *, blamed: Cause | None) -> None:
        """Record that the attempt has ended. Call it exactly once for each reservation.

        `blamed` is the cause of a refusal: the gate that must learn from it. None: no gate learns from it.
        """
        ...

    def seconds_for(self, now: float, ahead: Ahead, *, guess: bool) -> float:
        """Return the seconds after which this gate has let all of `ahead` start.

        `guess=False`: ignore a limit that is only a guess, because no request may be refused on arrival because of it.
        """
        ...

    def status(self, now: float) -> GateStatus:
        """Return the present state."""
        ...
