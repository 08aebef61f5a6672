"""Decodes the bytes of images to pixels, within bounds. Runs in the engine thread."""

from __future__ import annotations

from io import BytesIO

import PIL.Image
import PIL.ImageOps

from backends.local.prompts import invalid

#: Maximum number of pixels in all images of one request. It bounds the memory of a batch: each decoded pixel takes
#: 3 bytes, in every row. The headers are checked before any image is decoded. An 8K frame has 33 million pixels.
MAX_PIXELS = 40_000_000

#: The formats that cameras and browsers send. PIL supports forty more, but only a hostile caller would use them.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def decode(images: list[tuple[bytes, str]]) -> list[PIL.Image.Image]:
    """Decode (bytes, field) pairs to RGB images, rotated upright, in the same order.

    Raises `Rejected` with the field of the invalid image.
    """
    opened = []
    pixels = 0
    for data, field in images:
        try:
            picture = PIL.Image.open(BytesIO(data), formats=_FORMATS)  # reads the header only
            pixels += picture.width * picture.height
        except PIL.Image.DecompressionBombError:  # the image exceeds PIL's own bound, which is above MAX_PIXELS
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
