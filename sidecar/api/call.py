"""One request of a caller: read its headers and body, write its answer, and record its end once."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, isfinite
from typing import TypeVar

from backends.base import MAX_ANSWER_BYTES, Dialect, OnPiece, Reply, Request
from backends.forwarded_headers import query_to_provider, to_provider
from backends.http1.accepting import SLOW_READER_SECONDS
from backends.http1.interface import Answer, HttpRequest
from sidecar.admission import Priority, Ticket
from sidecar.api.body import ParsedBody, is_quick, with_model
from sidecar.api.errors import Api, InvalidRequest, Problem, body_of, headers_of
from sidecar.api.key import fair_queue_key
from sidecar.api.parse_turns import ParseTurns
from sidecar.dispatch.dispatcher import Dispatcher
from sidecar.dispatch.model_list import ModelList
from sidecar.dispatch.stream_bounds import StreamSettings
from sidecar.observe.metrics import RequestOutcome
from sidecar.observe.trace import TracingStopwatch

#: A wait that is not longer than this many seconds shows no slow reader.
USUAL_DRAIN_SECONDS = 0.05
_T = TypeVar("_T")
_PRIORITIES = {"high": Priority.HIGH, "normal": Priority.NORMAL, "low": Priority.LOW}
#: The `traceparent` header of W3C Trace Context: version, trace id, parent id, flags. The last bit of the flags means
#: that the caller records the trace.
TRACE = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]([0-9a-f])")


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the sidecar sends with every question to trio-core's API, as trio-core's engine does.

    Source of the defaults: `EngineConfig` of trio-core 1.1.5, where `TRIO_…` variables change them too.
    """

    max_tokens: int = 512
    """LLM tokens of the answer if the caller gives no limit."""
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class CallSettings:
    """The settings that apply to callers. `deadline` is in seconds, `max_body_bytes` in bytes."""

    deadline: float = 60.0
    stream: StreamSettings = field(default_factory=StreamSettings)
    max_body_bytes: int = 14 * 1024 * 1024
    key_header: str = "X-Camera-Id"
    default_model: str = "qwen-vl-plus"
    passthrough: bool = False
    no_native_api: str = ""
    """Why paths of DashScope's own API cannot be passed on; empty if they can."""
    sampling: Sampling = field(default_factory=Sampling)
    """What trio-core's API sends where the request gives nothing."""
    traced: bool = False
    """Create spans for a request whose caller records its trace."""


