"""
The fair queue: it decides which waiting ticket is next. It does not use limits, time or futures. `Pool` uses it.

It has three levels. Their cost hardly grows with the number of keys and tickets (at most logarithmically):

1. Priority classes share the throughput by weight.
2. The keys within a class share it by deficit round robin (Shreedhar & Varghese, 1995) over cost.
3. Within a key, the earliest deadline is served first while the backlog can be served in time. Otherwise the newest
   ticket is served first, but after the tickets of callers that returned at the time of their Retry-After.

The round robin is the *surplus* variant: a key is served while its deficit is positive, and the last ticket may make
the deficit negative. So the quantum need not be as large as the largest ticket, and one camera's huge frame does not
make the turns of all other cameras longer. A key's deficit stays within (-largest cost, quantum].
"""

from __future__ import annotations

from collections import OrderedDict, deque
from heapq import heapify, heappop, heappush

from sidecar.admission.ticket import Priority, Ticket

#: A key that could not be served in time has caught up when 1/CAUGHT_UP_DIVISOR of its backlog is left.
CAUGHT_UP_DIVISOR = 8
#: Callers that return at the time of their Retry-After come spaced in time. If more than this many such tickets of one
#: key wait, most are new requests that are mistaken for returning callers: only key and time identify a caller.
MAX_PROMISED = 8
#: Maximum number of rounds for which a key is passed over after one large ticket. It bounds the loop in `head`.
MAX_ROUNDS = 256
#: Weight of each priority class. The classes share in this ratio while all of them have waiting tickets.
WEIGHTS: dict[Priority, int] = {Priority.HIGH: 8, Priority.NORMAL: 3, Priority.LOW: 1}


