"""Runs a ticket: get a permit, make an attempt, report the verdict to admission, and repeat if a retry is useful.

This is the only retry loop around backends. Admission decides when and at which upstream an attempt starts.
`RetryPolicy` decides what follows a failed attempt. The dispatcher makes each attempt and reports its outcome once.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from typing import Protocol

from backends.base import (
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
    Usage,
)
from backends.media import CHARS_PER_TOKEN
from sidecar.admission import (
    Admission,
    DeadlineUnreachable,
    Dimension,
    KeyClosed,
    Permit,
    StillFailing,
    Ticket,
    Upstream,
    Verdict,
)
from sidecar.admission.gates.base import VerdictOutcome
from sidecar.admission.gates.circuit import CircuitState
from sidecar.dispatch.deadlines import Deadlines
from sidecar.dispatch.retry_policy import (
    MAX_FAILED_ATTEMPTS,
    OUTAGE_CHECK_SECONDS,
    Action,
    RetryPolicy,
    Situation,
    jitter,
)
from sidecar.dispatch.second_reading import second_reading
from sidecar.dispatch.stream_bounds import StreamBounds, StreamSettings
from sidecar.observe.metrics import Metrics, RequestOutcome
from sidecar.observe.trace import TracingStopwatch

#: Refusal kind -> the limit that the provider named. Other kinds name no limit.
_NAMED: dict[str, Dimension] = {
    kind: kind for kind in ("request_rate", "token_rate", "growth", "concurrency", "capacity")
}

_STREAM = StreamSettings()


#: Bytes of the longest error body that is kept while a ticket waits for its next attempt.
_MAX_WAITING_ERROR_BYTES = 16 * 1024


class DeadlineExceeded(Exception):
    """The deadline passed while the upstream had the request."""


class NoByteInTime(DeadlineExceeded):
    """The upstream sent no byte in the time that `Pool.patience` allows, so another upstream gets the request."""


class Sender(Protocol):
    """The part of a backend that the retry loop uses; see `Backend`."""

    @property
    def name(self) -> str:
        """The name of the upstream."""
        ...

    async def send(self, request: Request, timings: Timings) -> Reply:
        """Make one attempt."""
        ...


class Dispatcher:
    """The retry loop around the backends of one admission."""

    def __init__(self, admission: Admission, backends: Sequence[Sender], metrics: Metrics) -> None:
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

    async def run(
        self,
        ticket: Ticket,
        request: Request,
        on_stream: Callable[[Reply], Awaitable[None]] | None = None,
        stream: StreamSettings = _STREAM,
    ) -> Reply:
        """Return the answer to the ticket's request.

        A complete answer is returned after its permit is released. A streaming answer is passed to `on_stream`, which
        writes it while the permit is held, within the bounds of `stream`; then it is returned. Raises `NotAdmitted`,
        `BackendError` (the provider's error; `Throttled` only inside a stream that has begun) or `DeadlineExceeded`.
        """
        watch = ticket.stopwatch
        failed_attempts = 0
        failed_at: float | None = None  # loop time at which the last attempt failed
        # The error if no later attempt is made. It is stored without its traceback, and cleared when it is raised:
        # otherwise it and this frame would refer to each other, and the request body would stay in memory until the
        # next garbage collection.
        last_failure: Exception | None = None
        while True:  # one round is one permit and one attempt
            try:
                with await self.admission.permit(ticket) as permit:
                    watch.switch("lock", self.now())
                    try:
                        reply = await self._attempt(permit, request, on_stream, stream)
                    except BaseException:
                        watch.switch("queue", self.now())
                        raise
                    watch.switch("write", self.now())
                    return reply
            except (DeadlineUnreachable, StillFailing, KeyClosed):
                if last_failure is None:
                    raise
                try:
                    raise last_failure from None
                finally:
                    last_failure = None
            except (BackendError, NoByteInTime) as failure:
                if ticket.streaming or (isinstance(failure, BackendError) and not failure.may_resend):
                    raise
                outcome, upstream = self._outcome_of(failure), permit.upstream
                failed_attempts += outcome == "failed"
                undecided = permit.reading == "undecided"
                is_fault = outcome != "refused" and not undecided
                is_out = self._is_out(upstream, permit.sent_at if failed_at is None else failed_at)
                failed_at = self.now()
                ticket.setbacks += is_fault or permit.own_fault or upstream.circuit.state is not None
                action = self._decide(permit, outcome, failed_attempts, is_out=is_out or undecided)
                if action == "fail":
                    raise
                if action == "elsewhere" or is_out:
                    failed_attempts = 0  # it counts attempts in a row at one upstream that answers other requests
                self._metrics.retry(upstream.name, failure)
                last_failure = failure if is_fault else None
                _drop_memory(failure)

    def _decide(self, permit: Permit, outcome: VerdictOutcome, failed_attempts: int, *, is_out: bool) -> Action:
        """Decide what to do after a failed attempt, and store on the ticket where and when it may be retried."""
        ticket, upstream = permit.ticket, permit.upstream
        now, pool = self.now(), self.admission.pool(ticket.model)
        situation = Situation(
            outcome,
            elsewhere=pool.has_another(ticket, upstream),
            failing=is_out,
            has_answered=upstream.has_answered,
            failed_attempts=failed_attempts,
            certain=ticket.doubted
            or permit.own_fault
            or upstream.circuit.refuses_account
            or upstream.circuit.state is CircuitState.QUOTA,
        )
        action = self._policies[upstream.name].decide(now, situation)
        if action == "fail":
            return action
        ticket.requeued = True
        # An attempt that failed, was refused as a probe or was refused once more took somebody's turn.
        ticket.has_paid = outcome == "refused" and upstream.circuit.state is None and ticket.attempts == 1
        ticket.not_before, ticket.only_while_failing = max(now, ticket.not_before), None
        if upstream.unavailable and not situation.elsewhere:
            ticket.tried = ()  # it was a probe, and no other upstream is left: it waits among all other tickets again
        times = min(upstream.wordless.times_failed(ticket), MAX_FAILED_ATTEMPTS)
        if permit.own_fault:
            times = ticket.setbacks + 1
        if action == "again" and times > 1:
            # The others go first: if they are answered, this request itself is the cause.
            ticket.not_before += jitter(self._random, times - 1, ticket.deadline - now)
        elif action == "elsewhere":
            ticket.tried = (*ticket.tried, upstream)
            if all(one in ticket.tried for one in pool.upstreams):
                ticket.tried = ()  # an earlier failure was long ago: since then, the last upstream was out
        elif action == "again_first":
            ticket.doubted = True
        elif action == "again_later":
            ticket.not_before += jitter(self._random, max(failed_attempts, times), ticket.deadline - now)
        elif action == "again_if_failing":
            ticket.not_before += min(OUTAGE_CHECK_SECONDS, max(ticket.deadline - now, 0.0))
            ticket.only_while_failing = upstream
        return action

    @staticmethod
    def _is_out(upstream: Upstream, since: float) -> bool:
        """Return True if the upstream has an outage, or an outage begins.

        An upstream that never answered is not counted: its address may be wrong. If it has answered another request
        that was sent after the loop time `since`, the failed request itself may be the cause.
        """
        return upstream.circuit.failing and upstream.has_answered and upstream.last_good <= since

    async def _attempt(
        self,
        permit: Permit,
        request: Request,
        on_stream: Callable[[Reply], Awaitable[None]] | None,
        stream: StreamSettings,
    ) -> Reply:
        """Make one attempt and report its outcome to admission and the metrics."""
        ticket, upstream = permit.ticket, permit.upstream
        name = upstream.name
        trace = ticket.stopwatch if isinstance(ticket.stopwatch, TracingStopwatch) else None
        if trace is not None:
            request = trace.start_attempt(request, name)
        timings = Timings()
        result = "cancelled"
        reply: Reply | None = None
        bounds: StreamBounds | None = None
        try:
            with self._deadlines.until(ticket.deadline):
                try:
                    patience = inf
                    if len(self.backends) > 1:
                        patience = self.admission.pool(ticket.model).patience(self.now(), ticket, upstream)
                    if patience == inf:
                        reply = await self.backends[name].send(request, timings)
                    else:
                        reply = await self._send_within(patience, name, request, timings)
                finally:
                    self._record_timings(ticket, timings, self.now())
            if reply.chunks is not None:
                if on_stream is None:
                    raise TypeError("a streaming reply needs on_stream")
                ticket.streaming = True
                began = self.now()
                bounds = StreamBounds(stream, reply.progress, began=began, deadline=ticket.deadline)
                try:
                    with self._deadlines.until(bounds.next_look(began), bounds.next_look):
                        await on_stream(reply)
                finally:
                    await reply.aclose()
            if reply.failure is not None:
                raise reply.failure
            now = self.now()
            permit.report(Verdict("accepted", now, usage=reply.usage, limits=reply.limits, counted_at=reply.counted_at))
            self._policies[name].budget.answered(now)
            result = "ok"
        except TimeoutError as timeout:
            result = "timeout"
            now = self.now()
            if reply is not None and bounds is not None and bounds.has_content:
                permit.report(Verdict("accepted", now, usage=reply.usage))  # the provider has let the request in
            else:
                silent = timings.first_byte is None and now - permit.sent_at >= upstream.patience(ticket)
                permit.report(Verdict("timed_out" if silent else "abandoned", now, reason=f"{name} sent no answer"))
            raise DeadlineExceeded(
                (bounds is not None and bounds.reason(name))
                or f"no whole answer from {name} within the request's "
                f"{ticket.deadline - ticket.stopwatch.started:.1f} s: allow more time, in X-Request-Timeout and "
                "SIDECAR_DEADLINE"
            ) from timeout
        except (BackendError, NoByteInTime) as failure:
            elsewhere = self.admission.pool(ticket.model).has_another(ticket, upstream)
            told, teaches = second_reading(permit, failure, self.now(), elsewhere=elsewhere)
            try:
                result = self._report(permit, told, teaches=teaches)
                if told is not failure:
                    raise told from failure.with_traceback(None)
                raise
            finally:
                del told  # the error refers to this frame: the cycle would keep the request body in memory
        finally:
            if reply is not None:
                self._count_tokens(ticket, name, reply)
            self._metrics.attempt(name, result)
            if trace is not None:
                trace.end_attempt(result)
        return reply

    async def _send_within(self, patience: float, name: str, request: Request, timings: Timings) -> Reply:
        """Send the request to the backend `name`. Raises `NoByteInTime` if no byte comes within `patience` seconds."""
        try:
            with self._deadlines.until(self.now() + patience, lambda now: now if timings.first_byte is None else inf):
                return await self.backends[name].send(request, timings)
        except TimeoutError:
            raise NoByteInTime(f"{name} sent no byte for {patience:.1f} s") from None

    def _count_tokens(self, ticket: Ticket, name: str, reply: Reply) -> None:
        """Count the LLM tokens of what was generated, also of an answer that was cut: as reported, or estimated."""
        if reply.usage is not None:
            self._metrics.tokens(name, ticket.model, reply.usage, "provider")
        elif reply.output_bytes is not None:
            output = max(round(reply.output_bytes / CHARS_PER_TOKEN), 1)
            self._metrics.tokens(name, ticket.model, Usage(round(ticket.tokens), output), "estimate")

    def _report(self, permit: Permit, failure: Exception, *, teaches: bool = True) -> str:
        """Report a failed attempt as a verdict. Return the result for the metrics.

        `teaches` False: no limit is learned from it.
        """
        name = permit.upstream.name
        verdict = Verdict(self._outcome_of(failure) if teaches else "abandoned", self.now(), reason=str(failure))
        if isinstance(failure, Throttled):
            verdict = verdict._replace(named=_NAMED.get(failure.kind), retry_after=failure.retry_after)
        elif isinstance(failure, QuotaUsedUp):
            verdict = verdict._replace(named="quota_period", retry_after=failure.ends_in)
        elif isinstance(failure, Unauthorized):
            verdict = verdict._replace(named="unauthorized")
        if isinstance(failure, BackendError) and (failure.limits or failure.counted_at is not None):
            verdict = verdict._replace(limits=failure.limits, counted_at=failure.counted_at)
        permit.report(verdict)
        self._metrics.refusals.count(verdict.at, name, failure)
        match failure:
            case Throttled():
                self._metrics.throttled(name, failure.kind)
                return "throttled"
            case BillingRefused():
                self._metrics.throttled(name, "billing")
                return "throttled"
            case QuotaUsedUp():
                self._metrics.throttled(name, "quota_period")
                return "throttled"
            case Unauthorized():
                self._metrics.key_refused(name, failure.message)
                self._metrics.throttled(name, "unauthorized")
                return "client_error"
            case Rejected():
                return "client_error"
            case NoByteInTime():
                return "timeout"
            case ServerFailed():
                return "server_error"
            case _:
                return "connect_error"

    @staticmethod
    def _outcome_of(failure: Exception) -> VerdictOutcome:
        """Return the outcome that admission and the retry policy get for this failure."""
        match failure:
            case Throttled():
                return "refused"
            case NoByteInTime():
                return "timed_out"
            case BillingRefused() | QuotaUsedUp() | Unauthorized():
                # The key is the sidecar's, because the caller's bearer token is not forwarded.
                return "account"
            case Rejected():
                # The request passed the limits, unless it is too large for a limit at all: that teaches nothing.
                return "abandoned" if failure.above_limit else "accepted"
            case _:
                return "failed"

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
        """Add the backend's times (start of work, first byte) to the ticket's stopwatch, and count what was resent."""
        ticket.attempts += timings.resends
        started = timings.work_started
        if started is not None:
            ticket.stopwatch.switch("first_byte", started)
            ticket.stopwatch.switch("body", timings.first_byte or now)


def _drop_memory(failure: Exception) -> None:
    """Drop what an error must not keep while its ticket waits: a long body, and the frames of the attempt.

    A frame can contain most of an answer that broke.
    """
    failure.__traceback__ = failure.__cause__ = failure.__context__ = None
    if isinstance(failure, BackendError) and len(failure.body) > _MAX_WAITING_ERROR_BYTES:
        failure.body = b""
