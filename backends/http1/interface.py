"""The contract of an HTTP implementation: everything that the sidecar and the backends use of an implementation.

There are two implementations: `server.py` with `client.py` uses aiohttp's internal parts, and `documented.py` uses only
aiohttp's documented interface. `implementation.py` chooses between them at start.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from math import inf
from pathlib import Path
from typing import Any, Literal, Protocol

from multidict import CIMultiDictProxy

from backends.byte_budget import CallersBudget
from backends.http1.answer_bytes import AnswerBytes
from backends.http1.connections import OnFull

#: A callback that consumes one piece of a body. It returns False if it cannot consume more at present.
OnPiece = Callable[[bytes], bool]


class Body(Protocol):
    """A body while it arrives.

    Reading the body of a request can raise `MalformedRequest` or `RefusedBody`; reading the body of an answer can raise
    `HttpError`.
    """

    def is_eof(self) -> bool:
        """Return whether the whole body has arrived. A part of it may be unread."""
        ...

    def read_nowait(self, n: int = -1, /) -> bytes:
        """Return the bytes that have arrived and were not read yet."""
        ...

    async def readany(self) -> bytes:
        """Wait for the next piece and return it; return empty bytes at the end of the body."""
        ...

    def iter_any(self) -> AsyncIterator[bytes]:
        """Iterate over the pieces as they arrive."""
        ...


class Answer(Protocol):
    """The answer to one request. The head is sent with the body or with its first piece.

    `write`, `write_whole` and `drain` raise `ConnectionError` if the caller has closed the connection.
    """

    status: int

    def write_whole(self, body: bytes) -> bool:
        """Write the whole body. Later writes are ignored.

        Returns False if a part of the body waits: then await `drain`. A long body is written only there.
        """
        ...

    def write(self, piece: bytes) -> bool:
        """Write a piece. If the caller reads slowly, the piece stays in the write buffer.

        Returns False if the buffer is full: then await `drain` before the next piece.
        """
        ...

    def write_eof(self) -> None:
        """End the answer. A second call does nothing."""
        ...

    async def drain(self) -> None:
        """Wait until the write buffer has room again."""
        ...


class HttpRequest(Protocol):
    """A request: its head, and the part of its body that has arrived."""

    keep_alive: bool
    """Whether the connection can take another request after this one.

    The handler may set it to False before it calls `answer`.
    """

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
        """The request's `Content-Length` in bytes; None without this header."""
        ...

    @property
    def is_gone(self) -> bool:
        """Whether the caller has closed the connection."""
        ...

    @property
    def caller_has_left(self) -> bool:
        """Whether the caller has closed the connection or shut its sending side: nobody may wait for a late answer."""
        ...

    @property
    def remote(self) -> str:
        """The caller's address; empty for a unix socket."""
        ...

    def hand_over(self) -> int:
        """Stop counting the bytes of this request at the listener, and return their number: somebody else counts them.

        Must be called only when the body has arrived, or there is none. A second call returns 0.
        """
        ...

    def cut_off(self) -> None:
        """Close the connection at once. What the caller has not read yet is lost."""
        ...

    def send_continue(self) -> None:
        """Send `100 Continue`, if the caller's version of HTTP supports it.

        Raises `ConnectionError` if the caller has closed the connection.
        """
        ...

    def answer(self, status: int, headers: dict[str, str], *, length: int | None) -> Answer:
        """Begin the answer.

        The answer may change the dict `headers`, so the calling code must not use it afterwards. `length` is the length
        of the whole body in bytes; None if the body is written in pieces.
        """
        ...


#: Answers a request. It is cancelled if the caller closes the connection.
Handler = Callable[[HttpRequest], Awaitable[Answer]]


class Listener(Protocol):
    """One or several addresses that share one handler."""

    async def open(self, host: str, port: int) -> int:
        """Listen on a TCP address and return the port. Raises `OSError`."""
        ...

    async def open_unix(self, path: Path) -> None:
        """Listen on a unix socket too, and replace a stale one. Raises `OSError`."""
        ...

    budget: CallersBudget
    """The bytes that the connections hold: what has arrived and was not handed over by `HttpRequest.hand_over`."""

    def held_bytes(self) -> dict[str, int]:
        """Return these bytes by place."""
        ...

    def close_idle(self, count: int, /) -> None:
        """Close at most `count` connections: those that have been idle for the longest time."""
        ...

    async def close(self) -> None:
        """Stop listening and close every connection. Requests that are being answered have one second."""
        ...


class MakeListener(Protocol):
    """Creates a listener that is not open yet."""

    def __call__(
        self,
        handler: Handler,
        *,
        max_connections: int,
        closes_busy: bool = False,
        on_full: OnFull | None = None,
        max_held_bytes: float = inf,
        answers: AnswerBytes | None = None,
    ) -> Listener:
        """Return a listener for this handler.

        `max_connections` is the maximum number of open connections. At each connection above it, the listener calls
        `on_full` and closes the connection that has been idle for the longest time, or the new one if none is idle.
        With `closes_busy` it closes the one whose last answer or beginning is the longest time ago.

        The connections hold `max_held_bytes` at most: see `byte_budget.CallersBudget`. `answers`
        counts what callers do not read.
        """
        ...


class Timings(Protocol):
    """`Origin.request` stores the times of one request here, on the event loop's clock."""

    work_started: float | None
    """The time at which the wait for a connection ended."""
    first_byte: float | None
    """The time at which the head of the answer arrived."""
    resends: int
    """How many times the request was sent again on a new connection."""


class Response(Protocol):
    """An upstream's answer: its head, and its body as it arrives. The connection is free after the body was read."""

    @property
    def status(self) -> int:
        """The status code."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers. Upper and lower case in names make no difference."""
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
        """Pass each piece of the body to `on_piece` as soon as it arrives. Raises `HttpError`.

        Returns True at the end of the body, False after a piece for which `on_piece` returned False.
        """
        ...

    @property
    def held_bytes(self) -> int:
        """The bytes that have arrived and count as held. Those of the head and of the chunks' heads count too."""
        ...

    def keep(self, still_held: int) -> None:
        """Count only `still_held` bytes of what has arrived: the rest was handed on, or dropped.

        Without this, all that has arrived counts until the end, except what `deliver` has passed on. See `AnswerBytes`.
        """
        ...

    def close_unless_read(self) -> None:
        """Close the connection, unless the whole body was read.

        Must be called when the answer is no longer needed, also if it was read: until then it counts as held.
        """
        ...


class Origin(Protocol):
    """One base URL, and the pooled connections to it."""

    async def request(self, method: str, path: str, headers: dict[str, str], body: bytes, timings: Timings) -> Response:
        """Send a request and wait for the head of its answer. Raises `HttpError`.

        The call may change the dict `headers`. If the call is cancelled, the connection is closed.
        """
        ...

    def close(self) -> None:
        """Close the idle connections."""
        ...


class Connector(Protocol):
    """Makes connections. It does not limit their number, because admission limits the attempts in flight."""

    def origin(self, base: str) -> Origin:
        """Return the `Origin` of a base URL.

        Raises `ValueError` if the environment names a proxy of an unknown kind.
        """
        ...

    def close(self) -> Awaitable[None]:
        """Close every connection."""
        ...


#: The names of the implementations in the gauge `sidecar_http_implementation`.
Name = Literal["internal", "documented"]
