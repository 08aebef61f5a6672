"""Reads an accepted answer: its usage, and an error that it may contain in spite of its status 200."""

from __future__ import annotations

import re
from typing import cast

import orjson

from backends.base import BackendError, Usage
from backends.remote.refusals import classify


def parsed(data: bytes) -> object:
    """Return the JSON value in `data`, or None if `data` is not JSON. (A valid answer is never JSON's `null`.)"""
    try:
        return cast("object", orjson.loads(data))
    except orjson.JSONDecodeError:
        return None


#: LLM tokens. No model has a longer context. A larger count is an error of the provider, and it would distort the
#: learned token rate.
_MAX_TOKENS = 10_000_000


def usage_of(payload: object) -> Usage | None:
    """Return the `usage` of an answer in either dialect; None if it is missing or not plausible."""
    usage = payload.get("usage") if isinstance(payload, dict) else None
    if not isinstance(usage, dict):
        return None
    input_tokens = usage.get("prompt_tokens", usage.get("input_tokens"))
    output_tokens = usage.get("completion_tokens", usage.get("output_tokens", 0))
    if not isinstance(input_tokens, int) or not isinstance(output_tokens, int):
        return None
    if 0 <= input_tokens <= _MAX_TOKENS and 0 <= output_tokens <= _MAX_TOKENS:
        return Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    return None


def is_error(payload: object) -> bool:
    """Return whether an answer with status 200 is an error in OpenAI's, vLLM's or the native format."""
    if not isinstance(payload, dict) or "choices" in payload or "output" in payload:
        return False
    code = payload.get("code")
    return bool(payload.get("error")) or payload.get("object") == "error" or (isinstance(code, str) and code != "")


_EVENT_END = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE = re.compile(rb"(?::HTTP_STATUS/|status:\s*)(\d{3})\s*$")
#: Only events that contain one of these are parsed. `feed` searches with `find`, because `in` takes three times as long
#: on bytes.
_MARKERS = (b'"usage"', b"error", b"HTTP_STATUS/")
_NO_USAGE = re.compile(rb'"usage"\s*:\s*null')

#: Bytes. A longer event is not parsed. The longest useful event is a native frame with the whole text of an answer of
#: 32 k tokens; it has about half of this length.
_EVENT_LIMIT = 256 * 1024


class StreamWatch:
    """Observes a server-sent-event stream and extracts its usage and its errors.

    `feed` accepts the received bytes in pieces of any size. Most pieces cost only substring searches.
    """

    def __init__(self) -> None:
        self.has_content = False
        """Whether the stream has contained an event with data that is not an error."""
        self.failure: BackendError | None = None
        """The first error event, classified. Later events are ignored, because an error ends the stream."""
        self._tail = b""
        self._last_usage = b""

    def feed(self, piece: bytes) -> None:
        """Process the next piece of the stream."""
        data = self._tail + piece if self._tail else piece
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\n\r\n") + 3)
        if end < 3:  # the piece contains no end of an event
            self._tail = data if len(data) <= _EVENT_LIMIT else b""
            return
        self._tail = data[end:]
        if self.has_content and max(map(data.find, _MARKERS)) < 0:
            return
        for event in _EVENT_END.split(data[:end]):
            self._parse(event)

    def end(self) -> None:
        """Process a last event without an empty line after it. Must be called at the end of the stream."""
        if self._tail:
            self._parse(self._tail)
            self._tail = b""

    @property
    def usage(self) -> Usage | None:
        """The last usage in the stream. A native frame contains the usage so far; OpenAI sends it once, at the end."""
        return usage_of(parsed(self._last_usage)) if self._last_usage else None

    def _parse(self, event: bytes) -> None:
        if self.failure is not None:
            return
        name, status, lines = b"", 0, []
        for line in event.splitlines():
            if line.startswith(b"data:"):
                lines.append(line[5:].strip())
            elif line.startswith(b"event:"):
                name = line[6:].strip()
            elif match := _STATUS_LINE.match(line):
                status = int(match[1])
        data = b"\n".join(lines)
        if name == b"error" or status >= 400 or (b'"error"' in data and is_error(parsed(data))):
            self.failure = classify(status, {}, data)
        elif data and data != b"[DONE]":
            self.has_content = True
            if b'"usage"' in data and not _NO_USAGE.search(data):
                self._last_usage = data
