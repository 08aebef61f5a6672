"""The growth governor is run against providers with a growth rule."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.admission.gates.growth import GrowthGovernor


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


def volley(governor, provider, now, calls, max_seconds=60.0):
    """Send `calls` calls as fast as allowed; return the number of refusals and the time of the last accepted call."""
    refused, end = 0, now + max_seconds
    while calls and now < end:
        wait = governor.wait(now)
        if wait > 0:
            now += wait
            continue
        governor.sent(now, bound=False)
        if provider.accepts(now):
            calls -= 1
        else:
            refused += 1
            governor.refused(now, now)
            now += 0.05
        now += 1e-4
    return refused, now


def test_no_call_waits_before_the_first_refusal_for_growth():
    governor = GrowthGovernor()
    for _ in range(1000):
        assert governor.wait(0.0) == 0.0
        governor.sent(0.0, bound=False)


@pytest.mark.parametrize("base", [2.0, 4.0, 10.0])
def test_the_first_volley_shows_the_base_and_later_volleys_are_rarely_refused(base):
    governor, provider = GrowthGovernor(), Provider(base)
    volley(governor, provider, 0.0, 60)
    refused = sum(volley(governor, provider, 100.0 * number, 60)[0] for number in range(1, 20))
    assert refused <= 0.006 * 19 * 60 + 2
    assert base * 0.7 <= governor.base <= base * 1.3


@pytest.mark.parametrize("rate", [3.0, 10.0])
def test_a_steady_stream_does_not_wait(rate):
    governor, provider = GrowthGovernor(), Provider(2.0)
    volley(governor, provider, 0.0, 20)
    now, waited = 20.0, 0.0
    for number in range(600):
        due = 20.0 + number / rate
        now = max(now, due)
        while (wait := governor.wait(now)) > 0:
            now += wait
        if number >= 300:
            waited = max(waited, now - due)
        governor.sent(now, bound=False)
        if not provider.accepts(now):
            governor.refused(now, now)
    assert waited < 0.5


def test_a_burst_of_refusals_counts_once():
    governor = GrowthGovernor()
    governor.sent(0.0, bound=False)
    governor.refused(0.1, 0.0)
    sent = [20.0 + 0.001 * number for number in range(8)]
    for at in sent:
        governor.sent(at, bound=False)
    factor = governor.factor
    for at in sent:
        governor.refused(20.1, at)
    assert governor.factor == pytest.approx(factor * 0.85)


@settings(max_examples=60)
@given(
    base=st.floats(1.0, 20.0),
    gaps=st.lists(st.floats(0.0, 3.0), max_size=150),
    acceptances=st.lists(st.booleans(), min_size=1, max_size=20),
)
def test_calls_sent_stay_within_the_allowed_number_and_every_wait_ends(base, gaps, acceptances):
    governor, now = GrowthGovernor(), 0.0
    governor.sent(0.0, bound=False)
    governor.refused(0.0, 0.0)
    governor.base = base
    sent = []
    for number, gap in enumerate(gaps):
        now += gap
        wait_start = now
        while (wait := governor.wait(now)) > 0:
            now += wait
            assert now - wait_start < 5.0
        allowed = governor.allowed(now)
        governor.sent(now, bound=False)
        sent.append(now)
        assert sum(at > now - 1.0 for at in sent) <= allowed + 1e-9
        if not acceptances[number % len(acceptances)]:
            governor.refused(now, now)
            sent.pop()
