"""Count the media in a request, wherever they appear: chat, native generation, responses, embeddings.

What cannot be read (a URL, an unknown format) costs a stated constant, never its length in characters: a frame of 1 MB
would count as 400,000 LLM tokens.
"""

from __future__ import annotations

import binascii
import re
from itertools import islice
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
#: The names of a URL, or of base64, in an object that holds a medium.
_URL_NAMES = ("url", "data", "file_data")
#: Bytes of a header that are read. The index of a film has its duration and size in its first few hundred bytes.
_HEADER_CHARACTERS = 8192
#: A text of this length without a space is base64 and no prose.
_BASE64 = re.compile(r"[A-Za-z0-9+/=_-]{1024}")
#: The number of frames of a film that are searched for their size: all frames of a film have the same.
_SIZED_FRAMES = 8


def count_anything(value: Any, parsed: ParsedBody) -> None:
    """Add the cost of any JSON value to `parsed`: its texts, token numbers and media."""
    remaining = [value]
    while remaining and parsed.values_left > 0:
        parsed.values_left -= 1
        value = remaining.pop()
        if isinstance(value, str):
            _count_text(value, parsed)
        elif isinstance(value, list) and value and isinstance(value[0], int):
            parsed.other_tokens += len(value)  # an embedding of a text that is given as token numbers
        elif isinstance(value, list):
            remaining += value[: parsed.values_left]
        elif isinstance(value, dict):
            entries = islice(value.items(), parsed.values_left)
            remaining += [entry for key, entry in entries if not count_media(key, entry, value, parsed)]


def count_part(part: dict[str, Any], parsed: ParsedBody) -> None:
    """Add the cost of one part of a message that is neither a text nor an image."""
    for key, value in part.items():
        if parsed.values_left <= 0:
            return
        parsed.values_left -= 1
        count_media(key, value, part, parsed)


def count_media(name: str, value: Any, part: dict[str, Any], parsed: ParsedBody) -> bool:
    """Add the cost of a medium to `parsed`. Return False if `name` is not the name of a medium.

    `part` is the object that holds it: its `fps` says how many frames of a film the provider takes.
    """
    if name in _IMAGE_NAMES:
        for url in _urls(value, parsed):
            if not parsed.takes_medium():
                continue
            parsed.images.append(data_url_size(url) or (_size_of_base64(url) if _BASE64.match(url) else None))
    elif name in _FILM_NAMES:
        _count_film(value, part, parsed)
    elif name in _SOUND_NAMES:
        parsed.sound_seconds += [_seconds(url) for url in _urls(value, parsed) if parsed.takes_medium()]
    elif name in _FILE_NAMES:
        parsed.unknown_media += len(_urls(value, parsed)) or 1
    else:
        return False
    return True


def _count_text(text: str, parsed: ParsedBody) -> None:
    """Count a string whose name says nothing about it."""
    if text.startswith("data:"):
        if not parsed.takes_medium():
            return
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
    urls = _urls(value, parsed)
    if isinstance(value, list):  # frames that the caller has taken from a film
        if not parsed.takes_medium():
            return
        sizes = (data_url_size(url) for url in urls[:_SIZED_FRAMES])
        parsed.films.append(Film(len(urls), next((size for size in sizes if size is not None), UNKNOWN_FRAME)))
        return
    given = part.get("fps")
    fits = isinstance(given, int | float) and not isinstance(given, bool) and 0 < given <= 60
    per_second = float(given) if fits and given is not None else FRAMES_PER_SECOND
    for url in urls:
        if not parsed.takes_medium():
            continue
        header = _header(url)
        parsed.films.append(film_of(header, per_second) if header else Film(UNKNOWN_FILM_SECONDS * per_second))


def _urls(value: Any, parsed: ParsedBody) -> list[str]:
    """Return the URLs or base64 texts in a value: a text, an object with `url` or `data`, or a list of these.

    The values in lists are taken from those that may still be looked at. The order of the URLs is that of the value.
    """
    if isinstance(value, str):  # the usual case
        return [value] if value else []
    urls = []
    remaining = [value]
    while remaining:
        value = remaining.pop()
        if isinstance(value, list):
            taken = value[: max(parsed.values_left, 0)]
            parsed.values_left -= len(taken)
            taken.reverse()
            remaining += taken
            continue
        if isinstance(value, dict):
            value = next((value[name] for name in _URL_NAMES if isinstance(value.get(name), str)), None)
        if value and isinstance(value, str):
            urls.append(value)
    return urls


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
