"""Bounds the bytes that arrive at many sockets together: near a bound, most sockets are no longer read.

Their peers then wait, as with any full socket, and get no error. The message that began to arrive first can always be
completed. A peer that keeps a place without using it is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Protocol

#: Seconds. Near the bound, a socket that is read and brings fewer than `SMALL_BYTES` in this time is given up, because
#: others wait for its place. From `shared/contract.md`, `SIDECAR_QUEUE_BYTES`.
STALLED_SECONDS = 5.0
#: Bytes. A message with a usual frame is smaller. A body of 14 MB that is slower than this in `STALLED_SECONDS` would
#: miss the default deadline of 60 s anyway; and with single bytes, a peer could keep its place for ever.
SMALL_BYTES = 1024 * 1024
#: Seconds. A small message whose peer sends nothing for this time is given up first. A caller that has a whole message
#: sends it without a pause.
IDLE_SECONDS = 0.05
#: Seconds between two looks while the bound is reached: other places free their bytes without a message.
_LOOK_SECONDS = 0.03


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
        self,
        max_bytes: float,
        sockets: Iterable[Socket],
        *,
        reserve_bytes: float = 0,
        elsewhere: Callable[[], int] = int,
        is_idle: Callable[[Socket], bool] | None = None,
    ) -> None:
        """`sockets`: the open sockets. `elsewhere` returns other bytes that count; they come mostly from these sockets.

        When less than `reserve_bytes` are left of `max_bytes`, only the socket whose message began first is read. But
        if complete messages hold more than `reserve_bytes`, it waits until they are taken. Before that, the sockets for
        which `is_idle` returns True are given up, if it is given.
        """
        self.held_bytes = 0
        """Bytes that the sockets hold."""
        self.is_full = False
        """Whether some sockets are not read."""
        self._max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._sockets = sockets
        self._elsewhere = elsewhere
        self._is_idle = is_idle
        self._loop = asyncio.get_running_loop()
        self._room: float = 0
        """Bytes that may arrive before the next look. Only sockets bring bytes, so before that nothing is too much."""
        self._read_on: Socket | None = None
        """While `is_full`: the socket that is read."""
        self._gave_up = False  # whether the last look gave a message up
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
        self.note(more_bytes)

    def note(self, elsewhere_bytes: int) -> None:
        """Note that so many bytes have come, here or to where `elsewhere` counts them."""
        self._room -= elsewhere_bytes
        if self._room < 0:
            self._look()

    def stops(self, socket: Socket) -> bool:
        """Return whether a socket may not be read at present."""
        return self.is_full and socket is not self._read_on

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
        # If the sockets hold nothing, what is held elsewhere may wait for them: for example bodies for their answers.
        was_full, self.is_full = self.is_full, left < self._reserve_bytes and self.held_bytes > 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._room = max(left - self._reserve_bytes, 0)
        if not (was_full or self.is_full):
            return
        sockets = [*self._sockets]  # a copy: one that is given up may leave
        for socket in sockets:
            if socket.is_stopped:
                socket.slow_since += stopped_seconds
        self._read_on, self._looked_at = None, now
        if self.is_full:
            incomplete = sorted(
                (socket for socket in sockets if socket.held_bytes and socket.is_incomplete),
                key=attrgetter("holds_since"),
            )
            self._read_on = self._choose(incomplete, now, 2 * self._reserve_bytes - left)
            self._room = SMALL_BYTES
            soon = self._gave_up and 0.1 * _LOOK_SECONDS  # their bytes are freed in the next turns of the loop
            self._timer = self._loop.call_later(soon or _LOOK_SECONDS, self._look)
        for socket in sockets:
            socket.set_stopped(stopped=self.stops(socket))

    def _choose(self, incomplete: list[Socket], now: float, wanted_bytes: float) -> Socket | None:
        """Return the socket to read, of those with an incomplete message, oldest first. Give up those that stall."""
        chosen: Socket | None = None
        self._gave_up, held_bytes = False, 0
        for socket in incomplete:
            held_bytes += socket.held_bytes
            stalls = now - socket.slow_since >= STALLED_SECONDS
            if not stalls and wanted_bytes > 0 and self._is_idle is not None:
                stalls = now - socket.holds_since >= IDLE_SECONDS and self._is_idle(socket)
            if stalls:
                wanted_bytes -= socket.held_bytes
                self._gave_up = True
                socket.give_up()
            elif chosen is None:
                chosen = socket
        return chosen if self.held_bytes - held_bytes <= self._reserve_bytes else None


class Caller(Socket, Protocol):
    """A caller's connection."""

    is_large: bool
    """Whether its message is larger than `SMALL_BYTES`. `CallersBudget` changes it."""

    @property
    def announced_bytes(self) -> int:
        """Size of the body that arrives; 0 if unknown."""
        ...

    def refuse(self) -> None:
        """End a large message that has just begun: there are too many."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether its peer does not go on sending its message at present, although nothing hinders it."""
        ...


