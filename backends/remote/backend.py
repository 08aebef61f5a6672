"""The backend for an upstream over HTTP: DashScope, or any server with OpenAI's API."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from yarl import URL

from backends.base import BackendError, OnPiece, Rejected, Reply, Request, ServerFailed, Timings, Unreachable
from backends.forwarded_headers import to_caller
from backends.http1.errors import HttpError, failure_of
from backends.http1.headers import canonical_name
from backends.http1.implementation import choose
from backends.http1.interface import Connector, Origin, Response
from backends.remote.answers import StreamWatch, error_in_events, judge, seems_readable, usage_of
from backends.remote.error_bodies import lenient_json, read_error
from backends.remote.events import begins_like_events
from backends.remote.limit_headers import LimitReader, arrived_at
from backends.remote.native import send_native
from backends.remote.refusals import classify

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

#: Seconds to wait for the body of an error. If the body has not arrived by then, the error is classified without it.
_ERROR_BODY_SECONDS = 5.0
#: Bytes of the longest error body that is read.
_ERROR_BODY_LIMIT = 1024 * 1024
#: Bytes of the longest answer that is read.
_BODY_LIMIT = 64 * 1024 * 1024
#: Bytes of comments and pings that are accepted before a stream's first content, and bytes of events without content
#: after which the stream is delivered all the same.
_PREFACE_LIMIT = 1024 * 1024
_COMPATIBLE_PATH, _NATIVE_PATH = "/compatible-mode/v1", "/api/v1"
#: DashScope's bounds for the header `X-DashScope-Wait-Timeout`, in seconds.
_MIN_WAIT_SECONDS, _MAX_WAIT_SECONDS = 3, 120


class DashScopeBackend:
    """Forwards the bytes of each request to the provider, and the bytes of its answer to the caller.

    `key` is called before every attempt, so that a rotated key is used at once. Without `native_url`, the URL of
    DashScope's native API is derived from a base URL that ends in `/compatible-mode/v1`. For any other base URL,
    requests in the native dialect are translated.
    """

    def __init__(
        self,
        *,
        base_url: str,
        native_url: str | None = None,
        key: Callable[[], str | None] = lambda: None,
        name: str = "dashscope",
    ) -> None:
        """Store the URLs and the key. Raises `ValueError` if a URL is invalid."""
        self.name = name
        self._key = key
        self._base = _checked(base_url)
        if native_url is None and self._base.endswith(_COMPATIBLE_PATH):
            native_url = self._base.removesuffix(_COMPATIBLE_PATH) + _NATIVE_PATH
        self._native = None if native_url is None else _checked(native_url)
        self._host = URL(self._base).host or ""
        self._connector: Connector | None = None
        self._origins: dict[str, Origin] = {}
        self._limits = LimitReader()

    model_id = None
    slots = None

    def unready_reason(self) -> None:
        """Return None: only a request can show whether the provider answers. See `Backend.unready_reason`."""

    def account(self) -> str:
        """Return the provider's address and a fingerprint of the current key, never the key itself."""
        key = self._key()
        fingerprint = "" if key is None else hashlib.sha256(key.encode()).hexdigest()[:16]
        return f"{self.name} {URL(self._base).origin()} {fingerprint}".rstrip()

    async def start(self) -> None:
        """Open the connection pool. This sends no request, because the provider may start later than the sidecar."""
        self._connector = connector = (await choose()).connector()
        try:
            self._origins = {base: connector.origin(base) for base in (self._base, self._native) if base}
        except ValueError as error:
            await self.close()
            raise BackendError(str(error)) from error

    async def close(self) -> None:
        """Close the connections."""
        for origin in self._origins.values():
            origin.close()
        if self._connector is not None:
            await self._connector.close()
            self._connector = None
            self._origins = {}

    async def send(self, request: Request, timings: Timings) -> Reply:
        """Make one attempt, see `Backend.send`."""
        path = f"{request.path}?{request.query}" if request.query else request.path
        if not (path.startswith("/") and path.isascii() and path.isprintable() and " " not in path):
            # With a line break in the path, a caller could insert a request of its own.
            raise Rejected("the path holds characters that no URL has", status=400)
        base = self._base
        headers = {canonical_name(name): value for name, value in request.headers.items()}
        if request.dialect == "native":
            if self._native is None:
                return await send_native(self.send, request, timings)
            base = self._native
            if request.stream:
                headers["X-Dashscope-Sse"] = "enable"
        if self._native is not None and request.deadline is not None:
            self._set_wait_timeout(headers, request.deadline)
        if request.body:
            headers.setdefault("Content-Type", "application/json")
        return await self._exchange(
            base,
            request.method,
            path,
            headers,
            request.body,
            timings=timings,
            read=lambda response: self._reply(response, request, timings),
        )

    async def models(self) -> bytes:
        """Request the list of models from the provider, see `Backend.models`."""
        return await self._exchange(self._base, "GET", "/models", {}, b"", timings=Timings(), read=_json_body)

    def _set_wait_timeout(self, headers: dict[str, str], deadline: float) -> None:
        """Ask DashScope to queue a request (until its deadline at most) if it would refuse it for rising traffic."""
        left = int(deadline - asyncio.get_running_loop().time())
        if left >= _MIN_WAIT_SECONDS:
            headers.setdefault("X-Dashscope-Wait-Timeout", str(min(left, _MAX_WAIT_SECONDS)))

    async def _exchange(
        self,
        base: str,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        *,
        timings: Timings,
        read: Callable[[Response], Awaitable[_T]],
    ) -> _T:
        """Send a request and return the result of `read`, which reads a 2xx answer.

        On any error this closes the connection, and a `BackendError` replaces the `HttpError`. After the call, only
        the result of `read` may use the response.
        """
        if (origin := self._origins.get(base)) is None:
            raise RuntimeError("send() before start()")
        headers.setdefault("User-Agent", "vlm-sidecar")
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        try:
            response = await origin.request(method, path, headers, body, timings)
        except HttpError as error:
            raise self._explained(error) from error
        try:
            if response.status // 100 == 2:
                return await read(response)
            raise await self._refusal(response, body, headers.get("X-Request-Id"))  # noqa: TRY301  a local name would create a reference cycle
        except BaseException as error:
            response.close_unless_read()
            if isinstance(error, HttpError):
                raise self._explained(error) from error
            if isinstance(error, BackendError):
                self._mask(error)
                self._add_limits(error, response, timings)
            raise

    def _mask(self, error: BackendError) -> None:
        """Replace the key in an error: if the provider quotes it, neither the caller nor the log may contain it."""
        if key := self._key():
            error.message = error.message.replace(key, "***")
            error.quote = error.quote.replace(key, "***")
            error.body = error.body.replace(key.encode(), b"***")
            error.headers = {name: value.replace(key, "***") for name, value in error.headers.items()}
            error.args = (error.message,)

    async def _refusal(self, response: Response, request_body: bytes, request_id: str | None) -> BackendError:
        """Read an answer without a 2xx status and return the error that it means.

        `request_id` is the caller's: a provider that repeats it has named no id of its own.
        """
        if response.status < 200:
            return ServerFailed(f"the provider answered {response.status}: it would speak another protocol than HTTP")
        if response.status < 400:
            return ServerFailed(
                f"the provider answered {response.status}, a redirect: it is not followed, the key would go with it. "
                "Check the base URL"
            )
        body = b""
        try:
            async with asyncio.timeout(_ERROR_BODY_SECONDS):
                body = await _read(response, _ERROR_BODY_LIMIT)
            if encoding := _encoding(response):
                body = await asyncio.to_thread(_decompressed, body, encoding)
        except (HttpError, TimeoutError, ServerFailed) as error:
            _log.info("the body of an answer %d could not be read: %s", response.status, type(error).__name__)
        headers = {name: value for name, value in response.headers.items() if value != request_id}
        return classify(response.status, headers, body, request_body=request_body)

    async def _reply(self, response: Response, request: Request, timings: Timings) -> Reply:
        if _encoding(response):
            reply = await self._encoded(response, request)
        elif request.stream:
            reply = await self._whole_or_stream(response, request)
        else:
            reply = await self._whole(response, request)
        self._add_limits(reply, response, timings)
        return reply

    def _add_limits(self, answer: Reply | BackendError, response: Response, timings: Timings) -> None:
        """Set the limits that the answer's headers report, and when the provider counted the request."""
        answer.limits = self._limits.read(response.headers)
        arrived = arrived_at(response.headers)
        if arrived is not None and timings.work_started is not None:
            now = asyncio.get_running_loop().time()
            at = now - (time.time() - arrived)
            if timings.work_started - 0.001 <= at <= now:  # else a clock is wrong; the header has whole milliseconds
                answer.counted_at = max(at, timings.work_started)

    async def _whole_or_stream(self, response: Response, request: Request) -> Reply:
        """Read the answer to a request for a stream.

        The content decides, and not its label: servers label streams as `text/plain`, and errors as streams.
        """
        first = b""
        while (is_stream := begins_like_events(first)) is None and len(first) < _PREFACE_LIMIT:
            piece = await response.content.readany()
            if not piece:
                is_stream = response.content_type == "text/event-stream"
                break
            first += piece
        return await (self._stream(response, request, first) if is_stream else self._whole(response, request, first))

    async def _encoded(self, response: Response, request: Request) -> Reply:
        """Pass on an answer that is compressed although we asked for `identity`, together with its encoding.

        It is not decompressed, because that takes too long for the event loop; so its usage and errors are not seen.
        """
        headers = {**to_caller(response.headers), "Content-Encoding": response.headers["Content-Encoding"]}
        if not request.stream:
            return Reply(status=response.status, headers=headers, body=await _read(response, _BODY_LIMIT))
        return self._streaming(response, headers, None, deque())

    async def _whole(self, response: Response, request: Request, first: bytes = b"") -> Reply:
        """Read a whole answer. `first` is what was read of it already.

        A request whose 200 has arrived completely is never sent again, because the provider has charged it.
        """
        body = await _read(response, _BODY_LIMIT, first)
        headers = to_caller(response.headers)
        is_chat = request.dialect == "native" or request.path == "/chat/completions"
        if not is_chat and request.method != "POST":
            # It shows what happened earlier: the errors and the usage in it are not those of this request.
            return Reply(status=response.status, headers=headers, body=body)
        payload = lenient_json(body) if is_chat or response.content_type == "application/json" else None
        if payload is None and not is_chat:
            return Reply(status=response.status, headers=headers, body=body)
        judgement = judge(payload, is_chat=is_chat)
        if judgement == "answer" or (payload is None and seems_readable(body)):
            return Reply(status=response.status, headers=headers, body=body, usage=usage_of(payload))
        if payload is None and begins_like_events(body):  # a stream that nobody asked for; it may contain an error
            failure = error_in_events(body, request_body=request.body)
            if failure is not None:
                raise failure
        if not isinstance(payload, dict):
            raise _not_json(response)
        error = classify(0, response.headers, body, request_body=request.body)
        if judgement == "nothing" and isinstance(error, ServerFailed):
            facts = read_error(body)
            if not (facts.codes or facts.texts):
                error.message = f"the provider answered {response.status} without an answer that a caller could read"
                error.args = (error.message,)
            error.may_resend = False
        raise error

    async def _stream(self, response: Response, request: Request, first: bytes) -> Reply:
        """Read until the first content, so that a refusal instead of content is raised like any other refusal."""
        is_chat = request.dialect == "native" or request.path == "/chat/completions"
        watch = StreamWatch(is_chat=is_chat, request_body=request.body, headers=response.headers)
        preface: deque[bytes] = deque()
        size = 0
        piece = first or await response.content.readany()
        while piece:
            watch.feed(piece)
            preface.append(piece)
            size += len(piece)
            if watch.has_content or watch.failure is not None:
                break
            if size - watch.open_bytes > _PREFACE_LIMIT:
                if watch.has_data:  # a model that thinks for long sends events with empty texts: begin to deliver
                    watch.has_content = True
                    break
                error = ServerFailed(f"the provider's stream held no content in its first {size} bytes")
                error.may_resend = False  # the provider is answering, so that it charges
                raise error
            piece = await response.content.readany()
        else:
            watch.end()
        if not watch.has_content:
            raise watch.failure or _no_content(watch)
        return self._streaming(response, to_caller(response.headers), watch, preface, is_chat=is_chat)

    def _streaming(
        self,
        response: Response,
        headers: dict[str, str],
        watch: StreamWatch | None,
        preface: deque[bytes],
        *,
        is_chat: bool = False,
    ) -> Reply:
        """Return the reply for a stream. `is_chat`: it must say at its end that it has ended."""
        reply = Reply(status=response.status, headers=headers)
        chunks = _Chunks(reply, response, watch, preface, self._explained, must_end=is_chat)
        reply.chunks, reply.deliver, reply.closer = chunks, chunks.deliver, chunks.aclose
        return reply

    def _explained(self, error: HttpError) -> BackendError:
        """Return the error of this project that describes the failure."""
        host, (kind, reason) = self._host, failure_of(error)
        match kind:
            case "name_not_resolved":
                return Unreachable(f"the name {host} cannot be resolved: {reason}")
            case "certificate_not_trusted":
                return Unreachable(f"the certificate of {host} is not to be trusted: {reason}")
            case "proxy_refused":
                return Unreachable(f"the proxy on the way to {host} refuses to connect us: it answered {reason}")
            case "proxy_not_connected":
                return Unreachable(f"the proxy on the way to {host} does not let us through: {reason}")
            case "not_connected":
                return Unreachable(f"no connection to {host}: {reason}")
            case "connect_timed_out":
                return Unreachable(f"no connection to {host} within {reason} s")
            case "answer_cut_short":
                return Unreachable(f"the connection to {host} broke before the answer was whole")
            case "malformed_answer":
                return ServerFailed(f"{host} answered what is not HTTP")
            case "connection_broken":
                return Unreachable(f"the connection to {host} broke before the answer: {reason}")


