"""
The fair queue: it decides which waiting ticket is next. It does not use limits, time or futures. `Pool` uses it.

It has two levels. Their cost hardly grows with the number of keys and tickets (at most logarithmically):

1. Keys share the throughput, counted by cost, in the ratio of their weights. They take turns by stride scheduling
   (Waldspurger, 1995): the key with the smallest turn is served, and its turn then grows by cost / weight. A key's
   weight is that of the highest priority it asks for. But while more than half of the waiting keys ask for `high`, all
   keys have the same weight.
2. Within a key, the earliest deadline is served first while the backlog can be served in time. Otherwise the newest
   ticket is served first, but after the tickets of callers that returned at the time of their Retry-After.

A key that asks for several priorities has one queue for each of them, with a turn of its own. These queues divide the
weight of the key in the ratio of WEIGHTS. So none of them starves, and the key does not get more than with its highest
priority alone.

A key pays after it is served. So a camera's huge frame makes its own next turn late, and not the turns of the others.
The first turn of a new key is as late as if the key had just been served.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from heapq import heapify, heappop, heappush, heapreplace

from sidecar.admission.ticket import Priority, Ticket

#: A key that could not be served in time has caught up when 1/CAUGHT_UP_DIVISOR of its backlog is left.
CAUGHT_UP_DIVISOR = 8
#: Callers that return at the time of their Retry-After come spaced in time. If more than this many such tickets of one
#: key wait, most are new requests that are mistaken for returning callers: only key and time identify a caller.
MAX_PROMISED = 8
#: After one large ticket, a key is passed over for at most this many turns of another key with the same weight.
MAX_ROUNDS = 256
#: Weight of a key by the highest priority that it asks for. Keys get throughput in proportion to their weights.
WEIGHTS: dict[Priority, int] = {Priority.HIGH: 8, Priority.NORMAL: 3, Priority.LOW: 1}
#: The weights while more than half of the waiting keys ask for HIGH.
EQUAL: dict[Priority, int] = dict.fromkeys(Priority, 3)


class _KeyQueue:
    """One key's tickets of one priority."""

    __slots__ = (
        "_by_deadline",
        "_caught_up_below",
        "_waiting",
        "cost",
        "due",
        "key",
        "priority",
        "promised",
        "requeued",
        "turn",
    )

    def __init__(self, key: _Key, priority: Priority) -> None:
        self.key = key
        self.priority = priority
        self.turn = 0.0
        self.due = 0.0  # when its turn is expected to come, on the scale of `FairQueue._progress`
        self.cost = 0.0  # sum over all waiting tickets
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
    """Return the cost that the keys share, in LLM tokens, at least 1."""
    return max(ticket.tokens, 1.0)


class _Key:
    """One key: its queues, and sums over its waiting tickets."""

    __slots__ = ("cost", "highest", "name", "queues", "tickets")

    def __init__(self, name: str) -> None:
        self.name = name
        self.queues: dict[Priority, _KeyQueue] = {}  # an empty queue stays until its next turn
        self.highest: Priority | None = None  # the highest priority of a waiting ticket
        self.tickets = 0
        self.cost = 0.0


class _Sums:
    """Sums over the waiting keys that have the same highest priority, and over their tickets of all priorities."""

    __slots__ = ("cost", "keys", "tickets")

    def __init__(self) -> None:
        self.keys = 0
        self.tickets = 0
        self.cost = 0.0

    def add(self, keys: int, tickets: int, cost: float) -> None:
        """Add to the sums; negative numbers subtract."""
        self.keys += keys
        self.tickets += tickets
        self.cost = self.cost + cost if self.keys else 0.0  # 0.0: without rounding errors


