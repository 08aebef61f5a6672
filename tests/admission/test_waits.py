"""The wait that a newcomer is told, beside the one it has: on virtual time, under both orders and behind each gate."""

from dataclasses import replace
from statistics import median

import pytest

from backends.simulated import Profile
from bench.sim.systems import Sidecar
from bench.sim.table import Scenario, play, saturated
from sidecar.admission.gates.circuit import MAX_GUESS, Hold, HoldKind

PROFILE = Profile(latency_seconds=0.5, latency_sigma=0.3, refusal_latency_seconds=0.05)
GATES = {
    "requests": ({"requests_per_second": 10.0, "burst_requests": 10.0}, 60.0),
    "requests, newest first": ({"requests_per_second": 0.5, "burst_requests": 1.0}, 60.0),
    "tokens": ({"tokens_per_second": 3400.0, "burst_tokens": 3400.0}, 60.0),
    "concurrency": ({"concurrency": 6.0}, 60.0),
}


@pytest.mark.parametrize("gate", GATES)
def test_those_that_are_served_wait_as_long_as_was_predicted(gate):
    limits, deadline = GATES[gate]
    scenario = Scenario(
        "", gate, replace(PROFILE, **limits), saturated(), lambda *_: [], seconds=400.0, deadline=deadline
    )
    waits = play(scenario, 1, Sidecar).system.waits
    settled = waits[len(waits) // 4 :]
    real = median(wait for _, wait in settled)
    off = sorted(abs(predicted - wait) for predicted, wait in settled)
    assert len(settled) > 100
    assert median(off) <= 0.1 * real + 0.05
    turn = 300.0 / len(settled)  # seconds from one to the next: whose it is among the newest is known to half of it
    assert off[int(0.9 * len(off))] <= 0.3 * real + max(0.6, 0.5 * turn)


def test_what_is_closed_is_guessed_to_stay_so_for_as_long_again():
    hold = Hold()
    assert hold.seconds_left(5.0) == 0.0
    hold.close(10.0, HoldKind.OUTAGE, "down")
    assert 0.0 < hold.seconds_left(10.0) < 1.0
    assert hold.seconds_left(40.0) == 30.0
    assert hold.seconds_left(1000.0) == MAX_GUESS


def test_a_blackout_is_guessed_to_last_as_long_as_the_one_before():
    hold = Hold()
    hold.close(10.0, HoldKind.BLACKOUT, "refused")
    hold.open(12.5)
    hold.close(20.0, HoldKind.BLACKOUT, "refused")
    assert hold.seconds_left(20.0) == pytest.approx(2.5)
