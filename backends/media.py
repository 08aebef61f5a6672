"""What an image costs in LLM tokens, from its file's header alone: no pixel is decoded."""

from __future__ import annotations

import binascii
from functools import lru_cache
from math import ceil, floor, sqrt
from struct import Struct

#: Base64 characters of an image that are looked at first: a JPEG's usual header has the size in its first 168 bytes,
#: most others in the first few hundred, nearly all of the rest (behind EXIF data) in the first few KB.
_PREFIX_CHARS = (224, 1024, 8192)

#: How a JPEG segment begins: 0xFF, its marker, and its length.
_JPEG_SEGMENT = Struct(">BBH")
#: JPEG markers that open a frame and so hold its size: SOF0..SOF15 without DHT (C4), JPG (C8) and DAC (CC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: JPEG markers without a length: TEM, RST0..RST7 and SOI.
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})


def image_size(data: bytes) -> tuple[int, int] | None:
    """Give (width, height) in pixels of a JPEG, PNG, WebP or GIF; None for anything else.

    `data` may be cut off anywhere: None if the size is not in what there is. Never raises.
    The size is the stored one: an EXIF orientation, which can only swap the sides, is not looked at.
    """
    size: tuple[int, int] | None = None
    if data[:2] == b"\xff\xd8":
        size = _jpeg_size(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        size = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    elif data[:6] in {b"GIF87a", b"GIF89a"} and len(data) >= 10:
        size = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        size = _webp_size(data)
    return size if size is not None and min(size) > 0 else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data):
        lead, marker, length = _JPEG_SEGMENT.unpack_from(data, at)
        if lead != 0xFF:
            return None
        if marker == 0xFF:  # a fill byte before the marker
            at += 1
        elif marker in _JPEG_FRAMES:
            return int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
        elif marker in _JPEG_BARE:
            at += 2
        elif marker in {0xDA, 0xD9}:  # the picture itself, or its end, without a frame before it
            return None
        else:
            at += 2 + length
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Read the first chunk (RFC 9649): lossy (VP8), lossless (VP8L) or extended (VP8X)."""
    kind = data[12:16]
    if kind == b"VP8 " and len(data) >= 30 and data[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    if kind == b"VP8L" and len(data) >= 25 and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None


def data_url_size(url: str) -> tuple[int, int] | None:
    """Give the size of the image in a `data:…;base64,…` URL, or None."""
    if not url.startswith("data:"):
        return None
    start = url.find(",", 0, 256) + 1
    return None if start == 0 else base64_size(url, start)


def base64_size(text: str | memoryview, start: int = 0) -> tuple[int, int] | None:
    """Give the size of the image whose base64 begins at `start`, or None: decodes a prefix, all only if it must."""
    for chars in (*_PREFIX_CHARS, (len(text) - start) // 4 * 4):
        piece = text[start : start + chars]
        try:
            size = _known_size(piece) if len(piece) <= _PREFIX_CHARS[0] and isinstance(piece, str) else _size_in(piece)
        except ValueError:  # not base64, or not ASCII
            return None
        if size is not None or len(text) - start <= chars:
            return size
    return None


def _size_in(encoded: str | memoryview) -> tuple[int, int] | None:
    return image_size(binascii.a2b_base64(encoded))


#: A camera's frames begin alike: with their header, and their size in it.
_known_size = lru_cache(256)(_size_in)


@lru_cache(256)
def image_tokens(
    width: int,
    height: int,
    model: str,
    *,
    high_resolution: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> int:
    """Give the LLM tokens that `model` counts for an image of this size.

    The published `smart_resize` rule (QwenLM/Qwen2.5-VL, qwen-vl-utils): sides to the nearest multiple of the patch f,
    then the area scaled into `min_pixels..max_pixels` (4·f² and 1280·f² unless given, 16384·f² with
    `vl_high_resolution_images`); one token per f², and two that mark where the image begins and ends. The patch is 32
    for qwen3-vl, 28 for the models before it.
    """
    patch = 32 if model.startswith("qwen3") else 28
    smallest = min_pixels or 4 * patch * patch
    largest = 16384 * patch * patch if high_resolution else max_pixels or 1280 * patch * patch
    rows = max(1, round(height / patch))
    columns = max(1, round(width / patch))
    if rows * columns * patch * patch > largest:
        scale = sqrt(height * width / largest) * patch
        rows, columns = max(1, floor(height / scale)), max(1, floor(width / scale))
    elif rows * columns * patch * patch < smallest:
        scale = sqrt(smallest / (height * width)) / patch
        rows, columns = ceil(height * scale), ceil(width * scale)
    return rows * columns + 2
