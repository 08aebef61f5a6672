"""Connections to an upstream: pooled, watched, and asked one thing at a time.

The pool, the protocol and the parser are aiohttp's. Its `ClientSession` is left out: what it does for cookies,
redirects, forms and files is a third of the processor time of a proxied request, and no proxy's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.helpers import _EXC_SENTINEL
from aiohttp.http import HttpProcessingError, StreamWriter
from yarl import URL

from backends.base import Take, Timings
from backends.http1.headers import head_of

if TYPE_CHECKING:
    from aiohttp.connector import AddrInfoType, Connection
    from aiohttp.http import RawResponseMessage

_CONNECT_SECONDS = 5.0
#: Seconds a pooled connection may idle. nginx and the usual load balancers close at 60 to 75.
IDLE_SECONDS = 45.0
#: A connection that has died in the pool shows it within so many seconds of its next use. Later, it was at work.
_UNNOTICED_SECONDS = 2.0
#: Seconds a resolved address is used for new connections: an upstream that moved is found again within this.
_DNS_SECONDS = 10
#: TCP keep-alive as DashScope's own SDK sets it: idle seconds, interval, probes. And the milliseconds after which a
#: connection is dead whose other end confirms nothing of what was sent, which would else be a quarter of an hour. No
#: fewer: a server that is alive but busy leaves the end of a big body unread, and the kernel takes it for the same.
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 45_000))
#: A longer body is written in slices of so many bytes, each when the last has left: TLS would else make a second copy.
_SLICE = 256 * 1024
#: Bytes of an answer that are read ahead of who takes them. A stream whose reader stops holds no more than twice these.
_READ_AHEAD_BYTES = 64 * 1024
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})


class NotHTTP(aiohttp.ClientError):
    """What came back is no HTTP."""


class Connector(aiohttp.TCPConnector):
    """Makes connections, without a limit: admission decides how many. Those that idle are kept by their `Upstream`."""

    def __init__(self) -> None:
        super().__init__(limit=0, ttl_dns_cache=_DNS_SECONDS, socket_factory=_watched_socket)
        self.timeout = aiohttp.ClientTimeout(connect=_CONNECT_SECONDS)
        self._factory = partial(_Protocol, loop=self._loop)  # type: ignore[assignment]  # partial is invariant


class _Protocol(ResponseHandler):
    """A connection."""

    heard: Callable[[], None] | None = None
    """Is told of everything that came, once it is parsed, and of the end."""

    def data_received(self, data: bytes) -> None:
        """Parse what came, and pass it on."""
        super().data_received(data)
        if self.heard is not None:
            self.heard()

    def set_exception(self, exc: BaseException, exc_cause: BaseException = _EXC_SENTINEL) -> None:
        """Tell whoever reads the body, too, which aiohttp does not do."""
        if self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(aiohttp.ClientPayloadError(), exc_cause)
        super().set_exception(exc, exc_cause)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on after a pause. aiohttp calls this after every read of a body, and would parse nothing each time."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Tell whoever reads: aiohttp would take an answer without a length for whole where a reset cut it short."""
        if exc is not None and self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(aiohttp.ClientPayloadError(), exc)
        super().connection_lost(exc)
        if self.heard is not None:
            self.heard()


