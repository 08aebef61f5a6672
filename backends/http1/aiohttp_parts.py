"""All uses of undocumented parts of aiohttp are in this file. No other file imports or names such a part.

Serving uses the parser and the connections of aiohttp without its `web.Server` and its `ClientSession`, because these
two need 1.5 times the processor time per frame. aiohttp does not document the parts below, so they may change in any
release. For each part, `tests/backends/http1/test_aiohttp_parts.py` has a test whose name contains the name of the
part. `check` looks for all parts at start, see `implementation.py`.

| use | name and signature |
|---|---|
| 1 | `base_protocol.BaseProtocol(loop, parser)`: `transport`, `writing_paused`, and asyncio's callbacks |
| 2 | `BaseProtocol.resume_reading(resume_parser)`, `._reading_paused` |
| 3 | `BaseProtocol._buffer_paused`, `._pause_reading_for_buffer()`, `._resume_reading_for_buffer()` (since 3.14.4) |
| 4 | `BaseProtocol._drain_helper()`, `._drain_waiter` |
| 5 | `http.HttpRequestParser(protocol, loop, limit, payload_exception, auto_decompress, max_msg_queue_size)` |
| 6 | `HttpRequestParser.feed_data(data) -> (messages, upgraded, tail)`; `messages`: pairs of a message and its body |
| 7 | `HttpRequestParser.message_consumed()` |
| 8 | `http.RawRequestMessage`: `method`, `path`, `version`, `headers`, `should_close`, `chunked` |
| 9 | `http.HttpProcessingError`, which the parsers raise |
| 10 | `EMPTY_PAYLOAD`, a body without bytes |
| 11 | `StreamReader.set_exception(exception)`, `.on_eof(callback)` |
| 12 | `StreamReader.total_bytes` |
| 13 | `tcp_helpers.tcp_keepalive(transport)` |
| 14 | `helpers.rfc822_formatted_time()` |
| 15 | `client_proto.ResponseHandler(loop)`: `read()`, `should_close`, `set_exception(exception, cause)`, `._payload` |
| 16 | `ResponseHandler.set_response_params(skip_payload, read_until_eof, read_bufsize, auto_decompress)` |
| 17 | `http.RawResponseMessage`: `code`, `headers`, `should_close` |
| 18 | `TCPConnector._factory`, `._loop`, `.connect(request, traces, timeout) -> Connection` |
| 19 | `connector.Connection`: `protocol`, `transport`, `close()` |
| 20 | `client_reqrep.ClientRequest(method, url, proxy, loop)`: `headers` |
| 21 | `http.StreamWriter(protocol, loop).write(memoryview)` |
| 22 | `helpers._EXC_SENTINEL`, the default of `set_exception`'s second argument |
| 23 | `ServerDisconnectedError.message` |
| 24 | `http_exceptions.LineTooLong`, and the text of the error for too many headers |

Behaviours that the code relies on, and that aiohttp does not document:

* `ServerDisconnectedError.message` is a `str` if and only if the connection was closed before any byte of an answer was
  parsed. This decides whether a POST is sent again: see `broke_before_answer`.
* `TCPConnector.connect` adds `Proxy-Authorization` to the request's headers, from the proxy's URL.
* If a piece of data contains an error, `feed_data` returns none of its messages, not even the valid messages before the
  error. With `max_msg_queue_size=1` it stops after each message, and the next call continues: see
  `RequestProtocol.feed`.
* `message_consumed` removes a message from the parser's count only if the body of the message has arrived. If it is
  called earlier, the message stays in the count for ever. When the count reaches `max_msg_queue_size`, the parser
  stops.
* A `StreamReader` calls `resume_reading` after every read, and `resume_reading` can call `data_received`: see
  `RequestProtocol.resume_reading` and `_Delivery.on_data`.

Behaviours of aiohttp that the code corrects (each also has a test; remove a correction that is no longer needed):

* The parser adds the trailers after a chunked body to the headers of the next request: see
  `RequestProtocol.without_trailers`.
* After a cancellation `_drain_helper` leaves the cancelled future in `_drain_waiter`. The next task that waits for it
  is then cancelled too: see `RequestProtocol.drain`.
* aiohttp does not report the error of a broken connection to the reader of the body. So if a reset cuts off an answer
  without a length, the answer looks complete. aiohttp does not report it either if a body stops being valid HTTP: the
  reader would wait for ever. See `ResponseProtocol`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import aiohttp
from aiohttp import EMPTY_PAYLOAD, StreamReader
from aiohttp.base_protocol import BaseProtocol
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.connector import Connection
from aiohttp.helpers import _EXC_SENTINEL, rfc822_formatted_time
from aiohttp.http import HttpProcessingError, HttpRequestParser, RawRequestMessage, RawResponseMessage, StreamWriter
from aiohttp.http_exceptions import LineTooLong
from aiohttp.tcp_helpers import tcp_keepalive

from backends.http1 import connecting
from backends.http1.answer_bytes import AnswerAccount, AnswerBytes
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
    "is_head_too_large",
    "rfc822_formatted_time",
    "set_idle",
    "tcp_keepalive",
]


def check(loop: asyncio.AbstractEventLoop) -> None:
    """Check that the installed aiohttp has the parts that the table in the module's docstring lists.

    Raises `AttributeError` or `TypeError` if a part is missing, and `RuntimeError` if `ServerDisconnectedError.message`
    no longer shows whether an answer had begun. This behaviour is the most dangerous one, because it decides whether a
    POST is sent again. Names that this module imports, or that every exchange uses, are not checked here: without them
    the import or the first exchange fails.
    """
    for owner, names in (
        (RequestProtocol(loop, buffer_bytes=1, max_pipelined=1), (
            "_reading_paused", "_buffer_paused", "_pause_reading_for_buffer", "_resume_reading_for_buffer",
            "_drain_helper", "_drain_waiter", "writing_paused", "transport",
        )),
        (ResponseProtocol(loop), (
            "_payload", "_reading_paused", "_buffer_paused", "_pause_reading_for_buffer", "_resume_reading_for_buffer",
            "should_close", "set_response_params", "read",
        )),
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


def is_head_too_large(error: HttpProcessingError) -> bool:
    """Return whether the parser refused a head because of its size, and not because it is not HTTP."""
    return isinstance(error, LineTooLong) or "too many headers" in str(error).lower()


def _parse_nothing(_: bytes) -> tuple[list[tuple[RawRequestMessage, StreamReader]], bool, bytes]:
    return [], False, b""


def _do_nothing() -> None:
    pass


#: The end of a chunked body without trailers, as clients write it.
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class RequestProtocol(BaseProtocol):
    """A caller's connection: the parser and the flow control of aiohttp, and a bounded queue of parsed requests."""

    __slots__ = (
        "_body", "_failure", "_feed", "_last_bytes", "_max_pipelined", "_message_consumed", "body_bytes", "is_stopped",
        "loop", "task", "waiting", "without_trailers",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, *, buffer_bytes: int, max_pipelined: int) -> None:
        parser = HttpRequestParser(
            self,
            loop,
            buffer_bytes,
            payload_exception=aiohttp.ClientPayloadError,
            auto_decompress=False,
            max_msg_queue_size=1,  # it stops after each message: see `feed`
        )
        super().__init__(loop, parser)
        self.loop = loop
        self.task: asyncio.Task[None] | None = None
        """The task that answers the requests that have arrived; None if no request has arrived."""
        self._feed = parser.feed_data
        self._body: StreamReader = EMPTY_PAYLOAD  # the body of the last message
        self._failure: HttpProcessingError | None = None  # the error behind the messages that were returned
        self._last_bytes: bytes | None = None  # the last bytes received of a chunked body; None if none is received
        self.without_trailers: StreamReader | None = None
        """The last chunked body behind which no trailers came, and no other data with it. Otherwise the next request
        could contain trailers as headers."""
        self.waiting: deque[tuple[RawRequestMessage | MalformedRequest, StreamReader]] = deque()
        """Parsed requests whose answer has not begun.

        After malformed data nothing more is parsed, so a `MalformedRequest` is always the last element.
        """
        self.is_stopped = False
        """Whether the socket is not read because of the bound on all connections; see `byte_budget`."""
        self._message_consumed = parser.message_consumed
        self._max_pipelined = max_pipelined
        self.body_bytes = 0
        """Bytes of the long answer that is being written."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the connection. From now on, asyncio reports every byte that the caller's socket does not accept."""
        super().connection_made(transport)
        assert self.transport is not None  # noqa: S101  it has just been set
        self.transport.set_write_buffer_limits(high=0)

    def feed(self, data: bytes) -> tuple[list[tuple[RawRequestMessage, StreamReader]], bool, bytes]:
        """Parse data. Return messages with their bodies, whether another protocol follows, and the unparsed rest.

        The parser stops after each message, so that messages before an error are returned. Then the next call raises
        the error, and `request_done` makes this call. At most `max_pipelined` messages wait; the parser keeps the data
        behind them. Raises `HttpProcessingError`.
        """
        if self._failure is not None:
            raise self._failure
        messages: list[tuple[RawRequestMessage, StreamReader]] = []
        received, is_complete, drained = data, self._body.is_eof(), False
        try:
            while True:
                found, stopped, rest = self._feed(data)
                if found:
                    messages += found
                    self._body = found[-1][1]
                elif is_complete:
                    drained = True
                    break
                if not self._body.is_eof():
                    break
                self._message_consumed()
                if stopped or len(self.waiting) + len(messages) >= self._max_pipelined:
                    break
                data, is_complete = b"", True
        except HttpProcessingError as error:
            if not messages:
                raise
            self._failure, stopped, rest = error, False, b""
        if self._last_bytes is not None or (messages and messages[-1][0].chunked):
            self._look_for_trailers(messages, received, drained=drained)
        return messages, stopped, rest

    def _look_for_trailers(
        self, messages: list[tuple[RawRequestMessage, StreamReader]], received: bytes, *, drained: bool
    ) -> None:
        """Set `without_trailers` if a chunked body has ended, and its end is the end of everything that was received.

        No trailer can end in these bytes, because each one contains a colon.
        """
        if messages:
            self._last_bytes = b"" if messages[-1][0].chunked else None
        if self._last_bytes is not None:
            self._last_bytes = (self._last_bytes + received[-len(_LAST_CHUNK) :])[-len(_LAST_CHUNK) :]
            if self._body.is_eof():
                if drained and self._last_bytes == _LAST_CHUNK:
                    self.without_trailers = self._body
                self._last_bytes = None

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Resume reading after a pause.

        aiohttp calls this after every read of a body, also without a pause. Its own method would then run the parser on
        no data each time.
        """
        if self._reading_paused:
            super().resume_reading(resume_parser)

    @property
    def is_paused(self) -> bool:
        """Whether the socket is not read at present."""
        return self._reading_paused or self._buffer_paused

    def pause_while_full(self) -> None:
        """Stop reading the socket: as much as allowed is waiting. `request_done` resumes reading."""
        if not self._buffer_paused:
            self._pause_reading_for_buffer()

    def request_done(self) -> None:
        """Parse what follows if one request is answered, and the parser had stopped at its limit or at an error."""
        if self._failure is not None:
            self.data_received(b"")
        if self._buffer_paused and len(self.waiting) <= self._max_pipelined // 2:
            self.data_received(b"")  # parse the buffered data before reading resumes: this can fill the queue again
            self.read_unless_full()

    def forget_parser(self) -> None:
        """Break the reference cycle with the parser, after the connection is lost. No data may be parsed any more.

        Otherwise each closed connection would stay in memory until the next garbage collection, and many of them would
        make this collection hold the event loop for longer than 50 ms.
        """
        self._parser = self.without_trailers = None
        self._body = EMPTY_PAYLOAD
        self._feed = cast("Any", _parse_nothing)
        self._message_consumed = _do_nothing

    def read_unless_full(self) -> None:
        """End the pause of `pause_while_full`, unless there is still a reason for it."""
        if self._buffer_paused and not self.is_stopped and len(self.waiting) < self._max_pipelined:
            self._resume_reading_for_buffer()

    def write(self, data: bytes | memoryview) -> None:
        """Write data. Raises `ConnectionError` if the caller has closed the connection.

        If the caller reads slowly, the data stays in the write buffer: see `drain`.
        """
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError("the caller hung up")
        self.transport.write(data)

    async def write_long(self, body: bytes) -> None:
        """Write a long body in slices, each when the caller has read the previous one. So no copy of it is kept."""
        self.body_bytes = len(body)
        view = memoryview(body)
        try:
            for start in range(0, len(body), connecting.SLICE_BYTES):
                self.write(view[start : start + connecting.SLICE_BYTES])
                if self.writing_paused:
                    await self.drain()
        finally:
            self.body_bytes = 0
            if not self.writing_paused:
                self.all_is_read()

    def all_is_read(self) -> None:
        """Do nothing; a subclass that counts unread bytes overrides this. The caller has read all that was written."""

    async def drain(self) -> None:
        """Wait until the write buffer has room. Raises `ConnectionError` if the caller has closed the connection."""
        try:
            await self._drain_helper()
        finally:
            self._drain_waiter = None  # aiohttp leaves a cancelled future here, which would cancel the next wait too


class ParsedRequest:
    """The head of a request, and the part of its body that has arrived."""

    __slots__ = (
        "_chunked", "_keep_alive", "connection", "content", "has_begun", "headers", "method", "raw_path", "task",
        "version",
    )  # fmt: skip

    def __init__(self, message: RawRequestMessage, content: StreamReader, connection: RequestProtocol) -> None:
        self.method = message.method
        self.raw_path = message.path
        self.version = message.version
        self.headers = message.headers
        self.content = content
        self.connection = connection
        self.task = connection.task
        self._keep_alive, self._chunked = not message.should_close, message.chunked
        self.has_begun = False
        """Whether a part of the answer was written."""

    @property
    def keep_alive(self) -> bool:
        """Whether the connection can take another request after this one. The handler may set it to False."""
        return self._keep_alive and (not self._chunked or self.connection.without_trailers is self.content)

    @keep_alive.setter
    def keep_alive(self, value: bool) -> None:
        self._keep_alive = value


# -- the client's side -------------------------------------------------------------------------------------------------


#: Interim answers (1xx) before an answer, at most. Without a bound, an upstream could keep the event loop busy.
_MAX_INTERIM = 32


class ResponseProtocol(ResponseHandler):
    """A connection to an upstream."""

    is_idle = False
    """Whether no request is on the connection. Data that then arrives ends it: it answers nothing, and aiohttp would
    keep all of it in memory."""
    account: AnswerAccount | None = None
    """Counts the bytes of the answer that arrives; None while the connection is idle."""
    on_data: Callable[[], None] | None = None
    """A callback. It is called after each piece of data was parsed, and after the end of the connection."""

    def data_received(self, data: bytes) -> None:
        """Parse data, then notify the reader of the body."""
        if self.is_idle:
            if self.transport is not None:
                self.transport.abort()
            return
        account = self.account
        if account is not None:
            account.uncounted_bytes += len(data)
        super().data_received(data)
        if self.on_data is not None:
            self.on_data()
        if account is not None and account.uncounted_bytes:
            account.count()

    def set_stopped(self, *, stopped: bool) -> None:
        """See `answer_bytes.UpstreamSocket`. aiohttp's own flow control does not resume a socket that is stopped here.

        aiohttp uses the same flag for data behind a change of the protocol. Such a connection is closed at once.
        """
        if stopped and not self._buffer_paused:
            self._pause_reading_for_buffer()
        elif self._buffer_paused and not stopped:
            self._resume_reading_for_buffer()

    def give_up(self) -> None:
        """See `answer_bytes.UpstreamSocket`."""
        self.set_exception(aiohttp.ClientPayloadError())
        if self.transport is not None:
            self.transport.abort()

    def set_exception(self, exc: BaseException, exc_cause: BaseException = _EXC_SENTINEL) -> None:
        """Report an error to the reader of the body too, which aiohttp does not do."""
        if self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(aiohttp.ClientPayloadError(), exc_cause)
        super().set_exception(exc, exc_cause)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Resume reading after a pause.

        aiohttp calls this after every read of a body, also without a pause. Its own method would then run the parser on
        no data each time.
        """
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Report a reset to the reader of the body.

        Otherwise, if the answer has no length, aiohttp would treat the part that has arrived as a complete answer.
        """
        if exc is not None and self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(aiohttp.ClientPayloadError(), exc)
        super().connection_lost(exc)
        if self.on_data is not None:
            self.on_data()


class PartsConnector(aiohttp.TCPConnector):
    """Makes connections with the protocol `ResponseProtocol`. Their number is not limited."""

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
    """The target of a connection: the attributes of a request that `PartsConnector.connect_new` reads.

    `headers` contains `Host`. It also contains `Authorization` if the URL contains a user name and a password, and
    `Proxy-Authorization` if the proxy's URL contains them and one connection through the proxy has been made.
    """

    def __init__(self, url: URL, proxy: URL | None) -> None:
        super().__init__("GET", url, proxy=proxy, loop=asyncio.get_running_loop())


def set_idle(connection: Connection) -> None:
    """Mark a connection as idle. The next `exchange` ends this."""
    cast("ResponseProtocol", connection.protocol).is_idle = True


def can_be_reused(connection: Connection) -> bool:
    """Return whether an idle connection is still open and no data has arrived on it.

    Such data would be read as the answer to the next request.
    """
    protocol = connection.protocol
    if protocol is None:
        return False
    transport = protocol.transport
    return transport is not None and not transport.is_closing() and not protocol.should_close


async def exchange(
    connection: Connection, head: bytes, body: bytes, *, head_only: bool, answers: AnswerBytes
) -> tuple[RawResponseMessage, StreamReader, asyncio.Task[None] | None]:
    """Write a request and wait for the head of its answer. Raises `aiohttp.ClientError`.

    Returns the head, the body, and the task that still writes a large request (None if the request is written).
    `head_only` says that the answer has no body. `answers` counts the answer until the response is closed.
    """
    protocol = cast("ResponseProtocol | None", connection.protocol)
    assert protocol is not None and protocol.transport is not None  # noqa: S101  the caller just got the connection
    protocol.is_idle = False
    protocol.set_response_params(
        skip_payload=head_only,
        read_until_eof=True,
        read_bufsize=connecting.READ_AHEAD_BYTES,
        auto_decompress=False,  # the caller gets the bytes as they are; to decompress them would block the event loop
    )
    protocol.account = answers.open(protocol)
    sending = None
    if len(body) <= connecting.SLICE_BYTES:
        protocol.transport.writelines((head, body))
    else:
        protocol.transport.write(head)
        sending = asyncio.ensure_future(_send_slices(protocol, body))
    interim = 0  # interim answers that arrived: the server is alive
    try:
        while True:
            message, content = await protocol.read()
            if not 100 <= message.code < 200 or message.code == 101:
                return message, content, sending
            interim += 1
            if interim > _MAX_INTERIM:
                raise MalformedAnswer  # noqa: TRY301  the handler below closes for it too
    except BaseException as error:
        protocol.account.close()
        if sending is not None:
            sending.cancel()
        if isinstance(error, HttpProcessingError):
            raise MalformedAnswer from error
        if interim and isinstance(error, aiohttp.ClientError):
            raise aiohttp.ClientPayloadError from error  # with this error the request is not sent again
        raise


async def _send_slices(protocol: ResponseHandler, body: bytes) -> None:
    """Write a large body in slices, and wait while the socket's buffer is full.

    If the connection breaks, the error is suppressed here, because the reader of the answer gets it.
    """
    writer = StreamWriter(protocol, asyncio.get_running_loop())
    view = memoryview(body)
    with contextlib.suppress(ConnectionError):
        for start in range(0, len(body), connecting.SLICE_BYTES):
            await writer.write(view[start : start + connecting.SLICE_BYTES])


def abort(connection: Connection) -> None:
    """Close a connection at once and discard the data in its buffers. Does nothing if it was released."""
    if connection.transport is not None:
        connection.transport.abort()
    connection.close()


def broke_before_answer(error: BaseException) -> bool:
    """Return whether the connection broke before an answer began.

    In that case the error's `message` is a text; otherwise aiohttp has put the parsed part of the answer into it. A
    reset carries no such information and counts as "before", because a server that has begun to answer has no reason to
    send a reset.
    """
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return isinstance(error.message, str)
    return isinstance(error, aiohttp.ClientOSError | aiohttp.ClientConnectionResetError)


class Pool(Protocol):
    """Keeps idle connections."""

    def keep(self, connection: Connection) -> None:
        """Store a connection for another request. The answer on it was read to its end."""


class ReceivedResponse:
    """The head of an answer, and its body as it arrives. `_release` is called when the body is complete."""

    __slots__ = ("_account", "_connection", "_pool", "_sending", "_should_close", "content", "headers", "status")

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
        """The task that writes the rest of a large request; None if the request is written."""
        self._should_close = message.should_close
        account = cast("ResponseProtocol", connection.protocol).account
        assert account is not None  # noqa: S101  `exchange` has set it
        self._account = account
        if account.held_bytes:
            account.keep_head(sum(len(name) + len(value) for name, value in self.headers.items()))
        content.on_eof(self._release)

    def _release(self) -> None:
        raise NotImplementedError

    @property
    def held_bytes(self) -> int:
        """See `interface.Response`."""
        return self._account.held_bytes + self._account.uncounted_bytes

    def keep(self, still_held: int) -> None:
        """See `interface.Response`."""
        self._account.keep(still_held)

    async def deliver(self, on_piece: OnPiece) -> bool:
        """See `interface.Response`.

        Each piece is passed to `on_piece` in the connection's own callback, so no task must be woken.
        """
        protocol = None if self._connection is None else cast("ResponseProtocol", self._connection.protocol)
        delivery = _Delivery(self.content, on_piece, self._account)
        if protocol is not None:  # None: the whole body has arrived
            protocol.on_data = delivery.on_data
        delivery.on_data()
        try:
            return await delivery.ended
        finally:
            if protocol is not None:
                protocol.on_data = None
            # An exception in the future refers to this stack frame, and the frame refers to the future: `del` breaks
            # this reference cycle.
            del delivery.ended

    def _drop_content(self) -> None:
        """End an incomplete body with an error, so that it no longer refers to this answer.

        Without this, the body and the answer refer to each other, and both stay in memory.
        """
        if not self.content.is_eof():
            self.content.set_exception(aiohttp.ClientPayloadError())


class _Delivery:
    """Passes the pieces of one body to `on_piece`, in the connection's own callbacks."""

    __slots__ = ("_account", "_busy", "_content", "_on_piece", "ended")

    def __init__(self, content: StreamReader, on_piece: OnPiece, account: AnswerAccount) -> None:
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """The result is True if the body is complete, and False if `on_piece` returned False."""
        self._content = content
        self._on_piece = on_piece
        self._account = account
        self._busy = False

    def on_data(self) -> None:
        """Pass the data that has arrived to `on_piece`."""
        if self._busy or self.ended.done():
            return  # a read below can parse more data, and then this method is called from inside itself
        self._busy = True
        content = self._content
        try:
            seen_bytes = -1
            while seen_bytes < content.total_bytes:
                seen_bytes = content.total_bytes
                piece = content.read_nowait()
                self._account.keep(0)
                if piece and not self._on_piece(piece):
                    self.ended.set_result(False)
                    return
            if content.is_eof():
                self.ended.set_result(True)
        except Exception as error:  # noqa: BLE001  the task that awaits `ended` must get it, not aiohttp
            self.ended.set_exception(error)
        finally:
            self._busy = False
