"""Everything refused for a while: a penalty or a window, told apart by what was taken and for how long; and ramps."""

from math import inf
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.simulated import Profile
from bench.sim.table import SYSTEMS, Scenario, play, poisson, saturated, share
from sidecar.admission.learning.blackout import Blackouts
from sidecar.admission.learning.estimate import Estimate
from sidecar.admission.learning.first import FirstBurst
from sidecar.admission.learning.policer import Sent
from sidecar.admission.learning.policer_learner import PolicerLearner
from sidecar.admission.learning.ramp import Ramp
from sidecar.admission.learning.states import State
from sidecar.admission.learning.tuning import ESTIMATE_UNSUREST, HISTORY_BIN_SECONDS


def known(limit, burst, unsure):
    estimate = Estimate(0.0, 1.0)
    estimate.state = State.ASSESS
    estimate.limit, estimate.burst, estimate.unsure = limit, burst, unsure
    return estimate


def bucket(rate, **more):
    return Profile(requests_per_second=rate, burst_requests=rate, latency_seconds=0.8, **more)


def window(count, seconds):
    return Profile(window_requests=count, window_seconds=seconds, latency_seconds=0.5, refusal_latency_seconds=0.05)


#: Providers in no table, with the share of the oracle's that is used in the first 90 s, start and search included.
PROVIDERS = {
    "each refusal punished with 2 s, 5/s": (bucket(5.0, punish_seconds=2.0), poisson(7.5), 0.75),
    "each refusal punished with 2 s, 10/s": (bucket(10.0, punish_seconds=2.0), saturated(), 0.75),
    "windows of 40 in 7 s": (window(40, 7.0), poisson(9.0), 0.82),
    "windows of 100 in 13 s": (window(100, 13.0), poisson(12.0), 0.82),
    "10/s, then 4/s, then 12/s": (
        bucket(
            10.0,
            changes=(
                (30.0, {"requests_per_second": 4.0, "burst_requests": 4.0}),
                (60.0, {"requests_per_second": 12.0, "burst_requests": 12.0}),
            ),
        ),
        poisson(14.0),
        0.75,
    ),
    "slow refusals that cost quota": (
        bucket(8.0, refusals_cost_quota=True, refusal_latency_seconds=1.0, refusal_latency_spread_seconds=0.5),
        poisson(12.0),
        0.85,
    ),
}


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_that_nobody_thought_of_is_learned_within_a_minute_or_so(name):
    profile, load, least = PROVIDERS[name]
    scenario = Scenario("", name, profile, load, lambda *_: [], seconds=90.0, deadline=20.0)
    used = []
    for seed in (1, 2, 3):
        result = play(scenario, seed, SYSTEMS["sidecar"])
        assert result.visible == 0
        used.append(share(result, play(scenario, seed, SYSTEMS["oracle"])))
    assert median(used) >= least


@given(held=st.integers(20, 500), seconds=st.floats(4.0, 55.0), pace=st.floats(1.2, 3.0), late=st.floats(0.02, 0.3))
def test_windows_of_any_length_are_known_after_two_of_them(held, seconds, pace, late):
    """All of a window goes out early in it; a probe `late` after its end, and not later, finds the next."""
    blackouts, start = Blackouts(0.0), 0.0
    gap = seconds / (pace * held)
    for number in (1, 2):
        for call in range(held):
            blackouts.history.add(start + call * gap, 1.0)
        closed, start = start + held * gap, number * seconds + late
        blackouts.history.add(start - 2 * late, 1.0)
        blackouts.refused(start - 2 * late, 1.0)
        blackouts.history.add(start, 1.0)  # the probe
        blackouts.ended(closed, start, 2 * late, 1.0)
        blackouts.history.add(start, -1.0)  # sent again as the first of its window, above
    assert blackouts.windowed
    assert blackouts.window == held
    assert blackouts.unsure <= (1.1 * late + HISTORY_BIN_SECONDS) / seconds
    assert blackouts.rate == pytest.approx(held / seconds, rel=2 * (late + HISTORY_BIN_SECONDS) / seconds)


