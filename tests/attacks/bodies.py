"""The bodies that the attackers send. Each is made once."""

from __future__ import annotations

import base64
import functools
import json
import struct
import zlib

from attacks.sockets import MIB

#: Bytes. The default of SIDECAR_MAX_BODY_BYTES is 14 MiB: the largest bodies stay just below it.
LARGEST = 14 * MIB - 1024
MODEL = "qwen-vl-plus"


def chat(model: str = MODEL, text: str = "hi", **fields: object) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
    return json.dumps(body, separators=(",", ":")).encode()


def _with(field: bytes, piece: bytes, end: bytes, size: int = LARGEST) -> bytes:
    """Return a chat with a further field, filled with `piece` up to `size` bytes."""
    start = chat()[:-1] + b"," + field
    return start + piece * ((size - len(start) - len(end)) // len(piece)) + end


@functools.cache
def tiny_objects() -> bytes:
    return _with(b'"a":[', b"{},", b"{}]}")


@functools.cache
def deep() -> bytes:
    return _with(b'"a":', b"[", b"]}")


@functools.cache
def digits() -> bytes:
    return _with(b'"max_tokens":', b"7", b"}", size=1_000_000)


@functools.cache
def invalid(size: int) -> bytes:
    """A body that is JSON until its last byte."""
    return _with(b'"a":[', b'"b",', b"]", size=size)


@functools.cache
def with_image(model: str, size: int) -> bytes:
    """A chat about an image with this number of bytes of base64."""
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * size}}
    message = {"role": "user", "content": [part, {"type": "text", "text": "?"}]}
    return json.dumps({"model": model, "messages": [message]}).encode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@functools.cache
def png(side: int) -> bytes:
    """A black RGB image of side by side pixels: 200 kB for a side of 7000, and 147 MB when it is decoded."""
    packer = zlib.compressobj(6)
    row = b"\0" * (1 + 3 * side)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


@functools.cache
def crops(side: int) -> bytes:
    box = {"class": "person", "confidence": 0.9, "bbox": [100, 100, side - 100, side - 100]}
    picture = base64.b64encode(png(side)).decode()
    return json.dumps({"model": MODEL, "crops": [box] * 3, "image_b64": picture}).encode()