class CallersBudget:
    """The bytes that callers' connections hold. Large messages have one half, so that they never stop usual frames."""

    def __init__(self, max_bytes: float, connections: Iterable[Caller]) -> None:
        """Create it in the event loop. At most `max_bytes`, and one message of any size more, are held."""
        half = max_bytes / 2
        self._most_large = 0.75 * max_bytes
        """Above this, no further large message may begin: the first bytes of so many would stop the small ones."""
        large, small = (_Class(connections, is_large=is_large) for is_large in (True, False))
        self._large = ByteBudget(half, large, reserve_bytes=half / 2)
        # The first bytes of a large message come before it is known to be one, so many of them can exceed their half.
        self._small = ByteBudget(
            half,
            small,
            reserve_bytes=half / 4,
            elsewhere=lambda: 0 if self._large.held_bytes < half else self._large.held_bytes - int(half),
            is_idle=attrgetter("is_idle"),
        )

    def __repr__(self) -> str:
        return f"<CallersBudget small={self._small!r} large={self._large!r}>"

    @property
    def held_bytes(self) -> int:
        """Bytes that the connections hold."""
        return self._small.held_bytes + self._large.held_bytes

    @property
    def is_full(self) -> bool:
        """Whether some connections are not read."""
        return self._small.is_full or self._large.is_full

    def add(self, caller: Caller, more_bytes: int) -> None:
        """See `ByteBudget.add`."""
        if not caller.is_large:
            if caller.held_bytes + more_bytes <= SMALL_BYTES >= caller.announced_bytes:
                self._small.add(caller, more_bytes)
                return
            held_bytes, since = caller.held_bytes, caller.holds_since
            self._small.remove(caller, held_bytes)
            self._small.note(more_bytes)
            caller.is_large = True
            if held_bytes:
                self._large.add(caller, held_bytes)
                caller.holds_since = since
        self._large.add(caller, more_bytes)
        caller.set_stopped(stopped=self._large.stops(caller))
        if self._large.held_bytes > self._most_large and caller.held_bytes == more_bytes and caller.is_stopped:
            caller.refuse()

    def remove(self, caller: Caller, fewer_bytes: int) -> None:
        """See `ByteBudget.remove`."""
        (self._large if caller.is_large else self._small).remove(caller, fewer_bytes)
        if caller.is_large and not caller.held_bytes:
            caller.is_large = False
            caller.set_stopped(stopped=self._small.stops(caller))

    def stops(self, caller: Caller) -> bool:
        """See `ByteBudget.stops`."""
        return (self._large if caller.is_large else self._small).stops(caller)


class _Class:
    """The connections whose messages are large, or those whose messages are not."""

    def __init__(self, connections: Iterable[Caller], *, is_large: bool) -> None:
        self._connections = connections
        self._is_large = is_large

    def __iter__(self) -> Iterator[Caller]:
        return (one for one in self._connections if one.is_large is self._is_large)
