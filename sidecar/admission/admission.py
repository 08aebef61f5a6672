"""The door to admission: `with await admission.permit(ticket) as permit:`."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from random import Random
from typing import Any

from sidecar.admission.arrivals import Arrival, Arrivals
from sidecar.admission.errors import Draining, QueueFull, Superseded
from sidecar.admission.gates.base import Change
from sidecar.admission.pool import KEPT_SHARE, Pool
from sidecar.admission.ticket import Cause, Priority, Ticket
from sidecar.admission.upstream import Permit, Upstream, UpstreamStatus

#: Models that have a pool of their own. The least recently used idle one goes when there are more.
MAX_POOLS = 64


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """What is known of an upstream before anything is learned. Rates are ceilings, per second."""

    name: str = ""
    tier: int = 1
    """Upstreams of a higher tier serve what those below cannot serve in time."""
    requests_per_second: float = inf
    tokens_per_second: float = inf
    concurrency: int | None = None
    """Attempts in flight; None: derived from the pace, and learned."""
    refusal_budget: float = 0.005
    paced: bool = True
    """False: the backend has no quota; only concurrency and the circuit hold tickets back."""
    only_model: str | None = None
    """The model that answers whatever model is named, so that all models share one upstream."""
    unready_reason: Callable[[], str | None] = lambda: None
    """Why the backend cannot serve at present; None while it can."""


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """What waits for one model, and the upstreams that can answer it. Times are on the event loop's clock."""

    model: str
    waiting: dict[Priority, int]
    waiting_bytes: int
    cause: Cause | None
    """What holds the queue; None while nothing waits."""
    last_used: float
    upstreams: tuple[UpstreamStatus, ...]
    longest_queues: tuple[tuple[str, int, float], ...]
    """Of the keys with the longest queues: key, tickets, and when the oldest of them arrived."""


