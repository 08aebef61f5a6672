"""The open connections of one listener. Their number is bounded, and what is closed for a new one is decided here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import nsmallest
from operator import attrgetter
from typing import Generic, Protocol, TypeVar


class Held(Protocol):
    """One open connection."""

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered on it."""
        ...

    @property
    def idle_since(self) -> float:
        """Loop time of its last answer, or of its beginning."""
        ...

    @property
    def is_stalled(self) -> bool:
        """Whether a request has been arriving on it for seconds, and hardly any of it has come lately."""
        ...

    def abort(self) -> None:
        """Close it at once."""
        ...


_Held = TypeVar("_Held", bound=Held)


#: Called at each new connection for which another one must be closed.
OnFull = Callable[[], None]


class Connections(Generic[_Held]):
    """The connections in the order of their opening."""

    def __init__(self, maximum: int, *, closes_busy: bool = False, on_full: OnFull | None = None) -> None:
        """See `interface.MakeListener`."""
        self._maximum = maximum
        self._closes_busy = closes_busy
        self._on_full = on_full
        self._open: dict[_Held, None] = {}

    def __repr__(self) -> str:
        return f"<Connections {len(self._open)} of {self._maximum}>"

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[_Held]:
        return iter([*self._open])

    def add(self, opened: _Held) -> None:
        """Add a new connection. If there are too many, close one.

        The connection that has been idle for the longest time is closed; with `closes_busy`, the one whose last answer
        or beginning is the longest time ago, because busy connections of strangers must not leave fewer places for the
        others. If none is idle, the oldest one whose request stalls is closed. If there is none, the new one is.
        """
        if len(self._open) >= self._maximum:
            if self._on_full is not None:
                self._on_full()
            self._close_oldest(1, also_busy=self._closes_busy)
            if len(self._open) >= self._maximum:
                stalled = next((one for one in self._open if one.is_stalled), None)
                if stalled is not None:
                    self._close(stalled)
        self._open[opened] = None
        if len(self._open) > self._maximum:
            self._close(opened)

    def discard(self, closed: _Held) -> None:
        """Remove a connection that is closed."""
        self._open.pop(closed, None)

    def close_idle(self, count: int) -> None:
        """Close at most `count` connections: those that have been idle for the longest time."""
        self._close_oldest(count, also_busy=False)

    def _close_oldest(self, count: int, *, also_busy: bool) -> None:
        candidates = [one for one in self._open if also_busy or not one.is_busy]
        for one in nsmallest(count, candidates, key=attrgetter("idle_since")):
            self._close(one)

    def _close(self, one: _Held) -> None:
        """Close a connection. It no longer counts, although the operating system closes it a little later."""
        del self._open[one]
        one.abort()
