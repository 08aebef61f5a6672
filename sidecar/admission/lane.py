"""One provider account and model: its queue, its limits, and the one decision, `admit`.

*Decide synchronously, act afterwards*: `admit` examines the queue and every gate and grants permits. It runs after
every change (a ticket arrived or left, an attempt ended, time opened a gate) and never awaits.
"""

from __future__ import annotations

import asyncio
from math import inf
from types import TracebackType

from sidecar.admission.attempts import Attempt
from sidecar.admission.errors import AccountClosed, DeadlineUnreachable, NotAdmitted
from sidecar.admission.hold import HoldKind
from sidecar.admission.limits import Limits
from sidecar.admission.promises import Promises
from sidecar.admission.queue import FairQueue
from sidecar.admission.ticket import CAUSES, Cause, Ticket

#: Longest time in seconds until the gates are examined again while tickets wait: a learned pace changes with time.
LOOK_AGAIN_SECONDS = 0.25
#: A key's backlog can be served in time while a new ticket would be answered within this share of its time left.
SERVABLE_SHARE = 0.5
#: New callers leave room for the callers whose Retry-After ends within SOON_SECONDS, at most this share of a bound.
SOON_SECONDS, KEPT_SHARE = 4.0, 0.5
_WAY_OUT = (
    "ask less often, allow more time (X-Request-Timeout), or let a newer frame take an older one's place "
    "(X-Queue-Policy: latest)"
)


class Permit:
    """The right to have one attempt in flight. Report the attempt's verdict once, then release the permit once.

    The end of a `with` block also releases it.
    An attempt without a verdict (its caller left) was sent nevertheless, so it counts as use of the provider's quota.
    """

    __slots__ = ("_attempt", "_lane", "_released", "ticket")

    def __init__(self, lane: Lane, ticket: Ticket, attempt: Attempt) -> None:
        self._lane = lane
        self._attempt = attempt
        self._released = False
        self.ticket = ticket

    def __repr__(self) -> str:
        return f"<Permit {'released' if self._released else 'held'} {self.ticket!r}>"

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release(self._lane.now())

    def accepted(self, now: float, usage: tuple[int, int] | None = None) -> None:
        """Report that the provider admitted the attempt: it answered, or rejected the request itself as invalid.

        `usage` are the LLM tokens of input and output as the provider counted them, or None if it did not report them.
        """
        self._lane.limits.accepted(self._attempt, now, usage)

    def throttled(self, now: float, kind: str, reason: str, retry_after: float | None = None) -> None:
        """Report that the provider refused the attempt because of a limit of this kind.

        `retry_after` are the seconds that the provider asks to wait. They are trusted only in part (see `Hold`).
        """
        self._lane.limits.throttled(self._attempt, now, kind, reason, retry_after)

    def failed(self, now: float, reason: str) -> None:
        """Report that the provider failed or could not be reached."""
        self._lane.limits.failed(self._attempt, now, reason)

    def account_refused(self, now: float, reason: str) -> None:
        """Report that the provider refuses the account (billing). All waiting tickets are refused with that reason."""
        self._lane.account_refused(self._attempt, now, reason)

    def release(self, now: float) -> None:
        """Release the permit. A second call does nothing."""
        if not self._released:
            self._released = True
            self._lane.ended(self._attempt, now)


