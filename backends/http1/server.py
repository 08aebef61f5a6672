"""The listener of the internal implementation: it uses aiohttp's parser and flow control, and calls the handler.

It uses no router, middleware or request object of aiohttp. One task answers all waiting requests of a connection. Data
that is not HTTP gets one JSON answer without a traceback. `interface.py` describes what each method must do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from math import inf

from backends.byte_budget import STALLED_SECONDS, CallersBudget
from backends.http1 import accepting
from backends.http1.aiohttp_parts import (
    EMPTY_PAYLOAD,
    HttpProcessingError,
    ParsedRequest,
    RawRequestMessage,
    RequestProtocol,
    StreamReader,
    is_head_too_large,
    tcp_keepalive,
)
from backends.http1.answer_bytes import AnswerBytes
from backends.http1.connections import Connections, OnFull
from backends.http1.errors import MalformedRequest, RefusedBody, stalled_body, tiny_chunks, too_many_bodies
from backends.http1.headers import head_of
from backends.http1.response import Answer

log = logging.getLogger("sidecar")


class HttpRequest(ParsedRequest, accepting.RequestHead):
    """See `interface.HttpRequest`."""

    __slots__ = ()

    connection: Connection

    def transport(self) -> asyncio.Transport | None:
        """Return the caller's connection; None if it was lost."""
        return self.connection.transport

    @property
    def caller_has_left(self) -> bool:
        """See `interface.HttpRequest`."""
        return self.connection.caller_has_left

    def hand_over(self) -> int:
        """See `interface.HttpRequest`."""
        return self.connection.let_go_of_request()

    def answer(self, status: int, headers: dict[str, str], *, length: int | None) -> Answer:
        """Begin the answer."""
        return Answer(self, status, headers, length=length)


#: Bytes beside a body that arrive at once. Of fewer, the size of its chunks does not matter.
_MANY_BYTES = 32 * 1024
#: Bytes. A head that is not longer is not measured.
_USUAL_HEAD_BYTES = 2048

_Messages = Sequence[tuple[RawRequestMessage | MalformedRequest, StreamReader]]
#: The type `interface.Handler` for the requests of this implementation.
Handler = Callable[[HttpRequest], Awaitable[object]]


