"""The estimate of a request's LLM tokens is corrected by what the provider counts, but not by claims that are false."""

from __future__ import annotations

import pytest

from sidecar.admission.gates.token_cost import TokenCost


def learned() -> TokenCost:
    cost = TokenCost()
    for _ in range(40):
        cost.learn(800, 1000, 60)
    return cost


def test_the_correction_follows_the_counts():
    assert learned().correction == pytest.approx(1.25)
    assert learned().of(800) == pytest.approx(1060)


@pytest.mark.parametrize(("estimated", "counted"), [(1_000_000, 30), (5000, 0), (700, 34), (10, 90_000), (0, 50_000)])
def test_a_count_that_is_far_from_its_estimate_does_not_change_the_correction(estimated, counted):
    cost = learned()
    cost.learn(estimated, counted, 60)
    assert cost.correction == pytest.approx(1.25)


@pytest.mark.parametrize(("estimated", "counted"), [(9000, 500), (500, 9000), (2, 700)])
def test_a_count_within_the_factor_or_a_long_chat_template_is_learned(estimated, counted):
    cost = learned()
    cost.learn(estimated, counted, 60)
    assert cost.correction != pytest.approx(1.25, rel=0.001)
