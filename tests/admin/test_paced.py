"""Pages of the admin listener take a bounded share of the event loop's time, however often they are asked for."""

from __future__ import annotations

import time

import pytest

from sidecar.admin import paced


@pytest.fixture
def clock(monkeypatch):
    """Seconds of the clock and of processor time, in a list that tests change."""
    now = [1000.0, 0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "thread_time", lambda: now[1])
    return now


def test_a_page_is_made_anew_until_its_share_of_the_time_is_used_up(clock):
    pages = paced.Paced()
    made = 0

    def make():
        nonlocal made
        made += 1
        clock[1] += 0.005
        return made

    for _ in range(20):  # a scraper and some people
        assert pages.get("metrics", make) == made
    for _ in range(60_000):  # a flood of a minute
        clock[0] += 0.001
        pages.get("metrics", make)
    assert clock[1] <= 0.25 + 0.05 * 60 + 0.01
    assert pages.get("metrics", make) == made, "the flood gets the newest one"
    clock[0] += 10.0
    before = made
    assert pages.get("metrics", make) == before + 1


def test_each_page_is_kept_for_itself(clock):
    pages = paced.Paced()

    def make():
        clock[1] += 1.0
        return "status"

    assert pages.get("status", make) == "status"
    assert pages.get("metrics", lambda: "metrics") == "metrics"
    assert pages.get("status", make) == "status"
