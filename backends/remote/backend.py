"""The backend for an upstream over HTTP: DashScope, or any server with OpenAI's API."""

from __future__ import annotations

import asyncio
import hashlib
import logging
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
from backends.remote.answers import StreamWatch, is_error, parsed, usage_of
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
#: Bytes of comments and pings that are accepted before a stream's first content.
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
            read=lambda response: self._reply(response, request),
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
            raise await self._refusal(response)  # noqa: TRY301  a local name would create a reference cycle
        except BaseException as error:
            response.close_unless_read()
            if isinstance(error, HttpError):
                raise self._explained(error) from error
            if isinstance(error, BackendError):
                self._mask(error)
            raise

    def _mask(self, error: BackendError) -> None:
        """Replace the key in an error: if the provider quotes it, neither the caller nor the log may contain it."""
        if key := self._key():
            error.message = error.message.replace(key, "***")
            error.body = error.body.replace(key.encode(), b"***")
            error.headers = {name: value.replace(key, "***") for name, value in error.headers.items()}
            error.args = (error.message,)

    async def _refusal(self, response: Response) -> BackendError:
        """Read an answer without a 2xx status and return the error that it means."""
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
        except (HttpError, TimeoutError, ServerFailed) as error:
            _log.info("the body of an answer %d could not be read: %s", response.status, type(error).__name__)
        return classify(response.status, response.headers, body)

    def _reply(self, response: Response, request: Request) -> Awaitable[Reply]:
        if request.stream and response.content_type == "text/event-stream":
            return self._stream(response)
        return self._whole(response, request)

    async def _whole(self, response: Response, request: Request) -> Reply:
        body = await _read(response, _BODY_LIMIT)
        headers = to_caller(response.headers)
        is_chat = request.dialect == "native" or request.path == "/chat/completions"
        payload = parsed(body) if is_chat or response.content_type == "application/json" else None
        if is_chat and not isinstance(payload, dict):
            raise _not_json(response)
        if is_error(payload):
            raise classify(0, response.headers, body)
        return Reply(status=response.status, headers=headers, body=body, usage=usage_of(payload))

    async def _stream(self, response: Response) -> Reply:
        """Read until the first content, so that a refusal instead of content is raised like any other refusal."""
        watch = StreamWatch()
        preface: deque[bytes] = deque()
        size = 0
        while not watch.has_content and watch.failure is None:
            piece = await response.content.readany()
            if not piece:
                watch.end()
                break
            watch.feed(piece)
            preface.append(piece)
            size += len(piece)
            if size > _PREFACE_LIMIT:
                raise ServerFailed(f"the provider's stream held no content in its first {size} bytes")
        if not watch.has_content:
            raise watch.failure or ServerFailed("the provider's stream ended before any content")
        reply = Reply(status=response.status, headers=to_caller(response.headers))
        chunks = _Chunks(reply, response, watch, preface, self._explained)
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
        watch: StreamWatch,
        preface: deque[bytes],
        explained: Callable[[HttpError], BackendError],
    ) -> None:
        self._reply = reply
        self._response = response
        self._watch = watch
        self._preface = preface
        self._explained = explained

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
            self._watch.feed(piece)
            return piece
        self._watch.end()
        self._settle()
        raise StopAsyncIteration

    async def deliver(self, on_piece: OnPiece) -> bool:
        while self._preface:
            if not on_piece(self._preface.popleft()):
                return False

        def watch_and_deliver(piece: bytes) -> bool:
            self._watch.feed(piece)
            return on_piece(piece)

        try:
            whole = await self._response.deliver(watch_and_deliver)
        except HttpError as error:
            self._settle()
            raise self._explained(error) from error
        if whole:
            self._watch.end()
            self._settle()
        return whole

    async def aclose(self) -> None:
        self._settle()
        del self._reply  # it refers to this object
        self._response.close_unless_read()

    def _settle(self) -> None:
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
    if not isinstance(parsed(body), dict):
        raise _not_json(response)
    return body


async def _read(response: Response, limit: int) -> bytes:
    """Read a body to its end. Raises `ServerFailed` if it is longer than `limit` bytes."""
    if response.content.is_eof():  # the whole body arrived together with the head
        return response.content.read_nowait()
    pieces = []
    size = 0
    while piece := await response.content.readany():
        size += len(piece)
        if size > limit:
            raise ServerFailed(f"the provider's answer is longer than {limit} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _not_json(response: Response) -> ServerFailed:
    return ServerFailed(f"the provider answered {response.status} with {response.content_type}, which is not JSON")
