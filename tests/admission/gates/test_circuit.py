"""Circuit: when the probe may be sent, and how far a provider's Retry-After is believed."""

import copy
from math import inf, nan

import pytest
from gate_calls import TICKET, accepted, make_circuit, probe, refused
from hypothesis import given
from hypothesis import strategies as st

from sidecar.admission import Ticket, Verdict
from sidecar.admission.gates.circuit import (
    BILLING_STEP,
    FIRST_STEP,
    LITTLE_TRUST,
    MAX_QUOTA_STEP,
    MAX_STEP,
    MUCH_TRUST,
    OUTAGE_FAILURES,
    OUTAGE_SILENT,
    CircuitState,
)

NOT_BILLING = (CircuitState.OUTAGE, CircuitState.CAPACITY, CircuitState.BLACKOUT)


def close(circuit, now):
    """Send a probe that is accepted at once."""
    probe(circuit, now, accepted(now))


def trust(circuit):
    """Return the seconds by which a Retry-After may delay the next probe at present."""
    other = copy.deepcopy(circuit)
    other.open(1e9, CircuitState.CAPACITY, "busy", 1e9)
    return other.next_probe - 1e9


@pytest.mark.parametrize("state", NOT_BILLING)
def test_the_step_between_probes_grows_up_to_the_longest_step(state):
    circuit, now, steps = make_circuit(), 0.0, []
    for _ in range(12):
        circuit.open(now, state, "busy")
        steps.append(circuit.next_probe - now)
        now = circuit.next_probe
    assert steps[0] == FIRST_STEP
    assert steps == sorted(steps)
    assert steps[-1] == MAX_STEP
    assert circuit.since == 0.0


def test_one_probe_at_a_time():
    circuit = make_circuit()
    circuit.open(0.0, CircuitState.OUTAGE, "down")
    assert not circuit.may_probe(0.49)
    assert circuit.opens_at(0.49, 0.0) == 0.5
    assert circuit.may_probe(0.5)
    assert circuit.opens_at(0.5, 0.0) == 0.5
    circuit.reserve(0.5, TICKET, 0.0, held=False)
    assert circuit.probing
    assert not circuit.may_probe(0.49 + MAX_STEP)
    assert circuit.opens_at(0.5, 0.0) == 0.5 + MAX_STEP


def test_a_probe_that_hangs_does_not_prevent_the_next_one():
    circuit = make_circuit()
    circuit.open(0.0, CircuitState.OUTAGE, "down")
    first, second = (Ticket(now=0.0, deadline=60.0) for _ in range(2))
    circuit.reserve(0.5, first, 0.0, held=False)
    assert circuit.may_probe(0.5 + MAX_STEP)
    circuit.reserve(0.5 + MAX_STEP, second, 0.0, held=False)
    assert not circuit.may_probe(0.6 + MAX_STEP)
    circuit.settle(0.7 + MAX_STEP, first, Verdict("abandoned", 0.7 + MAX_STEP), blamed=None)
    assert circuit.probing
    circuit.settle(0.8 + MAX_STEP, second, accepted(0.8 + MAX_STEP), blamed=None)
    assert circuit.state is None


@pytest.mark.parametrize("outcome", ["abandoned", "failed", "timed_out", "account", "refused"])
def test_whatever_a_probe_ends_with_the_next_probe_may_follow(outcome):
    circuit = make_circuit()
    circuit.open(0.0, CircuitState.OUTAGE, "down")
    probe(circuit, 0.5, Verdict(outcome, 0.5))
    assert circuit.state is not None
    assert not circuit.probing
    assert circuit.opens_at(0.5, 0.0) < inf
    assert circuit.may_probe(circuit.next_probe)


def test_an_attempt_from_before_the_circuit_opened_does_not_end_the_probe():
    circuit = make_circuit()
    early = [circuit.reserve(0.0, TICKET, 0.0, held=False) for _ in range(3)]
    circuit.open(0.0, CircuitState.OUTAGE, "down")
    one = circuit.reserve(0.5, Ticket(now=0.5, deadline=60.0), 0.0, held=False)
    for attempt, outcome in zip(early, ("abandoned", "accepted", "timed_out"), strict=True):
        circuit.settle(0.6, attempt, Verdict(outcome, 0.6), blamed=None)
        assert circuit.probing
        assert circuit.state is CircuitState.OUTAGE
    circuit.settle(0.7, one, accepted(0.7), blamed=None)
    assert circuit.state is None


def test_a_probe_of_a_blackout_that_is_not_refused_in_time_counts_as_accepted():
    circuit = make_circuit()
    circuit.open(0.0, CircuitState.BLACKOUT, "all used")
    late = circuit.reserve(0.5, TICKET, 0.0, held=False)
    assert circuit.opens_at(0.5, 0.0) == 1.0
    circuit.advance(0.99)
    assert circuit.state is CircuitState.BLACKOUT
    circuit.advance(1.0)
    assert circuit.state is None
    circuit.settle(1.1, late, accepted(1.1), blamed=None)
    assert circuit.state is None


