"""The retries that may not be sent yet: each waits until its `not_before`."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from sidecar.admission.ticket import Priority, Ticket


class Later:
    """Return the tickets in the order of their `not_before`. Adding and removing is O(log n)."""

    __slots__ = ("_entries", "_next_number", "bytes", "tickets")

    def __init__(self) -> None:
        self.tickets: dict[Ticket, int] = {}
        """The waiting tickets with their numbers."""
        self.bytes = 0
        self._next_number = 0
        self._entries: list[tuple[float, int, Ticket]] = []  # a heap; entries whose ticket has left are skipped

    def __repr__(self) -> str:
        return f"<Later {id(self):#x} tickets={len(self.tickets)} bytes={self.bytes}>"

    def length(self, priority: Priority) -> int:
        """Return the number of waiting tickets of one class."""
        return sum(ticket.priority is priority for ticket in self.tickets)

    def add(self, ticket: Ticket) -> None:
        """Keep a ticket until its `not_before`."""
        self._next_number += 1
        self.tickets[ticket] = self._next_number
        self.bytes += ticket.size_bytes
        heappush(self._entries, (ticket.not_before, self._next_number, ticket))

    def remove(self, ticket: Ticket) -> None:
        """Remove a ticket."""
        del self.tickets[ticket]
        self.bytes -= ticket.size_bytes
        if len(self._entries) > 2 * len(self.tickets) + 16:
            self._entries = [entry for entry in self._entries if self._is_valid(entry)]
            heapify(self._entries)

    def head(self) -> Ticket | None:
        """Return the ticket with the earliest `not_before`, or None if no ticket waits."""
        while self._entries and not self._is_valid(self._entries[0]):
            heappop(self._entries)
        return self._entries[0][2] if self._entries else None

    def _is_valid(self, entry: tuple[float, int, Ticket]) -> bool:
        """Return True if the entry's ticket still waits, and was not removed and added again."""
        return self.tickets.get(entry[2]) == entry[1]
