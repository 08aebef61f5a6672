"""The growth gate is run against providers with a growth rule."""

import pytest
from gate_calls import TICKET, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.admission.gates.growth import MIN_BASE, GrowthGate


class Provider:
    """Accepts at most base + factor x (calls/s over the ten seconds before) calls in one second."""

    def __init__(self, base, factor=2.0):
        self.base, self.factor, self.accepted = base, factor, []

    def accepts(self, now):
        last = sum(at > now - 1.0 for at in self.accepted)
        before = sum(now - 11.0 < at <= now - 1.0 for at in self.accepted) / 10.0
        if last + 1 > self.base + self.factor * before:
            return False
        self.accepted.append(now)
        return True


def wait_of(gate, now):
    """Return the seconds until one more call may be sent; 0 means now."""
    gate.advance(now)
    return gate.opens_at(now, 0.0) - now


def send(gate, now, *, held=False):
    return gate.reserve(now, TICKET, 0.0, held=held)


def refuse(gate, now, sent):
    gate.settle(now, sent, refused(now, "growth"), blamed="growth")


def volley(gate, provider, now, calls, max_seconds=60.0):
    """Send `calls` calls as fast as allowed; return the number of refusals and the time of the last accepted call."""
    refused, end, held = 0, now + max_seconds, False
    while calls and now < end:
        wait = wait_of(gate, now)
        if wait > 0:
            now, held = now + wait, True
            continue
        sent, held = send(gate, now, held=held), False
        if provider.accepts(now):
            calls -= 1
        else:
            refused += 1
            refuse(gate, now, sent)
            now += 0.05
        now += 1e-4
    return refused, now


def test_no_call_waits_before_the_first_refusal_for_growth():
    gate = GrowthGate()
    for _ in range(1000):
        assert wait_of(gate, 0.0) == 0.0
        send(gate, 0.0)


@pytest.mark.parametrize("base", [2.0, 4.0, 10.0])
def test_the_first_volley_shows_the_base_and_later_volleys_are_rarely_refused(base):
    gate, provider = GrowthGate(), Provider(base)
    volley(gate, provider, 0.0, 60)
    refused = sum(volley(gate, provider, 100.0 * number, 60)[0] for number in range(1, 20))
    assert refused <= 0.006 * 19 * 60 + 2
    assert base * 0.7 <= gate.base <= base * 1.3


@pytest.mark.parametrize("rate", [3.0, 10.0])
def test_a_steady_stream_does_not_wait(rate):
    gate, provider = GrowthGate(), Provider(2.0)
    volley(gate, provider, 0.0, 20)
    now, waited = 20.0, 0.0
    for number in range(600):
        due = 20.0 + number / rate
        now, held = max(now, due), False
        while (wait := wait_of(gate, now)) > 0:
            now, held = now + wait, True
        if number >= 300:
            waited = max(waited, now - due)
        sent = send(gate, now, held=held)
        if not provider.accepts(now):
            refuse(gate, now, sent)
    assert waited < 0.5


@pytest.mark.parametrize("order", [range(8), range(7, -1, -1), (3, 0, 7, 1, 6, 2, 5, 4)])
def test_a_burst_of_refusals_counts_once_in_any_order(order):
    one, gate = GrowthGate(), GrowthGate()
    for tried, calls in ((one, 1), (gate, 8)):
        refuse(tried, 0.1, send(tried, 0.0))
        send(tried, 19.0)
        burst = [send(tried, 20.0 + 0.001 * number) for number in range(calls)]
        for number in order if calls > 1 else (0,):
            refuse(tried, 20.1, burst[number])
    assert (gate.base, gate.factor) == (one.base, one.factor)


def test_refusals_of_every_call_teach_nothing():
    """After a refusal, some providers refuse every call for a time."""
    gate = GrowthGate()
    for number in range(4):
        send(gate, 0.1 * number)
    refuse(gate, 0.45, send(gate, 0.4))
    known = gate.base, gate.factor
    for number in range(5):
        at = 0.5 + number
        refuse(gate, at + 0.05, send(gate, at))
    assert (gate.base, gate.factor) == known


@pytest.mark.parametrize("rate", [4.0, 8.0])
def test_a_rule_that_was_learned_as_a_tenth_is_corrected_in_30_s(rate):
    gate, provider = GrowthGate(), Provider(rate, factor=0.0)
    refuse(gate, 0.1, send(gate, 0.0))
    gate.base, gate.factor = max(rate / 10.0, MIN_BASE), 0.0
    volley(gate, provider, 1.0, 10_000, max_seconds=40.0)
    assert sum(at > 31.0 for at in provider.accepted) >= 0.5 * rate * 10.0


@settings(max_examples=60)
@given(
    base=st.floats(1.0, 20.0),
    gaps=st.lists(st.floats(0.0, 3.0), max_size=150),
    acceptances=st.lists(st.booleans(), min_size=1, max_size=20),
)
def test_calls_sent_stay_within_the_allowed_number_and_every_wait_ends(base, gaps, acceptances):
    gate, now = GrowthGate(), 0.0
    refuse(gate, 0.0, send(gate, 0.0))
    gate.base = base
    sent = []
    for number, gap in enumerate(gaps):
        now += gap
        wait_start = now
        while (wait := wait_of(gate, now)) > 0:
            now += wait
            assert now - wait_start < 5.0
        allowed = gate.allowed(now)
        attempt = send(gate, now)
        sent.append(now)
        assert sum(at > now - 1.0 for at in sent) <= allowed + 1e-9
        if not acceptances[number % len(acceptances)]:
            refuse(gate, now, attempt)
            sent.pop()
