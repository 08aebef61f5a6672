"""The second implementation, on aiohttp's documented `web.Server` and `ClientSession`.

It is used if the installed aiohttp lacks an internal part. It is slower and has these limits:

* Malformed data gets aiohttp's own 400, as plain text. If the body of a request or of an answer becomes invalid HTTP in
  the middle, this is noticed only at the deadline. If a reset cuts off an answer without a length, the answer looks
  complete.
* Only aiohttp bounds the number of pipelined requests, and not in every release. A connection that has sent no complete
  request head is closed after 75 s, not after 10 s.
* If a caller shuts its sending side after a request, the connection is closed without an answer.
* Connections to an upstream are not kept for another request. Otherwise aiohttp would read data that arrives on an idle
  connection as the next answer. It also does not show whether a POST on a dead connection may be sent again.
* When `SIDECAR_QUEUE_BYTES` are in use, a connection can bring a little more than its place, and a caller that stalls
  gets no answer: its connection is closed. Pipelined requests count as heads or as being received.
* A request does not wait for a free file descriptor: without one, the attempt fails.
* `AnswerBytes` counts and bounds nothing: neither the answers that are being read (each has at most
  `MAX_ANSWER_BYTES`), nor what callers do not read (each is closed after 75 s without a byte).
* When a request to an upstream is cancelled, the data in its socket's buffer is still sent.
"""

from __future__ import annotations

import asyncio
import logging
from base64 import b64encode
from math import inf
from types import SimpleNamespace
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from backends.byte_budget import CallersBudget
from backends.http1 import accepting, connecting, proxies
from backends.http1.answer_bytes import AnswerBytes
from backends.http1.connections import Connections, OnFull
from backends.http1.interface import Handler, OnPiece, Timings

log = logging.getLogger("sidecar")
_silent = logging.Logger("aiohttp", logging.CRITICAL + 1)  # noqa: LOG001  aiohttp would log bytes of malformed requests


class HttpRequest(accepting.RequestHead):
    """See `interface.HttpRequest`."""

    def __init__(self, request: web.BaseRequest, connection: accepting.Counted | None) -> None:
        self.hand_over = int if connection is None else connection.hand_over
        self.request, self.method, self.raw_path = request, request.method, request.raw_path
        self.headers, self.content, self.version = request.headers, request.content, request.version
        # aiohttp adds the trailers after a chunked body to the headers of the next request on the connection.
        self.keep_alive = request.keep_alive and not ("Transfer-Encoding" in self.headers or "Upgrade" in self.headers)
        self.begun_answer: Answer | None = None
        self.task = asyncio.current_task()

    def transport(self) -> asyncio.Transport | None:
        return self.request.transport

    @property
    def caller_has_left(self) -> bool:
        return self.is_gone

    def answer(self, status: int, headers: dict[str, str], *, length: int | None) -> Answer:
        self.begun_answer = Answer(self, status, headers, length)
        return self.begun_answer


class Answer:
    """See `interface.Answer`. Pieces are buffered until `drain`, because aiohttp can write only in a coroutine."""

    def __init__(self, http: HttpRequest, status: int, headers: dict[str, str], length: int | None) -> None:
        if any("\r" in value or "\n" in value for value in headers.values()):
            raise ValueError("a line break in a header would begin another one")
        self.status, self._request, self._kept, self._ended = status, http.request, b"", False
        self.response = web.StreamResponse(status=status, headers={"Server": "vlm-sidecar", **headers})
        self._bodiless = http.method == "HEAD" or status in (204, 205, 304)
        if status == 205:  # it must say that it has no body
            length = 0
        if length is not None:
            self.response.content_length = length
        if not http.keep_alive or (length is None and self._request.version < aiohttp.HttpVersion11):
            self.response.force_close()

    def write_whole(self, body: bytes) -> bool:
        self.write(body)
        self._ended = True
        return False

    def write(self, piece: bytes) -> bool:
        if not (self._ended or self._bodiless):
            self._kept += piece
        return False

    def write_eof(self) -> None:
        self._ended = True

    async def drain(self) -> None:
        kept, self._kept = self._kept, b""
        try:
            async with asyncio.timeout(accepting.KEEPALIVE_SECONDS):
                await self.response.prepare(self._request)
                if kept:
                    await self.response.write(kept)
                if self._ended:
                    await self.response.write_eof()
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the caller does not read") from None


