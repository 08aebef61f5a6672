"""Reads an accepted answer: its usage, and an error that it may contain in spite of its status 200.

An answer is judged by what it must contain: a choice that a caller can read. It is an error if a choice carries `error`
or `finish_reason: "error"`, if `base_resp.status_code` is not 0, or if nothing can be read and an error is marked.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from backends.base import BackendError, Progress, Usage
from backends.remote.error_bodies import lenient_json
from backends.remote.events import Event, EventReader, events_in
from backends.remote.output_meter import OutputMeter, text_bytes
from backends.remote.refusals import classify
from backends.remote.responses_api import has_failed, is_before_content, is_end_of_response, unfinished

#: LLM tokens. No model has a longer context. A larger count is an error of the provider, and it would distort the
#: learned token rate.
_MAX_TOKENS = 10_000_000

#: What an answer is: an answer that a caller can read; an error; or nothing of both.
Judgement = Literal["answer", "error", "nothing"]

#: Fields of a message or a delta that a caller can read.
_CONTENT = (
    "content", "reasoning_content", "reasoning", "reasoning_details", "thinking", "tool_calls", "function_call",
    "refusal", "audio", "annotations", "images",
)  # fmt: skip


def usage_of(payload: object) -> Usage | None:
    """Return the `usage` of an answer in either dialect; None if it is missing or not plausible.

    An event of the Responses API holds the answer under `response`.
    """
    usage = payload.get("usage") if isinstance(payload, dict) else None
    if isinstance(payload, dict) and isinstance(answer := payload.get("response"), dict):
        usage = answer.get("usage", usage)
    if not isinstance(usage, dict):
        return None
    input_tokens = usage.get("prompt_tokens", usage.get("input_tokens"))
    output_tokens = usage.get("completion_tokens", usage.get("output_tokens", 0))
    if not isinstance(input_tokens, int) or not isinstance(output_tokens, int):
        return None
    if 0 <= input_tokens <= _MAX_TOKENS and 0 <= output_tokens <= _MAX_TOKENS:
        return Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    return None


def judge(payload: object, *, is_chat: bool) -> Judgement:
    """Judge a whole answer, or the data of one event.

    `is_chat`: the answer is a chat completion in OpenAI's or the native format. Other answers (embeddings, lists) are
    judged only by marks of an error, and never if they are a resource: a batch that failed tells of its own errors.
    """
    if not isinstance(payload, dict):
        return "nothing" if is_chat else "answer"
    try:  # the usual answer, without further calls: one choice with a text
        [choice] = payload["choices"]
        usual = choice["message"]["content"] and choice["finish_reason"] != "error" and "error" not in choice
        if usual and "base_resp" not in payload:
            return "answer"
    except (LookupError, TypeError, ValueError):
        pass
    if _minimax_failed(payload):
        return "error"
    choices = choices_of(payload)
    content = finished = False
    for choice in choices:
        reason = choice.get("finish_reason")
        if choice.get("error") or reason == "error":
            return "error"
        content = content or has_content(choice)
        finished = finished or bool(reason)
    if content:
        return "answer"
    if not is_chat:
        failed = has_failed(payload) or (_marks_error(payload) and not _is_resource(payload))
        return "error" if failed else "answer"
    if _marks_error(payload):
        return "error"
    return "answer" if finished or any(isinstance(choice.get("message"), dict) for choice in choices) else "nothing"


def choices_of(payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of an answer or of a piece of a stream, in either dialect."""
    choices = payload.get("choices")
    if choices is None and isinstance(output := payload.get("output"), dict):
        choices = output.get("choices")
        if choices is None and "text" in output:
            return [output]
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def has_content(choice: Mapping[str, Any]) -> bool:
    """Return whether a choice contains something to read: text, reasoning, a tool call, sound. A role is no content."""
    if choice.get("text"):
        return True
    for key in ("message", "delta"):
        message = choice.get(key)
        if isinstance(message, dict):
            for field in _CONTENT:
                value = message.get(field)
                if value and not (isinstance(value, list) and all(part in ({}, {"text": ""}) for part in value)):
                    return True
    return False


def output_bytes_of(payload: object) -> int:
    """Return the length in bytes of what a chat's answer or event contains; 0 if it has no content."""
    choices = choices_of(payload) if isinstance(payload, dict) else []
    return max(sum(text_bytes(choice, _CONTENT) for choice in choices), 1) if any(map(has_content, choices)) else 0


def _output_bytes_of_any(payload: object) -> int:
    """Return the same for an event of another API. All its data is content; a text is in `delta` or in a choice."""
    delta = payload.get("delta") if isinstance(payload, dict) else None
    return len(delta.encode("utf-8", "surrogatepass")) if isinstance(delta, str) else output_bytes_of(payload) or 1


