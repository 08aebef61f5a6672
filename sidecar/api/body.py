"""Read the fields of a request body that the sidecar needs. Add a missing model; change nothing else in the body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from backends.json_values import MAX_VALUES, has_too_many_values
from backends.media import CHARS_PER_TOKEN, data_url_size, image_tokens
from backends.sound_and_film import Film, film_tokens, sound_tokens
from sidecar.admission import NO_MODEL
from sidecar.api.errors import InvalidRequest

#: LLM tokens of an image whose size cannot be read from its header (for example, an image given by a URL).
#: The value is the cost of a 1080p frame for qwen-vl by the patch rule.
UNKNOWN_IMAGE_TOKENS = 1250
#: LLM tokens of a medium of unknown kind, such as a document. The value is that of an unknown image: one page.
UNKNOWN_MEDIUM_TOKENS = 1250
#: LLM tokens of one request at most: the longest context of the provider's vision and text models. A longer request is
#: refused, and counting more would let one body hold back the requests of all others.
MAX_REQUEST_TOKENS = 1_000_000
#: First characters, in base64, of image formats that providers accept but whose size we do not read:
#: BMP, TIFF (two byte orders), the boxes of HEIC, AVIF and JPEG 2000, JPEG 2000 without boxes, and PBM, PGM and PPM
#: (`P1` to `P6`).
_OTHER_IMAGES = ("Qk", "SUkq", "TU0A", "AAAA", "/0//UQ", "UDE", "UDI", "UDM", "UDQ", "UDU", "UDY")
_BASE64, _BACKSLASH = b";base64,", ord("\\")
#: Base64 characters that are kept of each image: in the first pass, and in the second pass if the first pass fails.
#: Both are multiples of four, because four base64 characters encode three whole bytes.
_KEPT_IMAGE_CHARS = (512, 8192)
#: The number of values of one body that are looked at: its messages, their parts, and what is in these. More would
#: block the event loop for longer than a few milliseconds. The rest costs nothing.
_MAX_VALUES = 20_000
#: Bytes of a body, without its images, that are parsed in the event loop: at most 1 ms (256 kB would take 8 ms), so
#: that many such bodies delay nobody for long. A larger one is parsed in a thread. The same for a body with its images:
#: an image can prove to be none, and then the whole body is parsed.
_LOOP_BYTES, _LOOP_BYTES_WITH_IMAGES = 64 * 1024, 4 * 1024 * 1024
#: Characters of the longest name of a model.
_MAX_MODEL_CHARS = 256
#: The number of media of one body whose headers are read. Each further one costs `UNKNOWN_MEDIUM_TOKENS`.
_MAX_MEDIA = 1000


@dataclass(slots=True)
class ParsedBody:
    """The fields of a request body that the sidecar needs."""

    model: str | None
    stream: bool
    model_is_null: bool = False
    """Whether the body has the key `model` with the value null."""
    text_chars: int = 0
    images: list[tuple[int, int] | None] = field(default_factory=list)
    """Width and height of each image in pixels. None if only the provider can read the image."""
    high_resolution: bool = False
    image_bounds: dict[int, tuple[int | None, int | None]] = field(default_factory=dict)
    """`min_pixels` and `max_pixels` of an image whose part gives them, by the image's place in `images`."""
    films: list[Film] = field(default_factory=list)
    sound_seconds: list[float] = field(default_factory=list)
    unknown_media: int = 0
    other_tokens: float = 0.0
    """LLM tokens that the caller gives as numbers."""
    values_left: int = _MAX_VALUES
    """The number of values that may still be looked at."""
    media_left: int = _MAX_MEDIA
    """The number of media whose headers may still be read."""

    def tokens(self, model: str) -> float:
        """Estimate the LLM tokens of the input by the provider's published rules."""
        total = self.text_chars / CHARS_PER_TOKEN + self.other_tokens + self.unknown_media * UNKNOWN_MEDIUM_TOKENS
        for at, size in enumerate(self.images):
            if size is None:
                total += UNKNOWN_IMAGE_TOKENS
                continue
            least, most = self.image_bounds.get(at, (None, None))
            total += image_tokens(*size, model, high_resolution=self.high_resolution, min_pixels=least, max_pixels=most)
        total += sum(film_tokens(film, model) for film in self.films)
        return min(total + sum(map(sound_tokens, self.sound_seconds)), MAX_REQUEST_TOKENS)

    def takes_medium(self) -> bool:
        """Return whether the header of one more medium may be read. If not, count the medium at a constant cost."""
        if self.media_left <= 0:
            self.unknown_media += 1
            return False
        self.media_left -= 1
        return True

    def add_image(self, size: tuple[int, int] | None, part: dict[str, Any]) -> None:
        """Add an image. Its part may bound the number of pixels that the provider reads."""
        if not self.takes_medium():
            return
        least, most = _pixels(part.get("min_pixels")), _pixels(part.get("max_pixels"))
        if least or most:
            self.image_bounds[len(self.images)] = (least, most)
        self.images.append(size)


