"""Every use of undocumented parts of aiohttp. No other file imports or names one.

Serving uses the parser and the connections of aiohttp without its `web.Server` and its `ClientSession`, because these
two need 1.5 times the processor time per frame. aiohttp promises nothing about the parts below: they may change in any
release. Each has a test in `tests/backends/http1/test_aiohttp_parts.py`, whose name names the part. `check` looks for
all of them at start, see `implementation.py`.

| use | name and signature |
|---|---|
| 1 | `base_protocol.BaseProtocol(loop, parser)`: `transport`, `writing_paused`, and asyncio's callbacks |
| 2 | `BaseProtocol.resume_reading(resume_parser)`, `._reading_paused` |
| 3 | `BaseProtocol._buffer_paused`, `._pause_reading_for_buffer()`, `._resume_reading_for_buffer()` (since 3.14.4) |
| 4 | `BaseProtocol._drain_helper()`, `._drain_waiter` |
| 5 | `http.HttpRequestParser(protocol, loop, limit, payload_exception, auto_decompress, max_msg_queue_size)` |
| 6 | `HttpRequestParser.feed_data(data) -> (messages, upgraded, tail)`; a message is a pair with its body |
| 7 | `HttpRequestParser.message_consumed()` |
| 8 | `http.RawRequestMessage`: `method`, `path`, `version`, `headers`, `should_close`, `chunked` |
| 9 | `http.HttpProcessingError`, which the parsers raise |
| 10 | `EMPTY_PAYLOAD`, a body without bytes |
| 11 | `StreamReader.set_exception(exception)`, `.on_eof(callback)` |
| 12 | `StreamReader.total_bytes` |
| 13 | `tcp_helpers.tcp_keepalive(transport)` |
| 14 | `helpers.rfc822_formatted_time()` |
| 15 | `client_proto.ResponseHandler(loop)`: `read()`, `should_close`, `set_exception(exception, cause)`, `._payload` |
| 16 | `ResponseHandler.set_response_params(skip_payload, read_until_eof, read_bufsize)` |
| 17 | `http.RawResponseMessage`: `code`, `headers`, `should_close` |
| 18 | `TCPConnector._factory`, `._loop`, `.connect(request, traces, timeout) -> Connection` |
| 19 | `connector.Connection`: `protocol`, `transport`, `close()` |
| 20 | `client_reqrep.ClientRequest(method, url, proxy, loop)`: `headers` |
| 21 | `http.StreamWriter(protocol, loop).write(memoryview)` |
| 22 | `helpers._EXC_SENTINEL`, the default of `set_exception`'s second argument |
| 23 | `ServerDisconnectedError.message` |

Behaviours that the code relies on, and that aiohttp does not promise:

* `ServerDisconnectedError.message` is a `str` if and only if the connection was closed before any byte of an answer was
  parsed. It decides whether a POST is sent again: see `broke_before_answer`.
* `TCPConnector.connect` adds `Proxy-Authorization` to the request's headers, from the proxy's URL.
* `feed_data` gives no message of a piece of data that it cannot parse, not even the valid ones before the error.
* `message_consumed` counts a message only when its body has arrived. One that is consumed before counts for ever, and
  when so many count, the parser stops: see `RequestProtocol.request_done`.
* A `StreamReader` calls `resume_reading` after every read, and it can call `data_received` from there: see
  `RequestProtocol.resume_reading` and `_Delivery.on_data`.

Behaviours of aiohttp that the code corrects (each has a test, too: a correction that is no longer needed should go):

* The parser adds the trailers behind a chunked body to the headers of the next request: see `ParsedRequest`.
* `_drain_helper` leaves a cancelled waiter behind, and the next one who waits is cancelled too.
* A connection that ends with an error tells nothing to the reader of the body: an answer without a length that a reset
  cut short looks complete. Nor does a body that stops being HTTP: its reader would wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import aiohttp
from aiohttp import EMPTY_PAYLOAD, StreamReader
from aiohttp.base_protocol import BaseProtocol
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.connector import Connection
from aiohttp.helpers import _EXC_SENTINEL, rfc822_formatted_time
from aiohttp.http import HttpProcessingError, HttpRequestParser, RawRequestMessage, RawResponseMessage, StreamWriter
from aiohttp.tcp_helpers import tcp_keepalive

from backends.http1 import connecting
from backends.http1.errors import MalformedAnswer, MalformedRequest

if TYPE_CHECKING:
    from yarl import URL

    from backends.http1.interface import OnPiece

__all__ = [
    "EMPTY_PAYLOAD",
    "ConnectTarget",
    "Connection",
    "HttpProcessingError",
    "ParsedRequest",
    "PartsConnector",
    "RawRequestMessage",
    "ReceivedResponse",
    "RequestProtocol",
    "ResponseProtocol",
    "StreamReader",
    "abort",
    "broke_before_answer",
    "can_be_reused",
    "check",
    "exchange",
    "rfc822_formatted_time",
    "tcp_keepalive",
]


def check(loop: asyncio.AbstractEventLoop) -> None:
    """Raise `AttributeError`, `TypeError` or `RuntimeError` if a part is missing or the worst behaviour has changed.

    Names that this module imports, or that every exchange uses, are not repeated here.
    """
    for owner, names in (
        (RequestProtocol(loop, buffer_bytes=1, max_pipelined=1), (
            "_reading_paused", "_buffer_paused", "_pause_reading_for_buffer", "_resume_reading_for_buffer",
            "_drain_helper", "_drain_waiter", "writing_paused", "transport",
        )),
        (ResponseProtocol(loop), ("_payload", "_reading_paused", "should_close", "set_response_params", "read")),
        (StreamReader, ("set_exception", "on_eof", "total_bytes")),
        (StreamWriter, ("write",)),
    ):  # fmt: skip
        for name in names:
            if not hasattr(owner, name):
                raise AttributeError(f"{getattr(owner, '__name__', type(owner).__name__)} has no {name}")
    for received, answered in ((b"", False), (b"HTTP/1.1 200 OK\r\n", True)):
        protocol = ResponseProtocol(loop)
        protocol.set_response_params(read_until_eof=True)
        if received:
            protocol.data_received(received)
        protocol.connection_lost(None)
        error = protocol.exception()
        if error is None or broke_before_answer(error) is answered:
            raise RuntimeError("ServerDisconnectedError.message no longer shows whether an answer had begun")


# -- the listener's side -----------------------------------------------------------------------------------------------


class RequestProtocol(BaseProtocol):
    """A caller's connection: aiohttp's parser, its flow control, and a bounded queue of parsed requests."""

    __slots__ = ("_max_pipelined", "_message_consumed", "feed", "loop", "task", "waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, *, buffer_bytes: int, max_pipelined: int) -> None:
        parser = HttpRequestParser(
            self,
            loop,
            buffer_bytes,
            payload_exception=aiohttp.ClientPayloadError,
            auto_decompress=False,
            max_msg_queue_size=1 + max_pipelined,  # one more: the request that is being answered
        )
        super().__init__(loop, parser)
        self.loop = loop
        self.task: asyncio.Task[None] | None = None
        """Answers the requests that have arrived; None while there is none."""
        self.feed = parser.feed_data
        """Parse data; gives messages with their bodies, whether another protocol follows, and the rest."""
        self.waiting: deque[tuple[RawRequestMessage | MalformedRequest, StreamReader]] = deque()
        """Parsed requests that nobody has begun to answer. The first malformed one is the last."""
        self._message_consumed = parser.message_consumed
        self._max_pipelined = max_pipelined

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on after a pause. aiohttp calls this after every read of a body, and would parse nothing each time."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def pause_while_full(self) -> None:
        """Stop reading the socket: the maximum number of requests is waiting. `request_done` resumes."""
        if not self._buffer_paused:
            self._pause_reading_for_buffer()

    def request_done(self) -> None:
        """
        Let the parser continue where it had to stop: one request was answered.

        This must wait until the body of the request has arrived: the parser counts the request only then.
        """
        self._message_consumed()
        if self._buffer_paused and len(self.waiting) <= self._max_pipelined // 2:
            self.data_received(b"")  # before the pause ends: the queue may be full again
            if len(self.waiting) < self._max_pipelined:
                self._resume_reading_for_buffer()

    def write(self, data: bytes) -> None:
        """Write, or keep the data while the caller does not read: see `drain`. Raises `ConnectionError`."""
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError("the caller hung up")
        self.transport.write(data)

    async def drain(self) -> None:
        """Wait while too much is kept that the caller does not read. Raises `ConnectionError` if it hung up."""
        try:
            await self._drain_helper()
        finally:
            self._drain_waiter = None  # aiohttp leaves a cancelled one there, and cancels the next one who waits


class ParsedRequest:
    """The head of a request, and the body as far as it has arrived."""

    __slots__ = ("connection", "content", "has_begun", "headers", "keep_alive", "method", "raw_path", "task", "version")

    def __init__(self, message: RawRequestMessage, content: StreamReader, connection: RequestProtocol) -> None:
        self.method = message.method
        self.raw_path = message.path
        self.version = message.version
        self.headers = message.headers
        self.content = content
        self.connection = connection
        self.task = connection.task
        # The parser adds the trailers behind a chunked body to the headers of the next request.
        self.keep_alive = not (message.should_close or message.chunked)
        """The connection takes another request after this one. The handler may decide against it."""
        self.has_begun = False
        """A part of the answer was written."""


# -- the client's side -------------------------------------------------------------------------------------------------


class ResponseProtocol(ResponseHandler):
    """A connection to an upstream."""

    on_data: Callable[[], None] | None = None
    """Is called after each piece of data was parsed, and after the end of the connection."""

    def data_received(self, data: bytes) -> None:
        """Parse data, then notify the reader of the body."""
        super().data_received(data)
        if self.on_data is not None:
            self.on_data()

    def set_exception(self, exc: BaseException, exc_cause: BaseException = _EXC_SENTINEL) -> None:
        """Give an error to the reader of the body too, which aiohttp does not do."""
        if self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(aiohttp.ClientPayloadError(), exc_cause)
        super().set_exception(exc, exc_cause)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on after a pause. aiohttp calls this after every read of a body, and would parse nothing each time."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Give a reset to the reader of the body: aiohttp would call an answer without a length complete."""
        if exc is not None and self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(aiohttp.ClientPayloadError(), exc)
        super().connection_lost(exc)
        if self.on_data is not None:
            self.on_data()


