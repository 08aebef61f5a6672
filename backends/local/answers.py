"""Answers in OpenAI's format: the whole completion, and the events of a stream."""

from __future__ import annotations

import time
import uuid
from typing import Any

import orjson

from backends.base import BackendError, Usage
from backends.local.text import FinishReason


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


class OpenAIAnswer:
    """Encodes one answer."""

    content_type = "text/event-stream"

    def __init__(self, model: str, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        # `created` is a date for humans, so the wall clock is correct here. Nothing else in this backend uses it.
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> bytes:
        """Return the body of an answer that is not streamed."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return orjson.dumps({**self._head, "object": "chat.completion", "choices": [choice], "usage": _usage(usage)})

    def first(self) -> bytes:
        """Return the first event of a stream."""
        return self._event({"role": "assistant", "content": ""}, None)

    def piece(self, text: str) -> bytes:
        """Return an event with the next text."""
        return self._event({"content": text}, None)

    def last(self, reason: FinishReason, usage: Usage) -> bytes:
        """Return the last events of a stream. As at OpenAI, they contain the usage only if the request asked for it."""
        events = self._event({}, reason)
        if self._include_usage:
            events += self._frame({"choices": [], "usage": _usage(usage)})
        return events + b"data: [DONE]\n\n"

    def failed(self, error: BackendError) -> bytes:
        """Return the event for an error after the start of the stream."""
        shape = {"message": error.message, "type": "server_error", "code": error.code or None, "param": None}
        return b"data: " + orjson.dumps({"error": shape}) + b"\n\n"

    def _event(self, delta: dict[str, str], reason: FinishReason | None) -> bytes:
        usage = {"usage": None} if self._include_usage else {}
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return self._frame({"choices": [choice], **usage})

    def _frame(self, fields: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps({**self._head, "object": "chat.completion.chunk", **fields}) + b"\n\n"
