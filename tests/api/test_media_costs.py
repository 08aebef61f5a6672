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
from sidecar.api.body import UNKNOWN_IMAGE_TOKENS, UNKNOWN_MEDIUM_TOKENS, ParsedBody, parse_body
from sidecar.api.media import count_media

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


def deep(levels: int) -> list:
    value: list = ["https://cameras.lan/1.jpg"]
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("name", ["image", "images", "video_url", "audio", "file"])
def test_a_deep_list_of_media_is_read_like_a_flat_one(name):
    assert of_chat({"type": "x", name: deep(800)}) == of_chat({"type": "x", name: deep(0)}) > 0
    assert of_any({name: deep(800)}) == of_any({name: deep(0)})


class CountingUrls(list):
    """A list that says how many of its entries were taken."""

    taken = 0

    def __getitem__(self, at):
        entries = super().__getitem__(at)
        self.taken = max(self.taken, len(entries))
        return entries


@pytest.mark.parametrize("name", ["image", "video", "audio_url", "file"])
def test_all_media_of_a_body_together_are_looked_at_within_one_budget(name):
    parsed = ParsedBody("m", stream=False)
    first, second = CountingUrls(["b"] * 15_000), CountingUrls(["b"] * 1_000_000)
    count_media(name, first, {}, parsed)
    count_media(name, second, {}, parsed)
    count_media(name, second, {}, parsed)
    assert (first.taken, second.taken, parsed.values_left) == (15_000, 5_000, 0)
    assert len(parsed.images) + len(parsed.films) + len(parsed.sound_seconds) <= 1000


@pytest.mark.parametrize(("name", "each"), [("image", UNKNOWN_IMAGE_TOKENS), ("audio", 30 * 25)])
def test_media_after_the_thousandth_have_a_constant_cost(name, each):
    parsed = ParsedBody("m", stream=False)
    count_media(name, ["https://cameras.lan/1"] * 1300, {}, parsed)
    assert len(parsed.images) + len(parsed.sound_seconds) == 1000
    assert parsed.unknown_media == 300
    assert count_media(name, "https://cameras.lan/1", {}, parsed)
    parsed.add_image((1280, 720), {})
    assert parsed.unknown_media == 302


@pytest.mark.parametrize("part", [{"type": "x", "image": "b"}, {"type": "x", "image_url": ["b"] * 50}, "four"])
@pytest.mark.parametrize("in_one_message", [False, True])
def test_a_chat_of_very_many_parts_is_not_searched_completely(part, in_one_message):
    many = 1_700 if "image_url" in part else 15_000 if "image" in part else 16_000
    messages, parts = (1, many * (2 if part == "four" else 1)) if in_one_message else (many, 1)
    body = {"messages": [{"role": "user", "content": [part] * parts}] * messages}
    parsed = openai.parse_chat(json.dumps(body).encode())
    assert parsed.values_left <= 0
    assert len(parsed.images) <= 1000
    assert parsed.text_chars <= 20_000 * len("four")


def png(width: int, height: int) -> str:
    return data_url("image/png", b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + bytes(20))


def slow_wav(bytes_per_second: int, length: int) -> str:
    head = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0" + struct.pack("<II", 8000, bytes_per_second)
    return data_url("audio/wav", head + bytes(length - len(head)))


@pytest.mark.parametrize("model", ["qwen-vl-plus", "qwen3-vl-plus"])
@pytest.mark.parametrize("size", [(3_999_999_999, 1), (2, 4_000_000_000), (4_000_000_000, 4_000_000_000), (11, 11)])
@pytest.mark.parametrize("least", [None, 1 << 29, 1 << 30])
def test_no_header_and_no_bound_of_an_image_claims_more_than_the_provider_takes(model, size, least):
    part = {"type": "image_url", "image_url": {"url": png(*size)}, "min_pixels": least, "max_pixels": 1 << 30}
    body = json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()
    assert 0 < openai.parse_chat(body).tokens(model) <= 16_384 + 2


def test_an_image_of_the_most_extreme_shape_that_is_accepted_costs_what_the_rule_says():
    assert image_tokens(28 * 200, 28, MODEL) == image_tokens(28 * 900, 28, MODEL) == 200 + 2
    assert image_tokens(28, 28 * 150, MODEL) == 150 + 2


def test_a_sound_is_not_longer_than_its_bytes_can_be():
    assert of_native({"audio": slow_wav(3, 90_000)}) == pytest.approx(90 * 25, abs=2)
    assert of_native({"audio": slow_wav(2000, 90_000)}) == pytest.approx(45 * 25, abs=2)
    assert of_native({"audio": slow_wav(0, 90_000)}) == 30 * 25


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "word " * 900_000},
        {"type": "x", "images": ["https://cameras.lan/1.jpg"] * 2500},
        {"type": "video", "video": [png(4_000_000_000, 1)] * 768},
        {"type": "input_audio", "input_audio": {"data": "https://cameras.lan/1.wav"}, "audio": ["b"] * 9000},
    ],
)
def test_one_request_claims_at_most_the_longest_context(part):
    assert 0 < of_chat(part) <= 1_000_000
    assert of_any({"model": "m", "input": [part], "more": [1] * 100_000}) <= 1_000_000
