"""What a refusal proves: the bounds hold for every bucket, whatever was sent to it."""

from hypothesis import given
from hypothesis import strategies as st

from sidecar.admission.learning.policer import Sent, rate_between


def judged(rate, burst, gaps):
    """Send to an empty bucket at these gaps; gives (what it took before it refused, the refusal) or None."""
    level = at = 0.0
    taken = []
    for gap in gaps:
        at += gap
        level = min(burst, level + rate * gap)
        if level < 1.0:
            return taken, at
        level -= 1.0
        taken.append(Sent(at, 1.0, bound=True))
    return None


@given(
    rate=st.floats(0.3, 100.0),
    burst=st.floats(1.0, 50.0),
    gaps=st.lists(st.floats(0.2, 3.0), min_size=1, max_size=60),
)
def test_the_true_rate_is_within_the_bounds_whatever_was_sent(rate, burst, gaps):
    found = judged(rate, burst, [gap / rate for gap in gaps])
    if found is None:
        return
    taken, at = found
    low, high = rate_between(0.0, taken, at, 1.0, burst)
    assert low <= rate * 1.01
    assert high >= rate * 0.99


@given(rate=st.floats(0.3, 100.0), burst=st.floats(3.0, 50.0), over=st.floats(1.02, 1.3))
def test_a_steady_sender_learns_the_rate_to_within_the_number_of_calls_between_two_refusals(rate, burst, over):
    taken, at = judged(rate, burst, [2.0 / rate] + [1.0 / (rate * over)] * 2000)
    low, high = rate_between(0.0, taken, at, 1.0, burst)
    assert high - low <= rate * (2.5 / len(taken) + 0.01)


def test_a_bucket_without_credit_is_known_by_the_spacing_that_it_refused():
    taken, at = judged(10.0, 1.0, [0.11] * 20 + [0.099])
    low, high = rate_between(0.0, taken, at, 1.0, 1.0)
    assert 9.0 < low < 10.0 < high < 10.2


def test_no_time_between_two_refusals_proves_nothing():
    assert rate_between(5.0, [], 5.0, 1.0, 10.0) == (0.0, float("inf"))
