"""Deadlines of what is under way, kept by one timer: to make one for each costs a twentieth of a proxied frame."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from types import TracebackType


class Deadlines:
    """Cancels what is late. To be made and used in one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._kept: set[Deadline] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = inf

    def until(self, when: float, unless: Callable[[], bool] | None = None) -> Deadline:
        """End the block at that time of the loop's, with a `TimeoutError`: as `asyncio.timeout_at` does it.

        If `unless` says so at that time, the block goes on without a deadline.
        """
        return Deadline(self, when, unless)

    def keep(self, deadline: Deadline) -> None:
        """Look after one more."""
        self._kept.add(deadline)
        if deadline.when < self._looks_at:
            self._look_at(deadline.when)

    def forget(self, deadline: Deadline) -> None:
        """Its block is over. The timer stays: that of the next one is most often later."""
        self._kept.discard(deadline)

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._looks_at = when
        self._timer = self.loop.call_at(when, self._look)

    def _look(self) -> None:
        # uvloop counts in milliseconds, and may be a part of one early.
        now, self._looks_at = max(self.loop.time(), self._looks_at), inf
        for deadline in [deadline for deadline in self._kept if deadline.when <= now]:
            self._kept.remove(deadline)
            deadline.passes()
        if self._kept:
            self._look_at(min(deadline.when for deadline in self._kept))


class Deadline:
    """One of them, for as long as its block lasts."""

    __slots__ = ("_cancelling", "_deadlines", "_passed", "_task", "_unless", "when")

    def __init__(self, deadlines: Deadlines, when: float, unless: Callable[[], bool] | None) -> None:
        self.when = when
        self._unless = unless
        self._deadlines = deadlines
        self._passed = False

    def __enter__(self) -> None:
        task = asyncio.current_task(self._deadlines.loop)  # without it, a system call finds the loop
        if task is None:
            raise RuntimeError("a deadline ends a task, and there is none")
        self._task = task
        self._cancelling = task.cancelling()
        self._deadlines.keep(self)

    def passes(self) -> None:
        """It is late: cancel it."""
        if self._unless is not None and self._unless():
            return
        self._passed = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadlines.forget(self)
        # Whoever else has cancelled the task meanwhile must see it end as cancelled.
        if self._passed and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error
