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

from backends.picture_memory import PICTURES, PictureTooLarge
from backends.pixels import SHRINKS, Frame, decode, image_bytes
from sidecar.api.errors import InvalidRequest
from sidecar.api.trio.crops import CROP_PADDING, Box, Panel, choose_panels, padded

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

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
    A large frame is shown smaller, so that its pixels and the composite fit in the memory for pictures; the crops are
    cut from the frame as it was decoded. Run this as a job of `PICTURES`. Raises `InvalidRequest`.
    """
    try:
        import PIL  # noqa: F401, PLC0415  only requests with crops need Pillow
    except ModuleNotFoundError:
        _warn_that_pillow_is_missing()
        return None
    try:
        frame = decode(binascii.a2b_base64(image_b64))
        panels = choose_panels(crops, frame.width, frame.height, max_panels)
        if not panels:
            return None
        canvas = _draw(frame, panels)
        del frame
        jpeg = BytesIO()
        canvas.save(jpeg, "JPEG", quality=_JPEG_QUALITY)
        del canvas
    except PictureTooLarge as error:
        raise not_an_image(f"image_b64 {error}: send a smaller picture, or a JPEG that is not progressive") from error
    except Exception as error:  # noqa: BLE001  Pillow raises almost any exception for a damaged picture
        _log.info("a picture is sent without panels, because it cannot be decoded or drawn: %s", type(error).__name__)
        return None
    return Composite(base64.b64encode(jpeg.getbuffer()), panels)


@cache
def _warn_that_pillow_is_missing() -> None:
    _log.warning("crop-describe tells of crops in words only: pip install 'vlm-sidecar[crops]' to show them enlarged")


def _draw(frame: Frame, panels: Sequence[Panel]) -> Image.Image:
    """Draw the frame on the left and a column of panels on the right. Raises `PictureTooLarge`.

    The column is a third as wide as the frame, but 160 to 384 pixels. Each panel is at least 120 pixels high.
    """
    from PIL import Image, ImageDraw  # noqa: PLC0415

    shrink, size, column, row = _layout(frame.image, len(panels))
    canvas = Image.new("RGB", (size[0] + column, max(size[1], row * len(panels))))
    canvas.paste(frame.image if shrink == 1 else frame.image.reduce(shrink))
    draw = ImageDraw.Draw(canvas)
    for index, panel in enumerate(panels):
        colour = _BOX_COLOURS[index % len(_BOX_COLOURS)]
        box = _clipped(_scaled(panel.box, size, frame), *size)
        draw.rectangle(box, outline=colour, width=_BOX_LINE)
        _caption(draw, panel.label, *box[:2], colour)

        source = _scaled(padded(panel.box, frame.width, frame.height, CROP_PADDING), frame.image.size, frame)
        source = source[0], source[1], max(source[0] + 1, source[2]), max(source[1] + 1, source[3])
        width, height = source[2] - source[0], source[3] - source[1]
        room = column - 2 * _MARGIN, row - _CAPTION_HEIGHT - 2 * _MARGIN
        scale = min(room[0] / width, room[1] / height)
        cut = frame.image.resize((max(1, int(width * scale)), max(1, int(height * scale))), box=source)
        x, y = size[0], index * row
        canvas.paste(
            cut, (x + (column - cut.width) // 2, y + _CAPTION_HEIGHT + _MARGIN + max(0, room[1] - cut.height) // 2)
        )
        draw.rectangle((x, y, x + column - 1, y + row - 1), outline=colour, width=2)
        sure = "" if panel.confidence is None else f" {panel.confidence:.2f}"
        _caption(draw, f"{panel.label} {panel.kind}{sure}", x, y, colour)
    return canvas


def _layout(image: Image.Image, panels: int) -> tuple[int, tuple[int, int], int, int]:
    """Return the shrink of the shown frame, its size, the width of the column, and the height of each panel.

    The shrink is the smallest with which the frame, the composite, and what drawing needs fit. Raises
    `PictureTooLarge`.
    """
    for shrink in SHRINKS:
        width, height = -(-image.width // shrink), -(-image.height // shrink)
        column = max(160, min(384, width // 3))
        row = max(120, height // panels)
        needed = image_bytes(*image.size) + image_bytes(width + column, max(height, row * panels))
        needed += image_bytes(width, height) if shrink > 1 else 0
        needed += image_bytes(column, image.height + row)  # a crop, scaled first in its width and then in its height
        if needed <= PICTURES.max_bytes:
            break
    PICTURES.hold(needed)
    return shrink, (width, height), column, row


def _scaled(box: Box, size: tuple[int, int], frame: Frame) -> Box:
    """Return the box in an image of this size that shows the whole frame."""
    if size == (frame.width, frame.height):
        return box
    across, down = size[0] / frame.width, size[1] / frame.height
    return int(box[0] * across), int(box[1] * down), int(box[2] * across), int(box[3] * down)


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
