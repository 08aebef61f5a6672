"""The backend for an upstream over HTTP: DashScope, or any server with OpenAI's API."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from yarl import URL

from backends.base import (
    MAX_ANSWER_BYTES,
    BackendError,
    Rejected,
    Reply,
    Request,
    ServerFailed,
    Timings,
    Unreachable,
)
from backends.forwarded_headers import to_caller
from backends.http1.answer_bytes import AnswerBytes
from backends.http1.errors import HttpError, failure_of
from backends.http1.headers import canonical_name
from backends.http1.implementation import choose
from backends.http1.interface import Connector, Origin, Response
from backends.remote.answers import (
    StreamWatch,
    error_in_events,
    judge,
    output_bytes_of,
    seems_readable,
    usage_of,
)
from backends.remote.error_bodies import lenient_json
from backends.remote.events import begins_like_events
from backends.remote.key_traces import has_traces
from backends.remote.limit_headers import LimitReader, arrived_at
from backends.remote.native import GENERATION_PATH, send_native
from backends.remote.public_words import public_media_type
from backends.remote.refusals import classify, error_of, read
from backends.remote.stream import HOLD_SECONDS, Stream

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

#: Seconds to wait for the body of an error. If the body has not arrived by then, the error is classified without it.
_ERROR_BODY_SECONDS = 5.0
#: Bytes of the longest error body that is read.
_ERROR_BODY_LIMIT = 1024 * 1024
#: Bytes of the longest list of models: each caller gets a copy. A list of 500 models has about 1 MB.
_LIST_LIMIT = 4 * 1024 * 1024
#: Paths whose answers are chat completions, in OpenAI's or the native format.
_CHAT_PATHS = frozenset({"/chat/completions", GENERATION_PATH, "/services/aigc/text-generation/generation"})
#: Bytes of the longest error body in which the key is looked for on the event loop; a longer one takes milliseconds.
_QUICKLY_MASKED = 16 * 1024
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
        answers: AnswerBytes | None = None,
    ) -> None:
        """Store the URLs and the key. `answers` counts what arrives. Raises `ValueError` if a URL is invalid."""
        self.name = name
        self._answers = answers
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

    @property
    def has_native_api(self) -> bool:
        """Whether a URL of DashScope's own API is known, see `Backend.has_native_api`."""
        return self._native is not None

    def unready_reason(self) -> None:
        """Return None: only a request can show whether the provider answers. See `Backend.unready_reason`."""

    def account(self) -> str:
        """Return the provider's address and a fingerprint of the current key, never the key itself."""
        key = self._key()
        fingerprint = "" if key is None else hashlib.sha256(key.encode()).hexdigest()[:16]
        return f"{self.name} {URL(self._base).origin()} {fingerprint}".rstrip()

    async def start(self) -> None:
        """Open the connection pool. This sends no request, because the provider may start later than the sidecar."""
        self._connector = connector = (await choose()).connector(self._answers)
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
                result = await read(response)
                if not (isinstance(result, Reply) and result.chunks is not None):
                    response.close_unless_read()  # from here on, nothing waits until the answer is written
                return result
            raise await self._refusal(response, body, headers.get("X-Request-Id"))  # noqa: TRY301  a local name would create a reference cycle
        except BaseException as error:
            response.close_unless_read()
            if isinstance(error, HttpError):
                raise self._explained(error) from error
            if isinstance(error, BackendError):
                if len(error.body) > _QUICKLY_MASKED:
                    await asyncio.to_thread(_mask, error, key)
                else:
                    _mask(error, key)
                self._add_limits(error, response, timings)
            raise

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
        """Read the answer to a request for a stream, until its first content.

        So a refusal instead of content is raised like any other refusal. If the content takes longer than
        `HOLD_SECONDS`, the stream is returned without it. What decides between a whole answer and a stream is the
        content, and not its label: servers label streams as `text/plain`, and errors as streams.
        """
        is_chat = _is_chat(request)
        clock = asyncio.get_running_loop().time
        watch = StreamWatch(is_chat=is_chat, request_body=request.body, headers=response.headers, clock=clock)
        stream = Stream(response, watch, self._error_in_stream, must_end=is_chat, request_body=request.body,
                        keeps_all=request.keeps_stream)  # fmt: skip
        hold_until = clock() + HOLD_SECONDS
        is_labelled = response.content_type == "text/event-stream"
        is_stream = is_labelled or await stream.begins_like_events()
        try:
            async with asyncio.timeout_at(hold_until):
                if is_labelled:
                    is_stream = await stream.begins_like_events()
                if is_stream:
                    await stream.until_content()
        except TimeoutError:
            pass  # it goes on: see `Stream`
        if not is_stream:
            return await self._whole(response, request, stream.first)
        return stream.reply(to_caller(response.headers))

    async def _encoded(self, response: Response, request: Request) -> Reply:
        """Pass on an answer that is compressed although we asked for `identity`, together with its encoding.

        It is not decompressed, because that takes too long for the event loop; so its usage and errors are not seen.
        """
        headers = {**to_caller(response.headers), "Content-Encoding": response.headers["Content-Encoding"]}
        if not request.stream:
            body = await _read(response, request.max_answer_bytes)
            # Compressed, the whole body is about as long as its text alone is otherwise.
            output_bytes = len(body) if _is_chat(request) else None
            return Reply(status=response.status, headers=headers, body=body, output_bytes=output_bytes)
        return Stream(response, None, self._error_in_stream, keeps_all=request.keeps_stream).reply(headers)

    async def _whole(self, response: Response, request: Request, first: bytes = b"") -> Reply:
        """Read a whole answer. `first` is what was read of it already.

        A request whose 200 has arrived completely is never sent again, because the provider has charged it.
        """
        body = await _read(response, request.max_answer_bytes, first)
        headers = to_caller(response.headers)
        is_chat = _is_chat(request)
        if not is_chat and request.method != "POST":
            # It shows what happened earlier: the errors and the usage in it are not those of this request.
            return Reply(status=response.status, headers=headers, body=body)
        payload = lenient_json(body) if is_chat or response.content_type == "application/json" else None
        if payload is None and not is_chat:
            return Reply(status=response.status, headers=headers, body=body)
        judgement = judge(payload, is_chat=is_chat)
        if judgement == "answer" or (payload is None and seems_readable(body)):
            usage = usage_of(payload)
            reply = Reply(status=response.status, headers=headers, body=body, usage=usage)
            if usage is None and is_chat:
                reply.output_bytes = len(body) if payload is None else output_bytes_of(payload)
            return reply
        if payload is None and begins_like_events(body):  # a stream that nobody asked for; it may contain an error
            failure = error_in_events(body, request_body=request.body)
            if failure is not None:
                raise failure
        if not isinstance(payload, dict):
            raise _not_json(response)
        reading = read(0, response.headers, body, request_body=request.body, payload=payload)
        error = error_of(reading, 0, response.headers, body)
        if judgement == "nothing" and isinstance(error, ServerFailed):
            if not (reading.facts.codes or reading.facts.texts):
                error.message = f"the provider answered {response.status} without an answer that a caller could read"
                error.args = (error.message,)
            error.may_resend = False
        raise error

    def _error_in_stream(self, error: HttpError | BackendError) -> BackendError:
        """Return the error of this project for an error after `send` has returned, without the key."""
        if isinstance(error, HttpError):
            return self._explained(error)
        _mask(error, self._key())
        return error

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


