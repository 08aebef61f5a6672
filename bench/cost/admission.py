"""Measure the cost of admission alone per request, and how it grows with the numbers of keys and waiting requests.

Runs the real admission in virtual time. Nothing sleeps in real time, so the processor time is that of the code.
"""

from __future__ import annotations

import asyncio
import time

from bench.sim import clock
from sidecar.admission import Admission, Ticket, UpstreamSettings, Verdict

#: Pairs: number of keys, number of requests that always wait. The growth is the ratio of the largest cost to that of
#: the second pair; 1 means that the cost does not depend on the size.
SIZES = ((10, 0), (10, 10), (10_000, 10), (10, 2_000), (10_000, 2_000))
ROUNDS = 5
REQUESTS = 6_000


def microseconds(keys: int, waiting: int) -> float:
    """Return the processor time of one request: enter, wait, permit, verdict, release. The cameras send in turn."""

    async def main() -> float:
        admission = Admission([UpstreamSettings(concurrency=1)], queue_size=2 * waiting + 1)
        loop = admission.loop
        # warm: each request that waited at the start was served once; done: all requests were served.
        warm, done = asyncio.Event(), asyncio.Event()
        left = REQUESTS + waiting + 1
        number = 0

        async def caller() -> None:
            nonlocal left, number
            while left > 0:
                number += 1
                ticket = Ticket(now=loop.time(), deadline=loop.time() + 1e6, key=f"camera-{number % keys}", tokens=300)
                with await admission.permit(ticket) as permit:
                    left -= 1
                    if left in (REQUESTS, 0):
                        (warm if left else done).set()
                    await asyncio.sleep(0.01)
                    permit.report(Verdict("accepted", loop.time(), usage=(300, 30)))

        callers = [asyncio.ensure_future(caller()) for _ in range(waiting + 1)]
        await warm.wait()
        began = time.process_time()
        await done.wait()
        took = time.process_time() - began
        await asyncio.gather(*callers)
        return took / REQUESTS * 1e6

    return clock.run(main())


def growth(cost: dict[tuple[int, int], float]) -> float:
    """Return the cost of the most expensive size of a round, divided by the cost with 10 keys and 10 waiting."""
    return max(cost.values()) / cost[10, 10]


def one_round() -> dict[tuple[int, int], float]:
    """Return microseconds per request by size. Each round measures all sizes, because the machine's speed varies."""
    return {size: microseconds(*size) for size in SIZES}
