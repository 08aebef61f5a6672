"""Hold: when the probe may be sent, and how far a provider's Retry-After is believed."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.admission.gates.circuit import BILLING_STEP, FIRST_STEP, LITTLE_TRUST, MAX_STEP, MUCH_TRUST, Hold, HoldKind

NOT_BILLING = (HoldKind.OUTAGE, HoldKind.CAPACITY, HoldKind.BLACKOUT)


@pytest.mark.parametrize("kind", NOT_BILLING)
def test_the_step_between_probes_grows_up_to_the_longest_step(kind):
    hold, now, steps = Hold(), 0.0, []
    for _ in range(12):
        hold.close(now, kind, "busy")
        steps.append(hold.next_probe - now)
        now = hold.next_probe
    assert steps[0] == FIRST_STEP
    assert steps == sorted(steps)
    assert steps[-1] == MAX_STEP
    assert hold.since == 0.0


def test_one_probe_at_a_time():
    hold = Hold()
    hold.close(0.0, HoldKind.OUTAGE, "down")
    assert not hold.may_probe(0.49)
    assert hold.may_probe(0.5)
    hold.probing = True
    assert not hold.may_probe(100.0)


def test_a_refused_account_is_probed_every_half_minute():
    hold = Hold()
    for now in (0.0, 40.0):
        hold.close(now, HoldKind.BILLING, "no money")
        assert hold.next_probe == now + BILLING_STEP


def confirm(hold, start, retry_after, accepted_after):
    """Close at `start` with a Retry-After in seconds, and accept a probe after `accepted_after` seconds."""
    hold.close(start, HoldKind.CAPACITY, "busy", retry_after=retry_after)
    hold.open(start + accepted_after)


@pytest.mark.parametrize("retry_after", [60.0, 1e9])
def test_an_unproved_retry_after_is_believed_for_a_few_seconds_only(retry_after):
    hold = Hold()
    hold.close(0.0, HoldKind.CAPACITY, "busy", retry_after=retry_after)
    assert hold.next_probe == LITTLE_TRUST


def test_the_newest_retry_after_counts_and_not_the_first():
    hold = Hold()
    hold.close(0.0, HoldKind.CAPACITY, "busy", retry_after=4.0)
    hold.close(4.0, HoldKind.CAPACITY, "busy", retry_after=2.0)
    assert hold.next_probe == 6.0
    hold.heard(5.0, 3.0)
    assert hold.next_probe == 8.0


def test_a_shorter_retry_after_never_makes_the_next_probe_earlier():
    hold = Hold()
    hold.close(0.0, HoldKind.CAPACITY, "busy", retry_after=4.0)
    for shorter in (1.0, 0.0, None):
        hold.heard(0.5, shorter)
        assert hold.next_probe == 4.0


@pytest.mark.parametrize("retry_after", [None, 0.0, -5.0, nan, inf, -inf])
def test_an_invalid_retry_after_changes_nothing(retry_after):
    hold = Hold()
    hold.close(0.0, HoldKind.CAPACITY, "busy", retry_after=retry_after)
    assert hold.next_probe == FIRST_STEP


def test_a_retry_after_is_believed_after_it_was_true_twice_and_until_it_is_false_once():
    hold = Hold()
    confirm(hold, 0.0, 4.0, 4.0)
    assert hold.trust == LITTLE_TRUST
    confirm(hold, 100.0, 4.0, 4.5)
    assert hold.trust == MUCH_TRUST
    hold.close(200.0, HoldKind.CAPACITY, "busy", retry_after=60.0)
    assert hold.next_probe == 260.0
    hold.open(205.0)  # the probe was accepted long before the end of the Retry-After
    assert hold.trust == LITTLE_TRUST


@given(
    refusals=st.lists(
        st.tuples(
            st.sampled_from(HoldKind), st.floats(allow_nan=True) | st.none(), st.booleans(), st.floats(0.0, 50.0)
        ),
        max_size=40,
    ),
    jitter=st.floats(1.0, 1.2),
)
def test_the_next_probe_stays_within_bounds_whatever_the_provider_asks(refusals, jitter):
    hold, now = Hold(), 0.0
    for kind, retry_after, accepted, pause in refusals:
        hold.close(now, kind, "busy", retry_after, jitter=jitter)
        wait = hold.next_probe - now
        longest_step = BILLING_STEP if kind is HoldKind.BILLING else MAX_STEP * jitter
        assert FIRST_STEP * 0.99 <= wait <= max(hold.trust, longest_step) + 1e-6
        now = hold.next_probe + pause
        if accepted:
            hold.open(now)
            assert hold.kind is None
    hold.open(now)
    assert not hold.reason


def test_a_blackout_begins_with_the_wait_that_ended_the_previous_blackout():
    hold = Hold()
    hold.close(0.0, HoldKind.BLACKOUT, "all used")
    hold.close(0.5, HoldKind.BLACKOUT, "all used")
    hold.open(2.5)
    hold.close(10.0, HoldKind.BLACKOUT, "all used")
    assert hold.next_probe == pytest.approx(10.0 + 2.0)
