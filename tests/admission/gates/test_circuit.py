"""Circuit: when the probe may be sent, and how far a provider's Retry-After is believed."""

import copy
from itertools import product
from math import inf, nan
from typing import get_args

import pytest
from gate_calls import TICKET, accepted, make_circuit, probe, refused
from hypothesis import given
from hypothesis import strategies as st

from sidecar.admission import Ticket, Verdict
from sidecar.admission.gates.circuit import (
    ACCOUNT_STEPS,
    FIRST_STEP,
    MAX_STEP,
    MOVES,
    OUTAGE_FAILURES,
    OUTAGE_SILENT,
    CircuitState,
    Event,
)
from sidecar.admission.gates.reported_waits import LITTLE_TRUST, MUCH_TRUST, QUOTA_SECONDS

NOT_ACCOUNT = [state for state in CircuitState if state not in ACCOUNT_STEPS]
#: A verdict for each event of the table.
VERDICTS = {
    "accepted": ("accepted", None), "refused": ("refused", "request_rate"), "capacity": ("refused", "capacity"),
    "failed": ("failed", None), "account": ("account", None), "quota": ("account", "quota_period"),
    "nothing": ("abandoned", None),
}  # fmt: skip
#: The state after the verdict of a probe, in the order of `VERDICTS`; "-": closed, "=": unchanged. Written
#: again by hand: the table of the code must say the same.
AFTER = {
    "outage":        "-   =   capacity   outage   account_doubt   quota_period   =",
    "capacity":      "-   =   capacity   outage   account_doubt   quota_period   =",
    "blackout":      "-   =   capacity   outage   account_doubt   quota_period   =",
    "account_doubt": "-   -   capacity   outage   billing         quota_period   =",
    "billing":       "-   -   capacity   =        billing         quota_period   =",
    "unauthorized":  "-   -   capacity   =        billing         quota_period   =",
    "quota_period":  "-   -   capacity   =        billing         quota_period   =",
}  # fmt: skip


def close(circuit, now):
    """Send a probe that is accepted at once."""
    probe(circuit, now, accepted(now))


def trust(circuit):
    """Return the seconds by which a Retry-After may delay the next probe at present."""
    other = copy.deepcopy(circuit)
    other.open(1e9, CircuitState.CAPACITY, "busy", 1e9)
    return other.next_probe - 1e9


@pytest.mark.parametrize(("state", "event"), list(product(CircuitState, VERDICTS)))
def test_the_verdict_of_a_probe_moves_the_circuit_as_the_table_says(state, event):
    circuit = make_circuit()
    circuit.open(0.0, state, "closed")
    at = circuit.next_probe
    outcome, named = VERDICTS[event]
    probe(circuit, at, Verdict(outcome, at, named, reason="told"))
    after = dict(zip(VERDICTS, AFTER[state].split(), strict=True))[event]
    assert circuit.state == {"-": None, "=": state}.get(after, after)
    assert circuit.state is None or at + FIRST_STEP <= circuit.next_probe < inf


def test_the_table_has_a_move_for_every_state_and_event():
    assert set(MOVES) == set(CircuitState)
    assert all(set(moves) == set(get_args(Event)) for moves in MOVES.values())


@pytest.mark.parametrize("state", NOT_ACCOUNT)
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


def probe_waits(circuit, number, named):
    """Refuse the account to so many probes; return the seconds before each of them."""
    waits = []
    for _ in range(number):
        waits.append(circuit.next_probe - circuit.last_refused)
        probe(circuit, circuit.next_probe, account(circuit.next_probe, named=named))
    return waits


def test_an_account_without_money_is_probed_after_5_10_20_and_30_seconds():
    circuit = make_circuit()
    circuit.settle(0.0, TICKET, account(0.0, named=None), blamed=None)
    assert (circuit.state, circuit.refuses_account) == (CircuitState.DOUBT, False)
    assert probe_waits(circuit, 6, None) == [FIRST_STEP, 5.0, 10.0, 20.0, 30.0, 30.0]
    assert (circuit.state, circuit.refuses_account) == (CircuitState.BILLING, True)


def test_a_refused_key_is_probed_by_the_next_request_and_then_every_5_seconds():
    circuit = make_circuit()
    circuit.settle(0.0, TICKET, account(0.0, named="unauthorized"), blamed=None)
    assert probe_waits(circuit, 5, "unauthorized") == [FIRST_STEP, 0.0, 5.0, 5.0, 5.0]
    assert circuit.state is CircuitState.UNAUTHORIZED


@pytest.mark.parametrize("named", [None, "unauthorized"])
def test_calls_that_were_sent_before_the_doubt_neither_confirm_it_nor_delay_the_probe(named):
    circuit = make_circuit()
    early = [Ticket(now=0.0, deadline=60.0) for _ in range(3)]
    for at, ticket in enumerate(early):
        circuit.settle(0.1 * at, ticket, account(0.1 * at, named=named), blamed=None)
    assert (circuit.state, circuit.next_probe) == (CircuitState.DOUBT, FIRST_STEP)


