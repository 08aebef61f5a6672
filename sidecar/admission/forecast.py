"""Predict waits and answer times from the queues and the gates of a pool. A prediction changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from sidecar.admission.queue import FairQueue
from sidecar.admission.ticket import Ticket
from sidecar.admission.upstream import Upstream

#: Seconds. While the last waiting ticket is predicted to wait longer than this, a higher tier may take tickets.
SPILL_SECONDS = 2.0
#: A ticket keeps some of its time for another upstream, which may have to answer it in the end. This time is
#: SWITCH_ANSWERS times the usual answer time of that upstream. It is at least MIN_SWITCH_SECONDS seconds, or
#: SWITCH_SHARE of the ticket's whole time if that is shorter. While no answer time is known, it is SWITCH_SHARE of the
#: whole time. When only this time is left, the other upstream may get the ticket: higher tiers take waiting tickets,
#: and an attempt that has brought no byte is stopped.
SWITCH_ANSWERS, MIN_SWITCH_SECONDS, SWITCH_SHARE = 1.5, 0.5, 0.25


class Forecast:
    """The predictions for one pool."""

    __slots__ = ("_queue", "_restricted", "_upstreams")

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        queue: FairQueue,
        restricted: Mapping[tuple[Upstream, ...], FairQueue],
    ) -> None:
        """`restricted`: the queues of tickets that may go only to the upstreams in the key."""
        self._upstreams = upstreams
        self._queue = queue
        self._restricted = restricted

    def wait(self, now: float, ticket: Ticket, upstreams: Sequence[Upstream], *, guess: bool = True) -> float:
        """Return the predicted seconds until `upstreams` together could start this new ticket.

        `guess=False`: ignore limits that are only guesses, and assume that the next probe is accepted. A request must
        never be refused because of a guess.
        """
        return self._seconds(now, ticket, upstreams, *self._queue.ahead_of(ticket), guess=guess)

    def spills(self, now: float, ticket: Ticket, tier: int) -> bool:
        """Return True if the tiers below `tier` cannot serve all waiting tickets in time."""
        below = self._below(tier)
        if not below:
            return True
        if now + min(lower.circuit.seconds_left(now) + lower.latency for lower in below) > ticket.deadline:
            return True
        requests = max(len(self._queue) - 1, 0)
        return self._seconds(now, ticket, below, requests, self._queue.cost) > SPILL_SECONDS

    def switch_at(self, now: float, ticket: Ticket, untried: Sequence[Upstream]) -> float:
        """Return the loop time from which on higher tiers may take tickets, if this ticket still waits then.

        Later, a higher tier could not answer it in time. `now`: the lowest tier would probably answer it too late. inf:
        no upstream in `untried` has a higher tier.
        """
        lowest = self._upstreams[0].tier
        higher = [upstream for upstream in untried if upstream.tier > lowest]
        if not higher:
            return inf
        below = self._below(lowest + 1)
        if below:
            answer_at = now + self.wait(now, ticket, below) + min(lower.latency for lower in below)
            if answer_at > ticket.deadline:
                return now
        return ticket.deadline - max(_seconds_needed(ticket, upstream) for upstream in higher)

    def patience(self, now: float, ticket: Ticket, upstream: Upstream, others: Sequence[Upstream]) -> float:
        """Return the seconds without a byte after which an attempt at `upstream` is stopped in favour of `others`.

        Normally, this is the upstream's own patience. It is shorter if otherwise too little time would be left for
        another upstream to answer, but never shorter than the time that slow answers of this upstream take.
        """
        switch_in = ticket.deadline - min(_seconds_needed(ticket, other) for other in others) - now
        usual = max(_seconds_needed(ticket, upstream), SWITCH_ANSWERS * upstream.slow_seconds)
        return min(upstream.patience(ticket), max(switch_in, usual))

    def throughput(self, now: float, ticket: Ticket) -> float:
        """Return how many attempts with the cost of this ticket can certainly start in one second."""
        return sum(upstream.throughput(now, ticket) for upstream in self._upstreams)

    def _below(self, tier: int) -> list[Upstream]:
        """Return the upstreams of lower tiers that can answer at present."""
        return [
            upstream
            for upstream in self._upstreams
            if upstream.tier < tier and not upstream.unavailable and upstream.unready_reason() is None
        ]

    def _seconds(
        self,
        now: float,
        ticket: Ticket,
        upstreams: Sequence[Upstream],
        requests: float,
        cost: float,
        *,
        guess: bool = True,
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
            seconds = upstream.seconds_for(now, ticket, before, cost_before, guess=guess)
            if upstream.circuit.state is not None:
                seconds += upstream.circuit.seconds_left(now) if guess else upstream.next_probe_in(now)
            if len(upstreams) == 1 or seconds <= 0:
                return seconds
            rate += 1.0 / seconds
        return 1.0 / rate if rate else inf


def _seconds_needed(ticket: Ticket, upstream: Upstream) -> float:
    """Return the seconds that the ticket keeps for an answer of this upstream; see SWITCH_ANSWERS."""
    share = SWITCH_SHARE * (ticket.deadline - ticket.stopwatch.started)
    return max(SWITCH_ANSWERS * upstream.latency, min(share, MIN_SWITCH_SECONDS)) if upstream.latency else share
