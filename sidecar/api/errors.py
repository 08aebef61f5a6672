"""Every error a caller can get: one table from what was raised to status, code and words, and one shape an API."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from backends.base import BackendError, BillingRefused, Rejected, Throttled
from backends.http1.server import NotHTTP
from sidecar.admission import AccountClosed, DeadlineUnreachable, Draining, NotAdmitted, QueueFull, Superseded
from sidecar.dispatch.dispatcher import DeadlineExceeded
from sidecar.observe.metrics import Outcome

Api = Literal["openai", "trio", "native"]
#: Every code that is the sidecar's own; what else a caller sees in that place is the provider's.
Code = Literal[
    "invalid_request", "unauthorized", "not_found", "method_not_allowed", "superseded", "payload_too_large",
    "queue_full", "deadline_unreachable", "draining", "upstream_billing", "upstream_error", "deadline_exceeded",
    "internal_error",
]  # fmt: skip


class InvalidRequest(Exception):
    """The caller's own fault, found before anything was queued. `field` names what to mend.

    `detail` is what trio-core's callers get in the message's place: JSON of any kind.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        status: int = 400,
        code: Code = "invalid_request",
        detail: Any = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.status = status
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as the contract lists it. `body` is the provider's own, to be passed on as it is."""

    status: int
    code: str
    message: str
    outcome: Outcome
    field: str | None = None
    retry_after: float | None = None
    body: bytes = b""
    detail: Any = None
    """What trio-core's callers get in the message's place."""


_NOT_ADMITTED: dict[type[NotAdmitted], tuple[int, Code, Outcome]] = {
    QueueFull: (503, "queue_full", "shed"),
    DeadlineUnreachable: (503, "deadline_unreachable", "shed"),
    Draining: (503, "draining", "shed"),
    Superseded: (409, "superseded", "superseded"),
}
#: What to do, behind the provider's own words.
_SETTLE = "settle it in the provider's console, nothing here needs a restart"
_LOOK = "`vlm-sidecar check` tries the way to it step by step"


def problem_of(error: Exception, api: Api) -> Problem:
    """What the caller is told of an error. One that nobody thought of is told as 500, `internal_error`."""
    match error:
        case InvalidRequest():
            return Problem(error.status, error.code, error.message, "invalid", field=error.field, detail=error.detail)
        case NotHTTP():  # in the midst of a body
            return Problem(400, "invalid_request", str(error), "invalid")
        case BillingRefused() | AccountClosed():
            text = f"the provider refuses the account: {error.message}; {_SETTLE}"
            return Problem(502, "upstream_billing", text, "error", retry_after=getattr(error, "retry_after", None))
        case NotAdmitted():
            status, code, outcome = _NOT_ADMITTED[type(error)]
            return Problem(status, code, error.message, outcome, retry_after=error.retry_after)
        case DeadlineExceeded():
            return Problem(504, "deadline_exceeded", str(error), "deadline")
        case Rejected():
            return Problem(
                422 if api == "trio" else error.status,
                error.code or "rejected_upstream",
                error.message,
                "moderated" if error.moderated else "rejected_upstream",
                body=error.body,
                detail=_client_error(error),
            )
        case Throttled():  # inside a stream that had begun: there is no other attempt
            text = f"the provider cut the answer short: {error.message}; ask again"
            return Problem(502, "upstream_error", text, "error")
        case BackendError():
            return Problem(502, "upstream_error", f"{error.message}; {_LOOK}", "error")
        case _:
            return Problem(
                500,
                "internal_error",
                "a defect in the sidecar; its log has the details beside this request's id",
                "error",
            )


def _client_error(error: Rejected) -> dict[str, Any]:
    """What trio-core makes of a provider's 4xx; the message begins as the openai client's that it has inside."""
    return {
        "kind": "vlm_client_error",
        "upstream_status": error.status,
        "moderated": error.moderated,
        "message": f"Error code: {error.status} - {error.message}"[:300],
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
    if problem.status == 413:  # trio-core's own shape for this one, and that of all others beside it
        return {"error": problem.code, "message": problem.message, "detail": detail}
    return {"detail": detail}


_SHAPES: dict[Api, Callable[[Problem, str], Any]] = {"openai": _openai, "native": _native, "trio": _trio}


def body_of(problem: Problem, api: Api, request_id: str) -> bytes:
    """The error's body in the API's own shape; the provider's own body where there is one and the API shows it."""
    if problem.body and api != "trio":
        return problem.body
    # Not orjson: a 422 repeats what the caller sent, and that may be an integer of any length or half a character.
    return json.dumps(_SHAPES[api](problem, request_id), separators=(",", ":")).encode()


def headers_of(problem: Problem) -> dict[str, str]:
    """`Content-Type`, and `Retry-After` in whole seconds: never less than the wait, so that who obeys gets in."""
    headers = {"Content-Type": "application/json"}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(max(ceil(problem.retry_after), 1))
    return headers
