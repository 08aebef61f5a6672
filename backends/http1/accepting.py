"""The parts of a listener that both HTTP implementations share: time limits in seconds, sizes, addresses."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import sys
import termios
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

import orjson
from aiohttp import HttpVersion, HttpVersion11
from multidict import CIMultiDictProxy

from backends.byte_budget import STALLED_SECONDS, CallersBudget
from backends.http1.connections import Connections

#: Seconds. A connection is closed when it was idle for this time, or when the caller has read nothing of its answer for
#: this time. It is longer than any client's own limit (httpx 5 s, aiohttp 15 s), so that the client closes an idle
#: connection first. If the listener closed first, it could close the connection while the client's next request is on
#: the way.
KEEPALIVE_SECONDS = 75.0
#: Seconds for which a caller may make its answer wait in memory: a whole answer from its beginning to its end, a stream
#: in all its waits together. A local caller reads a whole answer in milliseconds, and the sockets hold some megabytes
#: for it.
SLOW_READER_SECONDS = 10.0
#: Seconds for which the rest of a refused body is read and discarded. If the connection were closed at once, a caller
#: that is still sending would see a reset instead of the answer.
LINGER_SECONDS = 2.0
#: Seconds. A new connection that has sent no complete request head after this time is closed. Otherwise a caller that
#: opens many connections and sends nothing could use up the descriptors of the process.
FIRST_REQUEST_SECONDS = 10.0
#: Seconds. When the listener is closed, requests that are being answered have this time to end.
CLOSING_SECONDS = 1.0
#: Bytes of a request's body that are buffered while the handler does not read. Above this number the listener stops
#: reading from the socket, so the caller must wait. It is about one frame.
READ_BUFFER_BYTES = 256 * 1024
#: Bytes that are read of the requests behind the one that is being answered. Above this number the listener stops
#: reading from the socket until the answer is complete. Hardly any client sends a request before it has the answer to
#: the previous one.
MAX_PIPELINED_BYTES = 64 * 1024
#: Bytes of such requests on all connections of a listener together, and their share of what the connections may hold.
#: They delay nobody else: the connection that exceeds this bound is closed.
MAX_PIPELINED_IN_ALL_BYTES, PIPELINED_SHARE = 16 * 1024 * 1024, 1 / 8
#: Bytes of a request's head at most. Real heads have about 1 kB; aiohttp alone would take 128 headers of 8 kB.
MAX_HEAD_BYTES = 64 * 1024
#: Bytes of memory that each header counts in addition to its text: without them, many heads of 128 short headers would
#: take 60 times the memory that is counted. Measured on CPython 3.11: 250 to 300 bytes.
HEADER_BYTES = 300
#: Seconds. How often a connection that is not read is examined: its caller may have left, which no event shows then.
LOOK_FOR_END_SECONDS = 1.0
#: The states of Linux's `tcp_info` in which the caller has reset or shut its side: TCP_CLOSE and TCP_CLOSE_WAIT.
_ENDED_STATES = (7, 8)
#: Maximum number of connections that the operating system queues until the process accepts them.
BACKLOG = 1024
#: The host that means "every address of this machine", by family. Either of them means the addresses of both families.
_EVERY_ADDRESS = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104
#: The errors of a machine that has no address of a family.
_NO_SUCH_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)
#: How often a free port is chosen, if the port that is free in one family is in use in the other one.
_PORT_TRIES = 20
#: Maximum number of requests that wait on one connection behind the request that is being answered.
MAX_PIPELINED = 32


#: Where a listener holds bytes: heads of requests that are complete, requests that arrive, and requests behind them.
PLACES = ("heads", "receiving", "pipelined")
#: The head of an error that the HTTP layer reports itself. A repetition of the request would fail again.
ERROR_HEADERS = {"Content-Type": "application/json", "X-Should-Retry": "false"}


def error_body(message: str, kind: str, code: str) -> bytes:
    """Return the body of an error that the HTTP layer reports itself, in the format of OpenAI's API."""
    return orjson.dumps({"error": {"message": message, "type": kind, "code": code, "param": None}})


