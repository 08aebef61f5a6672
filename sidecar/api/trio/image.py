"""Images for trio-core's API: detect the format by the first bytes, and draw the composite of crop-describe.

Pillow is imported only by the functions that need it. They run in a thread: see `compose`.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

from backends.pixels import TooManyPixels, decode
from sidecar.api.errors import InvalidRequest
from sidecar.api.trio.crops import CROP_PADDING, Box, Panel, choose_panels, padded

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

#: Frames with more pixels are not decoded. An 8K frame has 33 million pixels; each pixel needs three bytes, and drawing
#: holds several copies.
MAX_PIXELS = 50_000_000

_log = logging.getLogger("sidecar")

_BOX_COLOURS = ("#ffe119", "#4cc3ff", "#50dc50", "#ff66ff", "#ff9f1c")
_CAPTION_PIXELS = 20
_CAPTION_HEIGHT = 30
_MARGIN = 6
_BOX_LINE = 3
_JPEG_QUALITY = 85
#: Characters of the longest caption. A longer one would need a font bitmap as wide as the text.
_CAPTION_CHARACTERS = 60


def media_type(image_b64: memoryview) -> str:
    """Return the media type of a base64 image, by its first bytes. Raises `InvalidRequest`."""
    head = binascii.a2b_base64(bytes(image_b64[:16]))
    if head[4:8] == b"ftyp":  # the first box of HEIC and AVIF
        return "image/avif" if head[8:12] in (b"avif", b"avis") else "image/heic"
    for start, name in (
        (b"\xff\xd8\xff", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"GIF8", "image/gif"),
        (b"BM", "image/bmp"),
        (b"II*\0", "image/tiff"),
        (b"MM\0*", "image/tiff"),
        (b"\0\0\0\x0cjP  ", "image/jp2"),
        (b"\xff\x4f\xff\x51", "image/jp2"),
        *((f"P{kind}{space}".encode(), "image/x-portable-anymap") for kind in range(1, 7) for space in "\n\r\t #"),
    ):
        if head.startswith(start):
            return name
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    raise not_an_image("image_b64 is no JPEG, PNG, WebP, BMP, GIF, TIFF, HEIC, AVIF, JPEG 2000 or PPM")


def not_an_image(why: str) -> InvalidRequest:
    """Return the error for an image that cannot be read, in trio-core's wording."""
    return InvalidRequest(f"Invalid image data: {why}", field="image_b64")


@dataclass(frozen=True, slots=True)
class Composite:
    """A frame with its zoom panels: a JPEG in base64, and the panels in it from top to bottom."""

    image_b64: bytes
    panels: list[Panel]


def compose(image_b64: bytes | memoryview, crops: Sequence[dict[str, Any]], max_panels: int) -> Composite | None:
    """Draw boxes for up to `max_panels` crops into the frame, and show each crop enlarged to the right of the frame.

    The crops with the highest confidence are drawn, each with its label. First, the frame is turned upright by its EXIF
    orientation, because the boxes refer to the upright frame.
    Return None if no crop can be shown, or if the picture cannot be decoded: the caller then sends the frame unchanged,
    and the prompt lists the crops in words. Also return None if Pillow is not installed, and log that once.
    This takes tens of milliseconds of processor time: call it in a thread. Raises `InvalidRequest`.
    """
    try:
        import PIL  # noqa: F401, PLC0415  only requests with crops need Pillow
    except ModuleNotFoundError:
        _warn_that_pillow_is_missing()
        return None
    try:
        frame = decode(base64.b64decode(image_b64), MAX_PIXELS)
        panels = choose_panels(crops, frame.width, frame.height, max_panels)
        if not panels:
            return None
        jpeg = BytesIO()
        _draw(frame, panels).save(jpeg, "JPEG", quality=_JPEG_QUALITY)
    except TooManyPixels as error:
        raise not_an_image(f"image_b64 {error}") from error
    except Exception as error:  # noqa: BLE001  Pillow raises almost any exception for a damaged picture
        _log.info("a picture is sent without panels, because it cannot be decoded or drawn: %s", type(error).__name__)
        return None
    return Composite(base64.b64encode(jpeg.getbuffer()), panels)


@cache
def _warn_that_pillow_is_missing() -> None:
    _log.warning("crop-describe tells of crops in words only: pip install 'vlm-sidecar[crops]' to show them enlarged")


def _draw(frame: Image.Image, panels: Sequence[Panel]) -> Image.Image:
    """Draw the frame on the left and a column of panels on the right.

    The column is a third as wide as the frame, but 160 to 384 pixels. Each panel is at least 120 pixels high.
    """
    from PIL import Image, ImageDraw  # noqa: PLC0415

    width, height = frame.size
    column = max(160, min(384, width // 3))
    row = max(120, height // len(panels))
    canvas = Image.new("RGB", (width + column, max(height, row * len(panels))))
    canvas.paste(frame)
    draw = ImageDraw.Draw(canvas)
    for index, panel in enumerate(panels):
        colour = _BOX_COLOURS[index % len(_BOX_COLOURS)]
        left, top = _clipped(panel.box, width, height)[:2]
        draw.rectangle(_clipped(panel.box, width, height), outline=colour, width=_BOX_LINE)
        _caption(draw, panel.label, left, top, colour)

        cut = frame.crop(padded(panel.box, width, height, CROP_PADDING))
        room = column - 2 * _MARGIN, row - _CAPTION_HEIGHT - 2 * _MARGIN
        scale = min(room[0] / cut.width, room[1] / cut.height)
        cut = cut.resize((max(1, int(cut.width * scale)), max(1, int(cut.height * scale))))
        x, y = width, index * row
        canvas.paste(
            cut, (x + (column - cut.width) // 2, y + _CAPTION_HEIGHT + _MARGIN + max(0, room[1] - cut.height) // 2)
        )
        draw.rectangle((x, y, x + column - 1, y + row - 1), outline=colour, width=2)
        sure = "" if panel.confidence is None else f" {panel.confidence:.2f}"
        _caption(draw, f"{panel.label} {panel.kind}{sure}", x, y, colour)
    return canvas


def _clipped(box: Box, width: int, height: int) -> Box:
    left, top, right, bottom = box
    return (
        max(0, min(width - 1, left)),
        max(0, min(height - 1, top)),
        max(0, min(width - 1, right)),
        max(0, min(height - 1, bottom)),
    )


def _caption(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, colour: str) -> None:
    """Draw black text on a rectangle of the colour, with its upper left corner at x, y."""
    from PIL import ImageFont  # noqa: PLC0415

    font = ImageFont.load_default(_CAPTION_PIXELS)
    text = text[:_CAPTION_CHARACTERS]
    plate = draw.textbbox((x + 4, y + 2), text, font=font)
    draw.rectangle((x, y, plate[2] + 4, y + _CAPTION_HEIGHT - 4), fill=colour)
    draw.text((x + 4, y + 2), text, font=font, fill="black")