def finish_reason_of(payload: object) -> bool:
    """Return whether a choice names the reason for its end. The native dialect sends the text "null" until then."""
    return isinstance(payload, dict) and any(
        choice.get("finish_reason") not in (None, "", "null") for choice in choices_of(payload)
    )


def _minimax_failed(payload: Mapping[str, Any]) -> bool:
    if "base_resp" not in payload:
        return False
    base = payload["base_resp"]
    return isinstance(base, dict) and base.get("status_code") not in (None, 0, "0", "")


def _marks_error(payload: Mapping[str, Any]) -> bool:
    """Return whether an answer without content says that it is an error."""
    code = payload.get("code")
    response = payload.get("Response")
    return (
        bool(payload.get("error"))
        or bool(payload.get("errors"))
        or payload.get("object") == "error"
        or payload.get("type") == "error"
        or payload.get("success") is False
        or (isinstance(code, str) and code not in ("", "0", "200", "ok", "OK", "Success", "success"))
        or (isinstance(code, int) and code not in (0, 200) and ("message" in payload or "msg" in payload))
        or bool(payload.get("error_code"))
        or (isinstance(response, dict) and bool(response.get("Error")))
    )


def _is_resource(payload: Mapping[str, Any]) -> bool:
    """Return whether an answer is an object of the API: its `error` then tells of its own past, not of this call."""
    return (
        payload.get("object") not in (None, "error")
        or payload.get("id") is not None
        or payload.get("data") is not None
        or (isinstance(status := payload.get("status"), str) and status != "error")
    )


def seems_readable(body: bytes) -> bool:
    """Return whether an answer that cannot be parsed may still be one that some client can read."""
    start = body[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"{") and (b'"choices"' in body or b'"output"' in body)


#: Only events that contain one of these are parsed after the first content. `feed` searches with `find`, because `in`
#: takes three times as long on bytes.
_MARKERS = (b'"usage"', b"error", b"HTTP_STATUS/", b'"base_resp"')
#: A finish reason that is not null, so that only such events are parsed for it. The native dialect sends "null".
_FINISHED = re.compile(rb'finish_reason"\s*:\s*"(?!null")[^"]')
_NOT_FINISHED = b'finish_reason":null'
_NO_USAGE = re.compile(rb'"usage"\s*:\s*null')

#: Bytes. A longer event is not parsed. The longest useful event is a native frame with the whole text of an answer of
#: 32 k tokens; it has about half of this length.
_EVENT_LIMIT = 256 * 1024
#: The number of events of one piece that are looked at, the newest ones: more would block the event loop, and thirty
#: streams at once for a second. A usual piece has one event to a few dozen.
_MOST_AT_ONCE = 500
#: The number of events that are searched for an error in a stream that nobody asked for.
_MOST_EVENTS = 100


