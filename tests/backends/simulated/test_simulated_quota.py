"""The quotas are exact. The tests compare them with plain counts, at times and rates without rounding errors."""

from __future__ import annotations

from fractions import Fraction
from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.simulated import Profile, Quota

# Times are multiples of 1/64 s and rates are powers of two, so every sum and every quotient below is an exact float.
STEPS = st.lists(st.integers(0, 96), min_size=1, max_size=60).map(lambda gaps: [Fraction(gap, 64) for gap in gaps])
RATES = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0, 16.0])


def quota(start: float = 0.0, seed: int = 0, **fields) -> Quota:
    return Quota(Profile(**fields), start, Random(seed))


def times(gaps: list[Fraction]) -> list[float]:
    now, result = Fraction(0), []
    for gap in gaps:
        now += gap
        result.append(float(now))
    return result


def decisions(limits: Quota, at: list[float], tokens: float = 1) -> list[str | None]:
    return [limits.arrive(now, tokens) for now in at]


@given(STEPS, RATES, st.integers(1, 6))
def test_a_bucket_accepts_exactly_the_requests_that_a_plain_count_accepts(gaps, rate, burst):
    content, before, expected = Fraction(burst), Fraction(0), []
    at = times(gaps)
    for now in map(Fraction, at):
        content = min(Fraction(burst), content + (now - before) * Fraction(rate))
        before = now
        expected.append(None if content >= 1 else "request_rate")
        content -= content >= 1
    assert decisions(quota(requests_per_second=rate, burst_requests=burst), at) == expected


@given(STEPS, st.integers(1, 5), st.sampled_from([0.25, 1.0, 4.0]))
def test_a_fixed_window_accepts_its_limit_in_each_window_since_the_start(gaps, limit, length):
    counts, expected = {}, []
    at = times(gaps)
    for now in at:
        window = now // length
        passed = counts.get(window, 0)
        expected.append(None if passed < limit else "request_rate")
        counts[window] = passed + (passed < limit)
    assert decisions(quota(window_requests=limit, window_seconds=length), at) == expected


@given(STEPS, st.integers(1, 5), st.sampled_from([0.25, 1.0, 4.0]))
def test_a_sliding_window_accepts_its_limit_in_any_period_of_its_length(gaps, limit, length):
    passed, expected = [], []
    at = times(gaps)
    for now in at:
        fits = sum(now - length < taken <= now for taken in passed) < limit
        expected.append(None if fits else "request_rate")
        passed += [now] * fits
    assert decisions(quota(sliding_requests=limit, sliding_seconds=length), at) == expected


@given(STEPS, st.integers(1, 3), st.sampled_from([1.0, 2.0]))
def test_the_growth_rule_compares_the_last_second_with_the_time_before(gaps, base, factor):
    passed, expected = [], []
    at = times(gaps)
    for now in at:
        recent = sum(now - 1 < taken for taken in passed) + 1
        before = sum(now - 5 < taken <= now - 1 for taken in passed)
        fits = recent <= base + factor * before / 4
        expected.append(None if fits else "growth")
        passed += [now] * fits
    limits = quota(growth_base_per_second=base, growth_factor=factor, growth_memory_seconds=4.0)
    assert decisions(limits, at) == expected


LIMITED = st.builds(
    Profile,
    requests_per_second=st.sampled_from([0.3, 1.0, 7.0, inf]),
    burst_requests=st.sampled_from([1.0, 2.5, 8.0]),
    tokens_per_second=st.sampled_from([100.0, 900.0, inf]),
    burst_tokens=st.sampled_from([500.0, 2000.0]),
    window_requests=st.sampled_from([2.0, 9.0, inf]),
    window_seconds=st.sampled_from([1.0, 7.3]),
    sliding_requests=st.sampled_from([3.0, inf]),
    sliding_seconds=st.just(2.7),
    punish_seconds=st.sampled_from([0.0, 0.7]),
    refusals_cost_quota=st.booleans(),
    outages=st.sampled_from([(), ((2.0, 3.5),), ((1.0, 2.0), (2.0, 2.5))]),
)
ARRIVALS = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 3000)), min_size=1, max_size=40)


