"""What a provider's error means: its code first, then its message, then the HTTP status.

Codes and messages are those of Alibaba Cloud Model Studio's page "Error messages" (DashScope's native and
OpenAI-compatible spellings), OpenAI's guide "Error codes", and the texts vLLM, Ray Serve, TGI and Azure OpenAI send.
Either error shape may come back on either path, because a gateway in front answers in its own:
OpenAI's `{"error": {"message", "type", "code"}, "request_id"}` and native `{"code", "message", "request_id"}`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import orjson

from backends.base import BackendError, BillingRefused, Rejected, ServerFailed, Throttled, ThrottleKind
from backends.http1.headers import end_to_end
from backends.remote.waits import retry_after

_Meaning = ThrottleKind | Literal["billing", "moderated", "rejected", "server"]

#: Codes that say all there is to say, in lower case. A dotted code is also looked up by its last part:
#: `InternalError.Algo.DataInspectionFailed`.
_CODES: dict[str, _Meaning] = {
    "throttling.ratequota": "request_rate",
    "limitrequests": "request_rate",
    "limit_requests": "request_rate",
    "requests": "request_rate",  # OpenAI's `type` beside `rate_limit_exceeded`
    "tokens": "token_rate",  # the same
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

#: What a message says about a limit, the most telling first. Not `java.util.concurrent`, which 500s quote.
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

#: The status to show for an error that came inside a stream without one.
_USUAL_STATUS: dict[_Meaning, int] = {"billing": 403, "moderated": 400, "rejected": 400, "server": 502, "capacity": 503}

_TEXT_LIMIT = 300
_CODE_LIMIT = 100


def classify(status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
    """Turn a provider's error into the exception to raise. Never raises itself, whatever the bytes are.

    `status` is the HTTP status, or the one an error event inside a stream names; below 400 means that it named none.
    The exception carries the status, the provider's code, its body unchanged, and the headers that may be passed on.
    """
    error = _read(body)
    if status < 400 and 400 <= error.status <= 599:
        status = error.status
    meaning = _meaning(status, error)
    if status < 400:
        status = _USUAL_STATUS.get(meaning, 429)
    shown = ": ".join(part for part in (error.code, error.text) if part) or "no readable reason"
    message = f"the provider answered {status}: {shown}"
    passed = end_to_end(headers)
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
    """The error's `code`, or its `type` where it has none (OpenAI's `"code": null`)."""
    type: str = ""
    text: str = ""
    status: int = 0
    """The status that the body itself names (vLLM's `"code": 400`), or 0."""
    has_request_id: bool = False
    """A `request_id` beside the error: DashScope's shape, which OpenAI's servers do not have."""


def _read(body: bytes) -> _Error:
    """Find the error in either shape. Text that is no JSON becomes the message, unless it is a web page."""
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
    """One line of bounded length: a message is for a log line, and a body may be as long as it likes."""
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
    # Only where a limit is plausible: the message of an ordinary 4xx may quote the caller's own words.
    if throttling or status >= 500 or status < 400:
        for pattern, kind in _LIMIT_MESSAGES:
            if pattern.search(text):
                return kind
    if throttling:
        return "unknown"
    if status == 529:  # "overloaded", as Anthropic and gateways that follow it say it
        return "capacity"
    if 400 <= status < 500 and status != 408:
        return "rejected"
    return "server"


def _known(code: str) -> _Meaning | None:
    return _CODES.get(code) or _CODES.get(code.rpartition(".")[2])


def _quota_means_money(error: _Error, text: str) -> bool:
    """Whether a quota refusal is about money.

    `insufficient_quota` with "You exceeded your current quota, please check your plan and billing details" is sent by
    OpenAI for an empty account and by DashScope, word for word, for tokens per minute. DashScope's has a `request_id`
    beside the error and, in the text, a link to its own help.
    """
    if _OUT_OF_FREE_QUOTA.search(text):
        return True
    is_dashscope = error.has_request_id or "model-studio" in text or "aliyun" in text or "alibabacloud" in text
    return bool(_OUT_OF_MONEY.search(text)) and not is_dashscope
