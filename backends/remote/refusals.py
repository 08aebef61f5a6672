"""Classifies a provider's error: first by its code, then by its message, then by the HTTP status.

Sources of the codes and messages: Alibaba Cloud Model Studio's page "Error messages" (DashScope's native and
OpenAI-compatible spellings), OpenAI's guide "Error codes", and the error texts of vLLM, Ray Serve, TGI and Azure
OpenAI.

There are two formats of an error: OpenAI's `{"error": {"message", "type", "code"}, "request_id"}` and the native
`{"code", "message", "request_id"}`. Both APIs may return either format, because a gateway in front of the provider uses
its own format.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import orjson

from backends.base import BackendError, BillingRefused, Rejected, ServerFailed, Throttled, ThrottleKind
from backends.forwarded_headers import to_caller
from backends.remote.waits import retry_after

_Meaning = ThrottleKind | Literal["billing", "moderated", "rejected", "server"]

#: Codes whose meaning is clear without the message, in lower case. A code with dots, such as
#: `InternalError.Algo.DataInspectionFailed`, is also looked up by its last part.
_CODES: dict[str, _Meaning] = {
    "throttling.ratequota": "request_rate",
    "limitrequests": "request_rate",
    "limit_requests": "request_rate",
    "requests": "request_rate",  # OpenAI's `type` beside `rate_limit_exceeded`
    "tokens": "token_rate",  # OpenAI's `type`, as above
    "throttling.allocationquota": "token_rate",
    "insufficient_quota": "token_rate",
    "throttling.burstrate": "growth",
    "limit_burst_rate": "growth",
    "throttling.concurrency": "concurrency",
    "modelservingerror": "capacity",
    "model_serving_error": "capacity",
    "modelunavailable": "capacity",
    "model_unavailable": "capacity",
    "overloaded_error": "capacity",
    "arrearage": "billing",
    "commoditynotpurchased": "billing",
    "prepaidbilloverdue": "billing",
    "postpaidbilloverdue": "billing",
    "allocationquota.freetieronly": "billing",
    "billing_hard_limit_reached": "billing",
    "datainspectionfailed": "moderated",
    "data_inspection_failed": "moderated",
    "content_filter": "moderated",
    "content_policy_violation": "moderated",
    "requesttimeout": "server",
}

_OUT_OF_FREE_QUOTA = re.compile(
    r"free (allocated )?quota (has been |is )?(exceeded|exhausted)|free tier .{0,40}exhausted"
)
_OUT_OF_MONEY = re.compile(
    r"account is in good standing|bill is overdue|has not purchased|billing details"
    r"|insufficient (account )?balance|credit balance is too low"
)
_MODERATED = re.compile(r"inappropriate content|data ?inspection ?failed")

#: Patterns that recognize the limit in a message, the most specific first. The first pattern must not match
#: `java.util.concurrent`, which occurs in messages of status 500.
_LIMIT_MESSAGES: tuple[tuple[re.Pattern[str], ThrottleKind], ...] = (
    (re.compile(r"(?<![.\w])concurren(t|cy)\b|parallel request|backpressure|queue is full"), "concurrency"),
    (re.compile(r"increased too quickly"), "growth"),
    (re.compile(r"capacity limit|overloaded|model is unavailable"), "capacity"),
    (re.compile(r"tokens? per (min|day|sec)|token rate limit|\btp[ms]\b|allocated quota exceeded"), "token_rate"),
    (
        re.compile(
            r"requests? per (min|day|sec)|(requests?|call|api) rate limit|\b(rp[ms]|qp[ms])\b"
            r"|exceeded your (request limit|current requests)|local_rate_limited"
        ),
        "request_rate",
    ),
)

#: The status that is reported for an error inside a stream if the error itself names no status.
_DEFAULT_STATUS: dict[_Meaning, int] = {
    "billing": 403,
    "moderated": 400,
    "rejected": 400,
    "server": 502,
    "capacity": 503,
}

#: Characters of the provider's message and of its code that are used in our message.
_TEXT_LIMIT = 300
_CODE_LIMIT = 100


def classify(status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
    """Return the exception for a provider's error. Never raises, whatever bytes `body` contains.

    `status` is the HTTP status or, for an error event inside a stream, the status that the event names. A value below
    400 means that the event names no status. The exception contains the status, the provider's code, the unchanged
    body, and the headers that may be forwarded to the caller.
    """
    error = _read(body)
    if status < 400 and 400 <= error.status <= 599:
        status = error.status
    meaning = _meaning(status, error)
    if status < 400:
        status = _DEFAULT_STATUS.get(meaning, 429)
    shown = ": ".join(part for part in (error.code, error.text) if part) or "no readable reason"
    message = f"the provider answered {status}: {shown}"
    passed = to_caller(headers)
    if meaning == "billing":
        return BillingRefused(message, status=status, code=error.code, body=body, headers=passed)
    if meaning in ("moderated", "rejected"):
        rejected = Rejected(message, status=status, code=error.code, body=body, headers=passed)
        rejected.moderated = meaning == "moderated"
        return rejected
    if meaning == "server":
        return ServerFailed(message, status=status, code=error.code, body=body, headers=passed)
    return Throttled(
        message,
        kind=cast("ThrottleKind", meaning),
        retry_after=retry_after(headers, time.time()),
        status=status,
        code=error.code,
        body=body,
        headers=passed,
    )


@dataclass(frozen=True, slots=True)
class _Error:
    code: str = ""
    """The error's `code`, or its `type` if it has no code (OpenAI's `"code": null`)."""
    type: str = ""
    text: str = ""
    status: int = 0
    """The HTTP status that the body names (vLLM's `"code": 400`), or 0."""
    has_request_id: bool = False
    """Whether the body has a `request_id` beside the error. DashScope sends it, OpenAI's servers do not."""


def _read(body: bytes) -> _Error:
    """Read an error in either format. Text that is not JSON becomes the message, unless it is a web page."""
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError:
        text = body[: 4 * _TEXT_LIMIT].decode("utf-8", "replace").strip()
        return _Error(text="" if text.startswith("<") else _shortened(text))
    if not isinstance(payload, dict):
        return _Error(text=_shortened(payload) if isinstance(payload, str) else "")
    inner = payload.get("error")
    fields = inner if isinstance(inner, dict) else payload
    text = next(
        (v for k in ("message", "msg", "details", "detail", "error") if isinstance(v := fields.get(k), str) and v), ""
    )
    code, kind = fields.get("code"), fields.get("type")
    number = (
        int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdecimal() and len(code) == 3) else 0
    )
    type_ = kind[:_CODE_LIMIT] if isinstance(kind, str) else ""
    return _Error(
        code=code[:_CODE_LIMIT] if isinstance(code, str) and code and not number else type_,
        type=type_,
        text=_shortened(text),
        status=number,
        has_request_id="request_id" in payload,
    )


