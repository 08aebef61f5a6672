"""Compare the predicted wait of a new ticket with its real wait, on virtual time, in both orders and at each gate."""

from dataclasses import replace
from statistics import median

import pytest
from gate_calls import accepted, make_circuit, probe

from backends.simulated import Profile
from bench.sim.systems import Sidecar
from bench.sim.table import Scenario, play, saturated
from sidecar.admission.gates.circuit import MAX_GUESS, CircuitState

PROFILE = Profile(latency_seconds=0.5, latency_sigma=0.3, refusal_latency_seconds=0.05)
GATES = {
    "requests": ({"requests_per_second": 10.0, "burst_requests": 10.0}, 60.0),
    "requests, newest first": ({"requests_per_second": 0.5, "burst_requests": 1.0}, 60.0),
    "tokens": ({"tokens_per_second": 3400.0, "burst_tokens": 3400.0}, 60.0),
    "concurrency": ({"concurrency": 6.0}, 60.0),
}


@pytest.mark.parametrize("gate", GATES)
def test_served_tickets_wait_as_long_as_predicted(gate):
    limits, deadline = GATES[gate]
    scenario = Scenario(
        "", gate, replace(PROFILE, **limits), saturated(), lambda *_: [], seconds=400.0, deadline=deadline
    )
    waits = play(scenario, 1, Sidecar).system.waits
    settled = waits[len(waits) // 4 :]
    median_wait = median(wait for _, wait in settled)
    errors = sorted(abs(predicted - wait) for predicted, wait in settled)
    assert len(settled) > 100
    assert median(errors) <= 0.1 * median_wait + 0.05
    seconds_between_starts = 300.0 / len(settled)  # newest first, the prediction is exact only to half of this
    assert errors[int(0.9 * len(errors))] <= 0.3 * median_wait + max(0.6, 0.5 * seconds_between_starts)


def test_a_circuit_is_estimated_to_stay_open_as_long_again_as_it_has_been_open():
    circuit = make_circuit()
    assert circuit.seconds_left(5.0) == 0.0
    circuit.open(10.0, CircuitState.OUTAGE, "down")
    assert 0.0 < circuit.seconds_left(10.0) < 1.0
    assert circuit.seconds_left(40.0) == 30.0
    assert circuit.seconds_left(1000.0) == MAX_GUESS


def test_a_blackout_is_estimated_to_last_as_long_as_the_previous_blackout():
    circuit = make_circuit()
    circuit.open(10.0, CircuitState.BLACKOUT, "refused")
    probe(circuit, 12.5, accepted(12.5))
    circuit.open(20.0, CircuitState.BLACKOUT, "refused")
    assert circuit.seconds_left(20.0) == pytest.approx(2.5)