class Upstream:
    """One base URL, and the way there. To be made in the event loop."""

    def __init__(self, connector: Connector, base: str) -> None:
        """Raises ValueError where the environment names a proxy that cannot be spoken to."""
        url = URL(base)
        proxy = environment_proxy(url)
        self._connector = connector
        self._idle: deque[tuple[Connection, float]] = deque()  # since when, the longest first
        self._timer: asyncio.TimerHandle | None = None  # looks for those that have idled for too long
        self._loop = loop = asyncio.get_running_loop()
        self._clock = loop.time
        self._way = ClientRequest("GET", url, proxy=proxy, loop=loop)  # all that `connect` reads
        self._more = f"\r\nHost: {self._way.headers['Host']}\r\nAccept: */*\r\nAccept-Encoding: identity"
        # A proxy is told the whole URL, but for what it only tunnels.
        whole = proxy is not None and url.scheme == "http"
        self._prefix = (str(url.with_user(None)) if whole else url.raw_path).rstrip("/")

    async def request(self, method: str, path: str, headers: dict[str, str], body: bytes, timings: Timings) -> Response:
        """Send a request and wait for the head of its answer. Raises `aiohttp.ClientError`.

        A pooled connection that breaks before that has died unnoticed while it idled: the request goes out once more,
        on a new one. Cancelled, the connection is closed at once, not after what is still in its send buffer.
        """
        if "Authorization" in self._way.headers:  # a name and a password in the base URL
            headers.setdefault("Authorization", self._way.headers["Authorization"])
        if body or method not in _BODILESS:
            headers["Content-Length"] = str(len(body))
        new_only = False
        while True:
            connection, reused = await self._connect(new_only=new_only)
            timings.work_started = self._clock()
            if "Proxy-Authorization" in self._way.headers:  # the connector has read it from the proxy's URL
                headers["Proxy-Authorization"] = self._way.headers["Proxy-Authorization"]
            try:
                head = head_of(f"{method} {self._prefix}{path} HTTP/1.1", headers, self._more)
                response = await self._ask(connection, method, head, body)
            except BaseException as error:
                _cut(connection)
                soon = self._clock() - timings.work_started < _UNNOTICED_SECONDS
                if not (reused and soon and _died_unnoticed(error)):
                    raise
                new_only = True
            else:
                timings.first_byte = self._clock()
                return response

    async def _connect(self, *, new_only: bool) -> tuple[Connection, bool]:
        """Take a connection that idles or make one; whether it was used before."""
        while self._idle:
            connection, since = self._idle.pop()
            protocol = connection.protocol
            # Where one idle connection was dead, the others are not to be trusted. Nor is one on which something has
            # come while it idled: that would be taken for the answer to this request.
            doubtful = new_only or self._clock() - since > IDLE_SECONDS
            if protocol is not None and protocol.is_connected() and not (doubtful or protocol.should_close):
                return connection, True
            connection.close()
        try:
            return await self._connector.connect(self._way, [], self._connector.timeout), False
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError(f"{self._connector.timeout.connect:g}") from error

    async def _ask(self, connection: Connection, method: str, head: bytes, body: bytes) -> Response:
        """Write a request and wait for the head of its answer."""
        protocol = connection.protocol
        assert protocol is not None and protocol.transport is not None  # noqa: S101  it has just been handed out
        protocol.set_response_params(skip_payload=method == "HEAD", read_until_eof=True, read_bufsize=_READ_AHEAD_BYTES)
        sending = None
        if len(body) <= _SLICE:
            protocol.transport.writelines((head, body))
        else:
            protocol.transport.write(head)
            sending = asyncio.ensure_future(_send_slices(protocol, body))
        heard = False
        try:
            while True:
                message, content = await protocol.read()
                if not 100 <= message.code < 200 or message.code == 101:
                    return Response(self, connection, message, content, sending)
                heard = True
        except BaseException as error:
            if sending is not None:
                sending.cancel()
            if isinstance(error, HttpProcessingError):
                raise NotHTTP from error
            if heard and isinstance(error, aiohttp.ClientError):
                raise aiohttp.ClientPayloadError from error  # it was alive: nothing to send again
            raise

    def keep(self, connection: Connection) -> None:
        """The answer on it is read: it may serve another request."""
        self._idle.append((connection, self._clock()))
        if self._timer is None:
            self._timer = self._loop.call_later(IDLE_SECONDS, self._close_idle)

    def _close_idle(self) -> None:
        while self._idle and self._clock() - self._idle[0][1] >= IDLE_SECONDS:
            self._idle.popleft()[0].close()
        self._timer = self._loop.call_later(IDLE_SECONDS, self._close_idle) if self._idle else None

    def close(self) -> None:
        """Close the connections that idle."""
        if self._timer is not None:
            self._timer.cancel()
        while self._idle:
            self._idle.pop()[0].close()


