"""The retry policy: every row of its table, the order of the rows, and the window of its budget."""

import random
from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.admission.gates.base import VerdictOutcome
from sidecar.dispatch.retry_policy import (
    MAX_FAILED_ATTEMPTS,
    RETRY_RESERVE,
    RETRY_SHARE,
    RETRY_STEP_SECONDS,
    RETRY_WINDOW_SECONDS,
    TABLE,
    Action,
    RetryBudget,
    RetryPolicy,
    Situation,
    jitter,
)


def situation(outcome, *, elsewhere=False, failing=False, has_answered=False, failed_attempts=1, certain=True):
    return Situation(outcome, elsewhere, failing, has_answered, failed_attempts, certain)


def spent_policy():
    """A policy whose budget is used up at second 0."""
    policy = RetryPolicy(0.0)
    while policy.budget.take(0.0):
        pass
    return policy


#: A situation for each row of the table, in its order, and what the row says.
ROWS = [
    (situation("refused", elsewhere=True, failing=True, failed_attempts=9), "again"),
    (situation("failed", elsewhere=True, failing=True, has_answered=True), "elsewhere"),
    (situation("failed", failing=True, has_answered=True, failed_attempts=9), "again_later"),
    (situation("failed", failed_attempts=MAX_FAILED_ATTEMPTS - 1), "again_later"),
    (situation("failed", has_answered=True, failed_attempts=MAX_FAILED_ATTEMPTS), "again_if_failing"),
    (situation("timed_out", elsewhere=True), "elsewhere"),
    (situation("account", elsewhere=True), "elsewhere"),
    (situation("account", certain=False), "again_first"),
]


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_each_row_of_the_table_decides_its_situation(number):
    one, action = ROWS[number]
    fits = [index for index, (outcome, holds, _) in enumerate(TABLE) if outcome == one.outcome and holds(one)]
    assert fits[0] == number
    assert TABLE[number][2] == action
    assert RetryPolicy(0.0).decide(0.0, one) == action


def test_the_table_has_no_row_that_is_not_tested():
    assert len(ROWS) == len(TABLE)


@pytest.mark.parametrize(
    "one",
    [
        situation("failed", failed_attempts=MAX_FAILED_ATTEMPTS),
        situation("account", failing=True, has_answered=True),
        situation("accepted", elsewhere=True, failing=True, has_answered=True),
        situation("abandoned", elsewhere=True, failing=True, has_answered=True),
    ],
    ids=lambda one: one.outcome,
)
def test_what_fits_no_row_is_told_to_the_caller(one):
    assert RetryPolicy(0.0).decide(0.0, one) == "fail"


def test_every_situation_has_an_action_that_makes_sense():
    for outcome, elsewhere, failing, has_answered, attempts in product(
        get_args(VerdictOutcome), (False, True), (False, True), (False, True), range(1, MAX_FAILED_ATTEMPTS + 2)
    ):
        one = Situation(outcome, elsewhere, failing, has_answered, attempts)
        for policy in (RetryPolicy(0.0), spent_policy()):
            action = policy.decide(0.0, one)
            assert action in get_args(Action)
            assert action != "elsewhere" or elsewhere or outcome == "timed_out"
            if outcome in ("accepted", "abandoned"):
                assert action == "fail"
            if outcome == "refused":
                assert action == "again"
            if outcome == "timed_out" or (elsewhere and outcome in ("failed", "account")):
                assert action == "elsewhere"


def test_without_budget_a_single_failure_is_looked_at_once_more_only_if_the_upstream_has_answered_before():
    for has_answered, action in ((True, "again_if_failing"), (False, "fail")):
        assert spent_policy().decide(0.0, situation("failed", has_answered=has_answered)) == action


def test_a_retry_in_an_outage_and_a_move_to_another_upstream_use_no_budget():
    policy = spent_policy()
    assert policy.decide(0.0, situation("failed", failing=True)) == "again_later"
    assert policy.decide(0.0, situation("failed", elsewhere=True)) == "elsewhere"
    full = RetryPolicy(0.0)
    for _ in range(10 * RETRY_RESERVE):
        full.decide(0.0, situation("failed", failing=True))
        full.decide(0.0, situation("failed", elsewhere=True))
        full.decide(0.0, situation("refused"))
    assert full.budget.take(0.0)


# -- the budget ------------------------------------------------------------------------------------------------------


def taken(budget, now):
    """Take retries until none is left; return how many there were."""
    count = 0
    while budget.take(now):
        count += 1
    return count


def test_a_new_budget_has_its_reserve():
    assert taken(RetryBudget(0.0), 0.0) == RETRY_RESERVE


def test_answers_pay_for_a_share_of_retries():
    budget = RetryBudget(0.0)
    for number in range(1000):
        budget.answered(number / 250)
    assert taken(budget, 4.0) == RETRY_RESERVE + RETRY_SHARE * 1000


def test_answers_and_retries_count_for_a_window_and_no_longer():
    half = RETRY_WINDOW_SECONDS / 2
    budget = RetryBudget(0.0)
    for _ in range(100):
        budget.answered(half - 0.1)
    assert taken(budget, half - 0.1) == RETRY_RESERVE + RETRY_SHARE * 100
    assert taken(budget, 2 * half - 0.1) == 0  # the retries are in the half before
    assert taken(budget, 2 * half + 0.1) == RETRY_RESERVE  # both are forgotten, and the reserve is there again


def test_old_answers_pay_for_nothing_however_many_they_were():
    budget = RetryBudget(0.0)
    for _ in range(100_000):
        budget.answered(1.0)
    assert taken(budget, 1.0 + RETRY_WINDOW_SECONDS + 5.0) == RETRY_RESERVE


@given(moves=st.lists(st.tuples(st.floats(0.0, 4.0) | st.just(0.0), st.sampled_from(("answer", "take"))), max_size=300))
def test_in_no_window_are_there_more_retries_than_its_answers_pay_for(moves):
    """Two halves of the window are the least, and three the most, whose answers can pay for the retries of one."""
    budget, now, answers, retries = RetryBudget(0.0), 0.0, [], []
    for pause, move in moves:
        now += pause
        if move == "answer":
            budget.answered(now)
            answers.append(now)
        elif budget.take(now):
            retries.append(now)
            begins = now - RETRY_WINDOW_SECONDS / 2  # the present half and the one before are at least this long
            recent = sum(at > begins for at in retries)
            paid = sum(at > now - RETRY_WINDOW_SECONDS for at in answers)
            assert recent <= RETRY_RESERVE + RETRY_SHARE * paid + 1e-9


@given(failed=st.integers(1, 6), left=st.floats(-5.0, 60.0), seed=st.integers(0, 1000))
def test_the_pause_before_a_retry_is_within_its_step_and_the_time_left(failed, left, seed):
    pause = jitter(random.Random(seed), failed, left)
    assert 0.0 <= pause <= RETRY_STEP_SECONDS * 2.0 ** (failed - 1)
    assert pause <= max(left, 0.0)