def failures(circuit, outcome, count, tickets):
    """Settle so many attempts with this outcome, of so many different tickets in rotation."""
    made = [Ticket(now=0.0, deadline=60.0) for _ in range(tickets)]
    for number in range(count):
        attempt = circuit.reserve(0.0, made[number % tickets], 0.0, held=False)
        circuit.settle(0.1, attempt, Verdict(outcome, 0.1, reason="down"), blamed=None)


def test_the_failures_of_one_request_alone_are_no_outage():
    circuit = make_circuit()
    failures(circuit, "failed", 20, tickets=1)
    assert circuit.state is None
    assert not circuit.failing


def test_six_failures_of_two_requests_are_an_outage():
    circuit = make_circuit()
    failures(circuit, "failed", OUTAGE_FAILURES - 1, tickets=2)
    assert circuit.state is None
    assert circuit.failing
    failures(circuit, "failed", 1, tickets=1)
    assert circuit.state is CircuitState.OUTAGE


def test_three_attempts_in_a_row_without_a_byte_are_an_outage_and_an_answer_between_them_prevents_it():
    circuit = make_circuit()
    failures(circuit, "timed_out", OUTAGE_SILENT - 1, tickets=1)
    failures(circuit, "accepted", 1, tickets=1)
    failures(circuit, "timed_out", OUTAGE_SILENT - 1, tickets=1)
    assert circuit.state is None
    failures(circuit, "timed_out", 1, tickets=1)
    assert circuit.state is CircuitState.OUTAGE


def test_a_refused_account_is_probed_every_half_minute():
    circuit = make_circuit()
    for now in (0.0, 40.0):
        circuit.open(now, CircuitState.BILLING, "no money")
        assert circuit.next_probe == now + BILLING_STEP


def account(at, retry_after=None, named="quota_period"):
    return Verdict("account", at, named, retry_after=retry_after, reason="no more today")


def test_a_used_up_quota_is_probed_after_1_2_4_and_at_most_30_minutes():
    circuit = make_circuit()
    now, waits = 0.0, []
    circuit.settle(now, TICKET, account(now), blamed=None)
    assert (circuit.state, circuit.refuses_account) == (CircuitState.QUOTA, True)
    for _ in range(7):
        waits.append(circuit.next_probe - now)
        now = circuit.next_probe
        probe(circuit, now, account(now))
    assert waits == [60.0, 120.0, 240.0, 480.0, 960.0, 1800.0, 1800.0]
    probe(circuit, now + 1800.0, accepted(now + 1800.0))
    assert circuit.state is None


def test_a_used_up_quota_is_probed_when_the_reported_end_has_come():
    circuit = make_circuit()
    circuit.settle(0.0, TICKET, account(0.0, retry_after=45.0), blamed=None)
    assert (circuit.next_probe, circuit.ends_at) == (45.0, 45.0)
    probe(circuit, 45.0, account(45.0, retry_after=7200.0))
    assert (circuit.next_probe, circuit.ends_at) == (45.0 + 120.0, 45.0 + 7200.0)


def test_an_end_that_comes_again_and_again_is_no_reason_for_many_probes():
    circuit, now = make_circuit(), 0.0
    circuit.settle(now, TICKET, account(now, retry_after=2.0), blamed=None)
    probes = 0
    while now < 3600.0:
        now = circuit.next_probe
        probe(circuit, now, account(now, retry_after=2.0))
        probes += 1
    assert probes <= 10


def quota_used_up(ends_in=7200.0):
    circuit = make_circuit()
    circuit.settle(0.0, TICKET, account(0.0, retry_after=ends_in), blamed=None)
    return circuit


def test_a_caller_that_leaves_as_the_probe_does_not_keep_a_quota_closed():
    circuit = quota_used_up()
    for now in (60.0, 65.0, 70.0):
        assert circuit.may_probe(now)
        probe(circuit, now, Verdict("abandoned", now))
    assert circuit.next_probe == 70.0 + MAX_STEP


@pytest.mark.parametrize("named", [None, "request_rate", "concurrency"])
def test_a_probe_that_an_ordinary_limit_refuses_shows_that_the_account_is_accepted_again(named):
    circuit = quota_used_up()
    probe(circuit, 60.0, refused(60.0, named))
    assert circuit.state is None


@pytest.mark.parametrize("outcome", ["failed", "timed_out"])
def test_a_probe_that_fails_says_nothing_about_a_used_up_quota(outcome):
    circuit = quota_used_up()
    probe(circuit, 60.0, Verdict(outcome, 60.0))
    assert (circuit.state, circuit.next_probe, circuit.ends_at) == (CircuitState.QUOTA, 60.0 + MAX_STEP, 7200.0)


