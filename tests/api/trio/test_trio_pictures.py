"""Unusual and damaged pictures: trio-core answers them, so the sidecar does too."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tiny_onnx import yolov10

from backends.pixels import decode

CROP, DESCRIBE, DETECT = (f"/api/inference/{name}" for name in ("crop-describe", "describe", "detect"))
BOX = {"class": "fox", "bbox": [40, 20, 120, 90], "confidence": 0.8}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width: int = 160, height: int = 120) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(kind: bytes, data: bytes = b"") -> bytes:
    """Return a PNG with one more chunk behind its header."""
    png = saved(photo(), "PNG")
    return png[:33] + chunk(kind, data) + png[33:]


def jpeg_with_odd_exif() -> bytes:
    """Return a JPEG whose orientation is 6 and whose other EXIF tags have unusual types."""
    tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x011A, 77, 1, 9)
    tags += struct.pack("<HHII", 0x8769, 2, 4, 0xFFFF)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3) + tags + b"\0" * 4
    return saved(photo(120, 160), "JPEG", exif=exif)


DAMAGED = {
    "JPEG, odd EXIF": jpeg_with_odd_exif(),
    "PNG, empty pHYs": png_with(b"pHYs"),
    "PNG, empty gAMA": png_with(b"gAMA"),
    "PNG, empty acTL": png_with(b"acTL"),
    "PNG, empty iCCP": png_with(b"iCCP"),
    "PNG, wrong checksum": saved(photo(), "PNG")[:-30] + b"\0" * 30,
    "PNG, cut off": saved(photo(), "PNG")[:200],
    "JPEG, cut off": saved(photo(), "JPEG")[:700],
    "JPEG, only its first bytes": saved(photo(), "JPEG")[:30],
    "GIF, cut off": saved(photo(), "GIF")[:40],
    "TIFF, cut off": saved(photo(), "TIFF")[:60],
    "WebP, cut off": saved(photo(), "WEBP")[:50],
}


@pytest.fixture
async def asked(serving, scripted):
    """Return a function that sends a request and returns status, text, and what the provider got (None: nothing)."""
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")

    async def ask(path, image: bytes, **fields):
        before = len(upstream.seen)
        async with sidecar.post({"image_b64": base64.b64encode(image).decode(), **fields}, path=path) as response:
            text = await response.text()
        sent = json.loads(upstream.seen[-1].body) if len(upstream.seen) > before else None
        return response.status, text, sent

    return ask


@pytest.mark.parametrize("name", DAMAGED)
async def test_a_damaged_picture_is_passed_on_and_no_answer_has_a_memory_address(asked, name):
    status, text, sent = await asked(CROP, DAMAGED[name], crops=[BOX])
    assert status == 200, text
    assert " at 0x" not in text
    picture, prompt = sent["messages"][0]["content"]
    if base64.b64decode(picture["image_url"]["url"].partition(",")[2]) == DAMAGED[name]:  # without panels
        assert prompt["text"].startswith("YOLO detections")


async def test_a_jpeg_with_odd_exif_tags_is_turned_upright_and_has_panels(asked):
    _, _, sent = await asked(CROP, jpeg_with_odd_exif(), crops=[BOX])
    url = sent["messages"][0]["content"][0]["image_url"]["url"]
    shown = Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))
    assert (shown.width, shown.height) == (160 + 160, 120)  # upright, and a column with one panel


@pytest.mark.parametrize("name", DAMAGED)
async def test_a_damaged_picture_gets_detections_or_a_400_of_the_detector(serving, tmp_path, name):
    model = yolov10(tmp_path / "m.onnx", [[1, 1, 9, 9, 0.9, 0]])
    sidecar = await serving(backend="simulated", detector_model=str(model))
    async with sidecar.post({"image_b64": base64.b64encode(DAMAGED[name]).decode()}, path=DETECT) as response:
        text = await response.text()
        assert response.status in (200, 400), text
        assert " at 0x" not in text


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "TIFF, big endian", "TIFF, float", "TIFF, 32 bits"])
def test_a_grey_picture_of_16_bits_is_scaled_as_cv2_does(kind):
    values = (np.arange(64 * 48).reshape(48, 64) * 21).astype(np.uint16)  # 0 to 64,491
    match kind:
        case "TIFF, big endian":
            data = saved(Image.frombytes("I;16B", (64, 48), values.astype(">u2").tobytes()), "TIFF")
        case "TIFF, float":
            data = saved(Image.fromarray(values.astype(np.float32)), "TIFF")
        case "TIFF, 32 bits":
            data = saved(Image.fromarray(values.astype(np.int32)), "TIFF")
        case _:
            data = saved(Image.fromarray(values), kind)
    frame = np.asarray(decode(data).image)
    assert frame.shape == (48, 64, 3)
    expected = (values >> 8).astype(int)
    assert np.abs(frame.astype(int) - expected[..., None]).max() <= 1


async def test_the_composite_of_a_thermal_picture_is_not_white(asked):
    values = np.full((120, 160), 30_000, np.uint16)
    _, _, sent = await asked(CROP, saved(Image.fromarray(values), "PNG"), crops=[BOX])
    url = sent["messages"][0]["content"][0]["image_url"]["url"]
    shown = Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))).convert("L")
    assert abs(shown.getpixel((20, 110)) - (30_000 >> 8)) < 6


@pytest.mark.parametrize(
    ("kind", "media", "panels"),
    [
        ("JPEG2000", "image/jp2", False),
        ("PPM", "image/x-portable-anymap", True),
        ("AVIF", "image/avif", False),
        ("WEBP", "image/webp", True),
    ],
)
async def test_formats_that_trio_core_takes_are_passed_on(asked, kind, media, panels):
    data = saved(photo(), kind)
    status, text, sent = await asked(DESCRIBE, data)
    assert status == 200, text
    url = sent["messages"][0]["content"][0]["image_url"]["url"]
    assert url == f"data:{media};base64,{base64.b64encode(data).decode()}"
    status, text, sent = await asked(CROP, data, crops=[BOX])
    assert status == 200, text
    shown = sent["messages"][0]["content"][0]["image_url"]["url"]
    assert shown.startswith("data:image/jpeg;") if panels else shown == url


async def test_a_number_of_5000_digits_is_a_400_that_repeats_nothing(serving):
    sidecar = await serving()
    body = b'{"image_b64": "AAAA", "max_tokens": ' + b"7" * 5000 + b"}"
    headers = {"Content-Type": "application/json"}
    for path in (DESCRIBE, CROP, DETECT):
        async with sidecar.client.post(sidecar.url + path, data=body, headers=headers) as response:
            assert response.status == 400
            assert "777" not in await response.text()


@pytest.mark.parametrize(
    "crop",
    [
        {**BOX, "class": "fox " * 250_000},
        {**BOX, "label": "\u202e\n\t\x00", "class": ""},
        {**BOX, "confidence": 10**400},
        {**BOX, "bbox": [-(10**400), 0, 10**400, 90]},
        {**BOX, "bbox": [0, 0, 1e300, 1e300]},
    ],
    ids=["a caption of a million characters", "control characters", "huge confidence", "huge box", "huge float box"],
)
async def test_an_unusual_crop_is_answered(asked, crop):
    status, text, sent = await asked(CROP, saved(photo(), "JPEG"), crops=[crop, BOX])
    assert status == 200, text[:300]
    assert sent["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
