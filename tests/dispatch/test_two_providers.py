"""Two simulated providers in one pool on virtual time: nothing is lost while one of them could answer."""

import asyncio
from collections import Counter
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import Pair, Place

from backends.base import ServerFailed
from bench.sim import clock

both_tiers = pytest.mark.parametrize("tiers", [(1, 1), (1, 2)], ids=["one tier", "two tiers"])


@both_tiers
@pytest.mark.parametrize("deadline", [2.0, 5.0, 60.0])
@pytest.mark.parametrize("cameras", [1, 8])
def test_no_frame_of_a_cold_start_is_refused_while_the_second_provider_is_idle(tiers, deadline, cameras):
    """Fault D16: the first provider allows one request a second, and eight frames come at once."""

    async def main():
        first = Place(
            "first", requests_per_second=1.0, burst_requests=1.0, latency_seconds=0.3, refusal_latency_seconds=0.05
        )
        pair = Pair(first, Place("second", latency_seconds=0.3), tiers)
        answers = await asyncio.gather(*(pair.ask(f"camera-{number % cameras}", deadline) for number in range(8)))
        assert not pair.lost
        assert max(answer.seconds for answer in answers) <= min(deadline, 8.0)
        assert pair.at_rest()

    clock.run(main())


@both_tiers
@pytest.mark.parametrize("status", [0, 500, 503], ids=["no connection", "500", "no capacity"])
def test_nothing_is_lost_and_nothing_takes_two_seconds_longer_while_one_provider_is_down(tiers, status):
    async def main():
        first = Place("first", latency_seconds=0.4, outages=((10.0, 40.0),), outage_status=status)
        pair = Pair(first, Place("second", latency_seconds=0.4), tiers)
        await pair.arrive(10.0, 60.0, deadline=20.0)
        assert not pair.lost
        assert max(one.seconds for one in pair.answers) <= 0.4 + 2.0
        down = first.calls(10.0, 40.0)
        assert down <= 0.25 * 30.0 + 16  # probes, and what was under way
        assert first.calls(45.0, 60.0) > 0  # used again within 5 s
        assert pair.at_rest()

    clock.run(main())


@both_tiers
def test_nothing_is_lost_while_one_provider_is_out_of_money(tiers):
    async def main():
        changes = ((10.0, {"billing_refused": True}), (60.0, {"billing_refused": False}))
        first = Place("first", latency_seconds=0.4, changes=changes)
        pair = Pair(first, Place("second", latency_seconds=0.4), tiers)
        await pair.arrive(10.0, 120.0, deadline=20.0)
        assert not pair.lost
        assert max(one.seconds for one in pair.answers) <= 0.4 + 2.0
        assert first.calls(10.0, 60.0) <= 8  # what was under way, and one probe each half minute
        assert first.calls(91.0, 120.0) > 10
        assert pair.at_rest()

    clock.run(main())


@both_tiers
def test_nothing_is_lost_while_one_provider_hangs(tiers):
    async def main():
        first = Place("first", latency_seconds=0.4)
        pair = Pair(first, Place("second", latency_seconds=0.4), tiers)
        pair.loop.call_later(20.0, first.going.clear)
        pair.loop.call_later(60.0, first.going.set)
        await pair.arrive(10.0, 80.0, deadline=30.0)
        assert not pair.lost
        # An attempt is given up after 5 s without a byte: an answer takes 0.4 s here.
        assert max(one.seconds for one in pair.answers) <= 0.4 + 5.0 + 2.0
        late = [one for one in pair.answers if one.at >= 26.0 and one.seconds >= 2.0]
        # Of the requests that come later, only the half-open probes wait for the hung provider.
        assert len(late) <= (60.0 - 26.0) / 5.0 + 1
        assert first.calls(66.0, 80.0) > 0
        assert pair.at_rest()

    clock.run(main())


@both_tiers
def test_a_provider_that_never_answered_is_given_up_in_half_of_the_time(tiers):
    async def main():
        first = Place("first", latency_seconds=0.4)
        first.going.clear()
        pair = Pair(first, Place("second", latency_seconds=0.4), tiers)
        await pair.arrive(5.0, 60.0, deadline=20.0)
        assert not pair.lost
        assert max(one.seconds for one in pair.answers) <= 10.0 + 1.0
        assert sum(one.seconds > 2.0 for one in pair.answers) <= 0.25 * len(pair.answers)

    clock.run(main())


