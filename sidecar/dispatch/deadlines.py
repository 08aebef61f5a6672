"""Deadlines of all running requests, with one timer.

A timer for each request would cost 5 % of the processor time of a proxied frame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from types import TracebackType


class Deadlines:
    """Cancel blocks that pass their deadline. Create and use it in one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._active: set[Deadline] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf

    def __repr__(self) -> str:
        return f"<Deadlines active={len(self._active)} timer_at={self._timer_at:.3f}>"

    def until(self, when: float, later: Callable[[float], float] | None = None) -> Deadline:
        """Return a context manager that ends its block with a `TimeoutError` at `when` (the loop's clock, in seconds).

        It behaves like `asyncio.timeout_at`. If `later` is given, it is called at that time with the loop time. If it
        returns a later time, the block runs on until then; infinity: without a deadline.
        """
        return Deadline(self, when, later)

    def add(self, deadline: Deadline) -> None:
        """Start to watch a deadline."""
        self._active.add(deadline)
        if deadline.when < self._timer_at:
            self._set_timer(deadline.when)

    def remove(self, deadline: Deadline) -> None:
        """Stop watching a deadline whose block has ended.

        The timer stays as it is: if it fires without an expired deadline, it is set again. This is cheaper than a new
        timer for each request that ends.
        """
        self._active.discard(deadline)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self.loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        # uvloop's clock has a resolution of one millisecond, so the timer may run a fraction of a millisecond early.
        now, self._timer_at = max(self.loop.time(), self._timer_at), inf
        for deadline in [deadline for deadline in self._active if deadline.when <= now]:
            if not deadline.moves(now):
                deadline.expire()
            if deadline.when <= now or deadline.when == inf:
                self._active.remove(deadline)
        if self._active:
            self._set_timer(min(deadline.when for deadline in self._active))


class Deadline:
    """One deadline; it is active from the start to the end of its `with` block."""

    __slots__ = ("_cancelling", "_deadlines", "_expired", "_later", "_task", "when")

    def __init__(self, deadlines: Deadlines, when: float, later: Callable[[float], float] | None) -> None:
        self.when = when
        self._later = later
        self._deadlines = deadlines
        self._expired = False

    def __repr__(self) -> str:
        return f"<Deadline {id(self):#x} when={self.when:.3f} expired={self._expired}>"

    def __enter__(self) -> None:
        # Without the argument, asyncio finds the loop by a system call.
        task = asyncio.current_task(self._deadlines.loop)
        if task is None:
            raise RuntimeError("a deadline ends a task, and there is none")
        self._task = task
        self._cancelling = task.cancelling()
        self._deadlines.add(self)

    def moves(self, now: float) -> bool:
        """Return whether the block may run on after `now`; then `when` is its new deadline."""
        if self._later is not None:
            self.when = self._later(now)
        return self.when > now

    def expire(self) -> None:
        """Cancel the task, because the deadline has passed."""
        self._expired = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadlines.remove(self)
        # If other code has cancelled the task too, the task must end as cancelled and not with a TimeoutError.
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error
