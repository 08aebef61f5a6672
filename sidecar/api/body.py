"""What a caller's body says: looked at as little as will do, and never rebuilt but for a missing model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from backends.media import data_url_size, image_tokens
from sidecar.api.errors import InvalidRequest

#: Characters of text in one LLM token, for an estimate before sending: limiting.md's 3.5.
CHARS_PER_TOKEN = 3.5
#: An image whose size is not known from its header (a URL): a 1080p frame of qwen-vl by the patch rule.
UNKNOWN_IMAGE_TOKENS = 1250
#: First bytes, in base64, of images whose size we do not read but providers take: BMP, TIFF, and HEIC or AVIF boxes.
_OTHER_IMAGES = ("Qk", "SUkq", "TU0A", "AAAA")
_BASE64, _BACKSLASH = b";base64,", ord("\\")
#: Base64 characters of an image that are kept to look at, at first and if that does not do; whole groups of four.
_LOOKED_AT_CHARS = (512, 8192)


@dataclass(slots=True)
class Asked:
    """What the sidecar needs to know of a request for a model's answer."""

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


def look_at(body: bytes, read: Callable[[dict[str, Any]], Asked]) -> Asked:
    """Parse a body and `read` its object; long images are cut first, where that does.

    Raises `InvalidRequest` that names the field. What is not looked at is the provider's.
    """
    for chars in _LOOKED_AT_CHARS:
        short = _abridged(body, chars)
        if short is body:
            break
        try:
            return read(json_object(short))
        except InvalidRequest:  # an image's size may stand further on: then the whole body tells
            continue
    return read(json_object(body))


def _abridged(body: bytes, chars: int) -> bytes:
    """The same JSON with long base64 cut down to its beginning, where an image's size nearly always is.

    To parse a frame's 100 KB only to find that size costs more than anything else here. A string is left alone whose
    beginning has an escape in it, which might be cut in two, or whose end is not the next quote.
    """
    pieces: list[bytes] = []
    done = 0
    at = body.find(_BASE64)
    while at >= 0:
        end = body.find(b'"', at)
        keep = at + len(_BASE64) + chars
        if end < 0 or body[end - 1] == _BACKSLASH or body.find(b"\\", at, min(keep, end)) >= 0:
            return body
        if end > keep:
            pieces.append(body[done:keep])
            done = end
        at = body.find(_BASE64, end)
    return b"".join((*pieces, body[done:])) if pieces else body


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
    told = f"one of {len(model)}" if isinstance(model, str) else kind_of(model)
    raise InvalidRequest(f"model must be a string of 1 to 256 characters, not {told}", field="model")


def look_at_messages(
    messages: Any, where: str, asked: Asked, look_at_part: Callable[[dict[str, Any], str, Asked], None]
) -> None:
    """Walk the messages, which are alike in both dialects, down to the parts of their content, which are not."""
    if not isinstance(messages, list) or not messages:
        told = "missing" if messages is None else "an empty one" if messages == [] else kind_of(messages)
        raise InvalidRequest(f"{where} must be a list of at least one message; it is {told}", field=where)
    for index, message in enumerate(messages):
        at = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{at} must be an object, not {kind_of(message)}", field=at)
        content, at = message.get("content"), f"{at}.content"
        if isinstance(content, str):
            asked.text_chars += len(content)
        elif isinstance(content, list):
            for number, part in enumerate(content):
                if not isinstance(part, dict):
                    raise InvalidRequest(
                        f"{at}[{number}] must be an object, not {kind_of(part)}", field=f"{at}[{number}]"
                    )
                look_at_part(part, f"{at}[{number}]", asked)
        elif content is not None:  # null: an assistant's message that only calls tools
            raise InvalidRequest(f"{at} must be a string or a list of parts, not {kind_of(content)}", field=at)


def image_of(url: Any, where: str) -> tuple[int, int] | None:
    """The size of the image that a URL names, None where it cannot be told without fetching or decoding it.

    Raises `InvalidRequest` for what is no image at all.
    """
    if not isinstance(url, str) or not url:
        told = "an empty one" if url == "" else kind_of(url)
        raise InvalidRequest(f"{where} must be a string, the URL of an image, not {told}", field=where)
    if not url.startswith("data:"):
        return None
    header, comma, _ = url[:256].partition(",")
    if not comma or not header.endswith(";base64"):
        raise InvalidRequest(
            f"{where} must read data:image/jpeg;base64,<base64 of the image>: it is a data URL of another kind",
            field=where,
        )
    size = data_url_size(url)
    if size is None and not url.startswith(_OTHER_IMAGES, len(header) + 1):
        raise InvalidRequest(
            f"{where} holds no image: what follows base64, must be the base64 of a whole image file", field=where
        )
    return size


def with_model(body: bytes, asked: Asked, default: str) -> tuple[bytes, str]:
    """The body and the model it names. Where it names none, the default is put first in the object."""
    if asked.model is not None:
        return body, asked.model
    data = orjson.loads(body)
    if "model" in data:
        return orjson.dumps({**data, "model": default}), default
    start = body.index(b"{") + 1  # there are messages behind it, hence the comma
    return b'%b"model":%b,%b' % (body[:start], orjson.dumps(default), body[start:]), default


def kind_of(value: Any) -> str:
    """What JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
