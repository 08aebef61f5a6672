"""The token bucket is compared with its definition."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.admission.gates.bucket import MAX_DEBT_SECONDS, TokenBucket

steps = st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.1, 3.0)), max_size=60)


@given(rate=st.floats(0.1, 100.0), capacity=st.floats(3.0, 50.0), wanted=steps)
def test_no_interval_gets_more_than_the_rate_plus_one_capacity(rate, capacity, wanted):
    bucket, now, taken = TokenBucket(0.0, rate, capacity), 0.0, []
    for gap, amount in wanted:
        now += gap
        if bucket.wait(now, amount) == 0.0:
            bucket.take(now, amount)
            taken.append((now, amount))
        assert bucket.level(now) <= capacity
    for first, (start, _) in enumerate(taken):
        total = 0.0
        for at, amount in taken[first:]:
            total += amount
            assert total <= capacity + rate * (at - start) + 1e-6


@given(rate=st.floats(0.1, 100.0), capacity=st.floats(1.0, 50.0), amounts=st.lists(st.floats(0.1, 200.0), max_size=40))
def test_an_amount_may_be_taken_after_the_wait_and_not_before(rate, capacity, amounts):
    bucket, now = TokenBucket(0.0, rate, capacity), 0.0
    for amount in amounts:
        wait = bucket.wait(now, amount)
        if wait > 0:
            assert bucket.wait(now + 0.9 * wait, amount) > 0
        now += wait
        assert bucket.wait(now, amount) == 0.0
        bucket.take(now, amount)


def test_a_large_amount_passes_when_full_and_leaves_a_debt():
    bucket = TokenBucket(0.0, rate=2.0, capacity=4.0)
    assert bucket.wait(0.0, 10.0) == 0.0
    bucket.take(0.0, 10.0)
    assert bucket.level(0.0) == -6.0
    assert bucket.wait(0.0, 1.0) == pytest.approx(3.5)
    assert bucket.level(100.0) == 4.0


def test_the_debt_of_one_huge_amount_is_paid_in_a_minute():
    bucket = TokenBucket(0.0, rate=100.0, capacity=500.0)
    bucket.take(0.0, 1e9)
    assert bucket.wait(0.0, 1.0) == pytest.approx(MAX_DEBT_SECONDS, rel=0.01)
    bucket.take(1.0, 1e9)
    assert bucket.wait(1.0, 1.0) == pytest.approx(MAX_DEBT_SECONDS, rel=0.01)


def test_a_clock_that_stands_still_or_steps_back_fills_nothing():
    bucket = TokenBucket(10.0, rate=1.0, capacity=5.0)
    bucket.take(10.0, 5.0)
    assert bucket.level(3.0) == 0.0
    assert bucket.level(12.0) == 2.0


def test_an_amount_given_back_never_overfills_the_bucket():
    bucket = TokenBucket(0.0, rate=1.0, capacity=5.0)
    bucket.take(0.0, 1.0)
    bucket.take(0.0, -3.0)
    assert bucket.level(0.0) == 5.0


def test_an_unlimited_bucket_that_becomes_limited_starts_empty():
    bucket = TokenBucket(0.0, inf, 16.0)
    assert bucket.wait(0.0, 1e9) == 0.0
    bucket.set(1.0, 2.0, 8.0)
    assert bucket.level(1.0) == 0.0
    assert bucket.wait(1.0) == pytest.approx(0.5)


def test_a_smaller_capacity_cuts_the_level_and_a_larger_capacity_does_not_raise_it():
    bucket = TokenBucket(0.0, 1.0, 10.0)
    bucket.set(0.0, 1.0, 4.0)
    assert bucket.level(0.0) == 4.0
    bucket.set(0.0, 1.0, 20.0)
    assert bucket.level(0.0) == 4.0


def test_at_rate_zero_the_wait_for_a_missing_amount_is_infinite():
    bucket = TokenBucket(0.0, 0.0, 1.0)
    bucket.take(0.0)
    assert bucket.wait(1e9) == inf


@given(now=st.floats(1.0, 1e6), missing=st.floats(1e-12, 1e-6), rate=st.floats(1e3, 1e6))
def test_a_wait_below_the_resolution_of_the_clock_is_zero(now, missing, rate):
    bucket = TokenBucket(now, rate, 1e6)
    bucket.take(now, 1e6 - 1.0 + missing)
    assert bucket.wait(now, 1.0) == 0.0 or now + bucket.wait(now, 1.0) > now
