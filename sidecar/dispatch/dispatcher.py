"""Runs a ticket: get a permit, make an attempt, report the verdict to admission, and repeat if a retry is useful.

This is the only retry loop around backends. Admission decides when and at which upstream an attempt starts.
`RetryPolicy` decides what follows a failed attempt. The dispatcher makes each attempt and reports its outcome once.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from math import inf

from backends.base import (
    Backend,
    BackendError,
    BillingRefused,
    QuotaUsedUp,
    Rejected,
    Reply,
    Request,
    ServerFailed,
    Throttled,
    Timings,
    Unauthorized,
    Unreachable,
)
from sidecar.admission import (
    Admission,
    DeadlineUnreachable,
    Dimension,
    Permit,
    StillFailing,
    Ticket,
    Upstream,
    Verdict,
)
from sidecar.admission.gates.base import VerdictOutcome
from sidecar.dispatch.deadlines import Deadlines
from sidecar.dispatch.retry_policy import OUTAGE_CHECK_SECONDS, Action, RetryPolicy, Situation, jitter
from sidecar.observe.metrics import Metrics, RequestOutcome
from sidecar.observe.trace import TracingStopwatch

#: Refusal kind -> the limit that the provider named. Other kinds name no limit.
_NAMED: dict[str, Dimension] = {
    kind: kind for kind in ("request_rate", "token_rate", "growth", "concurrency", "capacity")
}


class DeadlineExceeded(Exception):
    """The deadline passed while the upstream had the request."""


class NoByteInTime(DeadlineExceeded):
    """The upstream sent no byte in the time that `Pool.patience` allows, so another upstream gets the request."""


class Dispatcher:
    """The retry loop around the backends of one admission."""

    def __init__(self, admission: Admission, backends: Sequence[Backend], metrics: Metrics) -> None:
        """Each backend serves the upstream of the same name."""
        self.admission = admission
        self.backends = {backend.name: backend for backend in backends}
        self.first = backends[0].name
        self._metrics = metrics
        self.now = admission.loop.time
        """Returns the loop time in seconds."""
        self._deadlines = Deadlines(admission.loop)
        self._policies = {name: RetryPolicy(self.now()) for name in self.backends}
        self._random = random.Random()  # noqa: S311  jitter, not a secret

    def __repr__(self) -> str:
        return f"<Dispatcher {','.join(self.backends)} draining={self.draining}>"

    @property
    def draining(self) -> bool:
        """True while draining: new requests are refused."""
        return self.admission.draining

    async def models(self) -> bytes:
        """Return the list of models of the first backend that returns one. Raises the error of the last backend."""
        *others, last = self.backends.values()
        for backend in others:
            try:
                return await backend.models()
            except BackendError:
                continue
        return await last.models()

    async def run(
        self,
        ticket: Ticket,
        request: Request,
        on_stream: Callable[[Reply], Awaitable[None]] | None = None,
    ) -> Reply:
        """Return the answer to the ticket's request.

        A complete answer is returned after its permit is released. A streaming answer is passed to `on_stream`, which
        writes it while the permit is held; then it is returned. Raises `NotAdmitted`, `BackendError` (the provider's
        error; `Throttled` only inside a stream that has begun) or `DeadlineExceeded`.
        """
        watch = ticket.stopwatch
        failed_attempts = 0
        # The failure is stored without its traceback and cleared when it is raised. The traceback refers to this frame,
        # and this frame refers to the failure: this cycle would keep the request body in memory until the next garbage
        # collection.
        last_failure: Exception | None = None
        while True:  # one round is one permit and one attempt
            try:
                with await self.admission.permit(ticket) as permit:
                    watch.switch("lock", self.now())
                    try:
                        reply = await self._attempt(permit, request, on_stream)
                    except BaseException:
                        watch.switch("queue", self.now())
                        raise
                    watch.switch("write", self.now())
                    return reply
            except (DeadlineUnreachable, StillFailing) as refusal:
                failed = isinstance(last_failure, ServerFailed | Unreachable | DeadlineExceeded)
                if last_failure is None or not (failed or isinstance(refusal, StillFailing)):
                    raise
                try:
                    raise last_failure from None
                finally:
                    last_failure = None
            except (BackendError, NoByteInTime) as failure:
                failed_attempts += isinstance(failure, ServerFailed | Unreachable)
                final = ticket.streaming or not getattr(failure, "may_resend", True)
                action = "fail" if final else self._decide(ticket, permit.upstream, failure, failed_attempts)
                if action == "fail":
                    raise
                if action in ("elsewhere", "again_if_failing") or self._is_out(permit.upstream):
                    failed_attempts = 0  # during an outage, failures are not counted against the request
                last_failure = failure.with_traceback(None)
                self._metrics.retry(permit.upstream.name, last_failure)

    def _decide(self, ticket: Ticket, upstream: Upstream, failure: Exception, failed_attempts: int) -> Action:
        """Decide what to do after a failed attempt, and store on the ticket where and when it may be retried."""
        now = self.now()
        situation = Situation(
            _outcome_of(failure),
            elsewhere=self.admission.pool(ticket.model).has_another(ticket, upstream),
            failing=self._is_out(upstream),
            has_answered=upstream.has_answered,
            failed_attempts=failed_attempts,
        )
        action = self._policies[upstream.name].decide(now, situation)
        if action == "fail":
            return action
        ticket.requeued = True
        ticket.not_before, ticket.only_while_failing = now, False
        if upstream.unavailable and not situation.elsewhere:
            ticket.tried = ()  # it was a probe of the only upstream that was left: the others may be tried again
        if action == "elsewhere":
            ticket.tried = (*ticket.tried, upstream)
        elif action == "again_later":
            ticket.not_before += jitter(self._random, failed_attempts, ticket.deadline - now)
        elif action == "again_if_failing":
            ticket.not_before += min(OUTAGE_CHECK_SECONDS, max(ticket.deadline - now, 0.0))
            ticket.only_while_failing = True
        return action

    @staticmethod
    def _is_out(upstream: Upstream) -> bool:
        """Return True if the upstream has an outage, or an outage begins.

        An upstream that never answered is not counted: its address may be wrong.
        """
        return upstream.has_answered and upstream.circuit.failing

    async def _attempt(
        self, permit: Permit, request: Request, on_stream: Callable[[Reply], Awaitable[None]] | None
    ) -> Reply:
        """Make one attempt and report its outcome to admission and the metrics."""
        ticket, upstream = permit.ticket, permit.upstream
        name = upstream.name
        trace = ticket.stopwatch if isinstance(ticket.stopwatch, TracingStopwatch) else None
        if trace is not None:
            request = trace.start_attempt(request, name)
        timings = Timings()
        result = "cancelled"
        try:
            with self._deadlines.until(ticket.deadline):
                try:
                    reply = await self._send(permit, request, timings)
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
            now = self.now()
            permit.report(Verdict("accepted", now, usage=reply.usage))
            self._policies[name].budget.answered(now)
            result = "ok"
            self._metrics.tokens(name, request.model, reply.usage)
        except TimeoutError as timeout:
            result = "timeout"
            now = self.now()
            silent = timings.first_byte is None and now - permit.sent_at >= upstream.patience(ticket)
            permit.report(Verdict("timed_out" if silent else "abandoned", now, reason=f"{name} sent no answer"))
            raise DeadlineExceeded(
                f"no whole answer from {name} within the request's {ticket.deadline - ticket.stopwatch.started:.1f} s: "
                "allow more time, in X-Request-Timeout and SIDECAR_DEADLINE"
            ) from timeout
        except NoByteInTime as failure:
            result = "timeout"
            permit.report(Verdict("timed_out", self.now(), reason=str(failure)))
            raise
        except BackendError as error:
            result = self._report(permit, error)
            raise
        finally:
            self._metrics.attempt(name, result)
            if trace is not None:
                trace.end_attempt(result)
        return reply

    async def _send(self, permit: Permit, request: Request, timings: Timings) -> Reply:
        """Send the request. Raises `NoByteInTime` if no byte comes in time and another upstream can take it."""
        ticket, upstream = permit.ticket, permit.upstream
        backend = self.backends[upstream.name]
        patience = self.admission.pool(ticket.model).patience(self.now(), ticket, upstream)
        if patience == inf:
            return await backend.send(request, timings)
        try:
            with self._deadlines.until(self.now() + patience, unless=lambda: timings.first_byte is not None):
                return await backend.send(request, timings)
        except TimeoutError:
            raise NoByteInTime(f"{upstream.name} sent no byte for {patience:.1f} s") from None

    def _report(self, permit: Permit, error: BackendError) -> str:
        """Report an attempt's error as a verdict. Return the result for the metrics."""
        now, name, reason = self.now(), permit.upstream.name, error.message
        match error:
            case Throttled():
                permit.report(
                    Verdict("refused", now, _NAMED.get(error.kind), retry_after=error.retry_after, reason=reason)
                )
                self._metrics.throttled(name, error.kind, error.code)
                return "throttled"
            case BillingRefused():
                permit.report(Verdict("account", now, reason=reason))
                self._metrics.throttled(name, "billing", error.code)
                return "throttled"
            case QuotaUsedUp():
                permit.report(Verdict("account", now, retry_after=error.ends_in, reason=reason))
                self._metrics.throttled(name, "quota_period", error.code)
                return "throttled"
            case Unauthorized():
                # With several backends, report `account`, so that another backend is tried. With one backend, the
                # caller gets the provider's answer.
                self._metrics.key_refused(name, reason)
                self._metrics.throttled(name, "unauthorized", error.code)
                permit.report(Verdict("account" if len(self.backends) > 1 else "accepted", now, reason=reason))
                return "client_error"
            case Rejected():
                # The request passed the limits, unless it is too large for a limit at all: that teaches nothing.
                permit.report(Verdict("abandoned" if error.above_limit else "accepted", now, reason=reason))
                return "client_error"
            case ServerFailed():
                permit.report(Verdict("failed", now, reason=reason))
                return "server_error"
            case _:
                permit.report(Verdict("failed", now, reason=reason))
                return "connect_error"

    def finish(self, ticket: Ticket, api: str, outcome: RequestOutcome) -> None:
        """Record a ticket that has ended, with success or failure: stop its stopwatch and write its metrics.

        Call it once for each ticket.
        """
        ticket.stopwatch.stop(self.now())
        self._metrics.finished(ticket, api, ticket.backend or self.first, outcome)

    def invalid(self, api: str) -> None:
        """Count an invalid request, which never became a ticket."""
        self._metrics.invalid(api, self.first)

    @staticmethod
    def _record_timings(ticket: Ticket, timings: Timings, now: float) -> None:
        """Add the backend's times (start of work, first byte) to the ticket's stopwatch."""
        started = timings.work_started
        if started is not None:
            ticket.stopwatch.switch("first_byte", started)
            ticket.stopwatch.switch("body", timings.first_byte or now)


def _outcome_of(failure: Exception) -> VerdictOutcome:
    """Return the outcome that the retry policy uses for this failure."""
    match failure:
        case Throttled():
            return "refused"
        case NoByteInTime():
            return "timed_out"
        case BillingRefused() | QuotaUsedUp() | Unauthorized():
            return "account"  # the key is the sidecar's: the caller's bearer token is not forwarded
        case Rejected():
            return "accepted"
        case _:
            return "failed"