def test_the_refusals_of_calls_that_were_in_flight_do_not_prolong_a_used_up_quota():
    circuit = make_circuit()
    for at in (0.0, 0.1, 0.2):
        circuit.settle(at, Ticket(now=0.0, deadline=60.0), account(at), blamed=None)
    assert circuit.next_probe == 60.0


def confirm(circuit, start, retry_after, accepted_after):
    """Open at `start` with a Retry-After in seconds, and accept a probe after `accepted_after` seconds."""
    circuit.open(start, CircuitState.CAPACITY, "busy", retry_after=retry_after)
    close(circuit, start + accepted_after)


@pytest.mark.parametrize("retry_after", [60.0, 1e9])
def test_an_unproved_retry_after_is_believed_for_a_few_seconds_only(retry_after):
    circuit = make_circuit()
    circuit.open(0.0, CircuitState.CAPACITY, "busy", retry_after=retry_after)
    assert circuit.next_probe == LITTLE_TRUST


def test_the_newest_retry_after_counts_and_not_the_first():
    circuit = make_circuit()
    early = circuit.reserve(0.0, TICKET, 0.0, held=False)
    circuit.open(0.0, CircuitState.CAPACITY, "busy", retry_after=4.0)
    circuit.open(4.0, CircuitState.CAPACITY, "busy", retry_after=2.0)
    assert circuit.next_probe == 6.0
    circuit.settle(5.0, early, refused(5.0, "capacity", 3.0), blamed=None)
    assert circuit.next_probe == 8.0


def test_a_shorter_retry_after_never_makes_the_next_probe_earlier():
    circuit = make_circuit()
    early = [circuit.reserve(0.0, TICKET, 0.0, held=False) for _ in range(3)]
    circuit.open(0.0, CircuitState.CAPACITY, "busy", retry_after=4.0)
    for attempt, shorter in zip(early, (1.0, 0.0, None), strict=True):
        circuit.settle(0.5, attempt, refused(0.5, "capacity", shorter), blamed=None)
        assert circuit.next_probe == 4.0


@pytest.mark.parametrize("retry_after", [None, 0.0, -5.0, nan, inf, -inf])
def test_an_invalid_retry_after_changes_nothing(retry_after):
    circuit = make_circuit()
    circuit.open(0.0, CircuitState.CAPACITY, "busy", retry_after=retry_after)
    assert circuit.next_probe == FIRST_STEP


def test_a_retry_after_is_believed_after_it_was_true_twice_and_until_it_is_false_once():
    circuit = make_circuit()
    confirm(circuit, 0.0, 4.0, 4.0)
    assert trust(circuit) == LITTLE_TRUST
    confirm(circuit, 100.0, 4.0, 4.5)
    assert trust(circuit) == MUCH_TRUST
    circuit.open(200.0, CircuitState.CAPACITY, "busy", retry_after=60.0)
    assert circuit.next_probe == 200.0 + MUCH_TRUST
    close(circuit, 205.0)  # the probe was accepted long before the end of the Retry-After
    assert trust(circuit) == LITTLE_TRUST


LONGEST_STEPS = {CircuitState.BILLING: BILLING_STEP, CircuitState.QUOTA: MAX_QUOTA_STEP}


@given(
    refusals=st.lists(
        st.tuples(
            st.sampled_from(CircuitState), st.floats(allow_nan=True) | st.none(), st.booleans(), st.floats(0.0, 50.0)
        ),
        max_size=40,
    ),
    jitter=st.floats(0.0, 1.0),
)
def test_the_next_probe_stays_within_bounds_whatever_the_provider_asks(refusals, jitter):
    circuit, now = make_circuit(jitter), 0.0
    for state, retry_after, is_accepted, pause in refusals:
        trusted = trust(circuit)
        circuit.open(now, state, "busy", retry_after)
        wait = circuit.next_probe - now
        longest_step = LONGEST_STEPS.get(state, MAX_STEP) * (1.0 + 0.2 * jitter)
        assert FIRST_STEP * 0.99 <= wait <= max(trusted, longest_step) + 1e-6
        now = circuit.next_probe + pause
        if is_accepted:
            close(circuit, now)
            assert circuit.state is None
    close(circuit, now)
    assert not circuit.reason


def test_a_blackout_begins_with_the_wait_that_ended_the_previous_blackout():
    circuit = make_circuit()
    circuit.open(0.0, CircuitState.BLACKOUT, "all used")
    circuit.open(0.5, CircuitState.BLACKOUT, "all used")
    close(circuit, 2.5)
    circuit.open(10.0, CircuitState.BLACKOUT, "all used")
    assert circuit.next_probe == pytest.approx(10.0 + 2.0)
