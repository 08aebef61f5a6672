"""The verdicts of `make bench-check` are correct: tests the arithmetic of `bench/cost` without measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cost import report
from bench.cost.alone import quantile
from bench.cost.figures import Figure, compared
from bench.cost.flame import rooms
from bench.cost.peers import PEERS, USUAL
from bench.cost.side_by_side import Measurement

ROOT = Path(__file__).resolve().parents[2]


def test_a_cost_that_rose_in_every_round_is_reported_as_worse():
    worse, others = compared([Figure("cost", (1.3, 1.25, 1.4))], {"cost": [1.0, 1.1, 0.9]})
    assert worse == ["cost: 1 → 1.3 (+30%)"]
    assert others == []


def test_a_rate_that_fell_in_every_round_is_reported_as_worse():
    worse, _ = compared([Figure("rate", (0.8, 0.7, 0.75), at_least=True)], {"rate": [1.0, 1.1, 0.9]})
    assert worse == ["rate: 1 → 0.75 (-25%)"]


@pytest.mark.parametrize(
    "values", [(1.1, 1.12, 1.14), (0.99, 1.3, 1.4), (0.5, 0.5, 0.5)], ids=["within", "one round as good", "better"]
)
def test_noise_and_gains_are_not_reported_as_worse(values: tuple[float, ...]):
    worse, others = compared([Figure("cost", values)], {"cost": [1.0]})
    assert worse == []
    assert len(others) == 1


def test_a_figure_that_was_not_measured_is_reported_as_such():
    worse, others = compared([Figure("new", (2.0,))], {"gone": [1.0]})
    assert worse == []
    assert others == ["new: 2, new", "gone: not measured this time"]


def test_a_target_holds_on_its_own_side_only():
    assert Figure("rate", (1.2,), target=1.0, at_least=True).holds
    assert not Figure("rate", (0.9,), target=1.0, at_least=True).holds
    assert Figure("cost", (0.9,), target=1.0).holds
    assert not Figure("cost", (1.2,), target=1.0).holds


def test_the_table_marks_a_missed_target_as_missed():
    table = report.targets_table([Figure("a", (2.0,), " ms", 1.0), Figure("b", (0.5,), "", 1.0), Figure("c", (1.0,))])
    assert table.splitlines()[2:] == ["| a | ≤ 1 ms | 2 ms | **missed** |", "| b | ≤ 1 | 0.5 | met |"]


def _rounds(**proxies: Measurement) -> dict:
    cases = [(kind, count) for kind in ("small", "frame", "stream") for count in (1, 16)]
    return {case: {name: [seen] * 3 for name, seen in proxies.items()} for case in cases}


def test_ratios_compare_the_time_that_a_proxy_adds_and_not_the_whole_wait_of_the_client():
    rounds = _rounds(
        direct=Measurement(9000, 0.0001, 0, 0.0002, 0.00001),
        sidecar=Measurement(1000, 0.0004, 0.0006, 0.0010, 0.00006),
        bare=Measurement(2000, 0.0003, 0.0003, 0.0006, 0.00003),
    )
    found = {figure.name: figure for figure in report.ratios(rounds)}
    assert found["frame, 1 connection: p50 added ÷ bare"].value == pytest.approx(3 / 2)
    assert found["frame, 16 connections: requests/s ÷ bare"].value == pytest.approx(1 / 2)
    assert found["frame, 16 connections: processor time ÷ bare"].value == pytest.approx(2)
    assert found["stream, 1 connection: first event added ÷ bare"].value == pytest.approx(2)
    assert not found["frame, 16 connections: requests/s ÷ bare"].holds
    first, later, _ = report.streams(rounds)
    assert (first.value, first.holds) == (pytest.approx(0.8), False)
    assert (later.value, later.holds) == (pytest.approx(0.05), True)


def test_the_picture_shows_every_proxy_except_litellm():
    seen = Measurement(1000, 0.001, 0.001, 0.001, 0.001)
    rounds = _rounds(direct=Measurement(9000, 0.0001, 0), sidecar=seen, bare=seen, litellm=seen)
    drawn = report.picture(rounds, {"sidecar": 55e6, "bare": 40e6, "litellm": 300e6})
    assert drawn.count("vlm-sidecar") == drawn.count("aiohttp pass-through") == 5
    assert "LiteLLM" not in drawn
    assert "LiteLLM" in report.peers_table(rounds, {})


def test_a_quantile_is_interpolated_linearly_within_its_bucket():
    buckets = {0.001: 50.0, 0.01: 90.0, 0.1: 100.0, float("inf"): 100.0}
    assert quantile(0.5, buckets) == pytest.approx(0.001)
    assert quantile(0.95, buckets) == pytest.approx(0.055)
    assert quantile(0.99, {0.001: 1.0, float("inf"): 100.0}) == 0.001


def test_a_sample_counts_for_the_room_of_its_innermost_function():
    raw = "run (runners.py);handle (sidecar/api/call.py) 3\nrun (runners.py);write (aiohttp/http_writer.py) 1"
    assert rooms(raw) == {
        "sidecar/api: read, understand, answer": 0.75,
        "aiohttp, both sides: parser, writer, streams": 0.25,
    }


def test_the_output_of_a_command_replaces_only_its_earlier_output():
    page = "Title\n<!-- make bench: begin -->\nold\n<!-- make bench: end -->\nText\n"
    assert report.between(page, "make bench", "new") == page.replace("old", "new")


def test_litellm_is_measured_only_if_it_is_named():
    assert "litellm" in PEERS
    assert "litellm" not in USUAL


def test_the_committed_ratios_and_the_page_come_from_the_same_run():
    committed = json.loads((ROOT / "bench" / "cost" / "ratios.json").read_text())
    assert f"at commit {committed['commit']};" in (ROOT / "docs" / "performance.md").read_text()
