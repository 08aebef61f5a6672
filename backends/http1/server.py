"""One HTTP listener: aiohttp's parser and flow control, and nothing between them and the handler.

No router, no middlewares, no object of aiohttp's for each request and answer, and one task for what a connection sends
at a time. What is no HTTP gets one JSON answer, and no traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson
from aiohttp import EMPTY_PAYLOAD, ClientPayloadError, StreamReader
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpProcessingError, HttpRequestParser, RawRequestMessage
from aiohttp.tcp_helpers import tcp_keepalive

from backends.http1.headers import head_of
from backends.http1.response import Answer

log = logging.getLogger("sidecar")

#: A connection that was idle for so long is closed, and one whose caller takes nothing of an answer for so long. Longer
#: than any client's own limit (httpx 5 s, aiohttp 15 s), so that it is the client who closes, and never under a request
#: that is on its way.
KEEPALIVE_SECONDS = 75.0
#: Seconds for which the rest of a refused body is read and thrown away: a caller who is still sending sees a reset
#: instead of the answer if the connection is closed under it.
LINGER_SECONDS = 2.0
#: Bytes that a connection's reader holds before the sender has to wait: a frame's worth.
READ_BUFFER_BYTES = 256 * 1024
#: A new connection that has sent no whole request head after so many seconds is closed: who opens many and says nothing
#: must not use up the process's descriptors.
FIRST_REQUEST_SECONDS = 10.0
#: Connections that the system keeps for us until we have taken them.
BACKLOG = 1024
#: Requests that may wait on one connection for the answer to the one before them.
MOST_PIPELINED = 32
#: Seconds that requests under way have to end when the listener is closed.
CLOSING_SECONDS = 1.0


class HttpRequest:
    """A request as it came: its head, and its body as far as it is there."""

    __slots__ = ("begun", "connection", "content", "headers", "keep_alive", "method", "raw_path", "version")

    def __init__(self, message: RawRequestMessage, content: StreamReader, connection: Connection) -> None:
        self.method = message.method
        self.raw_path = message.path
        self.version = message.version
        self.headers = message.headers
        self.content = content
        self.connection = connection
        # The parser adds the trailers behind the chunks of a body to the headers of the next request.
        self.keep_alive = not (message.should_close or message.chunked)
        """The connection takes another request after this one. Who answers may decide against it."""
        self.begun = False
        """A part of the answer is on its way."""

    @property
    def content_length(self) -> int | None:
        """Bytes of the body as it was announced; the parser has seen that it is a number."""
        length = self.headers.get("Content-Length")
        return None if length is None else int(length)

    @property
    def is_gone(self) -> bool:
        """The caller has hung up."""
        transport = self.connection.transport
        return transport is None or transport.is_closing()

    @property
    def remote(self) -> str:
        """The caller's address; empty for one on a unix socket."""
        transport = self.connection.transport
        name = transport.get_extra_info("peername") if transport is not None else None
        return str(name[0]) if name and isinstance(name, tuple) else ""


#: Answers a request.
Handler = Callable[[HttpRequest], Awaitable[Answer]]


class NotHTTP(Exception):
    """What came is no HTTP. It says why without a byte of it, which may be one of a key."""

    def __init__(self, error: HttpProcessingError) -> None:
        super().__init__(
            f"this is not a valid HTTP request ({type(error).__name__}): this port speaks plain HTTP, without TLS"
        )


