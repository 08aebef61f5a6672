"""The internal implementation's answer to a caller, whole or in pieces. `interface.Answer` describes each method."""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus

from aiohttp import HttpVersion, HttpVersion10, HttpVersion11

from backends.http1 import connecting
from backends.http1.aiohttp_parts import ParsedRequest, rfc822_formatted_time
from backends.http1.headers import head_of

_REASONS = {status.value: status.phrase for status in HTTPStatus}
_WITHOUT_BODY = (204, 304)
#: The status whose answer must say that it has no body: RFC 9110, section 15.3.6. A provider's body is left out.
RESET_CONTENT = 205


@lru_cache(64)
def _first_line(version: HttpVersion, status: int) -> str:
    return f"HTTP/{version.major}.{version.minor} {status} {_REASONS.get(status, '')}"


class Answer:
    """The answer to one request. The head is sent with the body or with its first piece.

    `write`, `write_whole`, `write_eof` and `drain` raise `ConnectionError` if the caller has closed the connection.
    """

    __slots__ = ("_bodiless", "_chunked", "_ended", "_head", "_http", "_long", "status")

    def __init__(self, http: ParsedRequest, status: int, headers: dict[str, str], *, length: int | None) -> None:
        """Complete `headers` and encode the head.

        The dict `headers` is changed. `length` is the length of the body in bytes; None if the body is written in
        pieces.
        """
        version = http.version
        self.status = status
        self._http = http
        self._bodiless = http.method == "HEAD" or status in _WITHOUT_BODY or status == RESET_CONTENT
        if status == RESET_CONTENT:
            length = 0
        self._chunked = length is None and not self._bodiless and version >= HttpVersion11
        self._ended = False
        self._long = b""
        headers["Date"] = rfc822_formatted_time()
        if self._chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif length is not None and status not in _WITHOUT_BODY:
            headers["Content-Length"] = str(length)
        elif not self._bodiless:
            http.keep_alive = False  # only the end of the connection marks the end of the answer
        if not http.keep_alive:
            headers["Connection"] = "close"
        elif version == HttpVersion10:
            headers["Connection"] = "keep-alive"
        self._head = head_of(_first_line(version, status), headers)

    def write_whole(self, body: bytes) -> bool:
        """Write the head and the whole body together. Returns False if the write buffer is full, see `write`.

        Later writes are ignored, because on this connection they would become part of the next answer.
        """
        self._ended = True
        http = self._http
        http.has_begun = True
        if len(body) > connecting.SLICE_BYTES and not self._bodiless:
            http.connection.write(self._head)
            self._long = body  # `drain` writes it
            return False
        http.connection.write(self._head if self._bodiless else self._head + body)
        return not http.connection.writing_paused

    def write(self, piece: bytes) -> bool:
        """Write a piece. If the caller reads slowly, the piece stays in the write buffer.

        Returns False if the buffer is full: then await `drain` before the next piece.
        """
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
        """Wait until the write buffer has room again. A long body is written here."""
        if self._long:
            body, self._long = self._long, b""
            await self._http.connection.write_long(body)
        if self._http.connection.writing_paused:
            await self._http.connection.drain()

    def _send(self, data: bytes) -> None:
        head, self._head = self._head, b""
        self._http.has_begun = True
        self._http.connection.write(head + data)