def test_a_call_that_is_accepted_in_between_ends_the_doubt():
    circuit = make_circuit()
    circuit.settle(0.0, TICKET, account(0.0, named="unauthorized"), blamed=None)
    circuit.settle(0.2, Ticket(now=0.0, deadline=60.0), accepted(0.2), blamed=None)
    assert circuit.state is None


def test_a_request_that_is_refused_a_second_time_between_answers_to_others_closes_nothing():
    circuit, ticket = make_circuit(), Ticket(now=0.0, deadline=60.0)
    ticket.doubted = True
    circuit.settle(1.0, ticket, account(1.0, named="unauthorized"), blamed=None)
    assert circuit.state is None


def account(at, retry_after=None, named="quota_period"):
    return Verdict("account", at, named, retry_after=retry_after, reason="no more today")


def confirm_quota(circuit, refusal):
    """Refuse a request, and then the probe of another key."""
    circuit.settle(refusal.at, TICKET, refusal, blamed=None)
    probe(circuit, refusal.at, refusal, Ticket(now=0.0, deadline=60.0, key="other"))


def test_the_first_refusal_for_a_used_up_quota_closes_the_circuit_for_its_key_and_another_key_is_the_probe():
    circuit = make_circuit()
    circuit.settle(1.0, TICKET, account(1.0, retry_after=7200.0), blamed=None)
    assert (circuit.state, circuit.next_probe) == (CircuitState.QUOTA, 61.0)
    assert circuit.refuses(1.0, TICKET.key)
    assert not circuit.refuses(1.0, "other")
    probe(circuit, 1.0, account(1.1, retry_after=7200.0), Ticket(now=0.0, deadline=60.0, key="other"))
    assert circuit.refuses(1.1, "a third one")
    assert circuit.next_probe == 61.0  # the confirmation is no later probe, so it does not double the wait


def test_an_answer_to_another_request_disproves_a_used_up_quota_at_once():
    circuit = make_circuit()
    circuit.settle(1.0, TICKET, account(1.0, retry_after=7200.0), blamed=None)
    probe(circuit, 1.0, accepted(1.3))
    assert circuit.state is None


def test_a_used_up_quota_is_probed_after_1_2_4_and_at_most_30_minutes():
    circuit = make_circuit()
    now, waits = 0.0, []
    confirm_quota(circuit, account(now))
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
    confirm_quota(circuit, account(0.0, retry_after=45.0))
    assert (circuit.next_probe, circuit.ends_at) == (45.0, 45.0)
    probe(circuit, 45.0, account(45.0, retry_after=7200.0))
    assert (circuit.next_probe, circuit.ends_at) == (45.0 + 120.0, 45.0 + 7200.0)


def test_an_end_that_comes_again_and_again_is_no_reason_for_many_probes():
    circuit, now = make_circuit(), 0.0
    confirm_quota(circuit, account(now, retry_after=2.0))
    probes = 0
    while now < 3600.0:
        now = circuit.next_probe
        probe(circuit, now, account(now, retry_after=2.0))
        probes += 1
    assert probes <= 10


def quota_used_up(ends_in=7200.0):
    circuit = make_circuit()
    confirm_quota(circuit, account(0.0, retry_after=ends_in))
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
    circuit = quota_used_up(None)
    for at in (0.1, 0.2):
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
        longest = max(MAX_STEP, ACCOUNT_STEPS.get(circuit.state, (0.0, 0.0))[1]) * (1.0 + 0.2 * jitter)
        is_sure = circuit.state not in (CircuitState.UNAUTHORIZED, CircuitState.QUOTA)
        shortest = FIRST_STEP * 0.99 if is_sure else 0.0
        assert shortest <= wait <= max(trusted, longest) + 1e-6
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


def test_a_lack_of_capacity_with_a_long_wait_is_probed_every_5_10_20_and_30_seconds():
    circuit = make_circuit()
    circuit.settle(0.0, TICKET, refused(0.0, "capacity", 120.0), blamed=None)
    times = []
    while circuit.next_probe < 200.0:
        times.append(now := circuit.next_probe)
        probe(circuit, now, refused(now, "capacity", 120.0))
    assert times == [5.0, 10.0, 20.0, 40.0, 70.0, 100.0, 130.0, 160.0, 190.0]
    assert circuit.state is CircuitState.CAPACITY  # the reported end moves, so it is no quota


def test_a_short_wait_for_capacity_is_believed_no_longer_than_it_is():
    circuit = make_circuit()
    circuit.open(0.0, CircuitState.CAPACITY, "busy", 8.0)
    waits = []
    for _ in range(5):
        now = circuit.next_probe
        probe(circuit, now, refused(now, "capacity", 8.0))
        waits.append(circuit.next_probe - now)
    assert waits == [5.0, 8.0, 8.0, 8.0, 8.0]


