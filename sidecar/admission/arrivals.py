"""Count the request bodies that are still being received. They share one bound on bytes with the waiting requests.

Without the bound, only memory would limit slow uploads. At the bound, the reader of a stalled body is stopped to make
room for bodies that make progress: a caller that never finishes must not block the others until its deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from sidecar.admission.errors import QueueFull

#: Seconds without a new byte after which a body counts as stalled and may be dropped to make room for others.
STALLED_SECONDS = 1.0


class Arrivals:
    """All bodies that are being received, ordered by the time of their last byte, oldest first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_bytes: int, waiting_bytes: Callable[[], int]) -> None:
        """`waiting_bytes` returns the bytes of complete bodies in the queues."""
        self.bytes = 0
        self._loop = loop
        self._max_bytes = max_bytes
        self._waiting_bytes = waiting_bytes
        self._last_byte_at: dict[Arrival, float] = {}

    def add(self, arrival: Arrival, more_bytes: int) -> None:
        """See `Arrival.add`."""
        if arrival.refusal is not None:  # it was stopped in this loop iteration, and data arrived in the same one
            raise arrival.refusal
        size = arrival.bytes + more_bytes
        if not self.make_room(size, arrival):
            raise QueueFull(
                f"{self.bytes_in_use(arrival)} bytes are waiting or being received and {size} of this body do not fit "
                f"into SIDECAR_QUEUE_BYTES = {self._max_bytes}: try again after 1 s, send smaller images, or raise it",
                retry_after=1.0,
            )
        self._last_byte_at.pop(arrival, None)
        self._last_byte_at[arrival] = self._loop.time()
        arrival.bytes = size
        self.bytes += more_bytes

    def bytes_in_use(self, own: Arrival | None = None) -> int:
        """Return the bytes that wait or are being received, without the bytes of the arrival `own`."""
        return self._waiting_bytes() + self.bytes - (own.bytes if own is not None else 0)

    def make_room(self, size_bytes: int, own: Arrival | None = None) -> bool:
        """Return True if a body of this size fits, after stopping stalled bodies if necessary.

        A body that is alone always fits.
        """
        while (others := self.bytes_in_use(own)) and others + size_bytes > self._max_bytes:
            stalled = next(iter(self._last_byte_at), own)
            if stalled is own or stalled is None or self._loop.time() - self._last_byte_at[stalled] < STALLED_SECONDS:
                return False
            self.remove(stalled)
            stalled.give_way(self._max_bytes)
        return True

    def remove(self, arrival: Arrival) -> None:
        """Stop counting a body that is complete or abandoned. A second call does nothing."""
        if self._last_byte_at.pop(arrival, None) is not None:
            self.bytes -= arrival.bytes


class Arrival:
    """One body that is being received. Use it in a `with` block around the code that reads the body."""

    __slots__ = ("_arrivals", "_reading", "bytes", "refusal")

    def __init__(self, arrivals: Arrivals, reading: asyncio.Timeout) -> None:
        """`reading` is the timeout around the reader. It expires early if the body has to make room for others."""
        self.bytes = 0
        self.refusal: QueueFull | None = None
        """The error for the caller if the body had to make room for others, else None."""
        self._arrivals = arrivals
        self._reading = reading

    def give_way(self, max_bytes: int) -> None:
        """Stop the reader now."""
        self.refusal = QueueFull(
            f"the body paused after {self.bytes} bytes and gave way to others: SIDECAR_QUEUE_BYTES = {max_bytes} were "
            "waiting or being received: try again after 1 s and send it without a pause, or raise it",
            retry_after=1.0,
        )
        if not self._reading.expired():
            self._reading.reschedule(asyncio.get_running_loop().time())

    def add(self, more_bytes: int) -> None:
        """Count `more_bytes` received bytes. Raises `QueueFull` if they do not fit."""
        self._arrivals.add(self, more_bytes)

    def __enter__(self) -> Arrival:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._arrivals.remove(self)
