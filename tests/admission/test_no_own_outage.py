"""No learned or remembered state may cause an outage of our own making, whatever the provider did before."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.simulated import Profile, Provider
from bench.sim import clock
from bench.sim.load import Run
from bench.sim.systems import MODEL, Sidecar

pytestmark = pytest.mark.long

#: While there is demand, an attempt is sent at least every 5 s, plus 20 % jitter, plus the time of a refusal.
MAX_GAP_SECONDS = 6.1
RECOVERY_SECONDS = 30.0
SECONDS = 60.0


def play(profile, *, remembered=None, seconds=SECONDS, workers=20, per_second=None, deadline=60.0):
    """Run a load; return the times of all calls and of the accepted ones, in seconds since the start."""

    async def main():
        provider = Provider(profile, history=1_000_000)
        began = provider.begin()
        sidecar = Sidecar(provider)
        if remembered is not None:
            sidecar.admission.recall("simulated", {MODEL: remembered}, 1.0)
        run = Run(sidecar, seconds, deadline)
        await (run.saturate(workers) if per_second is None else run.arrive(per_second))
        calls = [(at - began, fate) for at, fate in provider.history if at - began < seconds]
        return [at for at, _ in calls], [at for at, fate in calls if fate == "accepted"]

    return clock.run(main())


def longest_gap(calls, end):
    """Return the longest time without a call, in seconds."""
    times = [0.0, *calls, end]
    return max(later - earlier for earlier, later in pairwise(times))


def is_recovered(accepted, rate, since):
    """
    Whether half of the rate was reached within `RECOVERY_SECONDS` of the first accepted call after `since`.

    Below 4 calls a minute: whether the next two calls that the provider would accept were sent.
    """
    times = [at for at in accepted if at >= since]
    if rate < 4 / 60:
        return all(later - earlier <= 1.0 / rate + MAX_GAP_SECONDS for earlier, later in pairwise(times[:3]))
    start, seconds = times[0] + RECOVERY_SECONDS, max(10.0, 6.0 / rate)
    return sum(start <= at < start + seconds for at in times) >= 0.5 * rate * seconds - 1.0  # a count is whole


def check_remembered(rate, bucket_seconds, remembered):
    """Run a bucket that holds `bucket_seconds` of its rate, with this state file. Half of it must be used soon."""
    profile = Profile(requests_per_second=rate, burst_requests=max(bucket_seconds * rate, 1.0), latency_seconds=0.2)
    seconds = RECOVERY_SECONDS + MAX_GAP_SECONDS + max(10.0, 6.0 / rate)
    calls, accepted = play(profile, remembered=remembered, seconds=seconds, deadline=2.0 * seconds)
    assert longest_gap(calls, seconds) <= MAX_GAP_SECONDS
    assert is_recovered(accepted, rate, 0.0)


@settings(max_examples=40)
@given(
    bucket=st.tuples(st.floats(-2.0, 1.8).map(lambda power: 10.0**power), st.floats(0.0, 5.0)),
    factor=st.floats(-6.0, 3.0),
    burst=st.floats(1.0, 50.0),
    error=st.floats(0.01, 0.3),
    concurrency=st.none() | st.integers(1, 50),
)
def test_whatever_was_remembered_half_of_the_rate_is_reached_within_30_s(bucket, factor, burst, error, concurrency):
    """`bucket`: the provider's requests/s, and the seconds of this rate that its bucket holds."""
    rate, bucket_seconds = bucket
    remembered = {"requests": {"limit": rate * 10.0**factor, "burst": burst, "uncertainty": error}}
    if concurrency is not None:
        remembered["concurrency"] = {"limit": float(concurrency)}
    check_remembered(rate, bucket_seconds, remembered)


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("factor", [0.001, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("burst", [1.0, 50.0])
def test_a_wrong_burst_or_limit_is_unlearned_at_low_rates_too(rate, factor, burst):
    for error in (0.02, 0.3):
        remembered = {"requests": {"limit": rate * factor, "burst": burst, "uncertainty": error}}
        check_remembered(rate, 1.0, remembered)


@pytest.mark.parametrize("status", [429, 503, 500, 0])
@pytest.mark.parametrize("per_second", [None, 2.0], ids=["saturated", "two requests a second"])
def test_a_provider_that_refuses_or_fails_for_95_s_is_used_again_at_once(status, per_second):
    profile = Profile(
        requests_per_second=10.0,
        burst_requests=10.0,
        latency_seconds=0.3,
        outages=((0.0, 95.0),),
        outage_status=status,
        refusal_latency_seconds=0.05,
    )
    calls, accepted = play(profile, seconds=150.0, per_second=per_second, deadline=30.0)
    assert longest_gap(calls, 150.0) <= MAX_GAP_SECONDS
    assert accepted[0] <= 95.0 + MAX_GAP_SECONDS
    assert is_recovered(accepted, 10.0 if per_second is None else per_second, 95.0)


@settings(max_examples=15)
@given(rate=st.floats(1.0, 30.0), punish=st.floats(0.5, 5.0), growth=st.booleans(), offered=st.floats(0.5, 3.0))
def test_a_penalty_for_each_refusal_never_stops_the_load(rate, punish, growth, offered):
    limits = (
        {"growth_base_per_second": max(rate, 1.0), "growth_factor": 0.0001}
        if growth
        else {"requests_per_second": rate, "burst_requests": max(rate, 1.0)}
    )
    profile = Profile(latency_seconds=0.2, punish_seconds=punish, refusal_latency_seconds=0.05, **limits)
    calls, accepted = play(profile, seconds=150.0, per_second=offered * rate, deadline=20.0)
    assert longest_gap(calls, 150.0) <= MAX_GAP_SECONDS + 1.0 / (offered * rate) * 8  # arrivals are random
    # The growth rule counts whole calls. A load near the limit may be refused for the first time late.
    allowed = min(offered * rate, int(rate) if growth else rate)
    assert sum(at >= 90.0 for at in accepted) >= 0.5 * allowed * 60.0 - 1.0


@pytest.mark.parametrize("punish", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("rate", [1.5, 2.5, 4.0, 8.0, 15.0, 30.0])
@pytest.mark.parametrize("factor", [0.0001, 2.0], ids=["a flat rule", "a rule that grows"])
def test_half_of_the_rate_is_reached_within_30_s_after_growth_refusals(rate, punish, factor):
    base = rate if factor < 1.0 else max(rate / 3.0, 1.0)
    profile = Profile(
        growth_base_per_second=base,
        growth_factor=factor,
        requests_per_second=rate,
        burst_requests=rate,
        latency_seconds=0.2,
        punish_seconds=punish,
        refusal_latency_seconds=0.05,
    )
    calls, accepted = play(profile, seconds=90.0, per_second=3.0 * rate, deadline=20.0)
    assert longest_gap(calls, 90.0) <= MAX_GAP_SECONDS
    start = accepted[0] + RECOVERY_SECONDS
    allowed = float(int(rate)) if factor < 1.0 else rate
    assert sum(start <= at < start + 30.0 for at in accepted) >= 0.5 * allowed * 30.0 - 1.0  # a count is whole


async def test_over_sockets_a_blackout_and_a_tiny_remembered_limit_end_at_once(serving, provider, tmp_path):
    """The provider refuses everything for 6 s, and the state file remembers a thousandth of its rate."""
    url, simulated = await provider(
        requests_per_second=10.0, burst_requests=10.0, latency_seconds=0.1, outages=((0.0, 6.0),), outage_status=429
    )
    file = tmp_path / "limits.json"
    probe = await serving(dashscope_url=url, state_file=str(tmp_path / "other.json"))
    account = probe.sidecar.parts.backends[0].account()
    learned = {"requests": {"limit": 0.01, "burst": 1.0, "uncertainty": 0.02}}
    one = {"account": account, "model": "qwen-vl-plus", "learned_at": time.time(), **learned}
    file.write_bytes(orjson.dumps({"version": 1, "limits": [one]}))
    sidecar = await serving(dashscope_url=url, state_file=str(file))
    assert next(sidecar.sidecar.admission.status()).upstreams[0].requests.limit < 0.01
    end = asyncio.get_running_loop().time() + 20.0

    async def caller():
        while asyncio.get_running_loop().time() < end:
            async with sidecar.post() as response:
                await response.read()

    callers = [asyncio.create_task(caller()) for _ in range(20)]
    await asyncio.sleep(15.0)
    accepted = simulated.counts.accepted
    await asyncio.sleep(4.0)
    rate = (simulated.counts.accepted - accepted) / 4.0
    for task in callers:
        task.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert rate >= 5.0
