"""A request from arrival to answer: who sent it, until when it is of use, what it costs, where its time went."""

from __future__ import annotations

from asyncio import Future, TimerHandle
from enum import IntEnum
from typing import Any, Literal, get_args

#: What can hold a queued request back. `turn`: nothing but the instant it takes to be chosen.
Cause = Literal["turn", "request_rate", "token_rate", "growth", "concurrency", "hold"]
CAUSES: tuple[Cause, ...] = get_args(Cause)

#: The parts of a request's wall time, in the order in which they happen.
Part = Literal["queue", "lock", "first_byte", "body", "write"]


class Priority(IntEnum):
    """Classes above the keys. They share 8 : 3 : 1, so nothing starves."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Stopwatch:
    """One watch, always running, always on exactly one part: so the parts sum to the wall time by construction."""

    __slots__ = ("_part", "_since", "seconds", "started")

    def __init__(self, now: float) -> None:
        self.started = now
        self.seconds: dict[Part, float] = {"queue": 0.0, "lock": 0.0, "first_byte": 0.0, "body": 0.0, "write": 0.0}
        self._part: Part = "queue"
        self._since = now

    def switch(self, part: Part, now: float) -> None:
        """From `now` on, time goes to `part`."""
        self.seconds[self._part] += now - self._since
        self._part = part
        self._since = now

    def stop(self, now: float) -> float:
        """Close the running part; returns the wall time so far in seconds."""
        self.switch(self._part, now)
        return now - self.started

    @property
    def upstream_seconds(self) -> float:
        """From the backend starting work to the last byte of its answer."""
        return self.seconds["first_byte"] + self.seconds["body"]


class Ticket:
    """One request. Made by the API, queued by admission, carried through by dispatch."""

    __slots__ = (
        "_causes_at_entry",
        "attempts",
        "backend",
        "cause_seconds",
        "deadline",
        "expiry",
        "key",
        "latest",
        "model",
        "not_before",
        "only_while_failing",
        "permit",
        "priority",
        "promised",
        "returned",
        "size_bytes",
        "stopwatch",
        "streaming",
        "tokens",
        "trace_id",
        "tried",
        "waits_since",
    )

    def __init__(
        self,
        *,
        now: float,
        deadline: float,
        key: str = "",
        priority: Priority = Priority.NORMAL,
        model: str = "",
        tokens: float = 0.0,
        size_bytes: int = 0,
        latest: bool = False,
    ) -> None:
        self.key = key
        """The fair-queue key: the camera."""
        self.priority = priority
        self.model = model
        self.deadline = deadline
        """On the loop's clock: after this the answer is of no more use."""
        self.tokens = tokens
        """LLM tokens this request is expected to cost."""
        self.size_bytes = size_bytes
        self.latest = latest
        """A newer request of the same key takes this one's place while it is still queued."""
        self.trace_id: str | None = None
        """The trace that somebody keeps of this request."""
        self.stopwatch = Stopwatch(now)
        self.attempts = 0
        self.backend = ""
        """Where it was last sent."""
        self.returned = False
        """It was refused upstream and goes back to the head of its key's queue."""
        self.not_before = 0.0
        """A retry may not go before this, on the loop's clock."""
        self.only_while_failing = False
        """A last retry, for when `not_before` is over and the upstream still fails whichever request it gets."""
        self.tried: tuple[object, ...] = ()
        """The upstreams where an attempt failed in a way that would repeat."""
        self.waits_since = 0.0
        """When it began to wait for `not_before`."""
        self.promised = False
        """Its caller was sent away, and told to come back now."""
        self.streaming = False
        """A part of the answer may have reached the caller: there is no other attempt after this."""
        self.cause_seconds: dict[Cause, float] | None = None
        """Time in the queue by what held it. None: it never waited."""
        self.permit: Future[Any] | None = None
        """Brings the pool's `Permit` while the ticket waits. A ticket does not know pools: they know tickets."""
        self.expiry: TimerHandle | None = None
        self._causes_at_entry: tuple[float, ...] = ()

    def enter_queue(self, held_seconds: list[float]) -> None:
        """Remember the queue's own account of causes (seconds each, in the order of `CAUSES`) as it is on arrival."""
        self._causes_at_entry = tuple(held_seconds)

    def leave_queue(self, held_seconds: list[float]) -> None:
        """Add what the account has grown by since `enter_queue`."""
        for cause, before, after in zip(CAUSES, self._causes_at_entry, held_seconds, strict=True):
            self.add_cause(cause, after - before)

    def add_cause(self, cause: Cause, seconds: float) -> None:
        """Book seconds of waiting to what held the request back."""
        if self.cause_seconds is None:
            self.cause_seconds = dict.fromkeys(CAUSES, 0.0)
        self.cause_seconds[cause] += seconds
