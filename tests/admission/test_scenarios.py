"""The most difficult scenarios, each with five seeds, compared with an oracle: see docs/limiting.md."""

from statistics import median

import pytest

from backends.simulated import Profile
from bench.sim.table import SYSTEMS, TABLE, Scenario, play, saturated, share

GATED = ("1", "3", "4", "6", "9", "13", "14")
#: They take most of the processor time of this folder, so `make check` leaves them to `make test`.
LONG = ("1", "3", "4", "9", "13", "14")


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(s, marks=[pytest.mark.long] * (s.number in LONG)) for s in TABLE if s.number in GATED],
    ids=lambda s: f"{s.number} {s.name}",
)
def test_a_scenario_meets_its_targets(scenario):
    checks = {}
    for seed in range(1, 6):
        oracle = play(scenario, seed, SYSTEMS["oracle"])
        for check in scenario.judge(play(scenario, seed, SYSTEMS["sidecar"]), oracle):
            checks.setdefault((check.name, check.at_least, check.target), []).append(check.value)
    missed = {
        name: (median(values), target)
        for (name, at_least, target), values in checks.items()
        if not (median(values) >= target if at_least else median(values) <= target)
    }
    assert not missed


@pytest.mark.parametrize(("quota", "burst"), [(1.5, 3), (3.0, 3), (6.0, 3), (12.0, 3), (24.0, 3), (12.0, 1)])
def test_no_frame_is_lost_while_the_limit_is_learned(quota, burst):
    """Ten cameras send at the same instant, three times, at nine tenths of a quota that the sidecar does not know."""
    period = 10 / (0.9 * quota)
    profile = Profile(requests_per_second=quota, burst_requests=burst, latency_seconds=0.38 * period)
    scenario = Scenario(
        "", "", profile, lambda run: run.volleys(period, 1), lambda *_: [], seconds=2.5 * period, deadline=2.16 * period
    )
    run = play(scenario, 1, SYSTEMS["sidecar"]).runs[0]
    assert len(run.records) == 30
    assert run.share_ok() == 1.0


@pytest.mark.parametrize(("per_second", "burst"), [(226.0, 400.0), (120.0, 450.0)])
def test_a_token_quota_that_holds_one_call_at_a_time_is_used(per_second, burst):
    profile = Profile(tokens_per_second=per_second, burst_tokens=burst, latency_seconds=0.3)
    scenario = Scenario("", "", profile, saturated(20), lambda *_: [], seconds=900.0, deadline=600.0)
    assert share(play(scenario, 1, SYSTEMS["sidecar"]), play(scenario, 1, SYSTEMS["oracle"])) > 0.94
