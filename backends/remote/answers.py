"""What an accepted answer says about itself: its usage, or an error in spite of its status 200."""

from __future__ import annotations

import re
from typing import cast

import orjson

from backends.base import BackendError, Usage
from backends.remote.refusals import classify


def parsed(data: bytes) -> object:
    """The JSON value in `data`, or None if there is none: no answer is `null`."""
    try:
        return cast("object", orjson.loads(data))
    except orjson.JSONDecodeError:
        return None


#: No context is longer. A count beyond this is a slip, and would upset what is learned of the token rate.
_MAX_TOKENS = 10_000_000


def usage_of(payload: object) -> Usage | None:
    """Read `usage` from an answer in either dialect; None if it names no counts, or none that can be."""
    usage = payload.get("usage") if isinstance(payload, dict) else None
    if not isinstance(usage, dict):
        return None
    given = usage.get("prompt_tokens", usage.get("input_tokens"))
    made = usage.get("completion_tokens", usage.get("output_tokens", 0))
    if isinstance(given, int) and isinstance(made, int) and 0 <= given <= _MAX_TOKENS and 0 <= made <= _MAX_TOKENS:
        return Usage(input_tokens=given, output_tokens=made)
    return None


def is_error(payload: object) -> bool:
    """Whether an answer with status 200 is an error in OpenAI's, vLLM's or the native shape."""
    if not isinstance(payload, dict) or "choices" in payload or "output" in payload:
        return False
    code = payload.get("code")
    return bool(payload.get("error")) or payload.get("object") == "error" or (isinstance(code, str) and code != "")


_EVENT_END = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE = re.compile(rb"(?::HTTP_STATUS/|status:\s*)(\d{3})\s*$")
#: No event without one of these is looked into. (`find`: `in` takes three times as long on bytes.)
_TELLING = (b'"usage"', b"error", b"HTTP_STATUS/")
_NO_USAGE = re.compile(rb'"usage"\s*:\s*null')

#: An event longer than this is not looked into. The longest that matters, a native frame with the whole text so far
#: of a 32 k token answer, is about half of it.
_EVENT_LIMIT = 256 * 1024


class StreamWatch:
    """Looks on while a server-sent-event stream passes by, and notes what concerns the accounts.

    It is fed the bytes as they came, in pieces of any size. All but a few pieces cost only substring searches.
    """

    def __init__(self) -> None:
        self.has_content = False
        """An event with data has passed that was no error."""
        self.failure: BackendError | None = None
        """The first error event, classified. Nothing after it is looked at: it ends the stream."""
        self._tail = b""
        self._last_usage = b""

    def feed(self, piece: bytes) -> None:
        """Look at the next piece of the stream."""
        data = self._tail + piece if self._tail else piece
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\n\r\n") + 3)
        if end < 3:  # neither was found
            self._tail = data if len(data) <= _EVENT_LIMIT else b""
            return
        self._tail = data[end:]
        if self.has_content and max(map(data.find, _TELLING)) < 0:
            return
        for event in _EVENT_END.split(data[:end]):
            self._look_at(event)

    def end(self) -> None:
        """The stream is over: look at a last event that no empty line closed."""
        if self._tail:
            self._look_at(self._tail)
            self._tail = b""

    @property
    def usage(self) -> Usage | None:
        """The last usage that passed: native frames count upwards, OpenAI's comes once at the end."""
        return usage_of(parsed(self._last_usage)) if self._last_usage else None

    def _look_at(self, event: bytes) -> None:
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
