"""The attempts in flight, and how many of them were at the provider at the same time."""

from __future__ import annotations

from sidecar.admission.policer import Sent
from sidecar.admission.ticket import Cause, Ticket


class Attempt:
    """The data that the limits keep of one attempt until its verdict."""

    __slots__ = ("beside", "bound", "probe", "requests", "started", "ticket", "tokens", "told")

    def __init__(self, ticket: Ticket, now: float, beside: int, bound: Cause | None, probe: bool) -> None:
        self.ticket = ticket
        self.started = now
        self.beside = beside
        """Other attempts in flight at the provider when this one started, without attempts that it refused."""
        self.bound = bound
        """The gate that delayed the queue just before the start, or None."""
        self.probe = probe
        self.told = False
        """True once its verdict was reported."""
        self.requests: Sent | None = None
        self.tokens: Sent | None = None

    def __repr__(self) -> str:
        return f"<Attempt started={self.started:.3f} beside={self.beside} bound={self.bound} probe={self.probe}>"


class InFlight:
    """The attempts that have not ended, in the order in which they started."""

    __slots__ = ("_attempts",)

    def __init__(self) -> None:
        self._attempts: dict[Attempt, None] = {}

    def add(self, attempt: Attempt) -> None:
        """Add an attempt that starts."""
        self._attempts[attempt] = None

    def remove(self, attempt: Attempt) -> None:
        """Remove an attempt that has ended."""
        del self._attempts[attempt]

    def was_not_there(self, refused: Attempt) -> None:
        """Correct `beside` of the later attempts: a refused attempt was not in flight at the provider beside them."""
        later = False
        for other in self._attempts:
            if later:
                other.beside -= 1
            later = later or other is refused

    def was_surely_beside(self, taken: Attempt, most: float) -> bool:
        """Return True if the count in `taken.beside` is final, as far as it matters at `most` attempts in flight.

        It is not final while an attempt that started earlier, with `most` or more others in flight, may still be
        refused: a refusal would lower the count.
        """
        for other in self._attempts:
            if other is taken:
                break
            if other.beside >= most:
                return False
        return True
