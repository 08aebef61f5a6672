"""Explains how a provider's answer would be read: the command `vlm-sidecar check --answer FILE`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, cast

from backends.remote.answers import StreamWatch, judge, seems_readable
from backends.remote.error_bodies import lenient_json, read_error
from backends.remote.events import begins_like_events
from backends.remote.refusal_table import Meaning
from backends.remote.refusals import Reading, read

_HEAD = re.compile(rb"\s*HTTP/[\d.]+ (\d{3})[^\n]*\n((?:[^\r\n][^\n]*\n)*)\r?\n?")
_TOKEN = re.compile(r"[A-Za-z0-9_.:@-]{1,64}")
#: What the sidecar does after each meaning.
_CONSEQUENCES: dict[Meaning | str, str] = {
    "request_rate": "the request waits and is sent again; the limit of requests per time is learned",
    "token_rate": "the request waits and is sent again; the limit of LLM tokens per time is learned",
    "growth": "the request waits and is sent again; the load rises more slowly",
    "concurrency": "the request waits and is sent again; the limit of requests in progress is learned",
    "capacity": "the circuit opens; single probes find out when the provider has room again",
    "unknown": "the request waits and is sent again; the sidecar infers which limit it was",
    "quota_period": "503 upstream_quota_used_up; other upstreams take over",
    "billing": "502 upstream_billing; other upstreams take over",
    "unauthorized": "other upstreams take over; without one, the caller gets the provider's answer",
    "moderated": "the caller gets the provider's answer; the request is not sent again",
    "too_large": "the caller gets the provider's answer, once; nothing is learned from it",
    "own_fault": "the caller gets the provider's answer; the request is not sent again",
    "rejected": "the caller gets the provider's answer; the request is not sent again",
    "server": "the request is sent again within the retry budget, elsewhere if there is another upstream",
    "answer": "the caller gets it",
    "nothing": "502 upstream_error; the request is not sent again, because a complete 200 was charged",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """How an answer is read, and its shape. It contains nobody's text, so that it can be sent to the developers."""

    status: int
    meaning: str
    rule: str
    consequence: str
    code: str
    words_known: bool
    """False for a refusal that was read by its status alone."""
    wait_seconds: float | None
    header_names: list[str]
    body_bytes: int
    body_shape: Any
    """The body's JSON with every text replaced by its length, and codes kept; None if it is not JSON."""


def explain(raw: bytes) -> Explanation:
    """Explain an answer as `curl -i` prints it: status line, headers, an empty line, the body.

    Raises `ValueError` if there is no status line.
    """
    status, headers, body = _parsed(raw)
    reading: Reading | None = None
    if status >= 400:
        reading = read(status, headers, body)
        meaning, rule = cast("str", reading.meaning), reading.rule
    elif status < 200 or status >= 300:
        meaning, rule = "server", f"status {status}: a redirect or another protocol"
    elif begins_like_events(body):
        watch = StreamWatch()
        watch.feed(body)
        watch.end()
        if watch.failure is None:
            meaning, rule = ("answer", "the stream has content") if watch.has_content else ("nothing", "no content")
            if watch.has_content and not watch.is_complete:
                meaning, rule = "server", "the stream ended without finish_reason and without [DONE]"
        else:
            reading = read(watch.failure.status, headers, watch.failure.body)
            meaning, rule = cast("str", reading.meaning), f"an error inside the stream; {reading.rule}"
    else:
        payload = lenient_json(body)
        meaning = cast("str", judge(payload, is_chat=True))
        if payload is None and seems_readable(body):
            meaning = "answer"
        rule = "a choice can be read" if meaning == "answer" else "nothing can be read as an answer"
        if meaning == "error":
            reading = read(0, headers, body)
            meaning, rule = cast("str", reading.meaning), f"an error inside a 200; {reading.rule}"
    return Explanation(
        status=status,
        meaning=meaning,
        rule=rule,
        consequence=_CONSEQUENCES[meaning],
        code=reading.code if reading else "",
        words_known=reading is None or reading.words_known,
        wait_seconds=reading.wait if reading else None,
        header_names=sorted(name for name in headers if _TOKEN.fullmatch(name)),
        body_bytes=len(body),
        body_shape=_shape(lenient_json(body), "", set(read_error(body).codes)),
    )


def lines_of(explanation: Explanation) -> list[str]:
    """Return the explanation for a terminal. An unknown refusal ends with a report that can be sent as it is."""
    wait = "none named" if explanation.wait_seconds is None else f"{explanation.wait_seconds:g} s"
    lines = [
        f"read as  {explanation.meaning}",
        f"because  {explanation.rule}",
        f"code     {explanation.code or 'none'}",
        f"wait     {wait}",
        f"then     {explanation.consequence}",
    ]
    if explanation.meaning == "unknown" or not explanation.words_known:
        lines += ["", "The sidecar does not know these words. This report contains nobody's text; please send it:"]
        lines.append(json.dumps(asdict(explanation), indent=1))
    return lines


def _parsed(raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body. Of several heads (a proxy's, `100 Continue`) the last one counts."""
    status, headers = 0, b""
    while match := _HEAD.match(raw):
        status, headers, raw = int(match[1]), match[2], raw[match.end() :]
    if not status:
        raise ValueError("the file must begin with a status line, as `curl -i` prints it")
    pairs = (line.partition(":") for line in headers.decode("utf-8", "replace").splitlines())
    return status, {name.strip().lower(): value.strip() for name, _, value in pairs}, raw


def _shape(value: Any, key: str, codes: set[str], depth: int = 0) -> Any:
    if depth > 8:
        return "…"
    if isinstance(value, dict):
        return {
            name if _TOKEN.fullmatch(name) else f"a key of {len(name)} characters": _shape(
                inner, name, codes, depth + 1
            )
            for name, inner in list(value.items())[:40]
        }
    if isinstance(value, list):
        return [_shape(inner, key, codes, depth + 1) for inner in value[:5]]
    if isinstance(value, str):
        return value if value in codes and _TOKEN.fullmatch(value) else f"a text of {len(value)} characters"
    return value
