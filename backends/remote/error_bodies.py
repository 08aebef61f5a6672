"""Unwraps the body of a provider's error: finds codes, texts and facts in it, however deep they are nested.

Known envelopes: `{"error": {…}}` and `{"error": "text"}` (OpenAI and its imitators), a list of one element (Google),
`errors: [{…}]` (Cloudflare), `errors: {…}` (ModelScope), `detail: {…}` (FastAPI), `base_resp: {…}` (MiniMax),
`Response: {Error: {…}}` (Tencent), `response: {error: {…}}` (OpenAI's Responses API), `choices: [{error: {…}}]`
(OpenRouter), plain text, and an event stream.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import orjson

from backends.json_values import may_have_too_many_values
from backends.remote.events import begins_like_events, events_in
from backends.remote.refusal_table import ABOUT_THE_REQUEST

#: Bytes. A longer body is not read, because parsing it would block the event loop: strict JSON takes 2 ms for 1 MB, and
#: the lenient parser much longer.
_STRICT_LIMIT, _LENIENT_LIMIT = 8 * 1024 * 1024, 1024 * 1024
#: Characters of the texts of one error that are read, and of one code.
_TEXT_LIMIT, _CODE_LIMIT = 2000, 120
_DEPTH, _ITEMS = 6, 16
#: How much of one error is collected. Nobody's error has more, and each text and code costs time on the event loop.
_TEXTS, _CODES, _NUMBERS, _NAMES, _HEADERS, _VISITS = 32, 32, 64, 32, 32, 200
#: Texts of one error that are parsed because they may contain JSON, and their characters; also the bytes of an event
#: stream in which its error is looked for.
_PARSED_TEXTS, _PARSED_LIMIT = 8, 65_536
#: Characters of a header inside a body.
_HEADER_LIMIT = 300

_ENVELOPES = (
    "error",
    "Error",
    "errors",
    "detail",
    "details",
    "base_resp",
    "Response",
    "response",
    "innererror",
    "metadata",
    "cause",
)
_CODE_KEYS = (
    "code", "Code", "type", "status", "error_code", "err_code", "errorCode", "error_type", "__type", "reason",
    "status_code", "statusCode", "http_code", "limit_source", "ErrorCode",
)  # fmt: skip
_TEXT_KEYS = (
    "message", "Message", "msg", "error_msg", "err_msg", "errorMessage", "status_msg", "details", "detail", "error",
    "title", "text", "description", "error_description", "raw", "reason", "errors", "Error",
)  # fmt: skip
#: Keys of Google's `QuotaFailure` and `ErrorInfo` whose values name the window and the dimension of a quota.
_QUOTA_KEYS = ("quotaId", "quotaMetric", "quota_limit", "quota_metric", "quota_unit", "quotaUnit", "subject")
_INNER_MESSAGE = re.compile(
    r"""[{,]\s*['"](?:message|msg)['"]\s*:\s*(?:'((?:[^'\\]|\\.){1,1500})'|"((?:[^"\\]|\\.){1,1500})")\s*[,}]""",
    re.DOTALL,
)
#: The texts of one error in which inner messages are looked for, and how many are taken from each.
_OUTER_TEXTS, _INNER_MESSAGES = 2, 2
_LINE_OF_TEXT = re.compile(r"\s+")
#: A request id is sent to the caller in a header, so only a token is accepted.
_TOKEN = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
_ID_KEYS = ("request_id", "requestId", "RequestId", "requestID", "sid")


@dataclass(slots=True)
class ErrorFacts:
    """What an error body contains. All texts and codes have their original spelling."""

    codes: list[str] = field(default_factory=list)
    """Codes and types that are texts, the innermost first."""
    numbers: list[tuple[str, int]] = field(default_factory=list)
    """Codes that are numbers and no HTTP status, each with the name of its envelope or field."""
    texts: list[str] = field(default_factory=list)
    status: int = 0
    """The HTTP status that the body names (vLLM's `"code": 400`), or 0."""
    param: str = ""
    """The field of the request that the error names. Then its text is about that field."""
    quota_names: list[str] = field(default_factory=list)
    retry_delay: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers inside the body (OpenRouter repeats those of the provider behind it)."""
    request_id: str = ""
    has_request_id: bool = False
    """Whether a `request_id` stands beside the error. DashScope sends it, OpenAI's servers do not."""
    is_page: bool = False
    is_json: bool = False
    visited: int = 0
    """Objects and lists that were looked into."""
    parsed: int = 0
    """Texts that were parsed as JSON."""

    @property
    def text(self) -> str:
        """All texts on one line."""
        return _LINE_OF_TEXT.sub(" ", " ".join(dict.fromkeys(self.texts)))[:_TEXT_LIMIT].strip()

    @property
    def code_for_caller(self) -> str:
        """The code for the caller: the first one that is a token and not a sentence; empty if there is none."""
        first = next((code for code in self.codes if _TOKEN.fullmatch(code)), "")
        return first or next((str(number) for _, number in self.numbers), "")


def lenient_json(data: bytes) -> object:
    """Return the JSON value in `data`; None if it is none. (A valid answer is never JSON's `null`.)

    Text that is too long or has too many values is not parsed. Strict JSON is parsed at once.
    Otherwise a byte order mark, UTF-16, `NaN`, `-Infinity`, single surrogates and control characters are accepted,
    as Python's and JavaScript's clients accept some of them.
    """
    if len(data) > _STRICT_LIMIT or may_have_too_many_values(data):
        return None
    try:
        return cast("object", orjson.loads(data))
    except orjson.JSONDecodeError:
        pass
    if len(data) > _LENIENT_LIMIT:
        return None
    try:
        encoding = json.detect_encoding(data)
        return cast("object", json.loads(data.decode(encoding, "surrogatepass"), strict=False))
    except (ValueError, RecursionError):
        return None


def read_error(body: bytes, status: int = 0, *, payload: object = None) -> ErrorFacts:
    """Return the facts of an error's body. Never raises. `payload` is its JSON, if it was parsed already.

    `status` is the HTTP status; below 400, the status that the body names counts. At a status that is about the request
    the message is not unwrapped, because it may quote the request.
    """
    facts = ErrorFacts()
    if payload is None:
        if begins_like_events(body):
            body = body[:_PARSED_LIMIT]
            body = next((event.data for event in events_in(body.replace(b"\r\n", b"\n")) if event.data), b"")
        payload = lenient_json(body)
    if payload is None:
        text = body[: 2 * _TEXT_LIMIT].decode("utf-8", "replace").strip()
        facts.is_page = text.startswith("<")
        if not facts.is_page and text:
            facts.texts.append(text)
    else:
        facts.is_json = True
        _collect(payload, facts, "", 0)
    if (status if status >= 400 else facts.status) in ABOUT_THE_REQUEST or facts.param:
        return facts
    for text in facts.texts[:_OUTER_TEXTS]:
        # Gateways put the provider's whole error into their own message, as JSON or as a Python dict.
        found = _INNER_MESSAGE.finditer(text[: 2 * _TEXT_LIMIT])
        facts.texts += [match[1] or match[2] for match in islice(found, _INNER_MESSAGES)]
    return facts


def _collect(value: Any, facts: ErrorFacts, name: str, depth: int) -> None:
    """Collect the facts of a value, those of inner objects first. `name` is the key under which the value stands."""
    if depth > _DEPTH or facts.visited >= _VISITS:
        return
    if isinstance(value, list | dict):
        facts.visited += 1
    if isinstance(value, list):
        if name == "detail" and value and isinstance(value[0], dict) and "loc" in value[0]:
            facts.param = "loc"  # FastAPI: a field of the request is invalid, and `input` repeats it
        for item in value[:_ITEMS]:
            _collect(item, facts, name, depth + 1)
    elif isinstance(value, str) and not depth:
        facts.texts.append(value[: 2 * _TEXT_LIMIT])
    elif isinstance(value, dict):
        for key in _ENVELOPES:
            if isinstance(inner := value.get(key), dict | list):
                _collect(inner, facts, key, depth + 1)
        if isinstance(choices := value.get("choices"), list):
            for choice in choices[:_ITEMS]:
                if isinstance(choice, dict) and isinstance(choice.get("error"), dict | str):
                    _collect({"error": choice["error"]}, facts, "choice", depth + 1)
        _collect_codes(value, facts, name)
        _collect_texts(value, facts, depth)
        _collect_details(value, facts, depth)


def _collect_codes(value: Mapping[str, Any], facts: ErrorFacts, name: str) -> None:
    for key in _CODE_KEYS:
        code = value.get(key)
        if isinstance(code, str) and code.isdecimal() and len(code) < 8:
            code = int(code)
        if isinstance(code, int) and not isinstance(code, bool):
            if 400 <= code <= 599:
                facts.status = facts.status or code
            elif code and len(facts.numbers) < _NUMBERS:
                facts.numbers.append((name if name == "base_resp" else key, code))
        elif isinstance(code, str) and _is_code(code) and len(facts.codes) < _CODES:
            facts.codes.append(code)


def _is_code(text: str) -> bool:
    return 0 < len(text) <= _CODE_LIMIT and not text.startswith("http")


def _collect_texts(value: Mapping[str, Any], facts: ErrorFacts, depth: int) -> None:
    for key in _TEXT_KEYS:
        text = value.get(key)
        if not isinstance(text, str) or not text:
            continue
        if depth < _DEPTH and (inner := _json_inside(text, facts)):
            _collect(inner, facts, "", depth + 1)  # the provider's error as a text inside the gateway's
        elif len(facts.texts) < _TEXTS:
            facts.texts.append(text[: 2 * _TEXT_LIMIT])


def _json_inside(text: str, facts: ErrorFacts) -> object:
    if not text.startswith("{") or len(text) > _PARSED_LIMIT or facts.parsed >= _PARSED_TEXTS:
        return None
    facts.parsed += 1
    return lenient_json(text.encode("utf-8", "replace"))


def _collect_details(value: Mapping[str, Any], facts: ErrorFacts, depth: int) -> None:
    """Collect Google's quota names, delays, embedded headers, the name of a field, and ids."""
    for violation in (
        [value, *(value.get("violations") or [])][:_ITEMS] if _is_list(value.get("violations")) else [value]
    ):
        if isinstance(violation, dict):
            names = [name[:_CODE_LIMIT] for key in _QUOTA_KEYS if isinstance(name := violation.get(key), str)]
            facts.quota_names += names[: _NAMES - len(facts.quota_names)]
    if isinstance(delay := value.get("retryDelay"), str):
        facts.retry_delay = facts.retry_delay or delay[:_CODE_LIMIT]
    if isinstance(headers := value.get("headers"), dict):
        for name, text in islice(headers.items(), _HEADERS - len(facts.headers)):
            if isinstance(text, str):
                facts.headers[name[:_CODE_LIMIT]] = text[:_HEADER_LIMIT]
    if isinstance(param := value.get("param"), str) and param not in ("", "None", "quota", "queue"):
        facts.param = facts.param or param[:_CODE_LIMIT]
    for key in _ID_KEYS:
        given = value.get(key)
        if isinstance(given, str):
            facts.has_request_id = facts.has_request_id or key == "request_id"
            if not facts.request_id and _TOKEN.fullmatch(given):
                facts.request_id = given


def _is_list(value: object) -> bool:
    return isinstance(value, list | type(None))
