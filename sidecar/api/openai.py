"""OpenAI-compatible chat completions and models. The body is looked at, never rebuilt."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from backends.images import data_url_size, image_tokens

from .call import Call
from .errors import InvalidRequest

#: The paths that OpenAI's API lies under.
BASES = ("/v1", "/compatible-mode/v1")
#: Characters of text in one LLM token, for an estimate before sending: limiting.md's 3.5.
CHARS_PER_TOKEN = 3.5
#: An image whose size is not known from its header (a URL): a 1080p frame of qwen-vl by the patch rule.
UNKNOWN_IMAGE_TOKENS = 1250
#: First bytes, in base64, of images whose size we do not read but providers take: BMP, TIFF, and HEIC or AVIF boxes.
_OTHER_IMAGES = ("Qk", "SUkq", "TU0A", "AAAA")
_BASE64 = b";base64,"
#: Base64 characters of an image that are kept to look at; whole groups of four.
_LOOKED_AT_CHARS = 8192


async def chat_completions(call: Call) -> web.StreamResponse:
    """`POST /v1/chat/completions`, streaming or not."""
    body = await call.read()
    asked = understand(body)
    model = asked.model
    if model is None:
        model = call.limits.default_model
        body = with_model(body, model)
    return await call.forward(
        "openai", "/chat/completions", body, model=model, tokens=asked.tokens(model), stream=asked.stream
    )


async def models(call: Call) -> web.StreamResponse:
    """`GET /v1/models`: the backend's own list."""
    return await call.respond(200, await call.models(), {"Content-Type": "application/json"})


@dataclass(slots=True)
class Asked:
    """What the sidecar needs to know of a chat completion's body."""

    model: str | None
    stream: bool
    text_chars: int = 0
    images: list[tuple[int, int] | None] = field(default_factory=list)
    """Width and height of each image, None where only the provider can see it."""
    high_resolution: bool = False

    def tokens(self, model: str) -> float:
        """LLM tokens of the input, by the provider's published rules."""
        total = self.text_chars / CHARS_PER_TOKEN
        for size in self.images:
            total += (
                UNKNOWN_IMAGE_TOKENS
                if size is None
                else image_tokens(*size, model, high_resolution=self.high_resolution)
            )
        return total


def understand(body: bytes) -> Asked:
    """Look at a body. Raises `InvalidRequest` that names the field. What is not looked at is the provider's."""
    short = _abridged(body)
    if short is not body:
        with contextlib.suppress(InvalidRequest):  # an image's size may stand further on: then the whole body tells
            return _understand(short)
    return _understand(body)


def _abridged(body: bytes) -> bytes:
    """The same JSON with long base64 cut down to its beginning, where an image's size nearly always is.

    To parse a frame's 100 KB only to find that size costs more than anything else here. A string with an escape in it
    is left alone: its end is not the next quote.
    """
    pieces: list[bytes] = []
    done = 0
    at = body.find(_BASE64)
    while at >= 0:
        end = body.find(b'"', at)
        if end < 0 or body.find(b"\\", at, end) >= 0:
            return body
        keep = at + len(_BASE64) + _LOOKED_AT_CHARS
        if end > keep:
            pieces.append(body[done:keep])
            done = end
        at = body.find(_BASE64, end)
    return b"".join((*pieces, body[done:])) if pieces else body


def _understand(body: bytes) -> Asked:
    data = json_object(body)
    model, stream = model_of(data), data.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest(f"stream must be true or false, not {kind_of(stream)}", field="stream")
    for name in ("max_tokens", "max_completion_tokens"):
        limit = data.get(name)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise InvalidRequest(f"{name} must be a whole number of at least 1", field=name)
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", field="messages")
    asked = Asked(model, bool(stream), high_resolution=data.get("vl_high_resolution_images") is True)
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"a message must be an object, not {kind_of(message)}", field=f"messages[{index}]")
        _look_at(message.get("content"), f"messages[{index}].content", asked)
    return asked


def json_object(body: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object. Raises `InvalidRequest`."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {kind_of(data)}")
    return data


def model_of(data: dict[str, Any]) -> str | None:
    """The model that a body names, if it names one. Raises `InvalidRequest`."""
    model = data.get("model")
    if model is None or (isinstance(model, str) and 0 < len(model) <= 256):
        return model
    raise InvalidRequest("model must be a string of 1 to 256 characters", field="model")


def _look_at(content: Any, where: str, asked: Asked) -> None:
    if isinstance(content, str):
        asked.text_chars += len(content)
        return
    if content is None:  # an assistant's message that only calls tools
        return
    if not isinstance(content, list):
        raise InvalidRequest(f"content must be a string or a list of parts, not {kind_of(content)}", field=where)
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            raise InvalidRequest(f"a part must be an object, not {kind_of(part)}", field=f"{where}[{index}]")
        if part.get("type") == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise InvalidRequest("a text part needs text, a string", field=f"{where}[{index}].text")
            asked.text_chars += len(text)
        elif part.get("type") == "image_url":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            asked.images.append(image_of(url, f"{where}[{index}].image_url.url"))


def image_of(url: Any, where: str) -> tuple[int, int] | None:
    """The size of the image that a URL names, None where it cannot be told without fetching or decoding it.

    Raises `InvalidRequest` for what is no image at all.
    """
    if not isinstance(url, str) or not url:
        raise InvalidRequest("an image_url part needs a url, a string", field=where)
    if not url.startswith("data:"):
        return None
    header, comma, _ = url[:256].partition(",")
    if not comma or not header.endswith(";base64"):
        raise InvalidRequest("a data URL must read data:image/jpeg;base64,<base64 of the image>", field=where)
    size = data_url_size(url)
    if size is None and not url.startswith(_OTHER_IMAGES, len(header) + 1):
        raise InvalidRequest(
            "the data URL holds no image: what follows base64, must be the base64 of a whole image file", field=where
        )
    return size


def with_model(body: bytes, model: str) -> bytes:
    """The same bytes with a model named, first in the object; a `"model": null` further on is taken out of the way."""
    data = orjson.loads(body)
    if "model" in data:
        return orjson.dumps({**data, "model": model})
    start = body.index(b"{") + 1  # there are messages behind it, hence the comma
    return b'%b"model":%b,%b' % (body[:start], orjson.dumps(model), body[start:])


def kind_of(value: Any) -> str:
    """What JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
