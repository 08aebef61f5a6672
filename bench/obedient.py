"""Measure whether a caller that obeys a Retry-After is admitted on its next try. Runs in virtual time.

python bench/obedient.py [WORD ...]: run the cases whose name contains one of the words, or all cases.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from backends.base import BackendError
from backends.simulated import Profile, Provider
from bench.sim import clock
from bench.sim.systems import Ask, Sidecar
from sidecar.admission import NotAdmitted
from sidecar.dispatch.dispatcher import DeadlineExceeded

#: Range of the seconds between the end of the Retry-After and the arrival of the caller's next request.
LAG_SECONDS = (0.001, 0.02)


@dataclass(frozen=True, slots=True)
class Case:
    """One load: `callers` that send continuously (with `once`: until they are served), or `arrivals` per second."""

    name: str
    profile: dict[str, Any]
    callers: int = 0
    once: bool = False
    arrivals: float = 0.0
    keys: int | None = None
    """Number of keys. None: each caller has its own key."""
    deadline: float = 60.0
    seconds: float = 300.0
    think_seconds: float = 0.001
    obedient: float = 1.0
    """The share of arrivals that return after a Retry-After. The others give up."""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """Outcomes of the first try of each request (`first`), and of the tries after a Retry-After (`again`).

    `longest` is the longest Retry-After in seconds.
    """

    first: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0

    @property
    def admitted_share(self) -> float:
        return self.again["ok"] / max(self.again.total(), 1)


def play(case: Case, seed: int) -> Outcome:
    """Run one case. The same seed gives the same outcome."""
    outcome = Outcome()
    random = Random(seed)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        provider = Provider(Profile(**case.profile, seed=seed))
        provider.begin()
        sidecar = Sidecar(provider, **case.settings)
        end = loop.time() + case.seconds

        async def ask(key: str, obedient: bool = True) -> None:
            tries = outcome.first
            while True:
                try:
                    await sidecar.ask(Ask(key, loop.time() + case.deadline))
                    tries["ok"] += 1
                    return
                except NotAdmitted as refusal:
                    tries[type(refusal).__name__] += 1
                    if not obedient or refusal.retry_after is None:
                        return
                    wait = max(ceil(refusal.retry_after), 1)
                except (BackendError, DeadlineExceeded) as failure:
                    tries[type(failure).__name__] += 1
                    return
                outcome.longest = max(outcome.longest, wait)
                tries = outcome.again
                await asyncio.sleep(wait + random.uniform(*LAG_SECONDS))

        async def caller(number: int) -> None:
            while loop.time() < end:
                await ask(f"camera-{number % (case.keys or case.callers)}")
                if case.once:
                    return
                await asyncio.sleep(random.expovariate(1 / case.think_seconds))

        if case.callers:
            tasks = [asyncio.ensure_future(caller(number)) for number in range(case.callers)]
            if not case.once:
                await asyncio.sleep(case.seconds)
                for task in tasks:
                    task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
        async with asyncio.TaskGroup() as group:
            while case.arrivals and loop.time() < end:
                await asyncio.sleep(random.expovariate(case.arrivals))
                key = f"camera-{random.randrange(case.keys or 1)}"
                group.create_task(ask(key, random.random() < case.obedient))

    clock.run(main())
    return outcome


def profile_of(per_second: float, **other: Any) -> dict[str, Any]:
    """Return the profile of a provider with this quota that answers in about half a second."""
    return {
        "requests_per_second": per_second,
        "burst_requests": per_second,
        "latency_seconds": 0.5,
        "latency_sigma": 0.3,
        "refusal_latency_seconds": 0.05,
        **other,
    }


CASES = (
    Case("burst of 200, 10/s, 20 may wait", profile_of(10.0), 200, once=True, settings={"queue_size": 20}),
    Case("burst of 300, 10/s, deadline 10 s", profile_of(10.0), 300, once=True, deadline=10.0),
    Case("burst of 1000, 50/s, 10 may wait", profile_of(50.0), 1000, once=True, keys=10, settings={"queue_size": 10}),
    Case("burst of 60, 2/s, 10 may wait", profile_of(2.0), 60, once=True, settings={"queue_size": 10}),
    Case("100 callers, 10/s, 20 may wait", profile_of(10.0), 100, settings={"queue_size": 20}),
    Case("100 callers, 10 keys, 10/s, 20 may wait", profile_of(10.0), 100, keys=10, settings={"queue_size": 20}),
    Case("100 callers, 1 key, 10/s, 20 may wait", profile_of(10.0), 100, keys=1, settings={"queue_size": 20}),
    Case("400 callers, 10 keys, 50/s, 50 may wait", profile_of(50.0), 400, keys=10, settings={"queue_size": 50}),
    Case("60 callers, 4 at a time, 10 may wait", profile_of(inf, concurrency=4), 60, settings={"queue_size": 10}),
    Case("40 callers, pinned to 4, 5 may wait", profile_of(inf), 40, settings={"queue_size": 5, "concurrency": 4}),
    Case("200 callers, 5/s, deadline 10 s", profile_of(5.0), 200, deadline=10.0),
    Case("200 callers, 10 keys, 5/s, deadline 10 s", profile_of(5.0), 200, keys=10, deadline=10.0),
    Case("200 callers, 1 key, 5/s, deadline 10 s", profile_of(5.0), 200, keys=1, deadline=10.0),
    Case("40 callers, 10 keys, 0.5/s", profile_of(0.5), 40, keys=10, seconds=1800.0),
    Case("1.5 x 10/s arrive for 2 minutes", profile_of(10.0), arrivals=15.0, keys=10, deadline=20.0, seconds=120.0),
    Case("3 x 10/s arrive for 1 minute", profile_of(10.0), arrivals=30.0, keys=10, deadline=20.0, seconds=60.0),
    Case(
        "3 x 10/s arrive for 1 minute, 50 may wait",
        profile_of(10.0), arrivals=30.0, keys=10, seconds=60.0, settings={"queue_size": 50},
    ),
    Case("1.5 x 2/s arrive for 2 minutes", profile_of(2.0), arrivals=3.0, keys=10, deadline=20.0, seconds=120.0),
    Case("1.5 x 10/s arrive, half obey", profile_of(10.0), arrivals=15.0, keys=10, deadline=20.0, obedient=0.5),
)  # fmt: skip


def main() -> None:
    logging.disable(logging.WARNING)
    words = sys.argv[1:]
    print(f"{'':44} got in on the next try   of   first tries   longest wait told")
    for case in CASES:
        if not words or any(word in case.name for word in words):
            for seed in (1, 2, 3):
                outcome = play(case, seed)
                print(
                    f"{case.name if seed == 1 else '':44} {outcome.admitted_share:22.3f} {outcome.again.total():6}"
                    f" {outcome.first.total():12} {outcome.longest:15.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
