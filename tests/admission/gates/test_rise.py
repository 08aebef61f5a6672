"""The slow rise of the load: 2 attempts without an answer, then 4, 8, …, and what begins it again or ends it."""

import pytest
from gate_calls import accepted, make_rise, refused

from sidecar.admission import Ticket, Verdict
from sidecar.admission.gates.rise import ANSWERED_SECONDS, COLD_STEP_SECONDS, MAX_RISING


def send(rise, now):
    ticket = Ticket(now=now, deadline=now + 60.0)
    return rise.reserve(now, ticket, 0.0, held=False)


def settle(rise, now, ticket, verdict):
    if not rise.dormant:
        rise.settle(now, ticket, verdict, blamed=None)


def round_of(rise, now):
    """Send until the gate closes for an answer; return the tickets and the time of the last one."""
    sent = []
    while not rise.dormant and (at := rise.opens_at(now, 0.0)) < now + ANSWERED_SECONDS / 2 and len(sent) < 1_000:
        now = max(now, at)
        sent.append(send(rise, now))
    return sent, now


def test_each_round_of_answers_doubles_the_attempts_without_an_answer_until_there_is_no_limit():
    rise, now, sizes = make_rise(), 1.0, []
    while not rise.dormant:
        sent, now = round_of(rise, now)
        sizes.append(len(sent))
        for ticket in sent:
            settle(rise, now, ticket, accepted(now))
    assert sizes == [2, 4, 8, 16, 32, MAX_RISING]


def test_an_attempt_without_a_refusal_counts_as_answered_after_2_s():
    rise = make_rise()
    first, second = send(rise, 1.0), send(rise, 1.0)
    assert rise.opens_at(1.0, 0.0) == 1.0 + ANSWERED_SECONDS
    rise.advance(1.0 + ANSWERED_SECONDS)
    assert len(round_of(rise, 1.0 + ANSWERED_SECONDS)[0]) == 4
    settle(rise, 4.0, first, accepted(4.0))  # a late verdict changes nothing
    settle(rise, 4.0, second, accepted(4.0))


@pytest.mark.parametrize("named", [None, "request_rate", "token_rate", "growth", "concurrency"])
def test_a_refusal_ends_the_rise_because_its_gate_sets_the_pace(named):
    rise = make_rise()
    settle(rise, 1.1, send(rise, 1.0), refused(1.1, named))
    assert rise.dormant


def test_a_refusal_for_capacity_begins_again_with_one_attempt():
    rise = make_rise()
    settle(rise, 1.1, send(rise, 1.0), refused(1.1, "capacity"))
    assert len(round_of(rise, 1.1)[0]) == 1


@pytest.mark.parametrize(("others_fail", "allowed"), [(False, 2), (True, 1)])
def test_a_failure_begins_again_only_if_other_requests_fail_too(others_fail, allowed):
    rise = make_rise(others_fail=others_fail)
    settle(rise, 1.1, send(rise, 1.0), Verdict("failed", 1.1))
    assert len(round_of(rise, 2.0)[0]) == allowed


def test_the_second_failure_of_a_request_does_not_begin_the_rise_again():
    rise = make_rise(others_fail=True)
    ticket = send(rise, 1.0)
    ticket.attempts = 2
    settle(rise, 1.1, ticket, Verdict("failed", 1.1))
    assert len(round_of(rise, 2.0)[0]) == 2


@pytest.mark.parametrize(("seconds", "counted"), [(0.1, False), (0.6, True)])
def test_an_abandoned_attempt_counts_as_answered_if_a_refusal_would_have_come(seconds, counted):
    rise = make_rise()
    for _ in range(2):
        settle(rise, 1.0 + seconds, send(rise, 1.0), Verdict("abandoned", 1.0 + seconds))
    assert len(round_of(rise, 5.0)[0]) == (4 if counted else 2)


def test_the_first_attempts_are_spaced_until_the_first_verdict():
    rise = make_rise(cold=True)
    assert rise.opens_at(3.0, 0.0) == 3.0
    first = send(rise, 3.0)
    assert rise.opens_at(3.0, 0.0) == 3.0 + COLD_STEP_SECONDS
    settle(rise, 3.2, first, Verdict("abandoned", 3.2))
    assert not rise.dormant
    settle(rise, 3.3, send(rise, 3.2), accepted(3.3))
    assert rise.dormant


@pytest.mark.parametrize(
    ("verdict", "allowed"),
    [(refused(1.1), None), (refused(1.1, "capacity"), 1), (Verdict("failed", 1.1), 1), (accepted(1.1), None)],
    ids=["refused", "capacity", "failed", "accepted"],
)
def test_after_a_cold_start_the_load_rises_slowly_only_if_a_failure_came_first(verdict, allowed):
    rise = make_rise(cold=True)
    settle(rise, 1.1, send(rise, 1.0), verdict)
    assert rise.dormant if allowed is None else len(round_of(rise, 1.1)[0]) == allowed
