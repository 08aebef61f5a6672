"""Bounds the bytes that arrive at many sockets together: near the bound, most sockets are no longer read.

Their peers then wait, as with any full socket, and get no error. Small messages pass for longer, and the message that
began to arrive first can always be completed. A peer that keeps a place without using it is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Protocol

#: Seconds. Near the bound, a socket that is read and brings fewer than `SMALL_BYTES` in this time is given up, because
#: others wait for its place. From `shared/contract.md`, `SIDECAR_QUEUE_BYTES`.
STALLED_SECONDS = 5.0
#: Bytes. A message with a usual frame is smaller. A body of 14 MB that is slower than this in `STALLED_SECONDS` would
#: miss the default deadline of 60 s anyway; and with single bytes, a peer could keep its place for ever.
SMALL_BYTES = 1024 * 1024
#: Seconds. A small message usually arrives at once. When small messages have used up their part too, those that are
#: incomplete for longer than this are given up, so that new ones can pass.
FRESH_SECONDS = 1.0
#: Seconds between two looks while the bound is reached: other places free their bytes without a message.
_LOOK_SECONDS = 0.05


class Socket(Protocol):
    """A socket whose data is held until somebody takes it. `ByteBudget` changes the numbers."""

    held_bytes: int
    """Bytes of it that are held."""
    holds_since: float
    """Loop time at which `held_bytes` was last 0."""
    slow_since: float
    """Loop time since which it has brought fewer than `SMALL_BYTES`; time in which it was stopped does not count."""
    bytes_then: int
    """`held_bytes` at the time `slow_since`."""
    is_stopped: bool
    """What `set_stopped` was last called with."""

    @property
    def is_incomplete(self) -> bool:
        """Whether something is held that nobody can take yet."""
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
        self, max_bytes: float, sockets: Iterable[Socket], *, reserve_bytes: int = 0, elsewhere: Callable[[], int] = int
    ) -> None:
        """`sockets`: the open sockets. `elsewhere` returns other bytes that count; they come mostly from these sockets.

        When less than twice `reserve_bytes` are left of `max_bytes`, only the oldest and the small messages are read;
        when less than `reserve_bytes` are left, only the oldest. It is always read, so that it can be completed.
        """
        self.held_bytes = 0
        """Bytes that the sockets hold."""
        self.is_full = False
        """Whether some sockets are not read."""
        self._reads_small = True  # while `is_full`: whether small messages are read
        self._max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._small_bytes = min(SMALL_BYTES, reserve_bytes)
        self._sockets = sockets
        self._elsewhere = elsewhere
        self._loop = asyncio.get_running_loop()
        self._room: float = 0
        """Bytes that may arrive before the next look. Only sockets bring bytes, so before that nothing is too much."""
        self._read_on: Socket | None = None
        """While `is_full`: the socket that is read."""
        self._looked_at = 0.0
        """While `is_full`: loop time of the last look."""
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<ByteBudget {self.held_bytes} of {self._max_bytes} full={self.is_full}>"

    def add(self, socket: Socket, more_bytes: int) -> None:
        """Count bytes that have arrived. Sockets that may not be read on are stopped before this returns."""
        if not socket.held_bytes:
            socket.holds_since = socket.slow_since = self._loop.time()
            socket.bytes_then = 0
        socket.held_bytes += more_bytes
        self.held_bytes += more_bytes
        if socket.held_bytes - socket.bytes_then >= SMALL_BYTES:
            socket.slow_since, socket.bytes_then = self._loop.time(), socket.held_bytes
        self._room -= more_bytes
        if self._room < 0:
            self._look()
        elif self.is_full:
            socket.set_stopped(stopped=self.stops(socket))

    def stops(self, socket: Socket) -> bool:
        """Return whether a socket may not be read at present."""
        if not self.is_full or socket is self._read_on:
            return False
        return not (self._reads_small and socket.held_bytes < self._small_bytes)

    def remove(self, socket: Socket, fewer_bytes: int) -> None:
        """Stop counting bytes that somebody has taken, or that are dropped."""
        socket.held_bytes -= fewer_bytes
        self.held_bytes -= fewer_bytes
        socket.bytes_then = min(socket.bytes_then, socket.held_bytes)

    def _look(self) -> None:
        """Decide which sockets are read."""
        now = self._loop.time()
        stopped_seconds = now - self._looked_at if self.is_full else 0.0
        left = self._max_bytes - self.held_bytes - self._elsewhere()
        was_full, self.is_full = self.is_full, left < 2 * self._reserve_bytes
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._room = max(left - 2 * self._reserve_bytes, 0)
        if not (was_full or self.is_full):
            return
        sockets = [*self._sockets]  # a copy: one that is given up may leave
        for socket in sockets:
            if socket.is_stopped:
                socket.slow_since += stopped_seconds
        self._read_on, self._looked_at = None, now
        if self.is_full:
            self._reads_small = left >= self._reserve_bytes
            if not self._reads_small:
                self._give_up_stale(sockets, now, self._reserve_bytes - left)
            self._read_on = _oldest(sockets, now)
            self._room = left - self._reserve_bytes if self._reads_small else SMALL_BYTES
            self._timer = self._loop.call_later(_LOOK_SECONDS, self._look)
        for socket in sockets:
            socket.set_stopped(stopped=self.stops(socket))

    def _give_up_stale(self, sockets: Iterable[Socket], now: float, wanted_bytes: float) -> None:
        """Give up small messages that are no longer fresh, the slowest first, until as many bytes become free."""
        stale = (
            one
            for one in sockets
            if 0 < one.held_bytes < self._small_bytes and one.is_incomplete and now - one.slow_since >= FRESH_SECONDS
        )
        for socket in sorted(stale, key=attrgetter("slow_since")):
            if wanted_bytes <= 0:
                break
            wanted_bytes -= socket.held_bytes
            socket.give_up()


def _oldest(sockets: Iterable[Socket], now: float) -> Socket | None:
    """Return the socket whose incomplete message began to arrive first. Those that stall are given up."""
    oldest = None
    for socket in sockets:
        if not (socket.held_bytes and socket.is_incomplete):
            continue
        if now - socket.slow_since >= STALLED_SECONDS:
            socket.give_up()
        elif oldest is None or socket.holds_since < oldest.holds_since:
            oldest = socket
    return oldest