@given(held=st.integers(8, 300), seconds=st.floats(2.0, 60.0), excess=st.floats(0.01, 0.1))
def test_a_refusal_at_an_even_pace_tells_how_long_a_window_is(held, seconds, excess):
    """What is sent a little too fast into a window that slides is refused when the first of it is as old as one."""
    blackouts = Blackouts(0.0)
    blackouts.windowed, blackouts.window = True, float(held)
    estimate = known(1.0, 1.0, 1.0)
    gap = seconds / (held * (1.0 + excess))
    calls = held * 5 // 2
    for call in range(calls):
        blackouts.history.add(10.0 + call * gap, 1.0)
    at = 10.0 + calls * gap
    blackouts.full(at, at, estimate)
    assert blackouts.rate == pytest.approx(held / (held * gap), rel=1.5 / held + 0.1 / seconds)
    assert blackouts.full(at, at, estimate)
    assert at <= blackouts.next_at <= at + gap + 0.1
    assert estimate.limit == blackouts.rate


def test_windows_are_known_though_one_of_them_ended_between_two_blackouts():
    blackouts = Blackouts(0.0)
    for start, taken, probed_at in ((0.0, 140, 11.0), (11.0, 250, 21.0), (21.0, 140, 31.0)):
        for call in range(taken):
            blackouts.history.add(start + 0.02 * call, 1.0)
        blackouts.refused(probed_at - 2.0, 0.0)
        blackouts.history.add(probed_at, 1.0)  # the probe
        blackouts.ended(probed_at - 4.0, probed_at, 2.0, 1.0)
        blackouts.history.add(probed_at, -1.0)  # sent again as the first of its window, above
        assert blackouts.windowed == (start == 21.0)
    assert blackouts.window == 140


def test_a_penalty_is_no_window():
    blackouts = Blackouts(0.0)
    for start, taken in ((0.0, 30), (12.0, 55), (30.0, 44)):
        for call in range(taken):
            blackouts.history.add(start + 0.1 * call, 1.0)
        blackouts.ended(start + 8.0, start + 10.2, 2.2, 1.0)
    assert not blackouts.windowed
    assert blackouts.lost_seconds == pytest.approx(2.2)


def test_what_is_refused_within_a_hold_counts_as_refused():
    learner = PolicerLearner(0.0)
    sent = [learner.sent(0.1 * number, 1.0, held=False, pace=inf) for number in range(10)]
    for one in sent[6:]:
        learner.refused_too(2.0, one)
    assert learner._blackouts.history.since(0.0) == 6.0


@given(
    limit=st.floats(0.3, 200.0),
    burst_seconds=st.floats(0.0, 5.0),
    unsure=st.floats(0.01, ESTIMATE_UNSUREST),
    refusal_seconds=st.floats(0.0, 2.0),
    lost=st.floats(0.0, 50.0),
)
def test_a_ramp_begins_below_the_limit_only_rises_and_comes_to_its_end(
    limit, burst_seconds, unsure, refusal_seconds, lost
):
    ramp = Ramp(0.005)
    ramp.begin(known(limit, max(limit * burst_seconds, 1.0), unsure), refusal_seconds, lost=lost)
    height = ramp.height
    assert height == pytest.approx(1.0 - unsure)
    for _ in range(20_000):
        before = ramp.height
        ramp.grow(min(1.0 / (limit * before), 0.5), 1.0, 1.0)
        assert ramp.height >= before - 1e-9
        if ramp.rise > 2.0:
            return
    assert lost  # only where refusals are punished may it take longer than that


def test_a_limit_that_moved_is_looked_at_again_sooner_and_later_each_time_it_stays():
    def calls():
        ramp.begin(known(10.0, 10.0, 0.01), 0.05)
        count = 0
        while ramp.along < 1.0:
            ramp.grow(0.1, 1.0, 1.0)
            count += 1
        return count

    ramp = Ramp(0.005)
    lengths = [calls()]
    for _ in range(5):
        ramp.refused()
        ramp.confirmed()
        lengths.append(calls())
    assert lengths == sorted(lengths)
    assert lengths[-1] == pytest.approx(200.0, abs=2.0)
    assert ramp.moved()
    assert calls() <= 0.3 * lengths[-1]
    assert not ramp.moved()  # again so soon: others may share it


@pytest.mark.parametrize(("seconds", "taken"), [(0.05, 10), (2.0, 15), (4.0, 60)])
def test_a_first_burst_is_explained_by_the_limit_and_the_credit_that_it_gives(seconds, taken):
    sent = [Sent(seconds * number / taken, 1.0, bound=False) for number in range(taken)]
    first = FirstBurst(seconds, 0.0, sent)
    estimate = Estimate(0.0, 1.0)
    first.guess(estimate, refusal_seconds=inf)  # so that nothing is looked for beyond
    assert first.is_burst
    assert estimate.limit * seconds + estimate.burst == pytest.approx(taken)
    assert 0.0 < estimate.limit < inf