#: The answer to a body that only another transfer coding could read, such as `gzip, chunked`. aiohttp's parser takes it
#: for a chunked body and would hand on its compressed bytes.
UNKNOWN_CODING = error_body(
    "Transfer-Encoding must be chunked and nothing else: send the body without another coding",
    "invalid_request_error",
    "invalid_request",
)


def has_unknown_coding(headers: CIMultiDictProxy[str]) -> bool:
    """Return whether a body has a transfer coding beside `chunked`."""
    codings = headers.get("Transfer-Encoding")
    return codings is not None and codings.strip().lower() != "chunked"


INTERNAL_ERROR = error_body("internal error", "server_error", "internal_error")


def has_ended(transport: asyncio.Transport) -> bool:
    """Return whether the caller has reset the connection, or shut its sending side and the kernel has all its data.

    Where the operating system cannot say it (other than Linux, unix sockets), return False.
    """
    sock = transport.get_extra_info("socket")
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _ENDED_STATES
    except (AttributeError, OSError, ValueError):  # uvloop: ValueError once it is closed
        return False


def head_size(headers: CIMultiDictProxy[str]) -> int:
    """Return the bytes of a head's headers, with `: ` and the end of each line."""
    return sum(len(name) + len(value) + 4 for name, value in headers.items())


def unread_bytes(transport: asyncio.Transport) -> int:
    """Return how many bytes the operating system has received for this connection and the process has not read.

    Where it cannot say so (other than Linux and macOS), return a large number.
    """
    try:
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.FIONREAD, bytes(4))
    except (AttributeError, OSError, ValueError):  # uvloop: ValueError once it is closed
        return sys.maxsize
    return int.from_bytes(answer, sys.byteorder)


class RequestHead:
    """The properties of a request's head and connection that are the same in both implementations."""

    __slots__ = ()
    headers: CIMultiDictProxy[str]
    version: HttpVersion

    def transport(self) -> asyncio.Transport | None:
        """Return the caller's connection; None if it was lost."""
        raise NotImplementedError

    @property
    def content_length(self) -> int | None:
        """The request's `Content-Length` in bytes; None without this header.

        `int` cannot fail, because the parser refuses a value that is not a number.
        """
        length = self.headers.get("Content-Length")
        return None if length is None else int(length)

    @property
    def is_gone(self) -> bool:
        """Whether the caller has closed the connection."""
        transport = self.transport()
        return transport is None or transport.is_closing()

    def cut_off(self) -> None:
        """Close the connection at once. What the caller has not read yet is lost."""
        transport = self.transport()
        if transport is not None:
            transport.abort()

    def send_continue(self) -> None:
        """Send `100 Continue`, if the caller's version of HTTP supports it.

        Raises `ConnectionError` if the caller has closed the connection.
        """
        if self.version >= HttpVersion11:
            transport = self.transport()
            if transport is None or transport.is_closing():
                raise ConnectionResetError("the caller hung up")
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    @property
    def remote(self) -> str:
        """The caller's address; empty for a unix socket."""
        transport = self.transport()
        name = transport.get_extra_info("peername") if transport is not None else None
        return str(name[0]) if name and isinstance(name, tuple) else ""


class Addresses:
    """Opens and closes the addresses of one listener."""

    def __init__(self, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        """`make_protocol` makes the protocol of a new connection."""
        self._make_protocol = make_protocol
        self._servers: list[asyncio.AbstractServer] = []
        self._socket_path: Path | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen on a TCP address and return the port. Raises `OSError`.

        `0.0.0.0` and `::` both mean every address of this machine, of both families. A family that the machine does
        not have is left out.
        """
        loop, host = asyncio.get_running_loop(), host.strip("[]")
        named = next((family for family, every in _EVERY_ADDRESS.items() if every == host), None)
        if named is None:
            server = await loop.create_server(self._make_protocol, host, port, backlog=BACKLOG)
            self._servers.append(server)
            return int(server.sockets[0].getsockname()[1])
        sockets = _sockets_of_every_address(named, port)
        for one in sockets:
            self._servers.append(await loop.create_server(self._make_protocol, sock=one, backlog=BACKLOG))
        return int(sockets[0].getsockname()[1])

    async def open_unix(self, path: Path) -> None:
        """Listen on a unix socket too, and replace a stale one. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_unix_server(self._make_protocol, path, backlog=BACKLOG))
        self._socket_path = path

    def close(self) -> None:
        """Accept no more connections."""
        for server in self._servers:
            server.close()

    async def remove_socket(self) -> None:
        """Remove the unix socket's file."""
        if self._socket_path is not None:
            await asyncio.to_thread(self._socket_path.unlink, missing_ok=True)