def test_a_second_tier_gets_nothing_while_the_first_is_used_to_four_fifths():
    async def main():
        limited = {"requests_per_second": 10.0, "burst_requests": 10.0, "refusal_latency_seconds": 0.05}
        first, second = Place("first", latency_seconds=0.4, **limited), Place("second", latency_seconds=0.4)
        pair = Pair(first, second, (1, 2))
        await pair.arrive(8.0, 300.0)
        assert not pair.lost
        assert second.calls() < 0.01 * first.calls()

    clock.run(main())


def test_a_second_tier_gets_the_rest_when_the_first_is_asked_for_twice_its_limit():
    async def main():
        limited = {"requests_per_second": 5.0, "burst_requests": 5.0, "refusal_latency_seconds": 0.05}
        first, second = Place("first", latency_seconds=0.4, **limited), Place("second", latency_seconds=0.4)
        pair = Pair(first, second, (1, 2))
        await pair.arrive(10.0, 200.0, deadline=10.0)
        assert not pair.lost
        answered = Counter(one.backend for one in pair.answers if one.at >= 60.0)
        assert answered["first"] >= 0.9 * 5.0 * 140.0
        assert answered["second"] >= 0.8 * 5.0 * 140.0

    clock.run(main())


def test_two_hidden_quotas_in_one_tier_are_used_to_their_sum():
    async def main():
        places = [
            Place(
                name,
                requests_per_second=rate,
                burst_requests=rate,
                latency_seconds=0.5,
                refusal_latency_seconds=0.05,
            )
            for name, rate in (("first", 5.0), ("second", 3.0))
        ]
        pair = Pair(*places)
        await pair.saturate(40, 600.0)
        assert not pair.lost
        accepted = sum(one.provider.counts.accepted for one in places)
        calls = sum(one.provider.counts.calls for one in places)
        fates = [(at - pair.began, fate) for one in places for at, fate in one.provider.history]
        first_burst = sum(at < 2.0 and fate != "accepted" for at, fate in fates)
        assert accepted >= 0.97 * 8.0 * 600.0
        assert calls - accepted - first_burst <= 0.006 * calls
        answered = Counter()
        for one in pair.answers:
            answered[one.backend] += 1
        assert 1.4 <= answered["first"] / answered["second"] <= 1.9

    clock.run(main())


def test_a_single_request_that_fails_everywhere_is_told_once_and_opens_no_circuit():
    async def main():
        places = [Place(name, error_share=1.0, latency_seconds=0.1) for name in ("first", "second")]
        pair = Pair(*places)
        answer = await pair.ask(seconds=20.0)
        assert answer.error is not None
        assert answer.attempts <= 6
        assert answer.seconds < 20.0
        (status,) = pair.admission.status()
        assert all(not one.circuit.state for one in status.upstreams)
        assert pair.at_rest()

    clock.run(main())


@both_tiers
@pytest.mark.parametrize("deadline", [2.0, 4.0, 8.0])
def test_nothing_is_lost_while_one_provider_hangs_and_callers_allow_little_time(tiers, deadline):
    """An attempt is given up before 5 s have passed, if the other provider could not answer in time after them."""

    async def main():
        first = Place("first", latency_seconds=0.2)
        first.going.clear()
        pair = Pair(first, Place("second", latency_seconds=0.2), tiers)
        await pair.arrive(5.0, 60.0, deadline=deadline)
        assert not pair.lost
        assert sum(one.seconds > 1.0 for one in pair.answers) <= 0.25 * len(pair.answers)  # the circuit opens
        first.going.set()
        await pair.arrive(5.0, 20.0, deadline=deadline)
        assert not pair.lost
        assert {one.backend for one in pair.answers[-20:]} >= {"first"}
        assert pair.at_rest()

    clock.run(main())


def test_an_attempt_that_takes_no_longer_than_usual_is_not_given_up_for_another_provider():
    async def main():
        first = Place("first", latency_seconds=9.0)
        pair = Pair(first, Place("second", latency_seconds=0.2), (1, 2))
        await pair.arrive(1.0, 60.0, deadline=30.0)
        assert not pair.lost
        before = first.provider.counts.ended["cancelled"]
        await pair.arrive(1.0, 60.0, deadline=10.0)
        assert not pair.lost
        assert first.provider.counts.ended["cancelled"] == before

    clock.run(main())


