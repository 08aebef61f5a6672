"""A request from arrival to answer: its key, its deadline, its cost, and where its time was spent."""

from __future__ import annotations

from asyncio import Future, TimerHandle
from enum import IntEnum
from typing import Any, Literal, get_args

#: What can delay a queued request. `turn`: no gate delays it; it only waits for the moment in which it is chosen.
Cause = Literal["turn", "request_rate", "token_rate", "growth", "concurrency", "hold"]
CAUSES: tuple[Cause, ...] = get_args(Cause)

#: The parts of a request's wall time, in the order in which they happen.
Part = Literal["queue", "lock", "first_byte", "body", "write"]


class Priority(IntEnum):
    """What a request asks for in `X-Request-Priority`.

    Keys share the throughput in the ratio 8 : 3 : 1, each by the highest priority that it asks for, so that none
    starves. While more than half of the waiting keys ask for HIGH, all keys get equal shares.
    """

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Stopwatch:
    """Measure the parts of a request's wall time. It always runs on exactly one part, so the parts sum to the total."""

    __slots__ = ("_part", "_since", "seconds", "started")

    def __init__(self, now: float) -> None:
        self.started = now
        self.seconds: dict[Part, float] = {"queue": 0.0, "lock": 0.0, "first_byte": 0.0, "body": 0.0, "write": 0.0}
        self._part: Part = "queue"
        self._since = now

    def __repr__(self) -> str:
        spent = "".join(f" {part}={seconds:.3f}" for part, seconds in self.seconds.items() if seconds)
        return f"<{type(self).__name__} in {self._part}{spent}>"

    def switch(self, part: Part, now: float) -> None:
        """Count the time after `now` as `part`."""
        self.seconds[self._part] += now - self._since
        self._part = part
        self._since = now

    def stop(self, now: float) -> float:
        """Close the running part and return the wall time so far in seconds."""
        self.switch(self._part, now)
        return now - self.started

    @property
    def upstream_seconds(self) -> float:
        """Seconds from the moment the backend starts work to the last byte of its answer."""
        return self.seconds["first_byte"] + self.seconds["body"]


class Ticket:
    """One request. The API creates it, admission queues it, and dispatch runs it."""

    __slots__ = (
        "_causes_at_entry",
        "attempts",
        "backend",
        "cause_seconds",
        "deadline",
        "doubted",
        "expiry",
        "has_paid",
        "key",
        "latest",
        "model",
        "not_before",
        "only_while_failing",
        "permit",
        "priority",
        "promised",
        "repeated",
        "requeued",
        "setbacks",
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
        repeated: bool = False,
    ) -> None:
        self.key = key
        """The key of the fair queue: the camera."""
        self.priority = priority
        self.model = model
        self.deadline = deadline
        """Loop time after which the answer is useless."""
        self.tokens = tokens
        """Estimated input of this request in LLM tokens."""
        self.size_bytes = size_bytes
        self.latest = latest
        """True: a newer request of the same key replaces this one while it is queued."""
        self.repeated = repeated
        """True: the client repeats a request by itself. Its frame is old, so it never replaces another request."""
        self.trace_id: str | None = None
        """The id of the request's trace if the trace is recorded, else None."""
        self.stopwatch = Stopwatch(now)
        self.attempts = 0
        self.backend = ""
        """The name of the backend of the last attempt."""
        self.requeued = False
        """True: an attempt brought no answer and the ticket is queued again, at the head of its key's queue."""
        self.setbacks = 0
        """Number of its attempts that failed, or that were refused although others were accepted or as probes. Such a
        ticket is no good probe, because it may itself be the cause."""
        self.has_paid = False
        """True: its key was charged for an attempt that a limit refused, so the next attempt is free."""
        self.doubted = False
        """True: an attempt was refused because of the account or the key, and is made once more before all others."""
        self.not_before = 0.0
        """Loop time before which a retry may not be sent."""
        self.only_while_failing: Any = None
        """The upstream whose failure led to the last retry, else None. After `not_before`, the retry is sent only if
        this upstream fails other requests too; otherwise the ticket gets `StillFailing`."""
        self.tried: tuple[object, ...] = ()
        """Upstreams at which an attempt failed and would fail again."""
        self.waits_since = 0.0
        """Loop time at which the ticket began to wait for `not_before`."""
        self.promised = False
        """True: the caller was refused before and now returns at the time of its Retry-After."""
        self.streaming = False
        """True: a part of the answer may have reached the caller, so no other attempt may follow."""
        self.cause_seconds: dict[Cause, float] | None = None
        """Seconds in the queue by cause of the wait. None: the ticket never waited."""
        self.permit: Future[Any] | None = None
        """Future of the pool's `Permit` while the ticket waits. Typed as Any, because this module must not import the
        pool."""
        self.expiry: TimerHandle | None = None
        self._causes_at_entry: tuple[float, ...] = ()

    def __repr__(self) -> str:
        state = f"attempts={self.attempts} backend={self.backend!r} deadline={self.deadline:.3f} {self.stopwatch!r}"
        return f"<Ticket {id(self):#x} {self.priority.name} model={self.model[:40]!r} {state}>"

    @property
    def is_waiting(self) -> bool:
        """True while its caller waits for a permit; False after a permit or an error, or when the caller has left."""
        return self.permit is not None and not self.permit.done()

    def enter_queue(self, wait_seconds: list[float]) -> None:
        """Store the queue's total `wait_seconds` per cause at arrival, in the order of `CAUSES`."""
        self._causes_at_entry = tuple(wait_seconds)

    def leave_queue(self, wait_seconds: list[float]) -> None:
        """Add to each cause the increase of the queue's total `wait_seconds` since `enter_queue`."""
        for cause, before, after in zip(CAUSES, self._causes_at_entry, wait_seconds, strict=True):
            self.add_cause(cause, after - before)

    def add_cause(self, cause: Cause, seconds: float) -> None:
        """Add seconds of waiting to the cause that delayed the request."""
        if self.cause_seconds is None:
            self.cause_seconds = dict.fromkeys(CAUSES, 0.0)
        self.cause_seconds[cause] += seconds