class Lane:
    """The queue and the limits of one account and model. All of it is synchronous."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        now = loop.time()
        self._loop = loop
        self.now = loop.time
        self.queue = FairQueue()
        self.promises = Promises()
        self.limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._held_seconds = [0.0] * len(CAUSES)
        self.cause: Cause | None = None
        """The present cause of waiting; None while no ticket waits."""
        self._cause_since = now
        self._bound: Cause | None = None  # the gate that delayed the queue since the last start
        self.last_used = now

    def __repr__(self) -> str:
        in_flight = self.limits.permits.in_flight
        return f"<Lane {id(self):#x} waiting={len(self.queue)} cause={self.cause} in_flight={in_flight}>"

    # -- a ticket enters and leaves ------------------------------------------------------------------------------------

    def enter(self, ticket: Ticket) -> Permit | asyncio.Future[Permit]:
        """Return a permit immediately, or queue the ticket and return the future of its permit or error.

        Raises `DeadlineUnreachable` if the ticket cannot be served in time, `AccountClosed` while the provider refuses
        the account.
        """
        now = self._loop.time()
        self.last_used = now
        hold = self.limits.hold
        if hold.kind is HoldKind.BILLING and not hold.may_probe(now):
            raise AccountClosed(hold.reason, retry_after=max(hold.next_probe - now, 0.0))
        if not self.queue.tickets and self.limits.closed(now, ticket)[0] is None:
            return self._start(ticket, now)
        if not ticket.returned:
            self._check_reachable(now, ticket)
        self._account(now)
        ticket.enter_queue(self._held_seconds)
        ticket.permit = permit = self._loop.create_future()
        self.queue.add(ticket)
        ticket.expiry = self._loop.call_at(max(ticket.deadline - self.limits.latency, now), self._expire, ticket)
        self.admit(now)
        return permit

    def _check_reachable(self, now: float, ticket: Ticket) -> None:
        left = ticket.deadline - now
        latency = self.limits.latency
        wait = self._soonest(now, ticket)
        if wait + latency > SERVABLE_SHARE * left and self.queue.overload(ticket.priority, ticket.key):
            wait = self._soonest(now, ticket)
        if wait + latency + min(self._kept_seconds(now, ticket), KEPT_SHARE * left) > left:
            raise DeadlineUnreachable(
                f"the wait ahead is about {wait:.1f} s and an answer takes {latency:.1f} s, "
                f"but only {left:.1f} s are left: {_WAY_OUT}",
                retry_after=self.promise(now, ticket),
            )

    def leave(self, ticket: Ticket) -> None:
        """Remove a ticket whose caller left, or which a newer ticket replaced."""
        if ticket in self.queue:
            now = self._loop.time()
            self._account(now)  # before the removal: an empty queue books no time
            self.queue.remove(ticket)
            self._left(ticket, now)
            self.admit(now)

    def refuse(self, ticket: Ticket, why: NotAdmitted) -> None:
        """Remove a queued ticket and send the error to its caller."""
        now = self._loop.time()
        self._account(now)
        self.queue.remove(ticket)
        self._left(ticket, now)
        if ticket.permit is not None and not ticket.permit.done():
            ticket.permit.set_exception(why)
            ticket.permit = None

    def refuse_all(self, why: NotAdmitted) -> None:
        """Empty the queue and send the error to every caller."""
        while (ticket := self.queue.head()) is not None:
            self.refuse(ticket, why)

    # -- the decision --------------------------------------------------------------------------------------------------

    def admit(self, now: float) -> None:
        """Grant permits to the next tickets until a gate is closed. Then set the timer for the next call."""
        self._account(now)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while (ticket := self.queue.head()) is not None:
            if ticket.permit is None or ticket.permit.done():  # its caller left in this loop iteration
                self.queue.remove(ticket)
                self._left(ticket, now)
                continue
            cause, opens_at = self.limits.closed(now, ticket)
            if cause is not None:
                self.cause = cause
                self._bound = cause
                if opens_at < inf:
                    self._timer = self._loop.call_at(min(opens_at, now + LOOK_AGAIN_SECONDS), self._look_again)
                return
            self.queue.take(ticket)
            self._left(ticket, now)
            ticket.permit.set_result(self._start(ticket, now))
        self.cause = None

    def _look_again(self) -> None:
        self._timer = None
        self.admit(self._loop.time())

    # -- an attempt starts and ends ------------------------------------------------------------------------------------

    def _start(self, ticket: Ticket, now: float) -> Permit:
        ticket.attempts += 1
        attempt = self.limits.start(now, ticket, self._bound)
        self._bound = None
        return Permit(self, ticket, attempt)

    def ended(self, attempt: Attempt, now: float) -> None:
        """End an attempt, with or without a verdict. Its permit becomes available for the next ticket."""
        self.limits.ended(attempt, now)
        self.last_used = now
        if self.queue.tickets or self.cause is not None:
            self.admit(now)

    def account_refused(self, attempt: Attempt, now: float, reason: str) -> None:
        """Close admission because the provider refuses the account, and refuse all waiting tickets."""
        self.limits.account_refused(attempt, now, reason)
        self.refuse_all(AccountClosed(reason, retry_after=self.limits.hold.next_probe - now))

    # -- looking ahead -------------------------------------------------------------------------------------------------

    @property
    def away(self) -> str | None:
        """The reason why the provider cannot answer: it is down, has no capacity, or refuses the account. Else None.

        A blackout (it refuses every call because of a limit) does not count: it ends, and the wait can be predicted.
        """
        hold = self.limits.hold
        return None if hold.kind in (None, HoldKind.BLACKOUT) else hold.reason

    def takes(self, now: float, ticket: Ticket) -> bool:
        """Return True if a new ticket like this one would probably be answered before its deadline."""
        free = self.limits.closed(now, ticket)[0] is None
        if self.away is not None:
            return free
        wait = 0.0 if free and not len(self.queue) else self._soonest(now, ticket)
        return now + wait + self.limits.latency <= ticket.deadline

    def predicted_wait(self, now: float, ticket: Ticket) -> float:
        """Return the predicted seconds that a new ticket like this one would wait in the queue."""
        return self.limits.hold.seconds_left(now) + self._wait_when_open(now, ticket)

    def _soonest(self, now: float, ticket: Ticket) -> float:
        """Return the predicted wait in seconds if the next probe succeeds. No ticket is refused because of a guess."""
        return self.limits.held(now) + self._wait_when_open(now, ticket)

    def _wait_when_open(self, now: float, ticket: Ticket) -> float:
        return self.limits.seconds_for(now, ticket, *self.queue.ahead_of(ticket))

    # -- callers that are refused and return later ---------------------------------------------------------------------

    def recognise(self, ticket: Ticket) -> None:
        """Mark the ticket if a place is reserved for it now: its caller returns at the time of its Retry-After."""
        if len(self.promises):
            ticket.promised = self.promises.redeem(self._loop.time(), ticket.key)

    def promise(self, now: float, ticket: Ticket, room: float = inf) -> float:
        """Reserve a place and return the seconds after which this ticket's caller is admitted if it asks again.

        `room` is the number of tickets that can wait at once.
        """
        per_second = min(self.limits.throughput(now, ticket), KEPT_SHARE * room)
        return self.promises.make(now, ticket.key, self.predicted_wait(now, ticket), per_second)

    def kept(self, now: float, ticket: Ticket) -> int:
        """Return the number of places that this new ticket must leave for callers that will return soon."""
        if ticket.promised or not len(self.promises):
            return 0
        return self.promises.due(now, SOON_SECONDS + 1.0 / self.limits.throughput(now, ticket))

    def _kept_seconds(self, now: float, ticket: Ticket) -> float:
        kept = self.kept(now, ticket)
        return kept / self.limits.throughput(now, ticket) if kept else 0.0

    # -- accounting of the causes of waits -----------------------------------------------------------------------------

    def _left(self, ticket: Ticket, now: float) -> None:
        self._account(now)
        ticket.leave_queue(self._held_seconds)
        if ticket.expiry is not None:
            ticket.expiry.cancel()
            ticket.expiry = None

    def _expire(self, ticket: Ticket) -> None:
        ticket.expiry = None
        if ticket in self.queue:
            now, since = self._loop.time(), ticket.stopwatch.started
            self.refuse(
                ticket,
                DeadlineUnreachable(
                    f"it waited {now - since:.1f} s of {ticket.deadline - since:.1f} s, and can no longer be answered "
                    f"in time, held by {self.cause or 'turn'}: {_WAY_OUT}",
                    retry_after=self.promise(now, ticket),
                ),
            )
            self.admit(now)

    def _account(self, now: float) -> None:
        """Book the time since the last call to the present cause. One total serves all tickets, without a loop."""
        if self.queue.tickets:
            self._held_seconds[CAUSES.index(self.cause or "turn")] += now - self._cause_since
        self._cause_since = now
