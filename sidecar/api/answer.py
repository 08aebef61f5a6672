"""An answer on its way to the caller, whole or in pieces."""

from __future__ import annotations

from http import HTTPStatus

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.helpers import rfc822_formatted_time
from multidict import CIMultiDict

_REASONS = {status.value: status.phrase for status in HTTPStatus}
_WITHOUT_BODY = (204, 304)


class Answer:
    """What `web.Response` does for an answer, less what none of ours has: cookies, ranges, compression, a charset.

    That less was a tenth of the processor time of a request. aiohttp's server asks what a handler returns for
    `prepare`, `write_eof` and `keep_alive` only.
    """

    __slots__ = ("_bodiless", "_head", "_status_line", "_writer", "keep_alive", "status")

    def __init__(
        self, http: web.BaseRequest, status: int, head: CIMultiDict[str], *, length: int | None, close: bool
    ) -> None:
        """Takes `head` over. `length` is that of the whole body in bytes, None for one that comes in pieces."""
        version = http.version
        self.status = status
        self.keep_alive = http.keep_alive and not close
        self._status_line = f"HTTP/{version.major}.{version.minor} {status} {_REASONS.get(status, '')}"
        self._writer = http.writer
        self._bodiless = http.method == "HEAD" or status in _WITHOUT_BODY
        self._head = head
        if length is None and not self._bodiless:
            if version >= HttpVersion11:
                head["Transfer-Encoding"] = "chunked"
                self._writer.enable_chunking()
            else:
                self.keep_alive = False  # the end of the connection will be the end of the answer
        elif length is not None and status not in _WITHOUT_BODY:
            head["Content-Length"] = str(length)
        head["Date"] = rfc822_formatted_time()
        if not self.keep_alive:
            head["Connection"] = "close"
        elif version == HttpVersion10:
            head["Connection"] = "keep-alive"

    async def write_whole(self, body: bytes) -> None:
        """Write head and body at once. Raises `ConnectionError` where nobody is left to read, as all of these do."""
        await self._writer.write_headers(self._status_line, self._head)
        self._writer.length = 0  # of what may follow: an error after this must not run into the next answer
        await self._writer.write_eof(b"" if self._bodiless else body)

    async def begin(self) -> None:
        """Write the head of an answer that comes in pieces."""
        await self._writer.write_headers(self._status_line, self._head)
        self._writer.send_headers()

    async def write(self, piece: bytes) -> None:
        """Write a piece, and wait while the caller does not read."""
        await self._writer.write(piece)

    async def write_eof(self) -> None:
        """End the answer. Again is nothing."""
        await self._writer.write_eof()

    async def prepare(self, http: web.BaseRequest) -> None:
        """Nothing: the head was written when the answer was."""
