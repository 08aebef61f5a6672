"""The systems between the callers and the provider: the sidecar, and the clients to which it is compared.

Each has a method `ask`, which sends one request until it is answered or raises. All use the same simulated backend.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

import orjson
from prometheus_client import CollectorRegistry

from backends.base import Request, Throttled, Timings
from backends.simulated import Provider, SimulatedBackend
from sidecar.admission import Admission, Ticket, Upstream, UpstreamSettings
from sidecar.admission.ticket import Cause
from sidecar.dispatch.dispatcher import Dispatcher
from sidecar.observe.metrics import Metrics

MODEL = "qwen-vl-plus"
#: Seconds from the admission of a request until the provider has accepted or refused it.
_ARRIVAL_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a camera. Its input costs `tokens` LLM tokens, its answer `answer_tokens` more."""

    camera: str
    deadline: float
    tokens: int = 300
    answer_tokens: int = 40

    def request(self) -> Request:
        counted = {"input_tokens": self.tokens, "output_tokens": self.answer_tokens}
        body = {"model": MODEL, "messages": [{"role": "user", "content": ""}], "simulate": counted}
        return Request("openai", "/chat/completions", orjson.dumps(body), MODEL, deadline=self.deadline)


class System(Protocol):
    """A system that answers requests."""

    async def ask(self, ask: Ask) -> None: ...


