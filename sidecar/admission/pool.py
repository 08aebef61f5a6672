"""The waiting tickets of one model and the upstreams that can answer them. `admit` makes every decision.

*Decide synchronously, act afterwards*: `admit` examines the queues and every gate, and grants permits. It runs after
every change (a ticket arrived or left, an attempt ended, time opened a gate) and never awaits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from math import inf
from operator import itemgetter

from sidecar.admission.errors import (
    AccountClosed,
    DeadlineUnreachable,
    KeyClosed,
    NotAdmitted,
    QuotaClosed,
    StillFailing,
)
from sidecar.admission.forecast import Forecast
from sidecar.admission.gates.circuit import Circuit, CircuitState
from sidecar.admission.queue import FairQueue
from sidecar.admission.retry_after import Promises
from sidecar.admission.ticket import Cause, Ticket
from sidecar.admission.upstream import Permit, Upstream
from sidecar.admission.waiting import Waiting

#: While tickets wait, the gates are examined again after at most this many seconds: a learned pace changes with time.
LOOK_AGAIN_SECONDS = 0.25
#: If a new ticket needs more than this share of its remaining time (predicted wait plus answer), its key's backlog
#: cannot be served in time: the key is then served newest first.
SERVABLE_SHARE = 0.5
#: A new caller leaves room for callers whose Retry-After ends within SOON_SECONDS: at most KEPT_SHARE of the queue's
#: places, and as much time as serving them takes, but at most KEPT_SHARE of the new caller's own remaining time.
SOON_SECONDS, KEPT_SHARE = 4.0, 0.5
#: Added to the load of an upstream that would answer too late. (The load is the share of its permits that are in use.)
LATE = 1e6
#: Why a ticket cannot start at an upstream now: the loop time when it may start there, the gate that delays it, and the
#: upstream.
Delay = tuple[float, Cause, Upstream]
_WAY_OUT = (
    "ask less often, allow more time (X-Request-Timeout), or let a newer frame take an older one's place "
    "(X-Queue-Policy: latest)"
)


#: Bytes. A body with a usual frame, and its head, are smaller.
SMALL_BYTES = 1024 * 1024
#: The share of each bound on bytes that larger bodies may use. The rest is for usual frames, of any camera.
LARGE_SHARE = 2 / 3


class BodiesInFlight:
    """The bytes of the bodies of all attempts in flight, in all pools, and their bound. One body always fits.

    Large bodies may use only a part of the bound, so that they never keep usual frames waiting. The pools take turns
    with their large bodies.
    """

    __slots__ = ("_blocked", "_elsewhere", "_large_bytes", "_max_bytes", "bytes")

    def __init__(self, max_bytes: float = inf, elsewhere: Callable[[], int] = int) -> None:
        """`elsewhere` returns other bytes that share the bound."""
        self.bytes = 0
        self._large_bytes = 0
        self._max_bytes = max_bytes
        self._elsewhere = elsewhere
        self._blocked: dict[Pool, None] = {}
        """Pools with a ticket that does not fit, in the order in which they get their turn."""

    def add(self, size_bytes: int) -> None:
        """Count the body of an attempt that starts. A negative size: it ends."""
        self.bytes += size_bytes
        if abs(size_bytes) > SMALL_BYTES:
            self._large_bytes += size_bytes

    def fits(self, pool: Pool, ticket: Ticket) -> bool:
        """Return whether an attempt of this ticket may start."""
        size = ticket.size_bytes
        if size <= SMALL_BYTES:
            return not self.bytes or self.bytes + size + self._elsewhere() <= self._max_bytes
        if self._blocked and next(iter(self._blocked)) is not pool:
            return False
        elsewhere = self._elsewhere()
        if self.bytes and self.bytes + size + elsewhere > self._max_bytes:
            return False
        return not self._large_bytes or self._large_bytes + size + elsewhere <= LARGE_SHARE * self._max_bytes

    def block(self, pool: Pool) -> None:
        """Let the pool wait for its turn."""
        self._blocked.setdefault(pool)

    def unblock(self, pool: Pool) -> None:
        """End a pool's turn: its next ticket fits, or no ticket waits."""
        self._blocked.pop(pool, None)

    def admit_next(self, now: float) -> None:
        """Give free bytes to the pools that wait for them."""
        for _ in range(len(self._blocked)):
            if not self._blocked:
                return
            first = next(iter(self._blocked))
            first.admit(now)
            if next(iter(self._blocked), None) is first:
                return


