"""Reads a provider's error: what it means, how long to wait, and which rule says so.

`read` applies the rules in a fixed order; the first that matches decides:

1. the request's own fault: it is larger than a limit allows at all, so that no wait helps;
2. machine facts: names of quotas, headers of proxies, "(actual/limit): 71/60";
3. codes, whole or by the words inside them;
4. money, content inspection, the key, and a quota of a day or another long period, by words;
5. load, by words: concurrency, growth, capacity, LLM tokens, requests;
6. the HTTP status alone.

The rules are in `refusal_rules.py`, the words and codes in `refusal_table.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from backends.base import (
    BackendError,
    BillingRefused,
    QuotaUsedUp,
    Rejected,
    ServerFailed,
    Throttled,
    ThrottleKind,
    Unauthorized,
)
from backends.forwarded_headers import UPSTREAM_REQUEST_ID, to_caller, upstream_request_id
from backends.remote.error_bodies import ErrorFacts, read_error
from backends.remote.public_words import is_public_code
from backends.remote.refusal_rules import Rules, without_quotes
from backends.remote.refusal_table import ABOUT_THE_REQUEST, Meaning
from backends.remote.waits import retry_after

#: The status that is reported for an error inside a 200 if the error itself names no status.
_DEFAULT_STATUS: dict[Meaning, int] = {
    "billing": 403, "unauthorized": 401, "moderated": 400, "rejected": 400, "own_fault": 400, "too_large": 413,
    "server": 502, "capacity": 503,
}  # fmt: skip

#: What each meaning is called in our own sentence.
_SENTENCES: dict[Meaning, str] = {
    "request_rate": "its limit of requests per time is reached",
    "token_rate": "its limit of LLM tokens per time is reached",
    "growth": "the load rose too quickly for it",
    "concurrency": "too many requests are in progress there",
    "capacity": "it has no capacity for this model now",
    "unknown": "a limit is reached, and it does not say which",
    "quota_period": "the quota of a long period (an hour, a day or more) is used up",
    "billing": "the account has no money or credit left, or has not bought the model",
    "unauthorized": "it does not accept the sidecar's key",
    "moderated": "its content inspection refused the request or the answer",
    "too_large": "this request alone is larger than the limit: make it smaller",
    "own_fault": "it does not accept this request",
    "rejected": "it does not accept this request",
    "server": "it failed",
}
#: Seconds. A shorter wait beside a quota of a day is wrong (Google), so it is not reported as the end.
_SHORTEST_PERIOD_WAIT = 60.0
#: Characters of the provider's message that are kept for the caller of the request.
_QUOTE_LIMIT = 300

#: Names such as `UserConcurrentRequests` and `requests_per_minute` inside a message are read as words.
_IDENTIFIER = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=\w)_(?=\w)")


@dataclass(frozen=True, slots=True)
class Reading:
    """How an error is read."""

    meaning: Meaning
    rule: str
    """The rule that decided, in words. It contains no text of the provider except a code."""
    status: int
    """The HTTP status, or the status that an error inside a 200 stands for."""
    code: str
    """The provider's code, for the caller of the request; empty if it sent none."""
    public_code: str
    """The first code that consists of known words, for everybody; empty if there is none."""
    wait: float | None
    facts: ErrorFacts
    words_known: bool
    """False for a refusal whose code and words no rule knew: its status alone was read."""


def read(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    request_body: bytes = b"",
    payload: object = None,
    now: float | None = None,
) -> Reading:
    """Read a provider's error. Never raises, whatever bytes `body` contains.

    `status` is the HTTP status or, for an error inside a 200, the status that it names. A value below 400 means that it
    names none. `request_body` is the request that was refused: words that it contains prove nothing.
    `payload` is the JSON of `body`, if it was parsed already: a body can be long.
    """
    facts = read_error(body, status, payload=payload)
    if status < 400 and facts.status:
        status = facts.status
    lower = {name.lower(): value for name, value in (facts.headers | dict(headers)).items()}
    text = _IDENTIFIER.sub(" ", facts.text).lower()
    wait = retry_after(lower, time.time() if now is None else now, without_quotes(text), facts.retry_delay)
    rules = Rules(status, lower, facts, text, wait=wait, request_body=request_body)
    meaning, rule = rules.decide()
    if status < 400:
        status = _DEFAULT_STATUS.get(meaning, 429)
    elif meaning == "too_large" and status not in ABOUT_THE_REQUEST and status != 402:
        status = 413
    if meaning == "quota_period" and wait is not None and wait < _SHORTEST_PERIOD_WAIT:
        wait = None
    number_in_words = next((str(number) for number in rules.numbers_in_words), "")
    code = facts.code_for_caller or number_in_words
    codes = (*facts.codes, *(str(number) for _, number in facts.numbers), number_in_words)
    public_code = next(filter(is_public_code, codes), "")
    return Reading(meaning, rule, status, code, public_code, wait, facts, rules.words_known)


def classify(
    status: int, headers: Mapping[str, str], body: bytes, *, request_body: bytes = b"", payload: object = None
) -> BackendError:
    """Return the exception for a provider's error, see `read`.

    Its message is our own sentence with the provider's code, if that consists of known words. The provider's text, id
    and body, and any other code, are for the caller of the request only.
    """
    return error_of(read(status, headers, body, request_body=request_body, payload=payload), status, headers, body)


def error_of(reading: Reading, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
    """Return the exception for a reading."""
    meaning = reading.meaning
    kind: type[BackendError] = {
        "quota_period": QuotaUsedUp,
        "billing": BillingRefused,
        "unauthorized": Unauthorized,
        "moderated": Rejected,
        "too_large": Rejected,
        "own_fault": Rejected,
        "rejected": Rejected,
        "server": ServerFailed,
    }.get(meaning, Throttled)
    shown = status if status >= 400 else reading.status
    code = f" ({reading.public_code})" if reading.public_code else ""
    request_id = upstream_request_id(headers) or reading.facts.request_id
    message = f"the provider answered {shown}{code}: {_SENTENCES[meaning]}"
    passed = to_caller(headers)
    if request_id:
        passed[UPSTREAM_REQUEST_ID] = request_id
    arguments = {"status": reading.status, "code": reading.code, "body": body, "headers": passed}
    if kind is Throttled:
        error: BackendError = Throttled(
            message,
            kind=cast("ThrottleKind", meaning),
            retry_after=reading.wait,
            **arguments,  # type: ignore[arg-type]
        )
    else:
        error = kind(message, **arguments)  # type: ignore[arg-type]
    if isinstance(error, QuotaUsedUp):
        error.ends_in = reading.wait
    if isinstance(error, Rejected):
        error.moderated = meaning == "moderated"
        error.above_limit = meaning == "too_large" and status != 400
    error.quote = " ".join(reading.facts.text[: 4 * _QUOTE_LIMIT].split())[:_QUOTE_LIMIT]
    error.upstream_request_id = request_id
    error.words_known, error.public_code = reading.words_known, reading.public_code
    return error