def refuse_probes(circuit, seconds, retry_after, named=None):
    """Refuse every probe for so many seconds. `retry_after` returns the wait for a loop time."""
    while circuit.next_probe < seconds and circuit.state is not CircuitState.QUOTA:
        now = circuit.next_probe
        probe(circuit, now, refused(now, named, retry_after(now)))


@pytest.mark.parametrize(("state", "named"), [(CircuitState.BLACKOUT, None), (CircuitState.CAPACITY, "capacity")])
@pytest.mark.parametrize("wobble", [0.0, 0.09])
def test_the_same_far_end_for_a_minute_is_a_used_up_quota(state, named, wobble):
    circuit, end = make_circuit(), 4000.0

    def retry_after(now):
        return (end - now) * (1.0 + wobble * (int(now) % 2))

    circuit.open(0.0, state, "busy", retry_after(0.0))
    refuse_probes(circuit, QUOTA_SECONDS - 1.0, retry_after, named)
    assert circuit.state is state
    refuse_probes(circuit, QUOTA_SECONDS + 36.0, retry_after, named)
    assert (circuit.state, circuit.refuses_account) == (CircuitState.QUOTA, True)
    assert circuit.ends_at == pytest.approx(end, rel=0.1)
    # The provider still calls it an ordinary limit.
    now = circuit.next_probe
    probe(circuit, now, refused(now, named, end - now))
    assert circuit.state is CircuitState.QUOTA
    assert circuit.next_probe == now + 120.0
    probe(circuit, circuit.next_probe, refused(circuit.next_probe, None, 3.0))  # a usual wait: the quota is back
    assert circuit.state is None


@pytest.mark.parametrize(
    "retry_after",
    [
        lambda now: 300.0,
        lambda now: 100.0 - now if now < 95.0 else 2.0,
        lambda now: None,
        lambda now: 3600.0 * (1 + int(now) % 3),
    ],
    ids=["a constant wait", "an end within two minutes", "no wait", "ends that differ"],
)
def test_any_other_reported_wait_is_no_quota(retry_after):
    circuit = make_circuit()
    circuit.open(0.0, CircuitState.BLACKOUT, "busy", retry_after(0.0))
    refuse_probes(circuit, 300.0, retry_after)
    assert circuit.state is CircuitState.BLACKOUT


def test_a_minute_begins_again_after_a_probe_that_was_not_refused():
    circuit = make_circuit()
    circuit.open(0.0, CircuitState.BLACKOUT, "busy", 86_400.0)
    refuse_probes(circuit, 50.0, lambda now: 86_400.0 - now)
    now = circuit.next_probe
    probe(circuit, now, Verdict("failed", now))
    circuit.open(now + 1.0, CircuitState.BLACKOUT, "busy", 86_400.0)
    refuse_probes(circuit, 100.0, lambda now: 86_400.0 - now)
    assert circuit.state is CircuitState.BLACKOUT


OUTCOMES = [("accepted", None), ("refused", None), ("refused", "capacity"), ("failed", None), ("timed_out", None),
            ("abandoned", None), ("account", None), ("account", "unauthorized")]  # fmt: skip


@given(
    verdicts=st.lists(
        st.tuples(
            st.sampled_from(OUTCOMES),
            st.none() | st.floats(0.1, 1e6),
            st.floats(0.0, 8.0),
            st.booleans(),
        ),
        max_size=60,
    ),
    jitter=st.floats(0.0, 1.0),
)
def test_while_there_is_demand_probes_are_never_further_apart_than_the_provider_may_ask(verdicts, jitter):
    """5 s; 30 s after a refusal that reported a wait, or while the account is refused; each plus a fifth.

    Each verdict: outcome and name, reported wait, seconds until it comes, and whether another attempt that was sent
    before ends with the same verdict just before.
    """
    circuit, now = make_circuit(jitter), 0.0
    circuit.open(now, CircuitState.OUTAGE, "down")
    sent_at, bound = now, MAX_STEP
    for (outcome, named), retry_after, seconds, is_late in verdicts:
        if circuit.state is None:
            circuit.open(now, CircuitState.BLACKOUT, "busy")
            sent_at, bound = now, MAX_STEP
        opens_at = circuit.opens_at(now, 0.0)
        assert opens_at - sent_at <= 1.2 * bound + 8.0  # 8 s: the previous verdict came so late
        sent_at = now = max(now, opens_at)
        circuit.advance(now)
        if circuit.state is None:
            continue
        verdict = Verdict(outcome, now + seconds, named, retry_after=retry_after if outcome == "refused" else None)
        ticket = Ticket(now=now, deadline=now + 60.0)
        circuit.reserve(now, ticket, 0.0, held=False)
        now += seconds
        bound = MAX_STEP if verdict.retry_after is None and outcome != "account" else MUCH_TRUST
        if is_late:
            circuit.settle(now, Ticket(now=0.0, deadline=60.0), verdict, blamed=None)
        circuit.settle(now, ticket, verdict, blamed=None)
        if circuit.state is CircuitState.QUOTA:
            return
