"""Every waiting ticket of one pool, and the causes of the waits. No gate is asked here; see `Pool`."""

from __future__ import annotations

from heapq import heapify, heappop, heappush, nlargest
from math import inf
from operator import itemgetter

from sidecar.admission.queue import FairQueue
from sidecar.admission.ticket import CAUSES, Cause, Priority, Ticket
from sidecar.admission.upstream import Upstream


class Later:
    """The retries that may not be sent yet, in the order of their `not_before`. Adding and removing is O(log n)."""

    __slots__ = ("_entries", "_next_number", "tickets")

    def __init__(self) -> None:
        self.tickets: dict[Ticket, int] = {}
        """The waiting tickets with their numbers."""
        self._next_number = 0
        self._entries: list[tuple[float, int, Ticket]] = []  # a heap; entries whose ticket has left are skipped

    def __repr__(self) -> str:
        return f"<Later {id(self):#x} tickets={len(self.tickets)}>"

    def add(self, ticket: Ticket) -> None:
        """Keep a ticket until its `not_before`."""
        self._next_number += 1
        self.tickets[ticket] = self._next_number
        heappush(self._entries, (ticket.not_before, self._next_number, ticket))

    def remove(self, ticket: Ticket) -> None:
        """Remove a ticket."""
        del self.tickets[ticket]
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


class Waiting:
    """The waiting tickets. Each is in one queue: `queue`, `set_back`, one of `restricted`, `parked` or `later`."""

    def __init__(self, now: float) -> None:
        self.tickets: dict[Ticket, FairQueue | Later] = {}
        """Every waiting ticket, with its queue. Its truth value is a faster test for emptiness than `len`."""
        self.bytes = 0
        """Bytes of the request bodies of all tickets."""
        self.lengths = dict.fromkeys(Priority, 0)
        """Number of tickets of each priority class."""
        self.queue = FairQueue()
        """The tickets that may go to every upstream."""
        self.restricted: dict[tuple[Upstream, ...], FairQueue] = {}
        """The tickets that have tried some upstreams: one queue for each set of untried upstreams."""
        self.set_back = FairQueue()
        """The tickets that may go to every upstream and had a setback: probes are made with others first."""
        self.parked = FairQueue()
        """Large bodies for which there is no room. They delay no other ticket, and return to their queue later."""
        self.later = Later()
        """The retries that may not be sent yet."""
        self._latest: dict[str, Ticket] = {}  # by key: the ticket that a newer frame supersedes
        self._cause: Cause = "turn"  # what delays the tickets that are not in `later`
        self._cause_since = now
        self._seconds = [0.0] * len(CAUSES)  # total seconds of each cause, in the order of `CAUSES`

    def __repr__(self) -> str:
        return f"<Waiting {id(self):#x} tickets={len(self)} cause={self.cause}>"

    def __len__(self) -> int:
        return len(self.tickets)

    def longest(self, most: int) -> list[tuple[str, int, float]]:
        """Return the `most` keys with the most tickets: key, number of tickets, arrival time of the oldest ticket.

        Walks over all tickets: for displays, not for the request path.
        """
        totals: dict[str, tuple[int, float]] = {}
        for ticket in self.tickets:
            count, oldest = totals.get(ticket.key, (0, inf))
            totals[ticket.key] = (count + 1, min(oldest, ticket.stopwatch.started))
        return nlargest(most, ((key, *of_key) for key, of_key in totals.items()), key=itemgetter(1))

    def superseded_by(self, ticket: Ticket) -> Ticket | None:
        """Return the ticket that this newer frame of its key replaces, or None. Without a key: always None."""
        other = self._latest.get(ticket.key) if ticket.key else None
        return other if other is not None and other.is_waiting else None

    def add(self, now: float, ticket: Ticket, untried: tuple[Upstream, ...] | None) -> None:
        """Add a ticket to its queue. `untried`: the only upstreams to which it may go, or None if it may go to all."""
        queue: FairQueue | Later
        if ticket.not_before > now:
            ticket.waits_since = now
            queue = self.later
        else:
            self._book(now)
            ticket.enter_queue(self._seconds)
            if untried is not None:
                queue = self.restricted.setdefault(untried, FairQueue())
            else:
                queue = self.set_back if ticket.setbacks else self.queue
        queue.add(ticket)
        self.tickets[ticket] = queue
        self.bytes += ticket.size_bytes
        self.lengths[ticket.priority] += 1
        if ticket.latest:
            self._latest[ticket.key] = ticket

    def park(self, ticket: Ticket) -> None:
        """Move a ticket that may go to every upstream out of its queue; see `parked`."""
        self._move(ticket, self.parked)

    def unpark(self, ticket: Ticket) -> None:
        """Return a ticket to its queue."""
        self._move(ticket, self.set_back if ticket.setbacks else self.queue)

    def _move(self, ticket: Ticket, queue: FairQueue) -> None:
        self.tickets[ticket].remove(ticket)
        queue.add(ticket)
        self.tickets[ticket] = queue

    def remove(self, now: float, ticket: Ticket, *, served: bool = False) -> None:
        """Remove a ticket that waits, and add the seconds of its wait to their causes.

        `served`: it gets a permit, so charge its key for it. It must then be the head of its queue.
        """
        queue = self.tickets.pop(ticket)
        self.bytes -= ticket.size_bytes
        self.lengths[ticket.priority] -= 1
        if isinstance(queue, FairQueue):
            self._book(now)
            ticket.leave_queue(self._seconds)
            if served:
                queue.take(ticket)
            else:
                queue.remove(ticket)
        else:
            ticket.add_cause("hold", now - ticket.waits_since)
            queue.remove(ticket)
        if self._latest.get(ticket.key) is ticket:
            del self._latest[ticket.key]

    # -- causes --------------------------------------------------------------------------------------------------------

    @property
    def cause(self) -> Cause | None:
        """The present cause of waiting; None while no ticket waits."""
        if len(self.tickets) > len(self.later.tickets):
            return self._cause
        return "hold" if self.tickets else None

    def set_cause(self, now: float, cause: Cause) -> None:
        """Set what delays the tickets from now on, except the retries that may not be sent yet."""
        self._book(now)
        self._cause = cause

    def _book(self, now: float) -> None:
        """Add the seconds since the last call to the total of the present cause.

        Each ticket reads these totals when it enters and leaves a queue, so no loop over all tickets is needed.
        """
        self._seconds[CAUSES.index(self._cause)] += now - self._cause_since
        self._cause_since = now
