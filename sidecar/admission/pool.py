"""One fair queue above every upstream that can answer the same model, and the one decision, `admit`.

*Decide synchronously, act afterwards*: `admit` examines the queue and every gate and grants permits. It runs after
every change (a ticket arrived or left, an attempt ended, time opened a gate) and never awaits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from math import inf

from sidecar.admission.errors import AccountClosed, DeadlineUnreachable, NotAdmitted, StillFailing
from sidecar.admission.gates.circuit import CircuitState
from sidecar.admission.queue import FairQueue
from sidecar.admission.retry_after import Promises
from sidecar.admission.ticket import CAUSES, Cause, Priority, Ticket
from sidecar.admission.upstream import Permit, Upstream

#: Longest time in seconds until the gates are examined again while tickets wait: a learned pace changes with time.
LOOK_AGAIN_SECONDS = 0.25
#: A key's backlog can be served in time while a new ticket would be answered within this share of its time left.
SERVABLE_SHARE = 0.5
#: New callers leave room for the callers whose Retry-After ends within SOON_SECONDS, at most this share of a bound.
SOON_SECONDS, KEPT_SHARE = 4.0, 0.5
#: A higher tier takes tickets while the last place in the queue is predicted to wait longer than so many seconds.
SPILL_SECONDS = 2.0
#: For an answer, an upstream should have this many times its usual seconds, and at least so many seconds; at most this
#: share of the ticket's whole time while no answer is known. Before less is left, a ticket goes to a higher tier, or
#: leaves an attempt without a byte for another upstream: the prediction for the present one was wrong then.
SWITCH_ANSWERS, MIN_SWITCH_SECONDS, SWITCH_SHARE = 1.5, 0.5, 0.25
#: Added to the load (attempts in flight as a share of the allowed ones) of an upstream that would answer too late.
LATE = 1e6
_WAY_OUT = (
    "ask less often, allow more time (X-Request-Timeout), or let a newer frame take an older one's place "
    "(X-Queue-Policy: latest)"
)


class Pool:
    """The queue and the upstreams of one model. All of it is synchronous.

    A ticket that failed at an upstream in a way that would repeat there has *tried* it. Such tickets wait in queues of
    their own, one for each set of upstreams that is left, so that no ticket waits behind one that cannot go where it
    can. These few go first; and while the first of a queue waits for a closed upstream, no ticket of a later queue
    takes that upstream before it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, upstreams: Sequence[Upstream]) -> None:
        now = loop.time()
        self._loop = loop
        self.upstreams = upstreams
        self._only_upstream = upstreams[0] if len(upstreams) == 1 else None
        self._all = (1 << len(upstreams)) - 1
        self.queue = FairQueue()
        """The tickets that may go to every upstream."""
        self._restricted: dict[int, FairQueue] = {}  # by the set of upstreams that are left
        self._later: list[tuple[float, int, Ticket]] = []  # a heap of retries that may not go yet
        self._number = 0
        self.promises: Promises | None = None
        """Callers that were told to come back; None while there never were any."""
        self._timer: asyncio.TimerHandle | None = None
        self._wait_seconds = [0.0] * len(CAUSES)
        self.cause: Cause | None = None
        """The present cause of waiting; None while no ticket waits."""
        self._cause_since = self._entered_at = now
        self._urgent: set[Ticket] = set()  # predicted to be late in the lowest tier
        for upstream in upstreams:
            upstream.on_end.append(self._on_end)

    def __repr__(self) -> str:
        names = ",".join(one.name for one in self.upstreams)
        return f"<Pool {id(self):#x} {names} waiting={self.waiting} cause={self.cause}>"

    # -- what waits ----------------------------------------------------------------------------------------------------

    def queues(self) -> Iterator[FairQueue]:
        """Every queue, in the order in which they are looked at."""
        yield from self._restricted.values()
        yield self.queue

    def waiting_of(self, priority: Priority) -> int:
        """Tickets of one class that wait."""
        later = sum(ticket.priority is priority for *_, ticket in self._later)
        return sum(queue.length(priority) for queue in self.queues()) + later

    @property
    def last_used(self) -> float:
        """When a ticket last came, or an attempt ended."""
        return max(self._entered_at, *(one.last_used for one in self.upstreams))

    @property
    def is_empty(self) -> bool:
        """Nothing waits."""
        return not (self.queue.tickets or self._restricted or self._later)

    @property
    def waiting(self) -> int:
        """Tickets that wait, those among them whose time has not come."""
        return sum(len(queue) for queue in self.queues()) + len(self._later)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of their bodies."""
        return sum(queue.bytes for queue in self.queues()) + sum(ticket.size_bytes for *_, ticket in self._later)

    # -- a ticket enters and leaves ------------------------------------------------------------------------------------

    def enter(self, ticket: Ticket) -> Permit | asyncio.Future[Permit]:
        """Return a permit immediately, or queue the ticket and return the future of its permit or error.

        Raises `DeadlineUnreachable` for a ticket that cannot be served in time, `AccountClosed` while every provider
        refuses the account.
        """
        now = self._entered_at = self._loop.time()
        one = self._only_upstream
        if one is not None and self.is_empty and ticket.not_before <= now and one.opening(now, ticket)[1] is None:
            return self._start(one, ticket, now)  # the usual case
        left = self._untried_by(ticket)
        self._check_accounts(now, left)
        if ticket.not_before > now:
            return self._enter_later(now, ticket)
        if self.is_empty and (upstream := self._choose(now, ticket, left)[0]) is not None:
            return self._start(upstream, ticket, now)
        if not ticket.requeued:
            self._check_reachable(now, ticket)
        self._book_wait(now)
        self._enqueue(now, ticket)
        permit = ticket.permit
        assert permit is not None  # noqa: S101  `_enqueue` made it
        self.admit(now)
        return permit

    def leave(self, ticket: Ticket) -> None:
        """The ticket's caller is gone: it waits no more."""
        now = self._loop.time()
        if self._take_out(ticket, now):
            self.admit(now)

    def refuse(self, ticket: Ticket, why: NotAdmitted) -> None:
        """Take a waiting ticket out and give its caller the error."""
        self._take_out(ticket, self._loop.time())
        if ticket.permit is not None and not ticket.permit.done():
            ticket.permit.set_exception(why)
            ticket.permit = None

    def superseded_by(self, ticket: Ticket) -> Ticket | None:
        """The waiting ticket of the same key whose place this one takes."""
        for queue in self.queues():
            if (other := queue.superseded_by(ticket)) is not None:
                return other
        return next((one for *_, one in self._later if one.latest and one.key == ticket.key), None)

    def _enqueue(self, now: float, ticket: Ticket) -> None:
        if ticket.permit is None or ticket.permit.done():
            ticket.permit = self._loop.create_future()
        ticket.enter_queue(self._wait_seconds)
        left = self._untried_by(ticket)
        if left == self._all:
            queue = self.queue
        elif (found := self._restricted.get(left)) is not None:
            queue = found
        else:
            queue = self._restricted[left] = FairQueue()
        queue.add(ticket)
        if self._only_upstream is None:
            if self._is_late_below(now, ticket):
                self._urgent.add(ticket)
            elif (last_call := self._latest_switch_at(ticket, left)) < inf:
                ticket.expiry = self._loop.call_at(max(last_call, now), self._mark_urgent, ticket)
                return
        self._set_expiry(now, ticket, left)

    def _set_expiry(self, now: float, ticket: Ticket, left: int) -> None:
        ticket.expiry = self._loop.call_at(max(ticket.deadline - self._latency(left), now), self._expire, ticket)

    def _latest_switch_at(self, ticket: Ticket, left: int) -> float:
        """The latest time at which a higher tier should take the ticket; inf if no higher tier is left for it."""
        lowest = self.upstreams[0].tier
        higher = [one for bit, one in enumerate(self.upstreams) if left >> bit & 1 and one.tier > lowest]
        return ticket.deadline - max((_seconds_needed(ticket, one) for one in higher), default=-inf)

    def _mark_urgent(self, ticket: Ticket) -> None:
        """The ticket still waits, and soon no upstream could answer it in time."""
        now = self._loop.time()
        self._urgent.add(ticket)
        self._set_expiry(now, ticket, self._untried_by(ticket))
        self.admit(now)

    def _enter_later(self, now: float, ticket: Ticket) -> asyncio.Future[Permit]:
        """Keep a retry until its time comes."""
        ticket.permit = permit = self._loop.create_future()
        ticket.waits_since = now
        self._number += 1
        heappush(self._later, (ticket.not_before, self._number, ticket))
        ticket.expiry = self._loop.call_at(ticket.deadline, self._expire, ticket)
        self.admit(now)
        return permit

    def _release_later(self, now: float) -> None:
        """Queue the retries whose time has come."""
        while self._later and self._later[0][0] <= now:
            ticket = heappop(self._later)[2]
            self._end_pause(now, ticket)
            if ticket.permit is None or ticket.permit.done():
                continue  # its caller left in this loop iteration
            if ticket.only_while_failing and not any(one.circuit.failing for _, one in self._untried_upstreams(ticket)):
                ticket.permit.set_exception(StillFailing("the other requests are answered"))
                continue
            self._enqueue(now, ticket)

    def _end_pause(self, now: float, ticket: Ticket) -> None:
        ticket.add_cause("hold", now - ticket.waits_since)
        if ticket.expiry is not None:
            ticket.expiry.cancel()
            ticket.expiry = None

    def _take_out(self, ticket: Ticket, now: float) -> bool:
        """Take a ticket out, wherever it waits. Return False if it does not."""
        for entry in self._later:
            if entry[2] is ticket:
                self._later.remove(entry)
                self._later.sort()  # a sorted list is a heap
                self._end_pause(now, ticket)
                return True
        left = self._untried_by(ticket)
        queue = self.queue if left == self._all else self._restricted.get(left)
        if queue is None or ticket not in queue:
            return False
        self._book_wait(now)  # before it is gone: an empty queue books nothing
        queue.remove(ticket)
        self._on_ticket_removed(ticket, now)
        return True

    # -- the decision --------------------------------------------------------------------------------------------------

    def admit(self, now: float) -> None:
        """Grant permits to the next tickets until a gate is closed. Then set the timer for the next call."""
        self._book_wait(now)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._later:
            self._release_later(now)
        self.cause = None
        claimed, look_at = 0, inf
        if self._restricted:
            for left, queue in list(self._restricted.items()):
                claimed, opens_at = self._admit_from(now, queue, left, claimed)
                look_at = min(look_at, opens_at)
                if not queue:
                    del self._restricted[left]
        if self.queue.tickets:
            _, opens_at = self._admit_from(now, self.queue, self._all, claimed)
            look_at = min(look_at, opens_at)
        if look_at < inf:
            look_at = min(look_at, now + LOOK_AGAIN_SECONDS)
        if self._later:
            look_at = min(look_at, self._later[0][0])
        if look_at < inf:
            self._timer = self._loop.call_at(look_at, self._look_again)

    def _admit_from(self, now: float, queue: FairQueue, left: int, claimed: int) -> tuple[int, float]:
        """Admit from one queue. Return the upstreams that its first ticket claims, and when one of them opens."""
        while (ticket := queue.head()) is not None:
            if ticket.permit is None or ticket.permit.done():  # its caller left in this loop iteration
                queue.remove(ticket)
                self._on_ticket_removed(ticket, now)
                continue
            upstream, opens_at, cause = self._choose(now, ticket, left & ~claimed)
            if upstream is None:
                self.cause = self.cause or cause or "turn"
                for one in self.upstreams:
                    one.note_delay(cause)
                return claimed | left, opens_at
            queue.take(ticket)
            self._on_ticket_removed(ticket, now)
            ticket.permit.set_result(self._start(upstream, ticket, now))
        return claimed, inf

    def _choose(self, now: float, ticket: Ticket, left: int) -> tuple[Upstream | None, float, Cause | None]:
        """Choose the open upstream of the lowest tier with the least load; else give when one opens, and the cause."""
        one = self._only_upstream
        if one is not None:
            opens_at, cause = one.opening(now, ticket)
            return (one, now, None) if cause is None else (None, opens_at, cause)
        best: Upstream | None = None
        soonest, why = inf, None
        tier, least = 0, inf
        for bit, upstream in enumerate(self.upstreams):
            if not left >> bit & 1:
                continue
            if upstream.unready_reason() is not None:
                soonest = min(soonest, now + LOOK_AGAIN_SECONDS)  # nothing reports that it is ready again
                continue
            if upstream.tier > tier:
                if least < LATE or (best is None and tier and not self._spills(now, ticket, upstream.tier)):
                    break
                tier = upstream.tier
            opens_at, cause = upstream.opening(now, ticket)
            if cause is not None:
                if why is None or opens_at < soonest:
                    why = cause
                soonest = min(soonest, opens_at)
                continue
            load = upstream.concurrency.in_flight / upstream.concurrency.allowed
            if now + upstream.latency > ticket.deadline:
                load += LATE  # only if no other one is open that can answer in time
            if load < least:
                best, least = upstream, load
        return best, soonest if best is None else now, why if best is None else None

    def _spills(self, now: float, ticket: Ticket, tier: int) -> bool:
        """Whether a higher tier may take tickets: the tiers below it cannot serve all that waits in time."""
        below = [
            one for one in self.upstreams if one.tier < tier and one.unready_reason() is None and not one.unavailable
        ]
        if not below or self._urgent:
            return True
        if now + min(one.circuit.seconds_left(now) + one.latency for one in below) > ticket.deadline:
            return True
        requests = sum(len(queue) for queue in self.queues())
        cost = sum(queue.cost for queue in self.queues())
        return self._seconds(now, ticket, below, max(requests - 1, 0), cost, guess=True) > SPILL_SECONDS

    def _start(self, upstream: Upstream, ticket: Ticket, now: float) -> Permit:
        ticket.backend = upstream.name or ticket.backend
        return upstream.start(now, ticket, self._ended)

    def _ended(self, permit: Permit) -> None:
        """An attempt is over: its place goes to the next ticket, here or in a pool that shares the upstream."""
        now = self._loop.time()
        pools = permit.upstream.on_end
        if len(pools) > 1:  # each model is the first in turn
            pools.append(pools.pop(0))
        for on_end in tuple(pools):
            on_end(now)

    def _on_end(self, now: float) -> None:
        if self.cause is not None or not self.is_empty:
            if any(one.circuit.state is CircuitState.BILLING for one in self.upstreams):
                self._refuse_for_account(now)
            self.admit(now)

    def close(self) -> None:
        """Let go of the upstreams: this pool is forgotten."""
        for upstream in self.upstreams:
            upstream.on_end.remove(self._on_end)

    def _look_again(self) -> None:
        self._timer = None
        self.admit(self._loop.time())

    # -- accounts that are refused -------------------------------------------------------------------------------------

    def _check_accounts(self, now: float, left: int) -> None:
        """Raise `AccountClosed` if each upstream that is left refuses the account."""
        if (closed := self._refusing(now, left)) is not None:
            raise self._account_closed(now, closed)

    def _refusing(self, now: float, left: int) -> Upstream | None:
        """Return an upstream that refuses the account if none that is left may be asked: not even for a probe."""
        closed: Upstream | None = None
        for bit, upstream in enumerate(self.upstreams):
            if left >> bit & 1:
                circuit = upstream.circuit
                if circuit.state is CircuitState.BILLING and not circuit.may_probe(now):
                    closed = closed or upstream
                elif self._only_upstream is not None or upstream.unready_reason() is None:
                    return None
        return closed

    def _refuse_for_account(self, now: float) -> None:
        """Refuse every ticket for which only upstreams are left that refuse the account."""
        for left, queue in [(self._all, self.queue), *self._restricted.items()]:
            if (closed := self._refusing(now, left)) is not None:
                while (ticket := queue.head()) is not None:
                    self.refuse(ticket, self._account_closed(now, closed))
        for ticket in [entry[2] for entry in self._later]:
            if (closed := self._refusing(now, self._untried_by(ticket))) is not None:
                self.refuse(ticket, self._account_closed(now, closed))

    @staticmethod
    def _account_closed(now: float, upstream: Upstream) -> AccountClosed:
        circuit = upstream.circuit
        return AccountClosed(circuit.reason, retry_after=max(circuit.next_probe - now, 0.0))

    # -- looking ahead -------------------------------------------------------------------------------------------------

    def predicted_wait(self, now: float, ticket: Ticket) -> float:
        """Return the predicted seconds that a new ticket like this one would wait in the queue."""
        return self._wait(now, ticket, guess=True)

    def would_wait(self, now: float, ticket: Ticket) -> bool:
        """Whether a newcomer like this one could not start at once."""
        return not self.is_empty or self._choose(now, ticket, self._untried_by(ticket))[0] is None

    def has_another(self, ticket: Ticket, upstream: Upstream) -> bool:
        """Whether an upstream that the ticket has not tried, beside this one, could take it."""
        if self._only_upstream is not None:
            return False
        return any(one is not upstream and self._may_take(ticket, one) for one in self.upstreams)

    def patience(self, now: float, ticket: Ticket, upstream: Upstream) -> float:
        """Return the seconds without a byte after which an attempt at `upstream` is given up; inf if no other is left.

        The upstream's own patience, but no longer than another one could still answer in time after it. For that, no
        attempt is given up before it has taken longer than the upstream's answers do.
        """
        others = [one for one in self.upstreams if one is not upstream and self._may_take(ticket, one)]
        if not others:
            return inf
        last_call = ticket.deadline - min(_seconds_needed(ticket, one) for one in others) - now
        usual = max(_seconds_needed(ticket, upstream), SWITCH_ANSWERS * upstream.slow_seconds)
        return min(upstream.patience(ticket), max(last_call, usual))

    @staticmethod
    def _may_take(ticket: Ticket, upstream: Upstream) -> bool:
        """Whether the ticket has not tried the upstream, which is ready and does not refuse the account."""
        refused = upstream.circuit.state is CircuitState.BILLING
        return upstream not in ticket.tried and not refused and upstream.unready_reason() is None

    def _untried_by(self, ticket: Ticket) -> int:
        """The upstreams that the ticket has not tried, as a set of bits; all of them again once it has tried each."""
        if not ticket.tried:
            return self._all
        return sum(1 << bit for bit, one in enumerate(self.upstreams) if one not in ticket.tried) or self._all

    def _untried_upstreams(self, ticket: Ticket) -> list[tuple[int, Upstream]]:
        left = self._untried_by(ticket)
        return [(bit, one) for bit, one in enumerate(self.upstreams) if left >> bit & 1]

    def _latency(self, left: int) -> float:
        if self._only_upstream is not None:
            return self._only_upstream.latency
        return min(one.latency for bit, one in enumerate(self.upstreams) if left >> bit & 1)

    def _check_reachable(self, now: float, ticket: Ticket) -> None:
        left = ticket.deadline - now
        latency = self._latency(self._untried_by(ticket))
        wait = self._wait(now, ticket, guess=False)
        if wait + latency > SERVABLE_SHARE * left and self.queue.serve_newest_first(ticket.priority, ticket.key):
            wait = self._wait(now, ticket, guess=False)
        if wait + latency + min(self._kept_seconds(now, ticket), KEPT_SHARE * left) > left:
            raise DeadlineUnreachable(
                f"the wait ahead is about {wait:.1f} s and an answer takes {latency:.1f} s, "
                f"but only {left:.1f} s are left: {_WAY_OUT}",
                retry_after=self.promise(now, ticket),
            )

    def _wait(self, now: float, ticket: Ticket, *, guess: bool) -> float:
        """Seconds until a newcomer could start. `guess` False: if the next probe is taken: nobody is refused upon a
        guess.
        """
        requests, cost = self.queue.ahead_of(ticket)
        if self._restricted:
            requests += sum(len(queue) for queue in self._restricted.values())
            cost += sum(queue.cost for queue in self._restricted.values())
        return self._seconds(
            now, ticket, [one for _, one in self._untried_upstreams(ticket)], requests, cost, guess=guess
        )

    def _seconds(
        self, now: float, ticket: Ticket, upstreams: Sequence[Upstream], requests: float, cost: float, *, guess: bool
    ) -> float:
        """Seconds until `upstreams` together could start this ticket behind so many others."""
        rate = 0.0
        for one in upstreams:
            seconds = one.circuit.seconds_left(now) if guess else one.next_probe_in(now)
            seconds += one.seconds_for(now, ticket, requests, cost, guess=guess)
            if len(upstreams) == 1 or seconds <= 0:
                return seconds
            rate += 1.0 / seconds
        return 1.0 / rate if rate else inf

    def _is_late_below(self, now: float, ticket: Ticket) -> bool:
        """Whether the ticket is predicted to be late if only the lowest tier serves it."""
        lowest = self.upstreams[0].tier
        below = [one for one in self.upstreams if one.tier == lowest and not one.unavailable]
        if not below or len(below) == len(self.upstreams):
            return False
        wait = self._seconds(now, ticket, below, *self.queue.ahead_of(ticket), guess=True)
        return now + wait + min(one.latency for one in below) > ticket.deadline

    # -- those who are sent away, and come back ------------------------------------------------------------------------

    def recognise(self, ticket: Ticket) -> None:
        """Mark the ticket if a place is reserved for it now: its caller returns at the time of its Retry-After."""
        if self.promises is not None:
            ticket.promised = self.promises.redeem(self._loop.time(), ticket.key)

    def promise(self, now: float, ticket: Ticket, room: float = inf) -> float:
        """Reserve a place and return the seconds after which this ticket's caller is admitted if it asks again.

        `room` is the number of tickets that can wait at once.
        """
        per_second = min(self._throughput(now, ticket), KEPT_SHARE * room)
        if self.promises is None:
            self.promises = Promises()
        return self.promises.make(now, ticket.key, self.predicted_wait(now, ticket), per_second)

    def kept(self, now: float, ticket: Ticket) -> int:
        """Return the number of places that this new ticket must leave for callers that will return soon."""
        if ticket.promised or self.promises is None or not len(self.promises):
            return 0
        return self.promises.due(now, SOON_SECONDS + 1.0 / self._throughput(now, ticket))

    def _kept_seconds(self, now: float, ticket: Ticket) -> float:
        kept = self.kept(now, ticket)
        return kept / self._throughput(now, ticket) if kept else 0.0

    def _throughput(self, now: float, ticket: Ticket) -> float:
        return sum(one.throughput(now, ticket) for one in self.upstreams)

    # -- accounting of the causes of waits -----------------------------------------------------------------------------

    def _on_ticket_removed(self, ticket: Ticket, now: float) -> None:
        self._book_wait(now)
        ticket.leave_queue(self._wait_seconds)
        self._urgent.discard(ticket)
        if ticket.expiry is not None:
            ticket.expiry.cancel()
            ticket.expiry = None

    def _expire(self, ticket: Ticket) -> None:
        ticket.expiry = None
        now, since = self._loop.time(), ticket.stopwatch.started
        if ticket.permit is None or ticket.permit.done():
            return
        why = DeadlineUnreachable(
            f"it waited {now - since:.1f} s of {ticket.deadline - since:.1f} s, and can no longer be answered "
            f"in time, held by {self.cause or 'turn'}: {_WAY_OUT}",
            retry_after=self.promise(now, ticket),
        )
        self.refuse(ticket, why)
        self.admit(now)

    def _book_wait(self, now: float) -> None:
        """Book the time since the last call to the present cause. One total serves all tickets, without a loop."""
        if self.queue.tickets or self._restricted:
            self._wait_seconds[CAUSES.index(self.cause or "turn")] += now - self._cause_since
        self._cause_since = now


def _seconds_needed(ticket: Ticket, upstream: Upstream) -> float:
    """Return the seconds that an upstream should have for its answer."""
    share = SWITCH_SHARE * (ticket.deadline - ticket.stopwatch.started)
    return max(SWITCH_ANSWERS * upstream.latency, min(share, MIN_SWITCH_SECONDS)) if upstream.latency else share