class Connection(BaseProtocol):
    """A caller's connection. Its requests are answered one after the other; the handler is cancelled if it breaks."""

    __slots__ = ("_closes_at", "_deaf", "_incoming", "_listener", "_timer", "_waiting", "task")

    def __init__(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        parser = HttpRequestParser(
            self,
            loop,
            READ_BUFFER_BYTES,
            payload_exception=ClientPayloadError,
            auto_decompress=False,
            max_msg_queue_size=1 + MOST_PIPELINED,  # and the one that is being answered
        )
        super().__init__(loop, parser)
        self.task: asyncio.Task[None] | None = None
        """Answers what has come; None while there is nothing to answer."""
        self._listener = listener
        self._waiting: deque[tuple[RawRequestMessage | NotHTTP, StreamReader]] = deque()
        self._incoming: StreamReader = EMPTY_PAYLOAD  # the body of the last of them
        self._deaf = False  # what follows is not understood

    # -- in ------------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start to wait for the first request; close at once what is one connection too many."""
        super().connection_made(transport)
        assert self.transport is not None  # noqa: S101  it has just been set
        tcp_keepalive(self.transport)
        self._closes_at = self._loop.time() + FIRST_REQUEST_SECONDS
        self._timer = self._loop.call_at(self._closes_at, self._close_if_idle)
        self._listener.connections.add(self)
        if len(self._listener.connections) > self._listener.most_connections:
            self.transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Cancel the handler: there is nobody to answer."""
        super().connection_lost(exc)
        self._timer.cancel()
        self._listener.connections.discard(self)
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse what came, and see that it is answered."""
        if self._deaf:
            return
        assert self._parser is not None  # noqa: S101  it was made with one
        try:
            messages, self._deaf, _ = self._parser.feed_data(data)  # deaf: it would go on in another protocol
        except HttpProcessingError as error:
            self._deaf = True
            if not self._incoming.is_eof():
                self._incoming.set_exception(NotHTTP(error))  # who reads it has an answer to write
                return
            messages = [(NotHTTP(error), EMPTY_PAYLOAD)]
        if messages:
            self._incoming = messages[-1][1]
            self._waiting.extend(messages)
            if len(self._waiting) >= MOST_PIPELINED and not self._buffer_paused:
                self._pause_reading_for_buffer()
            if self.task is None:
                self.task = self._loop.create_task(self._answer_all())

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on after a pause. aiohttp calls this after every read of a body, and would parse nothing each time."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def pause_writing(self) -> None:
        """Too much is kept that the caller does not take: see `drain`."""
        super().pause_writing()
        self._closes_at = self._loop.time() + KEEPALIVE_SECONDS

    def _close_if_idle(self) -> None:
        now = self._loop.time()
        if self.task is not None and not self.writing_paused:
            self._closes_at = now + KEEPALIVE_SECONDS
        if now < self._closes_at:
            self._timer = self._loop.call_at(self._closes_at, self._close_if_idle)
        elif self.transport is not None:
            self.transport.abort()

    # -- through -------------------------------------------------------------------------------------------------------

    async def _answer_all(self) -> None:
        """Answer what has come, and whatever comes meanwhile."""
        goes_on = True
        try:
            while self._waiting and goes_on:
                goes_on = False
                goes_on = await self._answer_one(*self._waiting.popleft())
        except (ConnectionError, asyncio.CancelledError):
            pass  # the caller hung up; a task that ended so would keep the error, and with it all that was under way
        finally:
            self.task = None
            self._closes_at = self._loop.time() + KEEPALIVE_SECONDS
            if not (goes_on and self._listener.is_open) and self.transport is not None:
                self.transport.close()

    async def _answer_one(self, message: RawRequestMessage | NotHTTP, content: StreamReader) -> bool:
        """Answer a request, or what is none; whether the connection can take another."""
        if isinstance(message, NotHTTP):
            self._refuse("400 Bad Request", "invalid_request", "invalid_request_error", str(message))
            return False
        http = HttpRequest(message, content, self)
        if self._deaf and not self._waiting:
            http.keep_alive = False
        try:
            await self._listener.handler(http)
        except ConnectionError:
            raise
        except Exception:
            log.exception("a defect in the sidecar")
            if not http.begun:
                self._refuse("500 Internal Server Error", "internal_error", "server_error", "internal error")
            return False
        if not content.is_eof():
            await self._linger(content)
        if not (http.keep_alive and content.is_eof()):
            return False
        self._make_room()
        return True

    def _make_room(self) -> None:
        """
        One request less is here: let the parser find the next one, where it had to stop.

        Not before its body is whole: only then does the parser count it, and one that is taken off before counts for
        ever.
        """
        assert self._parser is not None  # noqa: S101  it was made with one
        self._parser.message_consumed()
        if self._buffer_paused and len(self._waiting) <= MOST_PIPELINED // 2:
            self.data_received(b"")  # while it is still marked as paused: it may be full again
            if len(self._waiting) < MOST_PIPELINED:
                self._resume_reading_for_buffer()

    async def _linger(self, content: StreamReader) -> None:
        """Read the rest of a refused body and throw it away."""
        with contextlib.suppress(TimeoutError, NotHTTP):
            async with asyncio.timeout(LINGER_SECONDS):
                while await content.readany():
                    pass

    # -- out -----------------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write, or keep what the caller does not take yet: see `drain`. Raises `ConnectionError` if it hung up."""
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError("the caller hung up")
        self.transport.write(data)

    async def drain(self) -> None:
        """Wait while too much is kept that the caller does not take. Raises `ConnectionError` if it hung up."""
        try:
            await self._drain_helper()
        finally:
            self._drain_waiter = None  # aiohttp leaves a cancelled one there, and who waits next is cancelled too

    def _refuse(self, status: str, code: str, kind: str, message: str) -> None:
        body = orjson.dumps({"error": {"message": message, "type": kind, "code": code, "param": None}})
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        self.write(head_of(f"HTTP/1.1 {status}", headers) + body)


class Listener:
    """Addresses that share one handler."""

    def __init__(self, handler: Handler, *, most_connections: int) -> None:
        self.handler = handler
        self.most_connections = most_connections
        self.connections: set[Connection] = set()
        self.is_open = True
        self._servers: list[asyncio.AbstractServer] = []
        self._socket_path: Path | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen on a TCP address; returns the port. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(self, loop), host, port, backlog=BACKLOG)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def open_unix(self, path: Path) -> None:
        """Listen on a unix socket too, in the place of a stale one. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_unix_server(lambda: Connection(self, loop), path, backlog=BACKLOG))
        self._socket_path = path

    async def close(self) -> None:
        """Stop listening and close every connection; requests under way have a second."""
        self.is_open = False
        for server in self._servers:
            server.close()
        tasks = [connection.task for connection in self.connections if connection.task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CLOSING_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for connection in self.connections:
            if connection.transport is not None:
                connection.transport.close()
        if self._socket_path is not None:
            await asyncio.to_thread(self._socket_path.unlink, missing_ok=True)
