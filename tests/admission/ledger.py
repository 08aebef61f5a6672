"""Count permits and what every gate settles, while tickets pass through the real classes."""

from __future__ import annotations

import contextlib
from collections import Counter
from unittest import mock

from sidecar.admission import Upstream
from sidecar.admission.gates.circuit import Circuit
from sidecar.admission.gates.concurrency import ConcurrencyGate
from sidecar.admission.gates.growth import GrowthGate
from sidecar.admission.gates.rate import RateGate

GATES = (Circuit, ConcurrencyGate, GrowthGate, RateGate)


class Ledger:
    """The permits that were granted, and how often each gate settled. `check` at the end, when nothing is in flight."""

    def __init__(self):
        self.granted = []
        self.live = {}
        """By ticket: the permit that it holds."""
        self.settled = Counter()
        """By gate."""
        self._settled_once = set()
        self._kept = []  # so that no identity is used again

    def start(self, upstream, permit):
        ticket = permit.ticket
        assert ticket not in self.live, "a ticket got two permits at once"
        untried = [one for one in self.upstreams_of(ticket) if one not in ticket.tried and not one.unavailable]
        assert upstream not in ticket.tried or not untried, "a ticket got a permit where it had failed before"
        self.live[ticket] = permit
        self.granted.append((upstream, permit))

    def end(self, permit):
        assert self.live.pop(permit.ticket) is permit, "a permit ended twice"

    def settle(self, gate, reservation):
        self.settled[gate] += 1
        if type(gate) in (ConcurrencyGate, RateGate):  # the others' reservations are no objects of their own
            assert (gate, id(reservation)) not in self._settled_once, "a reservation was settled twice"
            self._settled_once.add((gate, id(reservation)))
            self._kept.append(reservation)

    def upstreams_of(self, ticket):
        """The upstreams to which the ticket may go; a test with several upstreams sets this."""
        return ticket.tried

    def check(self, upstreams):
        """Every permit has ended, and every gate in front of it has settled it once."""
        assert not self.live
        for upstream in upstreams:
            count = sum(one is upstream for one, _ in self.granted)
            gates = [upstream.circuit, upstream.concurrency]
            if upstream._paced:
                gates += [upstream.requests, upstream.tokens, upstream.growth]
            assert [self.settled[gate] for gate in gates] == [count] * len(gates)
            assert upstream.concurrency.in_flight == 0
            assert not upstream.circuit.probing


@contextlib.contextmanager
def counting():
    """Give a `Ledger` that counts everything inside the block."""
    ledger = Ledger()
    start, settle = Upstream.start, Upstream.settle

    def counted_start(self, *arguments):
        permit = start(self, *arguments)
        ledger.start(self, permit)
        return permit

    def counted_settle(self, permit, *arguments):
        ledger.end(permit)
        settle(self, permit, *arguments)

    def counted(kind):
        original = kind.settle

        def gate_settle(self, now, reservation, *arguments, **options):
            ledger.settle(self, reservation)
            original(self, now, reservation, *arguments, **options)

        return mock.patch.object(kind, "settle", gate_settle)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Upstream, "start", counted_start))
        stack.enter_context(mock.patch.object(Upstream, "settle", counted_settle))
        for kind in GATES:
            stack.enter_context(counted(kind))
        yield ledger
