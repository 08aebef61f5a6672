"""Decode a picture to an upright frame with 8 bits per colour. Needs Pillow, and takes tens of milliseconds.

Some pictures make Pillow raise almost any exception, for example a JPEG whose EXIF data has a tag of an unusual type,
or a PNG with an empty `pHYs` chunk. So callers of this module must expect any `Exception`.
"""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

#: The formats that are decoded. Pillow knows many more, which no camera uses; each is code that a caller could attack.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")
#: The factor that turns a number into 8 bits, by the largest number of the picture: shares, 8 bits, 16 bits.
_STEPS = ((1.0, 255.0), (255.0, 1.0), (65535.0, 1 / 256))
#: The EXIF tag of the orientation.
_ORIENTATION = 0x0112


class TooManyPixels(Exception):
    """The picture has more pixels than the caller allows. Nothing was decoded."""

    def __init__(self, size: str, most: int) -> None:
        super().__init__(f"has {size} pixels; at most {most} can be shown")


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Return the picture as an upright RGB frame. Raises `TooManyPixels`, or any exception of Pillow."""
    from PIL import Image  # noqa: PLC0415  only callers with crops or a detector need Pillow

    try:
        opened = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooManyPixels("far too many", max_pixels) from error
    with opened:
        if opened.width * opened.height > max_pixels:
            raise TooManyPixels(f"{opened.width} x {opened.height}", max_pixels)
        orientation = _orientation(opened)
        return _turned(_with_8_bits(opened), orientation).convert("RGB")


def _orientation(opened: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if the EXIF data cannot be read."""
    try:
        return int(opened.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  EXIF data can be damaged in any way; the pixels do not depend on it
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    from PIL.Image import Transpose  # noqa: PLC0415

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(orientation)
    return image if turn is None else image.transpose(turn)


def _with_8_bits(opened: Image.Image) -> Image.Image:
    """Return a grey picture of 16 or 32 bits (a thermal camera's) with 8 bits, as cv2 does: the highest byte counts.

    Pillow's own conversion to RGB would cut every value above 255 to white.
    """
    from PIL import Image  # noqa: PLC0415

    if opened.mode.startswith("I;16"):
        data = opened.tobytes()
        high_byte = data[0::2] if opened.mode.endswith("B") else data[1::2]
        return Image.frombytes("L", opened.size, high_byte)
    if opened.mode in ("I", "F"):
        brightest = _brightest(opened)
        # "I" has 16 bits in PNG and PPM files, and 32 bits in a few TIFF files; "F" has shares or numbers.
        steps = _STEPS if opened.mode == "F" else _STEPS[2:]
        factor = next((factor for bound, factor in steps if brightest <= bound), 1 / (1 << 24))
        return opened.point(lambda value: value * factor + 0).convert("L")
    return opened


def _brightest(image: Image.Image) -> float:
    lowest_and_highest = image.getextrema()
    return float(lowest_and_highest[1])  # one band has one pair
