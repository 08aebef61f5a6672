"""Takes a ticket through: permit, attempt, verdict back to admission, and round again while that helps.

The only loop around backends. It decides what a failed attempt means for the request (again, elsewhere, or an error to
the caller) and tells admission, in plain terms, what it means for the limits.
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

#: Retries of failures (never of throttling) may be this share of successes, so that an ailing provider is not
#: multiplied by us; the reserve starts full and never holds more. Finagle's retry budget has the same 20 %.
RETRY_SHARE = 0.2
RETRY_RESERVE = 10.0
MAX_FAILED_ATTEMPTS = 3
#: Full jitter: a retry waits between 0 and this many seconds, doubled for each failure before.
RETRY_STEP_SECONDS = 0.5
#: Before a request is given up: are others failing too? Then it is not to blame, and waits until the provider is back.
LOOK_AROUND_SECONDS = 1.0


class DeadlineExceeded(Exception):
    """The deadline passed with the work upstream."""


class Route:
    """A backend behind its admission, and how it has fared."""

    def __init__(self, backend: Backend, admission: Admission) -> None:
        self.backend = backend
        self.name = backend.name
        self.admission = admission
        self._retries = RETRY_RESERVE
        self.has_answered = False
        """Failures are an outage then, and not a wrong address."""

    def takes(self, ticket: Ticket, now: float) -> bool:
        """Whether the ticket would be answered here before its deadline, as far as can be told."""
        return self.backend.ready_reason() is None and self.admission.lane(ticket.model).takes(now, ticket)

    def answered(self) -> None:
        """An attempt brought an answer, if only that the request is at fault."""
        self.has_answered = True

    def succeeded(self) -> None:
        """An attempt brought a whole answer."""
        self.has_answered = True
        self._retries = min(self._retries + RETRY_SHARE, RETRY_RESERVE)

    def is_out(self, ticket: Ticket) -> bool:
        """Whether this is an outage, or the beginning of one; a provider that never answered may be a wrong address."""
        return self.has_answered and self.admission.lane(ticket.model).limits.failing

    def may_retry(self, ticket: Ticket, failed_attempts: int) -> bool:
        """Whether another attempt here may help, and is within the budget, which it then uses."""
        if self.is_out(ticket):
            return True  # single probes will find the provider back
        if failed_attempts >= MAX_FAILED_ATTEMPTS or self._retries < 1.0:
            return False
        self._retries -= 1.0
        return True


class Dispatcher:
    """The loop around the backends. The first serves; a later one takes over while those before it cannot."""

    def __init__(self, routes: Sequence[Route], metrics: Metrics) -> None:
        self.routes = routes
        self._metrics = metrics
        self.now = routes[0].admission.loop.time
        """The time, on the loop's clock."""
        self._deadlines = Deadlines(routes[0].admission.loop)
        self._random = random.Random()  # noqa: S311  jitter, not a secret

    @property
    def draining(self) -> bool:
        """Nothing new is taken."""
        return self.routes[0].admission.draining

    async def models(self) -> bytes:
        """The list of models of the first backend that gives one. Raises what the last said."""
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
        """Bring the ticket's answer.

        A whole answer is returned after its permit went back. A streaming one is handed to `on_stream` while it holds
        its permit, and returned when that is done. Raises `NotAdmitted` (queue), `BackendError` (what the provider
        said, never a throttling one), or `DeadlineExceeded`.
        """
        watch = ticket.stopwatch
        failed_attempts = 0
        # Without its traceback, and not kept where it is raised: that holds this frame, and they would keep each other,
        # and with them the body, until the next collection of garbage.
        last_failure: BackendError | None = None
        route = self.routes[0]
        given_up: list[Route] = []  # have had their chance at this ticket
        while True:  # one round is one permit and one attempt
            route = self._choose(ticket, given_up) or route
            ticket.backend = route.name
            try:
                with await route.admission.permit(ticket) as permit:
                    watch.switch("lock", self.now())
                    try:
                        reply = await self._attempt(route, permit, request, on_stream)
                    except BaseException:
                        watch.switch("queue", self.now())
                        raise
                    watch.switch("write", self.now())
                    return reply
            except NotAdmitted as refusal:
                if isinstance(refusal, Draining | Superseded):
                    raise
                if not isinstance(refusal, OnHold):
                    given_up.append(route)
                    if self._choose(ticket, given_up) is None:
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
                if route.may_retry(ticket, failed_attempts):
                    await self._jitter(ticket, failed_attempts)
                    if route.is_out(ticket):
                        failed_attempts = 0  # they were the provider's doing, and say nothing of this request
                else:
                    given_up.append(route)
                    if self._choose(ticket, given_up) is None:
                        await self._pause(ticket, LOOK_AROUND_SECONDS if route.has_answered else 0.0)
                        if not route.is_out(ticket):
                            raise
                        given_up.remove(route)
                    failed_attempts = 0
                last_failure = failure.with_traceback(None)
            except (BillingRefused, Rejected) as refusal:
                if ticket.streaming or not _is_about_account(refusal):
                    raise
                given_up.append(route)
                if self._choose(ticket, given_up) is None:
                    raise
                last_failure = refusal.with_traceback(None)
            ticket.returned = True
            self._metrics.retry(route.name, last_failure)

    def _choose(self, ticket: Ticket, given_up: Sequence[Route]) -> Route | None:
        """The first route that would answer the ticket in time; None if there is none."""
        if len(self.routes) == 1:
            return None
        now = self.now()
        return next((route for route in self.routes if route not in given_up and route.takes(ticket, now)), None)

    def _let_others_move(self, route: Route, model: str) -> None:
        """What waits for a backend that is away goes to another, if there is one."""
        if len(self.routes) > 1:
            lane = route.admission.lane(model)
            if lane.away is not None:
                lane.refuse_all(OnHold(f"{route.name} is on hold: {lane.away}"))

    async def _attempt(
        self, route: Route, permit: Permit, request: Request, on_stream: Callable[[Reply], Awaitable[None]] | None
    ) -> Reply:
        """Make one attempt and tell admission and the metrics what it was told."""
        ticket, name = permit.ticket, route.name
        trace = ticket.stopwatch if isinstance(ticket.stopwatch, TracingStopwatch) else None
        if trace is not None:
            request = trace.attempt(request, name)
        timings = Timings()
        result = "cancelled"
        try:
            with self._deadlines.until(ticket.deadline):
                try:
                    reply = await route.backend.send(request, timings)
                finally:
                    self._note(ticket, timings, self.now())
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
                trace.attempted(result)
            self._let_others_move(route, ticket.model)
        return reply

    def finish(self, ticket: Ticket, api: str, outcome: Outcome) -> None:
        """The ticket's last byte is out, or it has failed: stop its watch and write its record, once."""
        ticket.stopwatch.stop(self.now())
        self._metrics.finished(ticket, api, ticket.backend or self.routes[0].name, outcome)

    def invalid(self, api: str) -> None:
        """A request that never became a ticket: its own fault."""
        self._metrics.invalid(api, self.routes[0].name)

    async def _jitter(self, ticket: Ticket, failed_attempts: int) -> None:
        longest = RETRY_STEP_SECONDS * 2.0 ** (failed_attempts - 1)
        await self._pause(ticket, self._random.uniform(0.0, min(longest, max(ticket.deadline - self.now(), 0.0))))

    async def _pause(self, ticket: Ticket, seconds: float) -> None:
        """Wait a little without a permit, on the account of `hold`."""
        begun = self.now()
        try:
            await asyncio.sleep(min(seconds, max(ticket.deadline - begun, 0.0)))
        finally:
            ticket.add_cause("hold", self.now() - begun)

    @staticmethod
    def _note(ticket: Ticket, timings: Timings, now: float) -> None:
        """Put the backend's own marks on the ticket's watch."""
        started = timings.work_started
        if started is not None:
            ticket.stopwatch.switch("first_byte", started)
            ticket.stopwatch.switch("body", timings.first_byte or now)


def _is_about_account(refusal: BillingRefused | Rejected) -> bool:
    """The provider refuses whoever sends with this key: money, or a key that is missing or wrong.

    A 401 is never about the caller's own bearer, which is not sent on.
    """
    return isinstance(refusal, BillingRefused) or refusal.status == 401
