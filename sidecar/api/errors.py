"""Every error that a caller can get: the table from exception to status, code and text, and one body format per API."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

from backends.base import BackendError, BillingRefused, QuotaUsedUp, Rejected, Throttled
from backends.forwarded_headers import UPSTREAM_REQUEST_ID
from backends.http1.errors import MalformedRequest, RefusedBody
from backends.json_values import may_have_too_many_values
from sidecar.admission import (
    AccountClosed,
    DeadlineUnreachable,
    Draining,
    KeyClosed,
    NotAdmitted,
    QueueFull,
    QuotaClosed,
    Superseded,
)
from sidecar.dispatch.dispatcher import DeadlineExceeded
from sidecar.observe.metrics import RequestOutcome

Api = Literal["openai", "trio", "native"]
#: Every error code of the sidecar itself. Any other code that a caller gets is the provider's.
Code = Literal[
    "invalid_request", "unauthorized", "forbidden_origin", "not_found", "method_not_allowed", "request_timeout",
    "superseded", "payload_too_large", "unsupported_media_type", "headers_too_large",
    "queue_full", "deadline_unreachable", "draining", "upstream_quota_used_up", "upstream_billing", "upstream_error",
    "deadline_exceeded", "internal_error",
]  # fmt: skip


class InvalidRequest(Exception):
    """A fault of the caller, found before the request was queued. `field` names the field or header to correct.

    `detail` is any JSON value that callers of trio-core's API get instead of the message. `allow` lists the methods of
    the path, for the header `Allow` of a 405.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        status: int = 400,
        code: Code = "invalid_request",
        detail: Any = None,
        allow: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.status = status
        self.code = code
        self.detail = detail
        self.allow = allow


@dataclass(frozen=True, slots=True)
class Problem:
    """An error, as README.md lists it. `body` is the provider's own error body, which is sent unchanged."""

    status: int
    code: str
    message: str
    outcome: RequestOutcome
    field: str | None = None
    retry_after: float | None = None
    body: bytes = b""
    detail: Any = None
    """Any JSON value that callers of trio-core's API get instead of the message."""
    allow: str = ""
    """The methods of the path, for the header `Allow` of a 405."""
    upstream_request_id: str = ""
    """The provider's own id of the request, for `X-Upstream-Request-Id`."""

    @property
    def is_final(self) -> bool:
        """Whether a client must not repeat the request by itself.

        Either a repetition would fail again (4xx), or attempts were made here and each more costs money again (502,
        504). 503 is not final, because its `Retry-After` is a reserved place. A used-up quota ends too late for a
        repetition. A 4xx of the provider is passed on as the provider sent it.
        """
        if self.outcome in ("rejected_upstream", "moderated"):
            return False
        is_callers_fault = 400 <= self.status < 500 and self.status != 408
        return is_callers_fault or self.status in (502, 504) or self.code == "upstream_quota_used_up"


_NOT_ADMITTED: dict[type[NotAdmitted], tuple[int, Code, RequestOutcome]] = {
    QueueFull: (503, "queue_full", "shed"),
    DeadlineUnreachable: (503, "deadline_unreachable", "shed"),
    Draining: (503, "draining", "shed"),
    Superseded: (409, "superseded", "superseded"),
}
#: Advice that follows the provider's own message in the error text.
_BILLING_ADVICE = "settle it in the provider's console, nothing here needs a restart"
_KEY_ADVICE = "set SIDECAR_DASHSCOPE_API_KEY or its file to a key of this provider and region"
_CHECK_ADVICE = "`vlm-sidecar check` tries the way to it step by step"


def problem_of(error: Exception, api: Api) -> Problem:
    """Return the error for the caller. An unknown exception becomes status 500, `internal_error`."""
    problem = _problem_of(error, api)
    if isinstance(error, BackendError) and error.upstream_request_id:
        return replace(problem, upstream_request_id=error.upstream_request_id)
    return problem