class Admission:
    """Who goes next, and when. Every model has a `Pool`; the bounds on what waits hold for all pools together.

    Create and use it in one event loop. That loop is its only clock.
    """

    def __init__(
        self,
        upstreams: Sequence[UpstreamSettings] = (UpstreamSettings(),),
        *,
        queue_size: int = 2000,
        queue_bytes: int = 256 * 1024 * 1024,
        random: Random | None = None,
    ) -> None:
        """`upstreams` are all that can answer, in order; `random` gives the jitter between probes."""
        self.loop = asyncio.get_running_loop()
        self.draining = False
        self.on_change: list[Callable[[str, str, Change], None]] = []
        """Called with upstream, model and event whenever a learned limit changes."""
        self._settings = upstreams
        self._queue_size = queue_size
        self._queue_bytes = queue_bytes
        self._random = random
        fixed = {one.only_model for one in upstreams}
        self._only_model = upstreams[0].only_model if None not in fixed else None
        self._upstreams: dict[tuple[str, str], Upstream] = {}
        self._pools: OrderedDict[str, Pool] = OrderedDict()
        self._arrivals = Arrivals(self.loop, queue_bytes, self.waiting_bytes)

    def __repr__(self) -> str:
        counts = f"pools={len(self._pools)} waiting={self.waiting()} in_flight={self.in_flight()}"
        return f"<Admission {id(self):#x} {counts} draining={self.draining}>"

    @property
    def names(self) -> list[str]:
        """The names of the upstreams, in order."""
        return [one.name for one in self._settings]

    async def permit(self, ticket: Ticket) -> Permit:
        """Wait for the ticket's turn and return its permit. Use it in a `with` block, which releases it at the end.

        Raises `QueueFull`, `DeadlineUnreachable`, `Superseded`, `Draining`, `AccountClosed` or `StillFailing`.
        """
        entry = self.enter(ticket)
        if isinstance(entry, Permit):
            return entry
        try:
            return await entry
        except asyncio.CancelledError:
            # The permit may arrive in the same loop iteration as the cancellation. Then release it immediately.
            if entry.done() and not entry.cancelled() and entry.exception() is None:
                entry.result().release(self.loop.time())
            else:
                self.pool(ticket.model).leave(ticket)
            raise
        finally:
            del entry  # its error may refer to this frame: a reference cycle would keep the request body in memory

    def enter(self, ticket: Ticket) -> Permit | asyncio.Future[Permit]:
        """Do the first, synchronous part of `permit`: return the permit, or the future that will bring it."""
        pool = self.pool(ticket.model)
        if self.draining and not ticket.requeued:
            raise Draining(
                "the sidecar is shutting down and takes no new work: try again in 1 s, its successor may be there",
                retry_after=1.0,
            )
        if ticket.latest and (other := pool.superseded_by(ticket)) is not None:
            superseded = Superseded(
                f"a newer request of key {ticket.key!r} took its place: where both answers are wanted, send no "
                "X-Queue-Policy: latest"
            )
            if other.stopwatch.started > ticket.stopwatch.started:  # it arrived while this ticket was upstream
                raise superseded
            pool.refuse(other, superseded)
        if not ticket.requeued:
            pool.recognise(ticket)
            self._check_bounds(pool, ticket)
        return pool.enter(ticket)

    def pool(self, model: str) -> Pool:
        """The queue and the upstreams of a model, made when first asked for."""
        model = self._only_model or model
        pool = self._pools.get(model)
        if pool is None:
            if len(self._pools) >= MAX_POOLS:
                self._forget_one()
            pool = self._pools[model] = Pool(self.loop, [self._upstream(one, model) for one in self._settings])
        return pool

    def _upstream(self, settings: UpstreamSettings, model: str) -> Upstream:
        model = settings.only_model or model
        upstream = self._upstreams.get((settings.name, model))
        if upstream is None:
            upstream = self._upstreams[settings.name, model] = self.make_upstream(settings, model)
        return upstream

    def make_upstream(self, settings: UpstreamSettings, model: str) -> Upstream:
        """Make the upstream of a model. A benchmark puts an oracle in its place."""

        def on_change(change: Change) -> None:
            for notify in self.on_change:
                notify(settings.name, model, change)

        return Upstream(
            self.loop.time,
            name=settings.name,
            model=model,
            tier=settings.tier,
            requests_per_second=settings.requests_per_second,
            tokens_per_second=settings.tokens_per_second,
            concurrency=settings.concurrency,
            refusal_budget=settings.refusal_budget,
            paced=settings.paced,
            random=self._random,
            unready_reason=settings.unready_reason,
            on_change=on_change,
        )

    # -- bounds --------------------------------------------------------------------------------------------------------

    def arrival(self, reading: asyncio.Timeout) -> Arrival:
        """Return a context manager that counts a body while it is received; see `Arrival`."""
        return Arrival(self._arrivals, reading)

    def arriving_bytes(self) -> int:
        """Return the bytes received so far of bodies that are not complete."""
        return self._arrivals.bytes

    def waiting(self) -> int:
        """Tickets that wait, in all pools."""
        return sum(pool.waiting for pool in self._pools.values())

    def waiting_bytes(self) -> int:
        """Bytes of request bodies that wait, in all pools."""
        return sum(pool.waiting_bytes for pool in self._pools.values())

    def in_flight(self) -> int:
        """Attempts that hold a permit, at all upstreams."""
        return sum(one.concurrency.in_flight for one in self._upstreams.values())

    def _check_bounds(self, pool: Pool, ticket: Ticket) -> None:
        if not self._arrivals.bytes:
            for other in self._pools.values():  # as a loop: this is asked for each request
                if not other.is_empty:
                    break
            else:
                return  # if nothing waits, one request always fits, whatever its size
        waiting, size = self.waiting(), ticket.size_bytes
        now = self.loop.time()
        room = max(min(self._queue_size, self._queue_bytes // max(size, 1)), 1)
        kept = min(pool.kept(now, ticket), int(KEPT_SHARE * room)) if waiting else 0
        if waiting + kept >= self._queue_size:
            wait = pool.promise(now, ticket, room)
            about_to_come = f" and {kept} are about to come back as they were told" if kept else ""
            raise QueueFull(
                f"{waiting} requests are waiting{about_to_come}, as many as SIDECAR_QUEUE_SIZE allows: "
                f"try again after {wait:.0f} s, ask less often, or raise it",
                retry_after=wait,
            )
        if not self._arrivals.make_room(size):
            wait = pool.promise(now, ticket, room)
            raise QueueFull(
                f"{self._arrivals.bytes_in_use()} bytes are waiting or being received and {size} more do not fit into "
                f"SIDECAR_QUEUE_BYTES = {self._queue_bytes}: try again after {wait:.0f} s, send smaller images, or "
                "raise it",
                retry_after=wait,
            )

    def _forget_one(self) -> None:
        """Forget the pool that was used least recently, among those in which nothing waits or is in flight."""
        idle = [
            model
            for model, pool in self._pools.items()
            if not pool.waiting and not any(one.concurrency.in_flight for one in pool.upstreams)
        ]
        if idle:
            oldest = min(idle, key=lambda model: self._pools[model].last_used)
            pool = self._pools.pop(oldest)
            pool.close()
            kept = {one for other in self._pools.values() for one in other.upstreams}
            self._upstreams = {key: one for key, one in self._upstreams.items() if one in kept}

    # -- state file and operators --------------------------------------------------------------------------------------

    def learned(self, name: str) -> dict[str, Any]:
        """What is worth remembering of an upstream over a restart, by model: plain data for `recall`."""
        return {
            model: learned
            for (upstream, model), one in self._upstreams.items()
            if upstream == name and (learned := one.learned())
        }

    def recall(self, name: str, learned: Mapping[str, Any], share: float) -> None:
        """Restore what `learned` returned before a restart, with limits scaled by `share`.

        Raises `KeyError` if the data has another form.
        """
        for model, limits in learned.items():
            for upstream in self.pool(model).upstreams:
                if upstream.name == name:
                    upstream.recall(self.loop.time(), limits, share)

    def status(self, longest: int = 0) -> Iterator[PoolStatus]:
        """Give the present state of every pool, with so many of the longest queues: this walks over all keys."""
        now = self.loop.time()
        for model, pool in self._pools.items():
            yield PoolStatus(
                model,
                {priority: pool.waiting_of(priority) for priority in Priority},
                pool.waiting_bytes,
                pool.cause,
                pool.last_used,
                tuple(one.status(now) for one in pool.upstreams),
                tuple(pool.queue.longest(longest)) if longest else (),
            )