class PartsConnector(aiohttp.TCPConnector):
    """Makes connections whose protocol is `ResponseProtocol`, without a limit of their number."""

    def __init__(self) -> None:
        super().__init__(limit=0, ttl_dns_cache=connecting.DNS_SECONDS, socket_factory=connecting.make_socket)
        self.timeout = aiohttp.ClientTimeout(connect=connecting.CONNECT_SECONDS)
        self._factory = partial(ResponseProtocol, loop=self._loop)  # type: ignore[assignment]  # partial is invariant

    async def connect_new(self, target: ConnectTarget) -> Connection:
        """Make a connection. Raises `aiohttp.ClientError`."""
        try:
            return await self.connect(target, [], self.timeout)
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError(f"{self.timeout.connect:g}") from error


class ConnectTarget(ClientRequest):
    """Where a connection leads: everything that `PartsConnector.connect_new` reads.

    `headers` has `Host`; `Authorization` if the URL has a name and a password; and, after the first connection through
    a proxy whose URL has them, `Proxy-Authorization`.
    """

    def __init__(self, url: URL, proxy: URL | None) -> None:
        super().__init__("GET", url, proxy=proxy, loop=asyncio.get_running_loop())


def can_be_reused(connection: Connection) -> bool:
    """Whether an idle connection is open, and nothing arrived on it. That would be taken for the next answer."""
    protocol = connection.protocol
    if protocol is None:
        return False
    transport = protocol.transport
    return transport is not None and not transport.is_closing() and not protocol.should_close


