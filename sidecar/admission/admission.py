"""The door: `with await admission.permit(ticket) as permit:`."""

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

#: Models that keep limits of their own. The least recently used idle one goes when there are more.
MAX_LANES = 64


class Admission:
    """Who goes next, and when, for one backend. Every model has a `Lane`; the bounds on what waits are for all of them.

    Must be made and used in one event loop; it takes the time from that loop and nowhere else.
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
        """`only_model`: the one that answers whatever model is named, so that there is one queue."""
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

    async def permit(self, ticket: Ticket) -> Permit:
        """Wait the ticket's turn; `with` the permit, it goes back at the end of the block.

        Raises `QueueFull`, `DeadlineUnreachable`, `Superseded`, `Draining` or `AccountClosed`.
        """
        entry = self.enter(ticket)
        if isinstance(entry, Permit):
            return entry
        try:
            return await entry
        except asyncio.CancelledError:
            # The permit may have come in the same turn of the loop as the cancellation: then it goes straight back.
            if entry.done() and not entry.cancelled() and entry.exception() is None:
                entry.result().release(self.loop.time())
            else:
                self.lane(ticket.model).leave(ticket)
            raise
        finally:
            del entry  # it may hold an error that holds this frame: they would keep each other, and the body

    def lane(self, model: str) -> Lane:
        """The model's own queue and limits, made when first asked for."""
        model = self._only_model or model
        lane = self.lanes.get(model)
        if lane is None:
            if len(self.lanes) >= MAX_LANES:
                self._forget_one()
            lane = self.lanes[model] = Lane(self.loop, self._limits(self.loop.time()))
        return lane

    def learned(self) -> dict[str, Any]:
        """What is worth remembering over a restart, by model: plain data for `recall`."""
        return {model: learned for model, lane in self.lanes.items() if (learned := lane.limits.learned())}

    def recall(self, learned: Mapping[str, Any], share: float) -> None:
        """Begin with that share of what `learned` gave before a restart. Raises `KeyError` on other data."""
        for model, limits in learned.items():
            self.lane(model).limits.recall(self.loop.time(), limits, share)

    def waiting(self, priority: Priority | None = None) -> int:
        """Tickets in all queues, or in those of one class."""
        return sum(len(lane.queue) if priority is None else lane.queue.length(priority) for lane in self.lanes.values())

    def waiting_bytes(self) -> int:
        """Bytes of request bodies in all queues."""
        return sum(lane.queue.bytes for lane in self.lanes.values())

    def in_flight(self) -> int:
        """Attempts that hold a permit."""
        return sum(lane.limits.permits.in_flight for lane in self.lanes.values())

    def arrival(self, reading: asyncio.Timeout) -> Arrival:
        """Count a body while it is received, `with` this; see `Arrival`."""
        return Arrival(self._arrivals, reading)

    def arriving_bytes(self) -> int:
        """Bytes of bodies that are still being received."""
        return self._arrivals.bytes

    def enter(self, ticket: Ticket) -> Permit | asyncio.Future[Permit]:
        """What `permit` does on entering, without the wait."""
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
            if other.stopwatch.started > ticket.stopwatch.started:  # it came while this one was upstream
                raise superseded
            lane.refuse(other, superseded)
        if not ticket.returned:
            lane.recognise(ticket)
            self._check_bounds(lane, ticket)
        return lane.enter(ticket)

    def _check_bounds(self, lane: Lane, ticket: Ticket) -> None:
        if not self._arrivals.bytes:
            for other in self.lanes.values():  # as a loop: this is asked for each request
                if other.queue.tickets:
                    break
            else:
                return  # one always finds room alone
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
