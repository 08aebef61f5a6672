"""Permits: how many attempts may be in flight, and how a provider's limit on concurrency is learned."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidecar.admission.limits import Limits

from backends.simulated import Profile
from bench.sim.systems import Sidecar
from bench.sim.table import Scenario, play, saturated
from sidecar.admission import Ticket
from sidecar.admission.gates.concurrency import SUSPECT_AFTER, Permits


@given(sizes=st.lists(st.integers(1, 20), min_size=1), moves=st.lists(st.booleans(), max_size=200))
def test_no_permit_is_free_beyond_the_size_and_all_are_given_back(sizes, moves):
    permits = Permits(sizes[0])
    for number, take in enumerate(moves):
        permits.size = sizes[number % len(sizes)]
        if take and permits.free:
            assert permits.take() == permits.in_flight - 1
            assert permits.in_flight <= permits.size
        elif not take and permits.in_flight:
            permits.give_back()
    while permits.in_flight:
        permits.give_back()
    assert permits.free


def test_a_permit_given_back_twice_is_a_defect():
    with pytest.raises(AssertionError, match="twice"):
        Permits(1).give_back()


def test_a_smaller_size_revokes_no_permit():
    permits = Permits(4)
    for _ in range(4):
        permits.take()
    permits.size = 2
    permits.give_back()
    assert permits.in_flight == 3
    assert not permits.free


def test_the_first_refusal_for_concurrency_shows_the_limit():
    permits = Permits(100)
    permits.refused(1.0, 0.5, beside=12)
    assert permits.learned == permits.allowed == 12


def test_a_burst_of_refusals_lowers_the_limit_once():
    permits = Permits(100)
    for beside in (15, 14, 13, 12):
        permits.refused(1.0, 0.5, beside)
    assert permits.learned == 12
    permits.refused(1.1, 0.9, beside=30)
    assert permits.learned == 12


@given(besides=st.lists(st.integers(0, 50), min_size=1))
def test_at_least_one_attempt_is_always_allowed(besides):
    permits = Permits(8)
    for number, beside in enumerate(besides):
        permits.refused(number + 0.5, float(number), beside)
        assert permits.allowed >= 1


@pytest.mark.parametrize("limit", [3, 12, 40])
def test_a_risen_limit_is_found_within_the_budget(limit):
    permits = Permits(100, budget=0.05)
    permits.refused(0.0, -1.0, beside=2)
    refused = calls = 0
    for now in range(1, 3000):
        beside = int(permits.allowed) - 1
        calls += 1
        if beside < limit:
            permits.accepted(beside, bound=True)
        else:
            refused += 1
            permits.refused(float(now), now - 0.5, beside)
    assert permits.learned == limit
    assert refused / calls < 0.06


def test_unnamed_refusals_above_the_accepted_numbers_are_put_down_to_concurrency():
    permits = Permits(100)
    for _ in range(50):
        permits.accepted(beside=5, bound=False)
    found = [
        permits.suspect(5.0 * number + 0.5, 5.0 * number, beside=9, latency=1.0) for number in range(SUSPECT_AFTER)
    ]
    assert found == [False] * (SUSPECT_AFTER - 1) + [True]
    assert permits.learned == 9


def test_refusals_at_numbers_accepted_before_are_not_put_down_to_concurrency():
    permits = Permits(100)
    for _ in range(50):
        permits.accepted(beside=9, bound=False)
    assert not any(
        permits.suspect(5.0 * number + 0.5, 5.0 * number, beside=9, latency=1.0) for number in range(SUSPECT_AFTER)
    )
    assert permits.learned == inf


def test_refusals_within_a_moment_are_not_put_down_to_concurrency():
    """When a rate limit falls, more attempts are in flight than it accepts from then on (at constant latency)."""
    permits = Permits(100)
    for _ in range(50):
        permits.accepted(beside=5, bound=False)
    assert not any(
        permits.suspect(number + 0.5, float(number), beside=9, latency=1.0) for number in range(SUSPECT_AFTER)
    )


def test_saved_budget_pays_for_a_higher_trial_limit_once_requests_wait_for_permits():
    permits = Permits(100, budget=0.05)
    permits.refused(0.0, -1.0, beside=2)
    for _ in range(20):
        permits.accepted(beside=0, bound=False)
    assert permits.allowed == 2
    permits.accepted(beside=1, bound=True)
    assert permits.allowed == 3


def test_permits_follow_the_pace_after_a_long_run():
    limits = Limits(0.0)
    limits.requests.recall(0.0, 10.0, 10.0)

    def answer(start, end):
        for now in range(start, end):
            ticket = Ticket(now=float(now), deadline=now + 60.0)
            attempt = limits.start(float(now), ticket, None)
            limits.accepted(attempt, now + 2.0)
            limits.ended(attempt, now + 2.0)

    answer(0, 200)
    size_at_10_per_second = limits.permits.size
    limits.requests.estimate.limit = 100.0
    answer(200, 220)
    assert limits.permits.size > 5 * size_at_10_per_second


VAGUE = Profile(
    requests_per_second=inf,
    latency_seconds=0.5,
    latency_sigma=0.3,
    refusal_latency_seconds=0.05,
    vague_refusals=True,
)


@pytest.mark.parametrize(
    ("limits_of_provider", "found"),
    [
        ({"concurrency": 12}, 12),
        ({"concurrency": 1, "latency_seconds": 2.0}, 1),
        ({"concurrency": 12, "refusal_latency_seconds": 1.0, "refusal_latency_spread_seconds": 0.3}, 12),
        ({"concurrency": 15, "changes": ((100.0, {"concurrency": 6.0}),)}, 6),
        ({"concurrency": 6, "changes": ((100.0, {"concurrency": 15.0}),)}, 15),
        ({"requests_per_second": 10, "burst_requests": 1}, inf),
        ({"requests_per_second": 3, "burst_requests": 1, "latency_seconds": 1.0}, inf),
        ({"requests_per_second": 10, "burst_requests": 10}, inf),
    ],
)
def test_an_unnamed_limit_on_concurrency_is_found_and_a_rate_is_not_mistaken_for_it(limits_of_provider, found):
    scenario = Scenario(
        "", "", replace(VAGUE, **limits_of_provider), saturated(60), lambda *_: [], seconds=500.0, deadline=120.0
    )
    assert play(scenario, 1, Sidecar).system.lane.limits.permits.learned == found