def _pixels(value: Any) -> int | None:
    """Return a bound of pixels that a part gives, or None if it gives none that could be one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 30 else None


def parse_body(body: bytes, read: Callable[[dict[str, Any]], ParsedBody]) -> ParsedBody:
    """Parse a body as JSON and return the result of `read` for its object.

    Long images are shortened before parsing, because that is much faster. If `read` then fails, the next pass keeps
    more of each image, and the last pass parses the whole body.
    Raises `InvalidRequest` that names the field. Fields that `read` ignores are left for the provider to check.
    """
    for chars in _KEPT_IMAGE_CHARS:
        short = _shorten_images(body, chars)
        if short is body:
            break
        try:
            return read(json_object(short))
        except InvalidRequest:  # the size of an image may be after the kept part: the next pass keeps more
            continue
    return read(json_object(body))


def is_quick(body: bytes) -> bool:
    """Return whether a body can be parsed in the event loop."""
    if len(body) <= _LOOP_BYTES:
        return True
    return len(body) <= _LOOP_BYTES_WITH_IMAGES and len(_shorten_images(body, _KEPT_IMAGE_CHARS[0])) <= _LOOP_BYTES


def _shorten_images(body: bytes, chars: int) -> bytes:
    """Return the same JSON with each long base64 text cut to its first `chars` characters.

    The size of an image is almost always in this first part. Parsing the 100 KB of a frame only to find the size costs
    more than all other work in this file. The body is returned unchanged if the first quote after `;base64,` is escaped
    and does not end the string, or if the kept part contains an escape, which the cut could split.
    """
    pieces: list[bytes] = []
    done = looked_at = 0
    at = body.find(_BASE64)
    while at >= 0 and looked_at < _MAX_MEDIA:
        looked_at += 1
        end = body.find(b'"', at)
        # The duration of a sound follows from its length, so a sound is not cut.
        keep = at + len(_BASE64) + (len(body) if _may_be_sound(body, at) else chars)
        if end < 0 or body[end - 1] == _BACKSLASH or body.find(b"\\", at, min(keep, end)) >= 0:
            return body
        if end > keep:
            pieces.append(body[done:keep])
            done = end
        at = body.find(_BASE64, end)
    return b"".join((*pieces, body[done:])) if pieces else body


def _may_be_sound(body: bytes, at: int) -> bool:
    """Return whether the base64 behind `at` may be a sound: its data URL says so, or names no type."""
    start = body.rfind(b"data:", max(at - 64, 0), at)
    return start >= 0 and (start + 5 == at or body.startswith(b"audio", start + 5))


def refuse_too_many_values(body: bytes) -> None:
    """Raise `InvalidRequest` if parsing the body could take very much memory."""
    if has_too_many_values(body):
        raise InvalidRequest(
            f"the body has more than {MAX_VALUES} JSON values (objects, lists, texts, numbers): send fewer at once"
        )


def json_object(body: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object. Raises `InvalidRequest`."""
    refuse_too_many_values(body)
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {json_type(data)}")
    return data


def model_of(data: dict[str, Any]) -> str | None:
    """Return the model that a body names, or None. Raises `InvalidRequest`."""
    model: Any = data.get("model")
    if model is None or is_model_name(model):
        return cast("str | None", model)
    actual = f"one of {len(model)}" if isinstance(model, str) else json_type(model)
    raise InvalidRequest(f"model must be a string of 1 to {_MAX_MODEL_CHARS} characters, not {actual}", field="model")


def is_model_name(value: Any) -> bool:
    """Return whether a value can be the name of a model. Everything that is learned is kept under this name."""
    return isinstance(value, str) and 0 < len(value) <= _MAX_MODEL_CHARS and value != NO_MODEL


def parse_messages(
    messages: Any, where: str, parsed: ParsedBody, parse_part: Callable[[dict[str, Any], str, ParsedBody], None]
) -> None:
    """Check the messages and call `parse_part` for each part of their content.

    The messages have the same structure in both dialects (OpenAI and native). The parts do not.
    Raises `InvalidRequest` that names the field.
    """
    if not isinstance(messages, list) or not messages:
        actual = "missing" if messages is None else "an empty one" if messages == [] else json_type(messages)
        raise InvalidRequest(f"{where} must be a list of at least one message; it is {actual}", field=where)
    for index, message in enumerate(messages):
        parsed.values_left -= 1
        if parsed.values_left < 0:
            return
        at = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{at} must be an object, not {json_type(message)}", field=at)
        content, at = message.get("content"), f"{at}.content"
        if isinstance(content, str):
            parsed.text_chars += len(content)
        elif isinstance(content, list):
            for number, part in enumerate(content):
                parsed.values_left -= 1
                if parsed.values_left < 0:
                    return
                if isinstance(part, dict):
                    parse_part(part, f"{at}[{number}]", parsed)
                elif isinstance(part, str):  # the provider decides whether a plain string is a part
                    parsed.text_chars += len(part)
        elif content is not None:  # null: an assistant's message that only calls tools
            raise InvalidRequest(f"{at} must be a string or a list of parts, not {json_type(content)}", field=at)


def image_size(url: Any, where: str) -> tuple[int, int] | None:
    """Return the width and height in pixels of the image at `url`.

    Return None if reading the size would require fetching or decoding the image.
    Raises `InvalidRequest` if the URL is not the URL of an image.
    """
    if not isinstance(url, str) or not url:
        actual = "an empty one" if url == "" else json_type(url)
        raise InvalidRequest(f"{where} must be a string, the URL of an image, not {actual}", field=where)
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


def with_model(body: bytes, default: str, *, instead_of_null: bool) -> tuple[bytes, str]:
    """Return a body that names no model with the default first in the JSON object, and the default."""
    if instead_of_null:
        return orjson.dumps({**orjson.loads(body), "model": default}), default
    start = body.index(b"{") + 1  # the comma after the model is correct, because the object also has messages
    return b'%b"model":%b,%b' % (body[:start], orjson.dumps(default), body[start:]), default


def json_type(value: Any) -> str:
    """Return the JSON name of a value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