class FairQueue:
    """Choose the next of the waiting tickets. Calls are amortised O(log n) in keys and in the tickets of one key."""

    __slots__ = ("_keys", "_next_number", "_now", "_progress", "_sums", "_turns", "_typical_cost", "tickets")

    def __init__(self) -> None:
        self._keys: dict[str, _Key] = {}
        self._turns: list[tuple[float, int, _KeyQueue]] = []  # a heap with one entry for each queue of each key
        self._now = 0.0  # the last turn that has passed
        self._progress = 0.0  # grows with each ticket by cost / weight of all keys: what a key got per unit of weight
        self._sums = {priority: _Sums() for priority in Priority}
        self.tickets: dict[Ticket, int] = {}
        """The waiting tickets with their numbers. Its truth value is a faster test for emptiness than `len(queue)`."""
        self._next_number = 0
        self._typical_cost = 1.0

    def __repr__(self) -> str:
        return f"<FairQueue {id(self):#x} tickets={len(self.tickets)}>"

    def __len__(self) -> int:
        return len(self.tickets)

    @property
    def cost(self) -> float:
        """The cost of all tickets."""
        return sum(sums.cost for sums in self._sums.values())

    def add(self, ticket: Ticket) -> None:
        """Queue a ticket. A `requeued` ticket goes to the head of its key."""
        self._next_number += 1
        self.tickets[ticket] = self._next_number
        key = self._keys.get(ticket.key)
        if key is None:
            key = self._keys[ticket.key] = _Key(ticket.key)
        queue = key.queues.get(ticket.priority)
        if queue is None:
            queue = key.queues[ticket.priority] = _KeyQueue(key, ticket.priority)
            first = self._typical_cost / self._weight(key, ticket.priority)
            queue.turn, queue.due = self._now + first, self._progress + first
            heappush(self._turns, (queue.turn, self._next_number, queue))
        queue.add(self._next_number, ticket)
        self._count(key, 1, _cost(ticket))
        if len(queue) == 1:
            self._sort(key)

    def remove(self, ticket: Ticket) -> None:
        """Remove a ticket from any position. Does not charge its key for it."""
        key = self._keys[ticket.key]
        queue = key.queues[ticket.priority]
        queue.remove(self.tickets.pop(ticket), ticket)
        self._count(key, -1, -_cost(ticket))
        if not queue:
            self._sort(key)
        if not self.tickets:
            for other in self._keys.values():
                other.queues.clear()  # they refer to their key: a reference cycle would stay in memory
            self._keys.clear()
            self._turns.clear()
            self._now = self._progress = 0.0

    def head(self) -> Ticket | None:
        """Return the next ticket, or None if none waits. Without a change in between, it returns the same ticket."""
        if not self.tickets:
            return None
        while not (queue := self._turns[0][2]):  # it was kept until it has paid for its last ticket
            self._now = heappop(self._turns)[0]
            del queue.key.queues[queue.priority]
            if not queue.key.queues:
                del self._keys[queue.key.name]
        return queue.head()

    def take(self, ticket: Ticket) -> None:
        """Remove the ticket that `head` returned and charge its key for it, unless it has paid."""
        # One ticket can at most double the typical cost: a huge ticket says little about the next ones.
        self._typical_cost += 0.05 * (min(_cost(ticket), 21 * self._typical_cost) - self._typical_cost)
        cost = 0.0 if ticket.has_paid else min(_cost(ticket), MAX_ROUNDS * self._typical_cost)
        self._now, number, queue = self._turns[0]
        stride = cost / self._weight(queue.key, queue.priority)
        weights = self._weights
        queue.due = self._progress + stride
        self._progress += cost / sum([sums.keys * weights[priority] for priority, sums in self._sums.items()])
        queue.turn += stride
        heapreplace(self._turns, (queue.turn, number, queue))
        self.remove(ticket)

    def serve_newest_first(self, priority: Priority, key: str) -> bool:
        """
        Serve this key newest first until it has caught up. Call it if the key's backlog cannot be served in time.

        Returns True if the order changes. With earliest deadline first, an overloaded key would serve each ticket just
        after its deadline. With newest first, new tickets are in time and old ones are refused at their deadline.
        """
        queue = self._keys[key].queues.get(priority) if key in self._keys else None
        if not queue:  # no ticket waits; the empty queue may still have a turn
            return False
        return queue.serve_newest_first()

    def ahead_of(self, ticket: Ticket) -> tuple[float, float]:
        """
        Return what will be served before this new ticket: the number of requests, and their cost.

        A wait is predicted from these numbers. The ticket's turn comes when its queue has paid for the tickets ahead of
        it there. Until then, the other keys are served in proportion to their weights, or until nothing of them waits.
        """
        key = self._keys.get(ticket.key) or _Key(ticket.key)
        queue = key.queues.get(ticket.priority)
        own_weight = self._weight(key, ticket.priority)
        if queue is None:
            requests, ahead, until_turn = 0.0, 0.0, self._typical_cost / own_weight
        else:
            requests, ahead = queue.ahead_of(ticket.deadline, promised=ticket.promised)
            until_turn = max(queue.due - self._progress, 0.0)
        until_served = until_turn + ahead / own_weight
        # What else is served until then: at most this cost; number and cost of the tickets that wait. First the other
        # queues of this key, then the other keys. Until the turn, the progress counts this key's last ticket too.
        others = [
            (self._weight(key, other.priority) * until_served, len(other), other.cost)
            for other in key.queues.values()
            if other is not queue
        ]
        weights = self._weights
        for priority, sums in self._sums.items():
            keys, tickets, cost, more = sums.keys, sums.tickets, sums.cost, 0.0
            if priority is key.highest:
                keys, tickets, cost, more = keys - 1, tickets - key.tickets, cost - key.cost, until_turn
            others.append((weights[priority] * (keys * until_served + more), tickets, cost))
        for most, tickets, cost in others:
            if tickets:
                part = min(most / max(cost, tickets), 1.0)
                requests += part * tickets
                ahead += part * cost
        return requests, ahead

    @property
    def _weights(self) -> dict[Priority, int]:
        """The weights of keys by highest priority: equal while more than half of the waiting keys ask for HIGH."""
        waiting = sum([sums.keys for sums in self._sums.values()])
        return EQUAL if 2 * self._sums[Priority.HIGH].keys > waiting else WEIGHTS

    def _weight(self, key: _Key, priority: Priority) -> float:
        """Return the weight of a key's queue. Empty queues that still pay count too: they used their part before."""
        used = {priority, *key.queues}
        weight = self._weights[min(used)]
        return weight if len(used) == 1 else weight * WEIGHTS[priority] / sum([WEIGHTS[other] for other in used])

    def _count(self, key: _Key, tickets: int, cost: float) -> None:
        """Add tickets to the sums of the key and of its highest priority."""
        key.tickets += tickets
        key.cost += cost
        if key.highest is not None:
            self._sums[key.highest].add(0, tickets, cost)

    def _sort(self, key: _Key) -> None:
        """Count the key and its tickets under its highest priority, after one of its queues became empty or not."""
        if key.highest is not None:
            self._sums[key.highest].add(-1, -key.tickets, -key.cost)
        key.highest = min([priority for priority, queue in key.queues.items() if queue], default=None)
        if key.highest is not None:
            self._sums[key.highest].add(1, key.tickets, key.cost)
