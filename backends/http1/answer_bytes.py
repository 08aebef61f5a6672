"""Bounds what upstreams, and callers that do not read, can make the process hold.

Three kinds of bytes share one bound: the bodies in flight, the answers that are being read from upstreams, and what
slow readers have not read. At the bound, `ByteBudget` reads only one upstream's socket, and `SlowReaders` closes the
connections of the callers that have not read for the longest time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

from backends.byte_budget import ByteBudget
from backends.http1.slow_readers import SlowReaders

#: Bytes of one answer that are not counted. The objects of its connection need more memory. So the usual answer costs
#: no time here, and an upstream that sends the head early is not taken for one that stalls.
_UNCOUNTED_BYTES = 4096


class UpstreamSocket(Protocol):
    """The connection on which an answer arrives."""

    def set_stopped(self, *, stopped: bool) -> None:
        """Stop reading the socket, or go on."""
        ...

    def give_up(self) -> None:
        """End the answer with an error, and close the connection."""
        ...


class AnswerBytes:
    """The bound and its counters: one for each process. Create it in the event loop."""

    def __init__(self, max_bytes: int = sys.maxsize, *, in_flight: Callable[[], int] = int) -> None:
        """`in_flight` returns the bytes of the requests' bodies whose attempts are in flight."""
        self.in_flight = in_flight
        self.slow_readers = SlowReaders(max_bytes, lambda: self._budget.held_bytes + self.in_flight())
        self._accounts: dict[AnswerAccount, None] = {}
        self._budget = ByteBudget(
            max_bytes, self._accounts, elsewhere=lambda: self.slow_readers.bytes + self.in_flight()
        )

    def __repr__(self) -> str:
        return f"<AnswerBytes answers={len(self._accounts)} {self._budget!r} {self.slow_readers!r}>"

    @property
    def answer_bytes(self) -> int:
        """The bytes of answers that are held until a caller gets them."""
        return self._budget.held_bytes

    @property
    def unread_bytes(self) -> int:
        """The bytes that were written for callers, and that these have not read."""
        return self.slow_readers.bytes

    def held_bytes(self) -> int:
        """Return the bytes of both, without those in flight."""
        return self._budget.held_bytes + self.slow_readers.bytes

    def by_place(self) -> dict[str, int]:
        """Return the bytes by the place where they are held."""
        return {"answers": self.answer_bytes, "slow_readers": self.unread_bytes}

    def open(self, socket: UpstreamSocket) -> AnswerAccount:
        """Return a new account for the answer that will arrive on this socket. Close it when nothing is held."""
        account = AnswerAccount(self._budget, self._accounts, socket)
        if self._budget.is_full:
            account.set_stopped(stopped=self._budget.stops(account))
        return account


class AnswerAccount:
    """The bytes of one answer that are held. It implements `byte_budget.Socket`."""

    __slots__ = (
        "_accounts",
        "_budget",
        "_head_bytes",
        "_socket",
        "bytes_then",
        "held_bytes",
        "holds_since",
        "is_stopped",
        "slow_since",
        "uncounted_bytes",
    )  # fmt: skip

    def __init__(self, budget: ByteBudget, accounts: dict[AnswerAccount, None], socket: UpstreamSocket) -> None:
        self.held_bytes = self.bytes_then = 0
        self.holds_since = self.slow_since = 0.0
        self.is_stopped = False
        self.uncounted_bytes = 0
        """Bytes that have arrived and are not counted yet: see `count`."""
        self._head_bytes = 0
        self._budget = budget
        self._accounts = accounts
        self._socket: UpstreamSocket | None = socket  # None after the whole answer has arrived
        accounts[self] = None

    def __repr__(self) -> str:
        return f"<AnswerAccount held={self.held_bytes} incomplete={self.is_incomplete}>"

    @property
    def is_incomplete(self) -> bool:
        """Whether more of the answer must arrive."""
        return self._socket is not None

    def set_stopped(self, *, stopped: bool) -> None:
        """Stop reading the socket, or go on."""
        self.is_stopped = stopped
        if self._socket is not None:
            self._socket.set_stopped(stopped=stopped)

    def give_up(self) -> None:
        """End the answer with an error. Its reader then closes the account."""
        if self._socket is not None:
            self._socket.give_up()

    def count(self) -> None:
        """Count the bytes that have arrived, if they are more than a few."""
        if (self.held_bytes or self.uncounted_bytes > _UNCOUNTED_BYTES) and self in self._accounts:
            more, self.uncounted_bytes = self.uncounted_bytes, 0
            self._budget.add(self, more)

    def keep(self, still_held: int) -> None:
        """Count only `still_held` bytes from now on: the others were handed on, or dropped."""
        more = still_held + self._head_bytes - self.held_bytes
        self.uncounted_bytes = max(more, 0)
        if more < 0:
            self._budget.remove(self, -more)
        elif more:
            self.count()

    def keep_head(self, head_bytes: int) -> None:
        """Count the answer's head until the end, if it is large."""
        if head_bytes > _UNCOUNTED_BYTES:
            self._head_bytes = head_bytes

    def complete(self) -> None:
        """Leave the socket, because the whole answer has arrived. What it has brought is still held."""
        if self.is_stopped:
            self.set_stopped(stopped=False)
        self._socket = None

    def close(self) -> None:
        """Stop counting this answer. A second call does nothing."""
        self._socket = None
        self._head_bytes = 0
        self.keep(0)
        self._accounts.pop(self, None)
