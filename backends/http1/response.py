"""An answer on its way to the caller, whole or in pieces."""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import HttpVersion, HttpVersion10, HttpVersion11
from aiohttp.helpers import rfc822_formatted_time

from backends.http1.headers import head_of

if TYPE_CHECKING:
    from backends.http1.server import HttpRequest

_REASONS = {status.value: status.phrase for status in HTTPStatus}
_WITHOUT_BODY = (204, 304)


@lru_cache(64)
def _first_line(version: HttpVersion, status: int) -> str:
    return f"HTTP/{version.major}.{version.minor} {status} {_REASONS.get(status, '')}"


class Answer:
    """What answers a request. Its head goes out with the body, or with the first piece of one.

    Writing and draining raise `ConnectionError` where nobody is left to read.
    """

    __slots__ = ("_bodiless", "_chunked", "_ended", "_head", "_http", "status")

    def __init__(self, http: HttpRequest, status: int, head: dict[str, str], *, length: int | None) -> None:
        """Takes over `head`, the headers. `length` of the whole body is in bytes, None for one that comes in pieces."""
        version = http.version
        self.status = status
        self._http = http
        self._bodiless = http.method == "HEAD" or status in _WITHOUT_BODY
        self._chunked = length is None and not self._bodiless and version >= HttpVersion11
        self._ended = False
        head["Date"] = rfc822_formatted_time()
        if self._chunked:
            head["Transfer-Encoding"] = "chunked"
        elif length is not None and status not in _WITHOUT_BODY:
            head["Content-Length"] = str(length)
        elif not self._bodiless:
            http.keep_alive = False  # the end of the connection will be the end of the answer
        if not http.keep_alive:
            head["Connection"] = "close"
        elif version == HttpVersion10:
            head["Connection"] = "keep-alive"
        self._head = head_of(_first_line(version, status), head)

    def write_whole(self, body: bytes) -> bool:
        """Write head and body at once; see `write`. What is written after that is nothing, the next answer begins."""
        self._ended = True
        self._send(b"" if self._bodiless else body)
        return not self._http.connection.writing_paused

    def write(self, piece: bytes) -> bool:
        """Write a piece, or keep what the caller does not take yet. Whether it takes more: else `drain` would wait."""
        if piece and not self._ended:
            piece = b"" if self._bodiless else piece
            self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)
        return not self._http.connection.writing_paused

    def write_eof(self) -> None:
        """End the answer. Again is nothing."""
        if not self._ended:
            self._ended = True
            self._send(b"0\r\n\r\n" if self._chunked else b"")

    async def drain(self) -> None:
        """Wait while too much is kept."""
        if self._http.connection.writing_paused:
            await self._http.connection.drain()

    def _send(self, data: bytes) -> None:
        head, self._head = self._head, b""
        self._http.begun = True
        self._http.connection.write(head + data)
