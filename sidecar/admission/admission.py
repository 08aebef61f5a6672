"""The entry to admission: `with await admission.permit(ticket) as permit:`."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from math import inf
from random import Random
from typing import Any

from sidecar.admission.arrivals import Arrival, Arrivals
from sidecar.admission.errors import Draining, QueueFull, Superseded
from sidecar.admission.lane import KEPT_SHARE, Lane, Permit
from sidecar.admission.limits import Limits
from sidecar.admission.ticket import Priority, Ticket

#: Maximum number of models that have their own lane. A new model beyond it replaces the least recently used idle lane.
MAX_LANES = 64


class Admission:
    """Grant permits for one backend. Every model has its own `Lane`; all lanes share the bounds on waiting requests.

    Create and use it in one event loop. That loop is its only clock.
    """

    def __init__(
        self,
        *,
        queue_size: int = 2000,
        queue_bytes: int = 256 * 1024 * 1024,
        requests_per_second: float = inf,
        tokens_per_second: float = inf,
        concurrency: int | None = None,
        refusal_budget: float = 0.005,
        paced: bool = True,
        only_model: str | None = None,
        random: Random | None = None,
    ) -> None:
        """`only_model`: the model that answers every request, whatever model the request names; there is one queue."""
        self.loop = asyncio.get_running_loop()
        self._queue_size = queue_size
        self._queue_bytes = queue_bytes
        self._only_model = only_model
        self._limits = partial(
            Limits,
            requests_per_second=requests_per_second,
            tokens_per_second=tokens_per_second,
            concurrency=concurrency,
            refusal_budget=refusal_budget,
            paced=paced,
            random=random,
        )
        self.lanes: OrderedDict[str, Lane] = OrderedDict()
        self.draining = False
        self._arrivals = Arrivals(self.loop, queue_bytes, self.waiting_bytes)

    def __repr__(self) -> str:
        counts = f"lanes={len(self.lanes)} waiting={self.waiting()} in_flight={self.in_flight()}"
        return f"<Admission {id(self):#x} {counts} draining={self.draining}>"

    async def permit(self, ticket: Ticket) -> Permit:
        """Wait for the ticket's turn and return its permit. Use it in a `with` block, which releases it at the end.

        Raises `QueueFull`, `DeadlineUnreachable`, `Superseded`, `Draining` or `AccountClosed`.
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
                self.lane(ticket.model).leave(ticket)
            raise
        finally:
            del entry  # its error may refer to this frame: a reference cycle would keep the request body in memory

    def lane(self, model: str) -> Lane:
        """Return the model's own lane (queue and limits). The first call for a model creates it."""
        model = self._only_model or model
        lane = self.lanes.get(model)
        if lane is None:
            if len(self.lanes) >= MAX_LANES:
                self._forget_one()
            lane = self.lanes[model] = Lane(self.loop, self._limits(self.loop.time()))
        return lane

    def learned(self) -> dict[str, Any]:
        """Return the learned values to keep over a restart, by model: plain data for `recall`."""
        return {model: learned for model, lane in self.lanes.items() if (learned := lane.limits.learned())}

    def recall(self, learned: Mapping[str, Any], share: float) -> None:
        """Restore what `learned` returned before a restart, with limits scaled by `share`.

        Raises `KeyError` if the data has another form.
        """
        for model, limits in learned.items():
            self.lane(model).limits.recall(self.loop.time(), limits, share)

    def waiting(self, priority: Priority | None = None) -> int:
        """Return the number of tickets in all queues, of all priority classes or of one."""
        return sum(len(lane.queue) if priority is None else lane.queue.length(priority) for lane in self.lanes.values())

    def waiting_bytes(self) -> int:
        """Return the bytes of request bodies in all queues."""
        return sum(lane.queue.bytes for lane in self.lanes.values())

    def in_flight(self) -> int:
        """Return the number of attempts that hold a permit."""
        return sum(lane.limits.permits.in_flight for lane in self.lanes.values())

    def arrival(self, reading: asyncio.Timeout) -> Arrival:
        """Return a context manager that counts a body while it is received; see `Arrival`."""
        return Arrival(self._arrivals, reading)

    def arriving_bytes(self) -> int:
        """Return the bytes received so far of bodies that are not complete."""
        return self._arrivals.bytes

    def enter(self, ticket: Ticket) -> Permit | asyncio.Future[Permit]:
        """Do the first, synchronous part of `permit`: return the permit, or the future that will bring it."""
        lane = self.lane(ticket.model)
        if self.draining and not ticket.returned:
            raise Draining(
                "the sidecar is shutting down and takes no new work: try again in 1 s, its successor may be there",
                retry_after=1.0,
            )
        if ticket.latest and (other := lane.queue.superseded_by(ticket)) is not None:
            superseded = Superseded(
                f"a newer request of key {ticket.key!r} took its place: where both answers are wanted, send no "
                "X-Queue-Policy: latest"
            )
            if other.stopwatch.started > ticket.stopwatch.started:  # it arrived while this ticket was upstream
                raise superseded
            lane.refuse(other, superseded)
        if not ticket.returned:
            lane.recognise(ticket)
            self._check_bounds(lane, ticket)
        return lane.enter(ticket)

    def _check_bounds(self, lane: Lane, ticket: Ticket) -> None:
        if not self._arrivals.bytes:
            for other in self.lanes.values():  # a plain loop is faster, and this runs for each request
                if other.queue.tickets:
                    break
            else:
                return  # if nothing waits, one request always fits, whatever its size
        waiting, size = self.waiting(), ticket.size_bytes
        now = self.loop.time()
        room = max(min(self._queue_size, self._queue_bytes // max(size, 1)), 1)
        kept = min(lane.kept(now, ticket), int(KEPT_SHARE * room)) if waiting else 0
        if waiting + kept >= self._queue_size:
            wait = lane.promise(now, ticket, room)
            about_to_come = f" and {kept} are about to come back as they were told" if kept else ""
            raise QueueFull(
                f"{waiting} requests are waiting{about_to_come}, as many as SIDECAR_QUEUE_SIZE allows: "
                f"try again after {wait:.0f} s, ask less often, or raise it",
                retry_after=wait,
            )
        if not self._arrivals.make_room(size):
            wait = lane.promise(now, ticket, room)
            raise QueueFull(
                f"{self._arrivals.held()} bytes are waiting or being received and {size} more do not fit into "
                f"SIDECAR_QUEUE_BYTES = {self._queue_bytes}: try again after {wait:.0f} s, send smaller images, or "
                "raise it",
                retry_after=wait,
            )

    def _forget_one(self) -> None:
        idle = [m for m, lane in self.lanes.items() if not len(lane.queue) and not lane.limits.permits.in_flight]
        if idle:
            del self.lanes[min(idle, key=lambda model: self.lanes[model].last_used)]