class _KeyQueue:
    """One key's tickets within one class."""

    __slots__ = (
        "_by_deadline",
        "_caught_up_below",
        "_waiting",
        "cost",
        "deficit",
        "key",
        "position",
        "promised",
        "requeued",
    )

    def __init__(self, key: str) -> None:
        self.key = key
        self.deficit = 0.0
        self.cost = 0.0  # sum over all waiting tickets
        self.position = 0  # position in the ring: consecutive numbers from its head to its tail
        self.requeued: deque[Ticket] = deque()
        self.promised: OrderedDict[int, Ticket] = OrderedDict()  # a part of `_waiting`; newer tickets do not pass them
        self._waiting: OrderedDict[int, Ticket] = OrderedDict()  # in order of arrival
        self._caught_up_below = 0  # newest first until fewer tickets than this are left; 0: earliest deadline first
        self._by_deadline: list[tuple[float, int]] = []  # a heap; entries whose ticket has left are skipped

    def __len__(self) -> int:
        return len(self.requeued) + len(self._waiting)

    def add(self, number: int, ticket: Ticket) -> None:
        self.cost += _cost(ticket)
        if ticket.requeued:
            self.requeued.append(ticket)
            return
        if ticket.promised:
            self.promised[number] = ticket
        self._waiting[number] = ticket
        heappush(self._by_deadline, (ticket.deadline, number))

    def head(self) -> Ticket:
        if self.requeued:
            return self.requeued[0]
        if self._caught_up_below:
            if self.promised:  # in order of arrival; but newest first if they are a flood (see MAX_PROMISED)
                many = len(self.promised) > MAX_PROMISED
                return self.promised[next(reversed(self.promised) if many else iter(self.promised))]
            return self._waiting[next(reversed(self._waiting))]
        while self._by_deadline[0][1] not in self._waiting:
            heappop(self._by_deadline)
        return self._waiting[self._by_deadline[0][1]]

    def serve_newest_first(self) -> bool:
        changes = not self._caught_up_below
        self._caught_up_below = max(self._caught_up_below, len(self) // CAUGHT_UP_DIVISOR, 1)
        return changes

    def remove(self, number: int, ticket: Ticket) -> None:
        if len(self) - 1 < self._caught_up_below:
            self._caught_up_below = 0
        self.cost -= _cost(ticket)
        if ticket.requeued:
            self.requeued.remove(ticket)
            return
        del self._waiting[number]
        self.promised.pop(number, None)
        if len(self._by_deadline) > 2 * len(self._waiting) + 16:
            self._by_deadline = [entry for entry in self._by_deadline if entry[1] in self._waiting]
            heapify(self._by_deadline)

    def ahead_of(self, deadline: float, *, promised: bool) -> tuple[int, float]:
        """Return the number and the cost of the tickets that would be served before a new one with this deadline."""
        if self._caught_up_below:
            earlier = [] if promised else [*map(_cost, self.promised.values())]
        else:
            if self._waiting and deadline >= next(reversed(self._waiting.values())).deadline:
                return len(self), self.cost  # the common case: all callers allow the same time
            earlier = [_cost(ticket) for ticket in self._waiting.values() if ticket.deadline <= deadline]
        earlier += map(_cost, self.requeued)
        return len(earlier), sum(earlier)


def _cost(ticket: Ticket) -> float:
    """Return the cost that the round robin shares, in LLM tokens, at least 1."""
    return max(ticket.tokens, 1.0)


class _Class:
    """One priority class: a ring of the keys that have waiting tickets.

    If a key becomes empty while it is not at the ring's head, it stays in the ring until its turn. Its removal from the
    middle would cost a walk over all keys.
    """

    __slots__ = ("active", "cost", "credit", "keys", "length", "ring")

    def __init__(self) -> None:
        self.keys: dict[str, _KeyQueue] = {}
        self.ring: deque[_KeyQueue] = deque()
        self.length = 0  # tickets
        self.cost = 0.0  # sum over all tickets
        self.active = 0  # keys that are not empty
        self.credit = 0.0

    @property
    def requests_per_cost(self) -> float:
        return self.length / self.cost if self.length else 0.0

    def append(self, queue: _KeyQueue) -> None:
        queue.position = self.ring[-1].position + 1 if self.ring else 0
        self.ring.append(queue)

    def rotate(self) -> None:
        self.append(self.ring.popleft())

    def turns_before(self, queue: _KeyQueue | None) -> float:
        """Return how many other keys have a turn before the next turn of this key, or of a new key (None)."""
        if queue is None or not self.ring:
            return self.active
        return (queue.position - self.ring[0].position) * self.active / len(self.ring)  # empty keys have no turn


class FairQueue:
    """Choose the next of the waiting tickets. Calls are amortised O(1) in keys, O(log n) in the tickets of one key."""

    __slots__ = ("_classes", "_next_number", "_quantum", "tickets")

    def __init__(self) -> None:
        self._classes = {priority: _Class() for priority in Priority}
        self.tickets: dict[Ticket, int] = {}
        """The waiting tickets with their numbers. Its truth value is a faster test for emptiness than `len(queue)`."""
        self._next_number = 0
        self._quantum = 1.0

    def __repr__(self) -> str:
        return f"<FairQueue {id(self):#x} tickets={len(self.tickets)}>"

    def __len__(self) -> int:
        return len(self.tickets)

    @property
    def cost(self) -> float:
        """The cost of all tickets."""
        return sum(group.cost for group in self._classes.values())

    def add(self, ticket: Ticket) -> None:
        """Queue a ticket. A `requeued` ticket goes to the head of its key."""
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

    def remove(self, ticket: Ticket) -> None:
        """Remove a ticket from any position. Does not charge its key or class for it."""
        group = self._classes[ticket.priority]
        queue = group.keys[ticket.key]
        queue.remove(self.tickets.pop(ticket), ticket)
        group.length -= 1
        group.cost -= _cost(ticket)
        if not queue:
            group.active -= 1
        if not group.length:
            group.ring.clear()
            group.keys.clear()
            group.credit = group.cost = 0.0

    def head(self) -> Ticket | None:
        """Return the next ticket, or None if none waits. Without a change in between, it returns the same ticket."""
        if not self.tickets:
            return None
        group = self._choose()
        ring = group.ring
        turns = 0
        while True:
            queue = ring[0]
            if not queue:
                del group.keys[queue.key]
                ring.popleft()
            elif queue.deficit > 0:
                queue.deficit = min(queue.deficit, self._quantum)  # the quantum may have shrunk since the last top-up
                return queue.head()
            else:
                queue.deficit += self._quantum
                if queue.deficit <= 0:  # the key still pays for a large ticket
                    group.rotate()
                    turns += 1
                    if turns >= len(ring):  # all have debts: grant in one step the rounds that the smallest debt needs
                        turns = 0
                        debts = [-other.deficit for other in ring if other]
                        rounds = min(debts) // self._quantum
                        for other in ring:
                            other.deficit += rounds * self._quantum

    def take(self, ticket: Ticket) -> None:
        """Remove the ticket that `head` returned and charge its key and class for it."""
        # The quantum is the smoothed cost of a ticket. Each round adds one quantum to a key's deficit. One ticket can
        # at most double the quantum. Otherwise, after one huge ticket, each key would get thousands of tickets served
        # in one turn, and the key with the longest backlog would gain most.
        self._quantum += 0.05 * (min(_cost(ticket), 21 * self._quantum) - self._quantum)
        cost = min(_cost(ticket), MAX_ROUNDS * self._quantum)
        group = self._classes[ticket.priority]
        queue = group.ring[0]
        queue.deficit -= cost
        group.credit -= cost
        if queue.deficit <= 0:
            group.rotate()
        self.remove(ticket)

    def serve_newest_first(self, priority: Priority, key: str) -> bool:
        """
        Serve this key newest first until it has caught up. Call it if the key's backlog cannot be served in time.

        Returns True if the order changes. With earliest deadline first, an overloaded key would serve each ticket just
        after its deadline. With newest first, new tickets are in time and old ones are refused at their deadline.
        """
        queue = self._classes[priority].keys.get(key)
        if not queue:  # no ticket of the key waits; the empty key may still be in the ring
            return False
        return queue.serve_newest_first()

    def ahead_of(self, ticket: Ticket) -> tuple[float, float]:
        """
        Return what will be served before this new ticket: the number of requests, and their cost.

        A wait is predicted from these numbers. Each round gives one quantum to the ticket's key. The ticket is served
        in the round in which these quanta have paid for the tickets ahead of it in its key. In each round until then,
        every other key gets one quantum too; the keys that are before the ticket's key in the ring get one more. Other
        classes meanwhile get their share by weight.
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
        """Return the next class: the first with credit left. If none has credit, all classes with tickets get more."""
        while True:
            for group in self._classes.values():
                if group.length and group.credit > 0:
                    return group
            waiting = [(WEIGHTS[priority], group) for priority, group in self._classes.items() if group.length]
            # Find the class that needs the fewest rounds, and grant that number of rounds (at least 1) in one step.
            # This class may need thousands of rounds.
            rounds = max(min(-group.credit / (weight * self._quantum) for weight, group in waiting) // 1.0, 1.0)
            for weight, group in waiting:
                group.credit += rounds * weight * self._quantum
