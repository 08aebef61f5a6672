"""Parses and checks an OpenAI chat completion request for the engine. An error names the invalid field."""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from typing import Any

import orjson

from backends.base import Rejected

#: LLM tokens of the longest answer if the request sets no limit. OpenAI has no default. An answer about a frame is far
#: shorter than this.
DEFAULT_MAX_TOKENS = 512
#: Maximum number of stop sequences; the same as OpenAI's.
_MAX_STOPS = 4
#: Base64 is decoded in slices of this many characters. While a slice is decoded, the decoder holds the interpreter lock
#: and so blocks the event loop: 3 ms for a million characters.
_SLICE_CHARS = 2**20
_MAX_SEED = 2**63 - 1

#: Fields for features that this backend does not implement, each with the values that do not use the feature.
_NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "audio": (None,),
}


def invalid(message: str, field: str) -> Rejected:
    """Return the error for an invalid `field`, such as `messages[0].content`, with OpenAI's error body."""
    error = {"message": f"{field}: {message}", "type": "invalid_request_error", "code": "invalid_request"}
    body = orjson.dumps({"error": {**error, "param": field}})
    return Rejected(f"{field}: {message}", status=400, code="invalid_request", body=body)


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """The URL of an image in a request."""

    url: str
    field: str
    """The field of the request that contains the URL, for error messages."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A checked request."""

    messages: list[dict[str, Any]]
    """The messages in the format of transformers' chat templates: each content is a list of text parts and of
    `{"type": "image"}` parts."""
    images: tuple[ImageUrl, ...]
    """The images, in the order of the image parts in `messages`."""
    max_tokens: int
    temperature: float = 0
    """0 means greedy decoding: always the most likely token."""
    top_p: float = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def parse(body: bytes) -> Prompt:
    """Parse the JSON of a chat completion request. Raises `Rejected` with status 400 and the name of the field."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"not JSON ({error})", "body") from None
    if not isinstance(fields, dict):
        raise invalid("must be a JSON object", "body")
    for name, unused_values in _NOT_IMPLEMENTED.items():
        if fields.get(name) not in unused_values:
            raise invalid("is not supported by the local backend", name)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("must be a list of at least one message", "messages")
    images: list[ImageUrl] = []
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise invalid("must be an object", "stream_options")
    limit = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    return Prompt(
        messages=[_message(message, f"messages[{at}]", images) for at, message in enumerate(messages)],
        images=tuple(images),
        max_tokens=int(_number(fields, limit, 1, 2**31, DEFAULT_MAX_TOKENS, whole=True)),
        temperature=_number(fields, "temperature", 0, 2, 0),
        top_p=_number(fields, "top_p", 0, 1, 1),
        seed=None if fields.get("seed") is None else int(_number(fields, "seed", -_MAX_SEED, _MAX_SEED, 0, whole=True)),
        stop=_stop(fields.get("stop")),
        stream=fields.get("stream") is True,
        include_usage=options is not None and options.get("include_usage") is True,
    )


def _number(fields: dict[str, Any], name: str, low: int, high: int, default: int, *, whole: bool = False) -> float:
    value = fields.get(name)
    if value is None:
        return default
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise invalid(f"must be {'a whole' if whole else 'a'} number from {low} to {high}, not {value!r:.40}", name)
    return value


def _stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise invalid(f"must be a string or up to {_MAX_STOPS} of them, none empty", "stop")
    return tuple(stops)


def _message(message: object, field: str, images: list[ImageUrl]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise invalid("must be an object", field)
    role = message.get("role")
    if role not in {"system", "developer", "user", "assistant"}:
        raise invalid("must be system, developer, user or assistant", f"{field}.role")
    content = message.get("content")
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, list) and content:
        parts = [_part(part, f"{field}.content[{at}]", images) for at, part in enumerate(content)]
    else:
        raise invalid("must be a string or a list of parts", f"{field}.content")
    # `developer` is OpenAI's newer name for `system`; chat templates support only the older name.
    return {"role": "system" if role == "developer" else role, "content": parts}


def _part(part: object, field: str, images: list[ImageUrl]) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text":
        if not isinstance(part.get("text"), str):
            raise invalid("must be a string", f"{field}.text")
        return {"type": "text", "text": part["text"]}
    if isinstance(part, dict) and kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else None
        if not isinstance(url, str):
            raise invalid("must be a string", f"{field}.image_url.url")
        images.append(ImageUrl(url, f"{field}.image_url.url"))
        return {"type": "image"}
    raise invalid("must be text or image_url", f"{field}.type")


def data_url_bytes(image: ImageUrl) -> bytes:
    """Return the bytes of a `data:…;base64,…` URL. Raises `Rejected` for any other URL."""
    head, comma, data = image.url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise invalid("must be a URL such as data:image/jpeg;base64,…", image.field)
    try:
        slices = range(0, len(data), _SLICE_CHARS)
        return b"".join(binascii.a2b_base64(data[at : at + _SLICE_CHARS], strict_mode=True) for at in slices)
    except ValueError as error:
        raise invalid(f"is not base64 ({error})", image.field) from None