class Connection(RequestProtocol):
    """A caller's connection. Its requests are answered one after the other.

    If the connection breaks, the handler is cancelled. It is also cancelled if the caller shuts its sending side (FIN)
    during a request, except a GET or HEAD: see `eof_received`.
    """

    __slots__ = (
        "_announced_bytes", "_chunked", "_closes_at", "_counted_before", "_counted_bytes", "_current", "_end_timer",
        "_head_bytes", "_incoming", "_listener", "_stopped", "_timer", "behind_bytes", "bytes_then", "caller_has_left",
        "held_bytes", "holds_since", "idle_since", "is_large", "slow_since",
    )  # fmt: skip

    def __init__(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop, buffer_bytes=accepting.READ_BUFFER_BYTES, max_pipelined=accepting.MAX_PIPELINED)
        self._listener = listener
        self._incoming: StreamReader = EMPTY_PAYLOAD  # the body of the last request that has arrived
        self._chunked = False  # whether `_incoming` arrives in chunks
        self._stopped = False  # if True, the data that follows is not parsed
        self._current: HttpRequest | None = None  # the request that is being answered
        self.held_bytes = self.bytes_then = self._announced_bytes = 0
        self.is_large = False
        self.holds_since = self.slow_since = 0.0
        self._head_bytes = 0  # bytes received of a head that is not complete
        self.behind_bytes = 0
        """Those of `held_bytes` that belong to the requests behind the one that is being answered."""
        self._counted_bytes = 0  # the bytes that `behind_bytes` has ever counted
        self._counted_before: deque[int] = deque()  # for each element of `waiting`: the same, before its head arrived
        self._end_timer: asyncio.TimerHandle | None = None  # looks for the end of a connection that is not read
        self.caller_has_left = False
        """Whether the caller has shut its sending side. Then no work may begin whose answer takes time."""

    # -- in ------------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the timer for the first request. If there are too many connections, one of them is closed."""
        super().connection_made(transport)
        assert self.transport is not None  # noqa: S101  it has just been set
        tcp_keepalive(self.transport)
        self.idle_since = self.loop.time()
        self._closes_at = self.idle_since + accepting.FIRST_REQUEST_SECONDS
        self._timer = self.loop.call_at(self._closes_at, self._close_if_idle)
        self._listener.connections.add(self)
        if self._listener.budget.stops(self):
            self.loop.call_soon(self._stop_if_full)  # uvloop reads a socket that is stopped in this callback

    def _stop_if_full(self) -> None:
        if self.transport is not None:
            self.set_stopped(stopped=self._listener.budget.stops(self))

    def connection_lost(self, exc: BaseException | None) -> None:
        """Cancel the handler, because nobody can receive its answer."""
        super().connection_lost(exc)
        self._timer.cancel()
        self._listener.slow_readers.discard(self)
        if self._end_timer is not None:
            self._end_timer.cancel()
        self._set_behind(0)
        self.let_go(self.held_bytes)
        self._listener.connections.discard(self)
        if self.task is not None:
            self.task.cancel()
        self._stopped, self._incoming = True, EMPTY_PAYLOAD
        self.waiting.clear()
        self._counted_before.clear()
        self.forget_parser()

    def data_received(self, data: bytes) -> None:
        """Parse the data, and start the task that answers."""
        if self._stopped:
            return
        incoming = self._incoming
        in_head = incoming.is_eof()  # the data begins within a head
        had_bytes = 0 if in_head else incoming.total_bytes
        is_behind = self.task is not None and (in_head or len(self.waiting) > (self._current is None))
        messages: _Messages
        try:
            messages, self._stopped, _ = self.feed(data)  # `_stopped`: the caller asks for another protocol
        except HttpProcessingError as error:
            self._stopped = True
            if not in_head:
                # The handler that reads this body gets the error and writes the answer.
                incoming.set_exception(MalformedRequest(error))
                return
            malformed = MalformedRequest(error, head_too_large=is_head_too_large(error))
            messages = [(malformed, EMPTY_PAYLOAD)]
        body_bytes = 0 if in_head else incoming.total_bytes - had_bytes
        size = len(data)
        for message, content in messages:
            if not isinstance(message, MalformedRequest):
                size += accepting.HEADER_BYTES * len(message.headers)
                self._chunked = message.chunked
            if content is not EMPTY_PAYLOAD:
                body_bytes += content.total_bytes
        if len(data) - body_bytes > _USUAL_HEAD_BYTES or (in_head and not messages):
            messages = self._look_at_heads(messages, len(data) - body_bytes, body_bytes, in_head=in_head)
        elif messages:
            self._head_bytes = 0
        if messages:
            last, self._incoming = messages[-1]
            self._announced_bytes = 0
            if not (isinstance(last, MalformedRequest) or self._incoming.is_eof()):
                self._announced_bytes = int(last.headers.get("Content-Length", 0))
            self.waiting.extend(messages)
            self._counted_before.extend([self._counted_bytes] * len(messages))
            if len(self.waiting) >= self._max_pipelined:
                self.pause_while_full()
            if self.task is None:
                self.task = self.loop.create_task(self._answer_all())
        self._listener.budget.add(self, size)
        if is_behind or len(self.waiting) > (self._current is None):
            self._count_pipelined(size)
        elif self._head_bytes and self.task is not None:
            self._count_pipelined(self._head_bytes)

    def _look_at_heads(self, messages: _Messages, beside_bytes: int, body_bytes: int, *, in_head: bool) -> _Messages:
        """Look closer at data of which many bytes are in no body. Return its messages, or the error that ends them.

        Measure the part of a head at its end. Lines can end in several ways, so less than a usual head counts as none.
        """
        heads = []
        for message, _ in messages:
            if isinstance(message, MalformedRequest):
                return messages
            heads.append(accepting.head_size(message.headers) + len(message.path) + len("POST  HTTP/1.1\r\n\r\n"))
        last = messages[-1][1] if messages else self._incoming
        is_cut = len(self.waiting) + len(messages) >= self._max_pipelined  # then the parser keeps the rest
        behind_bytes = 0 if is_cut else beside_bytes - sum(heads)
        if in_head and not messages:
            self._head_bytes += beside_bytes
        elif self._chunked:
            self._head_bytes = 0
            if behind_bytes > max(_MANY_BYTES, 3 * body_bytes):
                self._stopped = True
                last.set_exception(tiny_chunks())
        else:
            self._head_bytes = behind_bytes if last.is_eof() and behind_bytes > _USUAL_HEAD_BYTES else 0
        if max(self._head_bytes, *heads, 0) > accepting.MAX_HEAD_BYTES:
            self._stopped = True
            return [(MalformedRequest(None, head_too_large=True), EMPTY_PAYLOAD)]
        return messages

    def _count_pipelined(self, more_bytes: int) -> None:
        self._counted_bytes += more_bytes
        self._set_behind(self.behind_bytes + more_bytes)
        if self._listener.pipelined_bytes > self._listener.max_pipelined_bytes and self.transport is not None:
            self.transport.abort()
        elif self.behind_bytes > accepting.MAX_PIPELINED_BYTES:
            self.pause_while_full()

    def _set_behind(self, behind_bytes: int) -> None:
        self._listener.pipelined_bytes += behind_bytes - self.behind_bytes
        self.behind_bytes = behind_bytes

    def let_go_of_request(self) -> int:
        """Stop counting the request that is being answered. Return its bytes."""
        own_bytes = self.held_bytes - self.behind_bytes
        self._listener.budget.remove(self, own_bytes)
        return own_bytes

    def let_go(self, fewer_bytes: int) -> None:
        """Stop counting bytes that were taken or dropped."""
        self._listener.budget.remove(self, min(fewer_bytes, self.held_bytes))

    @property
    def is_incomplete(self) -> bool:
        """See `byte_budget.Socket`."""
        return self.task is None or not self._incoming.is_eof() or self.behind_bytes > 0

    @property
    def announced_bytes(self) -> int:
        """See `byte_budget.Caller`."""
        return self._announced_bytes

    @property
    def is_idle(self) -> bool:
        """See `byte_budget.Caller`. Its peer goes on sending if the kernel holds much, or all that is missing.

        Requests behind one that is being answered hinder themselves.
        """
        if self.transport is None or self.behind_bytes:
            return True
        missing_bytes = _MANY_BYTES
        if self.task is not None and self._announced_bytes:
            missing_bytes = min(self._announced_bytes - self._incoming.total_bytes, missing_bytes)
        return accepting.unread_bytes(self.transport) < missing_bytes

    @property
    def is_stalled(self) -> bool:
        """See `connections.Held`."""
        return self.is_incomplete and self.loop.time() - self.slow_since >= STALLED_SECONDS

    def set_stopped(self, *, stopped: bool) -> None:
        """See `byte_budget.Socket`."""
        if stopped is not self.is_stopped:
            self.is_stopped = stopped
            if stopped:
                self.pause_while_full()
            else:
                self.read_unless_full()

    def give_up(self) -> None:
        """See `byte_budget.Socket`. The handler that reads the body writes the answer."""
        if not (self._incoming.is_eof() or self.behind_bytes):
            self._refuse_body(stalled_body())
        elif self.transport is not None:
            self.transport.abort()  # a part of a head, or requests behind one that is being answered

    def refuse(self) -> None:
        """See `byte_budget.Caller`."""
        if not self._incoming.is_eof():
            self._refuse_body(too_many_bodies())

    def _refuse_body(self, why: RefusedBody) -> None:
        self._stopped = True
        self._incoming.set_exception(why)

    def pause_reading(self) -> None:
        """Stop reading the socket: a body is read too slowly."""
        super().pause_reading()
        self._look_for_end_later()

    def pause_while_full(self) -> None:
        """Stop reading the socket: as much as allowed is waiting."""
        super().pause_while_full()
        self._look_for_end_later()

    def _look_for_end_later(self) -> None:
        """While the socket is not read, look from time to time whether the caller has left: no event shows it."""
        if self._end_timer is None:
            self._end_timer = self.loop.call_later(accepting.LOOK_FOR_END_SECONDS, self._look_for_end)

    def _look_for_end(self) -> None:
        self._end_timer = None
        if self.transport is None or self.task is None or not self.is_paused:
            return
        if accepting.has_ended(self.transport):
            self.caller_has_left = True
            self._close_unless_reading()
        else:
            self._look_for_end_later()

    def eof_received(self) -> bool:
        """Keep the connection for answers that can be given at once. Return False to close it.

        Some callers shut their sending side after a request and wait for the answer, for example `nc -N`. Most callers
        that do so have left. Only a read (GET, HEAD) is worth its wait, unless its answer is a stream that has begun.
        An error of another request is ready at once.
        """
        self.caller_has_left = True
        if self.task is None or not self._incoming.is_eof():
            return False
        self.loop.call_soon(self._close_unless_reading)  # after the first step of a task that was created just now
        return True

    def _close_unless_reading(self) -> None:
        http = self._current
        is_worth_its_wait = http is not None and http.method in ("GET", "HEAD") and not http.has_begun
        if self.task is not None and not is_worth_its_wait and self.transport is not None:
            self.transport.close()  # what is written already is still sent; `connection_lost` cancels the handler

    def pause_writing(self) -> None:
        """Count what a caller has not read: its socket accepts nothing more at present."""
        super().pause_writing()
        self._closes_at = self.loop.time() + accepting.KEEPALIVE_SECONDS
        if self.transport is not None:
            unread_bytes = max(self.transport.get_write_buffer_size(), self.body_bytes)
            self._listener.slow_readers.add(self, unread_bytes)

    def resume_writing(self) -> None:
        """Let the next write begin: the caller's socket has accepted everything."""
        super().resume_writing()
        if not self.body_bytes:
            self.all_is_read()

    def all_is_read(self) -> None:
        """Stop counting: the caller has read all that was written."""
        self._listener.slow_readers.discard(self)

    @property
    def is_busy(self) -> bool:
        """See `connections.Held`."""
        return self.task is not None

    def abort(self) -> None:
        """See `connections.Held`."""
        if self.transport is not None:
            self.transport.abort()

    def _close_if_idle(self) -> None:
        now = self.loop.time()
        if self.task is not None and not self.writing_paused:
            self._closes_at = now + accepting.KEEPALIVE_SECONDS
        elif self.is_stopped:  # it may have sent a request that is not read yet
            self._closes_at = now + accepting.FIRST_REQUEST_SECONDS
        if now < self._closes_at:
            self._timer = self.loop.call_at(self._closes_at, self._close_if_idle)
        elif self.transport is not None:
            self.transport.abort()

    # -- through -------------------------------------------------------------------------------------------------------

    async def _answer_all(self) -> None:
        """Answer the requests that have arrived, and the requests that arrive in the meantime."""
        keeps_alive = True
        try:
            while self.waiting and keeps_alive:
                keeps_alive = False
                message, counted_before = self.waiting.popleft(), self._counted_before.popleft()
                if self.behind_bytes:  # what arrived before this request is answered
                    self._set_behind(self._counted_bytes - counted_before if self.waiting else self._head_bytes)
                keeps_alive = await self._answer_one(*message)
                if self.behind_bytes:
                    others_before = self._counted_before[0] if self._counted_before else None
                    self._set_behind(self._head_bytes if others_before is None else self._counted_bytes - others_before)
                if self.held_bytes > self.behind_bytes:
                    self.let_go_of_request()
        except (ConnectionError, asyncio.CancelledError):
            # The caller closed the connection. The error is dropped here: a task that ends with an exception keeps the
            # exception, and everything to which it refers, in memory.
            pass
        finally:
            self.task = self._current = None
            self.idle_since = self.loop.time()
            self._closes_at = self.idle_since + accepting.KEEPALIVE_SECONDS
            keeps_alive = keeps_alive and self._listener.is_open and not self.caller_has_left
            if not keeps_alive and self.transport is not None:
                self.transport.close()

    async def _answer_one(self, message: RawRequestMessage | MalformedRequest, content: StreamReader) -> bool:
        """Answer one request, or malformed data. Return whether the connection can take another request."""
        if isinstance(message, MalformedRequest):
            body = accepting.error_body(str(message), "invalid_request_error", message.code)
            self._refuse(message.status, body, accepting.ERROR_HEADERS)
            await self._discard()
            return False
        if accepting.has_unknown_coding(message.headers):
            self._refuse(400, accepting.UNKNOWN_CODING, accepting.ERROR_HEADERS)
            return False
        http = HttpRequest(message, content, self)
        self._current = http
        if self.caller_has_left:
            self.loop.call_soon(self._close_unless_reading)
        if self._stopped and not self.waiting:
            http.keep_alive = False
        try:
            await self._listener.handler(http)
        except ConnectionError:
            raise
        except Exception:
            log.exception("a defect in the sidecar")
            if not http.has_begun:
                self._refuse(500, accepting.INTERNAL_ERROR, {"Content-Type": "application/json"})
            return False
        if content.exception() is not None:
            await self._discard()
        elif not content.is_eof():
            await self._linger(content)
        if not (http.keep_alive and content.is_eof()):
            return False
        self.request_done()
        return True

    async def _linger(self, content: StreamReader) -> None:
        """Read and discard the rest of a refused body."""
        with contextlib.suppress(TimeoutError, MalformedRequest, RefusedBody):
            async with asyncio.timeout(accepting.LINGER_SECONDS):
                while piece := await content.readany():
                    self.let_go(len(piece))

    async def _discard(self) -> None:
        """Discard what follows on a connection whose data is no longer parsed. The caller's end cancels this."""
        self.let_go(self.held_bytes)
        if self.transport is not None:
            with contextlib.suppress(OSError):  # the caller has just left
                self.transport.write_eof()
            await asyncio.sleep(accepting.LINGER_SECONDS)

    # -- out -----------------------------------------------------------------------------------------------------------

    def _refuse(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        headers = {**headers, "Content-Length": str(len(body)), "Connection": "close"}
        self.write(head_of(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", headers) + body)


class Listener:
    """See `interface.Listener`. Must be created in the event loop."""

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
        self.handler = handler
        self.loop = asyncio.get_running_loop()
        self.slow_readers = (answers or AnswerBytes()).slow_readers
        self.connections: Connections[Connection] = Connections(
            max_connections, closes_busy=closes_busy, on_full=on_full
        )
        self.close_idle = self.connections.close_idle
        self.budget = CallersBudget(max_held_bytes, self.connections)
        self.pipelined_bytes = 0
        """Bytes of requests behind those that are being answered. The connection that exceeds their bound is closed."""
        self.max_pipelined_bytes = min(accepting.PIPELINED_SHARE * max_held_bytes, accepting.MAX_PIPELINED_IN_ALL_BYTES)
        self.is_open = True
        self._addresses = accepting.Addresses(lambda: Connection(self, self.loop))
        self.open, self.open_unix = self._addresses.open, self._addresses.open_unix

    def held_bytes(self) -> dict[str, int]:
        """See `interface.Listener`."""
        held: dict[str, int] = dict.fromkeys(accepting.PLACES, 0)
        for connection in self.connections:
            held["pipelined"] += connection.behind_bytes
            held["receiving" if connection.is_incomplete else "heads"] += (
                connection.held_bytes - connection.behind_bytes
            )
        return held

    async def close(self) -> None:
        """Stop listening and close every connection. Requests that are being answered have one second."""
        self.is_open = False
        self._addresses.close()
        await accepting.finish([connection.task for connection in self.connections if connection.task is not None])
        for connection in self.connections:
            if connection.transport is not None:
                connection.transport.close()
        await self._addresses.remove_socket()
