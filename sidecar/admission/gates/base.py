"""What a gate is, what an attempt was told, and the statuses that everybody else reads.

A gate is one condition that can delay a ticket: a request rate, a token rate, growth, concurrency, or the circuit. All
calls are synchronous and take `now` (seconds on the event loop's clock); nothing waits and nothing is scheduled here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from sidecar.admission.ticket import Cause, Ticket

Outcome = Literal["accepted", "refused", "failed", "timed_out", "account", "abandoned"]
#: What a provider can say that a refusal was about.
Dimension = Literal["request_rate", "token_rate", "growth", "concurrency", "capacity"]


class Verdict(NamedTuple):
    """What one attempt was told. (A tuple: a frozen dataclass takes four times as long to make, once per attempt.)"""

    outcome: Outcome
    """`accepted`: the request passed the limits. `refused`: a limit refused it. `failed`: 5xx or a broken connection.
    `timed_out`: no byte came in time. `account`: the provider refuses the account (billing, key). `abandoned`: the
    attempt ended without an answer that says anything."""
    at: float
    """When it was told."""
    named: Dimension | None = None
    """What a refusal was about, if the provider said so."""
    usage: tuple[int, int] | None = None
    """LLM tokens of input and output, as the provider counted them."""
    retry_after: float | None = None
    """Seconds that the provider asks to wait."""
    reason: str = ""


class Ahead(NamedTuple):
    """What will be sent before a place in the queue is reached, this place included."""

    requests: float
    tokens: float
    """LLM tokens, estimated by the upstream."""


@dataclass(frozen=True, slots=True)
class GateStatus:
    """What a gate shows to operators. Rates are per second."""

    name: Cause
    limit: float | None
    """The learned limit; None while none is known."""
    pace: float | None = None
    """The rate that is allowed now; None where nothing is paced."""
    state: str = ""
    why: str = ""
    """Why the limit or the state last changed."""
    since: float = 0.0
    """When that was, in seconds on the event loop's clock."""
    burst: float | None = None
    """Calls or LLM tokens that a pause saves up."""
    error: float | None = None
    """The relative error of the limit."""
    factor: float | None = None
    """Of growth: how much faster than before traffic may be."""
    in_flight: int | None = None
    """Of concurrency: attempts that hold a place."""
    next_at: float | None = None
    """Of the circuit: when the next probe may go."""


@dataclass(frozen=True, slots=True)
class Change:
    """A learned limit or its state changed, or the circuit opened or closed."""

    at: float
    dimension: Cause
    old: float
    new: float
    """The limit before and after, per second; infinite while none is known; 0 for the circuit."""
    state: str
    """The learner's state, or why the circuit is open; empty where it has closed."""
    reason: str


class Gate(Protocol):
    """One condition that can delay a ticket."""

    name: Cause

    @property
    def certain(self) -> bool:
        """What the gate has learned was confirmed by accepted calls. A guess never refuses a request on arrival."""
        ...

    dormant: bool
    """The gate never closes at present: it need not be asked."""

    def advance(self, now: float) -> None:
        """Let time pass up to `now`. To be called before the questions below."""
        ...

    def opens_at(self, now: float, cost: float) -> float:
        """When an attempt of `cost` LLM tokens may start: `now` if open, inf if only an event opens the gate.

        A question: it never changes anything.
        """
        ...

    def reserve(self, now: float, ticket: Ticket, cost: float, *, held: bool) -> Any:
        """An attempt of this ticket starts. `held`: this gate delayed it. Return what `settle` needs."""
        ...

    def settle(self, now: float, reservation: Any, verdict: Verdict, *, blamed: Cause | None) -> None:
        """The attempt ended. `blamed` names the gate that a refusal is booked to. Called once for each reservation."""
        ...

    def explains(self, now: float, reservation: Any) -> float:
        """How well this gate explains a refusal of the attempt that names nothing, from 0 to 1. A question."""
        ...

    def seconds_for(self, now: float, ahead: Ahead) -> float:
        """Seconds until all of `ahead` may have started, as far as this gate is concerned."""
        ...

    def status(self, now: float) -> GateStatus:
        """Return the present state."""
        ...
