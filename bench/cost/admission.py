"""Measure the cost of admission alone per request, and how it grows with keys, waiting requests and upstreams.

Runs the real admission in virtual time. Nothing sleeps in real time, so the processor time is that of the code.
"""

from __future__ import annotations

import asyncio
import time

from bench.sim import clock
from sidecar.admission import Admission, Ticket, UpstreamSettings, Verdict

#: Number of keys, of requests that always wait, and of upstreams with one permit each.
Size = tuple[int, int, int]
SIZES: tuple[Size, ...] = (
    (10, 0, 1),
    (10, 10, 1),
    (10_000, 10, 1),
    (10, 2_000, 1),
    (10_000, 2_000, 1),
    (10, 10, 8),
    (10_000, 2_000, 8),
)
#: The size with which the other sizes are compared.
SMALL: Size = (10, 10, 1)
ROUNDS = 5
REQUESTS = 6_000


def microseconds(keys: int, waiting: int, upstreams: int) -> float:
    """Return the processor time of one request: enter, wait, permit, verdict, release. The cameras send in turn."""

    async def main() -> float:
        settings = [UpstreamSettings(name=f"upstream-{number}", concurrency=1) for number in range(upstreams)]
        admission = Admission(settings, queue_size=2 * waiting + upstreams)
        loop = admission.loop
        # warm: each request that waited at the start was served once; done: all requests were served.
        warm, done = asyncio.Event(), asyncio.Event()
        left = REQUESTS + waiting + upstreams
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

        callers = [asyncio.ensure_future(caller()) for _ in range(waiting + upstreams)]
        await warm.wait()
        began = time.process_time()
        await done.wait()
        took = time.process_time() - began
        await asyncio.gather(*callers)
        return took / REQUESTS * 1e6

    return clock.run(main())


def growth(cost: dict[Size, float], upstreams: int) -> float:
    """Return the cost of the most expensive size with this number of upstreams, divided by the cost of SMALL."""
    return max(cost[size] for size in SIZES if size[2] == upstreams) / cost[SMALL]


def one_round() -> dict[Size, float]:
    """Return microseconds per request by size. Each round measures all sizes, because the machine's speed varies."""
    return {size: microseconds(*size) for size in SIZES}


if __name__ == "__main__":
    for size, cost in one_round().items():
        print(*size, f"{cost:.1f} µs")
