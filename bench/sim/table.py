"""The scenarios of docs/limiting.md, each with its provider, its load and the targets for the sidecar."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from math import inf
from random import Random

from backends.simulated import Profile, Provider

from . import clock
from .load import Run, Tokens
from .systems import Cubic, Oracle, Semaphore, Sidecar, System

#: Seconds from the start that contain the first burst and its refusals.
FIRST_BURST_SECONDS = 2.0

Load = Callable[[Run], Awaitable[None]]


@dataclass(slots=True)
class Result:
    """The result of one system in one scenario."""

    runs: list[Run]
    provider: Provider
    system: System
    began: float

    @property
    def calls(self) -> int:
        return self.provider.counts.calls

    @property
    def refused(self) -> int:
        refused = self.provider.counts.refused
        return sum(count for kind, count in refused.items() if kind != "outage")

    @property
    def per_thousand(self) -> float:
        """Refusals per 1,000 calls. Those of the first burst count as one: before it, no client can know the limit."""
        first = self.refusals(0.0, FIRST_BURST_SECONDS)
        return 1000.0 * (self.refused - first + min(first, 1)) / max(self.calls, 1)

    def accepted_between(self, start: float = 0.0, end: float = inf) -> int:
        """Return the number of accepted calls that arrived at the provider between `start` and `end` (seconds)."""
        return sum(fate == "accepted" and start <= at - self.began < end for at, fate in self.provider.history)

    def refusals(self, start: float = 0.0, end: float = inf) -> int:
        return sum(
            fate not in {"accepted", "outage"} and start <= at - self.began < end for at, fate in self.provider.history
        )

    @property
    def ok(self) -> int:
        """Requests that were answered in time."""
        return sum(run.outcomes()["ok"] for run in self.runs)

    @property
    def asked(self) -> int:
        return sum(len(run.records) for run in self.runs)

    @property
    def visible(self) -> int:
        """Throttling refusals that reached a caller."""
        return sum(run.outcomes()["refused"] for run in self.runs)

    def p(self, share: float) -> float:
        return self.runs[0].quantile(share)


@dataclass(frozen=True, slots=True)
class Check:
    """One figure of a run with its target."""

    name: str
    value: float
    target: float
    at_least: bool

    @property
    def holds(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target


def at_least(name: str, value: float, target: float) -> Check:
    return Check(name, value, target, at_least=True)


def at_most(name: str, value: float, target: float) -> Check:
    return Check(name, value, target, at_least=False)


Judge = Callable[[Result, Result], list[Check]]


@dataclass(frozen=True, slots=True)
class Scenario:
    number: str
    name: str
    profile: Profile
    load: Load
    judge: Judge
    seconds: float = 300.0
    deadline: float = 60.0
    tokens: Tokens = field(default=lambda random: 300)
    tenants: int = 1
    late_tenants: tuple[float, ...] = ()


def play(scenario: Scenario, seed: int, make: Callable[[Provider], System]) -> Result:
    """Run a scenario once, on virtual time."""

    async def main() -> Result:
        provider = Provider(replace(scenario.profile, seed=seed), history=2_000_000)
        began = provider.begin()
        starts = [0.0] * (scenario.tenants - len(scenario.late_tenants)) + list(scenario.late_tenants)
        runs: list[Run] = []

        async def tenant(index: int, start: float) -> None:
            await asyncio.sleep(start)
            run = Run(make(provider), scenario.seconds - start, scenario.deadline, scenario.tokens)
            run.random = Random(f"{seed} {index}")
            runs.append(run)
            await scenario.load(run)

        await asyncio.gather(*(tenant(index, start) for index, start in enumerate(starts)))
        return Result(runs, provider, runs[0].system, began)

    return clock.run(main())


SYSTEMS: dict[str, Callable[[Provider], System]] = {
    "sidecar": Sidecar,
    "oracle": Oracle,
    "semaphore": Semaphore,
    "cubic": Cubic,
}


def share(result: Result, oracle: Result) -> float:
    return result.provider.counts.accepted / max(oracle.provider.counts.accepted, 1)


def usual(goodput: float, refusals: float) -> Judge:
    def judge(result: Result, oracle: Result) -> list[Check]:
        return [
            at_least("goodput", share(result, oracle), goodput),
            at_most("refusals/1000", result.per_thousand, refusals),
            at_most("visible", result.visible, 0),
        ]

    return judge


def saturated(workers: int = 40) -> Load:
    return lambda run: run.saturate(workers)


def poisson(per_second: float, **how: float) -> Load:
    return lambda run: run.arrive(per_second, **how)  # type: ignore[arg-type]


def _open_loop(result: Result, oracle: Result) -> list[Check]:
    return [
        at_most("p99 - oracle's", result.p(0.99) - oracle.p(0.99), 1.0),
        at_most("visible", result.visible, 0),
        at_least("answered", result.ok / result.asked, 0.999),
    ]


def _overload(result: Result, oracle: Result) -> list[Check]:
    return [
        at_least("goodput", result.ok / oracle.ok, 0.97),
        at_most("p50 / service", result.p(0.5) / 1.27, 2.0),
        at_most("visible", result.visible, 0),
    ]


#: The quota of scenario 4: (seconds from the start, requests/s).
_STEPS = ((0.0, 10.0), (200.0, 4.0), (400.0, 16.0))


def _steps(result: Result, oracle: Result) -> list[Check]:
    return [
        at_least("goodput", share(result, oracle), 0.92),
        at_most("s down", settled(result, 200.0, 400.0, lambda rate: rate >= 3.6, 4.0), 10.0),
        at_most("s up", settled(result, 400.0, 600.0, lambda rate: rate >= 14.4, 16.0), 60.0),
        at_most("visible", result.visible, 0),
    ]


def settled(result: Result, start: float, end: float, good: Callable[[float], bool], quota: float) -> float:
    """Return the seconds from `start` until the system has settled on a new quota (requests/s); inf if it never does.

    It has settled when, over the next 5 s, the rate of accepted calls is `good` and at most 10 % of the quota's calls
    are refused.
    """
    at = start
    while at + 5.0 <= end:
        rate = result.accepted_between(at, at + 5.0) / 5.0
        if good(rate) and result.refusals(at, at + 5.0) <= 0.1 * quota * 5.0:
            return at - start
        at += 0.5
    return inf


def _growth(result: Result, oracle: Result) -> list[Check]:
    return [
        at_most("p99 - oracle's", result.p(0.99) - oracle.p(0.99), 0.5),
        at_most("refusals/1000", result.per_thousand, 6.0),
        at_most("visible", result.visible, 0),
    ]


def _fair(result: Result, oracle: Result) -> list[Check]:
    shares = [
        sum(r.outcome == "ok" and r.arrived + r.seconds >= result.began + 300.0 for r in run.records)
        for run in result.runs
    ]
    jain = sum(shares) ** 2 / (len(shares) * sum(s * s for s in shares) or 1)
    return [
        at_least("Jain", jain, 0.95),
        at_most("refusals/1000", result.per_thousand, 12.0),
        at_least("goodput", share(result, oracle), 0.85),
        at_most("visible", result.visible, 0),
    ]


def _hog(result: Result, oracle: Result) -> list[Check]:
    others = result.runs[0].share_ok(lambda record: record.camera != "camera-0")
    return [at_least("others in time", others, 0.99), at_most("visible", result.visible, 0)]


def _windows(result: Result, oracle: Result) -> list[Check]:
    after = [at for at, fate in result.provider.history if fate != "accepted"][:1]
    start = after[0] - result.began + 60.0 if after else 0.0
    calls = result.accepted_between(start) + result.refusals(start)
    return [
        at_least("goodput", share(result, oracle), 0.98),
        at_most("refusals/1000 after the first minute", 1000 * result.refusals(start) / max(calls, 1), 6.0),
        at_most("visible", result.visible, 0),
    ]


def _outage(result: Result, oracle: Result) -> list[Check]:
    down = sum(62.0 <= at - result.began < 120.0 for at, fate in result.provider.history)
    failed = sum(run.outcomes()["failed"] for run in result.runs)
    return [
        at_most("calls/s in the outage", down / 58.0, 1.0),
        at_most("5xx visible", failed, 0),
        at_least("in time", result.ok / result.asked, 0.95),
    ]


def _without_words(result: Result, oracle: Result) -> list[Check]:
    failed = sum(run.outcomes()["failed"] for run in result.runs)
    return [*usual(0.9, 20)(result, oracle), at_most("5xx visible", failed, 0)]


def _open_without_words(result: Result, oracle: Result) -> list[Check]:
    failed = sum(run.outcomes()["failed"] for run in result.runs)
    return [
        at_least("answered", result.ok / result.asked, 0.999),
        at_most("refusals/1000", result.per_thousand, 20),
        at_most("5xx visible", failed, 0),
    ]


def _images(random: Random) -> int:
    """Return the LLM tokens of a thumbnail, a 720p frame or a 1080p frame, as `qwen-vl` counts them."""
    return random.choice((300, 1200, 2600))


_B10 = Profile(requests_per_second=10, burst_requests=10, latency_seconds=0.5, refusal_latency_seconds=0.05)


def _p(**values: object) -> Profile:
    return replace(_B10, **values)  # type: ignore[arg-type]


TABLE: list[Scenario] = [
    Scenario("1", "saturated at 10/s, burst 10", _B10, saturated(), usual(0.97, 6)),
    Scenario("2", "open loop at .9 of the quota", _B10, poisson(9.0), _open_loop),
    Scenario("3", "1.5 x offered, 30 s deadlines", _p(latency_seconds=1.27), poisson(15.0), _overload, deadline=30.0),
    Scenario(
        "4",
        "quota 10 -> 4 -> 16/s",
        _p(changes=tuple((at, {"requests_per_second": rate}) for at, rate in _STEPS[1:])),
        saturated(),
        _steps,
        seconds=600.0,
    ),
    Scenario(
        "5",
        "token-bound, mixed images",
        _p(requests_per_second=20, burst_requests=20, tokens_per_second=16_667, burst_tokens=16_667),
        saturated(),
        usual(0.97, 12),
        tokens=_images,
    ),
    Scenario(
        "6",
        "10 cameras x 8 frames every 10 s, growth-limited",
        _p(requests_per_second=50, burst_requests=50, growth_base_per_second=4, growth_factor=2),
        lambda run: run.volleys(10.0, 8),
        _growth,
    ),
    Scenario(
        "7",
        "20 s answers, quota 2/s",
        _p(requests_per_second=2, burst_requests=2, latency_seconds=20.0, latency_sigma=0.3),
        saturated(120),
        usual(0.97, 8),
        seconds=900.0,
        deadline=120.0,
    ),
    Scenario(
        "8",
        "4 sidecars, one account, two join late",
        _p(requests_per_second=20, burst_requests=20),
        saturated(),
        _fair,
        seconds=600.0,
        tenants=4,
        late_tenants=(60.0, 120.0),
    ),
    Scenario("9", "one camera sends 20x", _B10, poisson(20.0, hog=20.0), _hog, deadline=30.0),
    Scenario(
        "10a",
        "fixed one-minute windows",
        _p(requests_per_second=inf, window_requests=600, window_seconds=60),
        saturated(),
        _windows,
        seconds=900.0,
    ),
    Scenario(
        "10b",
        "sliding one-minute windows",
        _p(requests_per_second=inf, sliding_requests=600, sliding_seconds=60),
        saturated(),
        _windows,
        seconds=900.0,
    ),
    Scenario(
        "11",
        "60 s outage and 3 % 5xx",
        _p(requests_per_second=20, burst_requests=20, outages=((60.0, 120.0),), error_share=0.03),
        poisson(5.0),
        _outage,
        deadline=90.0,
    ),
    *(
        Scenario(f"12{letter}", f"Retry-After {text}", _p(retry_after=text), saturated(), usual(0.97, 6))
        for letter, text in zip("abcde", ("60", "0", "Wed, 21 Oct 2015 07:28:00 GMT", "1e9", "NaN"), strict=True)
    ),
    Scenario(
        "13",
        "refusals cost quota, others take 40 %",
        _p(refusals_cost_quota=True, others_share=0.4),
        saturated(),
        usual(0.8, 1000),
    ),
    Scenario(
        "14",
        "slow refusals (0.5-1.5 s)",
        _p(refusal_latency_seconds=1.0, refusal_latency_spread_seconds=0.5),
        saturated(),
        usual(0.95, 1000),
    ),
    Scenario(
        "15a", "quota 0.5/s", _p(requests_per_second=0.5, burst_requests=1), saturated(), usual(0.9, 15), seconds=1800
    ),
    Scenario(
        "15b",
        "quota 200/s",
        _p(requests_per_second=200, burst_requests=200),
        saturated(400),
        usual(0.9, 15),
        seconds=60,
    ),
    Scenario("15c", "burst credit 1", _p(burst_requests=1), saturated(), usual(0.9, 15)),
    Scenario("16a", "each refusal punished with 2 s", _p(punish_seconds=2.0), saturated(), usual(0.9, 10), seconds=600),
    Scenario(
        "16b",
        "windows of 7 s",
        _p(requests_per_second=inf, window_requests=70, window_seconds=7),
        saturated(),
        usual(0.95, 10),
        seconds=600,
    ),
    Scenario(
        "16c",
        "12 requests at a time, told vaguely",
        _p(requests_per_second=inf, concurrency=12, vague_refusals=True, latency_sigma=0.4),
        saturated(),
        usual(0.95, 10),
        seconds=600,
    ),
    Scenario(
        "16d",
        "12 requests at a time",
        _p(requests_per_second=inf, concurrency=12, latency_sigma=0.4),
        saturated(),
        usual(0.95, 10),
        seconds=600,
    ),
    Scenario("17a", "a 503 without words for a limit", _p(wordless_refusals=True), saturated(), _without_words),
    Scenario("17b", "the same, no burst", _p(wordless_refusals=True, burst_requests=1), saturated(), _without_words),
    Scenario("17c", "the same, .9 of the quota", _p(wordless_refusals=True), poisson(9.0), _open_without_words),
]
