"""The client of the internal implementation: pooled connections to an upstream, one request at a time on each.

aiohttp's `ClientSession` is not used: its work for cookies, redirects, forms and files costs a third of the processor
time of a proxied request, and a proxy needs none of it. `interface.py` describes what each method must do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from yarl import URL

from backends.http1 import connecting, proxies
from backends.http1.aiohttp_parts import (
    Connection,
    ConnectTarget,
    PartsConnector,
    ReceivedResponse,
    abort,
    broke_before_answer,
    can_be_reused,
    exchange,
    set_idle,
)
from backends.http1.answer_bytes import AnswerBytes
from backends.http1.errors import HttpError, lacks_descriptor
from backends.http1.headers import head_of

if TYPE_CHECKING:
    from backends.http1.interface import Timings

#: Seconds. If a pooled connection breaks within this time after it was taken from the pool, it had died while idle, and
#: the request is sent again. If it breaks later, the server was working on the request.
_DIED_IDLE_SECONDS = 2.0
#: Seconds between two attempts to get a file descriptor.
_DESCRIPTOR_STEP_SECONDS = 0.1
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})


class Connector(PartsConnector):
    """See `interface.Connector`. Each `Origin` keeps its own idle connections."""

    def __init__(self, answers: AnswerBytes | None = None) -> None:
        super().__init__()
        self.answers = answers or AnswerBytes()
        """Counts what arrives."""
        self._origins: list[Origin] = []

    def origin(self, base: str) -> Origin:
        """Return the `Origin` of a base URL. Raises `ValueError` for a proxy of an unknown kind."""
        made = Origin(self, base)
        self._origins.append(made)
        return made

    async def connection_to(self, target: ConnectTarget) -> Connection:
        """Make a connection. Raises `HttpError`.

        If the process has no file descriptor left, close the idle connections and wait until one is free. The upstream
        is not the cause, so this must not look like its failure.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + connecting.CONNECT_SECONDS
        while True:
            try:
                return await self.connect_new(target)
            except HttpError as error:
                if not lacks_descriptor(error) or loop.time() > give_up_at:
                    raise
            for origin in self._origins:
                origin.close_idle()
            await asyncio.sleep(_DESCRIPTOR_STEP_SECONDS)


class Origin:
    """One base URL, and the pooled connections to it. Must be created in the event loop."""

    def __init__(self, connector: Connector, base: str) -> None:
        """Raise `ValueError` if the environment names a proxy of an unknown kind."""
        url = URL(base)
        proxy = proxies.environment_proxy(url)
        self._connector = connector
        self._idle: deque[tuple[Connection, float]] = deque()
        """Idle connections, each with the loop time at which it became idle. The first one has been idle longest."""
        self._timer: asyncio.TimerHandle | None = None  # closes connections that are idle for too long
        self._loop = loop = asyncio.get_running_loop()
        self._clock = loop.time
        self._target = ConnectTarget(url, proxy)
        self._common_headers = f"\r\nHost: {self._target.headers['Host']}\r\nAccept: */*\r\nAccept-Encoding: identity"
        # A proxy needs the whole URL in the request line. For https it only tunnels, so the path is enough.
        whole = proxy is not None and url.scheme == "http"
        self._prefix = (str(url.with_user(None)) if whole else url.raw_path).rstrip("/")

    async def request(self, method: str, path: str, headers: dict[str, str], body: bytes, timings: Timings) -> Response:
        """Send a request and wait for the head of its answer. Raises `HttpError`.

        If a pooled connection breaks before an answer began, it had died while it was idle: the request is sent once
        more, on a new connection. If the call is cancelled, the connection is closed at once, and the data in its send
        buffer is discarded.
        """
        target = self._target
        if "Authorization" in target.headers:  # the base URL contains a user name and a password
            headers.setdefault("Authorization", target.headers["Authorization"])
        if body or method not in _BODILESS:
            headers["Content-Length"] = str(len(body))
        new_only = False
        while True:
            connection, reused = await self._connect(new_only=new_only)
            timings.work_started = self._clock()
            if "Proxy-Authorization" in target.headers:  # the connector took it from the proxy's URL
                headers["Proxy-Authorization"] = target.headers["Proxy-Authorization"]
            try:
                head = head_of(f"{method} {self._prefix}{path} HTTP/1.1", headers, self._common_headers)
                message, content, sending = await exchange(
                    connection, head, body, head_only=method == "HEAD", answers=self._connector.answers
                )
                response = Response(self, connection, message, content, sending)
            except BaseException as error:
                abort(connection)
                soon = self._clock() - timings.work_started < _DIED_IDLE_SECONDS
                if not (reused and soon and broke_before_answer(error)):
                    raise
                timings.resends += 1
                new_only = True
            else:
                timings.first_byte = self._clock()
                return response

    async def _connect(self, *, new_only: bool) -> tuple[Connection, bool]:
        """Return a connection, and whether it was used before.

        With `new_only`, close all idle connections and make a new one: one idle connection was dead, so the others
        probably are too.
        """
        while self._idle:
            connection, since = self._idle.pop()
            too_old = self._clock() - since > connecting.IDLE_SECONDS
            if not (new_only or too_old) and can_be_reused(connection):
                return connection, True
            connection.close()
        return await self._connector.connection_to(self._target), False

    def keep(self, connection: Connection) -> None:
        """Store a connection for another request. The answer on it was read to its end."""
        set_idle(connection)
        self._idle.append((connection, self._clock()))
        if self._timer is None:
            self._timer = self._loop.call_later(connecting.IDLE_SECONDS, self._close_idle)

    def _close_idle(self) -> None:
        while self._idle and self._clock() - self._idle[0][1] >= connecting.IDLE_SECONDS:
            self._idle.popleft()[0].close()
        self._timer = self._loop.call_later(connecting.IDLE_SECONDS, self._close_idle) if self._idle else None

    def close(self) -> None:
        """Close the idle connections."""
        if self._timer is not None:
            self._timer.cancel()
        self.close_idle()

    def close_idle(self) -> None:
        """Close the idle connections; new ones can follow."""
        while self._idle:
            self._idle.pop()[0].close()


class Response(ReceivedResponse):
    """An upstream's answer. Its connection is free again after the body was read."""

    __slots__ = ()

    @property
    def content_type(self) -> str:
        """The media type, in lower case and without parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    def close_unless_read(self) -> None:
        """Close the connection at once. If the body was read, the connection is already pooled or closed.

        The answer is no longer counted.
        """
        self._account.close()
        self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._drop_content()
            if self._sending is not None:
                self._sending.cancel()
            abort(connection)

    def _release(self) -> None:
        self._account.complete()
        early = self._sending is not None and not self._sending.done()  # the request is not yet written
        if early or self._should_close:
            self._disconnect()
        elif self._connection is not None:
            self._pool.keep(self._connection)
            self._connection = None
