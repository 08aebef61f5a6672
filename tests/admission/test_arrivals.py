"""Bodies that are being received: their sum is bounded, every byte is released, and only stalled bodies give way."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.sim import clock
from sidecar.admission import QueueFull
from sidecar.admission.arrivals import STALLED_SECONDS, Arrival, Arrivals

BOUND = 100


async def receive(arrivals, pieces):
    """Receive pieces, each a pair (seconds to wait before it, bytes); return how the body ended."""
    loop = asyncio.get_running_loop()
    last_byte_at = loop.time()
    try:
        async with asyncio.timeout(1e6) as reading:
            with Arrival(arrivals, reading) as arrival:
                for seconds, more in pieces:
                    await asyncio.sleep(seconds)
                    last_byte_at = loop.time()
                    arrival.add(more)
        return "whole"
    except QueueFull:
        return "refused"
    except TimeoutError:
        assert arrival.refusal is not None
        assert loop.time() - last_byte_at >= STALLED_SECONDS
        return "gave way"


PIECES = st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 60)), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(bodies=st.lists(PIECES, min_size=1, max_size=8), waiting=st.integers(0, 80))
def test_received_bytes_stay_within_the_bound_and_are_released(bodies, waiting):
    async def main():
        loop = asyncio.get_running_loop()
        arrivals = Arrivals(loop, BOUND, lambda: waiting)
        tasks = [loop.create_task(receive(arrivals, pieces)) for pieces in bodies]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.01)
            alone = waiting == 0 and len(arrivals._last_byte_at) == 1
            assert alone or arrivals.bytes_in_use() <= max(BOUND, waiting)
        ends = await asyncio.gather(*tasks)
        assert (arrivals.bytes, len(arrivals._last_byte_at)) == (0, 0)
        if waiting + sum(more for pieces in bodies for _, more in pieces) <= BOUND:
            assert set(ends) == {"whole"}

    clock.run(main())


def test_a_body_that_gets_data_in_the_loop_iteration_in_which_it_gave_way_is_refused_and_uncounted_once():
    async def main():
        loop = asyncio.get_running_loop()
        arrivals = Arrivals(loop, BOUND, lambda: 0)
        with pytest.raises(TimeoutError):  # the API turns it into `Arrival.refusal`
            async with asyncio.timeout(60.0) as reading:
                with Arrival(arrivals, reading) as slow:
                    slow.add(80)
                    await asyncio.sleep(STALLED_SECONDS)
                    assert arrivals.make_room(50)
                    with pytest.raises(QueueFull, match="gave way"):
                        slow.add(10)
                    assert arrivals.bytes == 0
                    await asyncio.sleep(1.0)
        assert arrivals.bytes == 0

    clock.run(main())
