"""Hold: when the one probe may go, and how far a provider's Retry-After is believed."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.admission.gates.circuit import BILLING_STEP, FIRST_STEP, LITTLE_TRUST, MAX_STEP, MUCH_TRUST, Hold, HoldKind

THROTTLED = (HoldKind.OUTAGE, HoldKind.CAPACITY, HoldKind.BLACKOUT)


@pytest.mark.parametrize("kind", THROTTLED)
def test_probes_come_ever_later_up_to_the_longest_step(kind):
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


def test_a_refused_account_is_asked_again_every_half_minute():
    hold = Hold()
    for now in (0.0, 40.0):
        hold.close(now, HoldKind.BILLING, "no money")
        assert hold.next_probe == now + BILLING_STEP


def confirm(hold, start, asked, taken_after):
    """A hold in which the provider asks for so many seconds and takes a probe after so many others."""
    hold.close(start, HoldKind.CAPACITY, "busy", retry_after=asked)
    hold.open(start + taken_after)


@pytest.mark.parametrize("word", [60.0, 1e9])
def test_an_unproved_retry_after_is_believed_for_seconds_only(word):
    hold = Hold()
    hold.close(0.0, HoldKind.CAPACITY, "busy", retry_after=word)
    assert hold.next_probe == LITTLE_TRUST


def test_the_newest_retry_after_counts_and_not_the_first():
    hold = Hold()
    hold.close(0.0, HoldKind.CAPACITY, "busy", retry_after=4.0)
    hold.close(4.0, HoldKind.CAPACITY, "busy", retry_after=2.0)
    assert hold.next_probe == 6.0
    hold.heard(5.0, 3.0)
    assert hold.next_probe == 8.0


def test_a_shorter_word_never_brings_the_next_probe_forward():
    hold = Hold()
    hold.close(0.0, HoldKind.CAPACITY, "busy", retry_after=4.0)
    for shorter in (1.0, 0.0, None):
        hold.heard(0.5, shorter)
        assert hold.next_probe == 4.0


@pytest.mark.parametrize("word", [None, 0.0, -5.0, nan, inf, -inf])
def test_what_is_no_time_to_wait_changes_nothing(word):
    hold = Hold()
    hold.close(0.0, HoldKind.CAPACITY, "busy", retry_after=word)
    assert hold.next_probe == FIRST_STEP


def test_a_word_found_true_twice_is_believed_and_found_false_once_no_more():
    hold = Hold()
    confirm(hold, 0.0, 4.0, 4.0)
    assert hold.trust == LITTLE_TRUST
    confirm(hold, 100.0, 4.0, 4.5)
    assert hold.trust == MUCH_TRUST
    hold.close(200.0, HoldKind.CAPACITY, "busy", retry_after=60.0)
    assert hold.next_probe == 260.0
    hold.open(205.0)  # it was taken long before
    assert hold.trust == LITTLE_TRUST


@given(
    words=st.lists(
        st.tuples(
            st.sampled_from(HoldKind), st.floats(allow_nan=True) | st.none(), st.booleans(), st.floats(0.0, 50.0)
        ),
        max_size=40,
    ),
    jitter=st.floats(1.0, 1.2),
)
def test_whatever_a_provider_says_the_next_probe_comes_within_bounds(words, jitter):
    hold, now = Hold(), 0.0
    for kind, word, taken, pause in words:
        hold.close(now, kind, "busy", word, jitter=jitter)
        wait = hold.next_probe - now
        own = BILLING_STEP if kind is HoldKind.BILLING else MAX_STEP * jitter
        assert FIRST_STEP * 0.99 <= wait <= max(hold.trust, own) + 1e-6
        now = hold.next_probe + pause
        if taken:
            hold.open(now)
            assert hold.kind is None
    hold.open(now)
    assert not hold.reason


def test_a_blackout_begins_with_the_wait_that_the_last_one_took():
    hold = Hold()
    hold.close(0.0, HoldKind.BLACKOUT, "all used")
    hold.close(0.5, HoldKind.BLACKOUT, "all used")
    hold.open(2.5)
    hold.close(10.0, HoldKind.BLACKOUT, "all used")
    assert hold.next_probe == pytest.approx(10.0 + 2.0)