class Sidecar:
    """The real admission and dispatch of the sidecar."""

    def __init__(self, provider: Provider, **settings: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self.admission = self._admission(provider, **settings)
        self.metrics = Metrics(CollectorRegistry())
        self.waits: list[tuple[float, float]] = []
        """Predicted and real seconds in the queue, of each answered request that had to wait."""
        self._dispatcher = Dispatcher(self.admission, [SimulatedBackend(provider)], self.metrics)
        # The pauses before retries are random too. With a fixed seed, every run is the same.
        self._dispatcher._random.seed(provider.profile.seed)

    def _admission(self, provider: Provider, *, queue_size: int = 2000, **settings: Any) -> Admission:
        upstream = UpstreamSettings("simulated", **settings)
        return Admission([upstream], queue_size=queue_size, random=random.Random(provider.profile.seed))

    async def ask(self, ask: Ask) -> None:
        now = self._loop.time()
        ticket = Ticket(now=now, deadline=ask.deadline, key=ask.camera, model=MODEL, tokens=float(ask.tokens))
        pool = self.admission.pool(MODEL)
        all_closed = all(upstream.opening(now, ticket)[1] is not None for upstream in pool.upstreams)
        must_wait = all_closed or len(pool.waiting) > 0
        predicted = pool.predicted_wait(now, ticket)
        await self._dispatcher.run(ticket, ask.request())
        if must_wait:
            self.waits.append((predicted, ticket.stopwatch.seconds["queue"]))


class OracleUpstream(Upstream):
    """An upstream whose gate reads the provider's own state instead of learned limits."""

    def __init__(self, clock: Callable[[], float], provider: Provider) -> None:
        super().__init__(clock, name="simulated", paced=False)
        self._provider = provider
        self._sent_at = -inf

    def opening(self, now: float, ticket: Ticket) -> tuple[float, Cause | None]:
        if now < self._sent_at + _ARRIVAL_SECONDS:  # the previous request has not yet reached the quota
            return self._sent_at + _ARRIVAL_SECONDS, "turn"
        quota = self._provider.quota(MODEL)
        tokens = ticket.tokens
        if quota.would_accept(now, tokens):
            self._sent_at = now
            return now, None
        return min(quota.next_accept_at(now, tokens), now + 0.05), "request_rate"

    def seconds_for(self, now: float, ticket: Ticket, requests: float, tokens: float, *, guess: bool = True) -> float:
        mean = (tokens + ticket.tokens) / (requests + 1)
        return (requests + 1) / max(self._provider.quota(MODEL).true_rate(now, mean), 0.05)


class OracleAdmission(Admission):
    """Admission that uses an `OracleUpstream` for every model."""

    def __init__(self, provider: Provider) -> None:
        super().__init__([UpstreamSettings("simulated")])
        self._provider = provider

    def make_upstream(self, settings: UpstreamSettings, model: str) -> Upstream:
        return OracleUpstream(self.loop.time, self._provider)


class Oracle(Sidecar):
    """The best possible system: it knows the provider's state."""

    def _admission(self, provider: Provider, **settings: Any) -> Admission:
        return OracleAdmission(provider)

    async def ask(self, ask: Ask) -> None:
        ticket = Ticket(
            now=self._loop.time(),
            deadline=ask.deadline,
            key=ask.camera,
            model=MODEL,
            tokens=float(ask.tokens + ask.answer_tokens),
        )
        await self._dispatcher.run(ticket, ask.request())


class Direct:
    """Send attempts directly to the provider: the base class of the systems for comparison."""

    def __init__(self, provider: Provider) -> None:
        self._backend = SimulatedBackend(provider)
        self._loop = asyncio.get_running_loop()

    async def attempt(self, ask: Ask) -> None:
        async with asyncio.timeout_at(ask.deadline):
            await self._backend.send(ask.request(), Timings())


class Semaphore(Direct):
    """A semaphore around the openai client with two retries.

    The wait starts at 0.5 s, doubles up to 8 s, and is reduced at random by up to a quarter. It obeys a Retry-After up
    to 60 s. Source: openai-python, `_base_client.py`, `_calculate_retry_timeout`.
    """

    def __init__(self, provider: Provider, size: int = 16, retries: int = 2) -> None:
        super().__init__(provider)
        self._semaphore = asyncio.Semaphore(size)
        self._retries = retries
        self._random = random.Random(1)

    async def ask(self, ask: Ask) -> None:
        async with asyncio.timeout_at(ask.deadline), self._semaphore:
            for retry in range(self._retries + 1):
                try:
                    await self.attempt(ask)
                    break
                except Throttled as refusal:
                    if retry == self._retries:
                        raise
                    wait = min(0.5 * 2.0**retry, 8.0) * (1 - 0.25 * self._random.random())
                    if refusal.retry_after is not None and 0 < refusal.retry_after <= 60:
                        wait = refusal.retry_after
                    await asyncio.sleep(wait)


class Cubic(Direct):
    """The client-side rate limiter of the adaptive mode of AWS SDKs, with its three attempts.

    Source: botocore, `retries/adaptive.py`, `throttling.py` (CUBIC: beta 0.7, scale 0.4) and `bucket.py`. It limits
    nothing before the first refusal, smooths the measured rate over half-second buckets, and keeps the fill rate at or
    below 2 x the measured rate.
    """

    _BETA, _SCALE, _SMOOTH = 0.7, 0.4, 0.8

    def __init__(self, provider: Provider) -> None:
        super().__init__(provider)
        self._enabled = False
        self._rate = 0.5
        self._capacity, self._level, self._filled_at = 1.0, 0.0, self._loop.time()
        self._w_max, self._failed_at, self._k = 0.0, self._loop.time(), 0.0
        self._measured, self._bucket, self._count = 0.0, self._half(), 0
        self._random = random.Random(1)

    async def ask(self, ask: Ask) -> None:
        async with asyncio.timeout_at(ask.deadline):
            for attempt in range(3):
                await self._acquire()
                try:
                    await self.attempt(ask)
                except Throttled:
                    self._update(throttled=True)
                    if attempt == 2:
                        raise
                    await asyncio.sleep(min(self._random.random() * 2.0**attempt, 20.0))
                else:
                    self._update(throttled=False)
                    break

    async def _acquire(self) -> None:
        while self._enabled:
            now = self._loop.time()
            self._level = min(self._capacity, self._level + (now - self._filled_at) * self._rate)
            self._filled_at = now
            if self._level >= 1.0:
                self._level -= 1.0
                return
            await asyncio.sleep((1.0 - self._level) / self._rate + 1e-6)

    def _half(self) -> float:
        return int(self._loop.time() * 2) / 2

    def _update(self, *, throttled: bool) -> None:
        now, half = self._loop.time(), self._half()
        self._count += 1
        if half > self._bucket:
            rate = self._count / (half - self._bucket)
            self._measured = rate * self._SMOOTH + self._measured * (1 - self._SMOOTH)
            self._count, self._bucket = 0, half
        if throttled:
            used = min(self._measured, self._rate) if self._enabled else self._measured
            self._w_max, self._failed_at = used, now
            self._k = (self._w_max * (1 - self._BETA) / self._SCALE) ** (1 / 3)
            rate = used * self._BETA
            self._enabled = True
        else:
            self._k = (self._w_max * (1 - self._BETA) / self._SCALE) ** (1 / 3)
            rate = self._SCALE * (now - self._failed_at - self._k) ** 3 + self._w_max
        rate = min(rate, 2 * self._measured)
        self._rate = max(rate, 0.5)
        self._capacity = max(rate, 1.0)
        self._level = min(self._level, self._capacity)
