"""A simulated provider. It accepts or refuses a request, waits for its latency, and answers.

It uses the event loop's clock, but no sockets.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import ceil, inf
from random import Random
from typing import Literal

from backends.base import Request, Usage
from backends.simulated.limit_headers import limit_headers
from backends.simulated.profile import Profile
from backends.simulated.quota import Quota, Refusal
from backends.simulated.wire import FAULTS, Answer, Fault, Prompt, error_frame, make_answer, read_prompt

#: The models that `GET /v1/models` lists. The provider also serves every other name.
MODELS = ("qwen-vl-plus", "qwen-vl-max", "qwen3-vl-plus", "qwen3-vl-flash")

#: nginx's own page for a limit whose status was not configured.
_WORDLESS_PAGE = b"<html><head><title>503 Service Temporarily Unavailable</title></head></html>"

#: The outcome of a call that no limit refused.
Outcome = Literal["answered", "cancelled", "invalid", "moderation", "error", "reset"]


@dataclass(slots=True)
class Counts:
    """The numbers of calls since the provider was created."""

    calls: int = 0
    accepted: int = 0
    """Calls that the quota accepted, whatever their outcome."""
    refused: Counter[str] = field(default_factory=Counter)
    """Refused calls by limit. The keys also include `outage` and `billing`."""
    ended: Counter[str] = field(default_factory=Counter)
    """Ended calls by outcome: answered, cancelled, invalid, moderation, error, reset."""
    in_flight: int = 0
    max_in_flight: int = 0
    disconnects: int = 0
    """Callers that disconnected before the end of the answer. Only the HTTP server counts them."""

    def as_dict(self) -> dict[str, object]:
        """Return the counts as a dict that can be encoded as JSON."""
        return asdict(self) | {"refused": dict(self.refused), "ended": dict(self.ended)}


@dataclass(frozen=True, slots=True)
class Response:
    """The first part of an answer: a whole `body`, or the start of a stream. `Call.frame` returns its frames."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    usage: Usage | None = None
    """The usage that the answer reports; None if it reports none. A stream reports it at its end."""
    stream: bool = False
    breaks: bool = False
    """Whether the connection breaks before the end of the body."""
    limit_headers: Mapping[str, str] = field(default_factory=dict)
    """More headers, which report the account's limits."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One server-sent event of a stream. `error` is (status, body) if the event is an error."""

    data: bytes
    error: tuple[int, bytes] | None = None


class Provider:
    """One provider account: a quota for each model, and the counts of all calls.

    `history` is the maximum number of (time, decision) pairs that the provider stores. The decision is `accepted` or
    the limit that refused the call.
    """

    def __init__(self, profile: Profile, *, history: int = 0) -> None:
        self.counts = Counts()
        self.history: deque[tuple[float, str]] = deque(maxlen=history)
        self.random = Random(profile.seed)  # noqa: S311  the values must be reproducible
        self._profile = profile
        self._began: float | None = None
        self._quotas: dict[str, Quota] = {}
        self._frozen: dict[str, str] | None = None

    @property
    def profile(self) -> Profile:
        """The profile that was set last, without the changes that it schedules."""
        return self._profile

    def begin(self) -> float:
        """Start the profile's times now, unless they have started already. Return their start, on the loop's clock."""
        if self._began is None:
            self._began = asyncio.get_running_loop().time()
        return self._began

    def quota(self, model: str) -> Quota:
        """Return the quota of a model. An oracle in a benchmark reads it."""
        quota = self._quotas.get(model)
        if quota is None:
            random = Random(f"{self._profile.seed} {model}")  # noqa: S311
            quota = self._quotas[model] = Quota(self._profile, self.begin(), random)
        return quota

    def limit_headers(self, quota: Quota) -> dict[str, str]:
        """Return the headers that report the limits of a quota now, as its profile says."""
        profile, now = quota.profile, asyncio.get_running_loop().time()
        if not profile.limit_headers or now - self.begin() >= profile.headers_vanish_seconds:
            return {}
        if profile.limit_headers == "frozen" and self._frozen is not None:
            return self._frozen
        headers = self._frozen = limit_headers(profile.limit_headers, quota, now, self.counts.calls)
        return headers

    def change(self, profile: Profile) -> None:
        """Set another profile. Its times start now. The used part of each quota stays used."""
        self._began = asyncio.get_running_loop().time()
        self._profile = profile
        for quota in self._quotas.values():
            quota.advance(self._began)
            quota.change(profile, self._began)

    def call(self, request: Request) -> Call:
        """Start a call. The caller must then await `respond`, and must always call `leave` at the end."""
        self.begin()
        return Call(self, request)


