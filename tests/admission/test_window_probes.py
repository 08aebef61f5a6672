"""When a used-up window is probed: headers that proved right delay the probe, and name the end of the window."""

from __future__ import annotations

from random import Random

import pytest

from backends.base import ReportedLimit
from sidecar.admission import Ticket, Upstream, Verdict
from sidecar.admission.gates.circuit import CircuitState

QUOTA, WINDOW = 80.0, 25.0


class Account:
    """Sends attempts one by one. The provider answers each as the test says."""

    def __init__(self):
        self.now = 0.0
        self.upstream = Upstream(lambda: self.now, name="here", random=Random(1))

    def send(self, remaining, reset, *, refused=False, seconds=0.1):
        """Send an attempt after `seconds`. Its answer reports what remains; None: it has no headers."""
        self.now += seconds
        ticket = Ticket(now=self.now, deadline=self.now + 60.0, key="gate", model="m")
        permit = self.upstream.start(self.now, ticket, lambda _: None)
        header = ReportedLimit("x-limit", "request_rate", QUOTA, WINDOW, remaining, reset, False)
        limits = () if remaining is None else (header,)
        outcome, named = ("refused", "request_rate") if refused else ("accepted", None)
        permit.report(Verdict(outcome, self.now, named=named, reason="", limits=limits))

    def use_up(self, reports=True, *, reset=WINDOW):
        """Use up a window that ends in `reset` seconds, until everything is refused."""
        end = self.now + reset
        for left in range(10):
            self.send(60.0 - 6.0 * left if reports else None, end - self.now - 0.1)
        for _ in range(20):
            if self.upstream.circuit.state is CircuitState.BLACKOUT:
                return end
            self.send(0.0 if reports else None, end - self.now - 0.1, refused=True)
        raise AssertionError("the circuit did not open")

    def probe(self, end, *, refused=True, reports=True):
        """Send the next probe when it is due, and return when that was."""
        assert self.upstream.circuit.state is CircuitState.BLACKOUT
        at = self.upstream.circuit.next_probe
        self.send(0.0 if reports else None, max(end - at, 0.0), refused=refused, seconds=at - self.now)
        return at

    def trust(self):
        """Let the header prove right at the end of two windows."""
        for _ in range(2):
            end = self.use_up()
            self.send(70.0, WINDOW, seconds=end - self.now)  # the probe at the end is accepted
        assert self.upstream.requests.reported.status().trusted


def test_a_probe_waits_until_shortly_before_the_end_if_the_header_is_trusted_and_then_until_the_end():
    account = Account()
    account.trust()
    end = account.use_up()
    assert account.probe(end) == pytest.approx(end - 1.0)
    assert account.probe(end) == pytest.approx(end)


def test_no_header_delays_a_probe_before_it_is_trusted():
    account = Account()
    account.use_up()
    assert not account.upstream.requests.reported.status().trusted
    assert account.upstream.circuit.next_probe < account.now + 1.0


def test_the_reported_end_is_probed_even_before_the_header_is_trusted():
    missed = {}
    for reports in (True, False):
        account = Account()
        end = account.use_up(reports)
        while (at := account.probe(end, reports=reports)) < end - 0.01:
            pass
        missed[reports] = at - end
    assert missed[True] == pytest.approx(0.0, abs=0.01)
    assert missed[False] > 0.2, missed


def test_ends_that_prove_wrong_are_not_probed_for_long():
    account = Account()
    account.use_up(reset=5.0)
    probes = [account.probe(account.now + 0.2) for _ in range(12)]  # each answer says that the window ends in 0.2 s
    assert probes[-1] - probes[-4] > 10.0, probes


def test_an_end_that_passes_while_a_probe_is_under_way_is_probed_again_at_once():
    account = Account()
    end = account.use_up(reset=5.0)
    account.now = end - 0.01
    ticket = Ticket(now=account.now, deadline=account.now + 60.0, key="gate", model="m")
    permit = account.upstream.start(account.now, ticket, lambda _: None)
    account.now = end + 0.02
    permit.report(Verdict("refused", account.now, named="request_rate", reason=""))
    assert account.upstream.circuit.next_probe == pytest.approx(account.now, abs=0.01)