def _mask(error: BackendError, key: str | None) -> None:
    """Remove the key from an error: if the provider quotes it, neither the caller nor the log may contain it.

    A text that contains it in another form, or a part of it, is left out completely.
    """
    if not key:
        return

    def masked(text: str) -> str:
        text = text.replace(key, "***")
        return "" if has_traces(key, text) else text

    error.quote, error.code = masked(error.quote), masked(error.code)
    error.upstream_request_id = masked(error.upstream_request_id)
    error.body = error.body.replace(key.encode(), b"***")
    if has_traces(key, error.body.decode("utf-8", "replace")):
        error.body = b""
    error.headers = {
        name: text for name, value in error.headers.items() if not has_traces(key, name) and (text := masked(value))
    }


def _is_chat(request: Request) -> bool:
    """Return whether the answer is a chat completion, in OpenAI's or the native format."""
    return request.path in _CHAT_PATHS


def _checked(url: str) -> str:
    parsed_url = URL(url)
    if parsed_url.scheme not in ("http", "https") or not parsed_url.host:
        raise ValueError("must be an http:// or https:// URL")  # without the URL, which may contain a password
    if "?" in url or "#" in url:
        raise ValueError("a base URL has no query and no fragment: paths are put behind it")
    return url.rstrip("/")


async def _json_body(response: Response) -> bytes:
    body = await _read(response, _LIST_LIMIT)
    if _encoding(response):
        body = await asyncio.to_thread(_decompressed, body, _encoding(response))
    if not isinstance(lenient_json(body), dict):
        raise _not_json(response)
    return body


async def _read(response: Response, limit: int, first: bytes = b"") -> bytes:
    """Read a body to its end. Raises `ServerFailed` if it is longer than `limit` bytes. `first` was read before."""
    if not first and response.content.is_eof():  # the whole body arrived together with the head
        return response.content.read_nowait()
    body = io.BytesIO()  # it returns its bytes without a copy, and tiny pieces do not become millions of objects
    body.write(first)
    while piece := await response.content.readany():
        body.write(piece)
        if body.tell() > limit or response.held_bytes > MAX_ANSWER_BYTES:  # it may consist of the heads of chunks
            raise _too_long(limit)
    return body.getvalue()


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


def _too_long(limit: int) -> ServerFailed:
    error = ServerFailed(f"the provider's answer is longer than {limit} bytes")
    error.may_resend = False  # the next answer would be as long, and is charged too
    return error


def _not_json(response: Response) -> ServerFailed:
    kind = public_media_type(response.content_type)
    error = ServerFailed(f"the provider answered {response.status} with {kind}, which is not JSON")
    error.may_resend = False  # a complete 200 was charged
    return error
