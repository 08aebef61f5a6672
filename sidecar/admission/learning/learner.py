"""The interface of a learner, which turns verdicts into the pace of one rate. The gates use only this interface."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from sidecar.admission.learning.policer import Sent


class Effect(NamedTuple):
    """The effect of a verdict on the gate."""

    level: float | None
    """New level of the gate's bucket; None: unchanged."""
    nothing_accepted: bool = False
    """True: the provider refuses everything at any pace. The circuit must find out when this ends."""


NO_EFFECT, EMPTY = Effect(None), Effect(0.0)


@dataclass(frozen=True, slots=True)
class Recovery:
    """The end of a time in which everything was refused: a probe was accepted. Times are loop times in seconds."""

    closed_at: float
    """When the circuit opened."""
    probed_at: float
    """When the accepted probe was sent."""
    step: float
    """Seconds between the last refusal and the accepted probe."""


class Unknown(Enum):
    """The learned limit was wrong: start again, as with an unknown provider."""

    UNKNOWN = "unknown"


UNKNOWN = Unknown.UNKNOWN


@dataclass(frozen=True, slots=True)
class Remembered:
    """A limit that is known from elsewhere, such as from before a restart. Rates are per second."""

    limit: float
    burst: float
    error: float
    """The relative error of the limit."""
    why: str = "remembered from before the restart"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a learner. Rates are per second; the limit is infinite while none is known."""

    limit: float
    burst: float
    error: float
    """The relative error of the limit."""
    state: str
    why: str
    """Why the limit or the state last changed."""
    since: float
    """Loop time of that change, in seconds."""


class Learner(Protocol):
    """Learns the limit of one rate. Time comes only from the arguments; a learner never waits and sets no timer."""

    unpaced: bool
    """True: no attempt is paced, because neither a limit nor a ceiling is known."""

    @property
    def limit(self) -> float:
        """The learned limit per second; infinite while none is known."""
        ...

    @property
    def certain(self) -> bool:
        """True: the limit was measured with accepted calls. False while it is a guess or only remembered."""
        ...

    @property
    def ceiling_seconds(self) -> float:
        """Seconds between two usual attempts at the operator's ceiling; 0 without a ceiling."""
        ...

    @property
    def guessed(self) -> bool:
        """True: the limit is a first guess, and may be far off."""
        ...

    @property
    def refusal_seconds(self) -> float:
        """Seconds from sending an attempt to its refusal, smoothed."""
        ...

    @property
    def capacity(self) -> float:
        """Amount that may be sent at once after a pause."""
        ...

    def usual(self, amount: float, share: float) -> None:
        """Move the usual amount of an attempt towards `amount` by this share of the difference."""
        ...

    def pace(self, now: float) -> float:
        """Return the rate per second that may be sent now; infinite if there is no limit."""
        ...

    def sent(self, now: float, amount: float, *, held: bool, pace: float) -> Sent:
        """Record that an attempt is sent at this pace. `held`: this rate delayed it, so more would have been sent."""
        ...

    def accepted(self, now: float, sent: Sent) -> None:
        """Record that the provider accepted the attempt."""
        ...

    def settled(self, sent: Sent, amount: float) -> None:
        """Replace the reserved amount of an attempt by its real amount."""
        ...

    def refused(self, now: float, sent: Sent) -> Effect:
        """Learn from an attempt that was refused because of this rate."""
        ...

    def refused_too(self, now: float, sent: Sent) -> None:
        """Record an attempt that was refused while everything was refused."""
        ...

    def void(self, now: float, sent: Sent) -> None:
        """Record an attempt whose outcome says nothing about this rate."""
        ...

    def resumed(self, now: float, after: Recovery | Remembered | Unknown | float) -> Effect:
        """Continue after a blackout, after a restart, as at the start, or at this share of the limit."""
        ...

    def window_ends(self, now: float) -> float:
        """Return the best loop time for the next probe of a used-up window; `now` if no window is used up."""
        ...

    @property
    def windowed(self) -> bool:
        """True if the provider's quota is counted in windows."""
        ...

    def rate(self, now: float) -> float:
        """Return the accepted amount per second of the last seconds."""
        ...

    def use(self, now: float) -> float:
        """Return the accepted rate as a share of the limit; 0 while no limit is known."""
        ...

    def snapshot(self) -> Snapshot:
        """Return the present state."""
        ...
