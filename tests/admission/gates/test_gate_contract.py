"""What every gate promises, whatever happened before: a question changes nothing, and what is reserved is settled."""

import pytest
from gate_calls import make_circuit, make_rise
from gate_contract import OUTCOMES, STEPS, play, state_of
from hypothesis import given, settings
from ledger import counting

from sidecar.admission import CircuitState, Ticket, Upstream, Verdict
from sidecar.admission.gates.concurrency import ConcurrencyGate
from sidecar.admission.gates.growth import GrowthGate


def make_upstream(**settings):
    return Upstream(lambda: 0.0, **settings)


GATES = {
    "circuit": make_circuit,
    "cold rise": lambda: make_rise(cold=True),
    "rise": make_rise,
    "rise while others fail": lambda: make_rise(others_fail=True),
    "open circuit": lambda: opened(CircuitState.OUTAGE),
    "blackout": lambda: opened(CircuitState.BLACKOUT),
    "account in doubt": lambda: opened(CircuitState.DOUBT),
    "refused key": lambda: opened(CircuitState.UNAUTHORIZED),
    "used-up quota": lambda: opened(CircuitState.QUOTA),
    "request rate": lambda: make_upstream().requests,
    "request rate with a ceiling": lambda: make_upstream(requests_per_second=3.0).requests,
    "token rate": lambda: make_upstream().tokens,
    "token rate with a ceiling": lambda: make_upstream(tokens_per_second=2000.0).tokens,
    "growth": GrowthGate,
    "concurrency": lambda: concurrency_gate(0.5),
}


def concurrency_gate(answer_seconds):
    gate = ConcurrencyGate(4)
    gate.answer_seconds = answer_seconds
    return gate


def opened(state):
    circuit = make_circuit()
    circuit.open(0.0, state, "down")
    return circuit


@pytest.mark.parametrize("name", GATES)
def test_a_gate_keeps_its_promises_in_every_history(name):
    @settings(max_examples=100)
    @given(steps=STEPS)
    def check(steps):
        play(GATES[name](), steps)

    check()


def test_the_comparison_of_states_sees_every_change():
    gate = make_upstream().requests
    before = state_of(gate)
    assert state_of(gate) == before
    gate.reserve(0.0, Ticket(now=0.0, deadline=60.0), 1.0, held=False)
    assert state_of(gate) != before


@pytest.mark.parametrize("first", OUTCOMES)
@pytest.mark.parametrize("second", [*OUTCOMES, "release"])
def test_a_permit_settles_every_reservation_once_however_often_it_is_reported(first, second):
    upstream, ended = make_upstream(), []
    with counting() as ledger:
        permit = upstream.start(0.0, Ticket(now=0.0, deadline=60.0), ended.append)
        permit.report(Verdict(first, 0.5))
        ledger.check([upstream])
        if second == "release":
            permit.release(1.0)
        else:
            permit.report(Verdict(second, 1.0))
        with permit:
            pass
        ledger.check([upstream])
    assert ended == [permit]


def test_a_permit_without_a_verdict_is_settled_as_abandoned_at_the_end_of_its_block():
    upstream = make_upstream()
    with counting() as ledger:
        with (
            pytest.raises(RuntimeError, match="broken"),
            upstream.start(0.0, Ticket(now=0.0, deadline=60.0), lambda permit: None),
        ):
            assert not ledger.settled
            raise RuntimeError("broken")
        ledger.check([upstream])
