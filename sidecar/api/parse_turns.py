"""Large bodies are parsed in one thread, so that they never take all processors. They take turns by their source.

Without turns, one caller who keeps sending large bodies would delay the bodies of all others before admission, where
no fair queue is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from itertools import count
from typing import TypeVar

_T = TypeVar("_T")

#: After a larger body, the thread rests for twice the time that it took: the parser keeps Python's lock meanwhile, so
#: the event loop stands still. So large bodies take at most a third of the time from other requests.
RESTS_AFTER_BYTES, RESTS = 1024 * 1024, 2.0


class ParseTurns:
    """One thread, and the bodies that wait for it. Must be used in one event loop.

    It is a fair queue by bytes: each waiting source gets an equal share of the bytes that are parsed, and a small body
    does not wait for all the large ones that came before it. (Weighted fair queueing: a body's place is the virtual
    time at which its last byte would be parsed if the sources took turns byte by byte.)
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "parse")
        self._waiting: list[tuple[float, int, int, Hashable, asyncio.Future[None]]] = []
        """Heap of place, number of arrival, bytes, source, and the future that gives the turn."""
        self._arrivals = count()
        self._places: dict[Hashable, float] = {}  # the last place of each source that has one ahead of the virtual time
        self._virtual_bytes = 0.0  # the bytes that each source could have had parsed so far
        self._is_busy = False

    def __repr__(self) -> str:
        return f"<ParseTurns waiting={len(self._waiting)} busy={self._is_busy}>"

    async def run(self, source: Hashable, size_bytes: int, parse: Callable[[], _T]) -> _T:
        """Return the result of `parse`, which runs in the thread when it is this body's turn.

        If the call is cancelled, the next body gets the turn.
        """
        loop = asyncio.get_running_loop()
        place = max(self._virtual_bytes, self._places.get(source, 0.0)) + size_bytes
        self._places[source] = place
        turn: asyncio.Future[None] = loop.create_future()
        heappush(self._waiting, (place, next(self._arrivals), size_bytes, source, turn))
        if not self._is_busy:
            self._give_turn()
        began = 0.0
        try:
            await turn
            began = loop.time()
            return await loop.run_in_executor(self.thread, parse)
        finally:
            if turn.done() and not turn.cancelled():
                if began and size_bytes > RESTS_AFTER_BYTES:
                    loop.call_later(RESTS * (loop.time() - began), self._give_turn)
                else:
                    self._give_turn()

    def _give_turn(self) -> None:
        """Give the next body its turn."""
        while self._waiting:
            sources = len({source for _, _, _, source, _ in self._waiting})
            _, _, size_bytes, _, turn = heappop(self._waiting)
            if turn.done():
                continue  # its caller has left
            self._is_busy = True
            self._virtual_bytes += size_bytes / sources
            self._places = {source: place for source, place in self._places.items() if place > self._virtual_bytes}
            turn.set_result(None)
            return
        self._is_busy, self._virtual_bytes = False, 0.0
        self._places.clear()
