"""Counts what callers have not read of their answers, and closes the connections of those that do not read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Protocol

from backends.http1.accepting import SLOW_READER_SECONDS

#: Seconds. If memory is short, a caller has this time to read its answer. A local caller needs milliseconds.
_SHORT_SECONDS = 1.0
#: Seconds between two looks at the callers that do not read.
_LOOK_SECONDS = 0.5


class Reader(Protocol):
    """A caller's connection."""

    def abort(self) -> None:
        """Close it at once."""
        ...


class SlowReaders:
    """The callers whose answers wait in write buffers, ordered by the beginning of their wait.

    A caller has `SLOW_READER_SECONDS` to read a whole answer, or to read the buffer of a stream empty. If the bytes of
    all callers exceed the bound, those that have waited for the longest time are closed at once. If the bytes held
    elsewhere are the reason, a caller has `_SHORT_SECONDS`.
    """

    def __init__(self, max_bytes: int, elsewhere: Callable[[], int]) -> None:
        """`elsewhere` returns the other bytes that count. Create it in the event loop."""
        self.bytes = 0
        """Bytes that callers have not read."""
        self._max_bytes = max_bytes
        self._elsewhere = elsewhere
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Reader, tuple[float, int]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<SlowReaders {len(self._waiting)} bytes={self.bytes} of {self._max_bytes}>"

    def add(self, reader: Reader, unread_bytes: int) -> None:
        """Count what this caller has not read at present. Its wait began with the first of these calls."""
        since, before = self._waiting.get(reader) or (self._loop.time(), 0)
        self._waiting[reader] = since, unread_bytes
        self.bytes += unread_bytes - before
        if self.bytes > self._max_bytes:
            for slowest in self._slowest():
                if self.bytes <= self._max_bytes or slowest is reader:
                    break
                self._close(slowest)
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK_SECONDS, self._look)

    def discard(self, reader: Reader) -> None:
        """Stop counting a caller that has read everything, or has left."""
        if (entry := self._waiting.pop(reader, None)) is not None:
            self.bytes -= entry[1]

    def _slowest(self) -> Iterator[Reader]:
        return iter([*self._waiting])

    def _look(self) -> None:
        now = self._loop.time()
        for reader in self._slowest():
            waited = now - self._waiting[reader][0]
            is_short = self.bytes + self._elsewhere() > self._max_bytes
            if waited < (_SHORT_SECONDS if is_short else SLOW_READER_SECONDS):
                break
            self._close(reader)
        self._timer = self._loop.call_later(_LOOK_SECONDS, self._look) if self._waiting else None

    def _close(self, reader: Reader) -> None:
        self.discard(reader)
        reader.abort()
