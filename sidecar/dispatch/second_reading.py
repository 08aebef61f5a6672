"""Reads a failure again in the light of the other attempts, which the backend does not know."""

from __future__ import annotations

from backends.base import BackendError, Rejected, ServerFailed, Throttled
from sidecar.admission import Permit

#: Seconds. A request is refused for LLM tokens although nothing else was sent for a minute: perhaps the request is too
#: large, perhaps other programs use the account. It is sent again after the wait that the provider reported, or after
#: LONE_WAIT_SECONDS; at most after MAX_LONE_WAIT_SECONDS, because probes may not be further apart.
LONE_WAIT_SECONDS, MAX_LONE_WAIT_SECONDS = 1.0, 30.0


def second_reading(permit: Permit, failure: Exception, now: float, *, elsewhere: bool) -> tuple[Exception, bool]:
    """Return the failure as the caller and the gates must see it, and whether a limit is learned from it.

    `elsewhere`: another upstream could take the ticket.

    * A 5xx without words that comes when more is sent is a refusal by a limit.
    * A request that is refused for LLM tokens although nothing else was sent for longer than any usual window is larger
      than the limit. The first such refusal teaches nothing, and the second one is the request's own fault. If another
      upstream could take the ticket, it goes there instead.

    A failure in a stream that has begun stays as it is.
    """
    ticket = permit.ticket
    if ticket.streaming:
        return failure, True
    if type(failure) is ServerFailed and failure.may_resend:
        if permit.read_failure(now) != "refused":
            return failure, True
        refusal = Throttled(
            f"{failure.message}; it does so when more is sent, so this is read as a limit",
            kind="unknown",
            status=failure.status,
            code=failure.code or f"status {failure.status}",
        )
        return _with_answer_of(failure, refusal), True
    if isinstance(failure, Throttled) and failure.kind == "token_rate":
        refusals = permit.upstream.lone_token_refusals(permit)
        if refusals and elsewhere:  # the limit there may be higher
            ticket.tried = (*ticket.tried, permit.upstream)
            return failure, False
        if refusals > 1:
            rejected = Rejected(
                f"{failure.message}; it came twice while nothing else was sent: this request is larger than the limit",
                status=413,
                code=failure.code,
            )
            rejected.above_limit = True
            return _with_answer_of(failure, rejected), True
        if refusals:
            ticket.not_before = now + min(failure.retry_after or LONE_WAIT_SECONDS, MAX_LONE_WAIT_SECONDS)
            return failure, False
    return failure, True


def _with_answer_of(failure: BackendError, error: BackendError) -> BackendError:
    """Return `error` with the provider's answer that `failure` holds."""
    error.body, error.headers, error.public_code = failure.body, failure.headers, failure.public_code
    error.quote, error.upstream_request_id = failure.quote, failure.upstream_request_id
    error.limits, error.counted_at = failure.limits, failure.counted_at
    return error