class StreamWatch:
    """Observes a server-sent-event stream and extracts its usage, its errors and whether it said that it has ended.

    `feed` accepts the received bytes in pieces of any size. Most pieces cost only substring searches.
    """

    def __init__(
        self,
        *,
        is_chat: bool = True,
        request_body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`request_body` is the request, whose words prove nothing in an error. `headers` are those of the answer.

        `clock` is the loop's clock, for `progress`.
        """
        self.has_content = False
        """Whether the stream has contained content. Comments, roles, empty texts and a usage are no content.

        An event that is too long to be parsed is content.
        """
        self.has_data = False
        """Whether an event with data has come, also without content."""
        self.failure: BackendError | None = None
        """The first error event, classified. Later events are ignored, because an error ends the stream."""
        self._is_chat = is_chat
        self._request_body = request_body
        self._headers = headers or {}
        self._reader = EventReader(_EVENT_LIMIT)
        self._meter = OutputMeter(clock, output_bytes_of if is_chat else _output_bytes_of_any)
        self.progress: Progress = self._meter.progress
        """The time of the newest content."""
        self._last_usage = b""
        self._ended = False
        self._is_response = False
        # Whether the last event was too long to be parsed. It may have been the one that named the end.
        self._last_was_skipped = False

    def feed(self, piece: bytes) -> None:
        """Process the next piece of the stream."""
        block = self._reader.feed(piece)
        if self._reader.skipped_data:
            self._see_skipped()
        elif block:
            self._last_was_skipped = False
        if not block:
            return
        if len(block) > _MOST_AT_ONCE:
            block = self._newest(block)
        if not self._ended and (not self._is_chat or _may_end(block)):
            self._ended = any(map(_is_end, events_in(block)))
        if self.has_content:
            self._meter.feed(block)
            if max(map(block.find, _MARKERS)) < 0:
                return
        self._see_all(block)

    def end(self) -> None:
        """Process a last event without an empty line after it. Must be called at the end of the stream.

        Raises `ServerFailed` if a stream of the Responses API has not said that it has ended.
        """
        if self._reader.open_bytes:
            self._last_was_skipped = False  # it was cut, or another event followed
        if block := self._reader.end():
            self._ended = self._ended or any(map(_is_end, events_in(block)))
            if self.has_content:
                self._meter.feed(block)
            self._see_all(block)
        if self._is_response and self.failure is None and not self.is_complete:
            raise unfinished()

    @property
    def open_bytes(self) -> int:
        """The bytes of the last event that have come, if it is not complete."""
        return self._reader.open_bytes

    @property
    def held_bytes(self) -> int:
        """The bytes of the stream that this object keeps."""
        failure = 0 if self.failure is None else len(self.failure.body)
        return self._reader.open_bytes + len(self._last_usage) + failure

    @property
    def usage(self) -> Usage | None:
        """The last usage in the stream. A native frame contains the usage so far; OpenAI sends it once, at the end."""
        return usage_of(lenient_json(self._last_usage)) if self._last_usage else None

    @property
    def is_complete(self) -> bool:
        """Whether the stream has said that it has ended: by `[DONE]` or by a finish reason."""
        return self._ended or self._last_was_skipped

    @property
    def output_bytes(self) -> float | None:
        """The estimated length of the generated text in bytes; None if the stream has contained none."""
        return self._meter.output_bytes if self.has_content else None

    def _newest(self, block: bytes) -> bytes:
        """Return at most `_MOST_AT_ONCE` events of a block. What is left out counts as content."""
        parts = block.rsplit(b"\n\n", _MOST_AT_ONCE + 1)
        if len(parts) <= _MOST_AT_ONCE + 1:
            return block
        if b"data" in parts[0]:
            self.has_data = self.has_content = True
        return b"\n\n".join(parts[1:])

    def _see_skipped(self) -> None:
        self._reader.skipped_data = False
        self._last_was_skipped = self.has_data = self.has_content = True
        self._meter.skip()

    def _see_all(self, block: bytes) -> None:
        had_content = self.has_content
        for event in events_in(block):
            self._see(event)
        if self.has_content and not had_content:
            self._meter.skip()  # also if it is only a finish reason
            self._meter.feed(block)

    def _see(self, event: Event) -> None:
        data = event.data
        if self.failure is not None or event.is_done or event.is_keepalive:
            return
        self.has_data = self.has_data or bool(data)
        said = event.name == b"error" or event.status >= 400
        if not (
            said or (data and (not self.has_content or data.find(b"error") >= 0 or data.find(b'"base_resp"') >= 0))
        ):
            self._see_usage(data)
            return
        payload = lenient_json(data)
        if said or judge(payload, is_chat=self._is_chat) == "error":
            self.failure = classify(event.status, self._headers, data, request_body=self._request_body, payload=payload)
            return
        if not self.has_content:
            if not isinstance(payload, dict):
                self.has_content = True
            elif not self._is_chat:
                self.has_content = not is_before_content(payload)
                self._is_response = self._is_response or not self.has_content
            else:
                self.has_content = finish_reason_of(payload) or any(map(has_content, choices_of(payload)))
            if self.has_content:
                self._meter.start(data, payload)
        self._see_usage(data)

    def _see_usage(self, data: bytes) -> None:
        if b'"usage"' in data and not _NO_USAGE.search(data):
            self._last_usage = data


def _may_end(block: bytes) -> bool:
    """Return whether a block may name the end of a stream. The usual block of one event is searched three times."""
    at = block.find(_NOT_FINISHED)
    if at < 0 or block.find(b"finish_reason", at + len(_NOT_FINISHED)) >= 0:
        return _FINISHED.search(block) is not None or block.find(b"[DONE]") >= 0
    return block.find(b"[DONE]") >= 0


def error_in_events(body: bytes, *, request_body: bytes) -> BackendError | None:
    """Return the first error in a stream that nobody asked for, or None.

    Only the beginning is searched: a refusal comes first, and a long answer would block the event loop.
    """
    watch = StreamWatch(request_body=request_body)
    block = EventReader(_EVENT_LIMIT).feed(body[:_EVENT_LIMIT].rstrip() + b"\n\n")
    watch.feed(b"\n\n".join(block.split(b"\n\n", _MOST_EVENTS)[:_MOST_EVENTS]) + b"\n\n")
    return watch.failure


def _is_end(event: Event) -> bool:
    data = event.data
    if event.is_done:
        return True
    if b"finish_reason" in data:
        return finish_reason_of(lenient_json(data))
    return data.find(b'"response.') >= 0 and is_end_of_response(lenient_json(data))
