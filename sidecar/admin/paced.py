"""Bounds the processor time of pages that anybody in the cluster can ask for, as often as they like."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")

#: The share of one processor that making pages may take in the long run. All of it comes out of the event loop's time.
_SHARE = 0.05
#: Seconds of processor time that may be spent at once: about 50 pages. Prometheus and a few people never use it up.
_BURST_SECONDS = 0.25


class Paced:
    """Makes each result anew while there is time for it. Otherwise it returns the previous one."""

    def __init__(self) -> None:
        self._seconds_left = _BURST_SECONDS
        self._refilled_at = time.monotonic()
        self._previous: dict[str, Any] = {}

    def get(self, name: str, make: Callable[[], _T]) -> _T:
        """Return what `make` returns now, or what it returned last. `name` is one of a few names in the code."""
        now = time.monotonic()
        self._seconds_left = min(self._seconds_left + _SHARE * (now - self._refilled_at), _BURST_SECONDS)
        self._refilled_at = now
        if self._seconds_left > 0 or name not in self._previous:
            began = time.thread_time()
            self._previous[name] = make()
            self._seconds_left -= time.thread_time() - began
        made: _T = self._previous[name]
        return made