@given(LIMITED, ARRIVALS)
def test_next_accept_at_is_the_exact_time_of_the_first_acceptance(profile, arrivals):
    limits, now = Quota(profile, 0.0, Random(0)), 0.0
    for gap, tokens in arrivals:
        now += gap
        limits.arrive(now, tokens)
        at = limits.next_accept_at(now, tokens)
        if (just_before := at - 1e-6) > now:
            assert not limits.would_accept(just_before, tokens)
        assert limits.would_accept(at, tokens)
        now = at


@given(LIMITED, ARRIVALS, st.sampled_from([0.0, 0.3]))
def test_the_questions_of_an_oracle_change_nothing(profile, arrivals, others_share):
    profile = Profile(**{name: getattr(profile, name) for name in Profile.__slots__} | {"others_share": others_share})
    asked, left_alone = Quota(profile, 0.0, Random(1)), Quota(profile, 0.0, Random(1))
    now = 0.0
    for gap, tokens in arrivals:
        now += gap
        predicted = asked.would_accept(now, tokens)
        asked.next_accept_at(now, tokens)
        asked.true_rate(now, tokens)
        decision = asked.arrive(now, tokens)
        assert (decision is None) == predicted
        assert decision == left_alone.arrive(now, tokens)


def test_a_request_larger_than_the_bucket_is_accepted_when_it_is_full_and_leaves_a_debt():
    limits = quota(tokens_per_second=100, burst_tokens=200)
    assert limits.arrive(0.0, 500) is None
    assert limits.next_accept_at(0.0, 1) == pytest.approx(3.01)
    assert limits.next_accept_at(0.0, 500) == pytest.approx(5.0)
    assert limits.arrive(3.0, 1) == "token_rate"
    assert limits.arrive(5.0, 500) is None


def test_each_refusal_restarts_the_punishment_and_names_the_same_limit():
    limits = quota(requests_per_second=10, punish_seconds=2)
    assert decisions(limits, [0.0, 0.0, 1.9, 3.8]) == [None, *["request_rate"] * 3]
    assert limits.next_accept_at(3.8, 1) == pytest.approx(5.8)
    assert limits.arrive(5.8, 1) is None


def test_if_refusals_cost_quota_a_high_rate_keeps_the_bucket_empty():
    hammer = [tenth / 10 for tenth in range(100)]
    honest = decisions(quota(requests_per_second=2), hammer)
    costly = decisions(quota(requests_per_second=2, refusals_cost_quota=True), hammer)
    assert honest.count(None) == 20
    assert costly.count(None) == 1


def test_permits_are_counted_and_returned():
    limits = quota(concurrency=2)
    assert decisions(limits, [0.0, 0.0, 0.0]) == [None, None, "concurrency"]
    assert limits.next_accept_at(0.0, 1) == inf
    limits.leave()
    assert limits.next_accept_at(0.0, 1) == 0.0
    assert limits.arrive(0.0, 1) is None


def test_outages_and_an_empty_account_refuse_every_request():
    limits = quota(start=100.0, outages=((10.0, 20.0),))
    assert decisions(limits, [109.9, 110.0, 119.9, 120.0]) == [None, "outage", "outage", None]
    assert quota(billing_refused=True).arrive(0.0, 1) == "billing"
    assert quota(billing_refused=True).true_rate(0.0, 1) == 0.0


def test_other_tenants_use_their_share_of_the_quota():
    limits = quota(requests_per_second=10, burst_requests=5, others_share=0.4, others_steady=True)
    passed = decisions(limits, [step / 100 for step in range(6000)]).count(None)
    assert passed == pytest.approx(0.6 * 10 * 60, rel=0.02)
    assert limits.true_rate(60.0, 1) == pytest.approx(6.0)


def test_scheduled_changes_apply_at_their_time_and_the_used_quota_stays_used():
    limits = quota(requests_per_second=1, burst_requests=4, changes=((10.0, {"requests_per_second": "4"}),))
    assert decisions(limits, [9.0] * 5) == [None] * 4 + ["request_rate"]
    assert decisions(limits, [10.0, 10.0]) == [None, "request_rate"]  # one second of refill at the old rate
    assert decisions(limits, [10.25, 10.5]) == [None, None]
    assert limits.true_rate(10.5, 1) == 4.0


def test_without_limits_every_request_is_accepted():
    limits = quota()
    assert set(decisions(limits, [0.0] * 1000)) == {None}
    assert limits.true_rate(0.0, 1) == inf
