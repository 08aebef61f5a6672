"""Bounds the bytes that arrive at many sockets together: at the bound, the sockets are no longer read.

The peers then wait, as with any full socket, and get no error. To make progress, the socket whose data began to arrive
first is read on. A peer that keeps this place without using it is closed after `STALLED_SECONDS`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

#: Seconds. At the bound, a socket that is read and brings fewer than `STALLED_BYTES` in this time is given up, because
#: others wait for its place. From `shared/contract.md`, `SIDECAR_QUEUE_BYTES`.
STALLED_SECONDS = 5.0
#: Bytes. Without this number, a peer that sends single bytes could keep its place for ever.
STALLED_BYTES = 64 * 1024
#: Seconds between two looks while the bound is reached: other places free their bytes without a message.
_LOOK_SECONDS = 0.05


class Socket(Protocol):
    """A socket whose data is held until somebody takes it. `ByteBudget` changes the four numbers."""

    held_bytes: int
    """Bytes of it that are held."""
    holds_since: float
    """Loop time at which `held_bytes` was last 0."""
    slow_since: float
    """Loop time since which it has brought fewer than `STALLED_BYTES`; time in which it was stopped does not count."""
    bytes_then: int
    """`held_bytes` at the time `slow_since`."""

    @property
    def is_incomplete(self) -> bool:
        """Whether more data must arrive before somebody takes what is held."""
        ...

    def set_stopped(self, *, stopped: bool) -> None:
        """Stop reading the socket, or go on. A second call with the same value does nothing."""
        ...

    def give_up(self) -> None:
        """End the incomplete message, and free its bytes soon."""
        ...


class ByteBudget:
    """The bytes that sockets hold together. Create it in the event loop."""

    def __init__(
        self, max_bytes: int, sockets: Callable[[], Iterable[Socket]], *, elsewhere: Callable[[], int] = int
    ) -> None:
        """`sockets` returns the open sockets. `elsewhere` returns the bytes that count too and come from the sockets.

        When `max_bytes` are reached, only one socket is read. So at most one message more is held.
        """
        self.held_bytes = 0
        """Bytes that the sockets hold."""
        self.is_full = False
        self._max_bytes = max_bytes
        self._sockets = sockets
        self._elsewhere = elsewhere
        self._loop = asyncio.get_running_loop()
        self._room = 0
        """Bytes that may arrive before the next look. Only sockets bring bytes, so before that nothing is too much."""
        self._read_on: Socket | None = None
        """While the bound is reached: the socket that is read."""
        self._looked_at = 0.0
        """Loop time of the last look while the bound is reached."""

    def __repr__(self) -> str:
        return f"<ByteBudget {self.held_bytes} of {self._max_bytes} full={self.is_full}>"

    def add(self, socket: Socket, more_bytes: int) -> None:
        """Count bytes that have arrived. At the bound, all sockets but one are stopped before this returns."""
        if not socket.held_bytes:
            socket.holds_since = socket.slow_since = self._loop.time()
            socket.bytes_then = 0
        socket.held_bytes += more_bytes
        self.held_bytes += more_bytes
        if socket.held_bytes - socket.bytes_then >= STALLED_BYTES:
            socket.slow_since, socket.bytes_then = self._loop.time(), socket.held_bytes
        self._room -= more_bytes
        if self._room < 0 and not self.is_full:
            self._room = self._max_bytes - self.held_bytes - self._elsewhere()
            if self._room < 0:
                self.is_full, self._looked_at = True, self._loop.time()
                self._stop_all_but_one(self._looked_at)

    def remove(self, socket: Socket, fewer_bytes: int) -> None:
        """Stop counting bytes that somebody has taken, or that are dropped."""
        socket.held_bytes -= fewer_bytes
        self.held_bytes -= fewer_bytes
        socket.bytes_then = min(socket.bytes_then, socket.held_bytes)

    def _look(self) -> None:
        """Below the bound, read all sockets again."""
        now = self._loop.time()
        self._room = self._max_bytes - self.held_bytes - self._elsewhere()
        self.is_full = self._room < 0
        if self.is_full:
            self._stop_all_but_one(now)
        else:
            self._read_on = None
            for socket in self._sockets():
                socket.slow_since += now - self._looked_at
                socket.set_stopped(stopped=False)

    def _stop_all_but_one(self, now: float) -> None:
        """Read only the socket whose incomplete message began to arrive first. Those that stall are given up."""
        stopped_seconds, self._looked_at = now - self._looked_at, now
        read_on: Socket | None = None
        for socket in self._sockets():
            if socket is not self._read_on:
                socket.slow_since += stopped_seconds
            if not (socket.held_bytes and socket.is_incomplete):
                continue
            if now - socket.slow_since >= STALLED_SECONDS:
                socket.give_up()
            elif read_on is None or socket.holds_since < read_on.holds_since:
                read_on = socket
        self._read_on = read_on
        for socket in self._sockets():
            socket.set_stopped(stopped=socket is not read_on)
        self._loop.call_later(_LOOK_SECONDS, self._look)
