"""Generate the load of a run, and record the outcome of each request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from backends.base import BackendError, Throttled
from sidecar.admission import NotAdmitted
from sidecar.dispatch.dispatcher import DeadlineExceeded

from .systems import Ask, System

#: Returns a request's input in LLM tokens, drawn at random.
Tokens = Callable[[Random], int]


@dataclass(frozen=True, slots=True)
class Record:
    """One request: camera, loop time of its arrival, seconds until its end, outcome."""

    camera: str
    arrived: float
    seconds: float
    outcome: str


@dataclass(slots=True)
class Run:
    """All requests of one run."""

    system: System
    seconds: float
    deadline: float = 60.0
    tokens: Tokens = field(default=lambda random: 300)
    random: Random = field(default_factory=lambda: Random(0))
    records: list[Record] = field(default_factory=list)

    async def send_one(self, camera: str) -> str:
        """Send one request and record its outcome."""
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        ask = Ask(camera, arrived + self.deadline, self.tokens(self.random))
        try:
            await self.system.ask(ask)
            outcome = "ok"
        except Throttled:
            outcome = "refused"
        except (DeadlineExceeded, TimeoutError):
            outcome = "late"
        except NotAdmitted as refusal:
            outcome = type(refusal).__name__
        except BackendError:
            outcome = "failed"
        self.records.append(Record(camera, arrived, loop.time() - arrived, outcome))
        return outcome

    async def saturate(self, workers: int, cameras: int = 10, start: float = 0.0) -> None:
        """Keep `workers` requests waiting or in flight: each worker sends again as soon as it is answered."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.seconds
        await asyncio.sleep(start)

        async def worker(camera: str) -> None:
            while loop.time() < end:
                if await self.send_one(camera) != "ok":
                    await asyncio.sleep(0.1)

        await self._until(end, [worker(f"camera-{index % cameras}") for index in range(workers)])

    async def arrive(self, per_second: float, cameras: int = 10, hog: float = 1.0) -> None:
        """Send Poisson arrivals, independent of the answers. The first camera sends `hog` times as often as another."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.seconds
        weights = [hog, *[1.0] * (cameras - 1)]
        async with asyncio.TaskGroup() as tasks:
            while (wait := self.random.expovariate(per_second)) + loop.time() < end:
                await asyncio.sleep(wait)
                camera = self.random.choices(range(cameras), weights)[0]
                tasks.create_task(self.send_one(f"camera-{camera}"))

    async def volleys(self, every: float, frames: int, cameras: int = 10) -> None:
        """Send `frames` frames from every camera at the same instant, every `every` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.seconds
        async with asyncio.TaskGroup() as tasks:
            while loop.time() < end:
                for camera in range(cameras):
                    for _ in range(frames):
                        tasks.create_task(self.send_one(f"camera-{camera}"))
                await asyncio.sleep(every)

    async def _until(self, end: float, workers: Sequence[Coroutine[Any, Any, None]]) -> None:
        tasks = [asyncio.ensure_future(worker) for worker in workers]
        await asyncio.sleep(max(end - asyncio.get_running_loop().time(), 0.0))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- outcomes ----------------------------------------------------------------------------------------------------

    def outcomes(self) -> Counter[str]:
        return Counter(record.outcome for record in self.records)

    def share_ok(self, wanted: Callable[[Record], bool] = lambda record: True) -> float:
        chosen = [record for record in self.records if wanted(record)]
        return sum(record.outcome == "ok" for record in chosen) / max(len(chosen), 1)

    def quantile(self, share: float) -> float:
        """Return a quantile of the seconds from arrival to answer, over the answered requests."""
        seconds = sorted(record.seconds for record in self.records if record.outcome == "ok")
        return seconds[min(int(share * len(seconds)), len(seconds) - 1)] if seconds else float("inf")
