"""One provider account and model: its queue, its limits, and the one decision, `admit`.

*Decide synchronously, act afterwards*: `admit` looks at the queue and at every gate and hands out permits; it runs
after every change (a ticket came or left, an attempt ended, time opened a gate), and never awaits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from math import ceil, inf

from .bucket import TokenBucket
from .controller import RateController, Sent
from .errors import AccountClosed, DeadlineUnreachable, NotAdmitted
from .hold import Hold, HoldKind
from .permits import Permits
from .queue import FairQueue
from .ticket import CAUSES, Cause, Ticket

#: While a learned pace holds the queue it is looked at again this often (seconds), since paces change with time.
LOOK_AGAIN_SECONDS = 0.25
#: Consecutive failures (5xx, broken connections) that mean the provider is down.
OUTAGE_FAILURES = 6


class Permit:
    """The right to have one attempt in flight. Say what the attempt was told, then release it; once each.

    An attempt that ends without a verdict (its caller left) was sent all the same, and counts as taken.
    """

    __slots__ = ("_lane", "_released", "probe", "sent", "started", "ticket")

    def __init__(self, lane: Lane, ticket: Ticket, now: float, sent: Sent | None, probe: bool) -> None:
        self._lane = lane
        self._released = False
        self.ticket = ticket
        self.started = now
        self.sent = sent
        self.probe = probe

    def accepted(self, now: float) -> None:
        """The provider took the attempt and answered it, or found fault with the request itself."""
        self._lane.accepted(self, now)

    def throttled(self, now: float, kind: str, reason: str) -> None:
        """The provider refused the attempt because of a limit of this kind."""
        self._lane.throttled(self, now, kind, reason)

    def failed(self, now: float, reason: str) -> None:
        """The provider failed, or could not be reached."""
        self._lane.failed(self, now, reason)

    def account_refused(self, now: float, reason: str) -> None:
        """The provider refuses the account (billing)."""
        self._lane.account_refused(now, reason)

    def release(self, now: float) -> None:
        """Give the permit back. Again is nothing: the first time counted."""
        if not self._released:
            self._released = True
            self._lane.ended(self, now)


class Lane:
    """The queue and the limits of one account and model. All of it is synchronous."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        requests_per_second: float = inf,
        tokens_per_second: float = inf,
        concurrency: int | None = None,
        most_concurrency: int = 1024,
        paced: bool = True,
    ) -> None:
        now = loop.time()
        self._loop = loop
        self.queue = FairQueue()
        self.permits = Permits(concurrency or most_concurrency)
        self._pinned = concurrency is not None
        self._most_concurrency = most_concurrency
        self.hold = Hold()
        self.requests = RateController(now, ceiling=requests_per_second if paced else inf)
        self._paced = paced
        self._bucket = TokenBucket(now)
        self._tokens = TokenBucket(now, tokens_per_second, tokens_per_second)
        self._token_ceiling = tokens_per_second
        self._timer: asyncio.TimerHandle | None = None
        self._held_seconds = [0.0] * len(CAUSES)
        self.cause: Cause | None = None
        """What holds the queue at present; None while nothing waits."""
        self._cause_since = now
        self._failures = 0
        self._latencies: deque[float] = deque(maxlen=64)
        self._latency = 0.0
        self.last_used = now
        self._rate_bound = False

    # -- a ticket comes and goes -------------------------------------------------------------------------------------

    def enter(self, ticket: Ticket) -> Permit | asyncio.Future[Permit]:
        """Let a ticket in: it has its permit at once, or it is queued and the future brings the permit or an error.

        Raises `DeadlineUnreachable` for a ticket that cannot be served in time, `AccountClosed` while the provider
        refuses the account.
        """
        now = self._loop.time()
        self.last_used = now
        if self.hold.kind is HoldKind.BILLING and not self.hold.may_probe(now):
            raise AccountClosed(self.hold.reason, retry_after=max(self.hold.next_probe - now, 0.0))
        if not len(self.queue) and self._closed(now, ticket)[0] is None:
            return self._start(ticket, now)
        if not ticket.returned:
            wait = self.predicted_wait(now, ticket)
            if now + wait + self._latency > ticket.deadline:
                raise DeadlineUnreachable(
                    f"the wait ahead is about {wait:.1f} s and an answer takes {self._latency:.1f} s, "
                    f"but only {ticket.deadline - now:.1f} s are left",
                    retry_after=wait,
                )
        self._account(now)
        ticket.enter_queue(self._held_seconds)
        ticket.permit = permit = self._loop.create_future()
        self.queue.add(ticket)
        ticket.expiry = self._loop.call_at(max(ticket.deadline - self._latency, now), self._expire, ticket)
        self.admit(now)
        return permit

    def leave(self, ticket: Ticket) -> None:
        """The ticket's caller is gone, or a newer one took its place: it waits no more."""
        if ticket in self.queue:
            now = self._loop.time()
            self._account(now)  # before it is gone: an empty queue books nothing
            self.queue.remove(ticket)
            self._left(ticket, now)
            self.admit(now)

    def refuse(self, ticket: Ticket, why: NotAdmitted) -> None:
        """Take a queued ticket out and tell its caller why."""
        now = self._loop.time()
        self._account(now)
        self.queue.remove(ticket)
        self._left(ticket, now)
        if ticket.permit is not None and not ticket.permit.done():
            ticket.permit.set_exception(why)

    # -- the decision ------------------------------------------------------------------------------------------------

    def admit(self, now: float) -> None:
        """Hand permits to the tickets whose turn it is, as far as the gates allow; arm the timer for the next look."""
        self._account(now)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while (ticket := self.queue.head()) is not None:
            if ticket.permit is None or ticket.permit.done():  # its caller left in this very turn of the loop
                self.queue.remove(ticket)
                self._left(ticket, now)
                continue
            cause, opens_at = self._closed(now, ticket)
            if cause is not None:
                self.cause = cause
                self._rate_bound = self._rate_bound or cause == "request_rate"
                if opens_at < inf:
                    self._timer = self._loop.call_at(min(opens_at, now + LOOK_AGAIN_SECONDS), self._look_again)
                return
            self.queue.take(ticket)
            self._left(ticket, now)
            ticket.permit.set_result(self._start(ticket, now))
        self.cause = None

    def _closed(self, now: float, ticket: Ticket) -> tuple[Cause | None, float]:
        """The gate that keeps this ticket from starting now and when time alone opens it (inf: an event must)."""
        if self.hold.kind is not None:
            if self.hold.may_probe(now):
                return None, now
            return "hold", inf if self.hold.probing else self.hold.next_probe
        if not self.permits.free:
            return "concurrency", inf
        if self._paced:
            self._bucket.set(now, self.requests.pace(now), self.requests.burst(now))
            wait = self._bucket.wait(now)
            if wait > 0:
                return "request_rate", now + wait
        if self._token_ceiling != inf and ticket.tokens:
            wait = self._tokens.wait(now, ticket.tokens)
            if wait > 0:
                return "token_rate", now + wait
        return None, now

    def _look_again(self) -> None:
        self._timer = None
        self.admit(self._loop.time())

    # -- an attempt starts and ends ------------------------------------------------------------------------------------

    def _start(self, ticket: Ticket, now: float) -> Permit:
        self.permits.take()
        ticket.attempts += 1
        probe = self.hold.kind is not None
        if probe:
            self.hold.probing = True
        sent = None
        if self._paced:
            self._bucket.take(now)
            sent = self.requests.sent(now, 1.0, self._rate_bound)
            self._rate_bound = False
        if self._token_ceiling != inf:
            self._tokens.take(now, ticket.tokens)
        return Permit(self, ticket, now, sent, probe)

    def ended(self, permit: Permit, now: float) -> None:
        """An attempt is over, whatever it said: its permit goes to the next."""
        self.permits.give_back()
        if permit.probe:
            self.hold.probing = False
        self.last_used = now
        self.admit(now)

    def accepted(self, permit: Permit, now: float) -> None:
        """The provider took the attempt."""
        self._failures = 0
        if permit.probe:
            self.hold.open()
        if permit.sent is not None:
            self.requests.accepted(now, permit.sent)
        seconds = now - permit.started
        self._latency += (0.1 if self._latencies else 1.0) * (seconds - self._latency)
        self._latencies.append(seconds)
        if len(self._latencies) % 16 == 1:
            self._size_permits(now)

    def throttled(self, permit: Permit, now: float, kind: str, reason: str) -> None:
        """The provider refused the attempt because of a limit."""
        self._failures = 0
        if kind == "capacity":
            if permit.probe or self.hold.kind is None:
                self.hold.close(now, HoldKind.CAPACITY, reason)
        elif permit.sent is not None:
            self.requests.refused(now, permit.sent)
        if permit.probe and kind != "capacity":
            self.hold.open()

    def failed(self, permit: Permit, now: float, reason: str) -> None:
        """The provider failed, or could not be reached."""
        self._failures += 1
        if permit.probe or (self.hold.kind is None and self._failures >= OUTAGE_FAILURES):
            self.hold.close(now, HoldKind.OUTAGE, reason)

    def account_refused(self, now: float, reason: str) -> None:
        """The provider refuses the account: everything that waits is told so."""
        self.hold.close(now, HoldKind.BILLING, reason)
        while (ticket := self.queue.head()) is not None:
            self.refuse(ticket, AccountClosed(reason, retry_after=self.hold.next_probe - now))

    def _size_permits(self, now: float) -> None:
        """Enough permits for the pace: 2 x pace x p90 latency (Little's law with room), at least 8."""
        if self._pinned:
            return
        pace = self.requests.pace(now)
        if inf in (pace, self.requests.limit):
            self.permits.size = self._most_concurrency
            return
        p90 = sorted(self._latencies)[int(len(self._latencies) * 0.9)]
        self.permits.size = min(max(ceil(2 * pace * p90), 8), self._most_concurrency)

    # -- looking ahead -------------------------------------------------------------------------------------------------

    def throughput(self, now: float) -> float:
        """Attempts a second that can start at present; infinite while nothing is known to hold them."""
        pace = self.requests.pace(now) if self._paced else inf
        if self._latency > 0:
            pace = min(pace, self.permits.size / self._latency)
        return pace

    def predicted_wait(self, now: float, ticket: Ticket) -> float:
        """Seconds that a newcomer like this one would wait in the queue."""
        held = max(self.hold.next_probe - now, 0.0) if self.hold.kind is not None else 0.0
        throughput = self.throughput(now)
        if throughput == inf:
            return held
        return held + (self.queue.ahead_of(ticket.priority, ticket.key, ticket.deadline) + 1) / throughput

    # -- the account of causes -----------------------------------------------------------------------------------------

    def _left(self, ticket: Ticket, now: float) -> None:
        self._account(now)
        ticket.leave_queue(self._held_seconds)
        if ticket.expiry is not None:
            ticket.expiry.cancel()
            ticket.expiry = None

    def _expire(self, ticket: Ticket) -> None:
        ticket.expiry = None
        if ticket in self.queue:
            now = self._loop.time()
            self.refuse(
                ticket,
                DeadlineUnreachable(
                    f"it waited {now - ticket.stopwatch.started:.1f} s and can no longer be answered in time",
                    retry_after=self.predicted_wait(now, ticket),
                ),
            )
            self.admit(now)

    def _account(self, now: float) -> None:
        """Book the time since the last look to what held the queue. One account for all tickets: no walk over them."""
        if len(self.queue):
            self._held_seconds[CAUSES.index(self.cause or "turn")] += now - self._cause_since
        self._cause_since = now
