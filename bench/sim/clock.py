"""An event loop on virtual time: when nothing is ready to run, its clock jumps to the time of the next timer.

It is real asyncio without real waiting. So the serving code itself runs here, and every run is the same.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop on virtual time that begins at `start` seconds. For code without sockets and threads."""

    def __init__(self, start: float = 1000.0) -> None:
        self.now = start
        super().__init__(_JumpingSelector(self))
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.SelectSelector):
    """Set the loop's clock to the time of the next timer instead of waiting for it."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits, and nothing will ever happen: a deadlock")
        if timeout > 0:
            self._loop.now += timeout
        return []


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine as `asyncio.run` does, but on virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
