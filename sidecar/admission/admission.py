"""The entry point of admission: `with await admission.permit(ticket) as permit:`."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from random import Random
from typing import Any

from sidecar.admission.errors import Draining, QueueFull, Superseded
from sidecar.admission.gates.base import Change
from sidecar.admission.pool import KEPT_SHARE, LARGE_SHARE, SMALL_BYTES, BodiesInFlight, Pool
from sidecar.admission.ticket import Cause, Priority, Ticket
from sidecar.admission.upstream import Permit, Upstream, UpstreamStatus

#: Maximum number of pools (one per model). Above it, the least recently used idle pool is deleted.
MAX_POOLS = 64
#: The model of a request that is no generation: a list of models, an upload policy. It waits in a pool of its own and
#: counts as an attempt in flight, but the operator's rates and the limits learned from generations do not apply to it.
NO_MODEL = "(no model)"
#: Maximum number of such requests in flight at one upstream. They take tens of milliseconds, so 8 are about 100/s.
MAX_WITHOUT_MODEL = 8


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """The operator's settings for one upstream. Rates are ceilings, per second."""

    name: str = ""
    tier: int = 1
    """A higher tier serves only requests that the lower tiers cannot serve in time."""
    requests_per_second: float = inf
    tokens_per_second: float = inf
    concurrency: int | None = None
    """Maximum number of attempts in flight; None: derived from the pace, and learned."""
    refusal_budget: float = 0.005
    paced: bool = True
    """False: the backend has no quota; only concurrency and the circuit delay tickets."""
    only_model: str | None = None
    """The name of the backend's model if it has only one. The backend answers all requests with it, whatever model they
    name, so all names share one upstream. None: the backend has a model for each name."""
    unready_reason: Callable[[], str | None] = lambda: None
    """Returns why the backend cannot serve at present, or None while it can."""


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The waiting requests of one model, and the upstreams that can answer them. Times are loop times in seconds."""

    model: str
    waiting: dict[Priority, int]
    waiting_bytes: int
    cause: Cause | None
    """Why the queue waits; None while it is empty."""
    last_used: float
    upstreams: tuple[UpstreamStatus, ...]
    longest_queues: tuple[tuple[str, int, float], ...]
    """The keys with the longest queues: key, number of tickets, and loop time at which the oldest ticket arrived."""


class Admission:
    """Decides which request is sent next, and when. Each model has its own `Pool`.

    The bounds on waiting requests and bytes apply to all pools together. Create and use it in one event loop. That loop
    is its only clock.
    """

    def __init__(
        self,
        upstreams: Sequence[UpstreamSettings] = (UpstreamSettings(),),
        *,
        queue_size: int = 2000,
        queue_bytes: int = 256 * 1024 * 1024,
        bytes_in_flight: int | None = None,
        answer_bytes: Callable[[], int] = int,
        random: Random | None = None,
    ) -> None:
        """`upstreams`: settings of all upstreams, in order of tier. `random`: source of the jitter between probes.

        `queue_bytes` bounds the bodies that wait. `bytes_in_flight` (None: as many) bounds the bodies that are sent,
        together with the answers, whose bytes `answer_bytes` returns.
        """
        self.loop = asyncio.get_running_loop()
        self.draining = False
        self.on_change: list[Callable[[str, str, Change], None]] = []
        """Called with upstream, model and change whenever a learned limit changes or a circuit opens or closes."""
        self._settings = upstreams
        self._queue_size = queue_size
        self._queue_bytes = queue_bytes
        self._random = random
        fixed = {settings.only_model for settings in upstreams}
        self._only_model = upstreams[0].only_model if None not in fixed else None
        self._upstreams: dict[tuple[str, str], Upstream] = {}
        self._pools: OrderedDict[str, Pool] = OrderedDict()
        self._bodies = BodiesInFlight(queue_bytes if bytes_in_flight is None else bytes_in_flight, answer_bytes)

    def __repr__(self) -> str:
        counts = f"pools={len(self._pools)} waiting={self.waiting()} in_flight={self.in_flight()}"
        return f"<Admission {id(self):#x} {counts} draining={self.draining}>"

    @property
    def names(self) -> list[str]:
        """The names of the upstreams, in order."""
        return [settings.name for settings in self._settings]

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
        """Do the first, synchronous part of `permit`: return the permit, or the future of the permit."""
        pool = self.pool(ticket.model)
        if self.draining and not ticket.requeued:
            raise Draining(
                "the sidecar is shutting down and takes no new work: try again in 1 s, its successor may be there",
                retry_after=1.0,
            )
        older = pool.waiting.superseded_by(ticket) if ticket.latest else None
        if older is not None:
            superseded = Superseded(
                f"a newer request of key {ticket.key!r} took its place: where both answers are wanted, send no "
                "X-Queue-Policy: latest"
            )
            # `ticket` returns from an attempt, and a newer frame has come since; or its client repeats an old frame.
            if ticket.repeated or older.stopwatch.started > ticket.stopwatch.started:
                raise superseded
            pool.take_out(self.loop.time(), older)  # its place is free for the newer ticket
        try:
            if not ticket.requeued:
                if pool.promises is not None:
                    pool.recognise(ticket)
                if pool.waiting.tickets or len(self._pools) > 1:
                    self._check_bounds(pool, ticket, replaces=older is not None)
            entry = pool.enter(ticket)
        except BaseException:
            if older is not None:
                pool.enqueue(self.loop.time(), older)
            raise
        if older is not None:
            pool.refuse(older, superseded)
            pool.admit(self.loop.time())  # it may have delayed other tickets
        return entry

    def pool(self, model: str) -> Pool:
        """Return the pool of a model. Create it on first use."""
        model = self._only_model or model
        pool = self._pools.get(model)
        if pool is None:
            while len(self._pools) >= MAX_POOLS and self._delete_idle_pool():
                pass
            settings = _without_model(self._settings) if model == NO_MODEL else self._settings
            pool = self._pools[model] = Pool(self.loop, [self._upstream(one, model) for one in settings], self._bodies)
        return pool

    def _upstream(self, settings: UpstreamSettings, model: str) -> Upstream:
        model = settings.only_model or model
        upstream = self._upstreams.get((settings.name, model))
        if upstream is None:
            upstream = self._upstreams[settings.name, model] = self.make_upstream(settings, model)
        return upstream

    def make_upstream(self, settings: UpstreamSettings, model: str) -> Upstream:
        """Create the upstream of a model. A benchmark overrides this method to use one that knows the real limits."""

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

    def waiting(self) -> int:
        """Return the number of waiting tickets in all pools."""
        return sum(len(pool.waiting) for pool in self._pools.values())

    def waiting_bytes(self) -> int:
        """Return the number of bytes of the waiting request bodies in all pools."""
        return sum(pool.waiting.bytes for pool in self._pools.values())

    def bytes_in_flight(self) -> int:
        """Return the number of bytes of the request bodies whose attempts are in flight."""
        return self._bodies.bytes

    def in_flight(self) -> int:
        """Return the number of attempts that hold a permit, at all upstreams."""
        return sum(upstream.concurrency.in_flight for upstream in self._upstreams.values())

    def _check_bounds(self, pool: Pool, ticket: Ticket, *, replaces: bool) -> None:
        """Raise `QueueFull` if the ticket does not fit into the bounds on waiting requests and bytes.

        `replaces`: it takes the place of an older ticket, which has left the queue. So only the bytes can be too many.
        """
        for other in self._pools.values():  # a plain loop, because this code runs for each request
            if other.waiting.tickets:
                break
        else:
            return  # if nothing waits, one request always fits, whatever its size
        waiting, size = self.waiting(), ticket.size_bytes
        now = self.loop.time()
        most_bytes = self._queue_bytes * (LARGE_SHARE if size > SMALL_BYTES else 1)
        room = max(min(self._queue_size, int(most_bytes // max(size, 1))), 1)
        kept = min(pool.kept(now, ticket), int(KEPT_SHARE * room)) if waiting else 0
        if waiting + kept >= self._queue_size and not replaces:
            about_to_come = f" and {kept} are about to come back as they were told" if kept else ""
            why = f"{waiting} requests are waiting{about_to_come}, as many as SIDECAR_QUEUE_SIZE allows"
            advice = "ask less often"
        elif (waiting_bytes := self.waiting_bytes()) + size > most_bytes and waiting_bytes:
            why = (
                f"{waiting_bytes} bytes are waiting and {size} more do not fit into the {most_bytes:.0f} that "
                "SIDECAR_QUEUE_BYTES leaves them"
            )
            advice = "send smaller images"
        else:
            return
        wait = pool.promise(now, ticket, room)
        raise QueueFull(f"{why}: try again after {wait:.0f} s, {advice}, or raise it", retry_after=wait)

    def _delete_idle_pool(self) -> bool:
        """Delete the least recently used pool that has no waiting ticket and no attempt in flight. False: none is idle.

        Pools that have learned nothing go first.
        """
        idle = [(model, pool) for model, pool in self._pools.items() if not (pool.waiting.tickets or pool.in_flight)]
        if not idle:
            return False
        oldest, pool = min(idle, key=lambda one: (one[1].worth, one[1].last_used))
        del self._pools[oldest]
        pool.close()
        for upstream in pool.upstreams:
            if not upstream.on_end:  # no other pool uses it
                del self._upstreams[upstream.name, upstream.model]
        return True

    # -- state file and operators --------------------------------------------------------------------------------------

    def learned(self, name: str) -> dict[str, Any]:
        """Return the learned limits of an upstream to save for a restart, by model. `recall` accepts this data."""
        return {
            model: learned
            for (upstream_name, model), upstream in self._upstreams.items()
            if upstream_name == name and (learned := upstream.learned())
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
        """Yield the present state of each pool.

        `longest`: the maximum number of keys in `longest_queues`. If it is above 0, the call walks over all waiting
        tickets.
        """
        now = self.loop.time()
        for model, pool in self._pools.items():
            yield PoolStatus(
                model,
                dict(pool.waiting.lengths),
                pool.waiting.bytes,
                pool.waiting.cause,
                pool.last_used,
                tuple(upstream.status(now) for upstream in pool.upstreams),
                tuple(pool.waiting.longest(longest)) if longest else (),
            )


def _without_model(upstreams: Sequence[UpstreamSettings]) -> list[UpstreamSettings]:
    """Return the settings for requests of `NO_MODEL`. An upstream with one model is in this process: it takes none."""
    return [
        replace(
            settings,
            requests_per_second=inf,
            tokens_per_second=inf,
            concurrency=min(settings.concurrency or MAX_WITHOUT_MODEL, MAX_WITHOUT_MODEL),
        )
        for settings in upstreams
        if settings.only_model is None
    ]
