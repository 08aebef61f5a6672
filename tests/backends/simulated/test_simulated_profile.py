"""Profiles: how they are read from options and from JSON, and which values are refused."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from math import inf

import orjson
import pytest

from backends.simulated import Profile, add_arguments, changed, profile_from


def from_options(*options: str) -> Profile:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return profile_from(parser.parse_args(options))


def test_no_options_are_the_default_profile():
    assert from_options() == Profile()


def test_options_of_every_kind_reach_the_profile():
    profile = from_options(
        *("--requests-per-second", "3", "--burst", "6", "--latency", "1.27", "--vague-refusals", "--seed", "7"),
        *("--outages", "5-6.5", "--outages", "60-120", "--retry-after", "honest"),
        *("--changes", "30:requests_per_second=9,burst_requests=1"),
    )
    assert profile == Profile(
        requests_per_second=3,
        burst_requests=6,
        latency_seconds=1.27,
        vague_refusals=True,
        seed=7,
        outages=((5, 6.5), (60, 120)),
        retry_after="honest",
        changes=((30.0, {"requests_per_second": "9", "burst_requests": "1"}),),
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"requests_per_second": 0}, "requests_per_second must be above 0"),
        ({"tokens_per_second": float("nan")}, "tokens_per_second must be above 0"),
        ({"error_share": 1.5}, "error_share must be within 0 and 1"),
        ({"others_share": 1}, "others_share must be below 1"),
        ({"latency_seconds": -1}, "latency_seconds must be at least 0"),
        ({"latency_seconds": inf}, "latency_seconds must be a number of seconds"),
        ({"window_seconds": 0}, "window_seconds must be above 0"),
        ({"outages": ((5, 5),)}, "outages must begin at 0 or later and end after that"),
        ({"outage_status": 200}, "outage_status must be 0 or within 400 and 599"),
        ({"changes": ((1.0, {"seed": 1}),)}, "changes cannot hold changes, outages or a seed"),
        ({"changes": ((1.0, {"latency_seconds": -1}),)}, "latency_seconds must be at least 0"),
    ],
)
def test_invalid_values_are_refused_with_the_name_of_the_field(fields, named):
    with pytest.raises(ValueError, match=named):
        Profile(**fields)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"speed": 1}, "no such field of a profile: speed"),
        ({"concurrency": "many"}, "concurrency cannot be 'many'"),
        ({"billing_refused": "perhaps"}, "billing_refused cannot be 'perhaps'"),
        ({"outages": ["soon"]}, "outages cannot be"),
        ({"changes": ["30:burst_requests"]}, "changes cannot be"),
    ],
)
def test_unreadable_values_are_refused_with_the_name_of_the_field(values, named):
    with pytest.raises(ValueError, match=named):
        changed(Profile(), values)


def test_a_profile_can_be_restored_from_json_and_null_means_the_default():
    profile = Profile(concurrency=4, outages=((1, 2),), changes=((3.0, {"burst_requests": 2}),), billing_refused=True)
    values = orjson.loads(orjson.dumps(asdict(profile)))
    assert values["requests_per_second"] is None  # JSON has no infinity
    assert changed(Profile(requests_per_second=5), values) == profile
