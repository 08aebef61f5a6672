"""Limit headers, true or wrong, cost no refusals and hardly any answers; true ones save refusals after a cold start."""

from __future__ import annotations

import statistics

import pytest

from bench.headers import PROVIDERS, VARIANTS, outcome

#: A short version of `python -m bench.headers`.
PROFILE, SEEDS, SECONDS = PROVIDERS["10/s, burst 60"], range(1, 4), 100.0


@pytest.fixture(scope="module")
def without():
    return outcome(PROFILE, "", SEEDS, SECONDS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_header_makes_anything_worse(variant, without):
    one = outcome(PROFILE, variant, SEEDS, SECONDS)
    assert not one.compared(without, variant), (one, without)


def test_true_headers_save_refusals_after_a_cold_start(without):
    one = outcome(PROFILE, "true", SEEDS, SECONDS)
    assert statistics.mean(one.cold) < 0.7 * statistics.mean(without.cold), (one, without)


@pytest.mark.parametrize("provider", ["600 per 60 s", "600 sliding", "100 per 10 s", "100 sliding"])
@pytest.mark.parametrize("variant", ["true", "x5", "x0.5"])
def test_headers_that_tell_the_end_of_a_window_cost_no_answers(provider, variant, windowed):
    one = outcome(PROVIDERS[provider], variant, SEEDS, SECONDS)
    assert not one.compared(windowed[provider], variant), (one, windowed[provider])


@pytest.fixture(scope="module")
def windowed():
    names = ("600 per 60 s", "600 sliding", "100 per 10 s", "100 sliding")
    return {name: outcome(PROVIDERS[name], "", SEEDS, SECONDS) for name in names}
