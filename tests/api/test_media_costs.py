"""Frames, film and sound are counted at what the provider charges, wherever they appear; never as characters."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import wave

import pytest
from PIL import Image

from backends.media import image_tokens
from sidecar.api import native, openai, passthrough
from sidecar.api.body import UNKNOWN_IMAGE_TOKENS, UNKNOWN_MEDIUM_TOKENS, parse_body

MODEL = "qwen-vl-plus"
#: By hand from the rule: 1080p frames of at most 768 patches of 28 x 28 pixels are 36 x 20 patches.
TOKENS_OF_TWO_FRAMES = 720


def jpeg(width: int, height: int, padding: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "JPEG")
    return file.getvalue() + bytes(padding)


def wav(seconds: float) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(int(seconds * 32_000)))
    return file.getvalue()


def mp3(seconds: float) -> bytes:
    """Return a tag, and frame headers of MPEG-1 layer 3 with 128 kbit/s, as long as the sound would be."""
    return b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + b"\xff\xfb\x90\x00" + bytes(int(seconds * 16_000) - 24)


def mp4(seconds: float, width: int, height: int, *, wide: bool = False) -> bytes:
    """Return the beginning of a film whose index comes first, and 300 kB of its frames."""

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", 8 + len(content)) + kind + content

    times = (
        struct.pack(">QQIQ", 0, 0, 600, int(seconds * 600))
        if wide
        else struct.pack(">IIII", 0, 0, 600, int(seconds * 600))
    )
    mvhd = bytes([wide, 0, 0, 0]) + times + bytes(80)
    track = struct.pack(">QQIIQ", 0, 0, 1, 0, 0) if wide else struct.pack(">IIIII", 0, 0, 1, 0, 0)
    tkhd = bytes([wide, 0, 0, 0]) + track + bytes(8 + 8 + 36) + struct.pack(">II", width << 16, height << 16)
    moov = box(b"moov", box(b"mvhd", mvhd) + box(b"trak", box(b"tkhd", tkhd)))
    return box(b"ftyp", b"isom\0\0\2\0isomiso2") + moov + box(b"mdat", bytes(300_000))


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


FRAME = data_url("image/jpeg", jpeg(1280, 720, padding=1_000_000))
FRAME_TOKENS = image_tokens(1280, 720, MODEL)
SMALL_FRAME_TOKENS = image_tokens(1280, 720, MODEL, max_pixels=100_000)
STILL = data_url("image/jpeg", jpeg(1920, 1080))
WAV = base64.b64encode(wav(60)).decode()


def film(seconds: float, *, wide: bool = False) -> dict[str, str]:
    return {"url": data_url("video/mp4", mp4(seconds, 1920, 1080, wide=wide))}


def film_cost(frames: int) -> int:
    return frames // 2 * TOKENS_OF_TWO_FRAMES + 2


def of_chat(part) -> float:
    body = {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
    return openai.parse_chat(json.dumps(body).encode()).tokens(MODEL)


def of_native(part) -> float:
    body = {"model": MODEL, "input": {"messages": [{"role": "user", "content": [part]}]}}
    return parse_body(json.dumps(body).encode(), native._read).tokens(MODEL)


def of_any(body) -> float:
    return passthrough._parsed(json.dumps(body).encode()).tokens(MODEL)


@pytest.mark.parametrize(
    ("part", "tokens"),
    [
        ({"type": "image_url", "image_url": {"url": FRAME}}, FRAME_TOKENS),
        ({"type": "image_url", "image_url": {"url": FRAME}, "max_pixels": 100_000}, SMALL_FRAME_TOKENS),
        ({"type": "image_url", "image_url": {"url": "https://cameras.lan/1.jpg"}}, UNKNOWN_IMAGE_TOKENS),
        ({"type": "video_url", "video_url": film(10)}, film_cost(20)),
        ({"type": "video_url", "video_url": film(10, wide=True)}, film_cost(20)),
        ({"type": "video_url", "video_url": film(32), "fps": 0.5}, film_cost(16)),
        ({"type": "video_url", "video_url": {"url": "https://cameras.lan/1.mp4"}}, film_cost(20)),
        ({"type": "video", "video": [STILL] * 6}, film_cost(6)),
        ({"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}}, 60 * 25),
        ({"type": "input_audio", "input_audio": {"data": data_url("", wav(8))}}, 8 * 25),
        ({"type": "input_audio", "input_audio": {"data": data_url("audio/mpeg", mp3(20))}}, 20 * 25),
        ({"type": "input_audio", "input_audio": {"data": "https://cameras.lan/1.wav"}}, 30 * 25),
        ({"type": "file", "file": {"file_data": data_url("application/pdf", bytes(500_000))}}, UNKNOWN_MEDIUM_TOKENS),
    ],
)  # fmt: skip
def test_media_in_a_chat(part, tokens):
    assert of_chat(part) == pytest.approx(tokens, abs=2)


@pytest.mark.parametrize(
    ("part", "tokens"),
    [
        ({"image": FRAME}, FRAME_TOKENS),
        ({"video": "https://cameras.lan/1.mp4"}, 10 * TOKENS_OF_TWO_FRAMES + 2),
        ({"video": [STILL] * 8, "fps": 4}, film_cost(8)),
        ({"audio": data_url("audio/wav", wav(12))}, 12 * 25),
        ({"text": "x" * 35}, 10),
    ],
)
def test_media_in_a_native_request(part, tokens):
    assert of_native(part) == pytest.approx(tokens, abs=2)


def test_a_long_film_costs_no_more_than_the_providers_bound():
    part = {"video": data_url("video/mp4", mp4(3600, 1920, 1080))}
    assert of_native(part) < 24_576 * 1.1 * 2.2  # 768 frames of the smallest size
    assert of_native({"video": data_url("video/mp4", mp4(0.1, 1920, 1080))}) == 2 * TOKENS_OF_TWO_FRAMES + 2


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (
            {"model": "m", "instructions": "x" * 70, "input": [{"role": "user", "content": [
                {"type": "input_image", "image_url": FRAME}, {"type": "input_text", "text": "y" * 70}]}]},
            FRAME_TOKENS + 40,
        ),
        ({"input": [{"content": [{"type": "input_file", "file_data": "JVBERi0x" * 50_000}]}]}, UNKNOWN_MEDIUM_TOKENS),
        ({"model": "e", "input": {"contents": [{"image": FRAME}, {"text": "z" * 70}]}}, FRAME_TOKENS + 20),
        ({"model": "e", "input": ["a" * 35, "b" * 35]}, 20),
        ({"model": "e", "input": [[11, 12, 13], [14, 15]]}, 5),
        ({"model": "e", "input": list(range(7000))}, 7000),
        ({"model": "x", "anything": {"else": FRAME}}, FRAME_TOKENS),
        ({"model": "x", "anything": {"else": "QUJD" * 100_000}}, UNKNOWN_MEDIUM_TOKENS),
    ],
    ids=["responses", "file", "picture embedding", "embedding", "tokens", "many tokens", "unknown name", "base64"],
)  # fmt: skip
def test_media_in_responses_and_embeddings(body, tokens):
    assert of_any(body) == pytest.approx(tokens, abs=15)  # names of roles and types count as text


def test_a_body_of_millions_of_values_is_not_searched_completely():
    body = {"model": "m", "input": [{}] * 1_000_000}
    assert of_any(body) < 10


@pytest.mark.parametrize(
    "value", [None, 7, True, [], {}, "", [[[]]], {"url": 5}, "data:", "data:,", "data:;base64,%%%"]
)
def test_odd_values_cost_something_finite(value):
    for name in ("video", "video_url", "audio", "input_audio", "file", "unknown"):
        assert 0 <= of_chat({"type": name, name: value, "fps": value}) < 20_000
        assert 0 <= of_any({name: value}) < 20_000
        assert math.isfinite(of_native({name: value, "fps": math.pi}))


async def test_a_frame_of_a_megabyte_through_responses_does_not_exhaust_a_limit_of_tokens(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(
        dashscope_url=f"{upstream.origin}/v1", passthrough=True, tokens_per_minute=60_000, deadline=10
    )
    body = {"model": "m", "input": [{"role": "user", "content": [{"type": "input_image", "image_url": FRAME}]}]}
    for _ in range(4):
        async with sidecar.post(body, path="/v1/responses") as response:
            assert response.status == 200, await response.text()