class _Chunks:
    """The unchanged bytes of a stream. Data that the consumer has not read yet stays in the socket's buffers."""

    def __init__(
        self,
        reply: Reply,
        response: Response,
        watch: StreamWatch | None,
        preface: deque[bytes],
        explained: Callable[[HttpError], BackendError],
        *,
        must_end: bool,
    ) -> None:
        self._reply = reply
        self._response = response
        self._watch = watch
        self._preface = preface
        self._explained = explained
        self._must_end = must_end

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._preface:
            return self._preface.popleft()
        try:
            piece = await self._response.content.readany()
        except HttpError as error:
            self._settle()
            raise self._explained(error) from error
        if piece:
            if self._watch is not None:
                self._watch.feed(piece)
            return piece
        self._end()
        raise StopAsyncIteration

    async def deliver(self, on_piece: OnPiece) -> bool:
        while self._preface:
            if not on_piece(self._preface.popleft()):
                return False
        watch = self._watch

        def watch_and_deliver(piece: bytes) -> bool:
            if watch is not None:
                watch.feed(piece)
            return on_piece(piece)

        try:
            whole = await self._response.deliver(watch_and_deliver)
        except HttpError as error:
            self._settle()
            raise self._explained(error) from error
        if whole:
            self._end()
        return whole

    async def aclose(self) -> None:
        self._settle()
        del self._reply  # it refers to this object
        self._response.close_unless_read()

    def _end(self) -> None:
        """Process the end of the stream. Raise `ServerFailed` if the stream did not say that it has ended."""
        watch = self._watch
        if watch is not None:
            watch.end()
        self._settle()
        if watch is not None and self._must_end and watch.failure is None and not watch.is_complete:
            raise ServerFailed("the provider's stream ended in the middle: no finish_reason and no [DONE] came")

    def _settle(self) -> None:
        if self._watch is not None:
            self._reply.usage = self._watch.usage
            self._reply.failure = self._watch.failure


