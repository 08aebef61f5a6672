"""Carries each ticket through: get a permit, make an attempt, report the verdict to admission; repeat while it helps.

This is the only loop around backends. After a failed attempt it decides what happens to the request: another attempt
at the same backend, an attempt at another backend, or an error to the caller. It also reports the verdict to admission.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from backends.base import (
    Backend,
    BackendError,
    BillingRefused,
    Rejected,
    Reply,
    Request,
    ServerFailed,
    Throttled,
    Timings,
    Unreachable,
)
from sidecar.admission import Admission, DeadlineUnreachable, Draining, NotAdmitted, OnHold, Permit, Superseded, Ticket
from sidecar.dispatch.deadlines import Deadlines
from sidecar.observe.metrics import Metrics, Outcome
from sidecar.observe.trace import TracingStopwatch

#: Retry budget. Each success adds RETRY_SHARE of a retry. A retry after a failure uses one retry of the budget; a retry
#: after throttling uses none. So the sidecar adds at most 20 % to the load of a failing provider. The budget starts
#: full and never holds more than RETRY_RESERVE retries. Finagle's retry budget uses the same 20 %.
RETRY_SHARE = 0.2
RETRY_RESERVE = 10.0
#: After this many failed attempts of one ticket at a backend, the ticket does not try that backend again. Failures
#: during an outage do not count.
MAX_FAILED_ATTEMPTS = 3
#: Seconds. A retry waits a random time between 0 and this value ("full jitter"); each earlier failure doubles the
#: value.
RETRY_STEP_SECONDS = 0.5
#: Seconds to wait before a request fails for good. If other requests fail during this time too, the provider has an
#: outage: then this request is not the cause, and it waits until the provider works again.
OUTAGE_CHECK_SECONDS = 1.0


class DeadlineExceeded(Exception):
    """The deadline passed during an attempt."""


class Route:
    """A backend with its admission, its retry budget and whether it has ever answered."""

    def __init__(self, backend: Backend, admission: Admission) -> None:
        self.backend = backend
        self.name = backend.name
        self.admission = admission
        self._retries = RETRY_RESERVE
        self.has_answered = False
        """True after the first answer. Later failures are then an outage and not a wrong address."""

    def __repr__(self) -> str:
        return f"<Route {self.name} has_answered={self.has_answered} retries={self._retries:.1f} {self.admission!r}>"

    def can_answer(self, ticket: Ticket, now: float) -> bool:
        """Return whether this route would probably answer the ticket before its deadline."""
        return self.backend.ready_reason() is None and self.admission.lane(ticket.model).takes(now, ticket)

    def answered(self) -> None:
        """Record that the backend answered an attempt, even if the answer was that the request is invalid."""
        self.has_answered = True

    def succeeded(self) -> None:
        """Record that an attempt brought a complete answer, and add to the retry budget."""
        self.has_answered = True
        self._retries = min(self._retries + RETRY_SHARE, RETRY_RESERVE)

    def is_failing(self, ticket: Ticket) -> bool:
        """Return whether the provider has an outage, or an outage begins.

        Always false for a provider that has never answered, because its address may be wrong.
        """
        return self.has_answered and self.admission.lane(ticket.model).limits.failing

    def take_retry(self, ticket: Ticket, failed_attempts: int) -> bool:
        """Return whether to make another attempt here.

        If so, take one retry from the budget, except during an outage.
        """
        if self.is_failing(ticket):
            return True  # half-open probes will notice when the provider works again
        if failed_attempts >= MAX_FAILED_ATTEMPTS or self._retries < 1.0:
            return False
        self._retries -= 1.0
        return True


class Dispatcher:
    """Carries tickets to the backends. The first backend serves; a later one serves while all before it cannot."""

    def __init__(self, routes: Sequence[Route], metrics: Metrics) -> None:
        self.routes = routes
        self._metrics = metrics
        self.now = routes[0].admission.loop.time
        """Returns the time of the loop's clock, in seconds."""
        self._deadlines = Deadlines(routes[0].admission.loop)
        self._random = random.Random()  # noqa: S311  jitter, not a secret

    def __repr__(self) -> str:
        return f"<Dispatcher {','.join(route.name for route in self.routes)} draining={self.draining}>"

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self.routes[0].admission.draining

    async def models(self) -> bytes:
        """Return the list of models from the first backend that answers. Raises the error of the last backend."""
        for route in self.routes[:-1]:
            try:
                return await route.backend.models()
            except BackendError:
                continue
        return await self.routes[-1].backend.models()

    async def run(
        self,
        ticket: Ticket,
        request: Request,
        on_stream: Callable[[Reply], Awaitable[None]] | None = None,
    ) -> Reply:
        """Return the answer to the ticket's request.

        A complete answer is returned after the permit was released. A streaming answer is passed to `on_stream` while
        it holds the permit, and is returned when `on_stream` has finished. Raises `NotAdmitted` (refused by the queue),
        `BackendError` (the provider's error; never `Throttled` unless a stream has begun) or `DeadlineExceeded`.
        """
        stopwatch = ticket.stopwatch
        failed_attempts = 0
        # Stored without its traceback, and deleted where it is raised. A traceback refers to this frame, and this frame
        # refers to the error: this cycle would keep the request's body in memory until the next garbage collection.
        last_failure: BackendError | None = None
        route = self.routes[0]
        excluded: list[Route] = []  # not to be used again for this ticket
        while True:  # one iteration is one permit and one attempt
            route = self._choose(ticket, excluded) or route
            ticket.backend = route.name
            try:
                with await route.admission.permit(ticket) as permit:
                    stopwatch.switch("lock", self.now())
                    try:
                        reply = await self._attempt(route, permit, request, on_stream)
                    except BaseException:
                        stopwatch.switch("queue", self.now())
                        raise
                    stopwatch.switch("write", self.now())
                    return reply
            except NotAdmitted as refusal:
                if isinstance(refusal, Draining | Superseded):
                    raise
                if not isinstance(refusal, OnHold):
                    excluded.append(route)
                    if self._choose(ticket, excluded) is None:
                        late = isinstance(refusal, DeadlineUnreachable)
                        if late and isinstance(last_failure, ServerFailed | Unreachable):
                            try:
                                raise last_failure from None
                            finally:
                                last_failure = None
                        raise
                ticket.returned = True
                continue
            except Throttled as refusal:
                if ticket.streaming:
                    raise
                last_failure = refusal.with_traceback(None)
            except (ServerFailed, Unreachable) as failure:
                failed_attempts += 1
                if ticket.streaming:
                    raise
                if route.take_retry(ticket, failed_attempts):
                    await self._back_off(ticket, failed_attempts)
                    if route.is_failing(ticket):
                        failed_attempts = 0  # the outage caused the failures, not this request
                else:
                    excluded.append(route)
                    if self._choose(ticket, excluded) is None:
                        await self._pause(ticket, OUTAGE_CHECK_SECONDS if route.has_answered else 0.0)
                        if not route.is_failing(ticket):
                            raise
                        excluded.remove(route)
                    failed_attempts = 0
                last_failure = failure.with_traceback(None)
            except (BillingRefused, Rejected) as refusal:
                if ticket.streaming or not _is_about_account(refusal):
                    raise
                excluded.append(route)
                if self._choose(ticket, excluded) is None:
                    raise
                last_failure = refusal.with_traceback(None)
            ticket.returned = True
            self._metrics.retry(route.name, last_failure)

    def _choose(self, ticket: Ticket, excluded: Sequence[Route]) -> Route | None:
        """Return the first route that would answer the ticket before its deadline; None if there is none."""
        if len(self.routes) == 1:
            return None
        now = self.now()
        return next((route for route in self.routes if route not in excluded and route.can_answer(ticket, now)), None)

    def _move_waiting_tickets(self, route: Route, model: str) -> None:
        """If the backend cannot answer and there is another one, send the tickets that wait for it to the other one."""
        if len(self.routes) > 1:
            lane = route.admission.lane(model)
            if lane.away is not None:
                lane.refuse_all(OnHold(f"{route.name} is on hold: {lane.away}"))

    async def _attempt(
        self, route: Route, permit: Permit, request: Request, on_stream: Callable[[Reply], Awaitable[None]] | None
    ) -> Reply:
        """Make one attempt and report its verdict to admission and to the metrics."""
        ticket, name = permit.ticket, route.name
        trace = ticket.stopwatch if isinstance(ticket.stopwatch, TracingStopwatch) else None
        if trace is not None:
            request = trace.start_attempt(request, name)
        timings = Timings()
        result = "cancelled"
        try:
            with self._deadlines.until(ticket.deadline):
                try:
                    reply = await route.backend.send(request, timings)
                finally:
                    self._record_timings(ticket, timings, self.now())
                if reply.chunks is not None:
                    if on_stream is None:
                        raise TypeError("a streaming reply needs on_stream")
                    ticket.streaming = True
                    try:
                        await on_stream(reply)
                    finally:
                        await reply.aclose()
            if reply.failure is not None:
                raise reply.failure
            permit.accepted(self.now(), reply.usage)
            route.succeeded()
            result = "ok"
            self._metrics.tokens(name, request.model, reply.usage)
        except TimeoutError as timeout:
            result = "timeout"
            raise DeadlineExceeded(
                f"no whole answer from {name} within the request's {ticket.deadline - ticket.stopwatch.started:.1f} s: "
                "allow more time, in X-Request-Timeout and SIDECAR_DEADLINE"
            ) from timeout
        except Throttled as refusal:
            result = "throttled"
            permit.throttled(self.now(), refusal.kind, refusal.message, refusal.retry_after)
            self._metrics.throttled(name, refusal.kind, refusal.code)
            raise
        except BillingRefused as refusal:
            result = "throttled"
            permit.account_refused(self.now(), refusal.message)
            self._metrics.throttled(name, "billing", refusal.code)
            raise
        except Rejected as refusal:
            result = "client_error"
            if refusal.status == 401:
                self._metrics.key_refused(name, refusal.message)
            if _is_about_account(refusal) and len(self.routes) > 1:
                permit.account_refused(self.now(), refusal.message)
            else:
                permit.accepted(self.now())
                route.answered()
            raise
        except ServerFailed as failure:
            result = "server_error"
            permit.failed(self.now(), failure.message)
            raise
        except Unreachable as failure:
            result = "connect_error"
            permit.failed(self.now(), failure.message)
            raise
        finally:
            self._metrics.attempt(name, result)
            if trace is not None:
                trace.end_attempt(result)
            self._move_waiting_tickets(route, ticket.model)
        return reply

    def finish(self, ticket: Ticket, api: str, outcome: Outcome) -> None:
        """Stop the ticket's stopwatch and write its record.

        Call it once, after the last byte was sent or the ticket failed.
        """
        ticket.stopwatch.stop(self.now())
        self._metrics.finished(ticket, api, ticket.backend or self.routes[0].name, outcome)

    def invalid(self, api: str) -> None:
        """Count an invalid request, which never became a ticket."""
        self._metrics.invalid(api, self.routes[0].name)

    async def _back_off(self, ticket: Ticket, failed_attempts: int) -> None:
        longest = RETRY_STEP_SECONDS * 2.0 ** (failed_attempts - 1)
        await self._pause(ticket, self._random.uniform(0.0, min(longest, max(ticket.deadline - self.now(), 0.0))))

    async def _pause(self, ticket: Ticket, seconds: float) -> None:
        """Wait this many seconds, or until the deadline, without a permit.

        The time counts as waiting because of `hold`.
        """
        begun = self.now()
        try:
            await asyncio.sleep(min(seconds, max(ticket.deadline - begun, 0.0)))
        finally:
            ticket.add_cause("hold", self.now() - begun)

    @staticmethod
    def _record_timings(ticket: Ticket, timings: Timings, now: float) -> None:
        """Copy the times that the backend measured (start of work, first byte) to the ticket's stopwatch."""
        started = timings.work_started
        if started is not None:
            ticket.stopwatch.switch("first_byte", started)
            ticket.stopwatch.switch("body", timings.first_byte or now)


def _is_about_account(refusal: BillingRefused | Rejected) -> bool:
    """Return whether the provider refuses the account: it was not paid, or the key is missing or wrong.

    A 401 is never about the caller's bearer token, because the sidecar does not send that token to the provider.
    """
    return isinstance(refusal, BillingRefused) or refusal.status == 401
