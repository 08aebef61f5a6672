"""The contract of an HTTP implementation: everything that the sidecar and the backends use of one.

There are two: `server.py` and `client.py` on aiohttp's internal parts, and `documented.py`. `implementation.py`
chooses between them at start.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from multidict import CIMultiDictProxy

#: Takes a piece of a body. Returns False if it can take no more at present.
OnPiece = Callable[[bytes], bool]


class Body(Protocol):
    """A body that arrives. The reader of a request's body can get `MalformedRequest`, of an answer's `HttpError`."""

    def is_eof(self) -> bool:
        """The whole body has arrived; part of it may be unread."""
        ...

    def read_nowait(self, n: int = -1, /) -> bytes:
        """Give what has arrived and is unread."""
        ...

    async def readany(self) -> bytes:
        """Wait for the next piece; empty at the end."""
        ...

    def iter_any(self) -> AsyncIterator[bytes]:
        """Iterate over the pieces as they arrive."""
        ...


class Answer(Protocol):
    """The answer to one request. The head is sent with the body or with its first piece.

    `write`, `write_whole` and `drain` raise `ConnectionError` if the caller has hung up.
    """

    status: int

    def write_whole(self, body: bytes) -> bool:
        """Write the whole body; whatever is written afterwards is ignored. False: wait for `drain`."""
        ...

    def write(self, piece: bytes) -> bool:
        """Write a piece, or keep it while the caller does not read. False: wait for `drain` before the next one."""
        ...

    def write_eof(self) -> None:
        """End the answer. A second call does nothing."""
        ...

    async def drain(self) -> None:
        """Wait while too much is kept."""
        ...


class HttpRequest(Protocol):
    """A request: its head, and the part of its body that has arrived."""

    keep_alive: bool
    """The connection takes another request after this one. The handler may set it to False before `answer`."""

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The task that answers this request; never None while the handler runs in it."""
        ...

    @property
    def method(self) -> str:
        """The method, such as `POST`."""
        ...

    @property
    def raw_path(self) -> str:
        """The request's target, as it was sent."""
        ...

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        """The headers. Bytes that are not UTF-8 are surrogate escapes."""
        ...

    @property
    def content(self) -> Body:
        """The body."""
        ...

    @property
    def content_length(self) -> int | None:
        """Bytes of the body as it was announced."""
        ...

    @property
    def is_gone(self) -> bool:
        """The caller has hung up."""
        ...

    @property
    def remote(self) -> str:
        """The caller's address; empty for a unix socket."""
        ...

    def send_continue(self) -> None:
        """Send `100 Continue`, if the caller's version of HTTP has it. Raises `ConnectionError`."""
        ...

    def answer(self, status: int, head: dict[str, str], *, length: int | None) -> Answer:
        """Begin the answer; `head`, its headers, belongs to the answer from now on.

        `length` is that of the whole body in bytes; None if the body is written in pieces.
        """
        ...


#: Answers a request. It is cancelled if the caller hangs up.
Handler = Callable[[HttpRequest], Awaitable[Answer]]


class Listener(Protocol):
    """One or several addresses that share one handler."""

    async def open(self, host: str, port: int) -> int:
        """Listen on a TCP address; returns the port. Raises `OSError`."""
        ...

    async def open_unix(self, path: Path) -> None:
        """Listen on a unix socket too, and replace a stale one. Raises `OSError`."""
        ...

    async def close(self) -> None:
        """Stop listening and close every connection. Requests that are being answered have one second."""
        ...


class MakeListener(Protocol):
    """Makes a listener; it is not open yet."""

    def __call__(self, handler: Handler, *, max_connections: int) -> Listener:
        """Take the handler, and the number of connections that may be open at a time."""
        ...


class Timings(Protocol):
    """Where `Origin.request` notes times of the event loop's clock."""

    work_started: float | None
    """The wait for a connection ended."""
    first_byte: float | None
    """The head of the answer arrived."""


class Response(Protocol):
    """An upstream's answer: its head, and its body as it arrives. The connection is free again after the body."""

    @property
    def status(self) -> int:
        """The status code."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers; names compare without regard to case."""
        ...

    @property
    def content(self) -> Body:
        """The body."""
        ...

    @property
    def content_type(self) -> str:
        """The media type, in lower case and without parameters."""
        ...

    async def deliver(self, on_piece: OnPiece) -> bool:
        """Give each piece of the body to `on_piece` as soon as it arrives. Raises `HttpError`.

        Returns True at the end of the body, False after a piece for which `on_piece` returned False.
        """
        ...

    def close_unless_read(self) -> None:
        """Close the connection, unless the whole body was read. To be called when the answer is not needed any more."""
        ...


class Origin(Protocol):
    """One base URL, and the pooled connections to it."""

    async def request(self, method: str, path: str, headers: dict[str, str], body: bytes, timings: Timings) -> Response:
        """Send a request and wait for the head of its answer. Raises `HttpError`.

        `headers` may be changed. Cancelling the call closes the connection.
        """
        ...

    def close(self) -> None:
        """Close the idle connections."""
        ...


class Connector(Protocol):
    """Makes connections, without a limit of their number: admission limits it."""

    def origin(self, base: str) -> Origin:
        """Prepare the way to a base URL. Raises `ValueError` if the environment names a proxy of an unknown kind."""
        ...

    def close(self) -> Awaitable[None]:
        """Close every connection."""
        ...


#: The implementations, as the gauge `sidecar_http_implementation` names them.
Name = Literal["internal", "documented"]
