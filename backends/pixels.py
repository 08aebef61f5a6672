"""Decode a picture to an upright frame with 8 bits per colour, within a bound of memory. Needs Pillow.

The memory is computed from the picture's header before anything is decoded. So only formats are decoded whose memory
follows from their header. These are not:

* AVIF: the header's size says nothing about the size of the AV1 frames in it.
* JPEG 2000: as AVIF. And Pillow decodes it with Python's interpreter locked: the event loop would stand still.
* GIF: Pillow keeps an object for each block of a comment, and a block may have one byte.
* lossless WebP, and WebP with an alpha channel: its Huffman tables may take hundreds of megabytes.
* TIFF with a codec that has tables or a picture of its own (JPEG, LZMA, Zstandard), and what Pillow decodes in Python
  (run-length BMP, PPM as text), which would take the processor from the event loop for seconds.

Some pictures make Pillow raise almost any exception, for example a JPEG whose EXIF data has a tag of an unusual type,
or a PNG with an empty `pHYs` chunk. So callers of this module must expect any `Exception`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING

from backends.media import image_size
from backends.picture_memory import PICTURES, PictureTooLarge

if TYPE_CHECKING:
    from PIL import Image, ImageFile

#: The formats that are decoded. Pillow knows many more, which no camera uses; each is code that a caller could attack.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
#: Pixels. It bounds the time: the largest JPEG is decoded at a fraction of its size in half a second.
MAX_PIXELS = 50_000_000
#: Pixels of the longest side, which is JPEG's own bound. Some of Pillow's memory goes with a side, not with the pixels.
_MAX_SIDE = 65_535
#: A picture that is too large for the memory is decoded or converted at one of these fractions of its width and height.
SHRINKS = (1, 2, 4, 8)
#: Pillow's decoders whose memory is computed here. All run without Python's interpreter lock.
_CODECS = {"jpeg", "zip", "raw", "libtiff"}
#: Compressions of TIFF that need no memory but for one strip or tile.
_TIFF_COMPRESSIONS = {"raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"}
#: Bytes per pixel in Pillow's memory. Every other mode takes 4.
_BYTES_PER_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2}
#: Bytes per pixel of WebP beside the picture: two canvases of libwebp, and the copy that Pillow makes.
_WEBP_BYTES = 13
#: Bytes for each pixel of the width: the rows that a decoder has in work. libjpeg has three components, 16 to 32 rows.
_ROW_BYTES = 128
#: Bytes that each entry of Pillow's lists takes: a TIFF file has one for each strip, and EXIF data for every 12 bytes.
_ENTRY_BYTES = 400
#: The most segments or chunks of a file. Pillow keeps an object for each; a 10 MB PNG with small chunks has a thousand.
_MAX_PIECES = 10_000
#: The most scans of a JPEG. Pictures from cameras have 1, progressive ones 10. Each scan walks over all pixels, so that
#: a file of thousands would take minutes.
_MAX_SCANS = 32
#: Bytes of a strip that is converted at once; see `_converted`. It is held in up to four forms.
_STRIP_BYTES = 1 << 18
_STRIP_FORMS = 4
#: Characters of text in a PNG file. Pillow's own bound, 64 million, allows 256 MB.
_MAX_TEXT = 1 << 20
#: The factor that turns a number into 8 bits, by the largest number of the picture: shares, 8 bits, 16 bits.
_STEPS = ((1.0, 255.0), (255.0, 1.0), (65535.0, 1 / 256))
#: The EXIF tag of the orientation.
_ORIENTATION = 0x0112
#: JPEG markers: baseline, extended and progressive frames; the start of a scan.
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
_JPEG_SCAN = 0xDA


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded picture: RGB and upright."""

    image: Image.Image
    """As large as the picture, or smaller: it takes at most half of the memory for pictures."""
    width: int
    """Pixels of the upright picture at its own size."""
    height: int


def decode(data: bytes) -> Frame:
    """Return the picture. Run this as a job of `PICTURES`. Raises `PictureTooLarge`, or any exception of Pillow."""
    from PIL import Image  # noqa: PLC0415  only callers with crops or a detector need Pillow

    _set_up_pillow()
    before = _bytes_before_loading(data)
    _hold(len(data) + before, *(image_size(data) or (0, 0)))
    try:
        opened = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureTooLarge(f"has far too many pixels; at most {MAX_PIXELS} can be shown") from error
    try:
        pixels, (width, height), orientation = _loaded(opened, data, before)
    finally:
        opened.close()  # some of Pillow's objects refer to each other: they would keep their memory for a while
    del opened, data
    as_it_is = pixels.mode == "RGB" and orientation == 1 and _leaves_room(*pixels.size)
    image = pixels if as_it_is else _converted(pixels, orientation)
    return Frame(image, *((height, width) if orientation >= 5 else (width, height)))


