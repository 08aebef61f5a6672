"""The cost of sound and film in LLM tokens, read from the header of the file. Nothing is decoded.

Sources: the video rule is `qwen-vl-utils` (QwenLM/Qwen2.5-VL): two frames per second, at least 4 and at most 768; two
frames share their tokens; the more frames, the smaller each one. The audio rule is DashScope's for qwen-omni: 25 tokens
per second.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from backends.media import image_tokens

#: Frames that the provider takes from one second of film, if the request does not say it.
FRAMES_PER_SECOND = 2.0
_MIN_FRAMES, _MAX_FRAMES = 4, 768
#: Patches of one frame, at least and at most, and of all frames of a film together.
_MIN_PATCHES, _MAX_PATCHES, _TOTAL_PATCHES = 128, 768, 24_576
#: Consecutive frames that share their tokens.
_FRAMES_TOGETHER = 2
AUDIO_TOKENS_PER_SECOND = 25
#: Seconds that are assumed for a film or a sound whose header cannot be read, for example one that is given by a URL.
UNKNOWN_FILM_SECONDS, UNKNOWN_SOUND_SECONDS = 10.0, 30.0
#: Pixels that are assumed for a frame whose size cannot be read: a camera's 1080p.
UNKNOWN_FRAME = (1920, 1080)

#: Bytes of one second of a WAV file, at least. Speech in the smallest usual form takes 1,625 (GSM at 13 kbit/s).
_MIN_WAV_BYTES = 1000.0

#: Kilobits per second of an MP3 file, by the number in its frame header: MPEG-1 layer 3, and MPEG-2 layer 3.
_MP3_KILOBITS = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)


@dataclass(frozen=True, slots=True)
class Film:
    """A film, or a list of frames that the provider treats as one."""

    frames: float
    size: tuple[int, int] = UNKNOWN_FRAME
    """Width and height of a frame in pixels."""


def film_tokens(film: Film, model: str) -> int:
    """Return the number of LLM tokens that `model` counts for a film."""
    frames = min(max(ceil(film.frames), _MIN_FRAMES), _MAX_FRAMES)
    patch = 32 if model.startswith("qwen3") else 28
    most = max(min(_MAX_PATCHES, _TOTAL_PATCHES / frames * _FRAMES_TOGETHER), _MIN_PATCHES * 1.05)
    of_one = image_tokens(
        *film.size, model, min_pixels=_MIN_PATCHES * patch * patch, max_pixels=int(most) * patch * patch
    )
    return ceil(frames / _FRAMES_TOGETHER) * (of_one - 2) + 2  # 2: the tokens that mark the start and the end


def film_of(data: bytes, frames_per_second: float = FRAMES_PER_SECOND) -> Film:
    """Return what the beginning of a film says about it: MP4 and MOV whose index (`moov`) comes first."""
    seconds = _mp4_seconds(data) or UNKNOWN_FILM_SECONDS
    return Film(seconds * frames_per_second, _mp4_size(data) or UNKNOWN_FRAME)


def sound_tokens(seconds: float) -> int:
    """Return the number of LLM tokens of a sound."""
    return ceil(max(seconds, 1.0) * AUDIO_TOKENS_PER_SECOND)


def sound_seconds(data: bytes, total_bytes: int) -> float:
    """Return the duration of a sound from its beginning and its length in bytes: WAV and MP3."""
    per_second = _wav_bytes_per_second(data) or _mp3_bytes_per_second(data)
    return total_bytes / per_second if per_second else UNKNOWN_SOUND_SECONDS


def _wav_bytes_per_second(data: bytes) -> float:
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE" or (at := data.find(b"fmt ")) < 0:
        return 0.0
    given = int.from_bytes(data[at + 16 : at + 20], "little")
    return max(given, _MIN_WAV_BYTES) if given else 0.0


def _mp3_bytes_per_second(data: bytes) -> float:
    at = 0
    if data[:3] == b"ID3" and len(data) >= 10:  # a tag comes before the first frame; each byte of its size has 7 bits
        at = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    head = data[at : at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:  # the mark of a frame, and layer 3
        return 0.0
    kilobits = _MP3_KILOBITS[0 if head[1] & 0x18 == 0x18 else 1]
    number = head[2] >> 4
    return kilobits[number] * 125.0 if number < len(kilobits) else 0.0


def _mp4_seconds(data: bytes) -> float:
    at = data.find(b"mvhd")
    if at < 0:
        return 0.0
    wide = data[at + 4 : at + 5] == b"\1"
    scale_at, length = (at + 24, 8) if wide else (at + 16, 4)
    scale = int.from_bytes(data[scale_at : scale_at + 4])
    duration = data[scale_at + 4 : scale_at + 4 + length]
    if not scale or len(duration) < length or duration == b"\xff" * length:
        return 0.0
    return int.from_bytes(duration) / scale


def _mp4_size(data: bytes) -> tuple[int, int] | None:
    """Return the size of the first track that has one, from 1 x 1 to 16384 x 16384 pixels."""
    at = data.find(b"tkhd")
    while at >= 0:
        size_at = at + (92 if data[at + 4 : at + 5] == b"\1" else 80)
        width, height = int.from_bytes(data[size_at : size_at + 2]), int.from_bytes(data[size_at + 4 : size_at + 6])
        if 0 < width <= 16384 and 0 < height <= 16384:
            return width, height
        at = data.find(b"tkhd", at + 4)
    return None
