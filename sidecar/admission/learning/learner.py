"""What a learner is: it turns verdicts into the pace of one rate. Gates and everything else know only this contract."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from sidecar.admission.learning.policer import Sent


class Effect(NamedTuple):
    """What a verdict does to the gate in front."""

    level: float | None
    """What the gate's bucket holds from now on; None: what it held before."""
    nothing_accepted: bool = False
    """Everything is refused, whatever the pace: the circuit must find out when that ends."""


NO_EFFECT, EMPTY = Effect(None), Effect(0.0)


@dataclass(frozen=True, slots=True)
class Recovery:
    """Everything was refused for a while; then a probe was accepted. Seconds on the event loop's clock."""

    closed_at: float
    probed_at: float
    """When the accepted probe was sent."""
    step: float
    """Seconds before it in which nothing was sent."""


class Unknown(Enum):
    """What was learned turned out to be wrong: the provider is as unknown as at the start."""

    UNKNOWN = "unknown"


UNKNOWN = Unknown.UNKNOWN


@dataclass(frozen=True, slots=True)
class Remembered:
    """A limit from before a restart. Rates are per second."""

    limit: float
    burst: float
    error: float
    """The relative error of the limit."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a learner knows. Rates are per second; the limit is infinite while none is known."""

    limit: float
    burst: float
    error: float
    """The relative error of the limit."""
    state: str
    why: str
    """Why limit or state last changed."""
    since: float
    """When that was, on the event loop's clock."""


class Learner(Protocol):
    """Learns the limit of one rate. Pure: every call takes `now`, nothing waits, nothing is scheduled."""

    unpaced: bool
    """Nothing needs to be paced: no refusal was ever seen, and there is no ceiling."""

    @property
    def limit(self) -> float:
        """The learned limit per second; infinite while none is known."""
        ...

    @property
    def certain(self) -> bool:
        """The limit was measured with calls that were accepted; False while it is a guess or only remembered."""
        ...

    @property
    def ceiling_seconds(self) -> float:
        """Seconds between two usual attempts at the operator's ceiling; 0 without one."""
        ...

    @property
    def guessed(self) -> bool:
        """The limit is a first guess, and may be far off."""
        ...

    @property
    def refusal_seconds(self) -> float:
        """How long a refusal takes to come back."""
        ...

    @property
    def capacity(self) -> float:
        """What may be sent at once after a pause."""
        ...

    def usual(self, amount: float, share: float) -> None:
        """Move the amount of a usual attempt by this share of the way to `amount`: LLM tokens differ."""
        ...

    def pace(self, now: float) -> float:
        """What may be sent per second at present; infinite for everything."""
        ...

    def sent(self, now: float, amount: float, *, held: bool, pace: float) -> Sent:
        """An attempt goes out at this pace. `held`: it had to wait for this rate, so more would have been sent."""
        ...

    def accepted(self, now: float, sent: Sent) -> None:
        """The provider accepted it."""
        ...

    def settled(self, sent: Sent, amount: float) -> None:
        """It took another amount than was reserved."""
        ...

    def refused(self, now: float, sent: Sent) -> Effect:
        """The provider refused it because of this rate."""
        ...

    def refused_too(self, now: float, sent: Sent) -> None:
        """It was refused while everything was refused."""
        ...

    def void(self, now: float, sent: Sent) -> None:
        """It ended in a way that says nothing about this rate."""
        ...

    def resumed(self, now: float, after: Recovery | Remembered | Unknown | float) -> Effect:
        """Sending goes on after a blackout, after a restart, as at the start, or at this share of the limit."""
        ...

    def window_ends(self, now: float) -> float:
        """When the provider's present window ends; `now` where it has none."""
        ...

    @property
    def windowed(self) -> bool:
        """The provider's quota is one of windows."""
        ...

    def rate(self, now: float) -> float:
        """The accepted amount per second, lately."""
        ...

    def use(self, now: float) -> float:
        """The accepted rate as a share of the limit; 0 while none is known."""
        ...

    def snapshot(self) -> Snapshot:
        """Return what is known."""
        ...