class Response:
    """An upstream's answer: its head, and its body as it comes. Its connection is free again once that is read."""

    __slots__ = ("_connection", "_sending", "_should_close", "_upstream", "content", "headers", "status")

    def __init__(
        self,
        upstream: Upstream,
        connection: Connection,
        message: RawResponseMessage,
        content: aiohttp.StreamReader,
        sending: asyncio.Task[None] | None,
    ) -> None:
        self.status = message.code
        self.headers = message.headers
        self.content = content
        self._upstream = upstream
        self._connection: Connection | None = connection
        self._sending = sending
        self._should_close = message.should_close
        content.on_eof(self._release)

    @property
    def content_type(self) -> str:
        """The media type, in lower case and without its parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    async def pour(self, take: Take) -> bool:
        """Give the body away as it comes; see `Reply.pour`. Raises `aiohttp.ClientError`."""
        protocol = None if self._connection is None else cast("_Protocol", self._connection.protocol)
        pouring = _Pouring(self.content, take)
        if protocol is not None:  # else all of it has come
            protocol.heard = pouring.go_on
        pouring.go_on()
        try:
            return await pouring.ended
        finally:
            if protocol is not None:
                protocol.heard = None
            del pouring.ended  # an error in it holds the frame that holds it

    def drop(self) -> None:
        """Close the connection at once if it is still ours; that of a body read to its end may serve another by now."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if not self.content.is_eof():  # which would keep us, and we it, to be told of its end
                self.content.set_exception(aiohttp.ClientPayloadError())
            if self._sending is not None:
                self._sending.cancel()
            _cut(connection)

    def _release(self) -> None:
        early = self._sending is not None and not self._sending.done()  # answered before the request was read
        if early or self._should_close:
            self.drop()
        elif self._connection is not None:
            self._upstream.keep(self._connection)
            self._connection = None


class _Pouring:
    """A body on its way to who takes it, in the connection's own callbacks."""

    __slots__ = ("_busy", "_content", "_take", "ended")

    def __init__(self, content: aiohttp.StreamReader, take: Take) -> None:
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Whether the body is whole; False where no more was taken."""
        self._content = content
        self._take = take
        self._busy = False

    def go_on(self) -> None:
        """Give away what is there."""
        if self._busy or self.ended.done():
            return  # to read may let more in, in the midst of it
        self._busy = True
        content = self._content
        try:
            come = -1
            while come < content.total_bytes:
                come = content.total_bytes
                piece = content.read_nowait()
                if piece and not self._take(piece):
                    self.ended.set_result(False)
                    return
            if content.is_eof():
                self.ended.set_result(True)
        except Exception as error:  # noqa: BLE001  who waits has to know, and not aiohttp
            self.ended.set_exception(error)
        finally:
            self._busy = False


async def _send_slices(protocol: ResponseHandler, body: bytes) -> None:
    """Write a big body, waiting whenever the socket is full. Who reads the answer is told of a broken connection."""
    writer = StreamWriter(protocol, asyncio.get_running_loop())
    view = memoryview(body)
    with contextlib.suppress(ConnectionError):
        for start in range(0, len(body), _SLICE):
            await writer.write(view[start : start + _SLICE])


def _cut(connection: Connection) -> None:
    """Close a connection without waiting for what is in its buffers; nothing if it was released."""
    if connection.transport is not None:
        connection.transport.abort()
    connection.close()


def _died_unnoticed(error: BaseException) -> bool:
    """Whether a connection broke before an answer had begun: aiohttp keeps what it had parsed of one.

    After a reset it does not say, but a server that has begun to answer has no reason to send one.
    """
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return isinstance(error.message, str)
    return isinstance(error, aiohttp.ClientOSError | aiohttp.ClientConnectionResetError)


def _watched_socket(address: AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):  # macOS names the first one otherwise
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made


def environment_proxy(url: URL) -> URL | None:
    """The proxy that `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY` name for a URL, as the official SDKs obey them.

    Never for this machine itself. Read once: aiohttp's own `trust_env` asks a thread for it on every request, and
    takes passwords from `~/.netrc`.

    Raises:
        ValueError: the proxy is of a kind that cannot be spoken to.

    """
    host = url.host or ""
    if host in ("localhost", "127.0.0.1", "::1") or proxy_bypass(host):
        return None
    named = getproxies().get(url.scheme)
    if not named:
        return None
    proxy = URL(named)
    if proxy.scheme not in ("http", "https") or not proxy.host:
        raise ValueError(f"{url.scheme.upper()}_PROXY: only http:// and https:// proxies work, not {proxy.scheme}://")
    return proxy