class Pool:
    """The waiting tickets and the upstreams of one model. All methods are synchronous.

    A ticket has *tried* an upstream if its attempt failed there and would probably fail there again. Such a ticket
    waits in a restricted queue: there is one for each set of untried upstreams. So it does not delay tickets that may
    go to other upstreams. The restricted queues are short, so they are served first. While the first ticket of a queue
    waits, the upstreams that it may use are reserved for it: tickets of the queues that are served later do not get
    them.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, upstreams: Sequence[Upstream], bodies: BodiesInFlight | None = None
    ) -> None:
        now = loop.time()
        self._loop = loop
        self._bodies = bodies or BodiesInFlight()
        self.upstreams = tuple(upstreams)
        self._only_upstream = upstreams[0] if len(upstreams) == 1 else None
        self.waiting = Waiting(now)
        self._forecast = Forecast(self.upstreams, self.waiting.queue, self.waiting.restricted)
        self.promises: Promises | None = None
        """Reserved places of callers that got a Retry-After; None until the first one."""
        self._timer: asyncio.TimerHandle | None = None
        self._admits_soon = False  # a call of `admit` is scheduled for the end of this loop iteration
        self.last_used = now
        """Loop time at which the last ticket arrived or the last attempt ended."""
        self.in_flight = 0
        """Attempts of this pool's tickets that are in flight."""
        self._unparked: Ticket | None = None  # the large ticket whose turn it is: later ones do not pass it
        self._urgent: set[Ticket] = set()  # tickets that wait too long; while there are any, higher tiers take tickets
        for upstream in upstreams:
            upstream.on_end.append(self._on_end)

    def __repr__(self) -> str:
        names = ",".join(upstream.name for upstream in self.upstreams)
        return f"<Pool {id(self):#x} {names} waiting={len(self.waiting)} cause={self.waiting.cause}>"

    @property
    def worth(self) -> tuple[bool, bool, bool]:
        """What would be lost with this pool, of the upstreams that only this pool uses: whether one has ever given an
        answer, whether a limit of it is known, and whether it refuses or fails every request at present.

        Callers can name any number of models, and each can get refusals. But only a model that exists answers.
        """
        exists = learned = is_open = False
        for upstream in self.upstreams:  # a plain loop, because a new name compares all pools
            if len(upstream.on_end) == 1:
                exists |= upstream.exists
                learned |= upstream.has_learned
                is_open |= upstream.circuit.state is not None
        return exists, learned, is_open

    # -- a ticket enters and leaves ------------------------------------------------------------------------------------

    def enter(self, ticket: Ticket) -> Permit | asyncio.Future[Permit]:
        """Return a permit immediately, or queue the ticket and return the future of its permit or error.

        Raises `DeadlineUnreachable` if the ticket cannot be served in time, and `AccountClosed` while all upstreams
        refuse the account.
        """
        now = self.last_used = self._loop.time()
        only = self._only_upstream
        may_start = not self.waiting.tickets and ticket.not_before <= now and self._bodies.fits(self, ticket)
        if may_start and only is not None and only.opening(now, ticket)[1] is None:
            return self._start(only, ticket, now)  # the usual case
        if (circuit := self._refusing(now, ticket.key)) is not None:
            raise _account_closed(now, circuit)
        if may_start and only is None:
            upstream, _, _ = self._choose(now, ticket, self._allowed(now, self._untried_by(ticket)))
            if upstream is not None:
                return self._start(upstream, ticket, now)
        if not ticket.requeued:
            self._check_reachable(now, ticket)
        permit = self.enqueue(now, ticket)
        queue = self.waiting.tickets[ticket]
        if queue is not self.waiting.queue or queue.head() is ticket:  # else an earlier ticket waits for the upstreams
            self.admit(now)
        return permit

    def leave(self, ticket: Ticket) -> None:
        """Remove a ticket whose caller has disconnected."""
        now = self._loop.time()
        if self.take_out(now, ticket):
            self.admit(now)
            self._bodies.admit_next(now)

    def refuse(self, ticket: Ticket, why: NotAdmitted) -> None:
        """Remove a waiting ticket from its queue and give the error to its caller."""
        self.take_out(self._loop.time(), ticket)
        if ticket.permit is not None and not ticket.permit.done():
            ticket.permit.set_exception(why)
            ticket.permit = None

    def enqueue(self, now: float, ticket: Ticket) -> asyncio.Future[Permit]:
        """Let the ticket wait, and set its timer. Return the future of its permit or error."""
        permit = ticket.permit
        if permit is None or permit.done():
            permit = ticket.permit = self._loop.create_future()
        untried = self._untried_by(ticket)
        # A doubted ticket waits in a queue of its own before all others, even if it may go to every upstream.
        self.waiting.add(now, ticket, None if untried is self.upstreams and not ticket.doubted else untried)
        if ticket.not_before > now:
            ticket.expiry = self._loop.call_at(ticket.deadline, self._expire, ticket)
        elif self._only_upstream is None and (switch_at := self._forecast.switch_at(now, ticket, untried)) < inf:
            ticket.expiry = self._loop.call_at(max(switch_at, now), self._mark_urgent, ticket)
        else:
            self._set_expiry(now, ticket)
        return permit

    def _set_expiry(self, now: float, ticket: Ticket) -> None:
        at = ticket.deadline - self._latency(ticket)
        ticket.expiry = self._loop.call_at(max(at, now), self._expire, ticket)

    def _mark_urgent(self, ticket: Ticket) -> None:
        """Let higher tiers take tickets while this one waits; see `Forecast.switch_at`."""
        now = self._loop.time()
        self._urgent.add(ticket)
        self._set_expiry(now, ticket)
        self.admit(now)

    def _release_later(self, now: float) -> None:
        """Queue the retries whose `not_before` has passed."""
        while (ticket := self.waiting.later.head()) is not None and ticket.not_before <= now:
            if (failed := ticket.only_while_failing) is not None and not failed.circuit.failing:
                self.refuse(ticket, StillFailing("the other requests are answered"))
                continue
            self.take_out(now, ticket)
            if ticket.is_waiting:  # else its caller left in this loop iteration
                self.enqueue(now, ticket)

    def take_out(self, now: float, ticket: Ticket) -> bool:
        """Remove a ticket from its queue, without an error for its caller. Return False if it is not waiting."""
        if ticket not in self.waiting.tickets:
            return False
        self._remove(now, ticket)
        return True

    def _remove(self, now: float, ticket: Ticket, *, served: bool = False) -> None:
        self.waiting.remove(now, ticket, served=served)
        if not self.waiting.tickets:
            self._bodies.unblock(self)
        self._urgent.discard(ticket)
        if ticket.expiry is not None:
            ticket.expiry.cancel()
            ticket.expiry = None

    # -- the decision --------------------------------------------------------------------------------------------------

    def admit(self, now: float) -> None:
        """Grant permits to the next tickets until a gate is closed. Then set the timer for the next call."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting = self.waiting
        waiting.set_cause(now, "turn")
        if waiting.later.tickets:
            self._release_later(now)
        for upstream in self.upstreams:
            if upstream.circuit.refused_keys and waiting.tickets and not upstream.circuit.probing:
                self._probe_with_another_key(now, upstream)
        look_at = inf
        if (large := waiting.parked.head()) is not None:
            look_at = now + LOOK_AGAIN_SECONDS
            if self._bodies.fits(self, large):
                waiting.unpark(large)
                self._unparked = large
        claimed: tuple[Upstream, ...] = ()
        queues = [*waiting.restricted.items(), (self.upstreams, waiting.queue)]
        if waiting.set_back.tickets:
            is_last = any(one.goes_last(now) for one in self.upstreams)
            queues.insert(len(queues) - (not is_last), (self.upstreams, waiting.set_back))
        for untried, queue in queues:
            claimed, opens_at = self._admit_from(now, queue, untried, claimed)
            look_at = min(look_at, opens_at)
            if not queue.tickets and waiting.restricted.get(untried) is queue:
                del waiting.restricted[untried]
        if look_at < inf or waiting.parked.tickets:
            look_at = min(look_at, now + LOOK_AGAIN_SECONDS)
        if (later := waiting.later.head()) is not None:
            look_at = min(look_at, later.not_before)
        elif not waiting.tickets:
            self._unparked = None
            for upstream in self.upstreams:
                upstream.note_delay(None)  # no ticket is delayed any more
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
            permit = ticket.permit
            if permit is None or permit.done():  # its caller left in this loop iteration
                self._remove(now, ticket)
                continue
            allowed = untried if untried is self.upstreams else self._allowed(now, untried)
            is_behind = ticket.size_bytes > SMALL_BYTES and self.waiting.parked.tickets and ticket is not self._unparked
            if is_behind or not self._bodies.fits(self, ticket):
                self._bodies.block(self)
                self.waiting.set_cause(now, "concurrency")
                if ticket.size_bytes > SMALL_BYTES and untried is self.upstreams:
                    self.waiting.park(ticket)  # so that it does not delay the others
                    continue
                if ticket.size_bytes <= SMALL_BYTES:  # a large one reserves no upstream, so it delays no frame
                    claimed += allowed
                return claimed, now + LOOK_AGAIN_SECONDS  # poll: no event shows that answers were read
            if not self.waiting.parked.tickets:
                self._bodies.unblock(self)
            unclaimed = tuple(upstream for upstream in allowed if upstream not in claimed) if claimed else allowed
            upstream, opens_at, delays = self._choose(now, ticket, unclaimed)
            if upstream is None:
                if delays:
                    self.waiting.set_cause(now, min(delays, key=itemgetter(0))[1])
                for _, cause, delayed in delays:
                    delayed.note_delay(cause)
                return claimed + allowed, opens_at
            self._remove(now, ticket, served=True)
            ticket.permit = None  # the permit refers to its ticket: a reference cycle would stay in memory
            permit.set_result(self._start(upstream, ticket, now))
        return claimed, inf

    def _probe_with_another_key(self, now: float, upstream: Upstream) -> None:
        """Send a waiting ticket of another key than those to which the upstream refused the account, if it may probe.

        It passes the queue: its answer shows at once whether the account is refused to everybody.
        """
        others = [
            ticket
            for ticket, queue in self.waiting.tickets.items()
            if ticket.key not in upstream.circuit.refused_keys
            and queue is not self.waiting.later
            and upstream in self._untried_by(ticket)
        ]
        others.sort(key=lambda ticket: upstream.is_suspect(now, ticket.key))
        for ticket in others:
            if not self._bodies.fits(self, ticket) or self._choose(now, ticket, (upstream,))[0] is None:
                return
            permit = ticket.permit
            self._remove(now, ticket)
            if permit is not None and not permit.done():  # else its caller left in this loop iteration
                ticket.permit = None
                permit.set_result(self._start(upstream, ticket, now))
                return

    def _allowed(self, now: float, untried: tuple[Upstream, ...]) -> tuple[Upstream, ...]:
        """Return the upstreams to which a ticket may go now if it has not tried the upstreams in `untried`.

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
                if least < LATE:
                    break
                if best is None and tier and not self._urgent and not self._forecast.spills(now, ticket, upstream.tier):
                    soonest = min(soonest, now + LOOK_AGAIN_SECONDS)  # a longer queue would spill: there is no event
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

    def _start(self, upstream: Upstream, ticket: Ticket, now: float) -> Permit:
        ticket.backend = upstream.name or ticket.backend
        self.in_flight += 1
        self._bodies.add(ticket.size_bytes)
        return upstream.start(now, ticket, self._ended)

    def _ended(self, permit: Permit) -> None:
        """Give the free permit to the next ticket, in this pool or in a pool that shares the upstream."""
        now = self.last_used = self._loop.time()
        self.in_flight -= 1
        self._bodies.add(-permit.ticket.size_bytes)
        self._bodies.admit_next(now)
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
        if self.waiting.tickets:
            if any(upstream.circuit.refuses_account for upstream in self.upstreams):
                for ticket in list(self.waiting.tickets):
                    if (circuit := self._refusing(now, ticket.key)) is not None:
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

    def _refusing(self, now: float, key: str) -> Circuit | None:
        """If all upstreams refuse the account and this key may probe none now, return a circuit of one, else None.

        Upstreams that are not ready are ignored, except if the pool has only one upstream.
        """
        refusing: Circuit | None = None
        for upstream in self.upstreams:
            circuit = upstream.circuit
            if circuit.refuses(now, key):
                refusing = refusing or circuit
            elif self._only_upstream is not None or upstream.unready_reason() is None:
                return None
        return refusing

    # -- predictions ---------------------------------------------------------------------------------------------------

    def predicted_wait(self, now: float, ticket: Ticket) -> float:
        """Return the predicted seconds that a new ticket like this one would wait in the queue."""
        return self._forecast.wait(now, ticket, self._untried_by(ticket))

    def has_another(self, ticket: Ticket, upstream: Upstream) -> bool:
        """Return True if another upstream could take the ticket now, after its attempt at `upstream`."""
        return self._only_upstream is None and bool(self._others(self._loop.time(), ticket, upstream))

    def _others(self, now: float, ticket: Ticket, upstream: Upstream) -> list[Upstream]:
        """Return the usable upstreams except `upstream` that the ticket has not tried.

        If there are none and `upstream` is unavailable: all other usable ones, as `_allowed` then returns them too.
        """
        usable = [other for other in self.upstreams if other is not upstream and _is_usable(now, other)]
        untried = [other for other in usable if other not in ticket.tried]
        return usable if upstream.unavailable and not untried else untried

    def patience(self, now: float, ticket: Ticket, upstream: Upstream) -> float:
        """Return the seconds without a byte after which an attempt at `upstream` is stopped; see `Forecast.patience`.

        While no other upstream can take the ticket: inf, or the upstream's own patience if the attempt is a probe.
        """
        if self._only_upstream is not None:
            return inf
        if others := self._others(now, ticket, upstream):
            return self._forecast.patience(now, ticket, upstream, others)
        return upstream.patience(ticket) if upstream.unavailable else inf

    def _untried_by(self, ticket: Ticket) -> tuple[Upstream, ...]:
        """Return the upstreams that the ticket has not tried. If it has tried all of them: all of them."""
        if not ticket.tried:
            return self.upstreams
        return tuple(upstream for upstream in self.upstreams if upstream not in ticket.tried) or self.upstreams

    def _latency(self, ticket: Ticket) -> float:
        """Return the smallest latency of the upstreams that the ticket has not tried, in seconds."""
        return min([upstream.latency for upstream in self._untried_by(ticket)])

    def _check_reachable(self, now: float, ticket: Ticket) -> None:
        """Raise `DeadlineUnreachable` if a new ticket's predicted wait and answer take longer than it has time.

        If they take more than SERVABLE_SHARE of this time, the ticket's key is served newest first from now on.
        """
        seconds_left, latency = ticket.deadline - now, self._latency(ticket)
        wait = self._forecast.wait(now, ticket, self.upstreams, guess=False)
        is_servable = wait + latency <= SERVABLE_SHARE * seconds_left
        if not is_servable and self.waiting.queue.serve_newest_first(ticket.priority, ticket.key):
            wait = self._forecast.wait(now, ticket, self.upstreams, guess=False)
        kept = self.kept(now, ticket)
        kept_seconds = kept / self._forecast.throughput(now, ticket) if kept else 0.0
        if wait + latency + min(kept_seconds, KEPT_SHARE * seconds_left) > seconds_left:
            raise DeadlineUnreachable(
                f"the wait ahead is about {wait:.1f} s and an answer takes {latency:.1f} s, "
                f"but only {seconds_left:.1f} s are left: {_WAY_OUT}",
                retry_after=self.promise(now, ticket),
            )

    # -- callers that return after a Retry-After -----------------------------------------------------------------------

    def recognise(self, ticket: Ticket) -> None:
        """Mark the ticket as promised if a place is reserved for it now: its caller returns after its Retry-After."""
        if self.promises is not None:
            ticket.promised = self.promises.redeem(self._loop.time(), ticket.key)

    def promise(self, now: float, ticket: Ticket, room: float = inf) -> float:
        """Reserve a place for this ticket's caller and return its Retry-After in seconds.

        `room` is the number of tickets that can wait at once.
        """
        per_second = min(self._forecast.throughput(now, ticket), KEPT_SHARE * room)
        if self.promises is None:
            self.promises = Promises()
        return self.promises.make(now, ticket.key, self.predicted_wait(now, ticket), per_second)

    def kept(self, now: float, ticket: Ticket) -> int:
        """Return the number of places that this new ticket must leave free for callers that will return soon."""
        if ticket.promised or self.promises is None or not len(self.promises):
            return 0
        return self.promises.due(now, SOON_SECONDS + 1.0 / self._forecast.throughput(now, ticket))

    def _expire(self, ticket: Ticket) -> None:
        ticket.expiry = None
        now, since = self._loop.time(), ticket.stopwatch.started
        if not ticket.is_waiting:
            return
        why = DeadlineUnreachable(
            f"it waited {now - since:.1f} s of {ticket.deadline - since:.1f} s, and can no longer be answered "
            f"in time, held by {self.waiting.cause or 'turn'}: {_WAY_OUT}",
            retry_after=self.promise(now, ticket),
        )
        self.refuse(ticket, why)
        if not self._admits_soon:  # thousands of tickets can have the same deadline: call `admit` once for all of them
            self._admits_soon = True
            self._loop.call_soon(self._admit_after_expiry)

    def _admit_after_expiry(self) -> None:
        self._admits_soon = False
        self.admit(self._loop.time())


def _is_usable(now: float, upstream: Upstream) -> bool:
    """Return True if the upstream is ready and may answer an attempt that starts now, even if this is a probe.

    A probe of an upstream that refuses the account does not count: it would hardly ever be answered.
    """
    circuit = upstream.circuit
    return upstream.unready_reason() is None and (
        not upstream.unavailable or (not circuit.refuses_account and circuit.may_probe(now))
    )


def _account_closed(now: float, circuit: Circuit) -> AccountClosed:
    opens_at = circuit.opens_at(now, 0.0)
    if circuit.state is CircuitState.QUOTA:
        ends_at = circuit.ends_at if now < circuit.ends_at < inf else opens_at
        return QuotaClosed(circuit.reason, retry_after=ends_at - now)
    closed = KeyClosed if circuit.state is CircuitState.UNAUTHORIZED else AccountClosed
    return closed(circuit.reason, retry_after=opens_at - now)
