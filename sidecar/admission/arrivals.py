"""Bodies that are still being received. They share the bound on bytes with those that wait, which are whole.

Without it a caller's slow uploads would be limited by memory alone. Where the bound is reached, who has stalled gives
way to who sends: one caller that never finishes must not shut the others out until its deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from sidecar.admission.errors import QueueFull

#: Seconds without a byte after which a body gives way to others.
STALLED_SECONDS = 1.0


class Arrivals:
    """All of them, the one that has been silent for longest first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, most_bytes: int, waiting_bytes: Callable[[], int]) -> None:
        """`waiting_bytes` are those of bodies that are whole and wait."""
        self.bytes = 0
        self._loop = loop
        self._most_bytes = most_bytes
        self._waiting_bytes = waiting_bytes
        self._heard: dict[Arrival, float] = {}

    def add(self, arrival: Arrival, more_bytes: int) -> None:
        """See `Arrival.add`."""
        if arrival.refusal is not None:  # it came to life in the very turn of the loop in which it had to give way
            raise arrival.refusal
        size = arrival.bytes + more_bytes
        if not self.make_room(size, arrival):
            raise QueueFull(
                f"{self.held(arrival)} bytes are waiting or being received and {size} of this body do not fit into "
                f"SIDECAR_QUEUE_BYTES = {self._most_bytes}: try again after 1 s, send smaller images, or raise it",
                retry_after=1.0,
            )
        self._heard.pop(arrival, None)
        self._heard[arrival] = self._loop.time()
        arrival.bytes = size
        self.bytes += more_bytes

    def held(self, own: Arrival | None = None) -> int:
        """Bytes that wait or are being received, without those of one's own."""
        return self._waiting_bytes() + self.bytes - (own.bytes if own is not None else 0)

    def make_room(self, size_bytes: int, own: Arrival | None = None) -> bool:
        """Whether a body of this size finds room, which one always does alone; who has stalled gives way for it."""
        while (others := self.held(own)) and others + size_bytes > self._most_bytes:
            stalled = next(iter(self._heard), own)
            if stalled is own or stalled is None or self._loop.time() - self._heard[stalled] < STALLED_SECONDS:
                return False
            self.remove(stalled)
            stalled.give_way(self._most_bytes)
        return True

    def remove(self, arrival: Arrival) -> None:
        """The body is whole, or given up. Again is nothing."""
        if self._heard.pop(arrival, None) is not None:
            self.bytes -= arrival.bytes


class Arrival:
    """One body, for as long as the block lasts that reads it."""

    __slots__ = ("_arrivals", "_reading", "bytes", "refusal")

    def __init__(self, arrivals: Arrivals, reading: asyncio.Timeout) -> None:
        """`reading` is the timeout that the reader is under; it ends early where the body has to give way."""
        self.bytes = 0
        self.refusal: QueueFull | None = None
        """Why it had to give way, if it had to: what its caller is to be told."""
        self._arrivals = arrivals
        self._reading = reading

    def give_way(self, most_bytes: int) -> None:
        """Have the reader stop now."""
        self.refusal = QueueFull(
            f"the body paused after {self.bytes} bytes and gave way to others: SIDECAR_QUEUE_BYTES = {most_bytes} were "
            "waiting or being received: try again after 1 s and send it without a pause, or raise it",
            retry_after=1.0,
        )
        if not self._reading.expired():
            self._reading.reschedule(asyncio.get_running_loop().time())

    def add(self, more_bytes: int) -> None:
        """More of it has come. Raises `QueueFull` where it finds no room."""
        self._arrivals.add(self, more_bytes)

    def __enter__(self) -> Arrival:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._arrivals.remove(self)