class Listener:
    """See `interface.Listener`."""

    def __init__(
        self,
        handler: Handler,
        *,
        max_connections: int,
        closes_busy: bool = False,
        on_full: OnFull | None = None,
        max_held_bytes: float = inf,
        answers: AnswerBytes | None = None,
    ) -> None:
        del answers
        self._handler = handler
        self.connections: Connections[accepting.Counted] = Connections(
            max_connections, closes_busy=closes_busy, on_full=on_full
        )
        self.close_idle = self.connections.close_idle
        self.budget = CallersBudget(max_held_bytes, self.connections)
        self._by_transport: dict[asyncio.BaseTransport, accepting.Counted] = {}
        self.server = web.Server(
            self._handle, handler_cancellation=True, access_log=None, logger=_silent, auto_decompress=False,
            keepalive_timeout=accepting.KEEPALIVE_SECONDS, lingering_time=accepting.LINGER_SECONDS,
            read_bufsize=accepting.READ_BUFFER_BYTES,
        )  # fmt: skip
        self._tasks: set[asyncio.Task[Any] | None] = set()
        self._addresses = accepting.Addresses(
            lambda: accepting.Counted(self.server(), self.connections, self._by_transport, self.budget)
        )
        self.open, self.open_unix = self._addresses.open, self._addresses.open_unix

    def held_bytes(self) -> dict[str, int]:
        incomplete = sum(one.held_bytes for one in self.connections if one.is_incomplete)
        return {"heads": self.budget.held_bytes - incomplete, "receiving": incomplete, "pipelined": 0}

    async def close(self) -> None:
        self._addresses.close()
        self.server.pre_shutdown()  # closes idle connections now, the others after their request
        await accepting.finish([task for task in self._tasks if task is not None])
        await self.server.shutdown(accepting.CLOSING_SECONDS)
        await self._addresses.remove_socket()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if accepting.has_unknown_coding(request.headers):
            refusal = web.Response(status=400, body=accepting.UNKNOWN_CODING, headers=accepting.ERROR_HEADERS)
            refusal.force_close()
            return refusal
        counted = None if request.transport is None else self._by_transport.get(request.transport)
        http = HttpRequest(request, counted)
        self._tasks.add(http.task)
        if counted is not None:
            counted.set_busy(is_busy=True)
        try:
            await self._handler(http)
            assert http.begun_answer is not None  # noqa: S101  the handler returned it
            await http.begun_answer.drain()
            return http.begun_answer.response
        except ConnectionError:
            raise
        except Exception as defect:
            log.exception("a defect in the sidecar")
            if http.begun_answer is not None and http.begun_answer.response.prepared:
                raise ConnectionResetError("the answer cannot be completed") from defect
            response = web.Response(status=500, body=accepting.INTERNAL_ERROR, content_type="application/json")
            response.force_close()
            return response
        finally:
            self._tasks.discard(http.task)
            if counted is not None:
                counted.set_busy(is_busy=False)


class Connector:
    """See `interface.Connector`."""

    def __init__(self, answers: AnswerBytes | None = None) -> None:
        del answers
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(_connected)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True, ttl_dns_cache=connecting.DNS_SECONDS,
                                           socket_factory=connecting.make_socket),
            cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(connect=connecting.CONNECT_SECONDS),
            headers={"Accept-Encoding": "identity"}, skip_auto_headers=("Content-Type",), trace_configs=[trace],
            read_bufsize=connecting.READ_AHEAD_BYTES, auto_decompress=False,
        )  # fmt: skip
        self.close = self._session.close

    def origin(self, base: str) -> Origin:
        return Origin(self._session, URL(base))


async def _connected(_: object, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.work_started = asyncio.get_running_loop().time()


class Origin:
    """See `interface.Origin`."""

    def __init__(self, session: aiohttp.ClientSession, url: URL) -> None:
        self._session, self._proxy = session, proxies.environment_proxy(url)
        self._base = str(url.with_user(None)).rstrip("/")
        credentials = f"{url.user}:{url.password or ''}".encode("latin1")
        self._authorization = f"Basic {b64encode(credentials).decode()}" if url.user else None

    async def request(self, method: str, path: str, headers: dict[str, str], body: bytes, timings: Timings) -> Response:
        if self._authorization is not None:
            headers.setdefault("Authorization", self._authorization)
        if body:
            headers["Content-Length"] = str(len(body))
        response = await self._session.request(
            method, URL(self._base + path, encoded=True), headers=headers, proxy=self._proxy, allow_redirects=False,
            data=connecting.in_slices(body) or None, trace_request_ctx=timings,
        )  # fmt: skip
        timings.first_byte = asyncio.get_running_loop().time()
        return Response(response)

    def close(self) -> None:
        pass  # no connection is ever idle


class Response:
    """See `interface.Response`."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status, self.headers, self.content = response.status, response.headers, response.content
        self.content_type = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        self.close_unless_read, self.held_bytes = response.close, 0

    def keep(self, still_held: int) -> None:
        pass

    async def deliver(self, on_piece: OnPiece) -> bool:
        while piece := await self.content.readany():
            if not on_piece(piece):
                return False
        return True
