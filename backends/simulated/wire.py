"""The wire format of a simulated provider: answers, streams and errors in OpenAI's and in DashScope's native format.

Sources of the formats, codes and messages: Model Studio's pages "OpenAI compatible - Vision", "error codes" and
"rate limit", and the official SDK (`dashscope` on the package registry), which reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal
from zlib import crc32

import orjson

from backends.base import Dialect, Usage
from backends.media import data_url_size, image_tokens

#: Characters of English text per LLM token, approximately.
CHARS_PER_TOKEN = 3.5
#: Assumed width and height in pixels of an image that the request names by a remote URL.
_REMOTE_SIZE = (1280, 720)
#: The value of `created` (OpenAI's format, Unix time) at the start of the loop's clock. It is fixed, so that answers
#: depend only on the seed and the loop's clock.
_CREATED = 1_767_225_600

_SENTENCES = (
    "A wide view of a loading yard, with two people in high-visibility vests beside a parked truck.",
    "The scene is well lit and the ground is dry.",
    "One person walks towards the camera and carries a box.",
    "Nobody is near the gate, which stands half open.",
    "A white van waits at the barrier, its lights on.",
    "Three bicycles lean against the fence on the left.",
    "Nothing in the picture points to danger.",
    "In the background a forklift moves between stacked pallets.",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """An error of the provider: its HTTP status, and its code in the native and in OpenAI's format."""

    status: int
    native_code: str
    openai_code: str
    message: str
    openai_type: str = ""
    """OpenAI's `type`, if it differs from the code."""

    def body(self, dialect: Dialect, request_id: str) -> bytes:
        """Return the JSON of the error."""
        if dialect == "native":
            return orjson.dumps({"code": self.native_code, "message": self.message, "request_id": request_id})
        error = {
            "message": self.message,
            "type": self.openai_type or self.openai_code,
            "param": None,
            "code": self.openai_code,
        }
        return orjson.dumps({"error": error, "id": f"chatcmpl-{request_id}", "request_id": request_id})


