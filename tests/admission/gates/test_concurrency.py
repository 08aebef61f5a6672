"""Concurrency: how many attempts may be in flight, and how a provider's limit on concurrency is learned."""

from dataclasses import replace
from math import inf

import pytest
from gate_calls import TICKET, accepted, attempt_beside, refused
from hypothesis import given
from hypothesis import strategies as st

from backends.simulated import Profile
from bench.sim.systems import Sidecar
from bench.sim.table import Scenario, play, saturated
from sidecar.admission import Ticket, Upstream, Verdict
from sidecar.admission.gates.concurrency import SUSPECT_AFTER, ConcurrencyGate


def free(gate):
    return gate.opens_at(0.0, 0.0) <= 0.0


def take(gate, now=0.0):
    return gate.reserve(now, TICKET, 0.0, held=False)


def give_back(gate, place, now=0.0):
    gate.settle(now, place, Verdict("abandoned", now), blamed=None)


def refuse(gate, now, sent_at, beside):
    """Refuse an attempt that had so many others beside it, for concurrency."""
    place = attempt_beside(gate, sent_at, beside)
    gate.settle(now, place, refused(now, "concurrency"), blamed="concurrency")


def accept(gate, beside, *, held, now=0.0):
    """Accept an attempt that had so many others beside it."""
    gate.settle(now, attempt_beside(gate, now, beside, held=held), accepted(now), blamed=None)


def suspect(gate, now, sent_at, beside):
    """Refuse an attempt for no named reason; return whether this showed a limit on concurrency."""
    place = attempt_beside(gate, sent_at, beside)
    blamed = "concurrency" if gate.explains(place) else "request_rate"
    gate.settle(now, place, refused(now), blamed=blamed)
    assert gate.discovered == (blamed == "concurrency")
    return gate.discovered


@given(sizes=st.lists(st.integers(1, 20), min_size=1), moves=st.lists(st.booleans(), max_size=200))
def test_no_place_is_free_beyond_the_size_and_all_are_given_back(sizes, moves):
    gate, places = ConcurrencyGate(sizes[0]), []
    for number, takes in enumerate(moves):
        gate.size = sizes[number % len(sizes)]
        if takes and free(gate):
            places.append(take(gate))
            assert places[-1].beside == gate.in_flight - 1
            assert gate.in_flight <= gate.size
        elif not takes and gate.in_flight:
            give_back(gate, places.pop())
    while gate.in_flight:
        give_back(gate, places.pop())
    assert not places
    assert free(gate)


def test_a_place_given_back_twice_is_a_defect():
    gate = ConcurrencyGate(1)
    place = take(gate)
    give_back(gate, place)
    with pytest.raises(KeyError):
        give_back(gate, place)


def test_a_smaller_size_revokes_no_place():
    gate = ConcurrencyGate(4)
    places = [take(gate) for _ in range(4)]
    gate.size = 2
    give_back(gate, places.pop())
    assert gate.in_flight == 3
    assert not free(gate)


def test_the_first_refusal_for_concurrency_shows_the_limit():
    gate = ConcurrencyGate(100)
    refuse(gate, 1.0, 0.5, beside=12)
    assert gate.learned == gate.allowed == 12


def test_a_burst_of_refusals_lowers_the_limit_once():
    gate = ConcurrencyGate(100)
    for beside in (15, 14, 13, 12):
        refuse(gate, 1.0, 0.5, beside)
    assert gate.learned == 12
    refuse(gate, 1.1, 0.9, beside=30)
    assert gate.learned == 12


def test_the_refused_attempts_of_a_burst_do_not_count_beside_the_later_ones():
    gate = ConcurrencyGate(100)
    places = [take(gate, 0.5) for _ in range(16)]
    for place in places[12:]:
        gate.settle(1.0, place, refused(1.0, "concurrency"), blamed="concurrency")
    assert gate.learned == 12


