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
            pixels += picture.width * picture.height
        except PIL.Image.DecompressionBombError:  # PIL's own bound, higher than ours
            pixels = MAX_PIXELS + 1
        except (OSError, ValueError, SyntaxError):
            raise invalid(f"is not an image this backend knows ({', '.join(_FORMATS)})", field) from None
        if pixels > MAX_PIXELS:
            raise invalid(f"too large: the images of a request may have {MAX_PIXELS} pixels together", field)
        opened.append((picture, field))
    decoded = []
    for picture, field in opened:
        try:
            decoded.append(PIL.ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise invalid(f"is damaged and does not decode ({type(error).__name__})", field) from None
    return decoded
