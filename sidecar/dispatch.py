"""Takes a ticket through: permit, attempt, verdict back to admission, and round again while that helps.

The only loop around a backend. It decides what a failed attempt means for the request (again, or an error to the
caller) and tells admission, in plain terms, what it means for the limits.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

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

from .admission import Admission, DeadlineUnreachable, Permit, Ticket
from .telemetry import Outcome, Telemetry

#: Retries of failures (never of throttling) may be this share of successes, so that an ailing provider is not
#: multiplied by us; the reserve starts full and never holds more. Finagle's retry budget has the same 20 %.
RETRY_SHARE = 0.2
RETRY_RESERVE = 10.0
MOST_FAILED_ATTEMPTS = 3
#: Full jitter: a retry waits between 0 and this many seconds, doubled for each failure before.
RETRY_STEP_SECONDS = 0.2


class DeadlineExceeded(Exception):
    """The deadline passed with the work upstream."""


class Dispatcher:
    """The loop around one backend, behind its admission."""

    def __init__(self, backend: Backend, admission: Admission, telemetry: Telemetry) -> None:
        self.backend = backend
        self.admission = admission
        self._telemetry = telemetry
        self._retries = RETRY_RESERVE
        self._answered = False  # it has answered before: failures are an outage then, not a wrong address
        self._random = random.Random()  # noqa: S311  jitter, not a secret

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
        loop = asyncio.get_running_loop()
        watch = ticket.stopwatch
        failed_attempts = 0
        last_failure: BackendError | None = None
        while True:  # one round is one permit and one attempt
            try:
                async with self.admission.permit(ticket) as permit:
                    watch.switch("lock", loop.time())
                    try:
                        reply = await self._attempt(permit, request, on_stream)
                    except BaseException:
                        watch.switch("queue", loop.time())
                        raise
                    watch.switch("write", loop.time())
                    return reply
            except Throttled as refusal:
                if ticket.streaming:
                    raise
                last_failure = refusal
            except (ServerFailed, Unreachable) as failure:
                last_failure = failure
                failed_attempts += 1
                if ticket.streaming or not self._may_retry(ticket, failed_attempts):
                    raise
                await self._jitter(ticket, failed_attempts)
            except DeadlineUnreachable:
                if last_failure is not None and not isinstance(last_failure, Throttled):
                    raise last_failure from None
                raise
            ticket.returned = True
            self._telemetry.retry(self.backend.name, last_failure)

    async def _attempt(
        self, permit: Permit, request: Request, on_stream: Callable[[Reply], Awaitable[None]] | None
    ) -> Reply:
        """Make one attempt and tell admission and the metrics what it was told."""
        loop = asyncio.get_running_loop()
        ticket, name = permit.ticket, self.backend.name
        timings = Timings()
        result = "cancelled"
        try:
            async with asyncio.timeout_at(ticket.deadline):
                try:
                    reply = await self.backend.send(request, timings)
                finally:
                    self._note(ticket, timings, loop.time())
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
            usage = reply.usage
            permit.accepted(loop.time(), (usage.input_tokens, usage.output_tokens) if usage is not None else None)
            self._answered = True
            self._retries = min(self._retries + RETRY_SHARE, RETRY_RESERVE)
            result = "ok"
            self._telemetry.tokens(name, request.model, reply.usage)
        except TimeoutError as timeout:
            result = "timeout"
            raise DeadlineExceeded(
                f"no whole answer from {name} within the request's {ticket.deadline - ticket.stopwatch.started:.1f} s"
            ) from timeout
        except Throttled as refusal:
            result = "throttled"
            permit.throttled(loop.time(), refusal.kind, refusal.message, refusal.retry_after)
            self._telemetry.throttled(name, refusal.kind, refusal.code)
            raise
        except BillingRefused as refusal:
            result = "throttled"
            permit.account_refused(loop.time(), refusal.message)
            self._telemetry.throttled(name, "billing", refusal.code)
            raise
        except Rejected:
            result = "client_error"
            permit.accepted(loop.time())
            self._answered = True
            raise
        except ServerFailed as failure:
            result = "server_error"
            permit.failed(loop.time(), failure.message)
            raise
        except Unreachable as failure:
            result = "connect_error"
            permit.failed(loop.time(), failure.message)
            raise
        finally:
            self._telemetry.attempt(name, result)
        return reply

    def finish(self, ticket: Ticket, api: str, outcome: Outcome) -> None:
        """The ticket's last byte is out, or it has failed: stop its watch and write its record, once."""
        ticket.stopwatch.stop(asyncio.get_running_loop().time())
        self._telemetry.finished(ticket, api, self.backend.name, outcome)

    def invalid(self, api: str) -> None:
        """A request that never became a ticket: its own fault."""
        self._telemetry.invalid(api, self.backend.name)

    def _may_retry(self, ticket: Ticket, failed_attempts: int) -> bool:
        if self.admission.lane(ticket.model).limits.failing and self._answered:
            return True  # an outage, or the beginning of one: single probes will find the provider back
        if failed_attempts >= MOST_FAILED_ATTEMPTS or self._retries < 1.0:
            return False
        self._retries -= 1.0
        return True

    async def _jitter(self, ticket: Ticket, failed_attempts: int) -> None:
        """Wait a little without a permit, on the account of `hold`."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        longest = min(RETRY_STEP_SECONDS * 2.0 ** (failed_attempts - 1), max(ticket.deadline - begun, 0.0))
        try:
            await asyncio.sleep(self._random.uniform(0.0, longest))
        finally:
            ticket.add_cause("hold", loop.time() - begun)

    @staticmethod
    def _note(ticket: Ticket, timings: Timings, now: float) -> None:
        """Put the backend's own marks on the ticket's watch."""
        started = timings.work_started
        if started is not None:
            ticket.stopwatch.switch("first_byte", started)
            ticket.stopwatch.switch("body", timings.first_byte or now)
