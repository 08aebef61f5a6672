"""The internal implementation's answer to a caller, whole or in pieces. `interface.Answer` describes each method."""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus

from aiohttp import HttpVersion, HttpVersion10, HttpVersion11

from backends.http1.aiohttp_parts import ParsedRequest, rfc822_formatted_time
from backends.http1.headers import head_of

_REASONS = {status.value: status.phrase for status in HTTPStatus}
_WITHOUT_BODY = (204, 304)


@lru_cache(64)
def _first_line(version: HttpVersion, status: int) -> str:
    return f"HTTP/{version.major}.{version.minor} {status} {_REASONS.get(status, '')}"


class Answer:
    """The answer to one request. The head is sent with the body or with its first piece.

    Writing and draining raise `ConnectionError` if the caller has hung up.
    """

    __slots__ = ("_bodiless", "_chunked", "_ended", "_head", "_http", "status")

    def __init__(self, http: ParsedRequest, status: int, head: dict[str, str], *, length: int | None) -> None:
        """Take `head`, the headers, over. `length` is that of the body in bytes; None: the body comes in pieces."""
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
            http.keep_alive = False  # the end of the connection is the end of the answer
        if not http.keep_alive:
            head["Connection"] = "close"
        elif version == HttpVersion10:
            head["Connection"] = "keep-alive"
        self._head = head_of(_first_line(version, status), head)

    def write_whole(self, body: bytes) -> bool:
        """Write head and body together; see `write`. Whatever is written later is ignored: the next answer follows."""
        self._ended = True
        http = self._http
        http.has_begun = True
        http.connection.write(self._head if self._bodiless else self._head + body)
        return not http.connection.writing_paused

    def write(self, piece: bytes) -> bool:
        """Write a piece, or keep it while the caller does not read. False: wait for `drain` before the next one."""
        if piece and not self._ended:
            piece = b"" if self._bodiless else piece
            self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)
        return not self._http.connection.writing_paused

    def write_eof(self) -> None:
        """End the answer. A second call does nothing."""
        if not self._ended:
            self._ended = True
            self._send(b"0\r\n\r\n" if self._chunked else b"")

    async def drain(self) -> None:
        """Wait while too much is kept."""
        if self._http.connection.writing_paused:
            await self._http.connection.drain()

    def _send(self, data: bytes) -> None:
        head, self._head = self._head, b""
        self._http.has_begun = True
        self._http.connection.write(head + data)