@given(besides=st.lists(st.integers(0, 50), min_size=1))
def test_at_least_one_attempt_is_always_allowed(besides):
    gate = ConcurrencyGate(8)
    for number, beside in enumerate(besides):
        refuse(gate, number + 0.5, float(number), beside)
        assert gate.allowed >= 1


@pytest.mark.parametrize("limit", [3, 12, 40])
def test_a_risen_limit_is_found_within_the_budget(limit):
    gate = ConcurrencyGate(100, budget=0.05)
    refuse(gate, 0.0, -1.0, beside=2)
    refusals = calls = 0
    for now in range(1, 3000):
        beside = int(gate.allowed) - 1
        calls += 1
        if beside < limit:
            accept(gate, beside, held=True, now=float(now))
        else:
            refusals += 1
            refuse(gate, float(now), now - 0.5, beside)
    assert gate.learned == limit
    assert refusals / calls < 0.06


def test_unnamed_refusals_above_the_accepted_numbers_are_put_down_to_concurrency():
    gate = ConcurrencyGate(100)
    gate.answer_seconds = 1.0
    for _ in range(50):
        accept(gate, beside=5, held=False)
    found = [suspect(gate, 5.0 * number + 0.5, 5.0 * number, beside=9) for number in range(SUSPECT_AFTER)]
    assert found == [False] * (SUSPECT_AFTER - 1) + [True]
    assert gate.learned == 9


def test_refusals_at_numbers_accepted_before_are_not_put_down_to_concurrency():
    gate = ConcurrencyGate(100)
    gate.answer_seconds = 1.0
    for _ in range(50):
        accept(gate, beside=9, held=False)
    assert not any(suspect(gate, 5.0 * number + 0.5, 5.0 * number, beside=9) for number in range(SUSPECT_AFTER))
    assert gate.learned == inf


def test_refusals_within_a_moment_are_not_put_down_to_concurrency():
    """When a rate limit falls, more attempts are in flight than it accepts from then on (at constant latency)."""
    gate = ConcurrencyGate(100)
    gate.answer_seconds = 1.0
    for _ in range(50):
        accept(gate, beside=5, held=False)
    assert not any(suspect(gate, number + 0.5, float(number), beside=9) for number in range(SUSPECT_AFTER))


def test_saved_budget_pays_for_a_higher_trial_limit_once_requests_wait_for_permits():
    gate = ConcurrencyGate(100, budget=0.05)
    refuse(gate, 0.0, -1.0, beside=2)
    for _ in range(20):
        accept(gate, beside=0, held=False)
    assert gate.allowed == 2
    accept(gate, beside=1, held=True)
    assert gate.allowed == 3


def test_the_size_follows_the_pace_after_a_long_run():
    clock = [0.0]
    upstream = Upstream(lambda: clock[0])

    def learn(limit):
        upstream.recall(clock[0], {"requests": {"limit": limit, "burst": 10.0, "uncertainty": 0.1}}, 1.0)

    def answer(start, end):
        for now in range(start, end):
            clock[0] = float(now)
            permit = upstream.start(clock[0], Ticket(now=clock[0], deadline=now + 60.0), lambda permit: None)
            permit.report(accepted(now + 2.0))

    learn(10.0)
    answer(0, 200)
    size_at_10_per_second = upstream.concurrency.size
    learn(100.0)
    answer(200, 220)
    assert upstream.concurrency.size > 5 * size_at_10_per_second


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
        ({"requests_per_second": 10, "burst_requests": 1}, None),
        ({"requests_per_second": 3, "burst_requests": 1, "latency_seconds": 1.0}, None),
        ({"requests_per_second": 10, "burst_requests": 10}, None),
    ],
)
def test_an_unnamed_limit_on_concurrency_is_found_and_a_rate_is_not_mistaken_for_it(limits_of_provider, found):
    scenario = Scenario(
        "", "", replace(VAGUE, **limits_of_provider), saturated(60), lambda *_: [], seconds=500.0, deadline=120.0
    )
    (pool,) = play(scenario, 1, Sidecar).system.admission.status()
    assert pool.upstreams[0].concurrency.limit == found