def _sockets_of_every_address(named: socket.AddressFamily, port: int) -> list[socket.socket]:
    """Bind one socket for each family, all to the same port. Only the family that was named must exist.

    Two sockets are used, because one socket of IPv6 for both families would show IPv4 callers as `::ffff:10.0.0.7`.
    """
    other = socket.AF_INET if named is socket.AF_INET6 else socket.AF_INET6
    for tries_left in reversed(range(_PORT_TRIES)):
        first = _bound(named, port)
        try:
            return [first, _bound(other, first.getsockname()[1])]
        except OSError as error:
            if error.errno in _NO_SUCH_FAMILY:
                return [first]
            first.close()
            if port or error.errno != errno.EADDRINUSE or not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def _bound(family: socket.AddressFamily, port: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # as asyncio does: a restart can listen while old connections time out
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((_EVERY_ADDRESS[family], port))
    except OSError:
        made.close()
        raise
    return made


class Counted(asyncio.Protocol):
    """A protocol that counts its connection and its bytes, and passes asyncio's events to another protocol."""

    def __init__(
        self,
        inner: asyncio.Protocol,
        connections: Connections[Counted],
        by_transport: dict[asyncio.BaseTransport, Counted],
        budget: CallersBudget,
    ) -> None:
        """The object is in `connections` and in `by_transport` while the connection is open."""
        self._inner, self._connections, self._by_transport, self._budget = inner, connections, by_transport, budget
        self.is_busy, self.idle_since = False, asyncio.get_running_loop().time()
        self.held_bytes = self.bytes_then = 0
        self.holds_since = self.slow_since = 0.0
        self.is_incomplete, self.is_stopped, self.is_large = True, False, False
        self.announced_bytes, self.is_idle = 0, False  # unknown here
        for name in ("eof_received", "pause_writing", "resume_writing"):
            setattr(self, name, getattr(inner, name))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection."""
        self._transport = cast("asyncio.Transport", transport)
        self._by_transport[transport] = self
        self._inner.connection_made(transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting the connection."""
        self._connections.discard(self)
        self.let_go(self.held_bytes)
        del self._by_transport[self._transport]
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the data."""
        self._inner.data_received(data)
        self._budget.add(self, len(data))

    def let_go(self, fewer_bytes: int) -> None:
        """Stop counting bytes that were taken or dropped."""
        self._budget.remove(self, min(fewer_bytes, self.held_bytes))

    @property
    def is_stalled(self) -> bool:
        """See `connections.Held`."""
        now = asyncio.get_running_loop().time()
        return self.is_busy and self.is_incomplete and now - self.slow_since >= STALLED_SECONDS

    def set_stopped(self, *, stopped: bool) -> None:
        """See `byte_budget.Socket`. aiohttp may go on reading earlier, after a pause of its own."""
        with contextlib.suppress(RuntimeError):  # asyncio: the connection is closing
            if stopped:
                self._transport.pause_reading()  # also if it is stopped: aiohttp may have ended the pause
            elif self.is_stopped:
                self._transport.resume_reading()
        self.is_stopped = stopped

    def abort(self) -> None:
        """Close the connection at once."""
        self._transport.abort()

    give_up = refuse = abort

    def hand_over(self) -> int:
        """See `interface.HttpRequest`."""
        own_bytes = self.held_bytes
        self.let_go(own_bytes)
        self.is_incomplete = False
        return own_bytes

    def set_busy(self, *, is_busy: bool) -> None:
        """Record that a request begins or ends."""
        self.is_busy, self.idle_since = is_busy, asyncio.get_running_loop().time()
        if not is_busy:
            self.is_incomplete = True
            self.let_go(self.held_bytes)


async def finish(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Wait for the tasks that answer requests. Cancel those that take longer than `CLOSING_SECONDS`."""
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=CLOSING_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