class Call:
    """One request at the provider, from its arrival until `leave`."""

    def __init__(self, provider: Provider, request: Request) -> None:
        self._provider = provider
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._request_id = _request_id(provider.random)
        self._quota: Quota | None = None
        self._outcome: Outcome = "cancelled"
        self._frames: Iterator[tuple[int, Frame | None]] = iter(())
        self._first_token_at = 0.0
        self._profile = provider.profile
        self._limit_headers: Mapping[str, str] = {}
        provider.counts.calls += 1

    async def respond(self) -> Response:
        """Accept or refuse the request, wait for the latency of its answer or of a stream's first content, and answer.

        Raises `ConnectionRefusedError` in an outage without a status.
        """
        request, counts, random = self._request, self._provider.counts, self._provider.random
        prompt = read_prompt(request.body, request.dialect, request.model)
        if isinstance(prompt, Fault):
            counts.ended["invalid"] += 1
            return self._error(prompt)
        quota = self._provider.quota(prompt.model)
        quota.advance(self._loop.time())
        output_tokens = prompt.output_tokens(quota.profile.answer_tokens)
        refusal = await self._decide(quota, prompt.input_tokens + output_tokens)
        profile = self._profile = quota.profile
        # Real providers report the state when they count a request, not the state when they answer it.
        self._limit_headers = self._provider.limit_headers(quota) if profile.limit_headers else {}
        streams = request.stream or prompt.stream
        if refusal is not None:
            return await self._refuse(refusal, quota, prompt.input_tokens + output_tokens, streams)

        self._quota = quota
        counts.accepted += 1
        counts.in_flight += 1
        counts.max_in_flight = max(counts.max_in_flight, counts.in_flight)
        outcome = self._draw_outcome()
        latency = _lognormal(random, profile.latency_seconds, profile.latency_sigma)
        if outcome == "moderation" and not (streams and profile.in_stream_errors):
            await self._sleep_refusal()
            self._outcome = outcome
            return self._error(FAULTS["moderation"])
        answer = make_answer(
            prompt,
            request.dialect,
            request.body,
            output_tokens,
            request_id=self._request_id,
            seconds=self._loop.time() - self._provider.begin(),
            extra=self._echo(prompt),
        )
        if streams and not (outcome == "error" and not profile.in_stream_errors):
            if profile.first_token_seconds >= 0:
                latency = _lognormal(random, profile.first_token_seconds, profile.latency_sigma)
            await asyncio.sleep(latency)
            self._first_token_at = self._loop.time()
            self._frames = self._stream(answer, outcome)
            reports_usage = prompt.include_usage or request.dialect == "native"
            return self._begin_stream(answer.usage if reports_usage else None)
        await asyncio.sleep(latency)
        self._outcome = outcome
        if outcome == "error":
            return self._error(FAULTS["error"])
        headers = {"Content-Type": "application/json", "X-Request-Id": self._request_id}
        breaks, limits = outcome == "reset", self._limit_headers
        return Response(200, headers, answer.body(), answer.usage, breaks=breaks, limit_headers=limits)

    async def frame(self) -> Frame | None:
        """Wait until the stream's next frame is due and return it; None after the last frame.

        Raises `ConnectionResetError` at the point where the connection must break.
        """
        for tokens, frame in self._frames:
            due = self._first_token_at + tokens / self._profile.stream_tokens_per_second
            if (wait := due - self._loop.time()) > 0:
                await asyncio.sleep(wait)
            if frame is None:
                self._outcome = "reset"
                raise ConnectionResetError("the simulated provider reset the connection in the middle of its answer")
            return frame
        return None

    def leave(self) -> None:
        """Return the permit and count the outcome, which is `cancelled` if the answer is not complete.

        Only the first call has an effect.
        """
        if self._quota is not None:
            self._quota.leave()
            self._quota = None
            self._provider.counts.in_flight -= 1
            self._provider.counts.ended[self._outcome] += 1

    async def _decide(self, quota: Quota, tokens: float) -> Refusal | None:
        """Return the decision of the quota; None if it accepts the request.

        If the request has the header `X-DashScope-Wait-Timeout`, a refusal for growth is delayed: the request waits for
        up to that many seconds until the quota accepts it.
        """
        now = self._loop.time()
        refusal = quota.arrive(now, tokens)
        if refusal == "growth" and (wait := _wait_timeout(self._request.headers)) is not None:
            until = now + wait
            while refusal == "growth" and now < until:
                await asyncio.sleep(max(0.001, min(quota.next_accept_at(now, tokens), until) - now))
                now = self._loop.time()
                if quota.would_accept(now, tokens):
                    refusal = quota.arrive(now, tokens)
        self._provider.history.append((now, refusal or "accepted"))
        return refusal

    async def _refuse(self, refusal: Refusal, quota: Quota, tokens: float, streams: bool) -> Response:
        profile = self._profile
        self._provider.counts.refused[refusal] += 1
        if refusal == "outage" and profile.outage_status == 0:
            raise ConnectionRefusedError("the simulated provider is out of service")
        if refusal == "outage":
            base = FAULTS["capacity"] if profile.outage_status == 503 else FAULTS["error"]
            fault = replace(base, status=profile.outage_status)
        else:
            fault = FAULTS["unknown" if profile.vague_refusals and refusal != "billing" else refusal]
        headers = {}
        if profile.wordless_refusals and refusal not in ("outage", "billing"):
            await self._sleep_refusal()
            return Response(503, {"Content-Type": "text/html"}, _WORDLESS_PAGE)
        if fault.status == 429 and profile.retry_after:
            headers["Retry-After"] = profile.retry_after
            if profile.retry_after == "honest":
                now = self._loop.time()
                at = quota.next_accept_at(now, tokens)
                headers = {"Retry-After": str(ceil(at - now))} if at < inf else {}
        await self._sleep_refusal()
        if streams and profile.in_stream_errors:
            self._frames = iter([(0, self._error_frame(fault))])
            return self._begin_stream(None)
        return self._error(fault, headers)

    def _draw_outcome(self) -> Outcome:
        profile = self._profile
        shares = profile.error_share + profile.reset_share + profile.moderation_share
        if shares > 0 and (chance := self._provider.random.random()) < shares:
            if chance < profile.error_share:
                return "error"
            return "reset" if chance < profile.error_share + profile.reset_share else "moderation"
        return "answered"

    def _stream(self, answer: Answer, outcome: Outcome) -> Iterator[tuple[int, Frame | None]]:
        """Yield pairs: the number of LLM tokens sent up to and including a frame, and the frame (None for a reset).

        A reset or an error happens half-way, after some content.
        """
        frames = list(answer.frames())
        if outcome == "answered":
            for index, (tokens, data) in enumerate(frames):
                if index == len(frames) - 1:
                    self._outcome = outcome
                yield tokens, Frame(data)
            return
        half = max(2, len(frames) // 2)
        yield from ((tokens, Frame(data)) for tokens, data in frames[:half])
        if outcome == "reset":
            yield frames[half - 1][0], None
            return
        self._outcome = outcome
        yield frames[half - 1][0], self._error_frame(FAULTS[outcome])

    def _begin_stream(self, usage: Usage | None) -> Response:
        kind = "text/event-stream;charset=UTF-8" if self._request.dialect == "native" else "text/event-stream"
        headers = {"Content-Type": kind, "X-Request-Id": self._request_id}
        return Response(200, headers, usage=usage, stream=True, limit_headers=self._limit_headers)

    def _error(self, fault: Fault, headers: Mapping[str, str] | None = None) -> Response:
        common = {"Content-Type": "application/json", "X-Request-Id": self._request_id}
        body = fault.body(self._request.dialect, self._request_id)
        return Response(fault.status, common | dict(headers or {}), body, limit_headers=self._limit_headers)

    def _error_frame(self, fault: Fault) -> Frame:
        dialect = self._request.dialect
        return Frame(
            error_frame(fault, dialect, self._request_id), (fault.status, fault.body(dialect, self._request_id))
        )

    async def _sleep_refusal(self) -> None:
        spread = self._profile.refusal_latency_spread_seconds
        offset = self._provider.random.uniform(-spread, spread) if spread else 0.0
        await asyncio.sleep(max(0.0, self._profile.refusal_latency_seconds + offset))

    def _echo(self, prompt: Prompt) -> dict[str, object]:
        """Return the data for an echo in the answer, so that a test can compare what arrived. The key is hidden."""
        headers = {name.lower(): value for name, value in self._request.headers.items()}
        if not prompt.echo and "x-simulate-echo" not in headers:
            return {}
        if "authorization" in headers:
            headers["authorization"] = "(hidden)"
        body = self._request.body
        return {"echo": {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body), "headers": headers}}


def _request_id(random: Random) -> str:
    digits = f"{random.getrandbits(128):032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _lognormal(random: Random, median: float, sigma: float) -> float:
    return median * random.lognormvariate(0.0, sigma) if sigma > 0 else median


def _wait_timeout(headers: Mapping[str, str]) -> float | None:
    for name, value in headers.items():
        if name.lower() == "x-dashscope-wait-timeout" and value.isdigit() and 3 <= int(value) <= 120:
            return float(value)
    return None
