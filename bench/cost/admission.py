"""What admission alone costs a request, and how that grows with the keys there are and the requests that wait.

The real door, in virtual time: nothing waits, so the processor time is that of the code.
"""

from __future__ import annotations

import asyncio
import time

from bench.sim import clock
from sidecar.admission import Admission, Ticket

#: Keys, and requests that always wait. What the others are by the second one is how far from flat admission is.
SIZES = ((10, 0), (10, 10), (10_000, 10), (10, 2_000), (10_000, 2_000))
ROUNDS = 5
REQUESTS = 6_000


def microseconds(keys: int, waiting: int) -> float:
    """Processor time of one request: entering, waiting its turn, permit, verdict, return. The cameras take turns."""

    async def main() -> float:
        admission = Admission(concurrency=1, queue_size=2 * waiting + 1)
        loop = admission.loop
        warm, done = asyncio.Event(), asyncio.Event()  # each of those that wait has been served once; all have
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
                    permit.accepted(loop.time(), (300, 30))

        callers = [asyncio.ensure_future(caller()) for _ in range(waiting + 1)]
        await warm.wait()
        began = time.process_time()
        await done.wait()
        took = time.process_time() - began
        await asyncio.gather(*callers)
        return took / REQUESTS * 1e6

    return clock.run(main())


def growth(cost: dict[tuple[int, int], float]) -> float:
    """The dearest size of a round by the smallest queue there is."""
    return max(cost.values()) / cost[10, 10]


def one_round() -> dict[tuple[int, int], float]:
    """Microseconds a request by size: the sizes take turns, since the machine is not always equal."""
    return {size: microseconds(*size) for size in SIZES}
