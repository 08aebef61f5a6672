"""Reads server-sent events: the only reader of such streams in this product.

It follows the standard (WHATWG HTML, "Server-sent events", section "Interpreting an event stream"): a line ends with
CR, LF or CRLF; an empty line ends an event; a byte order mark at the start, comments and unknown fields are ignored;
one space after the colon is not a part of the value; several `data` lines are joined by LF. Three things differ:
DashScope's comment `:HTTP_STATUS/429` (or the field `status`) carries the status of an event, an event without an empty
line at the end of the stream is read too, and JSON objects on lines of their own are events of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_BOM = b"\xef\xbb\xbf"
_STATUS = re.compile(rb"(?::HTTP_STATUS/|status:)\s*(\d{3})\s*")
#: How an event stream begins, after white space. Anything else is a whole answer.
_BEGINNING = re.compile(rb":|(?:data|event|id|retry)[:\r\n]")
_FIELDS = (b"data", b"event", b"id", b"retry")
_LONGEST_FIELD = len(b"event:")


class Event(NamedTuple):
    """One event."""

    name: bytes
    data: bytes
    status: int
    """The HTTP status that the event names; 0 if it names none."""

    @property
    def is_done(self) -> bool:
        """Whether this is the event after which OpenAI's API sends nothing."""
        return self.data.strip() == b"[DONE]"

    @property
    def is_keepalive(self) -> bool:
        """Whether a gateway has packed a comment into the data (`data: : keepalive`): no JSON begins with a colon."""
        return self.data.startswith(b":")


class EventReader:
    """Divides the bytes of a stream, which arrive in pieces of any size, after each complete event."""

    __slots__ = ("_begun", "_ended_with_cr", "_limit", "_open", "_open_bytes", "_skipping", "skipped_data")

    def __init__(self, limit: int) -> None:
        """`limit` is the length in bytes of the longest event that is kept; a longer event is skipped."""
        self._limit = limit
        self._open = bytearray()  # the event that is not complete; a list of tiny pieces would need far more memory
        self._open_bytes = 0
        self._begun = False
        self._ended_with_cr = False
        self._skipping = False
        self.skipped_data = False
        """Whether an event with data was skipped because of its length. The caller may reset it."""

    @property
    def open_bytes(self) -> int:
        """The bytes of the event that is not complete, at most the limit."""
        return self._open_bytes

    def feed(self, piece: bytes) -> bytes:
        """Return the events that this piece completes, with LF as the only end of a line; empty if there are none."""
        if not self._begun:
            piece = self._without_bom(piece)
        if b"\r" in piece or self._ended_with_cr:
            piece = self._with_lf(piece)
        if not self._open:
            if piece.endswith(b"\n\n"):  # the usual case: whole events
                return piece
        elif piece.startswith(b"\n") and self._open.endswith(b"\n"):
            # The empty line lies between two pieces.
            self._keep(b"\n")
            return self._take() + self.feed(piece[1:])
        end = piece.rfind(b"\n\n") + 2
        if end < 2:
            self._keep(piece)
            return b""
        whole = piece[:end]
        if self._skipping:
            whole = whole[whole.find(b"\n\n") + 2 :]  # the first of these events is the end of the long one
        whole = self._take() + whole
        self._keep(piece[end:])
        return whole

    def end(self) -> bytes:
        """Return the last event, if no empty line follows it. Call it at the end of the stream."""
        return self._take()

    def _keep(self, piece: bytes) -> None:
        if not piece:
            return
        self._open_bytes += len(piece)
        if self._open_bytes > self._limit:
            seen = self._open + piece
            self.skipped_data = self.skipped_data or seen.startswith(b"data") or b"\ndata" in seen
            self._skipping = True
            self._open, self._open_bytes = bytearray(piece[-1:]), self._limit
        else:
            self._open += piece

    def _take(self) -> bytes:
        if not self._open_bytes:
            return b""
        whole = b"" if self._skipping else bytes(self._open)
        self._open, self._open_bytes, self._skipping = bytearray(), 0, False
        return whole

    def _without_bom(self, piece: bytes) -> bytes:
        """Remove the byte order mark, which can arrive in pieces."""
        piece = bytes(self._open) + piece
        self._open, self._open_bytes = bytearray(), 0
        if len(piece) < len(_BOM) and _BOM.startswith(piece):
            self._open += piece
            return b""
        self._begun = True
        return piece.removeprefix(_BOM)

    def _with_lf(self, piece: bytes) -> bytes:
        if self._ended_with_cr and piece:
            piece = piece.removeprefix(b"\n")  # the second half of a CRLF
            self._ended_with_cr = False
        if piece.endswith(b"\r"):
            self._ended_with_cr = True
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def events_in(block: bytes) -> Iterator[Event]:
    """Yield the events of a block that `EventReader` returned. Events without data and without a name are left out."""
    for lines in block.split(b"\n\n"):
        name, status, data = b"", 0, []
        for line in lines.split(b"\n"):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                data.append(value)
            elif field == b"event":
                name = value.strip()
            elif field in (b"", b"status") and (match := _STATUS.fullmatch(line)) is not None:
                status = int(match[1])
        if len(data) > 1:
            for part in _divided(data):
                yield Event(name, part, status)
        elif data or name or status:
            yield Event(name, b"".join(data), status)


def _divided(lines: list[bytes]) -> Iterator[bytes]:
    """Join the lines of data that belong together.

    Some servers put one end of a line between two events instead of two (opencode #27365). No JSON text has a line that
    ends with `}` before a line that begins with `{`, so there the next event begins.
    """
    begun = 0
    for at in range(1, len(lines)):
        if lines[at - 1].rstrip().endswith(b"}") and lines[at].lstrip().startswith((b"{", b"[DONE]")):
            yield b"\n".join(lines[begun:at])
            begun = at
    yield b"\n".join(lines[begun:])


def begins_like_events(body: bytes) -> bool | None:
    """Return whether the bytes begin an event stream; None if they are too few to decide.

    The content type is not used: servers label streams as `text/plain`, `application/octet-stream` and
    `application/json`.
    """
    start = body[:64].removeprefix(_BOM).lstrip()
    if len(start) < _LONGEST_FIELD < len(body):  # many blank lines keep the connection alive
        start = body.removeprefix(_BOM).lstrip()[:64]
    if _BEGINNING.match(start) is not None:
        return True
    if any(field.startswith(start) for field in _FIELDS) or _BOM.startswith(body):  # also for no bytes at all
        return None
    return False
