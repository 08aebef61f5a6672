"""The attempts in flight, and how many of them the provider had at once."""

from __future__ import annotations

from sidecar.admission.learning.policer import Sent
from sidecar.admission.ticket import Cause, Ticket


class Attempt:
    """What the limits remember of one attempt until its verdict."""

    __slots__ = ("beside", "bound", "probe", "requests", "started", "ticket", "tokens", "told")

    def __init__(self, ticket: Ticket, now: float, beside: int, bound: Cause | None, probe: bool) -> None:
        self.ticket = ticket
        self.started = now
        self.beside = beside
        """Attempts in flight at the provider when this one started; those it refused were not."""
        self.bound = bound
        """The gate that held the queue just before."""
        self.probe = probe
        self.told = False
        """It has had its verdict."""
        self.requests: Sent | None = None
        self.tokens: Sent | None = None


class InFlight:
    """Those that have not ended, in the order in which they started."""

    __slots__ = ("_attempts",)

    def __init__(self) -> None:
        self._attempts: dict[Attempt, None] = {}

    def add(self, attempt: Attempt) -> None:
        """One starts."""
        self._attempts[attempt] = None

    def remove(self, attempt: Attempt) -> None:
        """One has ended."""
        del self._attempts[attempt]

    def was_not_there(self, refused: Attempt) -> None:
        """A refused attempt held no place at the provider: the later ones had one less beside them."""
        later = False
        for other in self._attempts:
            if later:
                other.beside -= 1
            later = later or other is refused

    def was_surely_beside(self, taken: Attempt, most: float) -> bool:
        """Whether none that went out before, with so many beside it or more, may yet turn out to have been refused."""
        for other in self._attempts:
            if other is taken:
                break
            if other.beside >= most:
                return False
        return True