#: Every error of a simulated provider, by its cause.
FAULTS = {
    "request_rate": Fault(
        429, "Throttling.RateQuota", "limit_requests", "Requests rate limit exceeded, please try again later."
    ),
    "token_rate": Fault(
        429,
        "Throttling.AllocationQuota",
        "insufficient_quota",
        "Allocated quota exceeded, please increase your quota limit.",
    ),
    "growth": Fault(
        429,
        "Throttling.BurstRate",
        "limit_burst_rate",
        "Request rate increased too quickly. To ensure system stability, please adjust your client logic to scale "
        "requests more smoothly over time.",
    ),
    "concurrency": Fault(
        429, "Throttling", "Throttling", "Too many concurrent requests, please reduce the number of requests in flight."
    ),
    "unknown": Fault(429, "Throttling", "Throttling", "Requests throttling triggered."),
    "capacity": Fault(
        503,
        "ModelServingError",
        "ModelServingError",
        "Too many requests. Your requests are being throttled due to system capacity limits. Please try again later.",
    ),
    "billing": Fault(
        400, "Arrearage", "Arrearage", "Access denied, please make sure your account is in good standing."
    ),
    "error": Fault(
        500,
        "InternalError",
        "internal_error",
        "An internal error has occured, please try again later or contact service support.",
    ),
    "moderation": Fault(
        400, "DataInspectionFailed", "data_inspection_failed", "Input data may contain inappropriate content."
    ),
    "key": Fault(401, "InvalidApiKey", "invalid_api_key", "Incorrect API key provided.", "invalid_request_error"),
    "json": Fault(
        400,
        "InvalidParameter",
        "invalid_parameter_error",
        "The request body is not a JSON object.",
        "invalid_request_error",
    ),
    "model": Fault(
        400, "InvalidParameter", "invalid_parameter_error", "You must provide a model.", "invalid_request_error"
    ),
    "messages": Fault(
        400,
        "InvalidParameter",
        "invalid_parameter_error",
        "Required parameter(messages) missing or invalid.",
        "invalid_request_error",
    ),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """The parts of a request's body that the provider uses."""

    model: str
    text_tokens: int
    image_tokens: int
    max_tokens: int | None
    stream: bool
    """Whether the body requests a stream, as in OpenAI's API. In DashScope's native API a header requests it."""
    include_usage: bool
    """Whether the caller wants the usage at the end of an OpenAI stream."""
    incremental: bool
    """Whether a frame of a native stream contains only the new text. Otherwise it contains the whole text so far."""
    fixed_output_tokens: int | None
    """From `simulate.output_tokens` in the body."""
    echo: bool
    """From `simulate.echo` in the body: whether the answer reports the received request."""

    @property
    def input_tokens(self) -> int:
        """LLM tokens of the input: text and images."""
        return self.text_tokens + self.image_tokens

    def output_tokens(self, default: int) -> int:
        """Return the LLM tokens of the answer. `default` applies if the body does not fix their number."""
        wanted = self.fixed_output_tokens or default
        return wanted if self.max_tokens is None else min(wanted, self.max_tokens)


def _dict_or_empty(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count_of(value: object) -> int | None:
    """Return `value` if it is an integer above 0, else None: the provider ignores invalid values."""
    return value if isinstance(value, int) and value > 0 else None


def read_prompt(body: bytes, dialect: Dialect, model: str) -> Prompt | Fault:
    """Parse a body, or return the error that the provider would send for it.

    `model` is the default if the body names no model. In a body,
    `{"simulate": {"input_tokens": 1800, "output_tokens": 40, "echo": true}}` overrides the counted LLM tokens.
    """
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return FAULTS["json"]
    if not isinstance(data, dict):
        return FAULTS["json"]
    model = data.get("model", model)
    if not isinstance(model, str) or not model:
        return FAULTS["model"]
    native = dialect == "native"
    asked = _dict_or_empty(data.get("parameters")) if native else data
    messages = (_dict_or_empty(data.get("input")) if native else data).get("messages")
    if not isinstance(messages, list) or not messages:
        return FAULTS["messages"]
    simulate = _dict_or_empty(data.get("simulate"))
    if (fixed := _count_of(simulate.get("input_tokens"))) is not None:
        text, images = fixed, 0
    else:
        text, images = _count(messages, model, bool(asked.get("vl_high_resolution_images")))
    return Prompt(
        model=model,
        text_tokens=text,
        image_tokens=images,
        max_tokens=_count_of(asked.get("max_tokens", asked.get("max_completion_tokens"))),
        stream=bool(asked.get("stream")),
        include_usage=bool(_dict_or_empty(asked.get("stream_options")).get("include_usage")),
        incremental=bool(asked.get("incremental_output")),
        fixed_output_tokens=_count_of(simulate.get("output_tokens")),
        echo=bool(simulate.get("echo")),
    )


def _count(messages: list[Any], model: str, high_resolution: bool) -> tuple[int, int]:
    """Return the LLM tokens of all texts and of all images in the messages. Both dialects are supported."""
    chars = images = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in map(_dict_or_empty, content if isinstance(content, list) else [{"text": content}]):
            if isinstance(text := part.get("text"), str):
                chars += len(text)
            image = part.get("image") or part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if isinstance(url, str):
                width, height = data_url_size(url) or _REMOTE_SIZE
                images += image_tokens(
                    width,
                    height,
                    model,
                    high_resolution=high_resolution,
                    min_pixels=_count_of(part.get("min_pixels")),
                    max_pixels=_count_of(part.get("max_pixels")),
                )
    return max(1, round(chars / CHARS_PER_TOKEN)), images


@lru_cache(maxsize=256)
def _description(first: int, tokens: int) -> str:
    chars = int(tokens * CHARS_PER_TOKEN)
    text = _SENTENCES[first]
    while len(text) < chars:
        first = (first + 1) % len(_SENTENCES)
        text += " " + _SENTENCES[first]
    return text[:chars].rstrip() or text[:1]


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer. It can be sent at once or piece by piece."""

    dialect: Dialect
    prompt: Prompt
    request_id: str
    text: str
    output_tokens: int
    finish_reason: Literal["stop", "length"]
    created: int
    extra: dict[str, object]
    """Fields that are added to the JSON: the echo."""

    @property
    def usage(self) -> Usage:
        """The LLM tokens of the request and the answer."""
        return Usage(self.prompt.input_tokens, self.output_tokens)

    def body(self) -> bytes:
        """Return the JSON of the whole answer."""
        if self.dialect == "native":
            return orjson.dumps(self._native(self.text, self.finish_reason, self.output_tokens))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.text},
            "finish_reason": self.finish_reason,
            "logprobs": None,
        }
        return orjson.dumps(
            {
                "id": f"chatcmpl-{self.request_id}",
                "object": "chat.completion",
                "created": self.created,
                "model": self.prompt.model,
                "system_fingerprint": None,
                "choices": [choice],
                "usage": self._openai_usage(),
                **self.extra,
            }
        )

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Yield the frames of the stream, each with the number of LLM tokens that have been sent by its end."""
        return self._native_frames() if self.dialect == "native" else self._openai_frames()

    def _pieces(self) -> Iterator[tuple[int, str]]:
        """Split the text into pieces of a few LLM tokens. Yield (LLM tokens up to the end of the piece, piece)."""
        step = int(4 * CHARS_PER_TOKEN)
        for end in range(step, len(self.text) + step, step):
            yield min(self.output_tokens, round(end / CHARS_PER_TOKEN)), self.text[end - step : end]

    def _openai_frames(self) -> Iterator[tuple[int, bytes]]:
        yield 0, self._chunk({"content": "", "role": "assistant"}, None)
        for tokens, piece in self._pieces():
            yield tokens, self._chunk({"content": piece}, None)
        yield self.output_tokens, self._chunk({"content": ""}, self.finish_reason)
        if self.prompt.include_usage:
            yield self.output_tokens, self._chunk(None, None)
        yield self.output_tokens, b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str] | None, finish_reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        chunk = {
            "id": f"chatcmpl-{self.request_id}",
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.prompt.model,
            "system_fingerprint": None,
            "choices": [] if delta is None else [choice],
            "usage": self._openai_usage() if delta is None else None,
            **self.extra,
        }
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def _openai_usage(self) -> dict[str, object]:
        prompt = self.prompt
        return {
            "prompt_tokens": prompt.input_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": prompt.input_tokens + self.output_tokens,
            "prompt_tokens_details": {"text_tokens": prompt.text_tokens, "image_tokens": prompt.image_tokens},
            "completion_tokens_details": {"text_tokens": self.output_tokens},
        }

    def _native_frames(self) -> Iterator[tuple[int, bytes]]:
        number, so_far = 0, ""
        for number, (tokens, piece) in enumerate(self._pieces(), start=1):
            so_far += piece
            text = piece if self.prompt.incremental else so_far
            yield tokens, native_frame(number, 200, orjson.dumps(self._native(text, "null", tokens)))
        last = self._native("" if self.prompt.incremental else so_far, self.finish_reason, self.output_tokens)
        yield self.output_tokens, native_frame(number + 1, 200, orjson.dumps(last))

    def _native(self, text: str, finish_reason: str, output_tokens: int) -> dict[str, object]:
        prompt = self.prompt
        content = [{"text": text}] if text else []
        choice = {"finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}
        return {
            "output": {"choices": [choice]},
            "usage": {
                "input_tokens": prompt.input_tokens,
                "output_tokens": output_tokens,
                "total_tokens": prompt.input_tokens + output_tokens,
                "image_tokens": prompt.image_tokens,
                "input_tokens_details": {"text_tokens": prompt.text_tokens, "image_tokens": prompt.image_tokens},
                "output_tokens_details": {"text_tokens": output_tokens},
            },
            "request_id": self.request_id,
            **self.extra,
        }


def make_answer(
    prompt: Prompt,
    dialect: Dialect,
    body: bytes,
    output_tokens: int,
    *,
    request_id: str,
    seconds: float,
    extra: dict[str, object],
) -> Answer:
    """Return an invented answer of `output_tokens` LLM tokens. The same body always gets the same words.

    `seconds` is the time since the start of the provider.
    """
    return Answer(
        dialect=dialect,
        prompt=prompt,
        request_id=request_id,
        text=_description(crc32(body) % len(_SENTENCES), output_tokens),
        output_tokens=output_tokens,
        finish_reason="length" if output_tokens == prompt.max_tokens else "stop",
        created=_CREATED + int(seconds),
        extra=extra,
    )


def native_frame(number: int, status: int, data: bytes) -> bytes:
    """Return one server-sent event in the format of DashScope's native API."""
    event = b"result" if status == 200 else b"error"
    return b"id:%d\nevent:%b\n:HTTP_STATUS/%d\ndata:%b\n\n" % (number, event, status, data)


def error_frame(fault: Fault, dialect: Dialect, request_id: str) -> bytes:
    """Return the frame of an error inside a stream that started with status 200."""
    body = fault.body(dialect, request_id)
    return native_frame(1, fault.status, body) if dialect == "native" else b"data: " + body + b"\n\n"