def _loaded(opened: ImageFile.ImageFile, data: bytes, before: int) -> tuple[Image.Image, tuple[int, int], int]:
    """Load the pixels within the bound. Return them and nothing else of the file; its size; how they must be turned."""
    width, height = opened.size
    if width * height > MAX_PIXELS or max(width, height) > _MAX_SIDE:
        raise PictureTooLarge(
            f"has {width} x {height} pixels; at most {MAX_PIXELS} can be shown, and {_MAX_SIDE} in a row or column"
        )
    beside = len(data) + before + _loading_bytes(opened)
    for shrink in SHRINKS if _is_jpeg(data) else SHRINKS[:1]:
        size = -(-width // shrink), -(-height // shrink)
        needed = beside + image_bytes(*size, opened.mode)
        if needed <= PICTURES.max_bytes and _leaves_room(*size):
            break
    _hold(needed, width, height)
    if shrink > 1:
        opened.draft(None, (max(1, width // shrink), max(1, height // shrink)))
    opened.load()
    pixels = opened._new(opened.im)  # without the file and the decoder
    pixels.info.clear()
    if opened.format == "TIFF":  # Pillow has turned it upright
        return pixels, pixels.size, 1
    return pixels, (width, height), _orientation(opened)  # before loading, this would make Pillow load a PNG


def image_bytes(width: int, height: int, mode: str = "RGB") -> int:
    """Return the bytes of an image in Pillow's memory: rows of whole words, and a pointer to each row."""
    return height * (-(-width * _BYTES_PER_PIXEL.get(mode, 4) // 4) * 4 + 8)


@cache
def _set_up_pillow() -> None:
    """Bound what Pillow keeps of a file's texts. It prints and keeps a warning for each damaged entry: ignore those."""
    from PIL import PngImagePlugin  # noqa: PLC0415

    PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _leaves_room(width: int, height: int) -> bool:
    """Whether a frame of this size leaves half of the memory to those who use it."""
    return image_bytes(width, height) <= PICTURES.max_bytes // 2


def _hold(needed: int, width: int, height: int) -> None:
    try:
        PICTURES.hold(needed)
    except PictureTooLarge as error:
        raise PictureTooLarge(f"has {width} x {height} pixels and {error}") from error


def _bytes_before_loading(data: bytes) -> int:
    """Return the bytes that Pillow and libjpeg take beside the file and the pixels, as far as the file's parts tell.

    Raises `ValueError` if the file must not be opened.
    """
    if _is_jpeg(data):
        return _jpeg_bytes(data)
    if data[:4] == b"\x89PNG":
        at, pieces, texts = 8, 0, 0
        while at + 8 <= len(data):
            length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
            texts += length if kind != b"IDAT" else 0
            at, pieces = at + 12 + length, _one_more(pieces)
        return texts + _ENTRY_BYTES * pieces
    if data[:4] != b"RIFF":
        return 0
    at, pieces = 12, 0
    while at + 8 <= len(data):
        if data[at : at + 4] in (b"VP8L", b"ALPH", b"ANMF"):
            raise ValueError("only lossy WebP without transparency is decoded")
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at, pieces = at + 8 + length + length % 2, _one_more(pieces)
    size = image_size(data)
    if size is None:
        raise ValueError("the WebP has no size")
    frame = (_WEBP_BYTES + 4) * size[0] * size[1]
    _hold(2 * len(data) + frame, *size)
    return len(data) + _WEBP_BYTES * size[0] * size[1] + _ENTRY_BYTES * pieces


def _one_more(pieces: int) -> int:
    if pieces == _MAX_PIECES:
        raise ValueError(f"the file has more than {_MAX_PIECES} parts")
    return pieces + 1


def _is_jpeg(data: bytes) -> bool:
    return data[:2] == b"\xff\xd8"


def _loading_bytes(opened: ImageFile.ImageFile) -> int:
    """Return the bytes that loading takes beside those, and the pixels. Raises `ValueError` if they are unknown."""
    if not {tile[0] for tile in opened.tile} <= _CODECS:
        raise ValueError("this kind of file is not decoded")
    width, height = int(opened.width), int(opened.height)
    exif: bytes = opened.info.get("exif", b"")
    entries = min(len(exif) // 12, 1 << 16)  # a directory of EXIF data has no more
    extra: int = _ROW_BYTES * width + _ENTRY_BYTES * (len(opened.tile) + entries)
    if opened.format == "TIFF":
        return extra + _tiff_bytes(opened)
    frames = 2 if getattr(opened, "is_animated", False) else 0
    return extra + frames * image_bytes(width, height, opened.mode)


def _jpeg_bytes(data: bytes) -> int:
    """Return the bytes of the metadata, and of the coefficients that libjpeg holds if the file has several scans."""
    at, pieces, samples, components, progressive = 2, 0, 0, 0, False
    while True:
        if data[at] != 0xFF:
            raise ValueError("between the segments of the JPEG stands something else")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte before the marker
            at, pieces = at + 1, _one_more(pieces)
            continue
        if marker == _JPEG_SCAN:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _JPEG_FRAMES:
                raise ValueError("this kind of JPEG is not decoded")
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            components, progressive = data[at + 9], marker == _JPEG_FRAMES[2]
            sampling = [divmod(data[at + 11 + 3 * index], 16) for index in range(components)]
            across, down = max(h for h, _ in sampling), max(v for _, v in sampling)
            units = -(-width // (8 * across)) * -(-height // (8 * down))
            samples = units * 64 * sum(h * v for h, v in sampling)
        at, pieces = at + 2 + int.from_bytes(data[at + 2 : at + 4]), _one_more(pieces)
    metadata = 4 * at + _ENTRY_BYTES * pieces  # Pillow holds each segment up to four times
    if not progressive and data[at + 4] == components:
        return metadata
    if data.count(b"\xff\xda", at) > _MAX_SCANS:
        raise ValueError(f"the JPEG has more than {_MAX_SCANS} scans")
    return metadata + 2 * samples


def _tiff_bytes(opened: ImageFile.ImageFile) -> int:
    """Return the bytes of one strip or tile, and of the upright copy that Pillow makes."""
    if opened.info.get("compression", "raw") not in _TIFF_COMPRESSIONS:
        raise ValueError("this compression of TIFF is not decoded")
    tags = vars(opened)["tag_v2"]
    width, height = tags[256], min(tags[257], tags.get(278, tags[257]))  # 278: rows of a strip
    if 322 in tags:
        width, height = tags[322], tags[323]  # of a tile
    bits = int(tags.get(277, 1) * max(tags.get(258, (1,))))
    turned = image_bytes(opened.width, opened.height, opened.mode) if tags.get(_ORIENTATION, 1) != 1 else 0
    strip: int = 2 * (width * height * bits // 8)  # Pillow reads some colours through a second buffer
    return turned + strip + _ENTRY_BYTES * len(tags)


def _orientation(opened: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if the EXIF data cannot be read."""
    try:
        orientation = int(opened.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  EXIF data can be damaged in any way; the pixels do not depend on it
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _converted(image: Image.Image, orientation: int) -> Image.Image:
    """Return the image in RGB and upright, at a fraction of its size if both do not fit. Raises `PictureTooLarge`.

    It is converted strip by strip: Pillow would make a copy of the whole image for each step.
    """
    from PIL import Image  # noqa: PLC0415

    width, height = image.size
    eight_bits = _to_8_bits(image)
    for shrink in SHRINKS:
        rows = max(shrink, _STRIP_BYTES // (4 * width) // shrink * shrink)
        size = -(-width // shrink), -(-height // shrink)
        strips = _STRIP_FORMS * image_bytes(width, min(rows, height))
        needed = image_bytes(width, height, image.mode) + image_bytes(*size) + strips
        if needed <= PICTURES.max_bytes and _leaves_room(*size):
            break
    _hold(needed, width, height)
    upright = Image.new("RGB", size if orientation < 5 else (size[1], size[0]))
    for top in range(0, height, rows):
        strip = eight_bits(image.crop((0, top, width, min(height, top + rows)))).convert("RGB")
        if shrink > 1:
            strip = strip.reduce(shrink)
        from_top = top // shrink
        from_bottom = size[1] - from_top - strip.height
        at = from_bottom if orientation in (3, 4, 6, 7) else from_top
        upright.paste(_turned(strip, orientation), (at, 0) if orientation >= 5 else (0, at))
    return upright


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


def _to_8_bits(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return a function that gives 8 bits to a strip of a grey picture of 16 or 32 bits (a thermal camera's).

    As in cv2, the highest byte counts. Pillow's own conversion to RGB would cut every value above 255 to white.
    """
    from PIL import Image  # noqa: PLC0415

    mode = image.mode
    if mode.startswith("I;16"):
        first = 0 if mode.endswith("B") else 1
        return lambda strip: Image.frombytes("L", strip.size, strip.tobytes()[first::2])
    if mode in ("I", "F"):
        lowest_and_highest = image.getextrema()  # one band has one pair
        brightest = float(lowest_and_highest[1])
        # "I" has 16 bits in PNG and PPM files, and 32 bits in a few TIFF files; "F" has shares or numbers.
        steps = _STEPS if mode == "F" else _STEPS[2:]
        factor = next((factor for bound, factor in steps if brightest <= bound), 1 / (1 << 24))
        return lambda strip: strip.point(lambda value: value * factor + 0).convert("L")
    return lambda strip: strip
