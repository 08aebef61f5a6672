"""
The fair queue: whose turn it is. Knows nothing of limits, time or futures; `Lane` asks it for the next ticket.

Three levels, each flat in the number of keys and tickets: priority classes share by weight, the keys within a class
share by deficit round robin (Shreedhar & Varghese, 1995) over cost, and within a key order is earliest deadline first
while the backlog can be served in time, newest first when it cannot (but first those who were told to come back now).

The round robin is the *surplus* variant: a key is served while its deficit is positive and may overdraw it by one
ticket, so a quantum need not be as large as the largest ticket, and one camera's huge frame never makes the quantum of
all the others coarse. A key's deficit stays within (-largest cost, quantum].
"""

from __future__ import annotations

from collections import OrderedDict, deque
from heapq import heapify, heappop, heappush
from itertools import islice
from math import inf

from sidecar.admission.ticket import Priority, Ticket

#: A key whose backlog could not be served in time has caught up when one in so many of it is left.
CALM_SHARE = 8
#: Those who come back as they were told are spaced: more than so many of one key are a flood that passes for them.
MAX_PROMISED = 8
#: Rounds that a key sits out at most for one ticket, however large: what `head` may have to walk.
MAX_ROUNDS = 256
#: Share of each priority class while all are waiting.
WEIGHTS: dict[Priority, int] = {Priority.HIGH: 8, Priority.NORMAL: 3, Priority.LOW: 1}