async def exchange(
    connection: Connection, head: bytes, body: bytes, *, head_only: bool
) -> tuple[RawResponseMessage, StreamReader, asyncio.Task[None] | None]:
    """Write a request and wait for the head of its answer. Raises `aiohttp.ClientError`.

    Gives the head, the body, and the task that still writes a big request. `head_only`: the answer has no body.
    """
    protocol = connection.protocol
    assert protocol is not None and protocol.transport is not None  # noqa: S101  the caller just got the connection
    protocol.set_response_params(skip_payload=head_only, read_until_eof=True, read_bufsize=connecting.READ_AHEAD_BYTES)
    sending = None
    if len(body) <= connecting.SLICE_BYTES:
        protocol.transport.writelines((head, body))
    else:
        protocol.transport.write(head)
        sending = asyncio.ensure_future(_send_slices(protocol, body))
    interim = False  # an interim answer arrived: the server is alive
    try:
        while True:
            message, content = await protocol.read()
            if not 100 <= message.code < 200 or message.code == 101:
                return message, content, sending
            interim = True
    except BaseException as error:
        if sending is not None:
            sending.cancel()
        if isinstance(error, HttpProcessingError):
            raise MalformedAnswer from error
        if interim and isinstance(error, aiohttp.ClientError):
            raise aiohttp.ClientPayloadError from error  # so the request must not be sent again
        raise


