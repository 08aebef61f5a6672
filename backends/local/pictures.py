"""Turns the bytes of an image into pixels, within bounds. Runs in the engine thread."""

from __future__ import annotations

from io import BytesIO

import PIL.Image
import PIL.ImageOps

from backends.local.prompts import invalid

#: Pixels of one request's images together, looked up in the headers before anything is decoded: an 8K frame has 33
#: million. Decoded they take 3 bytes each, for every row of a batch.
MAX_PIXELS = 40_000_000

#: What cameras and browsers send. PIL knows forty formats more, which only a hostile caller would use.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def decode(images: list[tuple[bytes, str]]) -> list[PIL.Image.Image]:
    """Decode (bytes, field) pairs to RGB, upright, in order. Raises `Rejected` with the field of the one at fault."""
    opened = []
    pixels = 0
    for data, field in images:
        try:
            picture = PIL.Image.open(BytesIO(data), formats=_FORMATS)  # reads the header only
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
            raise invalid(f"is not an image this backend knows ({', '.join(_FORMATS)})", field) from None
        pixels += picture.width * picture.height
        if pixels > MAX_PIXELS:
            size = f"{picture.width} x {picture.height}"
            raise invalid(f"too large: {size}; the images of a request may have {MAX_PIXELS} pixels", field)
        opened.append((picture, field))
    decoded = []
    for picture, field in opened:
        try:
            decoded.append(PIL.ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise invalid(f"is damaged and does not decode ({type(error).__name__})", field) from None
    return decoded