@settings(max_examples=100, derandomize=True)
@given(
    rate=st.sampled_from((0.1, 0.5, 1.0, 3.0, 10.0)),
    burst=st.sampled_from((1.0, 3.0, 10.0)),
    concurrency=st.sampled_from((inf, 1.0, 4.0)),
    latency=st.sampled_from((0.05, 0.3, 2.0)),
    second_latency=st.sampled_from((0.05, 0.3, 1.0)),
    refusal=st.sampled_from((0.01, 0.3)),
    vague=st.booleans(),
    slack=st.sampled_from((1.5, 3.0, 10.0)),
    tiers=st.sampled_from(((1, 1), (1, 2))),
    gaps=st.lists(st.sampled_from((0.0, 0.0, 0.0, 0.05, 0.5, 3.0)), min_size=1, max_size=40),
)
def test_nothing_is_lost_whatever_the_first_provider_limits_while_the_second_has_room(
    *, rate, burst, concurrency, latency, second_latency, refusal, vague, slack, tiers, gaps
):
    async def main():
        first = Place(
            "first",
            requests_per_second=rate,
            burst_requests=burst,
            concurrency=concurrency,
            latency_seconds=latency,
            refusal_latency_seconds=refusal,
            vague_refusals=vague,
        )
        pair = Pair(first, Place("second", latency_seconds=second_latency), tiers)
        # A quarter of the time is kept for a provider that has not answered yet: that must be enough for its answer.
        deadline = max(latency + refusal, 4.5 * second_latency + refusal) + slack
        async with asyncio.TaskGroup() as tasks:
            for number, gap in enumerate(gaps):
                await asyncio.sleep(gap)
                tasks.create_task(pair.ask(f"camera-{number % 4}", deadline))
        assert not pair.lost
        assert pair.at_rest()

    clock.run(main())


class Picky(Place):
    """A provider that fails every request of the cameras whose names begin with "bad", and answers all others."""

    async def send(self, request, timings):
        if request.headers["X-Camera-Id"].startswith("bad"):
            await asyncio.sleep(0.05)
            timings.first_byte = asyncio.get_running_loop().time()
            raise ServerFailed("it broke")
        return await super().send(request, timings)


@both_tiers
def test_requests_that_fail_everywhere_do_not_take_every_probe_from_the_others(tiers):
    async def main():
        pair = Pair(*(Picky(name, latency_seconds=0.4) for name in ("first", "second")), tiers)
        await pair.arrive(10.0, 10.0)
        bad = [asyncio.create_task(pair.ask(f"bad-{number}")) for number in range(6)]
        await pair.arrive(10.0, 90.0)
        await asyncio.gather(*bad)
        honest = [one for one in pair.answers if not one.camera.startswith("bad")]
        assert all(one.error is None for one in honest)
        assert max(one.seconds for one in honest) < 25.0
        assert pair.at_rest()

    clock.run(main())


@pytest.mark.parametrize("count", [1, 2, 5])
@both_tiers
def test_the_outage_of_one_provider_gives_a_request_that_fails_at_the_other_no_endless_attempts(tiers, count):
    async def main():
        first = Picky("first", latency_seconds=0.2)
        pair = Pair(first, Picky("second", latency_seconds=0.2), tiers)
        await pair.arrive(10.0, 10.0)
        first.provider.change(replace(first.provider.profile, outages=((0.0, 60.0),)))
        await pair.arrive(10.0, 5.0)
        asked = [asyncio.create_task(pair.ask(f"bad-{number}")) for number in range(count)]
        await pair.arrive(10.0, 50.0)
        bad = await asyncio.gather(*asked)
        assert all(one.error is not None and one.attempts <= 12 for one in bad)
        assert all(one.camera.startswith("bad") for one in pair.lost)

    clock.run(main())


def test_callers_that_allow_less_time_than_an_answer_takes_open_no_circuit():
    async def main():
        pair = Pair(*(Place(name, latency_seconds=1.5) for name in ("first", "second")), (1, 2))
        impatient = [asyncio.create_task(pair.ask(f"impatient-{number}", seconds=0.2)) for number in range(8)]
        await asyncio.gather(*impatient)
        (status,) = pair.admission.status()
        assert all(not one.circuit.state for one in status.upstreams)
        answer = await pair.ask("patient", seconds=20.0)
        assert answer.error is None
        assert answer.backend == "first"

    clock.run(main())
