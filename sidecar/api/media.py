"""Count the media in a request, wherever they appear: chat, native generation, responses, embeddings.

What cannot be read (a URL, an unknown format) costs a stated constant, never its length in characters: a frame of 1 MB
would count as 400,000 LLM tokens.
"""

from __future__ import annotations

import binascii
import re
from typing import Any

from backends.media import base64_size, data_url_size
from backends.sound_and_film import (
    FRAMES_PER_SECOND,
    UNKNOWN_FILM_SECONDS,
    UNKNOWN_FRAME,
    UNKNOWN_SOUND_SECONDS,
    Film,
    film_of,
    sound_seconds,
)
from sidecar.api.body import ParsedBody

#: The names under which the APIs carry media. A value is a URL, base64, a list of these, or an object with `url`.
_IMAGE_NAMES = frozenset({"image", "image_url", "images"})
_FILM_NAMES = frozenset({"video", "video_url"})
_SOUND_NAMES = frozenset({"audio", "audio_url", "input_audio"})
_FILE_NAMES = frozenset({"file", "file_url", "file_data", "input_file"})
#: Bytes of a header that are read. The index of a film has its duration and size in its first few hundred bytes.
_HEADER_CHARACTERS = 8192
#: A text of this length without a space is base64 and no prose.
_BASE64 = re.compile(r"[A-Za-z0-9+/=_-]{1024}")
#: The number of values that are looked at. More would block the event loop for longer than a few milliseconds.
_MAX_VALUES = 20_000


def count_anything(value: Any, parsed: ParsedBody) -> None:
    """Add the cost of any JSON value to `parsed`: its texts, token numbers and media."""
    remaining = [value]
    for _ in range(_MAX_VALUES):
        if not remaining:
            return
        value = remaining.pop()
        if isinstance(value, str):
            _count_text(value, parsed)
        elif isinstance(value, list) and value and isinstance(value[0], int):
            parsed.other_tokens += len(value)  # an embedding of a text that is given as token numbers
        elif isinstance(value, list):
            remaining += value[:_MAX_VALUES]
        elif isinstance(value, dict):
            remaining += [entry for key, entry in value.items() if not count_media(key, entry, value, parsed)]


def count_part(part: dict[str, Any], parsed: ParsedBody) -> None:
    """Add the cost of one part of a message that is neither a text nor an image."""
    for key, value in part.items():
        count_media(key, value, part, parsed)


def count_media(name: str, value: Any, part: dict[str, Any], parsed: ParsedBody) -> bool:
    """Add the cost of a medium to `parsed`. Return False if `name` is not the name of a medium.

    `part` is the object that holds it: its `fps` says how many frames of a film the provider takes.
    """
    if name in _IMAGE_NAMES:
        for url in _urls(value):
            parsed.images.append(data_url_size(url) or (_size_of_base64(url) if _BASE64.match(url) else None))
    elif name in _FILM_NAMES:
        _count_film(value, part, parsed)
    elif name in _SOUND_NAMES:
        parsed.sound_seconds += [_seconds(url) for url in _urls(value)]
    elif name in _FILE_NAMES:
        parsed.unknown_media += len(_urls(value)) or 1
    else:
        return False
    return True


def _count_text(text: str, parsed: ParsedBody) -> None:
    """Count a string whose name says nothing about it."""
    if text.startswith("data:"):
        kind = text[5:64]
        if kind.startswith("video/"):
            parsed.films.append(film_of(_header(text)))
        elif kind.startswith("audio/"):
            parsed.sound_seconds.append(_seconds(text))
        else:
            parsed.images.append(data_url_size(text))
    elif _BASE64.match(text):
        parsed.unknown_media += 1
    else:
        parsed.text_chars += len(text)


def _count_film(value: Any, part: dict[str, Any], parsed: ParsedBody) -> None:
    urls = _urls(value)
    if isinstance(value, list):  # frames that the caller has taken from a film
        sizes = (data_url_size(url) for url in urls)
        parsed.films.append(Film(len(urls), next((size for size in sizes if size is not None), UNKNOWN_FRAME)))
        return
    given = part.get("fps")
    fits = isinstance(given, int | float) and not isinstance(given, bool) and 0 < given <= 60
    per_second = float(given) if fits and given is not None else FRAMES_PER_SECOND
    for url in urls:
        header = _header(url)
        parsed.films.append(film_of(header, per_second) if header else Film(UNKNOWN_FILM_SECONDS * per_second))


def _urls(value: Any) -> list[str]:
    """Return the URLs or base64 texts in a value: a text, an object with `url` or `data`, or a list of these."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, dict):
        found = next((value[name] for name in ("url", "data", "file_data") if isinstance(value.get(name), str)), None)
        return [found] if found else []
    return [url for entry in value for url in _urls(entry)] if isinstance(value, list) else []


def _header(url: str) -> bytes:
    """Return the first bytes of a data URL or of base64; nothing for any other URL."""
    return _decoded(url, _start_of_base64(url))


def _start_of_base64(url: str) -> int:
    if url.startswith("data:"):
        return url.find(",", 0, 256) + 1 or len(url)
    return len(url) if ":" in url[:16] else 0


def _decoded(text: str, start: int) -> bytes:
    piece = text[start : start + _HEADER_CHARACTERS]
    try:
        return binascii.a2b_base64(piece[: len(piece) // 4 * 4])
    except ValueError:
        return b""


def _seconds(url: str) -> float:
    header = _header(url)
    if not header:
        return UNKNOWN_SOUND_SECONDS
    return sound_seconds(header, (len(url) - _start_of_base64(url)) * 3 // 4)


def _size_of_base64(text: str) -> tuple[int, int] | None:
    return base64_size(text)