def _checked(url: str) -> str:
    parsed_url = URL(url)
    if parsed_url.scheme not in ("http", "https") or not parsed_url.host:
        raise ValueError(f"{url!r} is no http:// or https:// URL")
    if "?" in url or "#" in url:
        raise ValueError("a base URL has no query and no fragment: paths are put behind it")
    return url.rstrip("/")


async def _json_body(response: Response) -> bytes:
    body = await _read(response, _BODY_LIMIT)
    if _encoding(response):
        body = await asyncio.to_thread(_decompressed, body, _encoding(response))
    if not isinstance(lenient_json(body), dict):
        raise _not_json(response)
    return body


async def _read(response: Response, limit: int, first: bytes = b"") -> bytes:
    """Read a body to its end. Raises `ServerFailed` if it is longer than `limit` bytes. `first` was read before."""
    if not first and response.content.is_eof():  # the whole body arrived together with the head
        return response.content.read_nowait()
    pieces = [first]
    size = len(first)
    while piece := await response.content.readany():
        size += len(piece)
        if size > limit:
            raise ServerFailed(f"the provider's answer is longer than {limit} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _encoding(response: Response) -> str:
    """Return the `Content-Encoding` of an answer in lower case; empty for none and for `identity`."""
    encoding = response.headers.get("Content-Encoding")
    if encoding is None:
        return ""
    encoding = encoding.strip().lower()
    return "" if encoding == "identity" else encoding


def _decompressed(body: bytes, encoding: str) -> bytes:
    """Return a compressed error body, at most `_ERROR_BODY_LIMIT` bytes of it; empty if it cannot be decompressed.

    Runs in a thread.
    """
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return b""
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, _ERROR_BODY_LIMIT)
    except zlib.error:
        return b""


def _no_content(watch: StreamWatch) -> ServerFailed:
    error = ServerFailed("the provider's stream ended before any content")
    error.may_resend = not watch.is_complete
    return error


def _not_json(response: Response) -> ServerFailed:
    error = ServerFailed(f"the provider answered {response.status} with {response.content_type}, which is not JSON")
    error.may_resend = False  # a complete 200 was charged
    return error