def _shortened(text: str) -> str:
    """Return one line of bounded length: the message goes into a log line, and a body can have any length."""
    return " ".join(text[: 4 * _TEXT_LIMIT].split())[:_TEXT_LIMIT]


def _meaning(status: int, error: _Error) -> _Meaning:
    text = error.text.lower()
    code = error.code.lower()
    meaning = _known(code) or _known(error.type.lower())
    if meaning == "token_rate":
        return "billing" if _quota_means_money(error, text) else meaning
    if meaning is not None:
        return meaning
    if _MODERATED.search(text) and status < 500:
        return "moderated"
    if status == 402 or (status < 500 and (_OUT_OF_FREE_QUOTA.search(text) or _OUT_OF_MONEY.search(text))):
        return "billing"
    throttling = status == 429 or code.startswith(("throttling", "rate_limit"))
    # The patterns are used only if the status can mean a refusal by a limit: the message of an ordinary 4xx may quote
    # the request.
    if throttling or status >= 500 or status < 400:
        for pattern, kind in _LIMIT_MESSAGES:
            if pattern.search(text):
                return kind
    if throttling:
        return "unknown"
    if status == 529:  # "overloaded" at Anthropic and at gateways that imitate it
        return "capacity"
    if 400 <= status < 500 and status != 408:
        return "rejected"
    return "server"


def _known(code: str) -> _Meaning | None:
    return _CODES.get(code) or _CODES.get(code.rpartition(".")[2])


def _quota_means_money(error: _Error, text: str) -> bool:
    """Return whether a quota refusal means that the account has no money left.

    OpenAI sends `insufficient_quota` with the text "You exceeded your current quota, please check your plan and billing
    details" for an empty account. DashScope sends the same code and the same text for tokens per minute. DashScope's
    error differs in two ways: it has a `request_id` beside the error, and its text contains a link to DashScope's help.
    """
    if _OUT_OF_FREE_QUOTA.search(text):
        return True
    is_dashscope = error.has_request_id or "model-studio" in text or "aliyun" in text or "alibabacloud" in text
    return bool(_OUT_OF_MONEY.search(text)) and not is_dashscope