async def _send_slices(protocol: ResponseHandler, body: bytes) -> None:
    """Write a big body, and wait whenever the socket is full. The reader of the answer gets a broken connection."""
    writer = StreamWriter(protocol, asyncio.get_running_loop())
    view = memoryview(body)
    with contextlib.suppress(ConnectionError):
        for start in range(0, len(body), connecting.SLICE_BYTES):
            await writer.write(view[start : start + connecting.SLICE_BYTES])


def abort(connection: Connection) -> None:
    """Close a connection without waiting for the data in its buffers. Does nothing if it was released."""
    if connection.transport is not None:
        connection.transport.abort()
    connection.close()


def broke_before_answer(error: BaseException) -> bool:
    """Whether a connection broke before an answer began: aiohttp puts the part that it had parsed into `message`.

    After a reset there is no such information, but a server that has begun to answer has no reason to send a reset.
    """
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return isinstance(error.message, str)
    return isinstance(error, aiohttp.ClientOSError | aiohttp.ClientConnectionResetError)


class Pool(Protocol):
    """Keeps idle connections."""

    def keep(self, connection: Connection) -> None:
        """Take a connection back: the answer on it was read to its end."""


class ReceivedResponse:
    """The head of an answer, and its body as it arrives. `_release` is called when the body is complete."""

    __slots__ = ("_connection", "_pool", "_sending", "_should_close", "content", "headers", "status")

    def __init__(
        self,
        pool: Pool,
        connection: Connection,
        message: RawResponseMessage,
        content: StreamReader,
        sending: asyncio.Task[None] | None,
    ) -> None:
        self.status = message.code
        self.headers = message.headers
        self.content = content
        self._pool = pool
        self._connection: Connection | None = connection
        """The connection while this answer owns it."""
        self._sending = sending
        """Writes the rest of a big request."""
        self._should_close = message.should_close
        content.on_eof(self._release)

    def _release(self) -> None:
        raise NotImplementedError

    async def deliver(self, on_piece: OnPiece) -> bool:
        """See `interface.Response`. The pieces are given away in the connection's callback: no task wakes for them."""
        protocol = None if self._connection is None else cast("ResponseProtocol", self._connection.protocol)
        delivery = _Delivery(self.content, on_piece)
        if protocol is not None:  # None: the whole body has arrived
            protocol.on_data = delivery.on_data
        delivery.on_data()
        try:
            return await delivery.ended
        finally:
            if protocol is not None:
                protocol.on_data = None
            del delivery.ended  # an error in it refers to the frame that refers to it

    def _drop_content(self) -> None:
        """Let a body that is not complete refer to this answer no longer: each would keep the other alive."""
        if not self.content.is_eof():
            self.content.set_exception(aiohttp.ClientPayloadError())


class _Delivery:
    """Gives the pieces of one body to `on_piece`, from the connection's own callbacks."""

    __slots__ = ("_busy", "_content", "_on_piece", "ended")

    def __init__(self, content: StreamReader, on_piece: OnPiece) -> None:
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """True: the body is complete. False: `on_piece` returned False."""
        self._content = content
        self._on_piece = on_piece
        self._busy = False

    def on_data(self) -> None:
        """Give away what has arrived."""
        if self._busy or self.ended.done():
            return  # a read can parse more data, which calls this again
        self._busy = True
        content = self._content
        try:
            seen_bytes = -1
            while seen_bytes < content.total_bytes:
                seen_bytes = content.total_bytes
                piece = content.read_nowait()
                if piece and not self._on_piece(piece):
                    self.ended.set_result(False)
                    return
            if content.is_eof():
                self.ended.set_result(True)
        except Exception as error:  # noqa: BLE001  for the one who waits, and not for aiohttp, which called this
            self.ended.set_exception(error)
        finally:
            self._busy = False
