"""Parse and validate the requests of trio-core's inference API, with FastAPI's 422 bodies but without FastAPI.

The field names, defaults and bounds are those of trio-core 1.1.5. pydantic (already installed for the settings) creates
the error entries, as in FastAPI, so they are the same. `tests/parity/` compares them with trio-core's own answers.

Most bytes of a request are the frame, so the frame is not parsed as JSON. Its base64 text is found in the body's bytes,
checked, and returned as a view of these bytes. Only the rest, a few hundred bytes, is parsed as JSON.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import re
from email.message import Message
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from sidecar.admission import NO_MODEL
from sidecar.api.body import refuse_too_many_values
from sidecar.api.errors import InvalidRequest

#: A JSON object. Its values are `Any`, because only the provider interprets them.
JsonObject = dict[str, Any]


def _not_reserved(model: str) -> str:
    """Refuse the one name that callers cannot use."""
    if model == NO_MODEL:
        raise PydanticCustomError("reserved", "this name is reserved")
    return model


_Image = Annotated[str, Field(max_length=14_000_000)]
_MaxTokens = Annotated[int, Field(ge=1, le=16384)]
_ModelName = Annotated[str, Field(max_length=128), AfterValidator(_not_reserved)]


class DescribeRequest(BaseModel):
    """Body of `POST /api/inference/describe`. `image_b64` holds a placeholder, not the image: see `parse_request`."""

    image_b64: _Image
    prompt: Annotated[str, Field(max_length=4096)] = (
        "Say what this camera frame shows: people with their apparent age, sex and clothes, vehicles with their kind, "
        "make and colour, animals, and what is going on."
    )
    response_format: JsonObject | None = None
    max_tokens: _MaxTokens | None = None
    model: _ModelName | None = None
    extra_body: JsonObject | None = None


class CropDescribeRequest(BaseModel):
    """Body of `POST /api/inference/crop-describe`. `image_b64` holds a placeholder: see `parse_request`."""

    # The fields are in trio-core's order, because a 422 lists its entries in this order. A base class would change it.
    image_b64: _Image
    crops: Annotated[list[JsonObject], Field(max_length=50)] = []
    max_crops: Annotated[int, Field(ge=0, le=20)] = 3
    scene_prompt: Annotated[str, Field(max_length=32768)] = ""
    response_format: JsonObject | None = None
    model: _ModelName | None = None
    max_tokens: _MaxTokens | None = None
    extra_body: JsonObject | None = None


class DetectRequest(BaseModel):
    """Body of `POST /api/inference/detect`. `image_b64` holds a placeholder: see `parse_request`."""

    image_b64: _Image
    pad_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.15


_RequestT = TypeVar("_RequestT", DescribeRequest, CropDescribeRequest, DetectRequest)

#: Replaces the image in the JSON that is parsed. It is random, so no caller can send it.
_PLACEHOLDER = f"image stands elsewhere {os.urandom(8).hex()}"
_IMAGE_KEY = re.compile(rb'"image_b64"[ \t\r\n]*:[ \t\r\n]*"')
_BASE64_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
#: Bytes. Base64 is checked in pieces of this size, so that checking 14 MB in a thread never holds the GIL for long.
_PIECE_BYTES = 1 << 18
#: Bytes of a body that are checked in the event loop, without its image and with it: at most 2 ms. 1 MB of fields can
#: take 200 ms.
_LOOP_BYTES, _LOOP_BYTES_WITH_IMAGE = 64 * 1024, 256 * 1024
#: Characters. A 422 repeats the caller's input, as in FastAPI, but longer texts are cut.
_ECHO_CHARACTERS = 8192


def parse_request(kind: type[_RequestT], body: bytes, content_type: str) -> tuple[_RequestT, memoryview]:
    """Parse and validate a request. Return it, and its image as canonical base64 text.

    If the base64 has no line breaks and no escapes, as from every usual client, the returned text is a view of `body`.
    This takes about 0.1 ms for a frame of 100 kB and 10 ms for a frame of 10 MB.
    Raises `InvalidRequest`: 422 with FastAPI's entries, or 400 for a body or an image that cannot be decoded.
    """
    if not body:
        raise _unprocessable(_entry("missing", ["body"], "Field required", None))
    if not _is_json(content_type):
        sent: Any = _text(body)
        return _validated(kind, sent), memoryview(b"")
    image = _find_image(body)
    if image is not None:
        document = _parse(bytes(body[: image.start]) + _PLACEHOLDER.encode() + body[image.stop :], body)
        # This check fails if the key was found in another object or at the end of a longer name, or if it occurs twice.
        # Then the whole body is parsed below.
        if isinstance(document, dict) and document.get("image_b64") == _PLACEHOLDER:
            return _validated(kind, document), memoryview(body)[image.start : image.stop]
    request = _validated(kind, _parse(body, body))
    return request, memoryview(_canonical_base64(request.image_b64))


def is_quick(body: bytes) -> bool:
    """Return whether `parse_request` can check a body in the event loop."""
    if len(body) <= _LOOP_BYTES or len(body) > _LOOP_BYTES_WITH_IMAGE:
        return len(body) <= _LOOP_BYTES
    key = _IMAGE_KEY.search(body)
    return key is not None and len(body) - (body.find(b'"', key.end()) - key.end()) <= _LOOP_BYTES


def _find_image(body: bytes) -> slice | None:
    """Return the position of the image's text in `body`. Return None if the whole body must be parsed.

    None means that the text was not found, is not canonical base64, or is longer than the bound.
    """
    key = _IMAGE_KEY.search(body)
    if key is None:
        return None
    start, stop = key.end(), body.find(b'"', key.end())
    if not 0 < stop - start <= 14_000_000 or (stop - start) % 4:
        return None
    data_stop = stop - 2 if body[stop - 2 : stop] == b"==" else stop - 1 if body[stop - 1 : stop] == b"=" else stop
    for piece in range(start, data_stop, _PIECE_BYTES):
        if body[piece : min(piece + _PIECE_BYTES, data_stop)].translate(None, _BASE64_ALPHABET):
            return None
    return slice(start, stop)


def _parse(text: bytes, body: bytes) -> Any:
    """Parse JSON with the standard library, as FastAPI does. The position in an error refers to `body`."""
    refuse_too_many_values(text)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text is not body:
            return _parse(body, body)
        entry = _entry("json_invalid", ["body", error.pos], "JSON decode error", {}) | {"ctx": {"error": error.msg}}
        raise _unprocessable(entry) from None
    except (ValueError, RecursionError):  # not UTF-8, a number of more than 4300 digits, or too deep
        raise InvalidRequest("There was an error parsing the body") from None


def _validated(kind: type[_RequestT], document: Any) -> _RequestT:
    try:
        # FastAPI also sets `from_attributes`. It determines the error message for a body that is not an object.
        return kind.model_validate(document, from_attributes=True)
    except ValidationError as error:
        raise _unprocessable(*(_entry_of(item) for item in error.errors(include_url=False))) from None


def _entry_of(item: ErrorDetails) -> JsonObject:
    entry = _entry(item["type"], ["body", *item["loc"]], item["msg"], _echo(item["input"]))
    return entry | {"ctx": item["ctx"]} if "ctx" in item else entry


def _canonical_base64(text: str) -> bytes:
    """Return the base64 without line breaks and other characters outside the alphabet, which trio-core also skips."""
    try:
        return base64.b64encode(binascii.a2b_base64(text))
    except ValueError as error:  # includes binascii.Error, and the error for text that is not ASCII
        raise InvalidRequest(f"Invalid image data: image_b64 is not base64: {error}", field="image_b64") from None


def _unprocessable(*entries: JsonObject) -> InvalidRequest:
    return InvalidRequest("the body does not validate", status=422, detail=list(entries))


def _entry(kind: str, location: list[str | int], message: str, sent: Any) -> JsonObject:
    return {"type": kind, "loc": location, "msg": message, "input": sent}


def _echo(sent: Any) -> Any:
    """Return the caller's input for an answer: cut long texts (a frame), and replace NaN and infinity by None."""
    if isinstance(sent, str):
        cut = sent if len(sent) <= _ECHO_CHARACTERS else f"{sent[:64]}… ({len(sent)} characters)"
        return cut.encode(errors="replace").decode()
    if isinstance(sent, float):
        return sent if math.isfinite(sent) else None
    if isinstance(sent, list):
        return [_echo(value) for value in sent]
    if isinstance(sent, dict):
        return {key: _echo(value) for key, value in sent.items()}
    return sent


def _is_json(content_type: str) -> bool:
    """Return whether FastAPI parses a body with this Content-Type as JSON. An empty header means no."""
    if not content_type:
        return False
    header = Message()
    header["content-type"] = content_type
    subtype = header.get_content_subtype()
    return header.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _text(body: bytes) -> str:
    return body.decode(errors="replace")
