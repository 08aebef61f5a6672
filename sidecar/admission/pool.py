"""The waiting tickets of one model and the upstreams that can answer them. `admit` makes every decision.

*Decide synchronously, act afterwards*: `admit` examines the queues and every gate, and grants permits. It runs after
every change (a ticket arrived or left, an attempt ended, time opened a gate) and never awaits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from heapq import nlargest
from math import inf
from operator import itemgetter

from sidecar.admission.errors import AccountClosed, DeadlineUnreachable, NotAdmitted, StillFailing
from sidecar.admission.gates.circuit import Circuit, CircuitState
from sidecar.admission.later import Later
from sidecar.admission.queue import FairQueue
from sidecar.admission.retry_after import Promises
from sidecar.admission.ticket import CAUSES, Cause, Priority, Ticket
from sidecar.admission.upstream import Permit, Upstream

#: While tickets wait, the gates are examined again after at most this many seconds: a learned pace changes with time.
LOOK_AGAIN_SECONDS = 0.25
#: If a new ticket needs more than this share of its remaining time (predicted wait plus answer), its key's backlog
#: cannot be served in time: the key is then served newest first.
SERVABLE_SHARE = 0.5
#: A new caller leaves room for callers whose Retry-After ends within SOON_SECONDS: at most KEPT_SHARE of the queue's
#: places, and as much time as serving them takes, but at most KEPT_SHARE of the new caller's own remaining time.
SOON_SECONDS, KEPT_SHARE = 4.0, 0.5
#: Seconds. While the last waiting ticket is predicted to wait longer than this, a higher tier may take tickets.
SPILL_SECONDS = 2.0
#: Seconds of a ticket's time to reserve for an upstream's answer: SWITCH_ANSWERS times its usual answer time, and at
#: least MIN_SWITCH_SECONDS (or SWITCH_SHARE of the ticket's whole time, if that is shorter). While no answer time is
#: known: SWITCH_SHARE of the whole time. When only this much time is left, the present upstream is slower than it was
#: predicted: a waiting ticket may go to a higher tier, and an attempt without a byte is stopped so that another
#: upstream can answer.
SWITCH_ANSWERS, MIN_SWITCH_SECONDS, SWITCH_SHARE = 1.5, 0.5, 0.25
#: Added to the load of an upstream that would answer too late. (The load is the share of its permits that are in use.)
LATE = 1e6
#: Why a ticket cannot start at an upstream now: the loop time when it may start there, the gate that delays it, and the
#: upstream.
Delay = tuple[float, Cause, Upstream]
_WAY_OUT = (
    "ask less often, allow more time (X-Request-Timeout), or let a newer frame take an older one's place "
    "(X-Queue-Policy: latest)"
)


class Pool:
    """The queues and the upstreams of one model. All methods are synchronous.

    A ticket has *tried* an upstream if its attempt failed there and would fail there again. Such tickets wait in
    restricted queues, one for each set of untried upstreams. So no ticket waits behind a ticket that is restricted to
    other upstreams. Restricted queues are served first, because they are short. While the first ticket of a queue
    waits, tickets of later queues must not take an upstream that this ticket could use.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, upstreams: Sequence[Upstream]) -> None:
        now = loop.time()
        self._loop = loop
        self.upstreams = tuple(upstreams)
        self._only_upstream = upstreams[0] if len(upstreams) == 1 else None
        self.queue = FairQueue()
        """The tickets that may go to every upstream."""
        self._restricted: dict[tuple[Upstream, ...], FairQueue] = {}  # key: the untried upstreams, in order
        self._later = Later()
        self._places: dict[Ticket, FairQueue | Later] = {}  # every waiting ticket, and its queue
        self._latest: dict[str, Ticket] = {}  # by key: the waiting ticket that a newer frame supersedes
        self.promises: Promises | None = None
        """Reserved places of callers that got a Retry-After; None until the first one."""
        self._timer: asyncio.TimerHandle | None = None
        self._wait_seconds = [0.0] * len(CAUSES)
        self._cause: Cause | None = None  # what delays the first ticket of the first queue that waits
        self._cause_since = now
        self.last_used = now
        """Loop time at which the last ticket arrived or the last attempt ended."""
        self.in_flight = 0
        """Attempts of this pool's tickets that are in flight."""
        self._urgent: set[Ticket] = set()  # tickets that a higher tier should take now; see `_spills`
        for upstream in upstreams:
            upstream.on_end.append(self._on_end)

    def __repr__(self) -> str:
        names = ",".join(upstream.name for upstream in self.upstreams)
        return f"<Pool {id(self):#x} {names} waiting={self.waiting} cause={self.cause}>"

    # -- waiting tickets -----------------------------------------------------------------------------------------------

    def queues(self) -> Iterator[FairQueue | Later]:
        """Yield every queue."""
        yield from self._restricted.values()
        yield self.queue
        yield self._later

    @property
    def cause(self) -> Cause | None:
        """The present cause of waiting; None while no ticket waits."""
        if len(self._places) > len(self._later.tickets):
            return self._cause or "turn"
        return "hold" if self._places else None

    def waiting_of(self, priority: Priority) -> int:
        """Return the number of waiting tickets of one priority class."""
        return sum(queue.length(priority) for queue in self.queues())

    def longest_queues(self, most: int) -> list[tuple[str, int, float]]:
        """Return the `most` keys with the most waiting tickets: key, their number, arrival time of the oldest ticket.

        Walks over all tickets: for displays, not for the request path.
        """
        totals: dict[str, tuple[int, float]] = {}
        for ticket in self._places:
            count, oldest = totals.get(ticket.key, (0, inf))
            totals[ticket.key] = (count + 1, min(oldest, ticket.stopwatch.started))
        return nlargest(most, ((key, *of_key) for key, of_key in totals.items()), key=itemgetter(1))

    @property
    def has_learned(self) -> bool:
        """True if a limit is known of an upstream that only this pool uses."""
        return any(len(upstream.on_end) == 1 and upstream.learned() for upstream in self.upstreams)

    @property
    def is_empty(self) -> bool:
        """True if no ticket waits."""
        return not self._places

    @property
    def waiting(self) -> int:
        """Number of waiting tickets, including retries that may not be sent yet."""
        return len(self._places)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the request bodies of all waiting tickets."""
        return sum(queue.bytes for queue in self.queues())

    # -- a ticket enters and leaves ------------------------------------------------------------------------------------

    def enter(self, ticket: Ticket) -> Permit | asyncio.Future[Permit]:
        """Return a permit immediately, or queue the ticket and return the future of its permit or error.

        Raises `DeadlineUnreachable` for a ticket that cannot be served in time, `AccountClosed` while every provider
        refuses the account.
        """
        now = self.last_used = self._loop.time()
        only, may_start = self._only_upstream, not self._places and ticket.not_before <= now
        if may_start and only is not None and only.opening(now, ticket)[1] is None:
            return self._start(only, ticket, now)  # the usual case
        if (circuit := self._refusing(now)) is not None:
            raise _account_closed(now, circuit)
        if may_start and only is None:
            upstream, _, _ = self._choose(now, ticket, self._allowed(now, self._untried_by(ticket)))
            if upstream is not None:
                return self._start(upstream, ticket, now)
        if not ticket.requeued:
            self._check_reachable(now, ticket)
        permit = self.enqueue(now, ticket)
        self.admit(now)
        return permit

    def leave(self, ticket: Ticket) -> None:
        """Remove a ticket whose caller has disconnected."""
        now = self._loop.time()
        if self.take_out(now, ticket):
            self.admit(now)

    def refuse(self, ticket: Ticket, why: NotAdmitted) -> None:
        """Remove a waiting ticket from its queue and give the error to its caller."""
        self.take_out(self._loop.time(), ticket)
        if ticket.permit is not None and not ticket.permit.done():
            ticket.permit.set_exception(why)
            ticket.permit = None

    def superseded_by(self, ticket: Ticket) -> Ticket | None:
        """Return the waiting ticket that this newer frame of its key replaces, or None. Without a key: always None."""
        other = self._latest.get(ticket.key) if ticket.key else None
        return other if other is not None and other.is_waiting else None

    def enqueue(self, now: float, ticket: Ticket) -> asyncio.Future[Permit]:
        """Add the ticket to its queue and set its timer. Return the future of its permit or error."""
        self._book_wait(now)
        permit = ticket.permit
        if permit is None or permit.done():
            permit = ticket.permit = self._loop.create_future()
        if ticket.latest:
            self._latest[ticket.key] = ticket
        if ticket.not_before > now:
            ticket.waits_since = now
            self._later.add(ticket)
            self._places[ticket] = self._later
            ticket.expiry = self._loop.call_at(ticket.deadline, self._expire, ticket)
            return permit
        ticket.enter_queue(self._wait_seconds)
        untried = self._untried_by(ticket)
        queue = self.queue if untried == self.upstreams else self._restricted.setdefault(untried, FairQueue())
        queue.add(ticket)
        self._places[ticket] = queue
        switch_at = inf if self._only_upstream is not None else self._latest_switch_at(ticket, untried)
        if switch_at == inf:
            self._set_expiry(now, ticket)
        elif self._is_late_below(now, ticket):
            self._urgent.add(ticket)
            self._set_expiry(now, ticket)
        else:
            ticket.expiry = self._loop.call_at(max(switch_at, now), self._mark_urgent, ticket)
        return permit

    def _set_expiry(self, now: float, ticket: Ticket) -> None:
        at = ticket.deadline - self._latency(self._untried_by(ticket))
        ticket.expiry = self._loop.call_at(max(at, now), self._expire, ticket)

    def _latest_switch_at(self, ticket: Ticket, untried: tuple[Upstream, ...]) -> float:
        """Return the latest loop time at which a higher tier should take the ticket; inf if there is none."""
        lowest = self.upstreams[0].tier
        needed = [_seconds_needed(ticket, upstream) for upstream in untried if upstream.tier > lowest]
        return ticket.deadline - max(needed, default=-inf)

    def _mark_urgent(self, ticket: Ticket) -> None:
        """Mark a waiting ticket as urgent, because soon no higher tier could answer it in time."""
        now = self._loop.time()
        self._urgent.add(ticket)
        self._set_expiry(now, ticket)
        self.admit(now)

    def _release_later(self, now: float) -> None:
        """Queue the retries whose `not_before` has passed."""
        while (ticket := self._later.head()) is not None and ticket.not_before <= now:
            if ticket.only_while_failing and not any(upstream.circuit.failing for upstream in self._untried_by(ticket)):
                self.refuse(ticket, StillFailing("the other requests are answered"))
                continue
            self.take_out(now, ticket)
            if ticket.is_waiting:  # else its caller left in this loop iteration
                self.enqueue(now, ticket)

    def take_out(self, now: float, ticket: Ticket) -> bool:
        """Remove a waiting ticket from its queue. Return False if the ticket is not waiting."""
        queue = self._places.get(ticket)
        if queue is None:
            return False
        queue.remove(ticket)
        self._on_removed(now, ticket)
        return True

    def _on_removed(self, now: float, ticket: Ticket) -> None:
        """Add up the causes of its wait, and cancel its timer."""
        if self._latest.get(ticket.key) is ticket:
            del self._latest[ticket.key]
        if self._places.pop(ticket) is self._later:
            ticket.add_cause("hold", now - ticket.waits_since)
        else:
            self._book_wait(now)
            ticket.leave_queue(self._wait_seconds)
            self._urgent.discard(ticket)
        if ticket.expiry is not None:
            ticket.expiry.cancel()
            ticket.expiry = None

    # -- the decision --------------------------------------------------------------------------------------------------

    def admit(self, now: float) -> None:
        """Grant permits to the next tickets until a gate is closed. Then set the timer for the next call."""
        self._book_wait(now)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._later.tickets:
            self._release_later(now)
        self._cause = None
        claimed: tuple[Upstream, ...] = ()
        look_at = inf
        if self._restricted:
            for untried, queue in list(self._restricted.items()):
                claimed, opens_at = self._admit_from(now, queue, untried, claimed)
                look_at = min(look_at, opens_at)
                if not queue:
                    del self._restricted[untried]
        if self.queue.tickets:
            _, opens_at = self._admit_from(now, self.queue, self.upstreams, claimed)
            look_at = min(look_at, opens_at)
        if look_at < inf:
            look_at = min(look_at, now + LOOK_AGAIN_SECONDS)
        if (later := self._later.head()) is not None:
            look_at = min(look_at, later.not_before)
        if look_at < inf:
            self._timer = self._loop.call_at(look_at, self._look_again)

    def _admit_from(
        self, now: float, queue: FairQueue, untried: tuple[Upstream, ...], claimed: tuple[Upstream, ...]
    ) -> tuple[tuple[Upstream, ...], float]:
        """Admit tickets from one queue until its first ticket cannot start.

        `claimed`: the upstreams that earlier queues wait for; tickets of this queue must not use them. Return the
        upstreams that this and earlier queues wait for, and the loop time when an upstream of this queue opens.
        """
        while (ticket := queue.head()) is not None:
            if ticket.permit is None or ticket.permit.done():  # its caller left in this loop iteration
                queue.remove(ticket)
                self._on_removed(now, ticket)
                continue
            allowed = self._allowed(now, untried)
            unclaimed = tuple(upstream for upstream in allowed if upstream not in claimed) if claimed else allowed
            upstream, opens_at, delays = self._choose(now, ticket, unclaimed)
            if upstream is None:
                if self._cause is None and delays:
                    self._cause = min(delays, key=itemgetter(0))[1]
                for _, cause, delayed in delays:
                    delayed.note_delay(cause)
                return claimed + allowed, opens_at
            queue.take(ticket)
            self._on_removed(now, ticket)
            ticket.permit.set_result(self._start(upstream, ticket, now))
        return claimed, inf

    def _allowed(self, now: float, untried: tuple[Upstream, ...]) -> tuple[Upstream, ...]:
        """Return the upstreams to which a ticket may go that has tried all except `untried`.

        These are the untried ones. But while none of them is usable, the ticket may go to every upstream: another
        attempt where it failed is better than a long wait.
        """
        if untried is self.upstreams or any(_is_usable(now, upstream) for upstream in untried):
            return untried
        return self.upstreams

    def _choose(
        self, now: float, ticket: Ticket, untried: tuple[Upstream, ...]
    ) -> tuple[Upstream | None, float, list[Delay]]:
        """Choose the upstream with open gates and the smallest load in the lowest possible tier, from `untried`.

        If none has open gates, return None, the loop time when the first one opens, and what delays the ticket at each.
        """
        only = self._only_upstream
        if only is not None:
            opens_at, cause = only.opening(now, ticket)
            return (only, now, []) if cause is None else (None, opens_at, [(opens_at, cause, only)])
        best: Upstream | None = None
        soonest, delays = inf, []
        tier, least = 0, inf
        for upstream in untried:
            if upstream.unready_reason() is not None:
                soonest = min(soonest, now + LOOK_AGAIN_SECONDS)  # poll: there is no event when it is ready again
                continue
            if upstream.tier > tier:
                if least < LATE or (best is None and tier and not self._spills(now, ticket, upstream.tier)):
                    break
                tier = upstream.tier
            opens_at, cause = upstream.opening(now, ticket)
            if cause is not None:
                soonest = min(soonest, opens_at)
                delays.append((opens_at, cause, upstream))
                continue
            load = upstream.concurrency.in_flight / upstream.concurrency.allowed
            if now + upstream.latency > ticket.deadline:
                load += LATE  # choose a late upstream only if no open upstream can answer in time
            if load < least:
                best, least = upstream, load
        return best, soonest if best is None else now, delays

    def _spills(self, now: float, ticket: Ticket, tier: int) -> bool:
        """Return True if a higher tier may take tickets: the lower tiers cannot serve all waiting tickets in time."""
        below = [
            lower
            for lower in self.upstreams
            if lower.tier < tier and lower.unready_reason() is None and not lower.unavailable
        ]
        if not below or self._urgent:
            return True
        if now + min(lower.circuit.seconds_left(now) + lower.latency for lower in below) > ticket.deadline:
            return True
        requests = max(len(self.queue) - 1, 0)
        return self._seconds(now, ticket, below, requests, self.queue.cost, guess=True) > SPILL_SECONDS

    def _start(self, upstream: Upstream, ticket: Ticket, now: float) -> Permit:
        ticket.backend = upstream.name or ticket.backend
        self.in_flight += 1
        return upstream.start(now, ticket, self._ended)

    def _ended(self, permit: Permit) -> None:
        """Give the free permit to the next ticket, in this pool or in a pool that shares the upstream."""
        now = self.last_used = self._loop.time()
        self.in_flight -= 1
        upstream = permit.upstream
        pools = upstream.on_end
        if len(pools) == 1:
            pools[0](now)
            return
        for on_end in tuple(pools):
            started = upstream.started
            on_end(now)
            if upstream.started > started:  # the pools take turns: next time, this pool is asked last
                pools.remove(on_end)
                pools.append(on_end)

    def _on_end(self, now: float) -> None:
        if not self.is_empty:
            if (circuit := self._refusing(now)) is not None:
                for ticket in list(self._places):
                    self.refuse(ticket, _account_closed(now, circuit))
            self.admit(now)

    def close(self) -> None:
        """Unregister from the upstreams, because this pool is deleted."""
        for upstream in self.upstreams:
            upstream.on_end.remove(self._on_end)

    def _look_again(self) -> None:
        self._timer = None
        self.admit(self._loop.time())

    # -- accounts that are refused -------------------------------------------------------------------------------------

    def _refusing(self, now: float) -> Circuit | None:
        """If all upstreams refuse the account and none may get a probe now, return a circuit of one of them, else None.

        Upstreams that are not ready are ignored, except if the pool has only one upstream.
        """
        refusing: Circuit | None = None
        for upstream in self.upstreams:
            circuit = upstream.circuit
            if circuit.state is CircuitState.BILLING and not circuit.may_probe(now):
                refusing = refusing or circuit
            elif self._only_upstream is not None or upstream.unready_reason() is None:
                return None
        return refusing

    # -- predictions ---------------------------------------------------------------------------------------------------

    def predicted_wait(self, now: float, ticket: Ticket) -> float:
        """Return the predicted seconds that a new ticket like this one would wait in the queue."""
        return self._wait(now, ticket, guess=True)

    def would_wait(self, now: float, ticket: Ticket) -> bool:
        """Return True if a new ticket like this one would have to wait."""
        return not self.is_empty or self._choose(now, ticket, self._allowed(now, self._untried_by(ticket)))[0] is None

    def has_another(self, ticket: Ticket, upstream: Upstream) -> bool:
        """Return True if another upstream could take the ticket now, after its attempt at `upstream`."""
        return self._only_upstream is None and bool(self._others(self._loop.time(), ticket, upstream))

    def _others(self, now: float, ticket: Ticket, upstream: Upstream) -> list[Upstream]:
        """Return the usable upstreams except `upstream` that the ticket has not tried.

        If there are none and `upstream` is unavailable: all other usable ones, because `_allowed` lets it go there.
        """
        usable = [other for other in self.upstreams if other is not upstream and _is_usable(now, other)]
        untried = [other for other in usable if other not in ticket.tried]
        return usable if upstream.unavailable and not untried else untried

    def patience(self, now: float, ticket: Ticket, upstream: Upstream) -> float:
        """Return the seconds without a byte after which an attempt at `upstream` is stopped.

        inf: no other upstream can take the ticket, and this is no probe of an open circuit. Normally the result is the
        upstream's own patience. It is shorter if otherwise too little time would be left for another upstream to
        answer, but never shorter than the time that slow answers of this upstream take.
        """
        if self._only_upstream is not None:
            return inf
        others = self._others(now, ticket, upstream)
        if not others:
            return upstream.patience(ticket) if upstream.unavailable else inf
        switch_in = ticket.deadline - min(_seconds_needed(ticket, other) for other in others) - now
        usual = max(_seconds_needed(ticket, upstream), SWITCH_ANSWERS * upstream.slow_seconds)
        return min(upstream.patience(ticket), max(switch_in, usual))

    def _untried_by(self, ticket: Ticket) -> tuple[Upstream, ...]:
        """Return the upstreams that the ticket has not tried. If it has tried all of them: all of them."""
        if not ticket.tried:
            return self.upstreams
        return tuple(upstream for upstream in self.upstreams if upstream not in ticket.tried) or self.upstreams

    def _latency(self, untried: tuple[Upstream, ...]) -> float:
        """Return the smallest latency of the untried upstreams in seconds."""
        return min(upstream.latency for upstream in untried)

    def _check_reachable(self, now: float, ticket: Ticket) -> None:
        """Raise `DeadlineUnreachable` if the predicted wait and answer take longer than the ticket's remaining time."""
        seconds_left = ticket.deadline - now
        latency = self._latency(self._untried_by(ticket))
        wait = self._wait(now, ticket, guess=False)
        if wait + latency > SERVABLE_SHARE * seconds_left and self.queue.serve_newest_first(
            ticket.priority, ticket.key
        ):
            wait = self._wait(now, ticket, guess=False)
        if wait + latency + min(self._kept_seconds(now, ticket), KEPT_SHARE * seconds_left) > seconds_left:
            raise DeadlineUnreachable(
                f"the wait ahead is about {wait:.1f} s and an answer takes {latency:.1f} s, "
                f"but only {seconds_left:.1f} s are left: {_WAY_OUT}",
                retry_after=self.promise(now, ticket),
            )

    def _wait(self, now: float, ticket: Ticket, *, guess: bool) -> float:
        """Return the predicted seconds until a new ticket could start.

        `guess=False`: ignore limits that are only guesses, and assume that the next probe is accepted. A request must
        never be refused because of a guess.
        """
        requests, cost = self.queue.ahead_of(ticket)
        return self._seconds(now, ticket, self._untried_by(ticket), requests, cost, guess=guess)

    def _seconds(
        self,
        now: float,
        ticket: Ticket,
        upstreams: Sequence[Upstream],
        requests: float,
        cost: float,
        *,
        guess: bool,
    ) -> float:
        """Return the seconds until `upstreams` together could start this ticket.

        Ahead of the ticket are `requests` other tickets with `cost` estimated LLM tokens in total. For each upstream,
        this method adds the tickets of the restricted queues that may use it.
        """
        rate = 0.0
        for upstream in upstreams:
            before, cost_before = requests, cost
            for untried, queue in self._restricted.items():
                if upstream in untried:
                    before += len(queue)
                    cost_before += queue.cost
            seconds = upstream.circuit.seconds_left(now) if guess else upstream.next_probe_in(now)
            seconds += upstream.seconds_for(now, ticket, before, cost_before, guess=guess)
            if len(upstreams) == 1 or seconds <= 0:
                return seconds
            rate += 1.0 / seconds
        return 1.0 / rate if rate else inf

    def _is_late_below(self, now: float, ticket: Ticket) -> bool:
        """Return True if the ticket would probably be answered after its deadline if only the lowest tier served it."""
        lowest = self.upstreams[0].tier
        below = [upstream for upstream in self.upstreams if upstream.tier == lowest and not upstream.unavailable]
        if not below or len(below) == len(self.upstreams):
            return False
        wait = self._seconds(now, ticket, below, *self.queue.ahead_of(ticket), guess=True)
        return now + wait + min(upstream.latency for upstream in below) > ticket.deadline

    # -- callers that return after a Retry-After -----------------------------------------------------------------------

    def recognise(self, ticket: Ticket) -> None:
        """Mark the ticket as promised if a place is reserved for it now: its caller returns after its Retry-After."""
        if self.promises is not None:
            ticket.promised = self.promises.redeem(self._loop.time(), ticket.key)

    def promise(self, now: float, ticket: Ticket, room: float = inf) -> float:
        """Reserve a place for this ticket's caller and return its Retry-After in seconds.

        `room` is the number of tickets that can wait at once.
        """
        per_second = min(self._throughput(now, ticket), KEPT_SHARE * room)
        if self.promises is None:
            self.promises = Promises()
        return self.promises.make(now, ticket.key, self.predicted_wait(now, ticket), per_second)

    def kept(self, now: float, ticket: Ticket) -> int:
        """Return the number of places that this new ticket must leave free for callers that will return soon."""
        if ticket.promised or self.promises is None or not len(self.promises):
            return 0
        return self.promises.due(now, SOON_SECONDS + 1.0 / self._throughput(now, ticket))

    def _kept_seconds(self, now: float, ticket: Ticket) -> float:
        kept = self.kept(now, ticket)
        return kept / self._throughput(now, ticket) if kept else 0.0

    def _throughput(self, now: float, ticket: Ticket) -> float:
        return sum(upstream.throughput(now, ticket) for upstream in self.upstreams)

    # -- accounting of the causes of waits -----------------------------------------------------------------------------

    def _expire(self, ticket: Ticket) -> None:
        ticket.expiry = None
        now, since = self._loop.time(), ticket.stopwatch.started
        if not ticket.is_waiting:
            return
        why = DeadlineUnreachable(
            f"it waited {now - since:.1f} s of {ticket.deadline - since:.1f} s, and can no longer be answered "
            f"in time, held by {self.cause or 'turn'}: {_WAY_OUT}",
            retry_after=self.promise(now, ticket),
        )
        self.refuse(ticket, why)
        self.admit(now)

    def _book_wait(self, now: float) -> None:
        """Add the seconds since the last call to the total of the present cause.

        Each ticket reads these totals when it enters and leaves a queue, so no loop over all tickets is needed.
        """
        self._wait_seconds[CAUSES.index(self._cause or "turn")] += now - self._cause_since
        self._cause_since = now


def _is_usable(now: float, upstream: Upstream) -> bool:
    """Return True if the upstream is ready and may answer an attempt that starts now, even if this is a probe.

    A probe of an upstream that refuses the account does not count: it would hardly ever be answered.
    """
    circuit = upstream.circuit
    return upstream.unready_reason() is None and (
        not upstream.unavailable or (circuit.state is not CircuitState.BILLING and circuit.may_probe(now))
    )


def _account_closed(now: float, circuit: Circuit) -> AccountClosed:
    return AccountClosed(circuit.reason, retry_after=max(circuit.next_probe - now, 0.0))


def _seconds_needed(ticket: Ticket, upstream: Upstream) -> float:
    """Return the seconds to reserve for the upstream's answer; see SWITCH_ANSWERS."""
    share = SWITCH_SHARE * (ticket.deadline - ticket.stopwatch.started)
    return max(SWITCH_ANSWERS * upstream.latency, min(share, MIN_SWITCH_SECONDS)) if upstream.latency else share