class Call:
    """One request, from its headers to the last byte of its answer."""

    def __init__(
        self,
        http: HttpRequest,
        api: Api,
        dispatcher: Dispatcher,
        settings: CallSettings,
        models: ModelList,
        *,
        detector: Dispatcher | None,
        parse_turns: ParseTurns,
    ) -> None:
        self.http = http
        self.api: Api = api
        self.settings = settings
        self.detector = detector
        self._parse_turns = parse_turns
        self.outcome: RequestOutcome = "error"
        self.ticket: Ticket | None = None
        self.request_id = ""
        self.upstream_request_id = ""
        """The provider's own id of a request that ended with its error."""
        self.response: Answer | None = None
        self._body_bytes = 0  # of the body that the caller sent
        self._error_sent = False
        self._reply: Reply | None = None  # the stream that is written
        self._dispatcher = dispatcher
        self._models = models
        self._now = dispatcher.now
        self._arrived = self._now()

    @property
    def draining(self) -> bool:
        """Whether the sidecar is draining: it accepts no new requests."""
        return self._dispatcher.draining

    # -- request -------------------------------------------------------------------------------------------------------

    async def read(self) -> bytes:
        """Read and return the whole body.

        Raises `QueueFull`, or `InvalidRequest` (among others 413). If the announced size is above the limit, the 413 is
        raised before any of the body is read.
        """
        http, max_bytes = self.http, self.settings.max_body_bytes
        announced = http.content_length
        if announced is not None and announced > max_bytes:
            raise _too_large(max_bytes, announced)
        if http.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise InvalidRequest(
                "a compressed body is not taken: send it without Content-Encoding",
                field="Content-Encoding",
                status=415,
                code="unsupported_media_type",
            )
        if "Expect" in http.headers:
            await self._send_continue()
        if announced is not None and http.content.is_eof():
            body = http.content.read_nowait()
        else:
            try:
                async with asyncio.timeout_at(self._arrived + self.settings.deadline):
                    body = await self._receive(max_bytes)
            except TimeoutError:
                raise InvalidRequest(
                    f"the body did not come within {self.settings.deadline:g} s: send it sooner, or raise "
                    "SIDECAR_DEADLINE; or raise SIDECAR_QUEUE_BYTES, if the sidecar stopped reading it because these "
                    "were in use",
                    status=408,
                    code="request_timeout",
                ) from None
        self._body_bytes = len(body)
        return body

    async def parse(self, body: bytes, parse: Callable[[bytes], _T]) -> _T:
        """Return what `parse` finds in the body. A large body is parsed in a thread. Raises `InvalidRequest`."""
        return parse(body) if is_quick(body) else await self.parse_in_turn(body, parse)

    async def parse_in_turn(self, body: bytes, parse: Callable[[bytes], _T]) -> _T:
        """Return what `parse` finds in the body, in a thread. Cameras take turns, and without a key connections do."""
        source = self.http.headers.get(self.settings.key_header) or id(self.http.task)  # the task of the connection
        return await self._parse_turns.run(source, len(body), partial(parse, body))

    async def with_model(self, body: bytes, parsed: ParsedBody) -> tuple[bytes, str]:
        """Return the body and its model. A body that names none gets the default."""
        if parsed.model is not None:
            return body, parsed.model
        default = self.settings.default_model
        if not parsed.model_is_null:
            return with_model(body, default, instead_of_null=False)
        return await self.parse(body, partial(with_model, default=default, instead_of_null=True))

    async def _receive(self, max_bytes: int) -> bytes:
        """Read a body that has not arrived completely."""
        body = bytearray()  # not a list of pieces: a body that arrives byte by byte would be a list of millions
        async for piece in self.http.content.iter_any():
            body += piece
            if len(body) > max_bytes:
                raise _too_large(max_bytes, None)
        return bytes(body)

    async def _send_continue(self) -> None:
        expect = self.http.headers["Expect"]
        if expect.lower() != "100-continue":
            raise InvalidRequest(f"Expect: {expect!r} is not understood; only 100-continue is", status=417)
        self.http.send_continue()

    def identify(self) -> None:
        """Use the caller's request id, or create a request id. Raises `InvalidRequest`."""
        given = self.http.headers.get("X-Request-Id")
        fits = given is not None and 0 < len(given) <= 128 and given.isascii() and given.isprintable()
        self.request_id = given if given is not None and fits else random.randbytes(16).hex()  # noqa: S311  no secret
        if given is not None and not fits:
            raise InvalidRequest(
                f"X-Request-Id must be 1 to 128 printable ASCII characters, not these {len(given)}",
                field="X-Request-Id",
            )

    def make_ticket(self, *, model: str, tokens: float, size_bytes: int) -> Ticket:
        """Create the ticket from the headers. From now on, admission counts the bytes of the request and of its head.

        Raises `InvalidRequest` that names the header.
        """
        headers = self.http.headers
        now = self._now()
        key = fair_queue_key(headers, self.settings.key_header)
        named = headers.get("X-Request-Priority", "normal")
        priority = _PRIORITIES.get(named.lower())
        if priority is None:
            raise InvalidRequest(
                f"X-Request-Priority must be high, normal or low, not {named[:40]!r}", field="X-Request-Priority"
            )
        policy = headers.get("X-Queue-Policy")
        if policy is not None and policy.lower() != "latest":
            raise InvalidRequest(f"X-Queue-Policy must be latest, not {policy[:40]!r}", field="X-Queue-Policy")
        self.ticket = Ticket(
            now=now,
            deadline=self._arrived + self._timeout_seconds(headers.get("X-Request-Timeout")),
            key=key,
            priority=priority,
            model=model,
            tokens=tokens,
            size_bytes=size_bytes + max(self.http.hand_over() - self._body_bytes, 0),
            latest=policy is not None,
            repeated=_is_repeated(headers.get("X-Stainless-Retry-Count")),
        )
        given = headers.get("traceparent")
        if given is not None and (trace := TRACE.match(given)) is not None and int(trace[3], 16) & 1:
            self.ticket.trace_id = trace[1]
            if self.settings.traced:
                self.ticket.stopwatch = TracingStopwatch(
                    now, arrived=self._arrived, trace_id=int(trace[1], 16), parent_id=int(trace[2], 16)
                )
        return self.ticket

    def _timeout_seconds(self, given: str | None) -> float:
        if given is None:
            return self.settings.deadline
        try:
            seconds = float(given)
        except ValueError:
            seconds = -1.0
        if not isfinite(seconds) or seconds <= 0:
            raise InvalidRequest(
                f"X-Request-Timeout must be a number of seconds above 0, not {given[:40]!r}", field="X-Request-Timeout"
            )
        return min(seconds, self.settings.deadline)

    @property
    def query(self) -> str:
        """The query of the caller's URL that the provider gets, without credentials."""
        return query_to_provider(self.http.raw_path.partition("?")[2])

    @property
    def asks_for_native_stream(self) -> bool:
        """Whether a request to DashScope's own API asks for server-sent events."""
        return self.http.headers.get("X-DashScope-SSE", "").lower() == "enable"

    def forwarded_headers(self) -> dict[str, str]:
        """Return the caller's headers that are forwarded to the provider, and the request id."""
        passed = to_provider(self.http.headers)
        passed["X-Request-Id"] = self.request_id
        return passed

    # -- upstream ------------------------------------------------------------------------------------------------------

    def ask(self, request: Request, ticket: Ticket) -> Awaitable[Reply]:
        """Send the request and return the answer. By then, a streaming answer is already written to the caller.

        Raises `ConnectionError` if the caller has left, except for a request that only reads.
        """
        if self.http.caller_has_left and request.method not in ("GET", "HEAD"):
            raise ConnectionResetError("the caller has shut its sending side")
        stream = self.settings.stream
        if request.stream and "X-Request-Timeout" in self.http.headers:
            stream = replace(stream, ends_at_deadline=True)
        return self._dispatcher.run(ticket, request, self._stream, stream)

    async def forward(
        self,
        dialect: Dialect,
        path: str,
        body: bytes,
        *,
        model: str,
        tokens: float,
        stream: bool,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        max_seconds: float = inf,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> Answer:
        """Send the caller's body unchanged to the upstream, and the upstream's answer unchanged to the caller.

        `max_seconds` bounds the time of this path, `max_answer_bytes` its whole answers.
        """
        ticket = self.make_ticket(model=model, tokens=tokens, size_bytes=len(body))
        ticket.deadline = min(ticket.deadline, self._arrived + max_seconds)
        request = Request(
            dialect=dialect,
            path=path,
            body=body,
            model=model,
            stream=stream,
            headers={**self.forwarded_headers(), **(headers or {})},
            deadline=ticket.deadline,
            method=method,
            query=self.query,
            max_answer_bytes=max_answer_bytes,
        )
        del body  # the request holds the only copy
        reply = await self.ask(request, ticket)
        if reply.chunks is None:
            if method == "HEAD":  # the length of the body that a GET would bring is not known
                self.response = answer = self._answer(reply.status, reply.headers, length=None)
                answer.write_eof()
                await answer.drain()
                return answer
            return await self.respond(reply.status, reply.body, reply.headers)
        assert self.response is not None  # noqa: S101  `ask` wrote it
        self.response.write_eof()
        await self.response.drain()
        return self.response

    async def detect(self, request: Request, ticket: Ticket, detector: Dispatcher) -> Reply:
        """Send the request to the detector, which has its own queue, and return the answer."""
        self._dispatcher = detector
        return await detector.run(ticket, request)

    async def models(self) -> bytes:
        """Return the list of models; see `ModelList.get`."""
        seconds = self._timeout_seconds(self.http.headers.get("X-Request-Timeout"))
        return await self._models.get(seconds, max_seconds=self.settings.deadline)

    # -- answer --------------------------------------------------------------------------------------------------------

    async def respond(self, status: int, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Write a complete answer."""
        self.response = answer = self._answer(status, headers, length=len(body))
        if not answer.write_whole(body):
            await answer.drain()
        return answer

    async def fail(self, problem: Problem) -> Answer:
        """Write an error. If a stream has begun, write the error into the stream."""
        body = body_of(problem, self.api, self.request_id)
        if self.ticket is not None:
            self.ticket.stopwatch.switch("write", self._now())
        if self.response is None:
            return await self.respond(problem.status, body, headers_of(problem))
        if not self._error_sent:
            end_of_event = b"\n\n" if self._reply is not None and self._reply.ended_within_event else b""
            self.response.write(end_of_event + self._error_frame(problem, body))
        self.response.write_eof()  # do not wait for the write: the caller may have stopped reading
        return self.response

    def _error_frame(self, problem: Problem, body: bytes) -> bytes:
        if self.api == "native":
            # The official SDK reads the status only from the field `status`: it takes an error without it for a 400.
            return b"event:error\nstatus:%d\n:HTTP_STATUS/%d\ndata:%b\n\n" % (problem.status, problem.status, body)
        return b"data: %b\n\n" % body

    async def _stream(self, reply: Reply) -> None:
        """Write a streaming answer chunk by chunk. A slow reader slows the provider, so no data accumulates here.

        Meanwhile the stream holds a permit. So a caller that makes it wait for more than SLOW_READER_SECONDS in all
        is cut off: otherwise callers that do not read could take every permit from the others.
        """
        assert self.ticket is not None and reply.chunks is not None  # noqa: S101  `ask` has both
        switch, clock = self.ticket.stopwatch.switch, self._now
        self._reply = reply
        self.response = answer = self._answer(reply.status, reply.headers, length=None)
        deliver = reply.deliver or partial(_deliver, reply.chunks)
        seconds_left = SLOW_READER_SECONDS
        while not await deliver(answer.write):
            began = clock()
            switch("write", began)
            try:
                async with asyncio.timeout(seconds_left):
                    await answer.drain()
            except TimeoutError:
                self.http.cut_off()
                raise ConnectionResetError("the caller reads its answer too slowly") from None
            waited = clock() - began
            seconds_left -= waited if waited > USUAL_DRAIN_SECONDS else 0.0
            switch("body", clock())
        self._error_sent = reply.failure is not None  # the provider's own error is already in the stream

    def _answer(self, status: int, headers: Mapping[str, str], *, length: int | None) -> Answer:
        # Close the connection after this answer in two cases. In a drain the socket closes soon, and the caller's next
        # request would fail. If the body was not read completely, its rest would be read as the next request.
        if self.draining or not self.http.content.is_eof():
            self.http.keep_alive = False
        return self.http.answer(status, {**headers, **self._own_headers()}, length=length)

    def _own_headers(self) -> dict[str, str]:
        backend = (self.ticket and self.ticket.backend) or self._dispatcher.first
        headers = {"X-Request-Id": self.request_id, "X-Sidecar-Backend": backend}
        trace = self.http.headers.get("traceparent")
        if trace is not None and trace.isascii():  # a header with other characters cannot be written
            headers["Traceparent"] = trace
        ticket = self.ticket
        if ticket is not None:
            headers["X-Sidecar-Attempts"] = str(ticket.attempts)
            total = ticket.stopwatch.stop(self._now())
            seconds = ticket.stopwatch.seconds
            headers["Server-Timing"] = (
                f"queue;dur={seconds['queue'] * 1e3:.2f}, lock;dur={seconds['lock'] * 1e3:.2f}, "
                f"upstream;dur={ticket.stopwatch.upstream_seconds * 1e3:.2f}, total;dur={total * 1e3:.2f}"
            )
        return headers

    def finish(self) -> None:
        """Record the end of the request once, with its outcome."""
        if self.ticket is not None:
            self._dispatcher.finish(self.ticket, self.api, self.outcome)
        elif self.outcome == "invalid":
            self._dispatcher.invalid(self.api)


def _is_repeated(retry_count: str | None) -> bool:
    """Return whether a client repeats a request by itself. OpenAI's official clients count their repetitions."""
    return retry_count is not None and retry_count.isascii() and retry_count.isdigit() and int(retry_count[:9]) > 0


async def _deliver(chunks: AsyncIterator[bytes], on_piece: OnPiece) -> bool:
    """Pass the chunks to `on_piece`, for a reply without its own `deliver`.

    Return False as soon as `on_piece` returns False (it asks for a pause; call again to continue). Return True after
    the last chunk.
    """
    async for chunk in chunks:
        if not on_piece(chunk):
            return False
    return True


def _too_large(max_bytes: int, announced: int | None) -> InvalidRequest:
    size = "the body" if announced is None else f"the body of {announced} bytes"
    return InvalidRequest(
        f"{size} is over the limit of {max_bytes} bytes; send a smaller image or raise SIDECAR_MAX_BODY_BYTES",
        status=413,
        code="payload_too_large",
    )
