"""No picture takes more memory than pictures may take; the memory is given back; the event loop stays free."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import struct
import subprocess
import sys
import threading
import time
import zlib
from functools import cache, lru_cache, partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from tiny_onnx import yolov10

from backends import pixels
from backends.picture_memory import MAX_PICTURE_BYTES, PICTURES, PictureMemory, PictureTooLarge
from backends.pixels import decode
from sidecar.api.trio import image as drawing

CROP, DETECT = "/api/inference/crop-describe", "/api/inference/detect"
#: Bytes that are not the pictures': code that is loaded late, and small pieces, of which glibc keeps up to 8 MiB for
#: each thread.
SLACK = 16 << 20
PROGRAM = Path(__file__).with_name("picture_memory_of.py")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@lru_cache(4)
def photo(width: int, height: int) -> Image.Image:
    """Return a frame that does not compress to nothing: a gradient in each colour, with a little noise."""
    noise = Image.frombytes("L", (256, 256), random.Random(1).randbytes(1 << 16))
    bands = Image.linear_gradient("L"), noise, Image.radial_gradient("L")
    return Image.merge("RGB", bands).resize((width, height), Image.Resampling.NEAREST)


@cache
def attack() -> bytes:
    """Return a PNG of 641 kB that takes 196 MB when it is decoded."""
    return saved(Image.new("RGB", (7000, 7000)), "PNG", compress_level=1)


def palette(width: int, height: int) -> Image.Image:
    image = photo(width, height).getchannel("R")
    image.putpalette(bytes(at % 256 for at in range(768)))
    return image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(chunks: bytes) -> bytes:
    png = saved(photo(300, 200), "PNG")
    return png[:33] + chunks + png[33:]


def exif(entries: int, bytes_each: int) -> bytes:
    """Return EXIF data whose entries all refer to the same bytes."""
    rows = b"".join(struct.pack("<HHII", 0x200 + at, 1, bytes_each, 8) for at in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + rows + bytes(4 + bytes_each)


def jpeg_with_exif(entries: int, bytes_each: int) -> bytes:
    data, segment = saved(photo(300, 200), "JPEG"), b"Exif\0\0" + exif(entries, bytes_each)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def webp_with_canvas(width: int, height: int) -> bytes:
    """Return a WebP whose header claims this size."""
    extended = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + extended


def avif_with_another_size() -> bytes:
    data = bytearray(saved(photo(3000, 2000), "AVIF", speed=10))
    at = data.find(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", 100, 100)
    return bytes(data)


def tiff_with_one_tile(side: int) -> bytes:
    """Return a grey TIFF of 16 x 16 pixels whose one tile has `side` x `side` pixels."""
    tile = zlib.compress(bytes(side * side))
    numbers = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(tile)}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in numbers.items())
    return b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + struct.pack("<H", len(numbers)) + rows + bytes(4)


def measured(tmp_path: Path, files: dict[str, bytes], max_bytes: int = MAX_PICTURE_BYTES) -> dict[str, dict]:
    """Compose these pictures one after the other in a process of its own. Return its report by name."""
    small = [saved(photo(300, 200), kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")]
    paths = []
    for at, data in enumerate([*small, *files.values()]):
        paths.append(tmp_path / str(at))
        paths[-1].write_bytes(data)
    command = [sys.executable, str(PROGRAM), str(max_bytes), str(len(small)), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(files, lines[len(small) :], strict=True))


def test_no_picture_takes_more_than_the_bound_and_real_frames_are_shown(tmp_path):
    frame = photo(3840, 2160)
    turned = Image.Exif()
    turned[0x0112] = 6
    big = photo(5472, 3648)
    shown = {
        "4K JPEG": saved(frame, "JPEG"),
        "4K JPEG, turned": saved(frame, "JPEG", exif=turned),
        "4K PNG, turned": saved(frame, "PNG", compress_level=1, exif=turned),
        "4K PNG with alpha": saved(frame.convert("RGBA"), "PNG", compress_level=1),
        "4K PNG, 16 bits": saved(Image.fromarray(np.full((2160, 3840), 30_000, np.uint16)), "PNG"),
        "4K TIFF, float": saved(Image.new("F", (3840, 2160), 0.5), "TIFF", compression="tiff_lzw"),
        "4K PNG, palette": saved(palette(3840, 2160), "PNG", compress_level=1),
        "1440p WebP": saved(photo(2560, 1440), "WEBP", method=0),
        "12 megapixels, JPEG": saved(photo(4000, 3000), "JPEG"),
        "20 megapixels, JPEG": saved(big, "JPEG"),
        "20 megapixels, progressive JPEG": saved(big, "JPEG", quality=60, progressive=True),
        "49 megapixels, JPEG": saved(Image.new("RGB", (7000, 7000)), "JPEG"),
        "49 megapixels, black and white": saved(Image.new("1", (7000, 7000)), "PNG"),
        "wide JPEG": saved(Image.new("RGB", (65_000, 16)), "JPEG"),
        "tall JPEG": saved(Image.new("RGB", (16, 65_000)), "JPEG"),
    }
    for name, report in measured(tmp_path, shown).items():
        assert report["result"] == "composite", name
        assert report["peak"] <= MAX_PICTURE_BYTES, (name, report)
        assert report["left"] <= SLACK, (name, report)
        assert report["counted"] == 0


def test_a_picture_over_the_bound_takes_next_to_nothing(tmp_path):
    refused = {
        "49 megapixels, PNG": attack(),
        "25 megapixels, progressive JPEG": saved(
            Image.new("RGB", (5000, 5000)), "JPEG", progressive=True, subsampling=0
        ),
        "51 megapixels, JPEG": saved(Image.new("L", (8500, 6000)), "JPEG"),
        "4K WebP": saved(Image.new("RGB", (3840, 2160)), "WEBP", method=0),
        "WebP that claims 268 megapixels": webp_with_canvas(16_383, 16_383),
        "very tall PNG": saved(Image.new("RGB", (1, 9_000_000)), "PNG"),
        "TIFF in one strip": saved(
            Image.new("RGBA", (4000, 2500)), "TIFF", compression="tiff_adobe_deflate", tiffinfo={278: 2500}
        ),
        "TIFF whose tile is larger": tiff_with_one_tile(8192),
    }
    for name, report in measured(tmp_path, refused).items():
        assert report["result"].startswith("Invalid image data: image_b64 has "), (name, report)
        assert report["peak"] <= SLACK, (name, report)


def test_what_a_header_does_not_tell_is_not_decoded(tmp_path):
    long_text = chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress("\U0001f600".encode() * 260_000))
    gif, jpeg = saved(palette(300, 200), "GIF"), saved(photo(300, 200), "JPEG")
    passed_on = {
        "AVIF whose frame is larger than its header says": avif_with_another_size(),
        "JPEG 2000": saved(photo(1000, 800), "JPEG2000"),
        "lossless WebP": saved(photo(1000, 800), "WEBP", lossless=True, method=0),
        "GIF with a comment of small blocks": gif[:-1] + b"!\xfe" + b"\x02ab" * 1_000_000 + b"\0;",
        "JPEG of a million segments": jpeg[:2] + b"\xff\xe5\0\2" * 1_000_000 + jpeg[2:],
        "PNG of half a million chunks": with_chunks(chunk(b"prVt", b"") * 500_000),
        "JPEG in TIFF": saved(photo(1000, 800), "TIFF", compression="jpeg"),
        "JPEG of a thousand scans": _many_scans(),
        "PNG with 60 MB of text": with_chunks(60 * long_text),
        "PPM as text": b"P3 500 500 255 " + b"7 " * 750_000,
    }
    for name, report in measured(tmp_path, passed_on).items():
        assert report["result"] == "passed on", (name, report)
        assert report["peak"] <= SLACK, (name, report)


def test_metadata_takes_no_more_than_a_few_megabytes(tmp_path):
    files = {
        "EXIF entries that share bytes, JPEG": jpeg_with_exif(2000, 40_000),
        "EXIF entries that share bytes, PNG": with_chunks(chunk(b"eXIf", exif(20_000, 4_000_000))),
        "private chunks": with_chunks(chunk(b"prVt", bytes(900_000)) * 5),
    }
    for name, report in measured(tmp_path, files).items():
        assert report["result"] == "composite", name
        assert report["peak"] <= 24 << 20, (name, report)


def test_memory_is_given_back_after_attacks_and_real_frames(tmp_path):
    frame = saved(photo(3840, 2160), "JPEG")
    files = {f"{at}": attack() for at in range(4)} | {f"{at}": frame for at in range(4, 16)}
    reports = list(measured(tmp_path, files).values())
    assert {report["result"] for report in reports[4:]} == {"composite"}
    assert reports[-1]["left"] <= SLACK
    assert reports[-1]["left"] - reports[5]["left"] <= 4 << 20  # and it does not grow


def test_the_measurement_sees_a_picture_that_is_not_bounded(tmp_path):
    (report,) = measured(tmp_path, {"49 megapixels": attack()}, max_bytes=1 << 40).values()
    assert report["peak"] > 3 * MAX_PICTURE_BYTES


def _many_scans() -> bytes:
    """Return a progressive JPEG whose last scan is repeated a thousand times."""
    data = saved(photo(64, 64), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * 1000 + data[-2:]


# -- the event loop ----------------------------------------------------------------------------------------------------


async def _longest_share_without_a_callback(data: bytes) -> float:
    """Return the longest part of the thread's work on this picture in which the event loop ran no callback, 0 to 1.

    The work is measured in the thread's own processor time, so that other processes do not change the result.
    """
    clocks: list[int] = []
    times: list[float] = []

    def load() -> None:
        clocks.append(time.pthread_getcpuclockid(threading.get_ident()))
        times.append(time.thread_time())
        with Image.open(BytesIO(data)) as opened:
            opened.load()

    def look() -> None:
        if clocks:
            times.append(time.clock_gettime(clocks[0]))
        asyncio.get_running_loop().call_soon(look)

    Image.init()
    look()
    await PICTURES.run("", load)
    return max(later - earlier for earlier, later in pairwise(times)) / (times[-1] - times[0])


@pytest.mark.parametrize(("kind", "is_free"), [("JPEG", True), ("PNG", True), ("TIFF", True), ("JPEG2000", False)])
async def test_callbacks_run_while_a_picture_is_decoded(kind, is_free):
    frame = photo(3840, 2160) if is_free else photo(1600, 1200)
    share = await _longest_share_without_a_callback(
        saved(frame, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    )
    assert (share < 0.7) is is_free  # JPEG 2000 shows that this can fail, and why it is not decoded


async def test_json_is_answered_while_a_picture_is_decoded(serving, scripted, monkeypatch):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    begun, go_on, real = threading.Event(), threading.Event(), drawing.decode

    def slow(data):
        PICTURES.hold(12_345)
        begun.set()
        assert go_on.wait(30)
        return real(data)

    monkeypatch.setattr(drawing, "decode", slow)
    picture = base64.b64encode(saved(photo(300, 200), "JPEG")).decode()
    body = {"image_b64": picture, "crops": [{"class": "fox", "bbox": [9, 9, 99, 99]}]}

    async def crop() -> int:
        async with sidecar.post(body, path=CROP) as response:
            return response.status

    crops = [asyncio.create_task(crop()) for _ in range(3)]
    try:
        await asyncio.to_thread(begun.wait, 30)
        async with sidecar.post() as response:
            assert response.status == 200
        assert PICTURES.bytes == 12_345
        crops[0].cancel()
    finally:
        go_on.set()
    assert await asyncio.gather(*crops[1:]) == [200, 200]
    assert PICTURES.bytes == 0


async def test_keys_take_turns_and_one_job_runs_at_a_time():
    memory, go_on, order = PictureMemory(), threading.Event(), []

    def job(name: str) -> None:
        assert go_on.wait(30)
        order.append(name)

    jobs = [memory.run(name[0], partial(job, name)) for name in ("a1", "a2", "a3", "b1", "b2", "c1")]
    tasks = [asyncio.create_task(each) for each in jobs]
    await asyncio.sleep(0)  # each task has begun
    tasks[1].cancel()
    go_on.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == ["a1", "b1", "c1", "a3", "b2"]


async def test_a_job_that_fails_keeps_no_picture_and_counts_nothing():
    memory = PictureMemory(max_bytes=100)

    def job() -> None:
        memory.hold(100)
        picture = bytearray(100)
        try:
            int("no number")
        except ValueError:
            memory.hold(len(picture) + 1)

    with pytest.raises(PictureTooLarge) as caught:
        await memory.run("", job)
    assert memory.bytes == 0
    frames = []
    traceback = caught.value.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    assert not any(isinstance(value, bytearray) for frame in frames for value in frame.f_locals.values())


# -- the pixels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_frame_is_upright_in_strips_and_shrunk(kind, mode, orientation, monkeypatch):
    monkeypatch.setattr(pixels, "_STRIP_BYTES", 4 * 240 * 10)  # strips of 10 rows
    source = photo(240, 100).convert(mode)
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = saved(source, kind, exif=tags)
    with Image.open(BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    frame = decode(data)
    assert (frame.width, frame.height) == frame.image.size == expected.size
    assert np.array_equal(np.asarray(frame.image), np.asarray(expected))
    if kind == "PNG" and (mode, orientation) != ("RGB", 1):
        monkeypatch.setattr(pixels, "SHRINKS", (2,))
        small = decode(data)
        assert (small.width, small.height) == expected.size
        assert small.image.size == tuple(-(-side // 2) for side in expected.size)
        assert np.array_equal(np.asarray(small.image), np.asarray(expected.reduce(2)))


@pytest.mark.parametrize(("width", "height"), [(3840, 2160), (5472, 3648)])
async def test_boxes_of_a_large_frame_are_drawn_and_enlarged_where_they_are(serving, scripted, width, height):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    picture = Image.new("RGB", (width, height))
    box = (width // 2, height // 2, width // 2 + 400, height // 2 + 400)
    picture.paste("red", box)
    body = {
        "image_b64": base64.b64encode(saved(picture, "JPEG")).decode(),
        "crops": [{"class": "fox", "bbox": box, "confidence": 0.9}],
    }
    async with sidecar.post(body, path=CROP) as response:
        assert response.status == 200
    sent, prompt = json.loads(upstream.seen[-1].body)["messages"][0]["content"]
    assert f"bbox={list(box)}" in prompt["text"]
    url = sent["image_url"]["url"]
    shown = Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    assert shown.size == (width // 2 + 384, height // 2)
    frame = np.asarray(shown)[:, : width // 2]
    red = (frame[..., 0] > 150) & (frame[..., 2] < 100)
    rows, columns = np.nonzero(red)
    for found, expected in zip(
        (columns.min(), rows.max(), columns.max()), (box[0] / 2, box[3] / 2, box[2] / 2), strict=True
    ):
        assert abs(found - expected) <= 4
    red, _, blue = shown.getpixel((width // 2 + 192, height // 4))  # the middle of the panel
    assert red > 150 > blue


async def test_detections_in_a_large_frame_have_the_coordinates_of_the_picture(serving, tmp_path):
    sidecar = await serving(backend="simulated", detector_model=str(yolov10(tmp_path / "m", [[0, 0, 32, 64, 0.9, 0]])))
    body = {"image_b64": base64.b64encode(saved(Image.new("RGB", (7000, 5000), "white"), "JPEG")).decode()}
    async with sidecar.post(body, path=DETECT) as response:
        assert response.status == 200
        boxes = [tuple(found["bbox"]) for found in (await response.json())["crops_b64"]]
    assert (0, 0, 3500, 5000) in boxes


@pytest.mark.parametrize("path", [CROP, DETECT])
async def test_a_picture_over_the_bound_is_a_400_that_says_what_to_do(serving, tmp_path, path):
    sidecar = await serving(backend="simulated", detector_model=str(yolov10(tmp_path / "m", [[1, 1, 9, 9, 0.9, 0]])))
    picture = base64.b64encode(attack()).decode()
    async with sidecar.post({"image_b64": picture, "crops": [{"bbox": [1, 1, 99, 99]}]}, path=path) as response:
        assert response.status == 400
        text = await response.text()
    for part in ("Invalid image data", "7000 x 7000", "64 MiB", "smaller"):
        assert part in text
