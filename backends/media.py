"""The size of an image and its cost in LLM tokens, read from the header of its file. No pixels are decoded."""

from __future__ import annotations

import binascii
from functools import lru_cache
from math import ceil, floor, sqrt
from struct import Struct

#: Characters of text per LLM token, an approximation for English. For other scripts, UTF-8 bytes are closer than
#: characters. `TokenCost` corrects an estimate of the input from the reported usage.
CHARS_PER_TOKEN = 3.5

#: How many base64 characters of an image are searched for its size: first the smallest number, then more. 224: a
#: usual JPEG has its size in the first 168 bytes. 1024: most other files have it in the first few hundred bytes. 8192:
#: nearly all remaining files have EXIF data first, and the size in the first few KB.
_PREFIX_CHARS = (224, 1024, 8192)

#: Patches of one image at most: with `vl_high_resolution_images`, the provider shrinks it to this many.
_MAX_PATCHES = 16_384
#: The longer side of an image, divided by its shorter side, at most: the provider refuses any other image, so that a
#: larger number in a header is no reason to hold back the requests of others.
_MAX_ASPECT = 200

#: The start of a JPEG segment: 0xFF, its marker, and its length in bytes.
_JPEG_SEGMENT = Struct(">BBH")
#: JPEG markers that start a frame and therefore contain its size: SOF0..SOF15 without DHT (C4), JPG (C8) and DAC (CC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: JPEG markers that have no length field: TEM, RST0..RST7 and SOI.
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})


def image_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) in pixels of a JPEG, PNG, WebP or GIF; None for any other data.

    `data` may be a prefix of the file: the result is None if the prefix does not contain the size. Never raises.
    The result is the stored size. The EXIF orientation is ignored, because it can only swap width and height.
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
        elif marker in {0xDA, 0xD9}:  # image data or end of image, but no frame header before it
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
    """Return (width, height) in pixels of the image in a `data:…;base64,…` URL, or None."""
    if not url.startswith("data:"):
        return None
    start = url.find(",", 0, 256) + 1
    return None if start == 0 else base64_size(url, start)


def base64_size(text: str | memoryview, start: int = 0) -> tuple[int, int] | None:
    """Return (width, height) in pixels of the image whose base64 begins at `start`, or None.

    Decodes prefixes of increasing length, and the whole image only if no prefix contains the size.
    """
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


#: Cached, because all frames of a camera begin with the same header.
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
    """Return the number of LLM tokens that `model` counts for an image. `width` and `height` are in pixels.

    The formula is the published `smart_resize` rule (QwenLM/Qwen2.5-VL, qwen-vl-utils). It rounds each side to the
    nearest multiple of the patch size f. Then it scales the image so that its area lies between `min_pixels`
    (default 4·f²) and `max_pixels` (default 1280·f²; 16384·f² with `vl_high_resolution_images`). The image costs one
    token per f² pixels, and two tokens that mark its start and its end. The patch size f is 32 pixels for qwen3-vl and
    28 pixels for older models. A header or a bound that asks for more costs no more than an image that is accepted.
    """
    patch = 32 if model.startswith("qwen3") else 28
    width, height = min(width, height * _MAX_ASPECT), min(height, width * _MAX_ASPECT)
    smallest = min_pixels or 4 * patch * patch
    largest = _MAX_PATCHES * patch * patch if high_resolution else max_pixels or 1280 * patch * patch
    rows = max(1, round(height / patch))
    columns = max(1, round(width / patch))
    if rows * columns * patch * patch > largest:
        scale = sqrt(height * width / largest) * patch
        rows, columns = max(1, floor(height / scale)), max(1, floor(width / scale))
    elif rows * columns * patch * patch < smallest:
        scale = sqrt(smallest / (height * width)) / patch
        rows, columns = ceil(height * scale), ceil(width * scale)
    return min(rows * columns, _MAX_PATCHES) + 2
