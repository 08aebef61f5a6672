"""Recognises a request that a limit of LLM tokens can never accept, without reading the provider's words."""

from __future__ import annotations

from sidecar.admission.ticket import Ticket

#: Seconds. The usual limits of LLM tokens count over one minute. So if nothing else was sent for longer, the whole
#: limit was free.
TOKEN_WINDOW_SECONDS = 60.0


class OwnFault:
    """Counts the refusals for LLM tokens of a ticket, while nothing else is sent to its upstream."""

    __slots__ = ("_ended_at", "_others_ended_at", "_refusals", "_ticket")

    def __init__(self, now: float) -> None:
        self._ticket: Ticket | None = None  # the ticket of the latest attempt without an answer
        self._refusals = 0  # its refusals
        self._ended_at = now  # loop time at which that attempt ended
        self._others_ended_at = now  # loop time at which the latest attempt of any other ticket ended

    def unanswered(self, now: float, ticket: Ticket) -> None:
        """Note that an attempt of this ticket has ended without an answer."""
        if ticket is not self._ticket:
            self._ticket, self._refusals, self._others_ended_at = ticket, 0, self._ended_at
        self._ended_at = now

    def refused(self, sent_at: float, ticket: Ticket, accepted_at: float) -> int:
        """Return how many attempts of this ticket were refused for LLM tokens, with the one sent at `sent_at`.

        0 if another attempt ended in the TOKEN_WINDOW_SECONDS before. `accepted_at`: when the latest attempt was
        accepted. The caller checks that no other attempt is in flight, and calls `unanswered` first.
        """
        if sent_at - max(self._others_ended_at, accepted_at) < TOKEN_WINDOW_SECONDS:
            return 0
        self._refusals += 1
        return self._refusals