class _KeyQueue:
    """One key's tickets within one class."""

    __slots__ = (
        "_by_deadline",
        "_calm_below",
        "_waiting",
        "cost",
        "deficit",
        "key",
        "latest",
        "place",
        "promised",
        "returned",
    )

    def __init__(self, key: str) -> None:
        self.key = key
        self.latest: Ticket | None = None  # the one that a newer frame would supersede
        self.deficit = 0.0
        self.cost = 0.0  # of all that waits
        self.place = 0  # in the ring: consecutive numbers from its head to its tail
        self.returned: deque[Ticket] = deque()
        self.promised: OrderedDict[int, Ticket] = OrderedDict()  # of those that wait; not behind newer ones
        self._waiting: OrderedDict[int, Ticket] = OrderedDict()  # in order of arrival
        self._calm_below = 0  # newest first until fewer than this are left; 0: earliest deadline first
        self._by_deadline: list[tuple[float, int]] = []  # a heap; entries whose ticket has left are skipped

    def __len__(self) -> int:
        return len(self.returned) + len(self._waiting)

    def add(self, number: int, ticket: Ticket) -> None:
        self.cost += _cost(ticket)
        if ticket.latest:
            self.latest = ticket
        if ticket.returned:
            self.returned.append(ticket)
            return
        if ticket.promised:
            self.promised[number] = ticket
        self._waiting[number] = ticket
        heappush(self._by_deadline, (ticket.deadline, number))

    def oldest(self) -> float:
        waiting = islice(self._waiting.values(), 1)
        return min(ticket.stopwatch.started for ticket in (*self.returned, *waiting))

    def head(self) -> Ticket:
        if self.returned:
            return self.returned[0]
        if self._calm_below:
            if self.promised:  # in order; but of a flood that passes for them the newest, as ever
                many = len(self.promised) > MAX_PROMISED
                return self.promised[next(reversed(self.promised) if many else iter(self.promised))]
            return self._waiting[next(reversed(self._waiting))]
        while self._by_deadline[0][1] not in self._waiting:
            heappop(self._by_deadline)
        return self._waiting[self._by_deadline[0][1]]

    def overload(self) -> bool:
        changes = not self._calm_below
        self._calm_below = max(self._calm_below, len(self) // CALM_SHARE, 1)
        return changes

    def remove(self, number: int, ticket: Ticket) -> None:
        if len(self) - 1 < self._calm_below:
            self._calm_below = 0
        self.cost -= _cost(ticket)
        if self.latest is ticket:
            self.latest = None
        if ticket.returned:
            self.returned.remove(ticket)
            return
        del self._waiting[number]
        self.promised.pop(number, None)
        if len(self._by_deadline) > 2 * len(self._waiting) + 16:
            self._by_deadline = [entry for entry in self._by_deadline if entry[1] in self._waiting]
            heapify(self._by_deadline)

    def ahead_of(self, deadline: float, *, promised: bool) -> tuple[int, float]:
        """How many would be served before a newcomer with this deadline, and what they cost."""
        if self._calm_below:
            earlier = [] if promised else [*map(_cost, self.promised.values())]
        else:
            if self._waiting and deadline >= next(reversed(self._waiting.values())).deadline:
                return len(self), self.cost  # the common case: everybody has the same budget
            earlier = [_cost(ticket) for ticket in self._waiting.values() if ticket.deadline <= deadline]
        earlier += map(_cost, self.returned)
        return len(earlier), sum(earlier)


def _cost(ticket: Ticket) -> float:
    """What the round robin shares: LLM tokens, at least 1."""
    return max(ticket.tokens, 1.0)


class _Class:
    """One priority class: a ring of the keys that have something waiting.

    A key that runs empty away from the ring's head stays in the ring until its turn comes: taking it out of the middle
    would cost a walk over all keys.
    """

    __slots__ = ("active", "cost", "credit", "keys", "length", "ring")

    def __init__(self) -> None:
        self.keys: dict[str, _KeyQueue] = {}
        self.ring: deque[_KeyQueue] = deque()
        self.length = 0  # tickets
        self.cost = 0.0  # of all of them
        self.active = 0  # keys that are not empty
        self.credit = 0.0

    @property
    def requests_per_cost(self) -> float:
        return self.length / self.cost if self.length else 0.0

    def append(self, queue: _KeyQueue) -> None:
        queue.place = self.ring[-1].place + 1 if self.ring else 0
        self.ring.append(queue)

    def rotate(self) -> None:
        self.append(self.ring.popleft())

    def turns_before(self, queue: _KeyQueue | None) -> float:
        """How many other keys have their turn before this one's next, or a new key's."""
        if queue is None or not self.ring:
            return self.active
        return (queue.place - self.ring[0].place) * self.active / len(self.ring)  # empty keys have none


class FairQueue:
    """Whose turn it is among waiting tickets. Calls are amortised O(1) in keys, O(log n) in the tickets of one key."""

    __slots__ = ("_classes", "_next_number", "_quantum", "bytes", "tickets")

    def __init__(self) -> None:
        self._classes = {priority: _Class() for priority in Priority}
        self.tickets: dict[Ticket, int] = {}
        """Those that wait, by number; quicker to ask than the length."""
        self._next_number = 0
        self._quantum = 1.0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self.tickets)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self.tickets

    @property
    def cost(self) -> float:
        """The cost of all tickets."""
        return sum(group.cost for group in self._classes.values())

    def length(self, priority: Priority) -> int:
        """Tickets waiting in one class."""
        return self._classes[priority].length

    def longest(self, most: int) -> list[tuple[str, int, float]]:
        """The keys with the longest queues: key, tickets, and when the oldest of them arrived.

        Walks all keys: for people, not for the hot path.
        """
        totals: dict[str, tuple[int, float]] = {}
        for group in self._classes.values():
            for key, queue in group.keys.items():
                if queue:
                    count, oldest = totals.get(key, (0, inf))
                    totals[key] = (count + len(queue), min(oldest, queue.oldest()))
        return sorted(((key, *of_key) for key, of_key in totals.items()), key=lambda entry: -entry[1])[:most]

    def add(self, ticket: Ticket) -> None:
        """Queue a ticket; one that was `returned` goes to the head of its key."""
        group = self._classes[ticket.priority]
        queue = group.keys.get(ticket.key)
        if queue is None:
            queue = group.keys[ticket.key] = _KeyQueue(ticket.key)
            group.append(queue)
        if not queue:
            group.active += 1
        self._next_number += 1
        self.tickets[ticket] = self._next_number
        queue.add(self._next_number, ticket)
        group.length += 1
        group.cost += _cost(ticket)
        self.bytes += ticket.size_bytes

    def superseded_by(self, ticket: Ticket) -> Ticket | None:
        """The queued ticket of the same key that `ticket` (with `latest`) takes the place of."""
        for group in self._classes.values():
            queue = group.keys.get(ticket.key)
            if queue is not None and queue.latest is not None:
                return queue.latest
        return None

    def remove(self, ticket: Ticket) -> None:
        """Take a ticket out, wherever it stands. Charges nothing."""
        group = self._classes[ticket.priority]
        queue = group.keys[ticket.key]
        queue.remove(self.tickets.pop(ticket), ticket)
        group.length -= 1
        group.cost -= _cost(ticket)
        self.bytes -= ticket.size_bytes
        if not queue:
            group.active -= 1
        if not group.length:
            group.ring.clear()
            group.keys.clear()
            group.credit = group.cost = 0.0

    def head(self) -> Ticket | None:
        """The ticket whose turn it is; None if none waits. Asking again without a change gives the same one."""
        if not self.tickets:
            return None
        group = self._choose()
        ring = group.ring
        while True:
            queue = ring[0]
            if not queue:
                del group.keys[queue.key]
                ring.popleft()
            elif queue.deficit > 0:
                queue.deficit = min(queue.deficit, self._quantum)  # which may have shrunk since the last top-up
                return queue.head()
            else:
                queue.deficit += self._quantum
                if queue.deficit <= 0:  # still paying for a large one
                    group.rotate()

    def take(self, ticket: Ticket) -> None:
        """Take out the ticket that `head` gave and charge its key and class for it."""
        # The typical cost: what a key is topped up by in each round. No single ticket can more than double it: after a
        # monster every key would be served in a run of thousands, whoever has the longest backlog before all others.
        self._quantum += 0.05 * (min(_cost(ticket), 21 * self._quantum) - self._quantum)
        cost = min(_cost(ticket), MAX_ROUNDS * self._quantum)
        group = self._classes[ticket.priority]
        queue = group.ring[0]
        queue.deficit -= cost
        group.credit -= cost
        if queue.deficit <= 0:
            group.rotate()
        self.remove(ticket)

    def overload(self, priority: Priority, key: str) -> bool:
        """
        The key's backlog cannot be served in time: newest first until it has caught up. True if it was not yet so.

        Otherwise each would be served just after it is of no more use. The old ones are refused when their time is up.
        """
        queue = self._classes[priority].keys.get(key)
        if not queue:  # nothing waits: the key may yet have its place in the ring
            return False
        return queue.overload()

    def ahead_of(self, ticket: Ticket) -> tuple[float, float]:
        """
        What will be served before this newcomer, as requests and as cost: what a predicted wait is made of.

        Its key gets a quantum in each round, so it comes on in the round in which that has paid for what is ahead of it
        in its key; until then the other keys get as much each, those that are before it in the ring once more. Other
        classes take their share by weight meanwhile.
        """
        group = self._classes[ticket.priority]
        queue = group.keys.get(ticket.key)
        requests, own, deficit, rest = 0.0, 0.0, 0.0, group.cost
        if queue is not None:
            requests, own = queue.ahead_of(ticket.deadline, promised=ticket.promised)
            deficit, rest = queue.deficit, group.cost - queue.cost
        rounds = max((own - deficit) // self._quantum, 0.0)
        turns = group.turns_before(queue) + rounds * (group.active - bool(queue))
        between = min(rest, turns * self._quantum)
        ahead = own + between
        requests += between * group.requests_per_cost
        until = ahead + _cost(ticket)
        for priority, other in self._classes.items():
            if other is not group:
                between = min(other.cost, until * WEIGHTS[priority] / WEIGHTS[ticket.priority])
                ahead += between
                requests += between * other.requests_per_cost
        return requests, ahead

    def _choose(self) -> _Class:
        """The class whose turn it is: the first with credit left; when none has, all that wait are topped up."""
        while True:
            for group in self._classes.values():
                if group.length and group.credit > 0:
                    return group
            for priority, group in self._classes.items():
                if group.length:
                    group.credit += WEIGHTS[priority] * self._quantum
