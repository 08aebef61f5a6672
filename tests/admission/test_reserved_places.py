"""A refused caller gets a Retry-After, and a place is reserved for its return."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.obedient import CASES, play
from bench.sim import clock
from sidecar.admission import Admission, QueueFull, Ticket, UpstreamSettings
from sidecar.admission.retry_after import LATE_SECONDS, MAX_SECONDS, SHARE, Promises

#: Cases in which the capacity is known or soon learned. They cover the queue's bounds, deadlines, both orders within a
#: key, and sustained overload.
CASES_THAT_OBEY = (
    "burst of 200, 10/s, 20 may wait",
    "burst of 300, 10/s, deadline 10 s",
    "100 callers, 10 keys, 10/s, 20 may wait",
    "60 callers, 4 at a time, 10 may wait",
    "40 callers, pinned to 4, 5 may wait",
    "200 callers, 5/s, deadline 10 s",
    "200 callers, 10 keys, 5/s, deadline 10 s",
    "1.5 x 10/s arrive for 2 minutes",
    "3 x 10/s arrive for 1 minute, 50 may wait",
    "1.5 x 10/s arrive, half obey",
)


@pytest.mark.parametrize("name", CASES_THAT_OBEY)
def test_a_caller_that_returns_at_its_retry_after_is_admitted(name):
    (case,) = (case for case in CASES if case.name == name)
    outcome = play(case, 1)
    assert outcome.again.total() > 100
    assert outcome.admitted_share >= 0.95, outcome


def make_promises(promises, count, *, now=0.0, key=lambda number: "a", wait=0.0, per_second=5.0):
    return [promises.make(now, key(number), wait, per_second) for number in range(count)]


@given(
    count=st.integers(1, 100),
    per_second=st.floats(0.1, 50.0),
    keys=st.integers(1, 200),
    wait=st.floats(0.0, 30.0),
)
def test_callers_refused_at_one_moment_return_no_faster_than_they_can_be_served(count, per_second, keys, wait):
    seconds = make_promises(Promises(), count, key=lambda number: str(number % keys), wait=wait, per_second=per_second)
    assert min(seconds) >= max(wait, 1)
    window = max(1.0, 1.0 / (SHARE * per_second))
    for end in set(seconds):
        if end < MAX_SECONDS:
            in_window = sum(end - window < other <= end for other in seconds)
            assert in_window <= SHARE * per_second * window + 1


def test_a_camera_that_was_often_refused_does_not_delay_the_others():
    promises = Promises()
    assert max(make_promises(promises, 500)) > 60
    assert promises.make(0.0, "b", 0.0, 5.0) <= 2


def test_a_reserved_place_serves_its_key_once_and_expires():
    promises = Promises()
    (seconds,) = make_promises(promises, 1)
    assert not promises.redeem(seconds - 0.5, "a")
    assert promises.due(seconds - 0.5, 1.0) == 1
    assert not promises.redeem(seconds, "b")
    assert promises.redeem(seconds + LATE_SECONDS, "a")
    assert not promises.redeem(seconds + LATE_SECONDS, "a")
    make_promises(promises, 1, now=100.0)
    assert not promises.redeem(101.1 + LATE_SECONDS, "a")
    assert len(promises) == 0


@given(
    moves=st.lists(
        st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0.0, 3.0), st.floats(0.0, 20.0)), max_size=60
    )
)
def test_every_reserved_place_is_redeemed_by_its_key_or_expires(moves):
    promises, now, owed = Promises(), 0.0, Counter()
    for key, returns, pause, wait in moves:
        now += pause
        if returns and promises.redeem(now, key):
            owed[key] -= 1
            assert owed[key] >= 0
        elif not returns:
            promises.make(now, key, wait, 2.0)
            owed[key] += 1
        assert 0 <= promises.due(now, 5.0) <= len(promises) <= owed.total()
    promises.due(now + MAX_SECONDS + 10.0, 0.0)
    assert len(promises) == 0


def test_a_new_caller_leaves_the_last_places_to_callers_that_return_soon():
    async def main():
        loop = asyncio.get_running_loop()
        admission = Admission([UpstreamSettings(concurrency=1)], queue_size=4)

        def enter(key):
            return admission.enter(Ticket(now=loop.time(), deadline=loop.time() + 1e6, key=key, model="m"))

        under_way = enter("a")
        waiting = [enter("a") for _ in range(4)]
        with pytest.raises(QueueFull) as refusal:
            enter("b")
        under_way.release(loop.time())
        await asyncio.sleep(refusal.value.retry_after - 0.5)
        assert admission.waiting() == 3
        with pytest.raises(QueueFull, match="about to come back"):
            enter("c")
        await asyncio.sleep(0.5)
        waiting.append(enter("b"))

        async def served(entry):
            (await entry).release(loop.time())

        await asyncio.gather(*map(served, waiting))
        assert (admission.in_flight(), admission.waiting()) == (0, 0)

    clock.run(main())