def _problem_of(error: Exception, api: Api) -> Problem:
    match error:
        case InvalidRequest():
            return Problem(
                error.status,
                error.code,
                error.message,
                "invalid",
                field=error.field,
                detail=error.detail,
                allow=error.allow,
            )
        case RefusedBody(status=503):
            return Problem(503, error.code, str(error), "shed", retry_after=1.0)
        case MalformedRequest() | RefusedBody():  # while a body was received
            return Problem(error.status, error.code, str(error), "invalid")
        case BillingRefused():
            text = f"the provider refuses the account: {_with_quote(error)}; {_BILLING_ADVICE}"
            return Problem(502, "upstream_billing", text, "error")
        case QuotaClosed():
            return Problem(503, "upstream_quota_used_up", error.message, "error", retry_after=error.retry_after)
        case KeyClosed():
            text = f"the provider refuses the sidecar's key: {error.message}; {_KEY_ADVICE}"
            return Problem(502, "upstream_error", text, "error", retry_after=error.retry_after)
        case AccountClosed():
            text = f"the provider refuses the account: {error.message}; {_BILLING_ADVICE}"
            return Problem(502, "upstream_billing", text, "error", retry_after=error.retry_after)
        case QuotaUsedUp():
            ends = "" if error.ends_in is not None else "; the provider does not say when it ends"
            text = f"{_with_quote(error)}{ends}"
            return Problem(503, "upstream_quota_used_up", text, "error", retry_after=error.ends_in)
        case NotAdmitted():
            status, code, outcome = _NOT_ADMITTED[type(error)]
            return Problem(status, code, error.message, outcome, retry_after=error.retry_after)
        case DeadlineExceeded():
            return Problem(504, "deadline_exceeded", str(error), "deadline")
        case Rejected():
            return Problem(
                422 if api == "trio" else error.status,
                error.code or "rejected_upstream",
                _with_quote(error),
                "moderated" if error.moderated else "rejected_upstream",
                body=error.body if _is_json(error.body) else b"",
                detail=_client_error(error),
            )
        case Throttled():  # inside a stream that had already begun: another attempt is impossible
            text = f"the provider cut the answer short: {_with_quote(error)}; ask again"
            return Problem(502, "upstream_error", text, "error")
        case BackendError():
            return Problem(502, "upstream_error", f"{_with_quote(error)}; {_CHECK_ADVICE}", "error")
        case _:
            return Problem(
                500,
                "internal_error",
                "a defect in the sidecar; its log has the details beside this request's id",
                "error",
            )


def _with_quote(error: BackendError) -> str:
    """Return the message with the provider's own words, which only the caller of this request may see."""
    return f"{error.message}. The provider says: {error.quote}" if error.quote else error.message


def _is_json(body: bytes) -> bool:
    if may_have_too_many_values(body):
        return False
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _client_error(error: Rejected) -> dict[str, Any]:
    """Return the `detail` that trio-core returns for a provider's 4xx.

    The message begins like that of the openai client, because trio-core uses the openai client. The provider's own
    words follow, if there are any: only the caller of this request gets this message.
    """
    words = ": ".join(part for part in (f"the provider answered {error.status}", error.code, error.quote) if part)
    return {
        "kind": "vlm_client_error",
        "upstream_status": error.status,
        "moderated": error.moderated,
        "message": f"Error code: {error.status} - {words if error.quote else error.message}"[:300],
    }


def _openai(problem: Problem, request_id: str) -> Any:
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    error = {"message": problem.message, "type": kind, "code": problem.code, "param": problem.field}
    return {"error": error, "request_id": request_id}


def _native(problem: Problem, request_id: str) -> Any:
    return {"code": problem.code, "message": problem.message, "request_id": request_id}


def _trio(problem: Problem, request_id: str) -> Any:
    del request_id
    detail = problem.message if problem.detail is None else problem.detail
    if problem.status == 413:  # trio-core's format for a 413, and also `detail`, which all other errors have
        return {"error": problem.code, "message": problem.message, "detail": detail}
    return {"detail": detail}


_SHAPES: dict[Api, Callable[[Problem, str], Any]] = {"openai": _openai, "native": _native, "trio": _trio}


def body_of(problem: Problem, api: Api, request_id: str) -> bytes:
    """Return the error body in the format of the API, or the provider's own body if it exists and the API shows it."""
    if problem.body and api != "trio":
        return problem.body
    # Not orjson: a 422 repeats the caller's input, which may hold an integer of any length or half a surrogate pair.
    return json.dumps(_SHAPES[api](problem, request_id), separators=(",", ":")).encode()


def headers_of(problem: Problem) -> dict[str, str]:
    """Return `Content-Type` and, where they apply, `Retry-After`, `Allow`, `X-Should-Retry` and the provider's id.

    Official clients of OpenAI's API obey `X-Should-Retry`. Without it they repeat a 409, so that a stale frame would
    return. `Retry-After` is in whole seconds, rounded up, at least 1: a caller that waits for this time is admitted.
    """
    headers = {"Content-Type": "application/json"}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(max(ceil(problem.retry_after), 1))
    if problem.allow:
        headers["Allow"] = problem.allow
    if problem.is_final:
        headers["X-Should-Retry"] = "false"
    if problem.upstream_request_id:
        headers[UPSTREAM_REQUEST_ID] = problem.upstream_request_id
    return headers
